"""Labeled images from a folder with one subfolder per class."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from prunekit.config.registry import register_dataset
from prunekit.data.datasets import LabelDataset
from prunekit.data.images import is_image, read_image
from prunekit.data.mask_folder import existing_folder, hold_out, some, validate_keys
from prunekit.errors import DataError

_LAYOUT = "a data folder has a folder of images per class, ROOT/CLASS/*.png"


class FolderImages(LabelDataset):
    """Images read from files on access, labeled by their folder; see :func:`image_folder`."""

    def __init__(self, files: dict[str, list[Path]], classes: Sequence[str], skip_errors: bool, skipped: int):
        self._files = {f"{name}/{path.name}": (path, name) for name in files for path in files[name]}
        super().__init__(list(self._files), classes)
        self.skip_errors, self.skipped = skip_errors, skipped

    def files(self, index: int) -> tuple[Path]:
        return (self._files[self.names[index]][0],)

    def image(self, index: int) -> np.ndarray:
        return read_image(self._files[self.names[index]][0])

    def label(self, index: int) -> int:
        return self.classes.index(self._files[self.names[index]][1])


@register_dataset("image_folder")
def image_folder(
    split: Literal["train", "val"],
    *,
    root: str,
    val_root: str | None = None,
    val_holdout: float | None = None,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
) -> LabelDataset:
    """A folder with a folder of images per class; labels follow the sorted class names.

    Args:
        split: ``train``, or ``val``: all of ``val_root`` if given, else the held-out share of ``root``.
        root: the folder; ``~`` is the home folder.
        val_root: another such folder for validation; its classes must be among those of ``root``.
        val_holdout: share of each class of ``root`` held out for validation, chosen by ``seed`` from its sorted names;
            0.1 where neither it nor ``val_root`` is given. At least one image of each class goes to each split.
        seed: seed of that choice.
        on_error: ``raise``, or ``skip`` to leave out and count images outside of class folders and unreadable files,
            and to ignore folders without images.

    Raises:
        DataError: a folder is missing, a class has no or too few images, an image is in no class folder, ``val_root``
            has an unknown class, or both ``val_root`` and ``val_holdout`` are given.
    """
    share = validate_keys("image_folder", root, val_root, val_holdout, _LAYOUT)
    skip_errors = on_error == "skip"
    files, skipped = _scan(Path(root), skip_errors)
    classes = list(files)
    if val_root is not None:
        return (
            FolderImages(files, classes, skip_errors, skipped)
            if split == "train"
            else _known(Path(val_root), skip_errors, classes, f"{root} does not have; add it there, or remove it here")
        )
    chosen = {}
    for label, (name, paths) in enumerate(files.items()):
        if len(paths) < 2:
            raise DataError(
                f"{Path(root)}: class {name} has only one image, so none can be held out for validation; add images, "
                "or set data.val_root"
            )
        # One generator per class, so that a new image in one class does not change the split of the others.
        held_out = hold_out(len(paths), share, np.random.default_rng([seed % 2**64, label]))
        chosen[name] = [path for i, path in enumerate(paths) if (i in held_out) == (split == "val")]
    # Images outside of class folders are counted once, with the training images.
    return FolderImages(chosen, classes, skip_errors, skipped if split == "train" else 0)


def read_all(root: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> LabelDataset:
    """Return all images of a folder, labeled by the index of their class in ``classes``.

    Raises:
        DataError: as :func:`image_folder`, or the folder has a class that is not in ``classes``.
    """
    return _known(Path(root), on_error == "skip", classes, f"the model does not know (it knows {some(list(classes))})")


def _known(root: Path, skip_errors: bool, classes: Sequence[str], otherwise: str) -> FolderImages:
    files, skipped = _scan(root, skip_errors)
    others = [name for name in files if name not in classes]
    if others:
        word = "class" if len(others) == 1 else "classes"
        raise DataError(f"{root} has the {word} {some(others)}, which {otherwise}")
    return FolderImages(files, classes, skip_errors, skipped)


def _scan(root: Path, skip_errors: bool) -> tuple[dict[str, list[Path]], int]:
    """Return class → files, both sorted by name, and the number of images outside of class folders."""
    root = existing_folder(root, _LAYOUT)
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    astray = [entry.name for entry in entries if entry.is_file() and is_image(entry)]
    if astray and not skip_errors:
        raise DataError(
            f"{root}: {some(astray)}: image outside of a class folder; move it, or set data.on_error=skip to skip it"
        )
    found: dict[str, list[Path]] = {}
    for folder in entries:
        if folder.is_dir():
            # macOS stores é as two characters.
            name = unicodedata.normalize("NFC", folder.name)
            found.setdefault(name, []).extend(sorted(p for p in folder.iterdir() if p.is_file() and is_image(p)))
    files = {name: found[name] for name in sorted(found) if found[name]}
    empty = sorted(found.keys() - files.keys())
    if not files or (empty and not skip_errors):
        which = f"no image in {some(empty)}" if empty else "no folder of images"
        fix = "; remove empty folders, or set data.on_error=skip to ignore them" if files else ""
        raise DataError(f"{root} has {which}{fix}; {_LAYOUT}")
    return files, len(astray)
