"""Removal of the files that a run has written; what the user keeps in the same folders stays."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from prunekit.utils.io import TEMP_PREFIX
from prunekit.utils.symlinks import leads_out

_TEMPORARY = rf"{re.escape(TEMP_PREFIX)}\d+-[0-9a-f]+"
_FOLDERS = "init dense baseline extract slim finetuned checkpoints gallery exports report tensorboard".split()
# What a run writes, by relative path, recorded in state.json or not.
_WRITTEN = re.compile(
    r"(summary|environment|state|classes|layers|curves|eval|bench|data)\.json|recipe\.yaml"
    r"|lock|run\.log|metrics\.jsonl|gates\.npz|model\.onnx"
    r"|(init|dense|baseline|extract|slim|finetuned)/(plan\.json|model\.safetensors)"
    r"|checkpoints/(train|baseline|step\d+|finetune)-\d+\.(json|safetensors)"
    r"|gallery/(index\.json|\d{4,}-\w+\.png)"
    r"|exports/((baseline|dense|slim|finetuned)(-plain|-image|-int8)*\.(onnx|xml|bin|pt2)|csnet\.(bin|pth\.tar))"
    r"|report/(index\.html|([^/]*-)?epochs\.csv)"
    r"|tensorboard/(.*/)?(events\.out\.tfevents\.[^/]*|hparams\.yml)"
    rf"|(.*/)?{_TEMPORARY}"
)
# The report writes figures and tables in these forms, and at least so many of them; what has fewer is the user's.
_REPORT_FORMS = ((2, {".png", ".svg", ".pdf"}), (4, {".csv", ".json", ".md", ".tex"}))


def temporary_files(folder: Path) -> list[Path]:
    """Return the files that killed atomic writes have left."""
    return [path for path in _files(folder) if re.fullmatch(_TEMPORARY, path.name)]


def remove_written(
    folder: Path, recorded: Collection[str], only: Collection[str] | None = None, keep: Collection[str] = ()
) -> None:
    """Remove what a run has written, links out of the folder, and folders that are empty then.

    Args:
        folder: of the run.
        recorded: relative paths of the files with a recorded checksum.
        only: names directly in ``folder`` to which this is limited.
        keep: relative paths of files that stay.

    Raises:
        OSError: something cannot be removed.
    """
    report = _report_files(folder / "report")
    for path in list(_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name in keep or (only is not None and name.partition("/")[0] not in only):
            continue
        is_link_out = path.is_symlink() and leads_out(path, folder)
        if is_link_out or path in report or name in recorded or name in _FOLDERS or _WRITTEN.fullmatch(name):
            path.unlink()
    for name in _FOLDERS if only is None else only:
        for parent, *_ in os.walk(folder / name, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(parent)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files and links in a run folder and in the folders that a run makes."""
    for entry in folder.iterdir():
        if entry.is_symlink() or not entry.is_dir():
            yield entry
        elif entry.name in _FOLDERS:
            for parent, folders, files in os.walk(entry):
                paths = [Path(parent, name) for name in (*folders, *files)]
                yield from (path for path in paths if path.is_symlink() or not path.is_dir())


def _report_files(folder: Path) -> set[Path]:
    found: dict[Path, set[str]] = defaultdict(set)
    for path in folder.glob("*"):
        found[path.with_suffix("")].add(path.suffix)
    return {
        stem.with_name(stem.name + suffix)
        for stem, suffixes in found.items()
        for least, forms in _REPORT_FORMS
        if len(suffixes & forms) >= least
        for suffix in suffixes & forms
    }
