import pytest
import torch
from helpers.toy_run import quiet, toy_recipe, write_photos

from prunekit.config import registry
from prunekit.data import cache
from prunekit.data.datasets import load_tensors
from prunekit.data.image_folder import image_folder
from prunekit.errors import DataError
from prunekit.pipeline.context import RunContext
from prunekit.utils.progress import Reporter


@pytest.fixture
def decoded(monkeypatch):
    """The sizes at which a set was read from its images."""
    sizes = []
    monkeypatch.setattr(cache, "load_tensors", lambda pairs, size: sizes.append(size) or load_tensors(pairs, size))
    return sizes


def context(photos, kept):
    recipe = toy_recipe(photos, f"data.cache={kept}", "data.on_error=skip")
    return RunContext(recipe, Reporter(quiet()))


def test_a_data_set_with_any_options_gets_the_keys_of_the_section(tmp_path, monkeypatch):
    got = {}

    def any_options(split, **options):
        got.update(options)
        return image_folder(split, root=options["root"])

    photos = write_photos(tmp_path / "photos")
    monkeypatch.setattr(registry.datasets, "get", lambda name: any_options)
    context(photos, "none").dataset("train")
    assert {key: got[key] for key in ("root", "size", "seed", "on_error")} == {
        "root": str(photos),
        "size": 8,
        "seed": 0,
        "on_error": "skip",
    }


def test_each_size_is_read_once_and_kept_once(tmp_path, decoded):
    photos = write_photos(tmp_path / "photos")
    first = context(photos, tmp_path / "kept")
    (photos / "dark" / "dark3.png").write_bytes(b"not an image")
    small = first.tensors("train", 4)
    # The recipe's size comes first, so that what it drops is missing at every size.
    assert decoded == [8, 4] and small.images.shape == (len(first.tensors("train")), 3, 4, 4)
    assert first.tensors("train", 4) is small and first.tensors("train", 8) is first.tensors("train")
    assert decoded == [8, 4] and len(list((tmp_path / "kept").glob("*.safetensors"))) == 2
    again = context(photos, tmp_path / "kept")
    assert torch.equal(again.tensors("train", 4).images, small.images) and decoded == [8, 4]
    assert torch.equal(again.tensors("train", 4).targets, again.tensors("train").targets)


def test_an_image_that_is_damaged_between_two_sizes_is_an_error(tmp_path):
    photos = write_photos(tmp_path / "photos")
    found = context(photos, "none")
    assert len(found.tensors("train")) == 12
    (photos / found.dataset("train").names[0]).write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"12 images could be read at 8×8, and now 11; restore the images"):
        found.tensors("train", 4)
