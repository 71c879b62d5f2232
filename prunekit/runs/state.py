"""``state.json``: how far a run has come, and what vouches for its other files.

It holds a checksum of itself too, ``check``: a bit that is flipped in it would otherwise call another file damaged, or
a stage done that is not.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Any

from prunekit import __version__
from prunekit.errors import CheckpointError, RunFolderError
from prunekit.utils.decode import decode_json
from prunekit.utils.io import encode_json, format_problem, is_newer, os_error_reason, sha256

FORMAT = 1
STATE, SUMMARY = "state.json", "summary.json"


def fresh() -> dict[str, Any]:
    """The state of a run that begins in this process.

    Its ``run`` is drawn, and stands in what the run writes beside its checksums, such as training states: files of two
    runs that are mixed up are told apart by it. (A hash of the recipe would be the same for two runs of one recipe on
    other data, and for the run that --overwrite has replaced.)
    """
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
    """The bytes of ``state.json``."""
    plain = {key: value for key, value in state.items() if key != "check"}
    return encode_json({**plain, "check": _check(plain)}, STATE)


def read(folder: Path) -> dict[str, Any]:
    """The state of a run folder, or an empty one where there is none, as in a folder that was copied in part.

    Raises:
        RunFolderError: it needs a newer prunekit.
        CheckpointError: it is damaged.
    """
    empty = {**fresh(), "status": "unknown", "pid": None, "host": None, "run": None}
    path = folder / STATE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return empty
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os_error_reason(error)}; mend its permissions") from error
    try:
        state = decode_json(data)
        if isinstance(state, dict) and is_newer(state.get("format"), FORMAT):
            raise newer(path, state)
        _fits(state)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it and go on with --resume, which does the stages again from the "
            "training states that are there, or start again with --overwrite"
        ) from error
    return {**empty, **state}


def refuse_newer(folder: Path) -> None:
    """Raise RunFolderError where state or summary are of a newer prunekit, CheckpointError where their formats are
    none."""
    for name in (STATE, SUMMARY):
        try:
            held = decode_json((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # What cannot be read here is told by whoever needs it.
        if isinstance(held, dict) and (fault := format_problem(held.get("format", FORMAT), FORMAT)):
            if is_newer(held.get("format"), FORMAT):
                raise newer(folder / name, held)
            raise CheckpointError(f"{folder / name} {fault}; start again with --overwrite")


def newer(path: Path, held: dict[str, Any]) -> RunFolderError:
    """What is said of a file of a later format."""
    by = held.get("prunekit")
    needed = f"prunekit {by}" if isinstance(by, str) else "a newer prunekit"
    return RunFolderError(
        f"{path} {format_problem(held['format'], FORMAT)}; it was written by {needed} and needs that or a later one: "
        "pip install --upgrade prunekit"
    )


def _check(plain: dict[str, Any]) -> str:
    return sha256(encode_json(plain, STATE))


def _fits(state: Any) -> None:
    """Raise ValueError for what is no state; states of earlier prunekits have neither ``run`` nor ``check``."""
    if not isinstance(state, dict):
        raise ValueError("it is no state of a run")
    if (fault := format_problem(state.get("format"), FORMAT)) is not None:
        raise ValueError(fault.removeprefix("is damaged (").removesuffix(")"))
    if "check" in state and _check({k: v for k, v in state.items() if k != "check"}) != state["check"]:
        raise ValueError("it is not what was written")
    sums = [state.get("checksums"), state.get("replacing", {})]
    texts = all(isinstance(one, dict) and all(isinstance(value, str) for value in one.values()) for one in sums)
    if not (texts and isinstance(state.get("done"), list)):
        raise ValueError("it is no state of a run")
    for name in (name for one in sums for name in one):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it speaks of {name!r}, which is not in the folder")
