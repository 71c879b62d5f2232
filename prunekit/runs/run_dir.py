"""The run folder: all that a run leaves behind, written so that a kill at any moment leaves something to go on from.

Its files are in :mod:`prunekit.runs.artifacts`, its training states in :mod:`prunekit.runs.checkpoints`; here are its life and its
stages.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shutil
import socket
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from prunekit import __version__
from prunekit.config.schema import is_same_run
from prunekit.config.yaml import parse
from prunekit.errors import CheckpointError, RunFolderError, WriteError
from prunekit.runs import state as states
from prunekit.runs.artifacts import RECIPE, ArtifactStore
from prunekit.runs.stage_order import STAGES, SUMMARY_STAGES, stage_index, training_position
from prunekit.runs.state import FORMAT, STATE, SUMMARY
from prunekit.utils.io import (
    TEMP_PREFIX,
    is_disk_failure,
    make_folder,
    os_error_reason,
    write_error,
)
from prunekit.utils.lock import FolderLock, process_alive
from prunekit.utils.symlinks import check_no_external_links

__all__ = ["FORMAT", "RunDir", "is_run_folder"]

SKIPPED = "skipped_steps"  # in the summary: training → how many
# What a start that was killed can leave; recipe.yaml is written last, so without it nothing of worth is there.
_BEGINNINGS = {"lock", STATE, "environment.json", SUMMARY}

logger = logging.getLogger(__name__)


class RunDir(ArtifactStore):
    """One run folder; made by :meth:`start` or :meth:`open`.

    As a context manager it sets the run's status when it is left (complete, interrupted or failed) and gives
    the lock back.

    Attributes:
        path: the folder.
    """

    @classmethod
    def start(
        cls,
        path: str | Path,
        recipe_text: str,
        environment: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Make the folder of a run, or take up one that is there, and lock it.

        Args:
            path: the folder; its parents are made too.
            recipe_text: the resolved recipe, written to ``recipe.yaml``.
            environment: written to ``environment.json``.
            resume: go on with the run that is there; where none is there, start one.
            overwrite: remove the run that is there first.

        Raises:
            RunFolderError: the folder holds a run and neither flag is set, holds something else, is in use, or its
                recipe is another one.
            CheckpointError: a file cannot be written, or the state of the run to resume is damaged.
        """
        path = Path(path)
        if resume and overwrite:
            raise RunFolderError("--resume and --overwrite exclude each other; give one of them")
        try:
            make_folder(path)
            foreign = not is_run_folder(path) and any(
                e.name not in _BEGINNINGS and not e.name.startswith(TEMP_PREFIX) for e in path.iterdir()
            )
        except OSError as error:
            if is_disk_failure(error):
                raise write_error(error, path, "use") from error
            raise RunFolderError(
                f"cannot use {path} as a run folder: {os_error_reason(error)}; choose another --out DIR"
            ) from error
        if foreign and not (path / RECIPE).exists() and (path / STATE).is_file() and (path / SUMMARY).is_file():
            raise RunFolderError(
                f"{path / RECIPE} is missing, without which the run there cannot go on; put a copy of it back, or "
                "choose another --out DIR"
            )
        if foreign:
            raise RunFolderError(
                f"{path} holds files and no run, so nothing is written there; choose another --out DIR"
            )
        if not overwrite:
            # That one removes links, and follows none.
            check_no_external_links(path)
        lock = FolderLock(path)
        lock.acquire()
        try:
            run = cls(path, {}, lock)
            if is_run_folder(path):
                if not (resume or overwrite):
                    raise RunFolderError(
                        f"{path} holds a run already; go on with it by --resume, replace it by --overwrite, "
                        "or choose another --out DIR"
                    )
                if resume:
                    run._take_up(recipe_text, environment)
                    return run
                run._clear()
            run._set_up(recipe_text, environment)
            return run
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> Self:
        """Look at a run folder; with ``write`` also lock it, so that files can be added to it.

        Raises:
            RunFolderError: the folder is no run folder, needs a newer prunekit, or (``write``) is in use.
            CheckpointError: ``state.json`` is damaged.
        """
        path = Path(path)
        if not ((path / RECIPE).is_file() or (path / SUMMARY).is_file()):
            raise RunFolderError(f"{path} is no run folder (no {RECIPE} in it); give one that prunekit run has made")
        check_no_external_links(path)
        lock = FolderLock(path) if write else None
        if lock is not None:
            lock.acquire()
        try:
            states.refuse_newer(path)
            run = cls(path, states.read(path), lock)
            if write:
                run._settle()
            return run
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def _set_up(self, recipe_text: str, environment: dict[str, Any]) -> None:
        self._remove_temporaries()  # of a start that was killed
        self._write_state(states.fresh())
        self.write_json("environment.json", environment)
        self.write_json(
            SUMMARY, {"format": FORMAT, "recipe": _recipe_name(recipe_text, self.path), "status": "running"}
        )
        self.write_text(RECIPE, recipe_text)

    def _take_up(self, recipe_text: str, environment: dict[str, Any]) -> None:
        states.refuse_newer(self.path)
        self._state = {**states.read(self.path), "prunekit": __version__}
        self._remove_temporaries()
        self._settle()
        held = self.read_text(RECIPE)
        if not is_same_run(held, recipe_text):
            lines = difflib.unified_diff(held.splitlines(), recipe_text.splitlines(), RECIPE, "now", lineterm="", n=0)
            shown = list(islice(lines, 13))
            if len(shown) > 12:
                shown[12:] = ["…"]
            raise RunFolderError(
                f"{self.path} was started with another recipe; use that one, or --overwrite, or another --out DIR:\n"
                + "\n".join(shown)
            )
        if held != recipe_text:
            # A key that may change, or one that an older prunekit did not know.
            self.write_text(RECIPE, recipe_text)
        self._vouch_for_beginnings()
        self.write_json("environment.json", environment)
        self._set_status("running")

    def settled(self, stage: str) -> Self:
        """This folder, if what ``stage`` leaves in it stands, or if nobody is at work on it.

        Raises:
            RunFolderError: a process is at work and has not done this stage.
        """
        if self.status == "running" and not self.is_done(stage):
            by = f"process {self._state['pid']} on {self._state['host']}"
            raise RunFolderError(
                f"{self.path} is being worked on by {by}, which has not done the stage {stage}; wait until it has, or "
                "until the run is over"
            )
        return self

    def _clear(self) -> None:
        # A kill in between must leave a run that can be overwritten and, if resumed, starts at the first stage.
        self._write_state(states.fresh())
        try:
            entries = [e for e in self.path.iterdir() if e.name not in ("lock", STATE, RECIPE)]
            for entry in [*entries, self.path / RECIPE]:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
        except OSError as error:
            if is_disk_failure(error):
                raise write_error(error, self.path, "empty") from error
            raise RunFolderError(
                f"cannot empty {self.path}: {os_error_reason(error)}; choose another --out DIR"
            ) from error

    def _remove_temporaries(self) -> None:
        for path in self.path.rglob(f"{TEMP_PREFIX}*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._lock is not None and self._state["status"] == "running":
                if error is None and self.is_done(STAGES[-1]):
                    self.finish()
                else:
                    self._set_status(
                        "interrupted" if error is None or isinstance(error, KeyboardInterrupt) else "failed"
                    )
        except CheckpointError as second:
            # On a full disk the status cannot be written either; what went wrong first is what counts.
            if error is None:
                raise
            if not isinstance(error, WriteError):
                logger.warning("%s", second)
        finally:
            self.close()

    def close(self) -> None:
        """Give the lock back and leave the status as it is."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # ---- state

    @property
    def status(self) -> str:
        """running, complete, interrupted or failed; a run whose process is gone counts as interrupted."""
        status, host, pid = (self._state.get(key) for key in ("status", "host", "pid"))
        gone = self._lock is None and host == socket.gethostname() and isinstance(pid, int) and not process_alive(pid)
        return "interrupted" if status == "running" and gone else str(status)

    @property
    def stage(self) -> str | None:
        """The stage that began or ended last; None before the first."""
        return self._state["stage"]

    @property
    def version(self) -> str:
        """The prunekit that last took up this run."""
        return str(self._state["prunekit"])

    @property
    def done(self) -> list[str]:
        """The stages that are done, in their order."""
        return [stage for stage in STAGES if stage in self._state["done"]]

    def begin(self, stage: str) -> None:
        """Note that this stage has begun."""
        stage_index(stage)
        if self._state["status"] != "running":
            self._set_status("running")
        self._write_state({**self._state, "stage": stage, "pid": os.getpid(), "host": socket.gethostname()})

    def end(self, stage: str) -> None:
        """Note that this stage is done."""
        stage_index(stage)
        self._write_state(
            {**self._state, "stage": stage, "done": [s for s in STAGES if s in {*self._state["done"], stage}]}
        )

    def is_done(self, stage: str) -> bool:
        """Whether this stage is done."""
        stage_index(stage)
        return stage in self._state["done"]

    def finish(self) -> None:
        """Note that the run is complete."""
        self._set_status("complete")

    def restart_from(self, stage: str) -> None:
        """Forget this stage and the later ones: that they are done, and all that they have left.

        Raises:
            RunFolderError: no such stage, or an earlier one is not done.
        """
        first = stage_index(stage)
        for earlier in STAGES[:first]:
            if not self.is_done(earlier):
                raise RunFolderError(
                    f"{self.path}: cannot start from {stage}, {earlier} is not done by its {STATE}; "
                    f"use --from {earlier} or --resume"
                )
        # First of all that they are not done: a kill in between must not leave a stage that is done without its files.
        self._write_state({**self._state, "stage": stage, "done": list(STAGES[:first])})
        self._forget_from(stage)
        for later in self.states().stages():
            for step in self.states().steps(later) if training_position(later) >= training_position(stage) else ():
                self.states().discard(later, step)
        self.truncate_metrics(stage, 0)
        summary = {
            k: v
            for k, v in self.read_json(SUMMARY).items()
            if k not in SUMMARY_STAGES or SUMMARY_STAGES[k] in STAGES[:first]
        }
        if "seconds" in summary:
            summary["seconds"] = {s: seconds for s, seconds in summary["seconds"].items() if s in STAGES[:first]}
        if SKIPPED in summary:
            summary[SKIPPED] = {
                s: count for s, count in summary[SKIPPED].items() if training_position(s) < training_position(stage)
            }
        for part in ("baseline", "dense", "slim", "finetuned"):
            if part in summary and stage_index("evaluate") >= first:
                summary[part] = {key: value for key, value in summary[part].items() if key != "metrics"}
        self.write_json(SUMMARY, summary)

    def _set_status(self, status: str) -> None:
        # state.json last: while it says "running", a reader looks whether the process is still there.
        self.write_json(SUMMARY, {**self.read_json(SUMMARY), "status": status})
        self._write_state({**self._state, "status": status, "pid": os.getpid(), "host": socket.gethostname()})

    # ---- summary

    def update_summary(self, part: str, value: Any) -> None:
        """Set one part of ``summary.json``."""
        self.write_json(SUMMARY, {**self.read_json(SUMMARY), part: value})

    def remove_summary(self, part: str) -> None:
        """Take one part out of ``summary.json``, where it is there."""
        summary = self.read_json(SUMMARY)
        if part in summary:
            self.write_json(SUMMARY, {key: value for key, value in summary.items() if key != part})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the seconds that this stage has taken, over all resumptions."""
        stage_index(stage)
        taken = self.read_json(SUMMARY).get("seconds", {})
        self.update_summary("seconds", {**taken, stage: taken.get(stage, 0.0) + seconds})

    def note_skipped(self, stage: str) -> None:
        """Write down how many steps of a training, by its lines of metrics, were skipped as not finite, if any were."""
        count = sum(line.get("skipped", 0) for line in self.read_metrics() if line["stage"] == stage)
        held = self.read_json(SUMMARY).get(SKIPPED, {})
        if count != held.get(stage, 0):
            self.update_summary(SKIPPED, {**held, stage: count})

    # ---- checkpoints

    def save_checkpoint(
        self,
        stage: str,
        step: int,
        tensors: dict[str, np.ndarray],
        state: dict[str, Any],
        keep: int,
        best: int | None = None,
    ) -> None:
        """Write the training state behind ``step`` and remove all of this stage but the newest ``keep`` and the
        ``best``.

        Raises:
            CheckpointError: the system refused; the states written before still stand.
        """
        self._may_write()
        self.states().save(stage, step, tensors, state, keep, best)

    def load_checkpoint(self, stage: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Tensors and state of the newest training state that is whole; a damaged one is logged and passed over."""
        found = self.states().load(stage)
        return found and found[1:]

    def latest_checkpoint(self, stage: str) -> int | None:
        """The epoch of what :meth:`load_checkpoint` gives, or None."""
        found = self.states().load(stage)
        return found and found[0]


def is_run_folder(path: Path) -> bool:
    """Whether prunekit made this folder: a recipe alone could be anybody's."""
    return (path / RECIPE).is_file() and ((path / STATE).is_file() or (path / SUMMARY).is_file())


def _recipe_name(recipe_text: str, path: Path) -> str:
    recipe = parse(recipe_text).value
    return str(recipe["name"]) if isinstance(recipe, dict) and recipe.get("name") else path.name
