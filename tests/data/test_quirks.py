"""Unusual and invalid files of real data sets: every command reads, reports or skips and counts them."""

import csv
import json
import math

import numpy as np
import pytest
from helpers.quirks import BRIGHT, DARK, QUIRKS, READ, REFUSED, make, stem_of
from helpers.small_run import skip_export
from PIL import Image
from rich.console import Console

from prunekit.cli import main
from prunekit.commands.evaluate import evaluate
from prunekit.commands.predict import predict
from prunekit.config.registry import tasks
from prunekit.data.datasets import LabelDataset, MaskDataset, load_tensors
from prunekit.data.mask_folder import folder
from prunekit.errors import DataError
from prunekit.tasks.base import iterate_batches

GOOD = 6


def whole(root, on_error="raise"):
    return folder("val", root="unused", val_root=str(root), on_error=on_error)


@pytest.mark.parametrize("kind", READ)
def test_unusual_file_is_read_correctly(tmp_path, kind):
    tensors = load_tensors(whole(make(tmp_path / "set", [kind])), 8)
    left, right = tensors.images[0, :, :, :3].float(), tensors.images[0, :, :, 5:].float()
    assert (left - DARK).abs().max() < 16 and (right - BRIGHT).abs().max() < 16
    assert not tensors.targets[0, :, :, :3].any()
    assert tensors.targets[0, :, :, 5:].all() == (not QUIRKS[kind].empty)


@pytest.mark.parametrize("kind", REFUSED)
def test_invalid_file_raises_or_is_skipped_and_counted(tmp_path, kind):
    root = make(tmp_path / "set", [kind], good=2)
    with pytest.raises(DataError) as error:
        load_tensors(whole(root), 8)
    said = str(error.value)
    assert QUIRKS[kind].error in said and stem_of(kind) in said and "\n" not in said and ";" in said
    pairs = whole(root, "skip")
    assert pairs.skipped == (0 if QUIRKS[kind].late else 1)
    assert len(load_tensors(pairs, 8)) == 2 and pairs.skipped == 1 and pairs.names == ["good0", "good1"]


def test_file_without_permission_raises_or_is_skipped(tmp_path, monkeypatch):
    """Whoever runs the tests may be allowed to read everything, so the system's refusal is played."""
    root = make(tmp_path / "set", [], good=3)
    opened = Image.open

    def refuse(path, *arguments, **options):
        if "good1" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match=r"good1\.png cannot be read: permission denied; change its permissions"):
        load_tensors(whole(root), 8)
    pairs = whole(root, "skip")
    assert len(load_tensors(pairs, 8)) == 2 and pairs.skipped == 1


def test_set_of_only_invalid_files_raises(tmp_path):
    for number, kind in enumerate(REFUSED):
        with pytest.raises(DataError, match=r"none of the 1 pairs can be read; the first: |has no pair"):
            load_tensors(whole(make(tmp_path / str(number), [kind]), "skip"), 8)


# ---- through the commands


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "set", list(QUIRKS), good=GOOD)


NET = """
from torch import nn


def build():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(stem, nn.Conv2d(8, 1, 1))
"""
RECIPE = """
name: quirks
backbone: {file: net.py, name: build}
data: {name: folder, size: 32, val_holdout: 0.3, on_error: skip, cache: none}
train: {epochs: 1, batch_size: 8}
finetune: {epochs: 1, batch_size: 8}
export: {onnx: false}
"""


@pytest.fixture(scope="module")
def made(everything, tmp_path_factory):
    """A run on all of it, what cannot be used skipped."""
    home = tmp_path_factory.mktemp("runs")
    (home / "net.py").write_text(NET)
    (home / "quirks.yaml").write_text(RECIPE)
    patch = pytest.MonkeyPatch()
    patch.setattr("prunekit.reporting.report", lambda *_: None)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["run", str(home / "quirks.yaml"), f"data.root={everything}", "--out", str(home / "run")])
    finally:
        patch.undo()
    assert not stop.value.code
    return home / "run"


def test_run_skips_and_counts_invalid_files(made):
    summary = json.loads((made / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert sum(summary["skipped"].values()) == len(REFUSED), summary["skipped"]
    assert all(count > 0 for count in summary["skipped"].values())
    for part in ("dense", "slim", "finetuned"):
        assert all(math.isfinite(value) for value in summary[part]["metrics"].values())
    named = {entry["name"] for entry in json.loads((made / "gallery" / "index.json").read_text())}
    assert not named & {stem_of(kind) for kind in REFUSED}


def test_run_without_skipping_stops_at_the_first_invalid_file(everything, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "csnet_duts", f"data.root={everything}", "data.cache=none", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert "image has no mask" in capsys.readouterr().err


def test_evaluation_skips_and_counts_or_raises(made, everything, tmp_path):
    (entry,) = evaluate(made, [f"all={everything}"], Console(quiet=True), on_error="skip")
    assert (entry["images"], entry["skipped"]) == (len(READ) + GOOD, len(REFUSED))
    assert all(math.isfinite(value) for value in entry["metrics"].values())
    for number, kind in enumerate(["a mask without photograph", "a bomb", "a mask in colours"]):
        root = make(tmp_path / str(number), [kind], good=1)
        with pytest.raises(DataError) as error:
            evaluate(made, [f"one={root}"], Console(quiet=True))
        assert QUIRKS[kind].error in str(error.value) and stem_of(kind) in str(error.value)


def test_prediction_reports_unreadable_images_and_does_the_others(made, everything, tmp_path):
    broken = {stem_of(kind) for kind, quirk in REFUSED.items() if quirk.photo}
    with pytest.raises(DataError) as error:
        predict(made, [everything / "images"], tmp_path / "maps", console=Console(quiet=True))
    lines = str(error.value).splitlines()
    assert len(lines) == len(broken) and all(any(stem in line for stem in broken) for line in lines)
    photos = [path for path in (everything / "images").iterdir() if path.is_file() and path.stem not in broken]
    assert {path.stem for path in (tmp_path / "maps").iterdir()} == {path.stem for path in photos}
    for path in photos:
        with Image.open(path) as photo, Image.open(tmp_path / "maps" / f"{path.stem}.png") as shown:
            turned = photo.getexif().get(0x0112, 1) > 4
            assert shown.size == (photo.size[::-1] if turned else photo.size) and shown.mode == "L", path


def test_image_folder_skips_and_counts_invalid_files(tmp_path, monkeypatch):
    skip_export(monkeypatch)
    monkeypatch.setattr("prunekit.reporting.report", lambda *_: None)
    kinds = [kind for kind, quirk in QUIRKS.items() if quirk.error is None or quirk.photo]
    make(tmp_path / "pairs", kinds)
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for path in (tmp_path / "pairs" / "images").iterdir():
            (tmp_path / "set" / name / path.name).write_bytes(path.read_bytes())
        for number in range(GOOD):
            picture = random.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "set" / name / f"00{number}.png")
    (tmp_path / "set" / "astray.png").write_bytes(b"")
    broken = 2 * sum(QUIRKS[kind].photo for kind in kinds) + 1
    keys = [
        "backbone.options={depth: 8, width: 4, classes: 2}",
        "data.name=image_folder",
        "data.size=16",
        "train.epochs=0",
    ]
    keys += ["finetune.epochs=0", f"data.root={tmp_path / 'set'}", "data.on_error=skip", "data.cache=none"]
    with pytest.raises(SystemExit) as stop:
        main(["run", "digits_resnet", *keys, "data.val_holdout=0.3", "--out", str(tmp_path / "run")])
    assert not stop.value.code
    assert sum(json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"].values()) == broken
    with pytest.raises(DataError) as error:
        predict(tmp_path / "run", [tmp_path / "set" / "one"], tmp_path / "out", console=Console(quiet=True))
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert (
        len(rows) == len(kinds) + GOOD - (broken - 1) // 2 and len(str(error.value).splitlines()) == (broken - 1) // 2
    )


# ---- sets of others


class Theirs(MaskDataset):
    """A data set of a plugin."""

    def __init__(self, image, mask):
        super().__init__(["theirs"])
        self.held = image, mask

    def image(self, index):
        return self.held[0]

    def mask(self, index):
        return self.held[1]


IMAGE, MASK = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        (IMAGE / 255.0, MASK, r"image of theirs is float64 \[4, 6, 3\]"),
        (IMAGE[..., :1], MASK, r"image of theirs is uint8 \[4, 6, 1\]"),
        (IMAGE[:0], MASK[:0], r"image of theirs is uint8 \[0, 6, 3\]"),
        (IMAGE, MASK.astype(bool), r"mask of theirs is bool"),
        (IMAGE, MASK.astype(np.float32), r"mask of theirs is float32 .* uint8 \[4, 6\] with levels 0 to 255"),
        (IMAGE, MASK.astype(np.int64) - 1, r"mask of theirs is int64"),
        (IMAGE, MASK.T, r"mask of theirs is uint8 \[6, 4\]"),
        (IMAGE, None, r"mask of theirs is NoneType"),
    ],
)
def test_invalid_pairs_of_any_data_set_raise(image, mask, words):
    for read in (lambda pairs: load_tensors(pairs, 8), lambda pairs: list(iterate_batches(pairs, 4))):
        with pytest.raises(DataError, match=words):
            read(Theirs(image, mask))
    tolerant = Theirs(image, mask)
    tolerant.skip_errors = True
    assert list(iterate_batches(tolerant, 4)) == [] and tolerant.skipped == 1


class Nothing(LabelDataset):
    def image(self, index):
        raise AssertionError

    label = image


@pytest.mark.parametrize("task", ["saliency", "classification"])
def test_evaluation_of_an_empty_set_raises(task):
    import torch

    held = Theirs(IMAGE, MASK) if task == "saliency" else Nothing([], ["a", "b"])
    held.names = []
    model = torch.nn.Conv2d(3, 1, 1)
    found = tasks.get(task)()
    for act in (
        lambda: found.evaluate(model, held, 8, 4),
        lambda: found.trivial_scores(held),
        lambda: load_tensors(held, 8),
    ):
        with pytest.raises(DataError, match=r"no image|empty"):
            act()
    broken = Theirs(IMAGE.astype(float), MASK)
    broken.skip_errors = True
    if task == "saliency":
        with pytest.raises(DataError, match="no image to evaluate"):
            found.evaluate(model, broken, 8, 4)
