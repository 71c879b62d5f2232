"""One run of a sweep: in a process of its own, continued where an earlier one was stopped."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunekit.errors import PrunekitError, RunFolderError
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.folders import copy_run, is_run_folder
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES
from prunekit.sweep.tasks import Task
from prunekit.utils.io import make_folder, sha256, write_atomic

LOGS = "logs"
_PREFIX = "prunekit: "  # of an error
_POLL_SECONDS = 0.2
_LOCK_SECONDS = 60.0  # an orphaned process needs to save its checkpoint
_STOP_SECONDS = 60.0
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)
_LIBC = ctypes.CDLL(None)  # loaded before a fork


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "complete", "failed" or "interrupted"; with its error if it failed."""

    status: str
    message: str = ""


def is_done(sweep: Path, task: Task) -> bool:
    """Return whether a run has ended where it was to end."""
    folder = sweep / task.folder
    if task.until is not None:
        return _done_mark(folder).is_file()
    with contextlib.suppress(PrunekitError):
        run = RunDir.open(folder)
        # A run of another recipe is not repeated, but reported by prunekit run.
        return run.done == list(STAGES) and sha256(run.read_bytes(RECIPE)) == task.digest
    return False


def log_path(sweep: Path, task: Task) -> Path:
    """Return the file with what a run prints."""
    return sweep / LOGS / f"{task.folder.replace('/', '-')}.log"


def run_task(
    sweep: Path, recipe: str, task: Task, threads: int, stop: threading.Event | None = None, cwd: str | None = None
) -> Outcome:
    """Run ``prunekit run`` on one task until it ends or ``stop`` is set; a run that is there already continues.

    Args:
        sweep: folder of the sweep.
        recipe: as on the command line.
        task: it starts anew where its parent, if any, has failed.
        threads: of the process.
        stop: set from another thread; the run saves a checkpoint and ends.
        cwd: the folder to which paths in the recipe and its overrides are relative; None: the current one.
    """
    stop = stop or threading.Event()
    folder = sweep / task.folder
    if is_done(sweep, task):
        return Outcome("complete")
    if task.parent is not None and not is_run_folder(folder) and _done_mark(sweep / task.parent).is_file():
        copy_run(sweep / task.parent, folder)
    _wait_until_unlocked(folder)
    until = [] if task.until is None else ["--until", task.until]
    command = ["run", recipe, *task.overrides, "--out", str(folder), "--resume", *until]
    log = log_path(sweep, task)
    make_folder(log.parent)
    printed = log.stat().st_size if log.exists() else 0
    status = _run(command, log, threads, stop, cwd)
    if status == 0:
        if task.until is not None:
            write_atomic(_done_mark(folder), b"")
        return Outcome("complete")
    return (
        Outcome("interrupted") if stop.is_set() else Outcome("failed", _error(log, printed) or f"exit status {status}")
    )


def _wait_until_unlocked(folder: Path) -> None:
    """Wait for a process of an earlier sweep that is still saving."""
    end = time.monotonic() + _LOCK_SECONDS
    while is_run_folder(folder):
        try:
            RunDir.open(folder, write=True).close()
            return
        except RunFolderError:
            if time.monotonic() > end:
                return  # the run itself reports it
            time.sleep(_POLL_SECONDS)
        except PrunekitError:
            return


def _run(command: Sequence[str], log: Path, threads: int, stop: threading.Event, cwd: str | None) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prunekit.cli", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then stops its runs
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None:
                if stop.wait(_POLL_SECONDS):
                    break
        finally:
            _stop(process)
        return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a run save a checkpoint and end; kill one that does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when the sweep is killed."""
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _done_mark(folder: Path) -> Path:
    """Return the file beside the folder of a shared run that says that it has reached its stop."""
    return folder.with_name(f"{folder.name}.done")


def _error(log: Path, start: int) -> str:
    """Return the error that was printed after ``start``."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return next((line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)), "")
