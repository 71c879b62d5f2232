"""Image and mask pairs from a folder with ``images/`` and ``GT/``, paired by stem."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np

from prunekit.config.registry import register_dataset
from prunekit.data.datasets import MaskDataset, image_tensor, resize
from prunekit.data.images import is_image, match_orientation, read_image, read_mask
from prunekit.errors import DataError
from prunekit.utils.text import did_you_mean

HOLDOUT = 0.1
_LAYOUT = "a data folder has images/ and GT/, with one mask in GT/ of the same stem for each image"


class FolderPairs(MaskDataset):
    """Images and masks read from files on access; see :func:`folder`."""

    def __init__(self, files: dict[str, tuple[Path, Path]], skip_errors: bool, skipped: int):
        super().__init__(list(files))
        self._files, self.skip_errors, self.skipped = files, skip_errors, skipped

    def paths(self, index: int) -> tuple[Path, Path]:
        """Return the files of a pair: image, mask."""
        return self._files[self.names[index]]

    def files(self, index: int) -> tuple[Path, Path]:
        return self.paths(index)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.paths(index)[0])

    def mask(self, index: int) -> np.ndarray:
        return self.pair(index)[1]

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        photo, drawn = self.paths(index)
        image, mask = read_image(photo), read_mask(drawn)
        if mask.shape != image.shape[:2] and mask.shape == image.shape[1::-1]:
            # The mask was drawn without the EXIF orientation of the photograph.
            mask = match_orientation(mask, photo)
        if mask.shape != image.shape[:2]:
            # Bilinear keeps a graded mask graded; a binary one is thresholded at 0.5 later, where its edge belongs.
            mask = resize(image_tensor(mask), image.shape[:2])[0, 0].round().clamp(0, 255).numpy().astype(np.uint8)
        return image, mask


@register_dataset("folder")
def folder(
    split: Literal["train", "val"],
    *,
    root: str,
    val_root: str | None = None,
    val_holdout: float | None = None,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
) -> MaskDataset:
    """A folder with images/ and GT/, paired by stem, with any image formats.

    Args:
        split: ``train``, or ``val``: all of ``val_root`` if given, else the held-out share of ``root``.
        root: the folder; ``~`` is the home folder.
        val_root: another such folder, for validation.
        val_holdout: share of ``root`` held out for validation, chosen by ``seed`` from the sorted stems; 0.1 where
            neither it nor ``val_root`` is given. At least one pair goes to each split.
        seed: seed of that choice.
        on_error: ``raise``, or ``skip`` to leave out and count files without a partner and unreadable files.

    Raises:
        DataError: a folder is missing or has no or too few pairs, a file has no partner, two files have the same stem,
            or both ``val_root`` and ``val_holdout`` are given.
    """
    share = validate_keys("folder", root, val_root, val_holdout, _LAYOUT)
    skip_errors = on_error == "skip"
    if val_root is not None:
        files, skipped = _scan(Path(root if split == "train" else val_root), skip_errors)
        return FolderPairs(files, skip_errors, skipped)
    files, skipped = _scan(Path(root), skip_errors)
    if len(files) < 2:
        raise DataError(f"{Path(root)} has only one pair, so none can be held out for validation; set data.val_root")
    held_out = hold_out(len(files), share, np.random.default_rng(seed % 2**64))
    chosen = {name: pair for i, (name, pair) in enumerate(files.items()) if (i in held_out) == (split == "val")}
    # Files without a partner are counted once, with the training pairs.
    return FolderPairs(chosen, skip_errors, skipped if split == "train" else 0)


def hold_out(count: int, share: float, rng: np.random.Generator) -> set[int]:
    """Return the indices of the images to hold out: a random share of ``count``, at least one and never all."""
    return set(rng.permutation(count)[: min(max(1, round(share * count)), count - 1)].tolist())


def validate_keys(name: str, root: str | None, val_root: str | None, val_holdout: float | None, layout: str) -> float:
    """Return the share to hold out; raise DataError if the keys are inconsistent."""
    if not root:
        raise DataError(f"the data set {name} needs data.root; {layout}")
    if val_root is not None and val_holdout is not None:
        raise DataError("data.val_root and data.val_holdout are mutually exclusive; remove one of them")
    share = HOLDOUT if val_holdout is None else val_holdout
    if not 0 < share < 1:
        raise DataError(f"data.val_holdout={share}: must be a share of the images, above 0 and below 1")
    return share


def existing_folder(root: Path, layout: str) -> Path:
    """Return the folder with ``~`` expanded; raise DataError if it does not exist."""
    root = root.expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else f"does not exist{did_you_mean(root)}"
        raise DataError(f"data folder {root} {what}; {layout}")
    return root


def _scan(root: Path, skip_errors: bool) -> tuple[dict[str, tuple[Path, Path]], int]:
    """Return stem → (image, mask) sorted by stem, and the number of files without a partner."""
    root = existing_folder(root, _LAYOUT)
    images, masks = _stems(_part(root, "images")), _stems(_part(root, "GT"))
    both = sorted(images.keys() & masks.keys())
    if not both:
        raise DataError(
            f"{root} has no pair: {len(images)} images and {len(masks)} masks, but no common stem; {_LAYOUT}"
        )
    if not skip_errors:
        for found, others, what in ((images, masks, "image has no mask"), (masks, images, "mask has no image")):
            lonely = [found[stem].name for stem in sorted(found.keys() - others.keys())]
            if lonely:
                raise DataError(
                    f"{root}: {some(lonely)}: {what}; add it, or set data.on_error=skip to leave the file out"
                )
    return {stem: (images[stem], masks[stem]) for stem in both}, len(images.keys() ^ masks.keys())


def _part(root: Path, name: str) -> Path:
    """Return the subfolder of this name, ignoring case."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    exact = [entry for entry in folders if entry.name == name]
    alike = exact or [entry for entry in folders if entry.name.lower() == name.lower()]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise DataError(f"{root} has {some([entry.name for entry in alike])}, which all match {name}/; keep one")
    found = some(sorted(entry.name for entry in root.iterdir()))
    raise DataError(f"{root} has no folder {name}/ (it has: {found}); {_LAYOUT}")


def _stems(part: Path) -> dict[str, Path]:
    """Return stem → file for the images of a folder."""
    stems: dict[str, Path] = {}
    for path in sorted(part.iterdir()):
        if not is_image(path) or not path.is_file():
            continue
        # macOS stores é as two characters.
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in stems:
            raise DataError(f"{part} has {stems[stem].name} and {path.name}, which have the same stem; remove one")
        stems[stem] = path
    return stems


def some(names: list[str]) -> str:
    """Return up to three names and the number of further ones."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) if names else "nothing"
