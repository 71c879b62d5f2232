"""Common style of all figures: colors, sizes, axes, and byte-identical files.

Colors are those of Okabe and Ito (2008), which are distinct for color-blind readers; hatches, dashes and markers are
distinct in gray print.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from prunekit.reporting.number_format import file_stem
from prunekit.utils.io import write_atomic

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
HATCHES = ("", "///", "\\\\\\", "xx", "--", "++", "..")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DENSE, SLIM = "#B0B0B0", COLORS[0]
DPI = 150
FONT_SIZE = 9.0  # points
NARROW = 5.0  # inches; one column of a paper is narrower
MAX_WIDTH = 14  # inches
FigureKind = Literal["png", "svg", "pdf"]


@dataclass(frozen=True)
class FigureSize:
    """What a figure is drawn for; None: as is best for the figure.

    Args:
        width: inches; one column of a paper has about 3.3.
        font_size: points; None: 7 in one column of a paper, else 9.
        dpi: resolution of PNGs and of pictures in PDFs, 1/inch.
    """

    width: float | None = None
    font_size: float | None = None
    dpi: float | None = None

    @property
    def points(self) -> float:
        return self.font_size or (7.0 if self.width is not None and self.width < NARROW else FONT_SIZE)


DEFAULT_SIZE = FigureSize()
_SIZE: ContextVar[FigureSize] = ContextVar("figure size", default=DEFAULT_SIZE)


@contextmanager
def figure_size(size: FigureSize) -> Iterator[None]:
    """Draw the figures within for this size."""
    token = _SIZE.set(size)
    try:
        yield
    finally:
        _SIZE.reset(token)


class ModelStyle(NamedTuple):
    label: str
    color: str
    dashes: Any
    marker: str


MODEL_STYLES = {
    "baseline": ModelStyle("baseline", COLORS[3], ":", "D"),
    "dense": ModelStyle("dense", "#595959", (0, (7, 1.5)), "s"),
    "slim": ModelStyle("slim", COLORS[1], "--", "v"),
    "finetuned": ModelStyle("fine-tuned", COLORS[0], "-", "o"),
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report.

    Args:
        name: distinct among the figures of a run.
        title: a heading, such as "Channels kept".
        caption: one or two sentences on what is drawn and how to read it.
        run: with several runs, the name of the run that it is about; empty for all.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    run: str = ""

    @property
    def stem(self) -> str:
        """The stem of its files."""
        return f"{file_stem(self.run)}-{self.name}" if self.run else self.name


def write_figure(figure: Figure, stem: Path, kinds: Sequence[FigureKind] = ("png", "svg")) -> list[Path]:
    """Write ``<stem>.png``, ``.svg`` or ``.pdf``, and return the paths.

    Raises:
        CheckpointError: a file cannot be written.
    """
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    for path, kind in zip(paths, kinds, strict=True):
        write_atomic(path, encode_figure(figure, kind))
    return paths


def encode_figure(figure: Figure, kind: FigureKind) -> bytes:
    """Return the figure as a PNG, at its own resolution (150 dpi, galleries 120), as an SVG or as a PDF."""
    buffer = io.BytesIO()
    # A date would make the files of two reports differ.
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with figure_style():
        fix_layout(figure)
        # In an SVG only rasterized parts have a resolution.
        figure.savefig(buffer, format=kind, dpi=(0.75 if kind == "svg" else 1) * figure.dpi, metadata=metadata)
    if kind != "png" or any(axes.images for axes in figure.axes):
        return buffer.getvalue()
    # Lines and bars have few colors: with a palette the file is a quarter as large, without a visible difference.
    compressed = io.BytesIO()
    with Image.open(buffer) as image:
        reduced = image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        # The quantizer averages white with other light colors.
        reduced.putpalette([255 if level >= 250 else level for level in reduced.getpalette() or []])
        reduced.save(compressed, format="png", optimize=True, dpi=(figure.dpi, figure.dpi))
    return compressed.getvalue()


def fix_layout(figure: Figure) -> None:
    """Compute the layout once for all files, as this takes longer than drawing."""
    if figure.get_layout_engine() is not None:
        # Images with a fixed aspect ratio need a second pass to place their labels.
        for _ in range(2 if any(axes.images for axes in figure.axes) else 1):
            figure.draw_without_rendering()
        figure.set_layout_engine(None)


@contextmanager
def figure_style() -> Iterator[None]:
    """Use the style of reports, independent of the user's matplotlibrc."""
    font = _SIZE.get().points
    style = {
        **{"svg.hashsalt": "prunekit", "hatch.linewidth": 0.6, "figure.dpi": DPI, "pdf.fonttype": 42},
        **{"font.size": font, "axes.titlesize": 10 / 9 * font},
    }
    with matplotlib.style.context(["default", style]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # A box is drawn instead.
        yield


def points(size: float) -> float:
    """Return a font size, given for texts of 9 points, in proportion to that of the figure."""
    return size * _SIZE.get().points / FONT_SIZE


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that needs no display; fill it within :func:`figure_style`.

    Args:
        width, height: inches; with a :class:`FigureSize` its width, and a height that suits it.
    """
    size, width = _SIZE.get(), min(width, MAX_WIDTH)
    if size.width is not None:
        # Texts do not shrink with the width, so neither does the height in full.
        width, height = size.width, height * math.sqrt(size.width / width)
    figure = Figure(figsize=(width, height), dpi=size.dpi or DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def is_narrow(figure: Figure) -> bool:
    """Whether a figure is for one column of a paper: a legend has no room for many columns."""
    return figure.get_figwidth() < NARROW


def pixel_figure(width: int, height: int, dpi: float) -> Figure:
    """Return a figure of so many pixels, without a layout; a :class:`FigureSize` sets its width in inches."""
    size = _SIZE.get()
    inches = width / dpi if size.width is None else size.width
    figure = Figure(figsize=(inches, inches * height / width), dpi=size.dpi or width / inches)
    FigureCanvasAgg(figure)
    return figure


def bar_style(index: int) -> dict[str, Any]:
    """Return the color and the hatch of the index-th kind of bars."""
    colors = {"color": COLORS[index % len(COLORS)], "hatch": HATCHES[index % len(HATCHES)]}
    return {**colors, "edgecolor": "white", "linewidth": 0}


def format_counts(axis: Axis) -> None:
    """Format counts with the same unit at all ticks, that of the largest: 0.5 M next to 1 M."""

    def format_tick(value: float, _: int | None) -> str:
        largest = max(map(abs, axis.get_view_interval()))
        unit, factor = next(((u, f) for u, f in (("G", 1e9), ("M", 1e6)) if largest >= f), ("", 1.0))
        return f"{value / factor:.10g} {unit}" if unit and value else f"{value:,.10g}"

    axis.set_major_formatter(FuncFormatter(format_tick))


def layers_width(layers: int) -> float:
    """Return the width in inches of a figure with this many layers side by side."""
    return max(6.5, 1.6 + 0.21 * layers)


def style_layers_axis(axes: Axes, names: Sequence[str], labeled: bool) -> None:
    """Put layers on the x axis, in network order, with every other stage shaded."""
    inches = (axes.figure.get_figwidth() - 1.2) / max(len(names), 1)
    # Rotated names need the height of their letters; if there is no room, only every n-th layer is labeled.
    size = min(points(8), max(points(5), inches * 72 * 0.75))
    step = max(1, math.ceil(size * 1.3 / (inches * 72)))
    prefix = "".join(f"{part}." for part in names[0].split(".")[: common_parts(names)])
    labels = [escape_text(shorten_dotted(name.removeprefix(prefix), 28)) for name in names]
    axes.set_xticks(range(0, len(names), step), labels[::step], rotation=90, fontsize=size)
    axes.tick_params(axis="x", length=0 if step == 1 else 3, labelbottom=labeled)
    margin = max(0.0, (4 - len(names)) / 2)  # A bar as wide as the figure is not recognizable as one.
    axes.set_xlim(-0.7 - margin, len(names) - 0.3 + margin)
    if labeled:
        within = f" (in {escape_text(shorten(prefix.rstrip('.'), 40))})" if prefix else ""
        axes.set_xlabel(f"layer, from the input to the output{within}{every_nth(step, 'named')}")
    position = 0
    for index, (_, members) in enumerate(groupby(name.removeprefix(prefix).partition(".")[0] for name in names)):
        count = len(list(members))
        if index % 2:
            axes.axvspan(position - 0.5, position + count - 0.5, color="0.955", linewidth=0, zorder=0)
        position += count
    style_axes(axes)


def common_parts(names: Sequence[str]) -> int:
    """Return how many parts all dotted names start with, not counting their last part."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, columns)))


def every_nth(step: int, verb: str) -> str:
    """Return ", every 3rd named", to be appended to a label; empty if all are."""
    ordinal = {2: "2nd", 3: "3rd"}.get(step, f"{step}th")
    return f", every {ordinal} {verb}" if step > 1 else ""


def style_axes(axes: Axes, grid: Literal["y", "both"] = "y") -> None:
    """Draw a pale grid below the data, and no frame on the sides without an axis."""
    axes.grid(axis=grid, color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shorten(text: str, length: int) -> str:
    """Replace the middle of a long text with an ellipsis: names differ at the start and the end."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"


def shorten_dotted(name: str, length: int) -> str:
    """Shorten the longest parts of a dotted name: all of its parts are needed to tell layers apart."""
    parts = name.split(".")
    limit = max(map(len, parts))
    while len(".".join(parts)) > length and limit > 5:
        limit -= 1
        parts = [shorten(part, limit) for part in name.split(".")]
    return shorten(".".join(parts), length)


def escape_text(text: str) -> str:
    """Escape dollars, which start a formula, and replace characters that matplotlib cannot draw."""
    return re.sub("[\ud800-\udfff\x00-\x1f]", "\ufffd", text).replace("$", r"\$")
