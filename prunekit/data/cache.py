"""Sets of files, decoded once: the tensors of a set lie in a file from which later runs map them into memory.

A set is known by the paths, sizes and times of change of its files and by the size of its images; when any of them is
another, so is the name of the file, and the set is read anew. Sets that draw or carry their images are not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prunekit.data.datasets import ImageDataset, Tensors, load_tensors
from prunekit.errors import CheckpointError, DataError
from prunekit.utils.io import TEMP_PREFIX, cache_folder, encode_json, os_error_reason, write_atomic

FORMAT = 1  # grows when the same files would give other tensors
PARTS = ("images", "targets", "sizes")
_CONTENTS = ("pair", "image", "target", "mask", "label", "encode", "blank")
_PIECE = 1 << 22  # bytes read at once for a checksum


def data_folder(given: str) -> Path | None:
    """Where the recipe's ``data.cache`` keeps sets: None for "none", the user's cache folder for "auto"."""
    if given == "none":
        return None
    return cache_folder() / "data" if given == "auto" else Path(given).expanduser()


def cached_tensors(
    pairs: ImageDataset, size: int, folder: Path | None, say: Callable[[str], None], keep: bool = True
) -> Tensors:
    """The set at one size as :func:`load_tensors` reads it: from ``folder`` where it lies there, else put there.

    Args:
        pairs: loses, if tolerant, what could not be read when it was decoded.
        size: side of the images in pixels.
        folder: from :func:`data_folder`; None to read the files.
        keep: put it there.
        say: takes a line where the folder is of no use: its file is damaged, or cannot be written.

    Raises:
        DataError: as for ``load_tensors``.
    """
    key = identity(pairs, size) if folder is not None and len(pairs) else None
    if key is None:
        return load_tensors(pairs, size)
    note, store = folder / f"{key}.json", folder / f"{key}.safetensors"
    if note.is_file():
        try:
            tensors, gone = _read(note, store)
            pairs.drop(gone)
            return tensors
        except DataError as error:
            say(f"data: {error}; the images are read again")
    names = list(pairs.names)
    tensors = load_tensors(pairs, size)
    left = set(pairs.names)
    gone = [index for index, name in enumerate(names) if name not in left]
    if not keep:
        return tensors
    try:
        _write(tensors, gone, note, store)
    except (OSError, SafetensorError, CheckpointError) as error:
        why = os_error_reason(error) if isinstance(error, OSError) else str(error)
        say(f"data: decoded images cannot be kept in {folder} ({why}); set data.cache to a folder, or to none")
    return tensors


def identity(pairs: ImageDataset, size: int) -> str | None:
    """What tells this set at this size from all others, in hexadecimal; None where its files are not known.

    Raises:
        DataError: a file is gone.
    """
    kind = type(pairs)
    if any(_depth(kind, name) < _depth(kind, "files") for name in _CONTENTS):
        return None  # A subclass that makes something else of the files.
    digest = hashlib.sha256(
        f"{FORMAT} {kind.__module__}.{kind.__qualname__} {size} {pairs.tolerant} {list(pairs.classes)}".encode()
    )
    for index, name in enumerate(pairs.names):
        files = pairs.files(index)
        if files is None:
            return None
        digest.update(f"\n{name!r}".encode(errors="surrogateescape"))
        for path in files:
            try:
                found = os.stat(path)
            except OSError as error:
                if pairs.tolerant:
                    digest.update(b" gone")
                    continue
                raise DataError(f"cannot read {path}: {os_error_reason(error)}; restore it, or start again") from error
            where = f" {os.path.realpath(path)!r} {found.st_size} {found.st_mtime_ns}"
            digest.update(where.encode(errors="surrogateescape"))
    return digest.hexdigest()[:40]


def _depth(kind: type, name: str) -> int:
    """How many classes above this one its attribute is defined."""
    return next((depth for depth, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))


def _read(note: Path, store: Path) -> tuple[Tensors, list[int]]:
    """The tensors, mapped, and the places of what could not be read; raises DataError where anything is damaged."""
    try:
        told: dict[str, Any] = json.loads(note.read_bytes())
        if told["sha256"] != _checksum(store):
            raise DataError(f"the decoded images in {store} are damaged")
        with safe_open(store, framework="pt") as file:
            tensors = Tensors(*(file.get_tensor(name) for name in PARTS))
        return tensors, [int(index) for index in told["gone"]]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"the decoded images in {store} cannot be used ({error})") from error


def _write(tensors: Tensors, gone: list[int], note: Path, store: Path) -> None:
    """The note last: without it, or with another's, there is nothing to be found."""
    store.parent.mkdir(parents=True, exist_ok=True)
    temporary = store.with_name(f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        save_file({name: getattr(tensors, name).contiguous() for name in PARTS}, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        checksum = _checksum(temporary)
        os.replace(temporary, store)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    write_atomic(note, encode_json({"format": FORMAT, "sha256": checksum, "gone": gone}, note.name))


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def to_device(tensors: Tensors, device: torch.device, share: float = 0.25) -> Tensors:
    """The set in the accelerator's memory where it takes at most ``share`` of what is free there; else as it is.

    The sizes stay on the CPU, where augmentations draw their numbers.
    """
    if device.type != "cuda":
        return tensors
    needed = tensors.images.nbytes + tensors.targets.nbytes
    if needed > share * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return Tensors(tensors.images.to(device), tensors.targets.to(device), tensors.sizes)
