"""Training checkpoints on disk: a ``.safetensors`` file and the JSON that makes it valid."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as encode_safetensors

from prunekit.errors import CheckpointError, RunFolderError
from prunekit.runs.stage_order import is_training
from prunekit.utils.io import encode_json, format_problem, is_newer, os_error_reason, sha256, write_atomic, write_error
from prunekit.utils.safe_decode import decode_json, decode_tensors

FORMAT = 1
Tensors = dict[str, np.ndarray]

logger = logging.getLogger(__name__)


def encode_tensors(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """Encode tensors as a safetensors file; ValueError for several metadata keys, whose order is not fixed."""
    if metadata and len(metadata) > 1:
        raise ValueError(f"safetensors metadata takes one key here, not {len(metadata)}; put the rest into a JSON")
    # order="C", since ascontiguousarray would turn scalars into vectors.
    return encode_safetensors({key: np.asarray(value, order="C") for key, value in tensors.items()}, metadata)


class CheckpointStore:
    """The folder ``checkpoints`` of a run: ``<stage>-<steps done>.safetensors`` and ``.json``.

    The JSON is written last. It holds the checksum of the tensors and the id of the run, and both must match.

    Args:
        folder: need not exist.
        run: the id of the run; None accepts checkpoints of any run.
    """

    def __init__(self, folder: Path, run: str | None = None):
        self.folder = folder
        self.run = run

    def steps(self, stage: str) -> list[int]:
        """Return the steps of this stage that have a JSON, newest first; the files are not read."""
        return sorted(self._steps(stage, "json"), reverse=True)

    def _steps(self, stage: str, kind: str) -> list[int]:
        numbers = (path.stem.removeprefix(f"{stage}-") for path in self.folder.glob(f"{stage}-*.{kind}"))
        return [int(number) for number in numbers if number.isdecimal()]

    def stages(self) -> set[str]:
        """Return the trainings that have checkpoints."""
        parts = (path.stem.rpartition("-") for path in self.folder.glob("*-*.json"))
        return {stage for stage, _, number in parts if number.isdecimal() and is_training(stage)}

    def save(
        self, stage: str, step: int, tensors: Tensors, state: dict[str, Any], keep: int, best: int | None = None
    ) -> None:
        """Write a checkpoint, then remove all of this stage except the newest ``keep`` up to it and the ``best``.

        CheckpointError if the write fails or the state is not valid JSON; earlier checkpoints remain then.
        """
        tensor_path, json_path = self._paths(stage, step)
        data = encode_tensors(tensors)
        body = encode_json(state, json_path.name, indent=None)
        # A JSON left from an earlier attempt does not belong to the new tensors.
        self._remove(json_path)
        write_atomic(tensor_path, data)
        record = {
            "format": FORMAT,
            "run": self.run,
            "sha256": sha256(data),
            "state_sha256": sha256(body),
            "state": json.loads(body),
        }
        write_atomic(json_path, encode_json(record, json_path.name, indent=None))
        # Later ones were damaged, or training would have continued from them.
        steps = self.steps(stage)
        kept = {*[old for old in steps if old <= step][: max(keep, 1)], best}
        for old in steps:
            if old not in kept:
                self.discard(stage, old)
        for orphan in set(self._steps(stage, "safetensors")) - set(self.steps(stage)):
            self._remove(self._paths(stage, orphan)[0])

    def load(self, stage: str) -> tuple[int, Tensors, dict[str, Any]] | None:
        """Return step, tensors and state of the newest intact checkpoint, or None; damaged ones are logged."""
        for step in self.steps(stage):
            try:
                return step, *self.read(stage, step)
            except CheckpointError as error:
                logger.warning("%s; trying the one before", error)
        return None

    def read(self, stage: str, step: int) -> tuple[Tensors, dict[str, Any]]:
        """Return tensors and state of one checkpoint.

        CheckpointError if it is damaged or of another run, RunFolderError if it needs a newer prunekit.
        """
        tensor_path, json_path = self._paths(stage, step)
        name = f"checkpoint {json_path.with_suffix('')}"
        try:
            record = decode_json(json_path.read_bytes())
            if is_newer(record["format"], FORMAT):
                raise RunFolderError(
                    f"{name} {format_problem(record['format'], FORMAT)}; it was written by a newer prunekit and needs "
                    "that: pip install --upgrade prunekit"
                )
            data = tensor_path.read_bytes()
            body = encode_json(record["state"], json_path.name, indent=None)
            if sha256(data) != record["sha256"] or sha256(body) != record["state_sha256"]:
                raise ValueError("its checksum is wrong")
            if self.run is not None and record["run"] != self.run:
                raise ValueError("it belongs to another run")
            return decode_tensors(data), record["state"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
            reason = os_error_reason(error) if isinstance(error, OSError) else error
            raise CheckpointError(f"{name} is damaged ({reason})") from error

    def discard(self, stage: str, step: int) -> None:
        """Remove a checkpoint."""
        tensor_path, json_path = self._paths(stage, step)
        self._remove(json_path)
        self._remove(tensor_path)

    def _paths(self, stage: str, step: int) -> tuple[Path, Path]:
        stem = f"{stage}-{step:04d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, path, "remove") from error
