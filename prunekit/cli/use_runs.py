"""Commands that read runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from prunekit.cli.app import Model, Overrides, ResultsFolder, RunFolder, app, make_console


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
    write_report(runs or [], out, make_console(), **options, formats=formats.split(","), size=size)


@app.command()
def watch(
    run: RunFolder,
    every: Annotated[float, Option(metavar="SECONDS", help="Refresh interval.")] = 5.0,
    once: Annotated[bool, Option("--once", help="Show the status once and exit.")] = False,
) -> None:
    """Show the progress of a run until it ends, and update the figures in RUN/report after each epoch."""
    from prunekit.commands.watch import watch as watch_run

    watch_run(run, make_console(), every=every, once=once)


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
    evaluate(run, data or [], make_console(), **options, out=out)


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
    predict_images(run, images, out, model, make_console(), overwrite=overwrite, pictures=pictures)


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

    show_demo(run, make_console(), model=model, host=host, port=port, browser=not no_browser)


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
        run, form, make_console(), model=model, plain=plain, preprocess=preprocess, int8=int8, overrides=overrides or []
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
    bench_run(run, make_console(), **options, seconds=seconds, out=out)


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
        show_groups(found, make_console())


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

    profile_recipe(source, overrides or [], make_console(), out, figure, write_variants)


@app.command(name="list")
def list_() -> None:
    """List the shipped recipes and models, and all names that recipes can use, with their options and origin."""
    from prunekit.commands.list import table
    from prunekit.config import registry

    # Load the plugins first, so that a failure is reported once, below the table.
    failures = registry.plugin_failures()
    make_console().print(table())
    for failure in failures:
        print(f"prunekit: {failure}", file=sys.stderr)
