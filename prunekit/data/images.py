"""Reads images and masks and writes maps with Pillow; every invalid file raises a DataError that names it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from prunekit.errors import CheckpointError, DataError, WriteError
from prunekit.utils.io import write_atomic
from prunekit.utils.text import one_line

# Pillow reads more formats, but some run another program (EPS: Ghostscript), whatever the file is called.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
# Some decoders read the whole file first. The largest image allowed takes half of this with three 16-bit channels.
MAX_FILE_BYTES = 1 << 30
# A progressive JPEG is decoded once per scan, and a scan takes a few bytes; cameras and tools write about ten.
MAX_JPEG_SCANS = 100
# Gray masks stored as JPEG get a little color.
MAX_CHANNEL_SPREAD = 96
# Lossy formats vary a constant color.
MAX_CONSTANT_SPREAD = 16
# Masks with higher levels are graded, not class indices.
MAX_CLASS_INDEX = 20
_MORE_THAN_8_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


@cache
def _suffixes() -> frozenset[str]:
    return frozenset(s for s, form in Image.registered_extensions().items() if form in _formats())


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow reads."""
    Image.init()
    return tuple(form for form in _FORMATS if form in Image.OPEN)


def is_image(path: str | Path) -> bool:
    """Return whether the suffix is that of a readable image format (.jpg, .PNG, .avif …); false for hidden files."""
    path = Path(path)
    return not path.name.startswith(".") and path.suffix.lower() in _suffixes()


def read_image(path: str | Path) -> np.ndarray:
    """Read a photograph as RGB: uint8 [H, W, 3].

    Gray, palette, CMYK and 16-bit files are converted, transparent pixels are blended with black, and the EXIF
    orientation is applied.

    Raises:
        DataError: the file is missing, empty, truncated, too large to decode safely, or not an image.
    """
    with _data_errors(path):
        return _to_rgb(_open(path), path)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Read a photograph from the bytes of its file; as :func:`read_image`, with ``name`` for the file in messages."""
    with _data_errors(name):
        try:
            return _to_rgb(_open(name, data), name)
        except UnidentifiedImageError as error:
            # Pillow's message names the object that holds the bytes.
            raise DataError(f"{name} is not an image that can be read; use another format, such as PNG") from error


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask of any mode as gray levels: uint8 [H, W], 0 (background) to 255 (object).

    1-bit, palette, RGB, 16-bit and graded masks are converted to this scale. The mask is in the colors, or, where those
    do not vary, in alpha. Levels of only 0 and 1 become 0 and 255.

    Raises:
        DataError: as :func:`read_image`; or the mask is in color, its levels are class indices, or colors and alpha
            contradict each other.
    """
    with _data_errors(path):
        picture = _open(path)
        if picture.mode in _MORE_THAN_8_BITS:
            levels = _to_8_bits(picture, path)
        elif picture.has_transparency_data and (alpha := _mask_in_alpha(picture, path)) is not None:
            levels = alpha
        elif picture.mode in ("1", "L"):
            levels = np.array(picture.convert("L"))
        else:
            rgb = picture.convert("RGB")
            planes = np.array(rgb)
            spread = int((planes.max(-1).astype(np.int16) - planes.min(-1)).max(initial=0))
            if spread > MAX_CHANNEL_SPREAD:
                raise DataError(
                    f"{path} is in color (channels differ by up to {spread} levels), but a mask must be gray, 0 for "
                    "background to 255 for object; convert it"
                )
            levels = np.array(rgb.convert("L"))
        highest = int(levels.max(initial=0))
        if 1 < highest <= MAX_CLASS_INDEX:
            raise DataError(
                f"{path} has levels up to {highest}, probably class indices, but a mask must be 0 for background and "
                "255 (or 1) for object; convert it"
            )
        # Some tools write the class index 1, which would be an empty mask as a gray level.
        return levels * np.uint8(255) if highest == 1 else levels


def _mask_in_alpha(picture: Image.Image, path: str | Path) -> np.ndarray | None:
    """Return alpha if it varies and the colors do not; None if the mask is in the colors."""
    pixels = np.array(_to_rgba(picture))
    colors, alpha = pixels[..., :3], pixels[..., 3]
    visible = colors[alpha > 0]
    if np.ptp(alpha) == 0 or np.ptp(visible, axis=0).max() > MAX_CONSTANT_SPREAD:
        return None
    if np.ptp(colors, axis=(0, 1)).max() <= MAX_CONSTANT_SPREAD:
        return alpha
    # Only the colors of transparent pixels differ: usually leftovers.
    if not np.array_equal(colors.mean(-1) >= 127.5, alpha >= 127.5):
        raise DataError(
            f"{path}: its colors and its transparency show different masks; save it without alpha, gray, 0 for "
            "background to 255 for object"
        )
    return None


def _to_rgb(picture: Image.Image, path: str | Path) -> np.ndarray:
    if picture.mode in _MORE_THAN_8_BITS:
        return np.repeat(_to_8_bits(picture, path)[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        picture = _to_rgba(picture)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.array(picture.convert("RGB"))


def _to_rgba(picture: Image.Image) -> Image.Image:
    # Pillow converts premultiplied gray to gray with alpha only.
    return (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")


def match_orientation(levels: np.ndarray, photo: str | Path) -> np.ndarray:
    """Apply the EXIF orientation of a photograph to an array [H, W].

    Raises:
        DataError: the photograph cannot be read.
    """
    try:
        with Image.open(photo, formats=_formats()) as picture:
            exif = picture.getexif()
    except Exception as error:
        raise DataError(f"{photo} cannot be read as an image ({one_line(error)}); copy it again") from error
    picture = Image.fromarray(levels)
    picture.getexif()[ExifTags.Base.Orientation] = exif.get(ExifTags.Base.Orientation, 1)
    return np.array(ImageOps.exif_transpose(picture))


def write_image(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W] (gray), [H, W, 3] (RGB) or [H, W, 4] (RGBA) atomically, in the format of the suffix.

    Raises:
        DataError: the file cannot be written, or the suffix is not that of an image format.
        WriteError: the disk is full or fails.
    """
    path, buffer = Path(path), io.BytesIO()
    try:
        form = Image.registered_extensions().get(path.suffix.lower())
        if form is None:
            raise ValueError(f"{path.suffix or 'no suffix'} is not an image format")
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist")
        # A PNG at level 1 takes half the time of the default and is as large.
        Image.fromarray(pixels).save(buffer, form, compress_level=1)
        write_atomic(path, buffer.getvalue())
    except WriteError:
        raise
    except (OSError, ValueError, CheckpointError) as error:
        raise DataError(f"cannot write {path} ({one_line(error)}); use another folder or the suffix .png") from error


def encode_png(levels: np.ndarray) -> bytes:
    """Encode uint8 [H, W] or [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "png")
    return buffer.getvalue()


def _open(path: str | Path, data: bytes | None = None) -> Image.Image:
    """Decode a file, or its bytes where they are known; the path is for messages then."""
    size = Path(path).stat().st_size if data is None else len(data)
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes); copy it again, or remove it with its partner")
    if size > MAX_FILE_BYTES:
        raise DataError(f"{path} is too large to decode safely ({size:,} bytes); make it smaller")
    with Image.open(path if data is None else io.BytesIO(data), formats=_formats()) as picture:
        if 0 in picture.size:
            raise DataError(f"{path} has no pixels; remove it with its partner")
        if picture.format in ("JPEG", "MPO"):
            scans = (Path(path).read_bytes() if data is None else data).count(b"\xff\xda")
            if scans > MAX_JPEG_SCANS:
                raise DataError(
                    f"{path} has more than {MAX_JPEG_SCANS} scans, too many to decode safely; save it again"
                )
        picture.load()
        return ImageOps.exif_transpose(picture)


@contextlib.contextmanager
def _data_errors(path: str | Path) -> Iterator[None]:
    """Raise every error of Pillow as a DataError that names the file."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns of decompression bombs up to twice its limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Palettes with transparency in bytes, invalid EXIF: the pixels are valid.
            warnings.simplefilter("ignore", UserWarning)
            yield
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is too large to decode safely ({one_line(error)}); make it smaller") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: permission denied; change its permissions") from error
    except MemoryError as error:
        raise DataError(f"{path} needs more memory than is available; make it smaller") from error
    except Exception as error:  # Decoders raise almost anything on damaged files.
        raise DataError(
            f"{path} cannot be read as an image ({one_line(error)}); copy it again, or remove it with its partner"
        ) from error


def _to_8_bits(picture: Image.Image, path: str | Path) -> np.ndarray:
    """Scale gray levels of more than 8 bits to uint8 [H, W]; the maximum is 65535, or 255 (float: 1) if none is above.

    Raises:
        DataError: a level is below 0, above 65535, or NaN.
    """
    levels = np.array(picture).astype(np.float64)
    lowest, highest = levels.min(initial=0), levels.max(initial=0)
    if not (lowest >= 0 and highest <= 65535):
        raise DataError(
            f"{path} has levels from {lowest:g} to {highest:g}, but gray levels must be 0 to 65535 (255, 1); convert it"
        )
    # A 16-bit file with levels 0 and 255 would be almost black on the 16-bit scale.
    top = 255.0 if highest <= 255 else 65535.0
    if picture.mode == "F" and highest <= 1:
        top = 1.0
    return np.clip(np.rint(levels * (255 / top)), 0, 255).astype(np.uint8)
