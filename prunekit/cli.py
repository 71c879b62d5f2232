"""The command line. Torch and all that needs it are imported inside the commands, so that help comes at once."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer

from prunekit.errors import PrunekitError

app = typer.Typer(
    name="prunekit",
    help="Learn how many channels each layer of a network needs, rebuild it with just those, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Any command takes --debug, which shows the traceback of an error. Exit status: 0 done, 2 your mistake, "
    "3 failed while running, 130 interrupted.",
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from prunekit import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads the annotation itself
        typer.Argument(metavar="[KEY=VALUE]...", help="Set keys of the recipe, e.g. train.epochs=2."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default runs/NAME.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    start_from: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--from", metavar="STAGE", help="Do this stage and the later ones again (implies --resume)."),
    ] = None,
) -> None:
    """Train, extract, slim, fine-tune, evaluate, export and report: all that a recipe says."""
    from prunekit.recipe import load

    loaded = load(recipe, overrides or [])
    from prunekit.pipeline import run_recipe

    run_recipe(
        loaded,
        out or Path("runs") / loaded.name,
        _console(),
        resume=resume or start_from is not None,
        overwrite=overwrite,
        start_from=start_from,
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for tables and plots; default RUN/report, for several runs ./report."),
    ] = None,
) -> None:
    """Tables and plots of one run, or of several side by side."""
    from prunekit.reporting import report as make

    make(runs, out, _console())


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the maps.")],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="dense, slim or finetuned; default the last that the run has."),
    ] = None,
) -> None:
    """Write the saliency map of each image, at the image's own size."""
    from prunekit.prediction import predict as make

    make(run, images, out, model, _console())


@app.command(name="list")
def list_() -> None:
    """What recipes can name: backbones, data sets, tasks and so on, and where each comes from."""
    from rich.table import Table

    from prunekit import registry
    from prunekit.recipe import shipped

    console = _console()
    table = Table("kind", "name", "from", "what it is", box=None, pad_edge=False)
    for kind in ("backbones", "datasets", "tasks", "decays", "optimizers", "schedules", "augmentations"):
        names: registry.Registry = getattr(registry, kind)
        for entry in names:
            table.add_row(names.kind, entry.name, entry.origin, entry.summary)
    for name in shipped():
        table.add_row("recipe", name, "prunekit", "")
    console.print(table)
    for failure in registry.plugin_failures():
        typer.echo(f"prunekit: {failure}", err=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``prunekit`` command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(args=arguments, prog_name="prunekit")
    except PrunekitError as error:
        _fail(str(error), error.exit_status, debug)
    except (KeyboardInterrupt, EOFError):
        _fail("interrupted; go on with --resume", 130, debug)
    except BrokenPipeError:
        # What reads our output has seen enough.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        _fail(f"unexpected {type(error).__name__}: {text}; run again with --debug to see where", 3, debug)


def _fail(message: str, status: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    for line in message.splitlines():
        print(f"prunekit: {line}", file=sys.stderr)
    sys.exit(status)


def _console():
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    main()
