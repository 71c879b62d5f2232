"""Reading images and masks, and writing maps, with Pillow: whatever the mode, whatever is wrong with the file."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from prunekit.errors import CheckpointError, DataError, WriteError
from prunekit.utils.io import write_atomic

# Pillow knows more, but some of those are drawn by another program (EPS by Ghostscript, whatever the file is called).
_FORMS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
# Some decoders read the whole file first; 16 bits of three colours of the most pixels take half of this.
LARGEST_FILE = 1 << 30
# A progressive JPEG is drawn anew at each of its scans, and a scan takes a few bytes; cameras and tools make about ten.
MOST_SCANS = 100
# JPEG leaves masks that were grey with a little colour.
MOST_COLOUR = 96
# Higher ones are the noise around the edges of a graded mask, or a very faint one.
MOST_CLASSES = 20
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


@cache
def _suffixes() -> frozenset[str]:
    return frozenset(s for s, form in Image.registered_extensions().items() if form in _forms())


@cache
def _forms() -> tuple[str, ...]:
    """Those that this build of Pillow reads."""
    Image.init()
    return tuple(form for form in _FORMS if form in Image.OPEN)


def is_image(path: str | Path) -> bool:
    """Whether the name ends as that of an image that Pillow opens (.jpg, .PNG, .avif …); hidden files are none."""
    path = Path(path)
    return not path.name.startswith(".") and path.suffix.lower() in _suffixes()


def read_image(path: str | Path) -> np.ndarray:
    """One photograph as RGB: uint8 [H, W, 3].

    Grey, palette, CMYK and 16-bit files are converted; what is transparent lies on black; the orientation that the
    camera noted (EXIF) is applied.

    Raises:
        DataError: the file is missing, empty, cut off, too large to be safe, or no image.
    """
    with _named(path):
        picture = _open(path)
        if picture.mode in _DEEP:
            return np.repeat(_eight_bits(picture, path)[..., None], 3, axis=-1)
        if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
        return np.array(picture.convert("RGB"))


def read_mask(path: str | Path) -> np.ndarray:
    """One mask as grey levels: uint8 [H, W], 0 for background to 255 for object, whatever its mode.

    1-bit, palette, RGB, 16-bit and graded masks come out on the same scale; alpha is ignored. A mask whose levels
    are only 0 and 1 is read as 0 and 255.

    Raises:
        DataError: as for :func:`read_image`; or it is in colours, or its levels are numbers of several classes, of
            which none can be called the object.
    """
    with _named(path):
        picture = _open(path)
        if picture.mode in _DEEP:
            levels = _eight_bits(picture, path)
        elif picture.mode in ("1", "L"):
            levels = np.array(picture.convert("L"))
        else:
            colours = picture.convert("RGB")
            planes = np.array(colours)
            spread = int((planes.max(-1).astype(np.int16) - planes.min(-1)).max(initial=0))
            if spread > MOST_COLOUR:
                raise DataError(
                    f"{path} is in colours (channels up to {spread} levels apart); a mask is grey, 0 for background "
                    "to 255 for object; convert it"
                )
            levels = np.array(colours.convert("L"))
        highest = int(levels.max(initial=0))
        if 1 < highest <= MOST_CLASSES:
            raise DataError(
                f"{path} has levels up to {highest}, numbers of classes it seems; a mask is 0 for background and 255 "
                "(or 1) for object; convert it"
            )
        # Some tools write the class number itself; as a grey level it would be an empty mask.
        return levels * np.uint8(255) if highest == 1 else levels


def match_orientation(levels: np.ndarray, photo: str | Path) -> np.ndarray:
    """Turn an array [H, W] as the photograph's EXIF orientation turns the photograph itself.

    Raises:
        DataError: the photograph cannot be read.
    """
    try:
        with Image.open(photo, formats=_forms()) as picture:
            exif = picture.getexif()
    except Exception as error:
        raise DataError(f"{photo} cannot be read as an image ({_one_line(error)}); copy it again") from error
    picture = Image.fromarray(levels)
    picture.getexif()[ExifTags.Base.Orientation] = exif.get(ExifTags.Base.Orientation, 1)
    return np.array(ImageOps.exif_transpose(picture))


def write_map(path: str | Path, levels: np.ndarray) -> None:
    """Write uint8 [H, W] as a grey image, its form by the suffix, whole or not at all.

    Raises:
        DataError: the file cannot be written, or the suffix names no form.
        WriteError: a disk is full or fails.
    """
    path, buffer = Path(path), io.BytesIO()
    try:
        form = Image.registered_extensions().get(path.suffix.lower())
        if form is None:
            raise ValueError(f"{path.suffix or 'no suffix'} names no form of image")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}")
        Image.fromarray(levels).save(buffer, form)
        write_atomic(path, buffer.getvalue())
    except WriteError:
        raise
    except (OSError, ValueError, CheckpointError) as error:
        raise DataError(
            f"cannot write {path} ({_one_line(error)}); choose another folder or the suffix .png"
        ) from error


def encode_png(levels: np.ndarray) -> bytes:
    """Uint8 [H, W] or [H, W, 3] as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "png")
    return buffer.getvalue()


def _open(path: str | Path) -> Image.Image:
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes); copy it again, or remove it together with its partner")
    if size > LARGEST_FILE:
        raise DataError(f"{path} is too large to be read safely ({size:,} bytes); make it smaller")
    with Image.open(path, formats=_forms()) as picture:
        if 0 in picture.size:
            raise DataError(f"{path} has no pixels; remove it together with its partner")
        if picture.format in ("JPEG", "MPO") and path.read_bytes().count(b"\xff\xda") > MOST_SCANS:
            raise DataError(f"{path} has more than {MOST_SCANS} scans, too many to be read safely; save it anew")
        picture.load()
        return ImageOps.exif_transpose(picture)


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Whatever Pillow raises, as an error with the file's name; its conversions of a damaged file raise, too."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a bomb up to twice its limit; for us both are the same.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Palettes with transparency in bytes, odd EXIF: no fault of the pixels.
            warnings.simplefilter("ignore", UserWarning)
            yield
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is too large to be read safely ({_one_line(error)}); make it smaller") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read; change its permissions") from error
    except MemoryError as error:
        raise DataError(f"{path} takes more memory than there is; make it smaller") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file.
        raise DataError(
            f"{path} cannot be read as an image ({_one_line(error)}); copy it again, or remove it with its partner"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _eight_bits(picture: Image.Image, path: str | Path) -> np.ndarray:
    """Grey of more than 8 bits → uint8 [H, W]: its levels end at 65535, or at 255 (float: 1) where none is above.

    Raises:
        DataError: a level is below 0, above 65535, or no number.
    """
    levels = np.array(picture).astype(np.float64)
    lowest, highest = levels.min(initial=0), levels.max(initial=0)
    if not (lowest >= 0 and highest <= 65535):
        raise DataError(
            f"{path} has levels from {lowest:g} to {highest:g}, and grey goes from 0 to 65535 (255, 1); convert it"
        )
    # A file of 16 bits that holds 0 and 255 was meant so: read as 16 bits it would be black.
    top = 255.0 if highest <= 255 else 65535.0
    if picture.mode == "F" and highest <= 1:
        top = 1.0
    return np.clip(np.rint(levels * (255 / top)), 0, 255).astype(np.uint8)
