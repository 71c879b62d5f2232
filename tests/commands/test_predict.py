import csv
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from prunekit.commands.predict import predict
from prunekit.config.recipe import load
from prunekit.errors import DataError, RecipeError
from prunekit.pipeline.models import CLASSES, build_dense, save_model
from prunekit.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Untrained runs "maps" and "labels", and photos a.png and b.jpg."""
    here = tmp_path_factory.mktemp("prediction")
    recipes = {
        "maps": load("csnet", ["backbone.options.width=10", "data.size=32"]),
        "labels": load("digits_resnet", ["data.size=16"]),
    }
    for name, recipe in recipes.items():
        with RunDir.start(here / name, recipe.dump(), {}) as run:
            model = build_dense(recipe)
            with torch.no_grad():
                model(torch.randn(2, 3, 32, 32))
            save_model(run, "dense", model)
            if name == "labels":
                run.write_json(CLASSES, [str(digit) for digit in range(10)])
    (here / "photos").mkdir()
    for number, name in enumerate(("a.png", "b.jpg")):
        image = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(image).save(here / "photos" / name)
    return here


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_input_is_never_overwritten(here):
    photos = here / "photos"
    (here / "link").symlink_to(photos)
    (here / "maps of photos").mkdir()
    os.link(photos / "a.png", here / "maps of photos" / "a.png")
    before = contents(photos)
    for out in (photos, here / "link", photos / ".." / "photos", here / "maps of photos"):
        for overwrite in (False, True):
            with pytest.raises(DataError, match=r"a\.png would overwrite the input .*a\.png; choose another --out"):
                predict(here / "maps", [photos], out, overwrite=overwrite)
    assert contents(photos) == before


def test_existing_files_need_overwrite(here):
    maps, photos = here / "out", here / "photos"
    assert predict(here / "maps", [photos], maps) == [maps / "a.png", maps / "b.png"]
    (maps / "a.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"out/a\.png and 1 other file would be overwritten.* --overwrite"):
        predict(here / "maps", [photos], maps)
    assert (maps / "a.png").read_bytes() == b"mine"
    predict(here / "maps", [photos], maps, overwrite=True)
    assert Image.open(maps / "a.png").size == (30, 20)
    # Next to the photo, a map must not replace another file of the user.
    shutil.move(photos / "a.png", photos / "b.png")
    with pytest.raises(DataError, match=r"b\.png would be overwritten"):
        predict(here / "maps", [photos / "b.jpg"], photos)
    table, photos = here / "table", photos / "b.png"
    predict(here / "labels", [photos], table)
    with pytest.raises(DataError, match=r"predictions\.csv would be overwritten"):
        predict(here / "labels", [photos], table)
    predict(here / "labels", [photos], table, overwrite=True)


def test_file_names_that_are_not_utf8(here):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(here / "photos" / "a.png", here / "photos" / name)
    assert len(predict(here / "maps", [here / "photos"], here / "out")) == 3
    assert (here / "out" / name).is_file()
    predict(here / "labels", [here / "photos"], here / "out")
    rows = list(csv.DictReader((here / "out" / "predictions.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["file"][-10:] for row in rows] == ["otos/a.png", "otos/b.jpg", r"caf\udce9.png"[-10:]]


def test_a_model_that_the_run_does_not_have(here):
    with pytest.raises(RecipeError, match="has no such model, did you mean 'dense'"):
        predict(here / "maps", [here / "photos"], here / "out", model="dence")


def test_overlays_and_cutouts_are_written_beside_the_maps(here):
    names = ["a.png", "a-overlay.png", "a-cutout.png", "b.png", "b-overlay.png", "b-cutout.png"]
    written = predict(here / "maps", [here / "photos"], here / "out", pictures=["overlay", "cutout"])
    assert [path.name for path in written] == names
    image = np.array(Image.open(here / "photos" / "a.png"))
    levels, tinted, cut = (np.array(Image.open(path)) for path in written[:3])
    assert levels.shape == (20, 30) and tinted.shape == (20, 30, 3)
    assert np.array_equal(cut[..., :3], image) and np.array_equal(cut[..., 3], levels)
    expected = image + (levels[..., None] / 255 * 0.6) * (np.array([213, 94, 0]) - image.astype(float))
    assert abs(tinted - expected).max() <= 0.5 + 1e-9


def test_pictures_are_refused_where_they_cannot_be(here):
    with pytest.raises(DataError, match=r"--cutout needs a model that predicts maps; .* writes predictions\.csv"):
        predict(here / "labels", [here / "photos"], here / "out", pictures=["cutout"])
    shutil.copy(here / "photos" / "a.png", here / "photos" / "b-overlay.png")
    predict(here / "maps", [here / "photos"], here / "maps of photos")
    with pytest.raises(DataError, match=r"would both become b-overlay\.png"):
        predict(here / "maps", [here / "photos"], here / "out", pictures=["overlay"])
    assert not (here / "out").exists()
