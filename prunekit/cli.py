"""The command line. Torch and all that needs it are imported inside the commands, so that help comes at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from prunekit.config.user_module import trust_modules
from prunekit.errors import RecipeError
from prunekit.utils import launcher
from prunekit.utils.exit_status import exit_on_error, suggest_resume
from prunekit.utils.logging import LEVELS, is_quiet, terminal_logging
from prunekit.utils.signals import sigterm_as_interrupt

app = typer.Typer(
    name="prunekit",
    help="Learn how many channels each layer of a network needs, rebuild it with just those, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Any command takes --debug, which shows the traceback of an error; --log-level LEVEL (debug, info, warning, "
    "error), from which on the terminal shows what is said; run.log in a run folder gets all of it; and --trust, which "
    "runs the Python file that a run folder names. "
    "Exit status: 0 done, 2 your mistake, 3 failed while running, 130 interrupted.",
)

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation itself
    typer.Argument(metavar="[KEY=VALUE]...", help="Set keys of the recipe, e.g. train.epochs=2."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")]


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
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default runs/NAME.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    overwrite: Overwrite = False,
    start_from: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--from", metavar="STAGE", help="Do this stage and the later ones again (implies --resume)."),
    ] = None,
) -> None:
    """Train, extract, slim, fine-tune, evaluate, export and report: all that a recipe says."""
    from prunekit.config.recipe import load

    loaded = load(recipe, overrides or [])
    from prunekit.pipeline.runner import run_recipe

    out = out or Path("runs") / loaded.name
    with suggest_resume("run", recipe, *(overrides or []), "--out", out, "--resume"):
        run_recipe(
            loaded,
            out,
            _console(quiet=is_quiet()),
            resume=resume or start_from is not None,
            overwrite=overwrite,
            start_from=start_from,
        )


@app.command()
def report(
    runs: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Run folders; with --published none is needed."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for tables and figures; default RUN/report, for several runs ./report."),
    ] = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Where the page goes; default index.html in that folder."),
    ] = None,
    columns: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B,...", help="Columns of the summary, as in summary.csv: run,model,params,macs ..."),
    ] = None,
    sort: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="[-]COLUMN", help="Sort the summary's rows; --sort=-params puts the largest first."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print the layers too.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Add the published CSNet models, on ECSSD.")] = False,
) -> None:
    """Tables, figures and a page of one run, or of several side by side."""
    from prunekit.reporting import report as make

    make(
        runs or [],
        out,
        _console(),
        html=html,
        columns=columns,
        sort=sort,
        layers=layers,
        published=published,
    )


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    every: Annotated[float, typer.Option(metavar="SECONDS", help="How often to look.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and stop.")] = False,
) -> None:
    """Show how a run goes, until it is over, and draw its training's figures into RUN/report after each epoch."""
    from prunekit.commands.watch import watch as show

    show(run, _console(), every=every, once=once)


@app.command(name="eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FOLDER",
            help="A set and its folder: images/ and GT/ for saliency, a folder of images for each class for "
            "classification; repeatable.",
        ),
    ],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="baseline, dense, slim or finetuned; default the last."),
    ] = None,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side of the square that the model sees; default that of the run's recipe."),
    ] = None,
    own_size: Annotated[
        bool, typer.Option("--own-size", help="Let it see each image at its own size, up to the next multiple of 16.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images in hand at once.")] = 16,
    on_error: Annotated[
        str,
        typer.Option(
            metavar="raise|skip", help="What to do with images that have no mask or class, or cannot be read."
        ),
    ] = "raise",
) -> None:
    """Measure a model on data sets, by the metrics of its task."""
    from prunekit.commands.evaluate import evaluate

    evaluate(run, data, _console(), model=model, size=size, own_size=own_size, batch_size=batch_size, on_error=on_error)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for what is written.")],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="baseline, dense, slim or finetuned; default the last."),
    ] = None,
) -> None:
    """Apply a model to images: saliency maps or, for classification, a table predictions.csv."""
    from prunekit.commands.predict import predict as make

    make(run, images, out, model, _console())


@app.command()
def slim(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="New run folder; default RUN-slim.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
) -> None:
    """Extract and slim again what a run has trained, e.g. with slim.threshold=5e-2, into a new run folder."""
    from prunekit.commands.import_model import derived_recipe

    recipe = derived_recipe(run, overrides or [])
    from prunekit.pipeline.runner import slim_run

    out = out or run.with_name(f"{run.resolve().name}-slim")
    with suggest_resume("slim", run, *(overrides or []), "--out", out, "--overwrite"):
        slim_run(run, recipe, out, _console(quiet=is_quiet()), overwrite=overwrite)


@app.command()
def finetune(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="New run folder; default RUN-finetuned.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a run's slim model, e.g. with finetune.epochs=5, evaluate and export it, into a new run folder."""
    from prunekit.commands.import_model import derived_recipe

    recipe = derived_recipe(run, overrides or [])
    from prunekit.pipeline.runner import finetune_run

    out = out or run.with_name(f"{run.resolve().name}-finetuned")
    with suggest_resume("run", out / "recipe.yaml", "--out", out, "--resume"):
        finetune_run(run, recipe, out, _console(quiet=is_quiet()), overwrite=overwrite)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    form: Annotated[str, typer.Option("--format", help="onnx, openvino, pt2, or csnet (the published files).")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[data.KEY=VALUE]...", help="Where the run's data are, e.g. data.root=PHOTOS."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="baseline, dense, slim or finetuned; default the last."),
    ] = None,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Images (uint8, N×H×W×3) in; maps (uint8) or probabilities out.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="The model as it was trained: nothing folded, nothing merged.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantised, calibrated on the run's data; says what it costs.")
    ] = False,
) -> None:
    """Write a run's model as a file that needs no prunekit, into the run folder."""
    from prunekit.pipeline.export import export_run

    export_run(
        run, form, _console(), model=model, plain=plain, preprocess=preprocess, int8=int8, overrides=overrides or []
    )


@app.command()
def bench(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1",
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="N,...", help="Sides of the square inputs; default the recipe's."),
    ] = None,
    threads: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="N,...", help="Numbers of threads; default as many as there are cores."),
    ] = None,
    forms: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FORM,...",
            help="eager, deployed, compiled, ort_plain, ort, openvino_plain, openvino (all of these unless told); "
            "deployed_bf16, openvino_bf16, ort_int8, openvino_int8.",
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,...", help="Of baseline, dense, slim, finetuned; default dense,slim."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of timed calls for each row, at least.")] = 2.0,
) -> None:
    """Time a run's models in PyTorch, ONNX Runtime and OpenVINO, by turns; into RUN/bench.json and the report."""
    from prunekit.commands.bench import bench_run

    bench_run(run, _console(), batches=batch, sizes=size, threads=threads, forms=forms, models=model, seconds=seconds)


@app.command(name="import")
def import_(
    kind: Annotated[str, typer.Argument(help="csnet: the published CSNet files.")],
    checkpoint: Annotated[Path, typer.Argument(help="The .pth.tar file.")],
    out: Annotated[Path, typer.Option(help="New run folder.")],
    layout: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Its .bin file; none for a dense model."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a run folder of a model that was trained elsewhere."""
    if kind != "csnet":
        raise RecipeError(f"import {kind}: what can be imported is csnet, as in: prunekit import csnet FILE [LAYOUT] …")
    from prunekit.commands.import_model import import_run

    import_run(checkpoint, layout, out, _console(), overwrite=overwrite)


@app.command()
def groups(
    source: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe or a run folder.")],
    overrides: Overrides = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of a run: baseline, dense, slim or finetuned; default the last."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: each group with its tensors and gates.")] = False,
) -> None:
    """Which channels can only be cut together, which gates decide, what a channel costs, and what cannot be cut."""
    from prunekit.commands.groups import dump, inspect_groups, show_groups

    found = inspect_groups(source, overrides or [], model)
    if as_json:
        print(dump(found))
    else:
        show_groups(found, _console())


@app.command(name="list")
def list_() -> None:
    """What recipes can name: backbones, data sets, tasks and so on, their options, and where each comes from."""
    from prunekit.commands.list import table
    from prunekit.config import registry

    # First, so that a plugin that fails is said once, below the table.
    failures = registry.plugin_failures()
    _console().print(table())
    for failure in failures:
        print(f"prunekit: {failure}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``prunekit`` command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    trust = "--trust" in arguments
    arguments = [argument for argument in arguments if argument not in ("--debug", "--trust")]
    with exit_on_error(debug), launcher.silence_other_ranks():
        level = _level(arguments)
        launcher.begin(*arguments[:1])
        with sigterm_as_interrupt(), terminal_logging(level), trust_modules(trust):
            app(args=arguments, prog_name="prunekit")


def _level(arguments: list[str]) -> int:
    """The terminal's level; its option is taken out of the arguments."""
    name = "info"
    for index, argument in reversed(list(enumerate(arguments))):
        option, given, value = argument.partition("=")
        if option == "--log-level":
            name = value if given else "".join(arguments[index + 1 : index + 2])
            del arguments[index : index + 1 if given else index + 2]
    if name not in LEVELS:
        raise RecipeError(f"--log-level {name}: no such level; give one of {', '.join(LEVELS)}")
    return LEVELS[name]


def _console(quiet: bool = False):
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that has no × or λ is no reason to stop.
        sys.stdout.reconfigure(errors="replace")
    return Console(quiet=quiet)


if __name__ == "__main__":
    main()
