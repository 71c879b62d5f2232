"""The application, and arguments that several commands take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

app = typer.Typer(
    name="prunekit",
    help="Learn how many channels each layer of a network needs, remove the others, and check that the result is "
    "equivalent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="All commands accept --debug (show the traceback of an error), --log-level LEVEL (debug, info, warning or "
    "error: least severe messages shown in the terminal; run.log in the run folder has all of them) and --trust (run "
    "the Python file that a run folder names). "
    "Exit status: 0 success, 2 usage error, 3 failure while running, 130 interrupted.",
)

RecipeName = Annotated[str, Argument(help="Recipe file, or name of a shipped recipe.")]
RunFolder = Annotated[Path, Argument(help="Run folder, or name of a shipped model.")]
Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="Set recipe keys, e.g. train.epochs=2.")]
OverwriteRun = Annotated[bool, Option("--overwrite", help="Replace an existing run.")]
ResultsFolder = Annotated[
    Path | None, Option(help="Folder for the results; default: RUN. With it, nothing is written into RUN.")
]
Model = Annotated[str | None, Option(help="baseline, dense, slim or finetuned; default: the last one the run has.")]


def _print_version(requested: bool) -> None:
    if requested:
        from prunekit import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def make_console(quiet: bool = False):
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        # A terminal without × or λ must not stop a command.
        sys.stdout.reconfigure(errors="replace")
    return Console(quiet=quiet)
