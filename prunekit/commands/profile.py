"""``prunekit profile``: where the time of a recipe's network goes, and files to time on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from prunekit.commands.bench import estimate_norm_statistics
from prunekit.commands.groups import check_source
from prunekit.commands.results import simple_table
from prunekit.config import recipe as recipes
from prunekit.config.schema import Recipe
from prunekit.deployment.bench.variants import VariantTimer, random_variants, write_table
from prunekit.errors import RecipeError
from prunekit.pipeline.latency import RunLatencies, timed_example
from prunekit.pipeline.models import build_dense, input_shape, read_recipe
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.selection.latency_model import Variant
from prunekit.reporting.figures.latency import latency_figure
from prunekit.reporting.figures.style import FigureKind, encode_figure
from prunekit.runs.folders import is_run_folder
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import write_atomic
from prunekit.utils.progress import Reporter
from prunekit.weights import locate

SHARES = (1.0, 0.75, 0.5, 0.25)  # of the channels
STEPS = 32  # of shares in the figure
LAYERS = 20  # printed
TABLE = "latencies.json"


def profile_recipe(
    source: str,
    overrides: Sequence[str],
    console: Console,
    out: Path | None = None,
    figure: Path | None = None,
    write_variants: Path | None = None,
) -> None:
    """Print the predicted milliseconds of each layer against its channels.

    Args:
        source: a run folder, a recipe file or the name of a shipped recipe; its section ``latency`` says where the
            network is timed, or which file to read.
        overrides: ``key=value`` each, such as ``latency.runtime=openvino``.
        out: JSON file for the measured latencies, to read with ``latency.table``.
        figure: file to draw the milliseconds in, against the channels: PNG, SVG or PDF.
        write_variants: folder for ONNX files to time elsewhere, and a table to enter their times into; nothing is
            timed here.

    Raises:
        RecipeError: there is no such recipe or run, the folder exists, or the figure has another suffix.
        PrunekitError: the network cannot be deployed or timed, or a table cannot be read.
    """
    reporter = Reporter(console)
    kind = next((kind for kind in get_args(FigureKind) if figure and figure.suffix.lower() == f".{kind}"), None)
    if figure is not None and kind is None:
        raise RecipeError(f"--figure {figure} must end in .png, .svg or .pdf")
    folder = locate(Path(source).expanduser())
    if is_run_folder(folder):
        if overrides:
            raise RecipeError(f"{source} is a run folder, whose recipe stays; give its recipe to change {overrides[0]}")
        recipe = read_recipe(RunDir.open(folder))
    else:
        check_source(source)
        recipe = recipes.load(source, list(overrides))
    network = estimate_norm_statistics(build_dense(recipe), input_shape(recipe))
    groups = find_groups(network, torch.zeros(1, *input_shape(recipe)))
    if write_variants is not None:
        _write_variants(recipe, network, groups, write_variants, reporter)
        return
    latencies = RunLatencies(recipe, network, groups, reporter)
    sizes = SizeModel(network, groups, tuple(latencies.table.size), latencies.table)
    _print_layers(sizes, groups, console)
    if out is not None:
        write_table(out, latencies.table)
        console.print(Text(f"saved to {out}; read it with latency.table={out}"), soft_wrap=True)
    if figure is not None and kind is not None:
        _draw(sizes, groups, latencies.table.setting, figure, kind)
        console.print(Text(f"figure: {figure}"), soft_wrap=True)


def _layers_at(sizes: SizeModel, groups: Sequence[Group], share: float) -> dict[str, float]:
    kept = {g.id: max(1, round(share * g.channels)) for g in groups if g.reason is None}
    return sizes.layer_latencies(kept)


def _draw(sizes: SizeModel, groups: Sequence[Group], setting: str, path: Path, kind: FigureKind) -> None:
    shares = [step / STEPS for step in range(1, STEPS + 1)]
    columns = [_layers_at(sizes, groups, share) for share in shares]
    layers = {name: [column.get(name, 0.0) for column in columns] for name in columns[-1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode_figure(latency_figure(shares, layers, setting), kind))


def _print_layers(sizes: SizeModel, groups: Sequence[Group], console: Console) -> None:
    columns = [_layers_at(sizes, groups, share) for share in SHARES]
    table = simple_table(["layer"], [f"ms at {share:.0%}" for share in SHARES])
    names = sorted(columns[0], key=lambda name: -columns[0][name])
    for name in names[:LAYERS]:
        table.add_row(name or "(model)", *(f"{column.get(name, 0.0):.3f}" for column in columns))
    if rest := names[LAYERS:]:
        table.add_row(f"{len(rest)} others", *(f"{sum(column[name] for name in rest):.3f}" for column in columns))
    table.add_row("all", *(f"{sum(column.values()):.3f}" for column in columns))
    console.print(table)


def _write_variants(
    recipe: Recipe, network: nn.Module, groups: Sequence[Group], folder: Path, reporter: Reporter
) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty; give a new folder")
    timer = VariantTimer(network, groups, timed_example(recipe), recipe.latency.runtime, recipe.latency.threads)
    table = timer.new_table().model_copy(update={"version": "", "device": ""})
    table.variants = [Variant(kept=kept) for kept in random_variants(network, groups, recipe.latency.variants)]
    folder.mkdir(parents=True, exist_ok=True)
    with closing(reporter.progress_bar("writing variants")) as bar:
        for number, variant in enumerate(table.variants):
            (folder / f"{number:03}.onnx").write_bytes(timer.onnx(variant.kept))
            bar((number + 1) / len(table.variants), 1.0)
    write_table(folder / TABLE, table)
    reporter.info(
        f"{len(table.variants)} files in {folder}: time each, enter the milliseconds of 000.onnx, 001.onnx, … as "
        f'"ms" of the variants in {folder / TABLE}, in this order, and run with latency.table={folder / TABLE}'
    )
