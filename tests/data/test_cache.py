import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from prunekit.config.registry import datasets
from prunekit.data import cache
from prunekit.data.cache import cached_tensors, data_folder, identity, to_device
from prunekit.data.datasets import load_tensors
from prunekit.data.image_folder import image_folder
from prunekit.data.mask_folder import FolderPairs, folder
from prunekit.errors import DataError


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for part, shape in (("images", (9, 12, 3)), ("GT", (9, 12))):
        (tmp_path / "set" / part).mkdir(parents=True)
        for name in "abcd":
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / part / f"{name}.png")
    return tmp_path / "set"


def pairs(root, **options):
    return folder("val", root="unused", val_root=str(root), **options)


def same(a, b):
    return all(
        getattr(a, part).dtype == getattr(b, part).dtype and torch.equal(getattr(a, part), getattr(b, part))
        for part in cache.PARTS
    )


@pytest.fixture
def decoded(monkeypatch):
    """How often a set was read from its images."""
    calls = []
    monkeypatch.setattr(cache, "load_tensors", lambda *a: calls.append(a) or load_tensors(*a))
    return calls


def silent(line):
    raise AssertionError(line)


def test_second_run_decodes_nothing(root, tmp_path, decoded):
    kept = tmp_path / "kept"
    first = cached_tensors(pairs(root), 8, kept, silent)
    again = cached_tensors(pairs(root), 8, kept, silent)
    assert len(decoded) == 1 and same(first, again) and same(again, load_tensors(pairs(root), 8))
    cached_tensors(pairs(root), 16, kept, silent)
    assert len(decoded) == 2, "another size is another set"


def test_changed_file_is_read_again(root, tmp_path, decoded):
    kept = tmp_path / "kept"
    cached_tensors(pairs(root), 8, kept, silent)
    file = root / "GT" / "b.png"
    Image.fromarray(np.full((9, 12), 255, np.uint8)).save(file)
    os.utime(file, ns=(1, 1))
    found = cached_tensors(pairs(root), 8, kept, silent)
    assert len(decoded) == 2 and found.targets[1].min() == 1
    (root / "GT" / "d.png").unlink()
    (root / "images" / "d.png").unlink()
    assert len(cached_tensors(pairs(root), 8, kept, silent)) == 3 and len(decoded) == 3


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "note", "other"])
def test_damaged_cache_file_is_not_used(root, tmp_path, decoded, harm):
    kept, said = tmp_path / "kept", []
    whole = cached_tensors(pairs(root), 8, kept, said.append)
    (store,), (note,) = kept.glob("*.safetensors"), kept.glob("*.json")
    data = store.read_bytes()
    if harm == "flip":
        store.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "cut":
        store.write_bytes(data[:-10])
    elif harm == "gone":
        store.unlink()
    elif harm == "note":
        note.write_text('{"format": 1}')
    else:
        note.write_text("[]")
    assert same(cached_tensors(pairs(root), 8, kept, said.append), whole)
    assert len(decoded) == 2 and len(said) == 1 and str(store) in said[0] and "reading the images again" in said[0]
    assert same(cached_tensors(pairs(root), 8, kept, silent), whole) and len(decoded) == 2, "written again"


def test_unreadable_images_stay_left_out(root, tmp_path, decoded):
    (root / "images" / "c.png").write_bytes(b"no image")
    kept, found = tmp_path / "kept", []
    for _ in range(2):
        held = pairs(root, on_error="skip")
        found.append(cached_tensors(held, 8, kept, silent))
        assert held.names == ["a", "b", "d"] and held.skipped == 1
    assert len(decoded) == 1 and same(*found)
    with pytest.raises(DataError):
        cached_tensors(pairs(root), 8, kept, silent)


def test_unwritable_cache_folder_only_warns(root, tmp_path):
    (tmp_path / "kept").write_text("a file")
    said = []
    assert same(cached_tensors(pairs(root), 8, tmp_path / "kept", said.append), load_tensors(pairs(root), 8))
    assert len(said) == 1 and "set data.cache" in said[0]


def test_failed_write_leaves_no_file(root, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    said = []
    cached_tensors(pairs(root), 8, tmp_path / "kept", said.append)
    assert "No space left" in said[0] and not list((tmp_path / "kept").iterdir())


def test_labels_are_cached(root, tmp_path, decoded):
    sets = [image_folder("val", root=str(root), val_root=str(root)) for _ in range(2)]
    assert same(*(cached_tensors(one, 8, tmp_path / "kept", silent) for one in sets)) and len(decoded) == 1


def test_sets_without_files_are_not_cached(tmp_path):
    shapes = datasets.get("salient_shapes")("val", size=16, val=2)
    assert identity(shapes, 16) is None
    cached_tensors(shapes, 16, tmp_path / "kept", silent)
    assert not (tmp_path / "kept").exists()


def test_subclass_that_overrides_reading_is_not_cached(root):
    class Inverted(FolderPairs):
        def image(self, index):
            return 255 - super().image(index)

    known = pairs(root)
    other = Inverted({name: known.paths(i) for i, name in enumerate(known.names)}, False, 0)
    assert identity(known, 8) is not None and identity(other, 8) is None


def test_data_folder_locations(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path))
    assert data_folder("auto") == tmp_path / "data" and data_folder("none") is None
    assert data_folder(str(tmp_path / "here")) == tmp_path / "here"
    monkeypatch.delenv("PRUNEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data_folder("auto") == tmp_path / "xdg" / "prunekit" / "data"


def test_note_has_checksum_and_format(root, tmp_path):
    cached_tensors(pairs(root), 8, tmp_path / "kept", silent)
    (note,) = (tmp_path / "kept").glob("*.json")
    assert json.loads(note.read_text())["gone"] == []


def test_to_device_keeps_tensors_on_cpu(root):
    tensors = load_tensors(pairs(root), 8)
    assert to_device(tensors, torch.device("cpu")) is tensors
