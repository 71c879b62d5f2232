from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from prunekit.data.datasets import load_tensors
from prunekit.data.mask_folder import folder
from prunekit.errors import DataError

REAL = Path(__file__).parents[2] / "../shared/data"


def write(path, level=200, size=(8, 6), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).convert(mode).save(path, **options)
    return path


def fill(root, stems, image=".jpg", mask=".png"):
    for number, stem in enumerate(stems):
        write(root / "images" / (stem + image), 10 + number)
        write(root / "GT" / (stem + mask), 255, mode="L")
    return root


def whole(root, **options):
    """All pairs of a folder, by way of val_root."""
    return folder("val", root="unused", val_root=str(root), **options)


def test_pairs_by_stem_with_any_extension(tmp_path):
    stems = ["plain", "a.b.c", "with space", "é_日本", "UPPER", "0001"]
    forms = [
        (".jpg", ".png"),
        (".JPG", ".PNG"),
        (".jpeg", ".bmp"),
        (".webp", ".webp"),
        (".PNG", ".gif"),
        (".tif", ".tiff"),
    ]
    for stem, (image, mask) in zip(stems, forms, strict=True):
        fill(tmp_path, [stem], image, mask)
    for noise in ("images/.hidden.jpg", "images/notes.txt", "GT/Thumbs.db", "GT/.DS_Store"):
        (tmp_path / noise).write_text("")
    (tmp_path / "images" / "deeper.jpg").mkdir()
    pairs = whole(tmp_path)
    assert pairs.names == sorted(stems) and pairs.skipped == 0
    assert all(pairs.mask(i).min() == 255 for i in range(len(pairs)))


def test_stem_in_two_unicode_forms_is_one_stem(tmp_path):
    write(tmp_path / "images" / "caf\u00e9.jpg")
    write(tmp_path / "GT" / "cafe\u0301.png")
    assert whole(tmp_path).names == ["caf\u00e9"]


@pytest.mark.parametrize(("images", "masks"), [("images", "gt"), ("Images", "GT"), ("IMAGES", "Gt")])
def test_folder_names_in_any_case(tmp_path, images, masks):
    write(tmp_path / images / "a.jpg")
    write(tmp_path / masks / "a.png")
    assert len(whole(tmp_path)) == 1


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "set", "ab")
    assert len(whole("~/set")) == 2 and len(folder("train", root="~/set")) == 1


def broken_root(root, kind):
    if kind == "file":
        root.write_text("")
    elif kind == "no GT":
        write(root / "images" / "a.jpg")
        write(root / "masks" / "a.png")
    elif kind == "no images":
        write(root / "GT" / "a.png")
    elif kind == "empty":
        (root / "images").mkdir(parents=True)
        (root / "GT").mkdir()
    elif kind == "no common stem":
        write(root / "images" / "a.jpg")
        write(root / "GT" / "a_mask.png")
    elif kind == "two of one stem":
        write(fill(root, "a") / "images" / "a.png")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "does not exist"),
        ("file", "is a file, not a folder"),
        ("no GT", r"has no folder GT/ \(it has: images, masks\)"),
        ("no images", r"has no folder images/ \(it has: GT\)"),
        ("empty", "0 images and 0 masks"),
        ("no common stem", "1 images and 1 masks, but no common stem"),
        ("two of one stem", r"has a\.jpg and a\.png, which have the same stem"),
    ],
)
def test_invalid_folder_raises_with_reason(tmp_path, kind, said):
    broken_root(tmp_path / "set", kind)
    with pytest.raises(DataError, match=said) as caught:
        whole(tmp_path / "set", on_error="skip")
    assert "\n" not in str(caught.value)


def test_missing_partner_raises_or_is_skipped(tmp_path):
    fill(tmp_path, ["a", "b", "c", "d"])
    for stem in "vwxyz":
        write(tmp_path / "images" / f"{stem}.jpg")
    with pytest.raises(DataError, match=r"v\.jpg, w\.jpg, x\.jpg and 2 more: image has no mask"):
        whole(tmp_path)
    for stem in "vwxyz":
        (tmp_path / "images" / f"{stem}.jpg").unlink()
    write(tmp_path / "GT" / "z.png")
    with pytest.raises(DataError, match=r"z\.png: mask has no image"):
        whole(tmp_path)
    pairs = whole(tmp_path, on_error="skip")
    assert (pairs.names, pairs.skipped) == (["a", "b", "c", "d"], 1)
    train, val = (folder(split, root=str(tmp_path), on_error="skip") for split in ("train", "val"))
    assert train.skipped + val.skipped == 1, "counted once"


def test_unreadable_image_raises_or_is_skipped_and_counted(tmp_path):
    fill(tmp_path, "abcd")
    (tmp_path / "images" / "b.jpg").write_bytes(b"")
    (tmp_path / "GT" / "d.png").write_bytes(b"no image")
    write(tmp_path / "GT" / "z.png")
    with pytest.raises(DataError, match=r"images/b\.jpg is empty"):
        (tmp_path / "GT" / "z.png").rename(tmp_path / "z.png")
        load_tensors(whole(tmp_path), 8)
    (tmp_path / "z.png").rename(tmp_path / "GT" / "z.png")
    pairs = whole(tmp_path, on_error="skip")
    tensors = load_tensors(pairs, 8)
    assert (pairs.names, pairs.skipped, len(tensors)) == (["a", "c"], 3, 2)


def test_mask_is_resized_to_its_image(tmp_path):
    write(tmp_path / "images" / "a.jpg", size=(40, 30))
    half = np.zeros((6, 8), np.uint8)
    half[:, 4:] = 255
    (tmp_path / "GT").mkdir()
    Image.fromarray(half).save(tmp_path / "GT" / "a.png")
    mask = whole(tmp_path).mask(0)
    assert mask.shape == (30, 40) and mask.dtype == np.uint8
    assert not (mask[:, :20] > 127).any() and (mask[:, 20:] > 127).all()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_mask_without_exif_orientation_is_rotated_with_the_photo(tmp_path, orientation):
    levels = np.zeros((6, 9), np.uint8)
    levels[:2, :5] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for part, options in (("images", {"exif": exif}), ("GT", {})):
        (tmp_path / part).mkdir()
        Image.fromarray(levels).save(tmp_path / part / "a.png", **options)
    image, mask = whole(tmp_path).pair(0)
    assert image.shape == (9, 6, 3) and np.array_equal(image[..., 0], mask)


@settings(max_examples=30)
@given(count=st.integers(2, 40), share=st.floats(0.01, 0.99), seed=st.integers(-5, 2**40))
def test_holdout_splits_the_folder(tmp_path_factory, count, share, seed):
    root = tmp_path_factory.mktemp("set")
    for part in ("images", "GT"):
        (root / part).mkdir()
        for number in range(count):
            (root / part / f"{number}.png").touch()
    train, val = (folder(s, root=str(root), val_holdout=share, seed=seed).names for s in ("train", "val"))
    assert sorted(train + val) == sorted(str(n) for n in range(count)) and train and val
    assert len(val) == min(max(1, round(share * count)), count - 1)
    assert folder("val", root=str(root), val_holdout=share, seed=seed).names == val


def test_holdout_depends_on_seed_not_on_file_system(tmp_path, monkeypatch):
    fill(tmp_path, [f"{n:02d}" for n in range(30)])
    chosen = {seed: folder("val", root=str(tmp_path), val_holdout=0.3, seed=seed).names for seed in range(4)}
    assert len({tuple(names) for names in chosen.values()}) > 1
    assert len(folder("val", root=str(tmp_path)).names) == 3, "a tenth by default"
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listed(self), reverse=True))
    assert folder("val", root=str(tmp_path), val_holdout=0.3, seed=2).names == chosen[2]


def test_val_root_keeps_all_of_root_for_training(tmp_path):
    fill(tmp_path / "a", "abc")
    fill(tmp_path / "b", "xy")
    options = {"root": str(tmp_path / "a"), "val_root": str(tmp_path / "b")}
    assert folder("train", **options).names == ["a", "b", "c"] and folder("val", **options).names == ["x", "y"]
    with pytest.raises(DataError, match="mutually exclusive"):
        folder("val", **options, val_holdout=0.5)


@pytest.mark.parametrize("root", [None, ""])
def test_missing_root_raises(root):
    with pytest.raises(DataError, match=r"needs data\.root"):
        folder("train", root=root)


def test_one_pair_raises(tmp_path):
    with pytest.raises(DataError, match=r"one pair.*val_root"):
        folder("train", root=str(fill(tmp_path, "a")))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_invalid_holdout_raises(tmp_path, share):
    with pytest.raises(DataError, match="val_holdout"):
        folder("val", root=str(fill(tmp_path, "abc")), val_holdout=share)


@pytest.mark.skipif(not (REAL / "DUTS-TR-mini").is_dir(), reason="the shared data (not in the repository) is not here")
def test_real_data_set_is_read():
    pairs = whole(REAL / "DUTS-TR-mini")
    tensors = load_tensors(pairs, 32)
    assert len(pairs) == 48 and pairs.skipped == 0
    assert 0.1 < tensors.targets.float().mean() < 0.5 and tensors.sizes.max() == 400
    assert tensors.targets.flatten(1).any(1).sum() >= 47, "at most one mask is empty"


def test_the_nearest_folder_is_proposed(tmp_path):
    fill(tmp_path / "DUTS-TR", "ab")
    for wrong in ("DUTS_TR", "duts-tr", "DUT-TR"):
        with pytest.raises(DataError, match=rf"does not exist; did you mean {tmp_path}/DUTS-TR\?"):
            folder("train", root=str(tmp_path / wrong))
