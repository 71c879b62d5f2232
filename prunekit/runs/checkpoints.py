"""Training states on disk: tensors beside one JSON that makes them valid."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as encode_safetensors

from prunekit.errors import CheckpointError, RunFolderError
from prunekit.utils.decode import decode_json, decode_tensors
from prunekit.utils.io import encode_json, format_problem, is_newer, os_error_reason, sha256, write_atomic, write_error

FORMAT = 1

logger = logging.getLogger(__name__)


def encode_tensors(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """``tensors`` as a safetensors file.

    Raises:
        ValueError: more than one metadata key, with which the bytes would differ between processes.
    """
    if metadata and len(metadata) > 1:
        raise ValueError(f"safetensors metadata takes one key here, not {len(metadata)}; put the rest into a JSON")
    # order="C" rather than ascontiguousarray, which would make vectors of scalars.
    return encode_safetensors({key: np.asarray(value, order="C") for key, value in tensors.items()}, metadata)


class CheckpointStore:
    """The folder ``checkpoints`` of a run: ``<stage>-<step>.safetensors`` and ``.json``.

    The number is that of the steps of the training that are done. (Epoch and step in the name were weighed: one number
    sorts, and those of earlier prunekits, which are epochs, sort among them, being no larger than their steps.)

    The tensors are written first; the JSON holds their checksum, so that without it, or with another one, they do not
    count. It also says which run it is of (see :func:`prunekit.runs.state.fresh`); a state of another one does not count
    either. States of earlier prunekits do not say so.
    """

    def __init__(self, folder: Path, run: str | None = None):
        self.folder = folder
        self.run = run

    def steps(self, stage: str) -> list[int]:
        """The states of this stage with a JSON, the newest first; whether they can be read is not looked at."""
        found = (path.stem.removeprefix(f"{stage}-") for path in self.folder.glob(f"{stage}-*.json"))
        return sorted((int(step) for step in found if step.isdecimal()), reverse=True)

    def stages(self) -> set[str]:
        """The stages of which there are states."""
        return {path.stem.rpartition("-")[0] for path in self.folder.glob("*-*.json")}

    def save(
        self,
        stage: str,
        step: int,
        tensors: dict[str, np.ndarray],
        state: dict[str, Any],
        keep: int,
        best: int | None = None,
    ) -> None:
        """Write one state and remove all of this stage but the newest ``keep`` and the ``best``.

        Raises:
            CheckpointError: the system refused, or the state is no JSON; the states written before still stand.
        """
        arrays, record = self._paths(stage, step)
        data = encode_tensors(tensors)
        body = encode_json(state, record.name, indent=None)
        # The old JSON does not speak for new tensors.
        self._remove(record)
        write_atomic(arrays, data)
        sums = {"sha256": sha256(data), "state_sha256": sha256(body)}
        written = {"format": FORMAT, "run": self.run, **sums, "state": json.loads(body)}
        write_atomic(record, encode_json(written, record.name, indent=None))
        for old in self.steps(stage)[max(keep, 1) :]:
            if old != best:
                self.discard(stage, old)
        kept = {self._paths(stage, step)[0] for step in self.steps(stage)}
        for orphan in set(self.folder.glob(f"{stage}-*.safetensors")) - kept:
            self._remove(orphan)

    def load(self, stage: str) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """Step, tensors and state of the newest whole state, or None; a damaged one is logged and passed over.

        Raises:
            RunFolderError: it needs a newer prunekit.
        """
        for step in self.steps(stage):
            try:
                return step, *self.read(stage, step)
            except CheckpointError as error:
                logger.warning("%s; trying the one before", error)
        return None

    def read(self, stage: str, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and state of one step.

        Raises:
            CheckpointError: it is damaged, or of another run.
            RunFolderError: it needs a newer prunekit.
        """
        arrays, record = self._paths(stage, step)
        named = f"checkpoint {record.with_suffix('')}"
        try:
            written = decode_json(record.read_bytes())
            if is_newer(written["format"], FORMAT):
                raise RunFolderError(
                    f"{named} {format_problem(written['format'], FORMAT)}; it was written by a newer prunekit and needs "
                    "that: pip install --upgrade prunekit"
                )
            data = arrays.read_bytes()
            body = encode_json(written["state"], record.name, indent=None)
            if sha256(data) != written["sha256"] or sha256(body) != written["state_sha256"]:
                raise ValueError("its bytes are not those written")
            if None not in (self.run, written.get("run")) and written["run"] != self.run:
                raise ValueError("it is of another run")
            return decode_tensors(data), written["state"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
            why = os_error_reason(error) if isinstance(error, OSError) else error
            raise CheckpointError(f"{named} is damaged ({why})") from error

    def discard(self, stage: str, step: int) -> None:
        """Remove one state."""
        arrays, record = self._paths(stage, step)
        self._remove(record)
        self._remove(arrays)

    def _paths(self, stage: str, step: int) -> tuple[Path, Path]:
        stem = f"{stage}-{step:04d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, path, "remove") from error
