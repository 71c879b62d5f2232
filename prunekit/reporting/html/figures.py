"""Embed figures in the page: as inline SVG whose grays follow the light or dark theme, or as PNG in a data URI."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from markupsafe import Markup

from prunekit.reporting.figures import ReportFigure, encode_figure
from prunekit.utils.io import sha256

WIDE = 8.0  # inches
LARGE_SVG = 150_000  # bytes; above this, the PNG is used if it is smaller
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
# A run's name may contain these, and matplotlib writes them unchanged.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COORDINATES = {"d", "points", "x", "y", "width", "height"}
_DECIMALS = re.compile(r"(?<=\d\.\d{2})\d+")
_GRAY = re.compile(r"(fill|stroke): #([0-9a-f]{2})\2\2\b", re.IGNORECASE)
# The darkest color of the palette needs a lighter one in the dark theme.
_BLUE = re.compile(r"(fill|stroke): #0072b2\b", re.IGNORECASE)
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure prepared for the page.

    Attributes:
        title, caption, run: as for :class:`ReportFigure`.
        markup: an ``<svg>`` or an ``<img>``.
        white: keep a white background in the dark theme, for pictures and PNGs.
        stem: of its files.
        wide: needs the whole width of the page.
    """

    title: str
    caption: str
    run: str
    markup: Markup
    white: bool
    stem: str = ""
    wide: bool = False


def embed_figure(figure: ReportFigure, encoded: dict[str, bytes] | None = None) -> EmbeddedFigure:
    """Prepare a figure for the page; ``encoded`` are its "svg" and "png" if they exist already."""
    encoded = encoded or {}
    markup, white = _inline_svg(encoded.get("svg") or encode_figure(figure.figure, "svg"), figure)
    if len(markup) > LARGE_SVG:
        png = encoded.get("png") or encode_figure(figure.figure, "png")
        if len(png) * 4 // 3 < len(markup):
            markup, white = _png_image(png, figure), True
    is_wide = figure.figure.get_figwidth() > WIDE
    return EmbeddedFigure(figure.title, figure.caption, figure.run, Markup(markup), white, figure.stem, is_wide)


def _png_image(png: bytes, figure: ReportFigure) -> str:
    width, height = struct.unpack(">II", png[16:24])
    natural = round(figure.figure.get_figwidth() * 96)
    return (
        f'<img alt={quoteattr(figure.title)} width="{natural}" height="{round(height * natural / width)}" '
        f'style="--natural:{natural}px" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )


def _inline_svg(svg: bytes, figure: ReportFigure) -> tuple[str, bool]:
    """Return the SVG reduced to what the page needs, and whether it contains pictures."""
    root = ElementTree.fromstring(_NOT_XML.sub("", svg.decode(errors="replace")))
    # matplotlib uses the same ids in every figure. A digest, as names may differ only in characters not allowed in ids.
    prefix = f"f{sha256(figure.stem.encode(errors='replace'))[:8]}-"
    parts = [
        f'<svg role="img" aria-label={quoteattr(figure.title)} viewBox={quoteattr(root.get("viewBox", ""))} '
        f'preserveAspectRatio="xMinYMid" style="--natural:{round(figure.figure.get_figwidth() * 96)}px">'
    ]
    for child in root:
        _write_element(child, parts, prefix, False)
    return "".join([*parts, "</svg>"]), any(_local_name(element.tag) == "image" for element in root.iter())


def _write_element(element: ElementTree.Element, parts: list[str], prefix: str, in_text: bool) -> None:
    tag = _local_name(element.tag)
    # Skipped: metadata, style (its only rule is in page.css), active content, and the background (patch_1).
    if tag not in _ELEMENTS or element.get("id") == "patch_1":
        return
    in_text = in_text or element.get("id", "").startswith("text_")
    parts.append(f"<{tag}")
    for key, value in element.attrib.items():
        name = _local_name(key)
        if name == "fill" and "style" not in element.attrib:  # hatches; the theme's colors need a style
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
            value = _GRAY.sub(lambda match: _theme_color(match, in_text), value)
            value = _BLUE.sub(r"\1: var(--figure-blue)", value)
        elif name in _COORDINATES:
            value = _DECIMALS.sub("", value)
        value = _REFERENCE.sub(lambda match: f"url(#{prefix}{match[1]})", value)
        parts.append(f" {name}={quoteattr(value)}")
    text = (element.text or "").strip()
    if not (len(element) or text):
        parts.append("/>")
        return
    parts.append(f">{escape(text)}")
    for child in element:
        _write_element(child, parts, prefix, in_text)
    parts.append(f"</{tag}>")


def _theme_color(match: re.Match[str], in_text: bool) -> str:
    """Let ink, grid and background follow the theme; other grays are visible on both, white text is on a color."""
    prop, level = match[1], int(match[2], 16)
    if level < 0x60:
        return f"{prop}: var(--figure-ink)"
    if level >= 0xF0:
        return match[0] if in_text else f"{prop}: var(--figure-paper)"
    return f"{prop}: var(--figure-rule)" if level >= 0xD0 else match[0]


def _local_name(name: object) -> str:
    return name.rpartition("}")[2] if isinstance(name, str) else ""
