"""Training states on disk: tensors beside one JSON that makes them valid."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as encode_safetensors

from prunekit.decoding import decode_json, decode_tensors
from prunekit.errors import CheckpointError
from prunekit.files import encode_json, reason, sha256, write_atomic

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
    """The folder ``checkpoints`` of a run: ``<stage>-<epoch>.safetensors`` and ``.json``.

    The tensors are written first; the JSON holds their checksum, so that without it, or with another one, they do not
    count.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def epochs(self, stage: str) -> list[int]:
        """The epochs of this stage with a JSON, the newest first; whether they can be read is not looked at."""
        found = (path.stem.removeprefix(f"{stage}-") for path in self.folder.glob(f"{stage}-*.json"))
        return sorted((int(epoch) for epoch in found if epoch.isdecimal()), reverse=True)

    def stages(self) -> set[str]:
        """The stages of which there are states."""
        return {path.stem.rpartition("-")[0] for path in self.folder.glob("*-*.json")}

    def save(self, stage: str, epoch: int, tensors: dict[str, np.ndarray], state: dict[str, Any], keep: int) -> None:
        """Write one state and remove all but the newest ``keep`` of this stage.

        Raises:
            CheckpointError: the system refused, or the state is no JSON; the states written before still stand.
        """
        arrays, record = self._paths(stage, epoch)
        data = encode_tensors(tensors)
        body = encode_json(state, record.name, indent=None)
        # The old JSON does not speak for new tensors.
        self._remove(record)
        write_atomic(arrays, data)
        written = {"format": 1, "sha256": sha256(data), "state_sha256": sha256(body), "state": json.loads(body)}
        write_atomic(record, encode_json(written, record.name, indent=None))
        for old in self.epochs(stage)[max(keep, 1) :]:
            self.discard(stage, old)
        kept = {self._paths(stage, epoch)[0] for epoch in self.epochs(stage)}
        for orphan in set(self.folder.glob(f"{stage}-*.safetensors")) - kept:
            self._remove(orphan)

    def load(self, stage: str) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """Epoch, tensors and state of the newest whole state, or None; a damaged one is logged and passed over."""
        for epoch in self.epochs(stage):
            arrays, record = self._paths(stage, epoch)
            try:
                written = decode_json(record.read_bytes())
                data = arrays.read_bytes()
                body = encode_json(written["state"], record.name, indent=None)
                if sha256(data) != written["sha256"] or sha256(body) != written["state_sha256"]:
                    raise ValueError("its bytes are not those written")
                return epoch, decode_tensors(data), written["state"]
            except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
                why = reason(error) if isinstance(error, OSError) else error
                logger.warning("checkpoint %s is damaged (%s); trying the one before", record.with_suffix(""), why)
        return None

    def discard(self, stage: str, epoch: int) -> None:
        """Remove one state."""
        arrays, record = self._paths(stage, epoch)
        self._remove(record)
        self._remove(arrays)

    def _paths(self, stage: str, epoch: int) -> tuple[Path, Path]:
        stem = f"{stage}-{epoch:04d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot remove {path}: {reason(error)}; mend its permissions") from error
