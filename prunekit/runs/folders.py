"""Folders that are, or may become, run folders."""

from __future__ import annotations

import shutil
from pathlib import Path

from prunekit.errors import RunFolderError
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.state import STATE, SUMMARY
from prunekit.utils.io import TEMP_PREFIX, is_disk_failure, make_folder, os_error_reason, write_error

# What a killed start can leave; recipe.yaml is written last, so without it nothing of value is there.
_START_FILES = {"lock", STATE, "environment.json", SUMMARY}
# Of a run that is copied: what is about the original alone.
_NOT_COPIED = shutil.ignore_patterns("lock", "run.log", f"{TEMP_PREFIX}*")


def is_run_folder(path: Path) -> bool:
    """Return whether prunekit made this folder; a recipe alone does not tell."""
    return (path / RECIPE).is_file() and ((path / STATE).is_file() or (path / SUMMARY).is_file())


def check_usable(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise RunFolderError where a folder, which need not exist yet, cannot become or be that of a run."""
    if resume and overwrite:
        raise RunFolderError("--resume and --overwrite exclude each other; give one of them")
    if path.exists():
        make_usable(path)


def make_usable(path: Path) -> None:
    """Create the folder where it is missing; raise RunFolderError where it holds something other than a run."""
    try:
        make_folder(path)
        is_foreign = not is_run_folder(path) and any(
            e.name not in _START_FILES and not e.name.startswith(TEMP_PREFIX) for e in path.iterdir()
        )
    except OSError as error:
        if is_disk_failure(error):
            raise write_error(error, path, "use") from error
        raise RunFolderError(
            f"cannot use {path} as a run folder: {os_error_reason(error)}; choose another --out DIR"
        ) from error
    if is_foreign and not (path / RECIPE).exists() and (path / STATE).is_file() and (path / SUMMARY).is_file():
        raise RunFolderError(
            f"{path / RECIPE} is missing, and the run cannot continue without it; put a copy of it back, or "
            "choose another --out DIR"
        )
    if is_foreign:
        raise RunFolderError(f"{path} holds files but no run, so nothing is written there; choose another --out DIR")


def copy_run(source: Path, target: Path) -> None:
    """Copy a run folder to a path that does not exist; a kill leaves no half copy. WriteError if that fails."""
    partial = target.with_name(f"{TEMP_PREFIX}{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(target.parent)
        shutil.copytree(source, partial, ignore=_NOT_COPIED)
        partial.rename(target)
    except OSError as error:
        raise write_error(error, target, f"copy {source.name} to") from error
