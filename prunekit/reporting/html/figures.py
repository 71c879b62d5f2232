"""A figure as part of the page: inline SVG whose greys follow the light and the dark theme, or a PNG in a data URI."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from markupsafe import Markup

from prunekit.reporting.figures import Drawing, encode_figure
from prunekit.utils.io import sha256

# An SVG above this, in bytes, gives way to the PNG if that is smaller: curves of thousands of gates do.
LARGE_SVG = 150_000
_ELEMENTS = {
    "svg", "g", "defs", "path", "use", "rect", "circle", "ellipse", "line", "polyline", "polygon", "clipPath",
    "pattern", "image", "text", "tspan", "linearGradient", "radialGradient", "stop", "mask", "symbol",
}  # fmt: skip
_ATTRIBUTES = {
    "class", "clip-path", "clip-rule", "cx", "cy", "d", "dx", "dy", "fill", "fill-opacity", "fill-rule",
    "gradientTransform", "gradientUnits", "height", "href", "id", "mask", "offset", "opacity", "patternUnits",
    "patternTransform", "points", "preserveAspectRatio", "r", "rx", "ry", "stop-color", "stop-opacity", "stroke",
    "stroke-width", "style", "text-anchor", "transform", "viewBox", "width", "x", "x1", "x2", "y", "y1", "y2",
}  # fmt: skip
# A run's name can hold these, and matplotlib writes them as they are.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COORDINATES = {"d", "points", "x", "y", "width", "height"}
_DECIMALS = re.compile(r"(?<=\d\.\d{2})\d+")
_GREY = re.compile(r"(fill|stroke): #([0-9a-f]{2})\2\2\b", re.IGNORECASE)
# The darkest of the palette's colours: words and thin lines in it need a lighter one on dark.
_BLUE = re.compile(r"(fill|stroke): #0072b2\b", re.IGNORECASE)
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Illustration:
    """A figure that is ready for the page.

    Attributes:
        name: as the drawing's: with several runs it begins with the run's name.
        title: as the drawing's.
        caption: as the drawing's.
        markup: an ``<svg>`` or an ``<img>``.
        paper: it keeps a white ground in the dark theme too, because it holds pictures or is a PNG.
    """

    name: str
    title: str
    caption: str
    markup: Markup
    paper: bool


def illustrate(drawing: Drawing, files: dict[str, bytes] | None = None) -> Illustration:
    """Prepare a figure for the page.

    Args:
        drawing: the figure and its words.
        files: its "svg" and "png", where they have been encoded already.
    """
    files = files or {}
    svg = files.get("svg") or encode_figure(drawing.figure, "svg")
    markup, paper = _inline(svg, drawing)
    if len(markup) > LARGE_SVG:
        png = files.get("png") or encode_figure(drawing.figure, "png")
        if len(png) * 4 // 3 < len(markup):
            markup, paper = _embedded(png, drawing), True
    return Illustration(drawing.name, drawing.title, drawing.caption, Markup(markup), paper)


def _embedded(png: bytes, drawing: Drawing) -> str:
    width, height = struct.unpack(">II", png[16:24])
    natural = round(drawing.figure.get_figwidth() * 96)
    height = round(height * natural / width)
    data = base64.b64encode(png).decode()
    return (
        f'<img alt={quoteattr(drawing.title)} width="{natural}" height="{height}" style="--natural:{natural}px" '
        f'src="data:image/png;base64,{data}">'
    )


def _inline(svg: bytes, drawing: Drawing) -> tuple[str, bool]:
    """The SVG without what a page does not need or want, and whether it must stay on white."""
    root = ElementTree.fromstring(_NOT_XML.sub("", svg.decode(errors="replace")))
    paper = any(_local(element.tag) == "image" for element in root.iter())
    # matplotlib's ids are the same in every figure of a kind, and names may differ in nothing that an id may hold.
    prefix = f"f{sha256(drawing.name.encode(errors='replace'))[:8]}-"
    natural = round(drawing.figure.get_figwidth() * 96)
    out = [
        f'<svg role="img" aria-label={quoteattr(drawing.title)} viewBox={quoteattr(root.get("viewBox", ""))} '
        f'preserveAspectRatio="xMinYMid" style="--natural:{natural}px">'
    ]
    for child in root:
        _write(child, out, prefix, False)
    out.append("</svg>")
    return "".join(out), paper


def _write(element: ElementTree.Element, out: list[str], prefix: str, in_text: bool) -> None:
    tag = _local(element.tag)
    # metadata, style (its one rule stands in page.css) and all that could act are left out.
    if tag not in _ELEMENTS:
        return
    in_text = in_text or element.get("id", "").startswith("text_")
    if element.get("id") == "patch_1":
        # The ground of the whole figure: the page's own is there.
        return
    out.append(f"<{tag}")
    for key, value in element.attrib.items():
        name = _local(key)
        if name == "fill" and "style" not in element.attrib:
            # As hatches have it; a theme's colours stand in styles alone.
            name, value = "style", f"{name}: {value}"
        if name not in _ATTRIBUTES:
            continue
        if name == "id":
            value = f"{prefix}{value}"
        elif name == "href":
            if value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            elif not value.startswith("data:image/png;base64,"):
                continue
        elif name == "style":
            value = _GREY.sub(lambda match: _themed(match, in_text), value)
            value = _BLUE.sub(r"\1: var(--figure-blue)", value)
        elif name in _COORDINATES:
            value = _DECIMALS.sub("", value)
        value = _REFERENCE.sub(lambda match: f"url(#{prefix}{match[1]})", value)
        out.append(f" {name}={quoteattr(value)}")
    children = list(element)
    text = (element.text or "").strip()
    if not (children or text):
        out.append("/>")
        return
    out.append(f">{escape(text)}")
    for child in children:
        _write(child, out, prefix, in_text)
    out.append(f"</{tag}>")


def _themed(match: re.Match[str], in_text: bool) -> str:
    """Ink, grid and paper follow the theme; greys between them are seen on both, and white words stand on a colour."""
    prop, level = match[1], int(match[2], 16)
    if level < 0x60:
        return f"{prop}: var(--figure-ink)"
    if level >= 0xF0:
        return match[0] if in_text else f"{prop}: var(--figure-paper)"
    return f"{prop}: var(--figure-rule)" if level >= 0xD0 else match[0]


def _local(name: object) -> str:
    return name.rpartition("}")[2] if isinstance(name, str) else ""
