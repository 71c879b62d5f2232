"""Read untrusted pickles without running code from them: published checkpoints and layouts."""

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
from prunekit.utils.text import did_you_mean, first_line

MAX_LAYOUT_BYTES = 1 << 20  # The published ones have 4 kB.
MAX_CHECKPOINT_BYTES = 1 << 30  # The published ones have 4 MB.
MAX_NUMBERS = 100_000  # In a layout; a number in a list that is referenced twice counts twice.
_DTYPES = ("f4", "f8", "i4", "i8")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a published checkpoint; raise CheckpointError if damaged or naming a function."""
    data = _read_bytes(path, MAX_CHECKPOINT_BYTES)
    try:
        _check_archive(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"`?(\S+?)`? was not an allowed", str(error))
        if name:
            raise CheckpointError(
                f"{path} asks to run {name[1].strip('`')}, which no checkpoint needs; it was not run, and the file is "
                "rejected"
            ) from None
        raise CheckpointError(f"{path} is not a PyTorch checkpoint or is damaged; download it again") from None
    except Exception as error:  # A damaged pickle can raise anything.
        raise CheckpointError(
            f"{path} is not a PyTorch checkpoint or is damaged ({first_line(error)}); download it again"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} has no state dict; give a file with the key 'state_dict'")
    # Tensors may share storage, and an expanded tensor may repeat a single number.
    if sum(value.numel() * value.element_size() for value in state.values()) > len(data):
        raise CheckpointError(f"{path} claims more numbers than it has; download it again")
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} has tensors without names; give a file with the key 'state_dict'")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): value.detach() for name, value in state.items()}


def _check_archive(data: bytes) -> None:
    """Raise ValueError for a zip archive that is larger when read. PyTorch does not compress its members."""
    if data[:4] != b"PK\x03\x04":
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed")
    if sum(member.file_size for member in members) > len(data):
        raise ValueError("its members claim to be larger than the file")


def write_checkpoint(state: dict[str, Tensor]) -> bytes:
    """Write a checkpoint in the published format."""
    buffer = io.BytesIO()
    torch.save({"epoch": 0, "arch": "csnet", "state_dict": state, "optimizer": {}}, buffer)
    return buffer.getvalue()


def read_layout(path: Path) -> list[Any]:
    """Read a layout, nested lists of numbers and arrays; raise CheckpointError if damaged or naming a function."""
    data = _read_bytes(path, MAX_LAYOUT_BYTES)
    if not data.endswith(pickle.STOP):
        raise CheckpointError(f"{path} is not a layout or is cut off; download it again")
    try:
        content = _to_plain(_LayoutUnpickler(io.BytesIO(data)).load(), [MAX_NUMBERS])
    except _ForbiddenNameError as error:
        raise CheckpointError(
            f"{path} asks to run {error}, which no layout needs; it was not run, and the file is rejected"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply for a layout") from None
    except Exception as error:  # A damaged pickle can raise anything.
        raise CheckpointError(
            f"{path} is not a layout or is damaged ({first_line(error)}); download it again"
        ) from None
    if not isinstance(content, list):
        raise CheckpointError(f"{path} is not a layout: it has no list")
    return content


def write_layout(layout: list[Any]) -> bytes:
    """Write a layout in the published format: float64 arrays, with the module names of NumPy 1."""
    return pickle.dumps(layout, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


class _ForbiddenNameError(Exception):
    """The pickle refers to a name that is not in ``_KNOWN_NAMES``."""


class _Dtype:
    """A record in place of numpy.dtype."""

    def __init__(self, kind: str = "", *_: Any):
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """A record in place of numpy.ndarray."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _Dtype) or dtype.kind not in _DTYPES or not isinstance(data, bytes):
            raise ValueError("an array of another type than numbers")
        if not isinstance(shape, tuple) or not all(isinstance(side, int) and 0 <= side < 10_000 for side in shape):
            raise ValueError("an array with an invalid shape")
        order = ">" if dtype.order == ">" else "<"
        flat = np.frombuffer(data, order + dtype.kind)
        return flat.reshape(shape, order="F" if fortran else "C").astype(np.float64)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_KNOWN_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


# The unpickler in pure Python: the one in C allocates any size that a file names.
class _LayoutUnpickler(pickle._Unpickler):
    # Only the opcodes of numbers, lists and arrays. Others allocate any size, or create mappings, with which BUILD sets
    # attributes.
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
            return _KNOWN_NAMES[module, name]
        except KeyError:
            raise _ForbiddenNameError(f"{module}.{name}") from None


def _to_plain(value: Any, remaining: list[int], depth: int = 0) -> Any:
    """Convert records to arrays; raise ValueError for other types, and for more than ``remaining`` numbers."""
    if depth > 4:
        raise ValueError("lists nested too deeply")
    # The number of bytes is an upper bound of the number of elements.
    remaining[0] -= max(1, len(value.state[-1])) if isinstance(value, _Array) else 1
    if remaining[0] < 0:
        raise ValueError(f"more than {MAX_NUMBERS} numbers")
    if isinstance(value, _Array):
        return value.array()
    if isinstance(value, list | tuple):
        return [_to_plain(part, remaining, depth + 1) for part in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise ValueError(f"it has a {type(value).__name__}")


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path} has {size:,} bytes; at most {limit:,} are expected. Is it another file?")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist{did_you_mean(path)}; give the path of the file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
