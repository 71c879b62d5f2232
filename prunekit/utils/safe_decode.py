"""Decode untrusted JSON, ``.npz`` and safetensors files.

For any input, each function returns plain values or numeric arrays, or raises ValueError with a message. It allocates
at most a small multiple of the input's size: sizes in headers are compared with the actual size first.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from prunekit.utils.text import one_line

# Parsed JSON takes up to 30 times the memory of its text; the largest plans have a few MB.
MAX_JSON_BYTES = 1 << 26
_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


def decode_json(data: bytes | str) -> Any:
    """Return the value of a JSON text in UTF-8; numbers may be NaN or infinite, strings have no lone surrogates."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES >> 20} MiB of JSON")
    text = data.decode() if isinstance(data, bytes) else data
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string contains half a surrogate pair") from None
    return value


def decode_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Return the numeric arrays of an uncompressed ``.npz`` file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                    raise ValueError(f"{member.filename[:60]!r} is compressed or encrypted")
            # Members may overlap.
            if sum(member.file_size for member in members) > len(data):
                raise ValueError("its members claim to be larger than the file")
            return {member.filename.removesuffix(".npy"): _decode_array(archive.read(member)) for member in members}
    except ValueError:
        raise
    except Exception as error:  # zipfile raises many types for damaged archives.
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _decode_array(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
        if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or dtype.kind not in "biufcUS":
            raise ValueError(f"an array of type {dtype.kind!r}, which is not numeric")
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise ValueError("an array with an invalid shape")
        rest = data[file.tell() :]
        if math.prod(shape) * dtype.itemsize != len(rest):
            raise ValueError(f"an array of {len(rest)} bytes claims the shape {shape}"[:200])
        flat = np.frombuffer(rest, dtype) if rest else np.empty(0, dtype)
        return flat.reshape(shape, order="F" if fortran else "C").copy()
    except ValueError:
        raise
    except Exception as error:  # NumPy evaluates the header as a Python literal, which may raise anything.
        raise ValueError(f"a damaged array ({type(error).__name__})") from None


def decode_tensors(data: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file."""
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(one_line(error)[:300]) from None
