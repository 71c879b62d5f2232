"""Every image mode that real data sets contain, and damaged files."""

import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image

from prunekit.data import images
from prunekit.errors import DataError

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack([RAMP, RAMP[::-1], 255 - RAMP], -1)
HARD = np.where(RAMP > 100, 255, 0).astype(np.uint8)


def palette(levels):
    picture = Image.fromarray(levels // 255, "L").convert("P")
    picture.putpalette([0, 0, 0, 255, 255, 255] + [0] * 750)
    picture.putdata((levels // 255).ravel().tolist())
    return picture


MASKS = {
    "grey": Image.fromarray(HARD),
    "rgb": Image.fromarray(HARD).convert("RGB"),
    "rgba": Image.merge("RGBA", [Image.fromarray(HARD)] * 3 + [Image.fromarray(RAMP)]),
    "grey with alpha": Image.merge("LA", [Image.fromarray(HARD), Image.fromarray(RAMP)]),
    "1-bit": Image.fromarray(HARD).convert("1"),
    "palette": palette(HARD),
    "16-bit": Image.fromarray(HARD.astype(np.uint16) * 257),
    "8 bits in 16": Image.fromarray(HARD.astype(np.uint16)),
    "classes in 16": Image.fromarray((HARD // 255).astype(np.uint16)),
    "classes 0 and 1": Image.fromarray(HARD // 255),
}


@pytest.mark.parametrize("kind", MASKS)
def test_binary_mask_reads_the_same_in_every_mode(tmp_path, kind):
    MASKS[kind].save(tmp_path / "m.png")
    levels = images.read_mask(tmp_path / "m.png")
    assert levels.dtype == np.uint8 and np.array_equal(levels, HARD)


def with_alpha(color, alpha, mode="RGBA"):
    picture = Image.new("RGB", alpha.shape[::-1], color)
    picture.putalpha(Image.fromarray(alpha))
    return picture.convert(mode)


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (200, 30, 30)])
@pytest.mark.parametrize("alpha", [HARD, RAMP])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_mask_in_alpha_under_a_constant_color(tmp_path, color, alpha, mode):
    with_alpha(color, alpha, mode).save(tmp_path / "m.png")
    assert np.array_equal(images.read_mask(tmp_path / "m.png"), alpha)


def test_a_mask_in_alpha_of_other_formats(tmp_path):
    with_alpha((250, 250, 250), HARD).save(tmp_path / "m.webp", quality=30, alpha_quality=100)
    assert np.array_equal(images.read_mask(tmp_path / "m.webp"), HARD)
    paletted = Image.fromarray(HARD // 255, "P")
    paletted.putpalette([255, 255, 255] * 2)
    paletted.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    assert np.array_equal(images.read_mask(tmp_path / "p.png"), HARD)


def test_a_mask_in_alpha_with_other_colors_under_transparent_pixels(tmp_path):
    for name, hidden in {"same": (0, 0, 0), "other": (255, 255, 255), "green": (0, 255, 0)}.items():
        pixels = np.where(HARD[..., None] > 0, 255, hidden)
        if name == "other":
            pixels = np.where(HARD[..., None] > 0, 0, hidden)
        Image.fromarray(np.dstack([pixels, HARD]).astype(np.uint8)).save(tmp_path / f"{name}.png")
    assert np.array_equal(images.read_mask(tmp_path / "same.png"), HARD)
    with pytest.raises(DataError, match=r"other\.png: its colors and its transparency show different masks"):
        images.read_mask(tmp_path / "other.png")
    with pytest.raises(DataError, match=r"green\.png: its colors|green\.png is in color"):
        images.read_mask(tmp_path / "green.png")


def test_graded_mask_keeps_its_levels(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "m.png")
    assert np.array_equal(images.read_mask(tmp_path / "m.png"), RAMP)
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(images.read_mask(tmp_path / "deep.png"), RAMP)


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_mask_is_scaled_by_its_maximum(tmp_path, top):
    Image.fromarray((HARD / 255 * top).astype(np.float32)).save(tmp_path / "m.tif")
    assert np.array_equal(images.read_mask(tmp_path / "m.tif"), HARD)


def test_empty_mask_stays_empty(tmp_path):
    Image.new("L", (8, 6)).save(tmp_path / "m.png")
    assert not images.read_mask(tmp_path / "m.png").any()


def test_photographs_of_every_mode_become_rgb(tmp_path):
    photos = {
        "rgb.png": Image.fromarray(RGB),
        "opaque.png": Image.fromarray(RGB).convert("RGBA"),
        "upper.PNG": Image.fromarray(RGB),
        "lossless.webp": None,
    }
    Image.fromarray(RGB).save(tmp_path / "lossless.webp", lossless=True)
    for name, picture in photos.items():
        if picture is not None:
            picture.save(tmp_path / name)
        assert np.array_equal(images.read_image(tmp_path / name), RGB), name
    grey = np.repeat(RAMP[..., None], 3, -1)
    for name, picture in {
        "grey.png": Image.fromarray(RAMP),
        "deep.png": Image.fromarray(RAMP.astype(np.uint16) * 257),
    }.items():
        picture.save(tmp_path / name)
        assert np.array_equal(images.read_image(tmp_path / name), grey), name


def test_transparent_pixels_are_blended_with_black(tmp_path):
    alpha = Image.fromarray(np.where(RAMP > 100, 255, 0).astype(np.uint8))
    picture = Image.fromarray(RGB)
    picture.putalpha(alpha)
    picture.save(tmp_path / "a.png")
    expected = np.where((RAMP > 100)[..., None], RGB, 0)
    assert np.array_equal(images.read_image(tmp_path / "a.png"), expected)


def test_cmyk_is_close_to_rgb(tmp_path):
    Image.new("RGB", (8, 6), (200, 40, 90)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    pixel = images.read_image(tmp_path / "c.jpg")[3, 3].astype(int)
    assert np.abs(pixel - (200, 40, 90)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_photo_and_mask(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(RGB).save(tmp_path / "p.png", exif=exif)
    Image.fromarray(HARD).save(tmp_path / "m.png", exif=exif)
    photo, mask = images.read_image(tmp_path / "p.png"), images.read_mask(tmp_path / "m.png")
    assert photo.shape[:2] == mask.shape == ((6, 8) if orientation < 5 else (8, 6))
    # The red channel is the ramp that the mask was cut from.
    assert np.array_equal(mask, np.where(photo[..., 0] > 100, 255, 0))
    assert np.array_equal(images.match_orientation(HARD, tmp_path / "p.png"), mask)


def damaged(tmp_path, kind):
    path = tmp_path / "broken one.jpg"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "text":
        path.write_text("no picture\nat all\n")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "missing", "folder"])
@pytest.mark.parametrize("read", [images.read_image, images.read_mask])
def test_damaged_file_raises_one_line_with_its_name(tmp_path, kind, read):
    path = damaged(tmp_path, kind)
    with pytest.raises(DataError) as caught:
        read(path)
    assert "broken one.jpg" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif"])
def test_bytes_are_decoded_as_their_file_is(tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(RGB).save(tmp_path / f"p.{suffix}", **({} if suffix == "gif" else {"exif": exif}))
    decoded = images.decode_image((tmp_path / f"p.{suffix}").read_bytes(), "it")
    assert np.array_equal(decoded, images.read_image(tmp_path / f"p.{suffix}"))


@pytest.mark.parametrize("kind", ["empty", "truncated", "text"])
def test_damaged_bytes_raise_one_line_with_the_given_name(tmp_path, kind):
    with pytest.raises(DataError, match=r"^the upload (is empty|is not an image|cannot be read as an image)") as caught:
        images.decode_image(damaged(tmp_path, kind).read_bytes(), "the upload")
    assert "BytesIO" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [30, 10])
def test_decompression_bomb_limit(tmp_path, monkeypatch, limit):
    Image.fromarray(RGB).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # 48 pixels: above the limit, above twice the limit
    with pytest.raises(DataError, match=r"b\.png is too large"):
        images.read_image(tmp_path / "b.png")


def test_reading_gives_no_warnings(tmp_path):
    picture = palette(HARD)
    picture.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.read_image(tmp_path / "p.png")


def test_maps_round_trip(tmp_path):
    images.write_image(tmp_path / "map.png", RAMP)
    assert np.array_equal(images.read_mask(tmp_path / "map.png"), RAMP)
    for bad in ("map", "map.nothing", "missing/map.png"):
        with pytest.raises(DataError, match="cannot write"):
            images.write_image(tmp_path / bad, RAMP)


def test_is_image():
    assert all(images.is_image(name) for name in ("a.jpg", "a.JPEG", "x/a.b.Png", "a.webp", "a.avif", "a.bmp", "a.tif"))
    assert not any(images.is_image(name) for name in (".a.jpg", "a.txt", "a", "a.pdf", "Thumbs.db", ".jpg"))
