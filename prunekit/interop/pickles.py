"""Pickles from strangers, read without running anything they say.

A pickle is a program: it may name any function and call it. A checkpoint is read by PyTorch's own restricted reader. A
layout is read here: three names are known, and even those stand for plain records, so that NumPy never sees what the
file says.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import CheckpointError

LARGEST_LAYOUT = 1 << 20  # bytes; the published ones have 4 kB
LARGEST_CHECKPOINT = 1 << 30  # bytes; the published ones have 4 MB
MOST_NUMBERS = 100_000  # in a layout, each counted as often as the lists and arrays that hold it are named
_KINDS = {"f4": 4, "f8": 8, "i4": 4, "i8": 8}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a published checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, names a function, or holds no state dict.
    """
    data = _bytes(path, LARGEST_CHECKPOINT)
    try:
        _check_archive(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"`?(\S+?)`? was not an allowed", str(error))
        if found:
            raise CheckpointError(
                f"{path} asks to run {found[1].strip('`')}, which no checkpoint needs; it was not run, and is not read"
            ) from None
        raise CheckpointError(f"{path} is no PyTorch checkpoint or is damaged; get it again") from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, IndexError, zipfile.BadZipFile) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no PyTorch checkpoint or is cut off ({reason}); get it again") from None
    except Exception as error:  # A damaged pickle makes the reader stumble in any way.
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); get it again") from None
    state = held.get("state_dict", held) if isinstance(held, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict; give a file with the key 'state_dict'")
    # Tensors may share their numbers, and one number may stand for a whole tensor.
    if sum(value.numel() * value.element_size() for value in state.values()) > len(data):
        raise CheckpointError(f"{path} claims more numbers than it holds; get it again")
    prefix = "module."
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} has tensors without names; give a file with the key 'state_dict'")
    if all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value.detach() for name, value in state.items()}


def _check_archive(data: bytes) -> None:
    """Raise ValueError for a zip that would grow when it is read: PyTorch stores its members as they are."""
    if data[:4] != b"PK\x03\x04":
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed")
    if sum(member.file_size for member in members) > len(data):
        raise ValueError("its members claim to be larger than the file")


def write_checkpoint(state: dict[str, Tensor]) -> bytes:
    """A checkpoint as the published ones are."""
    buffer = io.BytesIO()
    torch.save({"epoch": 0, "arch": "csnet", "state_dict": state, "optimizer": {}}, buffer)
    return buffer.getvalue()


def read_layout(path: Path) -> list[Any]:
    """A layout file: lists of numbers and numeric arrays, nested as in the file.

    Raises:
        CheckpointError: the file is missing or damaged, or names a function.
    """
    data = _bytes(path, LARGEST_LAYOUT)
    if not data.endswith(pickle.STOP):
        raise CheckpointError(f"{path} is no layout or is cut off; get it again")
    try:
        held = _plain(_Reader(io.BytesIO(data)).load(), [MOST_NUMBERS])
    except _Refused as error:
        raise CheckpointError(
            f"{path} asks to run {error}, which no layout needs; it was not run, and is not read"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply for a layout") from None
    except Exception as error:  # A damaged pickle makes the reader stumble in any way.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no layout or is damaged ({reason}); get it again") from None
    if not isinstance(held, list):
        raise CheckpointError(f"{path} is no layout: it holds no list")
    return held


def write_layout(layout: list[Any]) -> bytes:
    """A layout file as the published ones are: float64 arrays, under the names that NumPy 1 gave them."""
    return pickle.dumps(layout, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


class _Refused(Exception):
    """The pickle named something that is not known."""


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, kind: str = "", *_: Any):
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands for numpy.ndarray."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    @property
    def size(self) -> int:
        """At most as many numbers are in it."""
        return max(1, len(self.state[-1]))

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _Dtype) or dtype.kind not in _KINDS or not isinstance(data, bytes):
            raise ValueError("an array of no numbers")
        if not isinstance(shape, tuple) or not all(isinstance(side, int) and 0 <= side < 10_000 for side in shape):
            raise ValueError("an array of a strange shape")
        order = ">" if dtype.order == ">" else "<"
        flat = np.frombuffer(data, order + dtype.kind)
        return flat.reshape(shape, order="F" if fortran else "C").astype(np.float64)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


# The pure-Python unpickler: the one in C allocates whatever size a file names.
class _Reader(pickle._Unpickler):
    # What a file of numbers, lists and arrays is made of. Among the rest are opcodes that allocate what they are told,
    # and mappings, without which BUILD sets no attributes.
    dispatch: ClassVar = {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
            *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.FLOAT, pickle.BINFLOAT),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.UNICODE, pickle.BINUNICODE),
            *(pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.STRING, pickle.BINSTRING),
            *(pickle.SHORT_BINSTRING, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.GLOBAL, pickle.STACK_GLOBAL),
            *(pickle.REDUCE, pickle.BUILD, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
            *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def _plain(value: Any, left: list[int], depth: int = 0) -> Any:
    """The records as arrays; anything but numbers, lists and arrays is refused, and more than ``left`` of them are."""
    if depth > 4:
        raise ValueError("lists nested too deeply")
    left[0] -= value.size if isinstance(value, _Array) else 1
    if left[0] < 0:
        raise ValueError(f"more than {MOST_NUMBERS} numbers")
    if isinstance(value, _Array):
        return value.array()
    if isinstance(value, list | tuple):
        return [_plain(part, left, depth + 1) for part in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise ValueError(f"it holds {type(value).__name__}")


def _bytes(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, more than the {most:,} that such a file may have; is it "
                "another one?"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there; give the path of the file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
