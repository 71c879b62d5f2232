"""What data sets really hold, one pair each: files that must come out right, and files that must be named."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

DARK, BRIGHT = 40, 200
LEVELS = np.full((12, 16), DARK, np.uint8)
LEVELS[:, 8:] = BRIGHT
MASK = np.where(LEVELS == BRIGHT, np.uint8(255), np.uint8(0))
GREY = Image.fromarray(LEVELS)
RGB = GREY.convert("RGB")
HARD = Image.fromarray(MASK)


@dataclass(frozen=True)
class Quirk:
    """A pair of files, or one without the other.

    Attributes:
        write: makes them for a stem, in a folder with ``images/`` and ``GT/``.
        error: a part of what is said of them; None where they are read, as dark left and bright right, the object on
            the right.
        late: whether it is found only when the pixels are read.
        photo: whether the fault is in the photograph, so that ``predict`` meets it.
        empty: whether the mask is empty.
    """

    write: Callable[[Path, str], None]
    error: str | None = None
    late: bool = True
    photo: bool = False
    empty: bool = False


def photo(picture: Image.Image, suffix: str = ".png", **options) -> Callable[[Path, str], None]:
    """This photograph with a usual mask."""

    def write(root: Path, stem: str) -> None:
        picture.save(root / "images" / (stem + suffix), **options)
        HARD.save(root / "GT" / f"{stem}.png")

    return write


def mask(picture: Image.Image, suffix: str = ".png", **options) -> Callable[[Path, str], None]:
    """A usual photograph with this mask."""

    def write(root: Path, stem: str) -> None:
        RGB.save(root / "images" / f"{stem}.jpg", quality=95)
        picture.save(root / "GT" / (stem + suffix), **options)

    return write


def raw(part: str, suffix: str, data: bytes) -> Callable[[Path, str], None]:
    """A usual pair, but for one file of these bytes."""

    def write(root: Path, stem: str) -> None:
        mask(HARD)(root, stem)
        (root / part / f"{stem}{'.jpg' if part == 'images' else '.png'}").unlink()
        (root / part / f"{stem}{suffix}").write_bytes(data)

    return write


def alone(part: str) -> Callable[[Path, str], None]:
    def write(root: Path, stem: str) -> None:
        HARD.save(root / part / f"{stem}.png")

    return write


def folder_in_its_place(root: Path, stem: str) -> None:
    HARD.save(root / "GT" / f"{stem}.png")
    (root / "images" / f"{stem}.jpg").mkdir()


def turned(orientation: int, mask_too: bool) -> Callable[[Path, str], None]:
    """A camera that was held on its side: the pixels lie, and EXIF says how to turn them; the mask is upright, or was
    drawn on the pixels as they lie."""
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation

    def write(root: Path, stem: str) -> None:
        RGB.transpose(back).save(root / "images" / f"{stem}.jpg", exif=exif, quality=95)
        (HARD.transpose(back) if mask_too else HARD).save(root / "GT" / f"{stem}.png")

    return write


def named(stem: str, image: str, truth: str) -> Callable[[Path, str], None]:
    """A pair of another name."""

    def write(root: Path, _: str) -> None:
        RGB.save(root / "images" / (stem + image))
        HARD.save(root / "GT" / (stem + truth))

    return write


def palette(levels: np.ndarray, high: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The object is the first colour of the palette, so that numbers and levels differ."""
    picture = Image.new("P", levels.shape[::-1])
    picture.putpalette([*high, 0, 0, 0])
    picture.putdata((1 - levels // 255).ravel().tolist())
    return picture


def with_alpha(picture: Image.Image, levels: np.ndarray) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(Image.fromarray(levels))
    return picture


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


def jpeg(share: float) -> bytes:

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "jpeg")
    return buffer.getvalue()[: int(share * len(buffer.getvalue()))]


_FLOATS = (MASK / 255).astype(np.float32)
_NOT_A_NUMBER = _FLOATS.copy()
_NOT_A_NUMBER[0, 0] = np.nan
_GRADED = np.clip(MASK.astype(int) + np.where(MASK > 0, -100, 90), 0, 255).astype(np.uint8)

READ = {
    "an RGB photograph": Quirk(photo(RGB)),
    "JPEG": Quirk(photo(RGB, ".jpg", quality=95)),
    "CMYK": Quirk(photo(RGB.convert("CMYK"), ".jpg", quality=95)),
    "grey": Quirk(photo(GREY)),
    "grey of 16 bits": Quirk(photo(Image.fromarray(LEVELS.astype(np.uint16) * 257))),
    "a palette": Quirk(photo(RGB.convert("P", palette=Image.Palette.ADAPTIVE))),
    "opaque alpha": Quirk(photo(with_alpha(RGB, np.full_like(LEVELS, 255)))),
    "grey with alpha": Quirk(photo(with_alpha(GREY, np.full_like(LEVELS, 255)))),
    "upside down by EXIF": Quirk(turned(3, False)),
    "on its side by EXIF": Quirk(turned(6, False)),
    "on its other side by EXIF": Quirk(turned(8, False)),
    "on its side, and its mask too": Quirk(turned(6, True)),
    "a photograph of many frames": Quirk(photo(GREY, ".gif", save_all=True, append_images=[GREY.point(lambda v: 0)])),
    "another size than its mask's": Quirk(photo(RGB.resize((48, 36), Image.Resampling.NEAREST))),
    "a smaller photograph": Quirk(photo(RGB.resize((8, 6), Image.Resampling.NEAREST))),
    "a mask in RGB": Quirk(mask(HARD.convert("RGB"))),
    "a mask in RGB by JPEG": Quirk(mask(HARD.convert("RGB"), ".jpg", quality=90)),
    "a mask with alpha": Quirk(mask(with_alpha(HARD.convert("RGB"), LEVELS))),
    "a mask of 1 bit": Quirk(mask(HARD.convert("1"))),
    "a mask with a palette": Quirk(mask(palette(MASK))),
    "a mask of 16 bits": Quirk(mask(Image.fromarray(MASK.astype(np.uint16) * 257))),
    "a mask of 8 bits in 16": Quirk(mask(Image.fromarray(MASK.astype(np.uint16)))),
    "a graded mask": Quirk(mask(Image.fromarray(_GRADED))),
    "a mask of 0 and 1": Quirk(mask(Image.fromarray(MASK // 255))),
    "a mask in float": Quirk(mask(Image.fromarray(_FLOATS), ".tif")),
    "a mask of another size": Quirk(mask(HARD.resize((48, 36), Image.Resampling.NEAREST))),
    "an empty mask": Quirk(mask(Image.fromarray(MASK * 0)), empty=True),
    "dots in its name": Quirk(named("a.photo.v2", ".jpg", ".png")),
    "blanks in its name": Quirk(named(" my  photo ", ".png", ".png")),
    "signs in its name": Quirk(named("日本 – é (1) #%&'=", ".png", ".png")),
    "capitals in its suffix": Quirk(named("CAPITALS", ".JPEG", ".PNG")),
    "accents that are composed in one name": Quirk(
        lambda root, _: (
            RGB.save(root / "images" / "cafe\u0301.png"),
            HARD.save(root / "GT" / "caf\u00e9.png"),
        )
    ),
}
REFUSED = {
    "a photograph without mask": Quirk(alone("images"), "image has no mask", late=False),
    "a mask without photograph": Quirk(alone("GT"), "mask has no image", late=False),
    "a folder called as a photograph": Quirk(folder_in_its_place, "mask has no image", late=False),
    "an empty photograph": Quirk(raw("images", ".jpg", b""), "is empty (0 bytes)", photo=True),
    "an empty file for a mask": Quirk(raw("GT", ".png", b""), "is empty (0 bytes)"),
    "a photograph that is cut off": Quirk(raw("images", ".jpg", jpeg(0.5)), "cannot be read as an image", photo=True),
    "a text": Quirk(raw("images", ".png", b"<html>404</html>"), "cannot be read as an image", photo=True),
    "PostScript": Quirk(raw("images", ".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be read as an image", photo=True),
    "a bomb": Quirk(raw("images", ".png", bomb(60_000)), "too large to decode safely", photo=True),
    "a mask that is a bomb": Quirk(raw("GT", ".png", bomb(60_000)), "too large to decode safely"),
    "a mask in colours": Quirk(mask(palette(MASK, (128, 0, 0))), "is in color"),
    "a mask of several classes": Quirk(mask(Image.fromarray(MASK // 36)), "class indices"),
    "a mask of many levels": Quirk(
        mask(Image.fromarray(MASK.astype(np.int32) * 10_000), ".tif"), "has levels from 0 to 2.55e+06"
    ),
    "a mask below nothing": Quirk(mask(Image.fromarray(_FLOATS - 1), ".tif"), "has levels from -1 to"),
    "a mask of no numbers": Quirk(mask(Image.fromarray(_NOT_A_NUMBER), ".tif"), "has levels from nan"),
}
QUIRKS = {**READ, **REFUSED}


def stem_of(kind: str) -> str:
    return kind.replace(" ", "-")


def make(root: Path, kinds: list[str], good: int = 0) -> Path:
    """A folder of pairs with these quirks, and so many with none."""
    for part in ("images", "GT"):
        (root / part).mkdir(parents=True)
    for number in range(good):
        photo(RGB)(root, f"good{number}")
    for kind in kinds:
        QUIRKS[kind].write(root, stem_of(kind))
    return root
