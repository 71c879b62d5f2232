"""Galleries: positions, errors, damaged files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.figure_checks import assert_readable, boxes
from PIL import Image

from prunekit.reporting.figures import encode_figure
from prunekit.reporting.figures.gallery import (
    MAX_FIXED,
    TILE,
    classes_figure,
    gallery_figures,
    maps_figure,
    mean_absolute_error,
)
from prunekit.reporting.loader import GalleryImage

KINDS = ("image", "truth", "dense", "slim", "finetuned")


def example(folder, index, size=(40, 60), kind=None, fixed=False, names=KINDS):
    """Pictures with one distinct grey level each."""
    files = {}
    for place, name in enumerate(names):
        pixels = np.full((*size, 3) if name == "image" else size, 20 * place + 5 * index, np.uint8)
        files[name] = folder / f"{index}-{name}.png"
        Image.fromarray(pixels).save(files[name])
    return GalleryImage(index, f"val-{index:05d}", kind, fixed, files)


def labelled_example(folder, index, truth="cat", dense="cat", kind=None, fixed=True):
    one = example(folder, index, (8, 8), kind, fixed, names=("image",))
    texts = {"truth": truth, "dense": {"class": dense, "probability": 0.75}}
    return replace(one, labels=texts)


def sheet(figure):
    return figure.axes[0].images[0].get_array()


def test_pictures_are_at_their_positions(run, tmp_path):
    examples = [example(tmp_path, index, (20, 20)) for index in range(3)]
    figure = maps_figure(examples)
    pixels = sheet(figure)
    high, wide = pixels.shape[0] // 3, pixels.shape[1] // len(KINDS)
    for row in range(3):
        for column in range(len(KINDS)):
            cell = pixels[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            left = (wide - TILE) // 2
            assert (cell[:TILE, left : left + TILE] == 20 * column + 5 * row).all()
            assert (cell[TILE:] == 255).all() and (cell[:, :left] == 255).all()
    assert_readable(figure)
    texts = [text for text, _ in boxes(figure)]
    assert {"image", "truth", "dense", "slim", "fine-tuned"} <= set(texts)
    assert sum(text.startswith("MAE") for text in texts) == 9


@pytest.mark.parametrize("seed", range(5))
def test_mae_matches_saliency_metrics(seed):
    from prunekit.tasks.saliency_metrics import SaliencyMetrics

    random = np.random.default_rng(seed)
    saliency = random.integers(20, 200, (13, 17), np.uint8)
    mask = random.choice(np.array([0, 128, 129, 255], np.uint8), (13, 17))
    meter = SaliencyMetrics(quick=True)
    meter.update(saliency, mask)
    assert mean_absolute_error(saliency, mask) == pytest.approx(meter.errors[0], abs=1e-12)


def test_best_cases_are_above_worst(run, tmp_path):
    examples = [example(tmp_path, i, kind=("worst", "best")[i % 2], fixed=i == 0) for i in range(4)]
    gallery, extremes = gallery_figures(replace(run, gallery=examples))
    assert (gallery.name, extremes.name) == ("gallery", "gallery_extremes")
    assert "MAE" in extremes.caption
    rows = {text.partition(":")[0]: box[1] for text, box in boxes(extremes.figure) if ": val" in text}
    assert rows["best"] > rows["worst"]
    assert not any(":" in text for text, _ in boxes(gallery.figure))


def test_fixed_images_are_subsampled_evenly(run, tmp_path):
    examples = [example(tmp_path, index, (8, 8), fixed=True) for index in range(16)]
    (gallery,) = gallery_figures(replace(run, gallery=examples))
    shown = [text for text, _ in boxes(gallery.figure) if text.startswith("val")]
    assert len(shown) == MAX_FIXED and shown[0] == "val-00000" and shown[-1] == "val-00015"
    assert f"{MAX_FIXED} validation images" in gallery.caption


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 300), (300, 7), (TILE, TILE)])
def test_pictures_of_any_shape(run, tmp_path, size):
    figure = maps_figure([example(tmp_path, 0, size)])
    assert_readable(figure)
    assert (sheet(figure)[:, -2:] == 255).all()


def test_missing_and_damaged_pictures_are_marked(run, tmp_path):
    one = example(tmp_path, 0)
    one.files["slim"].write_bytes(b"not a picture")
    one.files["finetuned"].unlink()
    texts = [text for text, _ in boxes(maps_figure([one]))]
    assert texts.count("missing") == 2 and sum(text.startswith("MAE") for text in texts) == 1


def test_map_of_another_size_has_no_error(run, tmp_path):
    one = example(tmp_path, 0)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(one.files["dense"])
    assert sum(text.startswith("MAE") for text, _ in boxes(maps_figure([one]))) == 2


def test_wrong_classes_are_marked(run, tmp_path):
    examples = [
        labelled_example(tmp_path, 0),
        labelled_example(tmp_path, 1, dense="dog"),
        labelled_example(tmp_path, 2, "$x_$"),
    ]
    figure = classes_figure(examples)
    texts = [text for text, _ in boxes(figure)]
    assert "dense cat 0.75" in texts and "✗ dense dog 0.75" in texts
    assert_readable(figure)
    encode_figure(figure, "svg")


def test_extremes_of_classification(run, tmp_path):
    examples = [labelled_example(tmp_path, i, kind=("best", "worst")[i % 2], fixed=False) for i in range(8)]
    (extremes,) = gallery_figures(replace(run, gallery=examples))
    assert "probability of the true class" in extremes.caption
    assert [text for text, _ in boxes(extremes.figure)].count("worst, class cat") == 4
    long = [
        labelled_example(tmp_path, i, "a MAMMAL of the wide world", "another MAMMOTH of it", "worst") for i in range(5)
    ]
    for one in long:
        one.labels.update({"slim": one.labels["dense"], "finetuned": one.labels["dense"]})
    assert_readable(classes_figure(long, show_kind=True))


def test_no_gallery_without_pictures(run):
    assert list(gallery_figures(replace(run, gallery=[]))) == []
    assert list(gallery_figures(replace(run, gallery=[GalleryImage(0, "a", "best", True)]))) == []
