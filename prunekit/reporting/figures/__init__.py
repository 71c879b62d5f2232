"""The figures of a report: drawn without a display, byte-identical for identical runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from prunekit.config.registry import describe_error
from prunekit.reporting.figures.curves import curve_figures
from prunekit.reporting.figures.gallery import gallery_figures
from prunekit.reporting.figures.layers import layer_figures
from prunekit.reporting.figures.style import ReportFigure, encode_figure, write_figure
from prunekit.reporting.figures.tradeoff import tradeoff_figures
from prunekit.reporting.figures.training import training_figures
from prunekit.reporting.loader import Run

__all__ = ["ReportFigure", "encode_figure", "report_figures", "training_figures", "write_figure"]

RUN_FIGURES = (layer_figures, training_figures, curve_figures, gallery_figures)


def report_figures(runs: Sequence[Run], errors: list[str] | None = None) -> Iterator[ReportFigure]:
    """Yield every figure that the runs have data for, one at a time.

    First those that compare the runs, then those of each run; with several runs, these name their run.

    Args:
        runs: with distinct names.
        errors: receives a line for each group of figures that fails; None: raise the error.
    """
    yield from _draw(tradeoff_figures, runs, "the figures of all runs", errors)
    for run in runs:
        for draw in RUN_FIGURES:
            group = f"the figures {draw.__name__.removesuffix('_figures')} of {run.name}"
            for figure in _draw(draw, run, group, errors):
                yield replace(figure, run=run.name if len(runs) > 1 else "")


def _draw(
    draw: Callable[[Any], Iterator[ReportFigure]], data: Any, group: str, errors: list[str] | None
) -> Iterator[ReportFigure]:
    try:
        yield from draw(data)
    except Exception as error:
        if errors is None:
            raise
        errors.append(f"{group} could not be drawn ({describe_error(error)})")
