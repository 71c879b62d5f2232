from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunekit.data.datasets import load_tensors
from prunekit.data.image_folder import image_folder, read_all
from prunekit.errors import DataError


def fill(root, **counts):
    """``counts[CLASS]`` grey images in ``root/CLASS``."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("L", (6, 4), 10 * number).save(root / name / f"{number:02d}.png")
    return root


def whole(root, **options):
    """All images of a folder, by way of val_root."""
    return image_folder("val", root=str(root), val_root=str(root), **options)


def test_labels_follow_sorted_class_names_on_any_file_system(tmp_path, monkeypatch):
    fill(tmp_path, zebra=2, ant=3, Bee=1)
    (tmp_path / "ant" / "cafe\u0301.JPG").write_bytes((tmp_path / "ant" / "00.png").read_bytes())
    for noise in (".hidden.png", "ant/.hidden.png", "ant/notes.txt", "README.md"):
        (tmp_path / noise).write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / "ant" / "deeper.png").mkdir()
    images = whole(tmp_path)
    assert images.classes == ("Bee", "ant", "zebra") and images.skipped == 0
    assert [name.split("/")[0] for name in images.names] == ["Bee", *["ant"] * 4, *["zebra"] * 2]
    assert [images.label(i) for i in range(7)] == [0, 1, 1, 1, 1, 2, 2]
    assert images.display_target(images.target(0)) == "Bee"
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listed(self), reverse=True))
    assert whole(tmp_path).names == images.names


def test_class_name_in_two_unicode_forms_is_one_class(tmp_path):
    fill(tmp_path / "a", **{"e\u0301": 2, "f": 2})
    fill(tmp_path / "b", **{"\u00e9": 1})
    options = {"root": str(tmp_path / "a"), "val_root": str(tmp_path / "b")}
    val = image_folder("val", **options)
    # The sign stands behind all ASCII letters, the letter with its accent before f.
    assert val.classes == ("f", "\u00e9") and val.label(0) == 1
    assert image_folder("train", **options).names[2] == "\u00e9/00.png"


def test_images_become_three_channel_tensors(tmp_path):
    tensors = load_tensors(whole(fill(tmp_path, a=2, b=2)), 8)
    assert tensors.images.shape == (4, 3, 8, 8) and tensors.targets.tolist() == [0, 0, 1, 1]
    assert tensors.images[:, :, 0, 0].tolist() == [[0] * 3, [10] * 3] * 2 and tensors.sizes[0].tolist() == [4, 6]


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    share=st.floats(0.01, 0.99),
    seed=st.integers(-5, 2**40),
)
def test_holdout_splits_each_class(tmp_path_factory, counts, share, seed):
    root = tmp_path_factory.mktemp("set")
    for label, count in enumerate(counts):
        (root / f"c{label}").mkdir()
        for number in range(count):
            (root / f"c{label}" / f"{number}.png").touch()
    train, val = (image_folder(s, root=str(root), val_holdout=share, seed=seed) for s in ("train", "val"))
    assert train.classes == val.classes == tuple(f"c{label}" for label in range(len(counts)))
    assert sorted(train.names + val.names) == sorted(f"c{k}/{n}.png" for k, c in enumerate(counts) for n in range(c))
    for label, count in enumerate(counts):
        held = sum(val.label(i) == label for i in range(len(val)))
        assert held == min(max(1, round(share * count)), count - 1)
    assert image_folder("val", root=str(root), val_holdout=share, seed=seed).names == val.names


def test_holdout_depends_on_seed_per_class(tmp_path):
    fill(tmp_path, a=20, b=20)
    chosen = {seed: image_folder("val", root=str(tmp_path), val_holdout=0.3, seed=seed).names for seed in range(4)}
    assert len({tuple(names) for names in chosen.values()}) == 4
    for names in chosen.values():
        assert {name[2:] for name in names if name[0] == "a"} != {name[2:] for name in names if name[0] == "b"}
    assert len(image_folder("val", root=str(tmp_path)).names) == 4, "a tenth of each class by default"
    fill(tmp_path, a=30)
    again = image_folder("val", root=str(tmp_path), val_holdout=0.3, seed=1).names
    assert [name for name in again if name[0] == "b"] == [name for name in chosen[1] if name[0] == "b"]


def test_val_root_uses_the_labels_of_root(tmp_path):
    train, val = fill(tmp_path / "train", a=1, b=2, c=1), fill(tmp_path / "val", c=2, a=1)
    options = {"root": str(train), "val_root": str(val)}
    assert image_folder("train", **options).names == ["a/00.png", "b/00.png", "b/01.png", "c/00.png"]
    held = image_folder("val", **options)
    assert held.classes == ("a", "b", "c") and [held.label(i) for i in range(3)] == [0, 2, 2]
    with pytest.raises(DataError, match="mutually exclusive"):
        image_folder("val", **options, val_holdout=0.5)
    for unknown, said in (({"d": 1}, "the class d, which"), ({"d": 1, "e": 1}, "the classes d, e, which")):
        with pytest.raises(DataError, match=said) as caught:
            image_folder("val", root=str(train), val_root=str(fill(val, **unknown)), on_error="skip")
        assert "\n" not in str(caught.value) and str(train) in str(caught.value)


def test_read_all_uses_the_classes_of_the_model(tmp_path):
    images = read_all(str(fill(tmp_path, b=1, d=2)), "raise", ["a", "b", "c", "d"])
    assert images.classes == ("a", "b", "c", "d") and [images.label(i) for i in range(3)] == [1, 3, 3]
    with pytest.raises(DataError, match=r"the class d, which the model does not know \(it knows a, b\)"):
        read_all(str(tmp_path), "raise", ["a", "b"])


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (None, "does not exist"),
        ({}, "no folder of images; a data folder has"),
        ({"a": 0, "b": 0}, "no image in a, b; a data folder has"),
    ],
)
def test_invalid_folder_raises_with_reason(tmp_path, counts, said):
    root = tmp_path / "set"
    if counts is not None:
        root.mkdir()
        fill(root, **counts)
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=said) as caught:
            whole(root, on_error=on_error)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file, not a folder"):
        whole(tmp_path / "file")


def test_empty_class_raises_or_is_ignored(tmp_path):
    fill(tmp_path, a=2, b=0, c=2)
    with pytest.raises(DataError, match=r"has no image in b; .*data\.on_error=skip"):
        whole(tmp_path)
    assert whole(tmp_path, on_error="skip").classes == ("a", "c")


def test_images_outside_class_folders_raise_or_are_counted_once(tmp_path):
    fill(tmp_path, a=3, b=3)
    for name in "vwxyz":
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match=r"v\.png, w\.png, x\.png and 2 more: image outside of a class folder"):
        whole(tmp_path)
    assert whole(tmp_path, on_error="skip").skipped == 5
    train, val = (image_folder(split, root=str(tmp_path), on_error="skip") for split in ("train", "val"))
    assert (train.skipped, val.skipped) == (5, 0)


def test_unreadable_image_raises_or_is_skipped_and_counted(tmp_path):
    fill(tmp_path, a=3, b=2)
    (tmp_path / "a" / "01.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a/01\.png cannot be read"):
        load_tensors(whole(tmp_path), 8)
    images = whole(tmp_path, on_error="skip")
    assert load_tensors(images, 8).targets.tolist() == [0, 0, 1, 1]
    assert images.names == ["a/00.png", "a/02.png", "b/00.png", "b/01.png"] and images.skipped == 1
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 5 images can be read"):
        load_tensors(whole(tmp_path, on_error="skip"), 8)


def test_class_with_one_image_raises(tmp_path):
    with pytest.raises(DataError, match=r"class b has only one image.*data\.val_root"):
        image_folder("train", root=str(fill(tmp_path, a=4, b=1)))


@pytest.mark.parametrize("root", [None, ""])
def test_missing_root_raises(root):
    with pytest.raises(DataError, match=r"image_folder needs data\.root"):
        image_folder("train", root=root)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_invalid_holdout_raises(tmp_path, share):
    with pytest.raises(DataError, match="val_holdout"):
        image_folder("val", root=str(fill(tmp_path, a=3)), val_holdout=share)
