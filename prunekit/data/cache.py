"""Cache of decoded data sets: later runs map the tensors of a set from one file into memory.

The cache key covers the paths, sizes and modification times of the files and the image size, so that any change causes
the set to be read again. Sets that generate or bundle their images are not cached.
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

FORMAT = 2  # increment when the same files would give other tensors
PARTS = ("images", "targets", "sizes")
_CONTENTS = ("pair", "image", "target", "mask", "label", "encode_target", "empty_targets")


def data_folder(given: str) -> Path | None:
    """Return the folder of the cache for the recipe key ``data.cache``: None for "none", a default for "auto"."""
    if given == "none":
        return None
    return cache_folder() / "data" if given == "auto" else Path(given).expanduser()


def cached_tensors(
    pairs: ImageDataset, size: int, folder: Path | None, say: Callable[[str], None], keep: bool = True
) -> Tensors:
    """Return :func:`load_tensors` of a set, read from the cache if it is there, else written to it.

    Args:
        pairs: unreadable images are dropped from it if ``pairs.skip_errors``.
        size: height and width of the images in pixels.
        folder: from :func:`data_folder`; None disables the cache.
        keep: write to the cache.
        say: called with one line if the cached file is damaged or cannot be written.

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
            say(f"data: {error}; reading the images again")
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
        say(f"data: cannot write decoded images to {folder} ({why}); set data.cache to another folder, or to none")
    return tensors


def identity(pairs: ImageDataset, size: int) -> str | None:
    """Return the cache key of a set at one size, in hexadecimal; None if the set does not list its files.

    Raises:
        DataError: a file is missing.
    """
    kind = type(pairs)
    if any(_depth(kind, name) < _depth(kind, "files") for name in _CONTENTS):
        return None  # A subclass changes what is made of the files.
    digest = hashlib.sha256(
        f"{FORMAT} {kind.__module__}.{kind.__qualname__} {size} {pairs.skip_errors} {list(pairs.classes)}".encode()
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
                if pairs.skip_errors:
                    digest.update(b" gone")
                    continue
                raise DataError(f"cannot read {path}: {os_error_reason(error)}; restore it, or start again") from error
            where = f" {os.path.realpath(path)!r} {found.st_size} {found.st_mtime_ns}"
            digest.update(where.encode(errors="surrogateescape"))
    return digest.hexdigest()[:40]


def _depth(kind: type, name: str) -> int:
    """Return how many classes above ``kind`` the attribute is defined."""
    return next((depth for depth, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))


def _read(note: Path, store: Path) -> tuple[Tensors, list[int]]:
    """Return the mapped tensors and the indices of unreadable images; raise DataError if a file is damaged."""
    try:
        note_data: dict[str, Any] = json.loads(note.read_bytes())
        if note_data["sha256"] != _checksum(store):
            raise DataError(f"the decoded images in {store} are damaged")
        with safe_open(store, framework="pt") as file:
            tensors = Tensors(*(file.get_tensor(name) for name in PARTS))
        return tensors, [int(index) for index in note_data["gone"]]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"the decoded images in {store} cannot be used ({error})") from error


def _write(tensors: Tensors, gone: list[int], note: Path, store: Path) -> None:
    """Write the tensors, then the JSON that makes them valid."""
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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """Move the set to a GPU if it needs at most a quarter of the free memory; ``sizes`` stay on the CPU."""
    if device.type != "cuda":
        return tensors
    needed = tensors.images.nbytes + tensors.targets.nbytes
    if needed > 0.25 * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return Tensors(tensors.images.to(device), tensors.targets.to(device), tensors.sizes)
