"""Labelled images from a folder laid out as the field does it: a folder of images for each class."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from prunekit.config.registry import register_dataset
from prunekit.data.datasets import LabelDataset
from prunekit.data.images import is_image, read_image
from prunekit.data.mask_folder import checked, existing, some
from prunekit.errors import DataError

_LAYOUT = "a data folder holds a folder of images for each class, ROOT/CLASS/*.png"


class FolderImages(LabelDataset):
    """Images read from files when asked for, their class that of their folder; see :func:`image_folder`."""

    def __init__(self, files: dict[str, list[Path]], classes: Sequence[str], tolerant: bool, skipped: int):
        self._files = {f"{name}/{path.name}": (path, name) for name in files for path in files[name]}
        super().__init__(list(self._files), classes)
        self.tolerant, self.skipped = tolerant, skipped

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
    """A folder that holds a folder of images for each class; labels follow the sorted names of the classes.

    Args:
        split: ``train``, or ``val``: all of ``val_root`` where it is given, else the held-out share of ``root``.
        root: the folder; ``~`` is the home folder.
        val_root: another such folder, for validation; it may lack classes, but has no others.
        val_holdout: share of each class of ``root`` held out for validation, chosen by ``seed`` from its sorted names;
            0.1 where neither it nor ``val_root`` is given. At least one image of each class goes to each side.
        seed: of that choice.
        on_error: ``raise``, or ``skip`` to leave out and count what cannot be used: an image that lies beside the
            classes' folders now, a file that cannot be read once it is read. (A folder without images is no class
            then.)

    Raises:
        DataError: a folder is missing, a class has no image or too few to hold any out, an image lies in no class,
            ``val_root`` has a class that ``root`` has not, or both ``val_root`` and ``val_holdout`` are given.
    """
    share = checked("image_folder", root, val_root, val_holdout, _LAYOUT)
    tolerant = on_error == "skip"
    files, skipped = _scan(Path(root), tolerant)
    classes = list(files)
    if val_root is not None:
        return (
            FolderImages(files, classes, tolerant, skipped)
            if split == "train"
            else _known(Path(val_root), tolerant, classes, f"{root} has not; add it there, or remove it here")
        )
    chosen = {}
    for label, (name, paths) in enumerate(files.items()):
        if len(paths) < 2:
            raise DataError(
                f"{Path(root)}: class {name} has one image, of which none can be held out; add some, or give "
                "data.val_root"
            )
        count = min(max(1, round(share * len(paths))), len(paths) - 1)
        # A generator for each class: an image more in one leaves the choice from the others as it was.
        held = set(np.random.default_rng([seed % 2**64, label]).permutation(len(paths))[:count].tolist())
        chosen[name] = [path for place, path in enumerate(paths) if (place in held) == (split == "val")]
    # What lies in no class is counted once, with the training images.
    return FolderImages(chosen, classes, tolerant, skipped if split == "train" else 0)


def read_all(root: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> LabelDataset:
    """All images of a folder, labelled by the places of their classes in ``classes``.

    Raises:
        DataError: as for :func:`image_folder`, or the folder has a class that is not among ``classes``.
    """
    return _known(
        Path(root), on_error == "skip", classes, f"the model has not learned (it knows {some(list(classes))})"
    )


def _known(root: Path, tolerant: bool, classes: Sequence[str], otherwise: str) -> FolderImages:
    files, skipped = _scan(root, tolerant)
    others = [name for name in files if name not in classes]
    if others:
        word = "class" if len(others) == 1 else "classes"
        raise DataError(f"{root} has the {word} {some(others)}, which {otherwise}")
    return FolderImages(files, classes, tolerant, skipped)


def _scan(root: Path, tolerant: bool) -> tuple[dict[str, list[Path]], int]:
    """Class → its files, both in the order of their names; and how many images lie in no class."""
    root = existing(root, _LAYOUT)
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    astray = [entry.name for entry in entries if entry.is_file() and is_image(entry)]
    if astray and not tolerant:
        raise DataError(
            f"{root}: {some(astray)}: image in no class; move it, or set data.on_error=skip to leave it out"
        )
    found: dict[str, list[Path]] = {}
    for folder in entries:
        if folder.is_dir():
            # macOS stores é as e + accent, others as one sign: the same name to a reader.
            name = unicodedata.normalize("NFC", folder.name)
            found.setdefault(name, []).extend(sorted(p for p in folder.iterdir() if p.is_file() and is_image(p)))
    files = {name: found[name] for name in sorted(found) if found[name]}
    empty = sorted(found.keys() - files.keys())
    if not files or (empty and not tolerant):
        which = f"no image in {some(empty)}" if empty else "no folder of images"
        mend = "; remove what is no class, or set data.on_error=skip to leave it out" if files else ""
        raise DataError(f"{root} has {which}{mend}; {_LAYOUT}")
    return files, len(astray)
