"""The command line. Commands import torch themselves, so that ``--help`` is fast."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from prunekit.config.user_module import trust_modules
from prunekit.errors import RecipeError
from prunekit.utils import launcher
from prunekit.utils.exit_status import exit_on_error, suggest_resume
from prunekit.utils.logging import LEVELS, is_quiet, terminal_logging
from prunekit.utils.signals import sigterm_as_interrupt
from prunekit.utils.streams import flush_or_discard, ignore_lost_readers

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


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="Run folder; default: runs/NAME.")] = None,
    resume: Annotated[bool, Option("--resume", help="Resume an existing run.")] = False,
    overwrite: OverwriteRun = False,
    start_from: Annotated[
        str | None,
        Option("--from", metavar="STAGE", help="Repeat this stage and all later ones (implies --resume)."),
    ] = None,
    until: Annotated[
        str | None,
        Option(metavar="STAGE", help="Stop before this stage, or before gradual_pruning; --resume continues."),
    ] = None,
) -> None:
    """Run a recipe: train, extract, slim, fine-tune, evaluate, export and report."""
    from prunekit.config.recipe import load

    loaded = load(recipe, overrides or [])
    from prunekit.pipeline.runner import run_recipe

    out = out or Path("runs") / loaded.name
    resume = resume or start_from is not None
    with suggest_resume("run", recipe, *(overrides or []), "--out", out, "--resume"):
        console = _console(quiet=is_quiet())
        run_recipe(loaded, out, console, resume=resume, overwrite=overwrite, start_from=start_from, until=until)


@app.command()
def sweep(
    recipe: RecipeName,
    settings: Annotated[
        list[str],
        Argument(metavar="KEY=VALUE,...", help="Values to combine, e.g. target.params_ratio=0.5,0.35 seed=0,1."),
    ],
    out: Annotated[Path | None, Option(help="Folder of the sweep; default: runs/RECIPE-sweep.")] = None,
    trials: Annotated[
        int | None, Option(metavar="N", help="Draw this many combinations at random; default: all.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of --trials.")] = 0,
    engine: Annotated[str, Option(help="local: processes on this machine; ray: a Ray cluster.")] = "local",
    jobs: Annotated[int | None, Option(min=1, help="Runs at the same time; default: the number of cores.")] = None,
    threads: Annotated[int, Option(min=1, help="Threads of each run.")] = 1,
    resume: Annotated[bool, Option("--resume", help="Continue a sweep, also with more values.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print the runs.")] = False,
) -> None:
    """Run a recipe once for each combination of values, share what they have in common, and report all runs."""
    from prunekit.commands.sweep import run_sweep

    out = out or Path("runs") / f"{Path(recipe).stem}-sweep"
    options = {
        "trials": trials,
        "seed": seed,
        "engine": engine,
        "jobs": jobs,
        "threads": threads,
        "resume": resume,
        "dry_run": dry_run,
    }
    with suggest_resume("sweep", recipe, *settings, "--out", out, "--resume"):
        run_sweep(recipe, settings, out, _console(), **options)


@app.command()
def validate(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_: Annotated[bool, Option("--print", help="Also print the recipe with all defaults.")] = False,
) -> None:
    """Check a recipe without running it: keys, types, ranges, names and options."""
    from prunekit.config.recipe import load

    loaded = load(recipe, overrides or [])
    # As a comment the line keeps the output with --print valid YAML.
    print(f"# {recipe}: valid")
    if print_:
        print(loaded.dump(), end="")


@app.command(name="cp")
def cp(
    recipe: RecipeName,
    file: Annotated[Path, Argument(help="New file, or an existing folder.")],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe with its comments, to edit it."""
    from prunekit.commands.copy_recipe import copy_recipe

    print(copy_recipe(recipe, file, overwrite=overwrite))


@app.command()
def report(
    runs: Annotated[list[Path] | None, Argument(help="Run folders; optional with --published.")] = None,
    out: Annotated[
        Path | None,
        Option(help="Folder for tables and figures; default: RUN/report, or ./report for several runs."),
    ] = None,
    html: Annotated[Path | None, Option(metavar="FILE", help="HTML file; default: OUT/index.html.")] = None,
    columns: Annotated[
        str | None,
        Option(metavar="A,B,...", help="Columns of the summary, as in summary.csv: run,model,params,macs ..."),
    ] = None,
    sort: Annotated[
        str | None,
        Option(metavar="[-]COLUMN", help="Sort the summary by a column; --sort=-params sorts descending."),
    ] = None,
    layers: Annotated[bool, Option("--layers", help="Also print the layers.")] = False,
    published: Annotated[bool, Option("--published", help="Add the published CSNet models (ECSSD).")] = False,
    formats: Annotated[str, Option(metavar="A,B,...", help="Formats of the figures: png, svg, pdf.")] = "png,svg",
    width: Annotated[
        float | None, Option(min=1, max=50, help="Width of the figures in inches; a column of a paper has about 3.3.")
    ] = None,
    font_size: Annotated[float | None, Option(min=3, max=30, help="Font size of the figures in points.")] = None,
    dpi: Annotated[float | None, Option(min=20, max=1200, help="Resolution of the figures.")] = None,
) -> None:
    """Write tables, figures and an HTML page of one run, or of several runs side by side."""
    from prunekit.reporting import report as write_report
    from prunekit.reporting.figures.style import FigureSize

    options = {"html": html, "columns": columns, "sort": sort, "layers": layers, "published": published}
    size = FigureSize(width, font_size, dpi)
    write_report(runs or [], out, _console(), **options, formats=formats.split(","), size=size)


@app.command()
def watch(
    run: RunFolder,
    every: Annotated[float, Option(metavar="SECONDS", help="Refresh interval.")] = 5.0,
    once: Annotated[bool, Option("--once", help="Show the status once and exit.")] = False,
) -> None:
    """Show the progress of a run until it ends, and update the figures in RUN/report after each epoch."""
    from prunekit.commands.watch import watch as watch_run

    watch_run(run, _console(), every=every, once=once)


@app.command(name="eval")
def eval_(
    run: RunFolder,
    data: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=FOLDER",
            help="Data set name and folder: images/ and GT/ for saliency, one folder of images per class for "
            "classification. Repeatable; default: the validation set of the run.",
        ),
    ] = None,
    model: Model = None,
    size: Annotated[
        int | None, Option(help="Height and width of the model input in pixels; default: the recipe's.")
    ] = None,
    own_size: Annotated[
        bool, Option("--own-size", help="Use each image's own size, rounded up to a multiple of 16.")
    ] = False,
    batch_size: Annotated[int, Option(help="Images per batch.")] = 16,
    on_error: Annotated[
        str,
        Option(metavar="raise|skip", help="What to do with unreadable images and images without mask or class."),
    ] = "raise",
    out: ResultsFolder = None,
) -> None:
    """Evaluate a model on data sets with the metrics of its task."""
    from prunekit.commands.evaluate import evaluate

    options = {"model": model, "size": size, "own_size": own_size, "batch_size": batch_size, "on_error": on_error}
    evaluate(run, data or [], _console(), **options, out=out)


@app.command()
def predict(
    run: RunFolder,
    images: Annotated[list[Path], Argument(help="Images, or folders of images.")],
    out: Annotated[Path, Option(help="Output folder.")],
    model: Model = None,
    overlay: Annotated[
        bool, Option("--overlay", help="Also write STEM-overlay.png: the image tinted by the map.")
    ] = False,
    cutout: Annotated[
        bool, Option("--cutout", help="Also write STEM-cutout.png: the object, the rest transparent.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing maps or predictions.csv.")] = False,
) -> None:
    """Apply a model to images; writes saliency maps or, for classification, predictions.csv."""
    from prunekit.commands.predict import predict as predict_images

    pictures = [name for name, wanted in (("overlay", overlay), ("cutout", cutout)) if wanted]
    predict_images(run, images, out, model, _console(), overwrite=overwrite, pictures=pictures)


@app.command()
def demo(
    run: RunFolder,
    model: Model = None,
    port: Annotated[int, Option(min=0, max=65535, help="Port of the page; 0 for a free one.")] = 7860,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 admits other machines.")] = "127.0.0.1",
    no_browser: Annotated[bool, Option("--no-browser", help="Do not open a browser.")] = False,
) -> None:
    """Open a page that applies the dense and the slim model to your pictures, side by side."""
    from prunekit.commands.demo import demo as show_demo

    show_demo(run, _console(), model=model, host=host, port=port, browser=not no_browser)


@app.command()
def slim(
    run: RunFolder,
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="New run folder; default: RUN-slim.")] = None,
    overwrite: OverwriteRun = False,
) -> None:
    """Prune a trained run again, e.g. with slim.threshold=5e-2, into a new run folder."""
    from prunekit.commands.import_model import derived_recipe

    recipe = derived_recipe(run, overrides or [])
    from prunekit.pipeline.runner import slim_run

    out = out or run.with_name(f"{run.resolve().name}-slim")
    with suggest_resume("slim", run, *(overrides or []), "--out", out, "--overwrite"):
        slim_run(run, recipe, out, _console(quiet=is_quiet()), overwrite=overwrite)


@app.command()
def finetune(
    run: RunFolder,
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="New run folder; default: RUN-finetuned.")] = None,
    overwrite: OverwriteRun = False,
) -> None:
    """Fine-tune, evaluate and export the slim model of a run into a new folder, e.g. with finetune.epochs=5."""
    from prunekit.commands.import_model import derived_recipe

    recipe = derived_recipe(run, overrides or [])
    from prunekit.pipeline.runner import finetune_run

    out = out or run.with_name(f"{run.resolve().name}-finetuned")
    with suggest_resume("run", out / "recipe.yaml", "--out", out, "--resume"):
        finetune_run(run, recipe, out, _console(quiet=is_quiet()), overwrite=overwrite)


@app.command()
def export(
    run: RunFolder,
    form: Annotated[str, Option("--format", help="onnx, openvino, pt2, or csnet (the published files).")],
    overrides: Annotated[
        list[str] | None,
        Argument(metavar="data.KEY=VALUE", help="Where the run's data are now, e.g. data.root=PHOTOS."),
    ] = None,
    model: Model = None,
    preprocess: Annotated[
        bool,
        Option("--preprocess", help="Include preprocessing: uint8 images (N×H×W×3) in, maps or probabilities out."),
    ] = False,
    plain: Annotated[bool, Option("--plain", help="Export the model as trained, without optimizations.")] = False,
    int8: Annotated[
        bool,
        Option("--int8", help="Quantize to int8, calibrated on the run's data; reports the loss in accuracy."),
    ] = False,
) -> None:
    """Export a run's model to a file that needs no prunekit, in the run folder."""
    from prunekit.pipeline.export import export_run

    export_run(
        run, form, _console(), model=model, plain=plain, preprocess=preprocess, int8=int8, overrides=overrides or []
    )


@app.command()
def bench(
    run: RunFolder,
    batch: Annotated[str, Option(metavar="N,...", help="Batch sizes.")] = "1",
    size: Annotated[
        str | None,
        Option(metavar="N,...", help="Heights and widths of the inputs in pixels; default: the recipe's."),
    ] = None,
    threads: Annotated[
        str | None, Option(metavar="N,...", help="Numbers of threads; default: the number of cores.")
    ] = None,
    forms: Annotated[
        str | None,
        Option(
            metavar="FORM,...",
            help="eager, deployed, compiled, ort_plain, ort, openvino (default: all of these); "
            "openvino_plain, deployed_bf16, openvino_bf16, ort_int8, openvino_int8.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(metavar="NAME,...", help="Any of baseline, dense, slim, finetuned; default: dense,slim."),
    ] = None,
    seconds: Annotated[float, Option(help="Minimum measuring time of each row, in seconds.")] = 2.0,
    out: ResultsFolder = None,
) -> None:
    """Measure the latency of a run's models in PyTorch, ONNX Runtime and OpenVINO; writes RUN/bench.json."""
    from prunekit.commands.bench import bench_run

    options = {"batches": batch, "sizes": size, "threads": threads, "forms": forms, "models": model}
    bench_run(run, _console(), **options, seconds=seconds, out=out)


@app.command(name="import")
def import_(
    kind: Annotated[str, Argument(help="csnet: the published CSNet files.")],
    checkpoint: Annotated[Path, Argument(help=".pth.tar file.")],
    out: Annotated[Path, Option(help="New run folder.")],
    layout: Annotated[Path | None, Argument(help=".bin file; not needed for a dense model.")] = None,
    overwrite: OverwriteRun = False,
) -> None:
    """Create a run folder from a model that was trained elsewhere."""
    if kind != "csnet":
        raise RecipeError(f"import {kind}: unknown kind; use csnet, as in: prunekit import csnet FILE [LAYOUT] …")
    from prunekit.commands.import_model import import_run

    import_run(checkpoint, layout, out, _console(), overwrite=overwrite)


@app.command()
def groups(
    source: Annotated[str, Argument(metavar="RECIPE|RUN", help="Recipe, run folder or shipped model.")],
    overrides: Overrides = None,
    model: Model = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON: each group with its tensors and gates.")] = False,
) -> None:
    """List the groups of channels that are pruned together, with gates and costs, and what cannot be pruned."""
    from prunekit.commands.groups import dump, inspect_groups, show_groups

    found = inspect_groups(source, overrides or [], model)
    if as_json:
        print(dump(found))
    else:
        show_groups(found, _console())


@app.command()
def profile(
    source: Annotated[str, Argument(metavar="RECIPE|RUN", help="Recipe, run folder or shipped model.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(metavar="FILE", help="JSON file for the latencies, for latency.table.")] = None,
    figure: Annotated[Path | None, Option(metavar="FILE", help="Draw them: a PNG, SVG or PDF.")] = None,
    write_variants: Annotated[
        Path | None, Option(metavar="DIR", help="Write ONNX files to time on another machine; time nothing here.")
    ] = None,
) -> None:
    """Measure where the time of a network goes, by layer and number of channels, for target.latency_ratio."""
    from prunekit.commands.profile import profile_recipe

    profile_recipe(source, overrides or [], _console(), out, figure, write_variants)


@app.command(name="list")
def list_() -> None:
    """List the shipped recipes and models, and all names that recipes can use, with their options and origin."""
    from prunekit.commands.list import table
    from prunekit.config import registry

    # Load the plugins first, so that a failure is reported once, below the table.
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
    level_name = _pop_log_level(arguments)
    # A command goes on when nobody reads its output, except the one that only shows something until it is stopped.
    output = contextlib.nullcontext() if arguments[:1] == ["watch"] else ignore_lost_readers()
    try:
        with output, exit_on_error(debug), launcher.silence_other_ranks():
            level = _level(level_name)
            launcher.exit_other_ranks(*arguments[:1])
            with sigterm_as_interrupt(), terminal_logging(level), trust_modules(trust):
                app(args=arguments, prog_name="prunekit")
    finally:
        flush_or_discard()


def _pop_log_level(arguments: list[str]) -> str:
    name = "info"
    for index, argument in reversed(list(enumerate(arguments))):
        option, equals, value = argument.partition("=")
        if option == "--log-level":
            name = value if equals else "".join(arguments[index + 1 : index + 2])
            del arguments[index : index + 1 if equals else index + 2]
    return name


def _level(name: str) -> int:
    if name not in LEVELS:
        raise RecipeError(f"--log-level {name}: unknown level; use one of {', '.join(LEVELS)}")
    return LEVELS[name]


def _console(quiet: bool = False):
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        # A terminal without × or λ must not stop a command.
        sys.stdout.reconfigure(errors="replace")
    return Console(quiet=quiet)


if __name__ == "__main__":
    main()
