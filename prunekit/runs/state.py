"""``state.json``: which stages of a run are done, and the checksums of its other files.

The file also holds its own checksum, ``check``, so that a flipped bit in it is not reported as damage elsewhere.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from itertools import chain
from pathlib import Path
from typing import Any

from prunekit import __version__
from prunekit.errors import CheckpointError, RunFolderError
from prunekit.utils.io import encode_json, format_problem, is_newer, os_error_reason, sha256
from prunekit.utils.safe_decode import decode_json

FORMAT = 2
STATE, SUMMARY = "state.json", "summary.json"
# A key that the file has in every format: other JSON in its place is damage.
_MARKERS = {STATE: "checksums", SUMMARY: "recipe"}


def new_state() -> dict[str, Any]:
    """Return the state of a run that this process starts; checkpoints carry its random id ``run`` too."""
    return {
        "format": FORMAT,
        "prunekit": __version__,
        "run": secrets.token_hex(8),
        "stage": None,
        "status": "running",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "done": [],
        "checksums": {},
    }


def encode(state: dict[str, Any]) -> bytes:
    """Return the content of ``state.json``, with its checksum."""
    content = {key: value for key, value in state.items() if key != "check"}
    return encode_json({**content, "check": sha256(encode_json(content, STATE))}, STATE)


def read(folder: Path) -> dict[str, Any]:
    """Read the state, an empty one where the file is missing; CheckpointError if it is damaged or cannot be read."""
    path = folder / STATE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {**new_state(), "status": "unknown", "pid": None, "host": None, "run": None}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os_error_reason(error)}; fix its permissions") from error
    try:
        state = decode_json(data)
        _validate(state)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it and continue with --resume, which repeats the stages from the "
            "checkpoints that exist, or start again with --overwrite"
        ) from error
    return state


def recorded_files(folder: Path) -> list[str]:
    """Return the names in a state of any format, as far as it can be read."""
    try:
        return [name for name in json.loads((folder / STATE).read_bytes())["checksums"] if isinstance(name, str)]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return []


def check_format(folder: Path) -> None:
    """Raise RunFolderError for the format of another prunekit, CheckpointError for one that has never existed."""
    for name, marker in _MARKERS.items():
        path = folder / name
        try:
            content = decode_json(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # reported by whoever needs the file
        if not isinstance(content, dict):
            continue
        value, version = content.get("format", FORMAT), content.get("prunekit")
        problem = format_problem(value, FORMAT)
        writer = f"prunekit {version}" if isinstance(version, str) else "another prunekit"
        if is_newer(value, FORMAT):
            raise RunFolderError(
                f"{path} {problem}; it was written by {writer} and needs that or a later one: "
                "pip install --upgrade prunekit"
            )
        if problem:
            raise CheckpointError(f"{path} {problem}; start again with --overwrite")
        if value < FORMAT and marker in content:
            raise RunFolderError(
                f"{path} has format {value}, written by {writer}; this prunekit ({__version__}) reads format {FORMAT} "
                f"only: run its recipe again (prunekit run {folder / 'recipe.yaml'} --out DIR), or use the version "
                "that wrote it"
            )


def _validate(state: Any) -> None:
    if not isinstance(state, dict):
        raise ValueError("not the state of a run")
    if state.get("format") != FORMAT:
        raise ValueError(f"its format is {state.get('format')!r}")
    if decode_json(encode(state))["check"] != state.get("check"):
        raise ValueError("its checksum is wrong")
    tables = [state.get("checksums"), state.get("replacing", {})]
    are_texts = all(isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) for table in tables)
    if not are_texts or not isinstance(state.get("done"), list) or not new_state().keys() <= state.keys():
        raise ValueError("not the state of a run")
    for name in chain(*tables):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it names {name!r}, which is outside the folder")
