"""The run folder and its life cycle: start, resume, stages, status, summary, checkpoints.

A process killed at any moment leaves a folder that can be resumed; docs/design/run-folder.md describes the layout.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prunekit import __version__
from prunekit.config.yaml import parse
from prunekit.errors import CheckpointError, RunError, RunFolderError, WriteError
from prunekit.runs import state as states
from prunekit.runs.artifacts import RECIPE, ArtifactStore
from prunekit.runs.checkpoint_store import Tensors
from prunekit.runs.folders import check_usable, copy_run, is_run_folder, make_usable
from prunekit.runs.recipe_changes import refuse_change
from prunekit.runs.stage_order import GRADUAL_PRUNING, STAGES, SUMMARY_STAGES, stage_index, training_position
from prunekit.runs.state import FORMAT, STATE, SUMMARY
from prunekit.runs.written_files import remove_written, temporary_files
from prunekit.utils.io import is_disk_failure, os_error_reason, write_error
from prunekit.utils.lock import FolderLock, process_alive
from prunekit.utils.symlinks import check_no_external_links
from prunekit.utils.text import did_you_mean
from prunekit.weights import is_shipped, locate, similar_name

DATA = "data.json"  # split → checksum of its images and targets
SKIPPED_STEPS = "skipped_steps"  # in the summary: training → number of steps

logger = logging.getLogger(__name__)


class RunDir(ArtifactStore):
    """A run folder, from :meth:`start` or :meth:`open`. As a context manager it sets the status of the run on exit."""

    @classmethod
    def start(
        cls,
        path: str | Path,
        recipe_text: str,
        environment: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        repeat_from: str | None = None,
        checksums: Callable[[], dict[str, str]] | None = None,
    ) -> Self:
        """Create the folder of a run, or resume an existing one, and lock it.

        Args:
            path: the folder; missing parents are created.
            recipe_text: the resolved recipe.
            environment: written to ``environment.json``.
            resume: continue the existing run; where there is none, start one.
            overwrite: remove what the existing run has written first; the user's own files stay.
            repeat_from: with ``resume``, a stage that :meth:`restart_from` will repeat, so that its keys may change.
            checksums: returns those of the data; with ``resume``, called if the data have moved.

        Raises:
            RunFolderError: the folder is in use, holds another run or something else, or has another format.
            CheckpointError: a file cannot be written, or the state of the run to resume is damaged.
        """
        path = Path(path)
        check_usable(path, resume=resume, overwrite=overwrite)
        make_usable(path)
        if not overwrite:
            # Overwriting removes links without following them.
            check_no_external_links(path)
        with cls._locked(path) as run:
            if not is_run_folder(path):
                run._create(recipe_text, environment)
            elif resume:
                run._resume(recipe_text, environment, repeat_from, checksums)
            elif overwrite:
                run._clear(recipe_text)
                check_no_external_links(path)
                run._create(recipe_text, environment)
            else:
                raise RunFolderError(
                    f"{path} already holds a run; continue it with --resume, replace it with --overwrite, "
                    "or choose another --out DIR"
                )
            return run

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> Self:
        """Open a run folder for reading; with ``write`` also lock it, so that files can be added.

        Args:
            path: the folder, or the name of a model that comes with prunekit. To write, such a model is first copied
                to ``runs/NAME``, unless that run exists.
            write: lock the folder.

        Raises:
            RunFolderError: it is no run folder, has another format or is in use.
            CheckpointError: its state is damaged.
        """
        path = locate(path)
        if write and is_shipped(path):
            shipped, path = path, Path("runs") / path.name
            if not path.exists():
                copy_run(shipped, path)
                logger.info("%s: copied to %s", shipped.name, path)
        if not ((path / RECIPE).is_file() or (path / SUMMARY).is_file()):
            hint = "" if path.exists() else did_you_mean(path) or similar_name(path)
            raise RunFolderError(
                f"{path} is not a run folder (no {RECIPE} in it){hint}; give one that prunekit run has made"
            )
        check_no_external_links(path)
        with cls._locked(path) if write else contextlib.nullcontext(cls(path, {}, None)) as run:
            states.check_format(path)
            run._state = states.read(path)
            if write:
                run._resolve_replacements()
            return run

    @classmethod
    @contextlib.contextmanager
    def _locked(cls, path: Path) -> Iterator[Self]:
        lock = FolderLock(path)
        lock.acquire()
        try:
            yield cls(path, {}, lock)
        except BaseException:
            lock.release()
            raise

    def _create(self, recipe_text: str, environment: dict[str, Any]) -> None:
        self._remove_temporary_files()  # of a start that was killed
        self._write_state(states.new_state())
        self.write_json("environment.json", environment)
        self._begin_summary(recipe_text)
        self.write_text(RECIPE, recipe_text)

    def _begin_summary(self, recipe_text: str) -> None:
        recipe = parse(recipe_text).value
        name = isinstance(recipe, dict) and recipe.get("name")
        self.write_json(SUMMARY, {"format": FORMAT, "recipe": str(name or self.path.name), "status": "running"})

    def _resume(
        self,
        recipe_text: str,
        environment: dict[str, Any],
        repeat_from: str | None,
        checksums: Callable[[], dict[str, str]] | None,
    ) -> None:
        states.check_format(self.path)
        self._state = {**states.read(self.path), "prunekit": __version__}
        self._remove_temporary_files()
        self._resolve_replacements()
        written = self.read_text(RECIPE)
        kept = STAGES[: stage_index(repeat_from)] if repeat_from else STAGES
        is_kept = {**dict.fromkeys(kept, True), GRADUAL_PRUNING: STAGES[0] in kept}
        data = (lambda: checksums() == self.read_json(DATA)) if checksums is not None and self.has(DATA) else None
        if problem := refuse_change(
            written, recipe_text, self.path, lambda s: is_kept.get(s, False) and self._has_results(s), is_same_data=data
        ):
            raise RunFolderError(problem)
        if repeat_from:
            # A kill before those stages are repeated must not leave them as done with another recipe.
            done = [stage for stage in self.done if stage in kept]
            self._write_state({**self._state, "done": done, "stage": repeat_from})
        if written != recipe_text:
            # A key that may change, or one that an older prunekit did not know.
            self.write_text(RECIPE, recipe_text)
        self._record_files_written_once()
        self.write_json("environment.json", environment)
        self._set_status("running")

    def require_done(self, stage: str) -> Self:
        """Return this folder; raise RunFolderError while a process is working on it and has not finished the stage."""
        if self.status == "running" and not self.is_done(stage):
            raise RunFolderError(
                f"{self.path} is in use by process {self._state['pid']} on {self._state['host']}, which has not "
                f"finished the stage {stage}; wait until it has, or until the run ends"
            )
        return self

    def _clear(self, recipe_text: str) -> None:
        recorded = states.recorded_files(self.path)
        # A kill in between must leave a run that can be overwritten, and that starts at the first stage if resumed.
        self._write_state(states.new_state())
        self._begin_summary(recipe_text)
        try:
            remove_written(self.path, recorded, keep=("lock", STATE, RECIPE, SUMMARY))
        except OSError as error:
            if is_disk_failure(error):
                raise write_error(error, self.path, "empty") from error
            raise RunFolderError(
                f"cannot empty {self.path}: {os_error_reason(error)}; choose another --out DIR"
            ) from error

    def _remove_temporary_files(self) -> None:
        for path in temporary_files(self.path):
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
                    is_stopped = error is None or isinstance(error, KeyboardInterrupt)
                    self._set_status("interrupted" if is_stopped else "failed")
        except (CheckpointError, RunError) as second:
            # On a full disk the status cannot be written either; the first error is the one to report.
            if error is None:
                raise
            if not isinstance(error, (WriteError, RunError)):
                logger.warning("%s", second)
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock; the status stays as it is."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # ---- state

    @property
    def status(self) -> str:
        """running, complete, interrupted or failed; a running run whose process is gone counts as interrupted."""
        status, host, pid = (self._state.get(key) for key in ("status", "host", "pid"))
        gone = self._lock is None and host == socket.gethostname() and isinstance(pid, int) and not process_alive(pid)
        return "interrupted" if status == "running" and gone else str(status)

    @property
    def stage(self) -> str | None:
        """The stage that began or ended last; None before the first."""
        return self._state["stage"]

    @property
    def version(self) -> str:
        """The version of prunekit that last started or resumed this run."""
        return str(self._state["prunekit"])

    @property
    def done(self) -> list[str]:
        """The stages that are done, in order."""
        return [stage for stage in STAGES if stage in self._state["done"]]

    def begin(self, stage: str) -> None:
        """Record that this stage has begun."""
        stage_index(stage)
        if self._state["status"] != "running":
            self._set_status("running")
        self._write_state({**self._state, "stage": stage, **_process()})

    def end(self, stage: str) -> None:
        """Record that this stage is done."""
        done = [s for s in STAGES if s == stage or self.is_done(s)]
        self._write_state({**self._state, "stage": STAGES[stage_index(stage)], "done": done})

    def is_done(self, stage: str) -> bool:
        """Return whether this stage is done."""
        return STAGES[stage_index(stage)] in self._state["done"]

    def _has_results(self, stage: str) -> bool:
        if stage == GRADUAL_PRUNING:
            checkpoint = self.load_checkpoint("train")
            pruning = checkpoint and checkpoint[1].get("gradual_pruning")
            return self.is_done("train") or bool(pruning and pruning["round"])
        trainings = self.checkpoints().stages()
        return (
            stage == STAGES[0]
            or self.is_done(stage)
            or any(training_position(t)[0] == stage_index(stage) for t in trainings)
        )

    def finish(self) -> None:
        """Record that the run is complete."""
        self._set_status("complete")

    def restart_from(self, stage: str) -> None:
        """Remove the outputs of this stage and the later ones; RunFolderError if an earlier one is not done."""
        first = stage_index(stage)
        for earlier in STAGES[:first]:
            if not self.is_done(earlier):
                raise RunFolderError(
                    f"{self.path}: cannot start from {stage}, {earlier} is not done by its {STATE}; "
                    f"use --from {earlier} or --resume"
                )
        # Before any removal: a kill in between must not leave a stage marked as done without its files.
        self._write_state({**self._state, "stage": stage, "done": list(STAGES[:first])})
        self._remove_outputs_from(stage)
        position = training_position(stage)
        self._discard_checkpoints(lambda training: training_position(training) >= position)
        self.truncate_metrics(stage, 0)
        self.write_json(SUMMARY, self._summary_before(stage))

    def _summary_before(self, stage: str) -> dict[str, Any]:
        kept = STAGES[: stage_index(stage)]
        removed = {part for part, writer in SUMMARY_STAGES.items() if writer not in kept}
        summary = {part: value for part, value in self.read_json(SUMMARY).items() if part not in removed}
        if "seconds" in summary:
            summary["seconds"] = {s: seconds for s, seconds in summary["seconds"].items() if s in kept}
        if SKIPPED_STEPS in summary:
            position = training_position(stage)
            counts = summary[SKIPPED_STEPS].items()
            summary[SKIPPED_STEPS] = {name: count for name, count in counts if training_position(name) < position}
        if "evaluate" not in kept:
            for part in {"baseline", "dense", "slim", "finetuned"} & summary.keys():
                summary[part] = {key: value for key, value in summary[part].items() if key != "metrics"}
        return summary

    def _set_status(self, status: str) -> None:
        # state.json last: while it says "running", readers check whether the process is alive.
        self.update_summary("status", status)
        self._write_state({**self._state, "status": status, **_process()})

    # ---- summary

    def update_summary(self, part: str, value: Any) -> None:
        """Set one entry of ``summary.json``."""
        self.write_json(SUMMARY, {**self.read_json(SUMMARY), part: value})

    def remove_summary(self, part: str) -> None:
        """Remove one entry of ``summary.json``, if it is there."""
        summary = self.read_json(SUMMARY)
        if part in summary:
            self.write_json(SUMMARY, {key: value for key, value in summary.items() if key != part})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the seconds that this stage has taken, over all resumptions."""
        stage_index(stage)
        taken = self.read_json(SUMMARY).get("seconds", {})
        self.update_summary("seconds", {**taken, stage: taken.get(stage, 0.0) + seconds})

    def record_skipped_steps(self, stage: str) -> None:
        """Write the number of non-finite steps that a training skipped into the summary, if it has changed."""
        count = sum(line.get("skipped", 0) for line in self.read_metrics() if line["stage"] == stage)
        recorded = self.read_json(SUMMARY).get(SKIPPED_STEPS, {})
        if count != recorded.get(stage, 0):
            self.update_summary(SKIPPED_STEPS, {**recorded, stage: count})

    # ---- checkpoints

    def save_checkpoint(
        self, stage: str, step: int, tensors: Tensors, state: dict[str, Any], keep: int, best: int | None = None
    ) -> None:
        """Write a training checkpoint; see :meth:`CheckpointStore.save`."""
        self._require_write_access()
        self.checkpoints().save(stage, step, tensors, state, keep, best)

    def load_checkpoint(self, stage: str) -> tuple[Tensors, dict[str, Any]] | None:
        """Return tensors and state of the newest intact checkpoint, or None; damaged ones are logged and skipped."""
        loaded = self.checkpoints().load(stage)
        return loaded and loaded[1:]

    def latest_checkpoint(self, stage: str) -> int | None:
        """Return the step of the checkpoint that :meth:`load_checkpoint` returns, or None."""
        loaded = self.checkpoints().load(stage)
        return loaded and loaded[0]


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}
