"""Complete runs of the recipes for CIFAR-10, with tiny models and few images: pruned in training, without a trace."""

import json

import numpy as np
import pytest
from helpers.small_run import skip_figures
from PIL import Image
from rich.console import Console

from prunekit.config.recipe import load
from prunekit.pipeline.runner import run_recipe

TINY = {
    "cifar_vit": "backbone.options={depth: 2, width: 12, heads: 2, size: 16}",
    "cifar_mobilenet": "backbone.options={widths: [4, 6], blocks: 2, expansion: 3, head: 16}",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder per class; the classes have different colours."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(10):
        (folder / f"{label}").mkdir()
        for index in range(8):
            pixels = random.integers(0, 128, (16, 16, 3)) + 12 * np.array([label, 9 - label, 5])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{label}" / f"{index}.png")
    return folder


@pytest.mark.parametrize("name", TINY)
def test_channels_shrink_in_training_and_are_removed_without_drift(name, images, tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    keys = [TINY[name], f"data={{name: image_folder, root: {images}, val_root: {images}, size: 16, cache: none}}"]
    keys += ["train.epochs=4", "train.batch_size=16", "export.pt2=true"]
    run_recipe(load(name, keys), tmp_path / "run", Console(quiet=True))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "complete" and summary["equivalence"]["passed"]
    assert summary["kept"]["macs_ratio"] == pytest.approx(0.5, rel=0.02)
    assert summary["equivalence"]["given_back"] == summary["equivalence"]["carriers"] == 0
    assert summary["drift"]["max_abs_diff"] <= 1e-5 * summary["equivalence"]["output_size"]
    assert summary["finetuned"] == summary["slim"]
    assert summary["slim"]["metrics"] == summary["dense"]["metrics"]
    assert (tmp_path / "run/model.onnx").is_file() and (tmp_path / "run/exports/finetuned.pt2").is_file()
    assert summary["export"]["max_abs_diff"] < 1e-4


def test_the_residual_stream_of_a_vit_is_kept():
    """A LayerNorm computes its statistics over what is left, so a cut of its channels would show as drift."""
    assert load("cifar_vit", ["data.root=somewhere"]).slim.ignored_layers == ["patches"]
