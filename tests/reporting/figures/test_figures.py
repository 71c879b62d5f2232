"""All figures of a report: names, readability, deterministic files."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from helpers.figure_checks import assert_labelled, assert_readable
from helpers.marks import slow
from PIL import Image

from prunekit.reporting.figures import encode_figure, report_figures, training_figures, write_figure
from prunekit.reporting.figures.style import FigureSize, figure_size
from prunekit.reporting.loader import load_run
from prunekit.reporting.number_format import file_stem

ONE = [
    "tradeoff_params", "tradeoff_macs", "tradeoff_latency", "channels", "params_macs", "training", "gates", "gates_map",
    "alive", "precision_recall", "gallery", "gallery_extremes",
]  # fmt: skip


def names(drawings):
    return [figure.stem for figure in drawings]


def test_figures_of_complete_run(run):
    drawings = list(report_figures([run]))
    assert names(drawings) == ONE
    assert all(drawing.title and drawing.caption.endswith(".") for drawing in drawings)


def test_figures_are_drawn_lazily(run, monkeypatch):
    first = next(report_figures([run]))
    monkeypatch.setattr("prunekit.reporting.figures.tradeoff.tradeoff_figure", None)
    assert first.name == "tradeoff_params"
    with pytest.raises(TypeError):
        list(report_figures([run]))


def test_figures_of_several_runs_have_prefixed_stems(run):
    found = names(report_figures([run, replace(run, name="other")]))
    common = ["tradeoff_params", "tradeoff_macs", "tradeoff_latency", "totals"]
    assert found == common + [f"{name}-{figure}" for name in ("csnet", "other") for figure in ONE[3:]]


@pytest.mark.parametrize("stop, there", [("train", []), ("extract", ["gates", "alive"]), ("finetune", ["channels"])])
def test_figures_of_incomplete_run(make_run, stop, there):
    found = names(report_figures([load_run(make_run(units=("block",), stop=stop))]))
    assert set(there) <= set(found) and "gallery" not in found and "precision_recall" not in found
    assert found or stop == "train"


def test_figures_of_unfinished_training(run):
    going = replace(run, layers=run.layers.iloc[:0], summary={}, metrics=run.metrics.iloc[:1], gates=run.gates.iloc[:1])
    drawings = list(training_figures(going))
    assert names(drawings) == ["training", "gates", "gates_map", "alive"]
    for drawing in drawings:
        assert_readable(drawing.figure)


def test_all_texts_are_readable_and_axes_labelled(run):
    other = replace(run, name="a_run_with_a_name_that_says_everything_about_it_and_more" * 2)
    for drawing in report_figures([run, other]):
        assert_readable(drawing.figure)
        assert_labelled(drawing.figure)


@pytest.mark.parametrize("width, font_size", [(3.3, None), slow(3.5, 7), slow(6.9, 8), slow(14, 12)])
def test_figures_of_any_size_are_readable(run, width, font_size):
    with figure_size(FigureSize(width, font_size)):
        for drawing in report_figures([run, replace(run, name="other")]):
            assert drawing.figure.get_figwidth() == width
            assert_readable(drawing.figure)


def test_names_with_mathtext_characters(run):
    odd = replace(run, name="$x_$", layers=run.layers.assign(layer=lambda t: "a$b$." + t["layer"]))
    wanted = ("totals", "$x_$-channels", "$x_$-training", "$x_$-gallery")
    for drawing in (drawing for drawing in report_figures([odd, odd]) if drawing.name in wanted):
        encode_figure(drawing.figure, "svg")


@pytest.mark.filterwarnings("error")
def test_names_with_missing_glyphs(run):
    odd = replace(run, name="\x07\x1b[0m模型", layers=run.layers.assign(layer=lambda t: "層\n" + t["layer"]))
    for drawing in (
        drawing for drawing in report_figures([odd, odd]) if drawing.name.endswith(("totals", "-channels"))
    ):
        svg = encode_figure(drawing.figure, "svg").decode()
        assert all(character.isprintable() or character.isspace() for character in svg)


def test_files_are_deterministic_with_white_edges(run, tmp_path):
    for one, other in zip(report_figures([run]), report_figures([run]), strict=True):
        # In the other order, as the layout must not depend on the first file.
        with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "lines.linewidth": 9}):
            files = {kind: encode_figure(other.figure, kind) for kind in ("svg", "png")}
        png, svg = write_figure(one.figure, tmp_path / one.name)
        assert (png.read_bytes(), svg.read_bytes()) == (files["png"], files["svg"])
        assert b"<dc:date>" not in files["svg"]
        image = np.asarray(Image.open(png).convert("L"))
        edges = [image[0], image[-1], image[:, 0]] if "gallery" in one.name else [image[0], image[-1], image[:, -1]]
        assert (np.concatenate(edges) == 255).all(), one.name


def test_user_matplotlibrc_is_ignored(run):
    plain = encode_figure(next(training_figures(run)).figure, "png")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert encode_figure(next(training_figures(run)).figure, "png") == plain


@pytest.mark.parametrize("name", ["n" * 255, "a/b", "tab\there", "λ" * 127, "con:"])
def test_file_stem_is_portable(name, tmp_path):
    stem = file_stem(name)
    path = tmp_path / f"{stem}-gallery_extremes.svg"
    path.write_bytes(b"")
    assert path.parent == tmp_path and not set(stem) & set('/\\:*?"<>|\t')
    assert stem != file_stem(f"{name}x") and stem == file_stem(name)


def test_file_stem_keeps_ordinary_names():
    assert [file_stem(name) for name in ("csnet", "a b", "λ=3,5", "run.v2")] == ["csnet", "a b", "λ=3,5", "run.v2"]


def test_files_of_long_trainings_are_small(make_run):
    long = load_run(make_run("long", epochs=500))
    assert long.gates.shape[0] == 500 and long.gates.shape[1] > 1000
    for drawing in training_figures(long):
        assert len(encode_figure(drawing.figure, "svg")) < 300_000, drawing.name
        assert len(encode_figure(drawing.figure, "png")) < 300_000, drawing.name
