"""The HTML page: structure, escaping, figures."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.fake_run import write_run
from helpers.hostile_run import ATTACKS, hostile_run

from prunekit.reporting.figures import ReportFigure, report_figures
from prunekit.reporting.figures.style import new_figure
from prunekit.reporting.html.figures import LARGE_SVG, embed_figure
from prunekit.reporting.html.page import render_page
from prunekit.reporting.loader import load_run

VOID = {"meta", "link", "img", "br"}
UNITS = ("conv1",)


class Parsed(HTMLParser):
    """The elements and texts of a page; fails if tags do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.script = ""
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs), f"duplicate attribute in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return "".join(self.text)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def drawn(name="curve", title="A curve", caption="It goes up.", curves=1, run="") -> ReportFigure:
    figure = new_figure(4, 2)
    figure.suptitle(title)
    axes = figure.add_subplot()
    for _ in range(curves):
        axes.plot(np.random.default_rng(0).random(1000), color="black")
    axes.set_ylabel("loss <b>&</b>")
    return ReportFigure(name, title, caption, figure, run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [load_run(write_run(folder / name, seed=i, units=UNITS)) for i, name in enumerate(("a", "a-b", "c"))]


@pytest.fixture(scope="module")
def drawings(runs):
    return [embed_figure(drawing) for drawing in report_figures(runs[:2])]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return load_run(hostile_run(tmp_path_factory.mktemp("hostile")))


def test_page_of_one_run(runs):
    text = render_page(runs[:1], [embed_figure(drawn())])
    parsed = Parsed(text)
    assert text.startswith("<!doctype html>")
    for title in ("Summary", "Figures", "Layers", "Counters", "Recipe", "Environment"):
        assert title in parsed.words
    dense, slim = (runs[0].summary[part]["params"] for part in ("dense", "slim"))
    assert f"{dense:,} → {slim:,}" in parsed.words
    assert f"{slim / dense:.1%} of the dense model" in parsed.words
    assert (runs[0].path / "recipe.yaml").read_text() in parsed.words
    assert "It goes up." in parsed.words
    assert [h["aria-label"] for h in parsed.all("svg")] == ["A curve"]


def test_page_has_all_layers_and_counters(runs):
    parsed = Parsed(render_page(runs[:1], []))
    for layer in runs[0].layers["layer"]:
        assert layer in parsed.words
    values = [float(v) for v in parsed.values("data-v")]
    for column in ("channels_after", "params_before", "macs_after"):
        assert set(runs[0].layers[column].dropna()) <= set(values)


def test_cells_have_raw_numbers_for_sorting(runs):
    parsed = Parsed(render_page(runs[:1], []))
    dense = runs[0].summary["dense"]
    assert str(dense["params"]) in parsed.values("data-v") and f"{dense['params']:,}" in parsed.words
    ratio = runs[0].summary["slim"]["params"] / dense["params"]
    assert any(abs(float(v) - ratio) < 1e-12 for v in parsed.values("data-v"))


def test_several_runs_have_chapters_with_their_figures(runs):
    owners = {"totals": "", "of a": "a", "of a-b": "a-b", "of c": "c", "cat": ""}
    text = render_page(runs, [embed_figure(drawn(title=f"T {title}", run=run)) for title, run in owners.items()])
    Parsed(text)
    chapters = re.split(r'<article id="run-\d">', text)
    assert len(chapters) == 4
    labels = [re.findall(r'<svg role="img" aria-label="T ([^"]*)"', chapter) for chapter in chapters]
    assert labels == [["totals", "cat"], ["of a"], ["of a-b"], ["of c"]]
    assert all(
        f"<h2><bdi>{name}</bdi></h2>" in chapter for name, chapter in zip("a a-b c".split(), chapters[1:], strict=True)
    )


def test_ids_are_unique_and_references_resolve(runs, drawings):
    twins = [embed_figure(drawn(name)) for name in ("c-x y", "c-x-y")]
    text = render_page(runs, [*drawings, *twins])
    parsed = Parsed(text)
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    wanted = [h[1:] for h in parsed.values("href") if h.startswith("#")]
    wanted += re.findall(r"url\(#([^)]+)\)", text)
    assert wanted and set(wanted) <= set(ids)


def test_contents_link_to_every_section(runs):
    parsed = Parsed(render_page(runs, []))
    sections = {a["id"] for tag in ("section", "article") for a in parsed.all(tag)}
    assert {a["href"][1:] for a in parsed.all("a")} - {"main"} == sections


def test_page_has_no_external_resources(runs, drawings, hostile):
    for text in (render_page(runs, drawings), render_page([hostile], [])):
        parsed = Parsed(text)
        for name in ("href", "src", "action", "data", "srcset", "poster"):
            assert all(value.startswith(("#", "data:")) for value in parsed.values(name)), name
        style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
        assert "@import" not in style and "url(" not in style
        assert not {"iframe", "object", "embed", "base", "form"} & {tag for tag, _ in parsed.elements}
        policy = next(m["content"] for m in parsed.all("meta") if m.get("http-equiv"))
        assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe-eval" not in policy
        assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


def test_texts_from_files_are_escaped(runs, hostile):
    quiet, parsed = (
        Parsed(render_page(runs[:1], [])),
        Parsed(render_page([hostile], [embed_figure(drawn(title=ATTACKS[1]))])),
    )
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in quiet.elements} | {"svg", "bdi", "figure"} | {
        "defs", "g", "path", "use", "clippath", "rect", "figcaption", "div", "b", "ul", "li",
    }  # fmt: skip
    assert len(parsed.all("script")) == 1 and parsed.script == quiet.script
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    for attack in ATTACKS:
        assert re.sub("[\0\a\u202e\u2066]", "\ufffd", attack) in parsed.words
    assert "1337" not in parsed.words


def test_invalid_unicode_is_replaced(hostile):
    render_page([hostile], []).encode()
    odd = dataclasses.replace(hostile, name="half\udcff pair")
    assert "half\ufffd pair" in Parsed(render_page([odd], [])).words


def test_failed_equivalence_check_is_at_the_top(hostile):
    parsed = Parsed(render_page([hostile], []))
    assert parsed.words.index("The equivalence check failed") < parsed.words.index("Problems")
    assert any(a.get("class") == "bad" for a in parsed.all("div"))


@pytest.mark.parametrize("stop", ["train", "extract", "slim", "finetune", "evaluate"])
def test_page_of_interrupted_run(tmp_path, stop):
    run = load_run(write_run(tmp_path / "half", units=UNITS, stop=stop))
    parsed = Parsed(render_page([run], []))
    assert "not complete" in parsed.words and all(line in parsed.words for line in run.problems)
    assert ("No model has been measured yet" in parsed.words) == (stop == "train")
    assert ("Layers" in parsed.words) == (stop not in ("train", "extract", "slim"))


@pytest.mark.parametrize("name", ["summary.json", "layers.json", "slim/plan.json", "environment.json", "recipe.yaml"])
def test_page_with_missing_file(tmp_path, name):
    path = write_run(tmp_path / "hole", units=UNITS)
    (path / name).unlink()
    parsed = Parsed(render_page([load_run(path)], []))
    assert "Problems" in parsed.words and f"{name}: missing" in parsed.words


def test_large_recipe_is_truncated(tmp_path):
    path = write_run(tmp_path / "long", units=UNITS)
    (path / "recipe.yaml").write_text("# " + "x" * 3_000_000)
    text = render_page([load_run(path)], [])
    assert len(text) < 1_000_000 and "The first 100,000 of 3,000,002 characters." in text


def test_page_is_deterministic(runs):
    assert render_page(runs, [embed_figure(drawn())]) == render_page(runs, [embed_figure(drawn())])


def test_page_with_published_models(runs):
    assert "CSNet-L ×2" in Parsed(render_page(runs[:1], [], published=True)).words
    assert "CSNet-L ×2" in Parsed(render_page([], [], published=True)).words
    assert "CSNet-L ×2" not in Parsed(render_page(runs[:1], [])).words


# ---- figures


def test_greys_follow_theme():
    drawing = drawn()
    axes = drawing.figure.axes[0]
    axes.plot([0, 1], [1, 0], color="#0072B2")
    axes.plot([0, 1], [1, 1], color="#E69F00")
    axes.grid(color="0.88")
    markup = embed_figure(drawing).markup
    assert "stroke: var(--figure-ink)" in markup and "stroke: var(--figure-rule)" in markup
    assert "stroke: var(--figure-blue)" in markup and "#e69f00" in markup and "#000000" not in markup


def test_white_text_stays_white():
    drawing = drawn()
    drawing.figure.axes[0].text(1, 1, "in a bar", color="white")
    assert "fill: #ffffff" in embed_figure(drawing).markup


def test_figures_with_pictures_have_white_background():
    drawing = drawn()
    drawing.figure.axes[0].imshow([[0, 1], [1, 0]])
    assert embed_figure(drawing).white and not embed_figure(drawn()).white


def test_wide_figures_take_the_whole_width(runs):
    figures = [embed_figure(ReportFigure("a", "A", "It goes up.", new_figure(width, 2))) for width in (6.5, 9)]
    assert [figure.wide for figure in figures] == [False, True]
    assert [a.get("class") for a in Parsed(render_page(runs[:1], figures)).all("figure")] == [None, "wide"]


def test_script_and_foreign_elements_are_removed():
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        b'viewBox="0 0 9 9" onload="x()">'
        b"<script>x()</script><style>*{}</style><foreignObject><b/></foreignObject>"
        b'<g id="p" onclick="x()"><path id="m" d="M 1.23456 2" clip-path="url(#p)"/>'
        b'<use xlink:href="#m"/><use xlink:href="https://x.example/#m"/><image xlink:href="javascript:x()"/></g></svg>'
    )
    drawing = drawn("one two")
    markup = embed_figure(drawing, {"svg": svg}).markup
    assert "x()" not in markup and "x.example" not in markup and "style>" not in markup
    own = re.search(r'<path id="(\w+-)m" d="M 1.23 2" clip-path="url\(#(\w+-)p\)"/>', markup)
    assert own[1] == own[2] and f'href="#{own[1]}m"' in markup


def test_large_svg_becomes_png():
    small, large = embed_figure(drawn()), embed_figure(drawn(title='5" <b>', curves=20))
    assert small.markup.startswith("<svg") and len(small.markup) < LARGE_SVG
    image = Parsed(large.markup).all("img")[0]
    assert image["alt"] == '5" <b>' and image["src"].startswith("data:image/png;base64,") and large.white


def test_characters_not_allowed_in_xml():
    drawing = drawn(title="bell\x07")
    assert "bell" in embed_figure(drawing).markup
