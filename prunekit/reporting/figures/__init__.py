"""The figures of a report, drawn without a display and the same bytes each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from prunekit.reporting.figures.curves import curve_drawings
from prunekit.reporting.figures.gallery import gallery_drawings
from prunekit.reporting.figures.layers import layer_drawings
from prunekit.reporting.figures.style import Drawing, encode_figure, write_figure
from prunekit.reporting.figures.tradeoff import tradeoff_drawings
from prunekit.reporting.figures.training import training_drawings
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import file_stem

__all__ = ["Drawing", "encode_figure", "figures", "training_figures", "write_figure"]

ONE_RUN = (layer_drawings, training_drawings, curve_drawings, gallery_drawings)


def figures(runs: Sequence[Run], failed: list[str] | None = None) -> Iterator[Drawing]:
    """Every figure that these runs have the data for, one at a time.

    Args:
        runs: of distinct names.
        failed: takes a line for each group of figures that cannot be drawn, which so costs none of the others; without
            it, what is wrong is raised.

    Returns:
        First what sets the runs side by side, then the figures of each run; with several runs the names of those begin
        with the run's.
    """
    yield from _guarded(tradeoff_drawings, runs, "the figures of all runs", failed)
    for run in runs:
        prefix = f"{file_stem(run.name)}-" if len(runs) > 1 else ""
        for draw in ONE_RUN:
            group = f"the figures {draw.__name__.removesuffix('_drawings')} of {run.name}"
            for drawing in _guarded(draw, run, group, failed):
                yield replace(drawing, name=f"{prefix}{drawing.name}")


def _guarded(
    draw: Callable[[Any], Iterator[Drawing]], of: Any, group: str, failed: list[str] | None
) -> Iterator[Drawing]:
    try:
        yield from draw(of)
    except Exception as error:
        if failed is None:
            raise
        failed.append(" ".join(f"{group} could not be drawn ({type(error).__name__}: {error})".split()))


def training_figures(run: Run) -> Iterator[Drawing]:
    """The figures of the training of a run, which may be going on; none where no epoch is done."""
    yield from training_drawings(run)
