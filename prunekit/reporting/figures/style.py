"""What all figures share: colours, sizes, axes, and files that are the same bytes each time.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; hatches, dashes and markers do the
same in grey print.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from prunekit.utils.io import write_atomic

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
HATCHES = ("", "///", "\\\\\\", "xx", "--", "++", "..")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DENSE, SLIM = "#B0B0B0", COLOURS[0]
DPI = 150
WIDEST = 14  # inches
_STYLE = {
    "svg.hashsalt": "prunekit",
    "hatch.linewidth": 0.6,
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.dpi": DPI,
}


@dataclass(frozen=True)
class Look:
    """How the models of one kind are drawn everywhere."""

    label: str
    colour: str
    dashes: Any
    marker: str


LOOKS = {
    "baseline": Look("baseline", COLOURS[3], ":", "D"),
    "dense": Look("dense", "#595959", (0, (7, 1.5)), "s"),
    "slim": Look("slim", COLOURS[1], "--", "v"),
    "finetuned": Look("fine-tuned", COLOURS[0], "-", "o"),
}


@dataclass(frozen=True)
class Drawing:
    """A figure, and what stands around it.

    Attributes:
        name: the stem of its files; flat, and distinct among the drawings of one report.
        title: a heading, such as "Channels kept".
        caption: one or two plain sentences on what is drawn and how to read it.
        figure: to be written with :func:`write_figure`.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``<stem>.png`` and ``<stem>.svg``, and return their paths.

    Raises:
        CheckpointError: the system refused.
    """
    written = []
    for kind in ("png", "svg"):
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomic(path, encode_figure(figure, kind))
        written.append(path)
    return written


def encode_figure(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The figure as a file: a PNG or an SVG; pixels are of the figure's own resolution, which is 150 dpi, or 120 for
    pictures."""
    buffer = io.BytesIO()
    with styled():
        settle(figure)
        if kind == "svg":
            # What is rasterized in it may be coarser, words and axes are not. A date would make every report differ
            # from the one before.
            figure.savefig(buffer, format=kind, dpi=0.75 * figure.dpi, metadata={"Date": None})
        else:
            figure.savefig(buffer, format=kind, dpi=figure.dpi)
    if kind == "svg" or any(axes.images for axes in figure.axes):
        return buffer.getvalue()
    # Lines and bars have few colours: with a palette the file is a quarter as large, and no one sees it.
    small = io.BytesIO()
    with Image.open(buffer) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        # Paper stays white, whatever it was averaged with.
        palette = [255 if level >= 250 else level for level in few.getpalette() or []]
        few.putpalette(palette)
        few.save(small, format="png", optimize=True, dpi=(DPI, DPI))
    return small.getvalue()


def settle(figure: Figure) -> None:
    """Lay the figure out, once for all files of it: that takes longer than to draw it."""
    if figure.get_layout_engine() is not None:
        # Twice where pictures have a shape of their own: their labels follow them only the second time.
        for _ in range(2 if any(axes.images for axes in figure.axes) else 1):
            figure.draw_without_rendering()
        figure.set_layout_engine(None)


@contextmanager
def styled() -> Iterator[None]:
    """Our own style alone, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A letter that the font has not is drawn as a box, which says enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float, title: str = "", dpi: int = DPI) -> Figure:
    """An empty figure of this many inches that needs no display; to be filled within :func:`styled`."""
    figure = Figure(figsize=(min(width, WIDEST), height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(plain(shorten(title, 48)), fontsize=11)
    return figure


def number_axis(axes: Axes) -> None:
    """Counts on a y axis that begins at zero."""
    count_axis(axes.yaxis)
    axes.set_ylim(bottom=0)


def count_axis(axis: Axis) -> None:
    """Counts with one unit for all ticks, that of the largest: 0.5 M beside 1 M."""

    def told(value: float, _: int | None) -> str:
        most = max(map(abs, axis.get_view_interval()))
        unit, factor = next(((u, f) for u, f in (("G", 1e9), ("M", 1e6)) if most >= f), ("", 1.0))
        return f"{value / factor:.10g} {unit}" if unit and value else f"{value:,.10g}"

    axis.set_major_formatter(FuncFormatter(told))


def layer_width(layers: int) -> float:
    """Inches for a figure with so many layers side by side."""
    return max(6.5, 1.6 + 0.21 * layers)


def layer_axis(axes: Axes, names: Sequence[str], named: bool) -> None:
    """Layers on the x axis, in the order of the network, a shade behind every other stage."""
    inches = (min(layer_width(len(names)), WIDEST) - 1.2) / max(len(names), 1)
    # Turned names stand as close as their letters are high; past that every second, third … is named.
    size = min(8.0, max(5.0, inches * 72 * 0.75))
    every = max(1, math.ceil(size * 1.3 / (inches * 72)))
    shared = _shared(names)
    shown = [plain(shorten_dotted(name.removeprefix(shared), 28)) for name in names]
    axes.set_xticks(range(0, len(names), every), shown[::every], rotation=90, fontsize=size)
    axes.tick_params(axis="x", length=0 if every == 1 else 3, labelbottom=named)
    room = max(0.0, (4 - len(names)) / 2)  # a bar as wide as the figure looks like no bar
    axes.set_xlim(-0.7 - room, len(names) - 0.3 + room)
    if named:
        within = f" (in {plain(shorten(shared.rstrip('.'), 40))})" if shared else ""
        some = f", every {every}th named" if every > 3 else ", every 3rd named" if every == 3 else ", every 2nd named"
        axes.set_xlabel(f"layer, from the input to the output{within}{some if every > 1 else ''}")
    place = 0
    for index, (_, members) in enumerate(groupby(name.removeprefix(shared).partition(".")[0] for name in names)):
        count = len(list(members))
        if index % 2:
            axes.axvspan(place - 0.5, place + count - 0.5, color="0.955", linewidth=0, zorder=0)
        place += count
    quiet(axes)


def _shared(names: Sequence[str]) -> str:
    """The dotted beginning of all names, which says nothing: "model." of "model.a.conv" and "model.b.conv"."""
    first, *others = (name.split(".")[:-1] for name in names)
    same = min((alike(first, other) for other in others), default=0)
    return "".join(f"{part}." for part in first[:same])


def alike(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts two names begin with alike."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def quiet(axes: Axes, grid: Literal["y", "both"] = "y") -> None:
    """A pale grid behind what is drawn, and no frame where no axis is."""
    axes.grid(axis=grid, color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shorten(text: str, length: int) -> str:
    """The beginning and the end, which tell names apart."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"


def shorten_dotted(name: str, length: int) -> str:
    """Every part of a dotted name, the longest cut in their middles: it takes all of them to tell layers apart."""
    parts = name.split(".")
    most = max(map(len, parts))
    while len(".".join(parts)) > length and most > 5:
        most -= 1
        parts = [shorten(part, most) for part in name.split(".")]
    return shorten(".".join(parts), length)


def plain(text: str) -> str:
    """Without this a dollar in a name starts a formula, and what is no character stops the drawing."""
    return re.sub("[\ud800-\udfff\x00-\x1f]", "\ufffd", text).replace("$", r"\$")
