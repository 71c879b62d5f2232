"""The figures of a report, drawn without a display and the same bytes each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from prunekit.reporting.figures.curves import curve_drawings
from prunekit.reporting.figures.gallery import gallery_drawings
from prunekit.reporting.figures.layers import layer_drawings
from prunekit.reporting.figures.style import Drawing, encode_figure, write_figure
from prunekit.reporting.figures.tradeoff import tradeoff_drawings
from prunekit.reporting.figures.training import training_drawings
from prunekit.reporting.load import Run
from prunekit.reporting.numbers import file_stem

__all__ = ["Drawing", "encode_figure", "figures", "training_figures", "write_figure"]

ONE_RUN = (layer_drawings, training_drawings, curve_drawings, gallery_drawings)


def figures(runs: Sequence[Run]) -> Iterator[Drawing]:
    """Every figure that these runs have the data for, one at a time.

    Args:
        runs: of distinct names.

    Returns:
        First what sets the runs side by side, then the figures of each run; with several runs the names of those begin
        with the run's.
    """
    yield from tradeoff_drawings(runs)
    for run in runs:
        prefix = f"{file_stem(run.name)}-" if len(runs) > 1 else ""
        for drawing in chain(*(draw(run) for draw in ONE_RUN)):
            yield replace(drawing, name=f"{prefix}{drawing.name}")


def training_figures(run: Run) -> Iterator[Drawing]:
    """The figures of the training of a run, which may be going on; none where no epoch is done."""
    yield from training_drawings(run)
