import io
import json
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
from helpers.in_a_child import in_a_child
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from safetensors.numpy import save

from prunekit.utils.safe_decode import decode_arrays, decode_json, decode_tensors

MEMORY = 512 << 20  # bytes of address space that a hostile file may take


def archive(members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def array(value):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(value), allow_pickle=True)
    return buffer.getvalue()


def header(text, data=b""):
    body = text.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body + data


def tensors(header, data=b"", length=None):
    body = header.encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


HOSTILE_ARRAYS = {
    "a pickle": (archive({"a.npy": array(np.array([{}], object))}), "not numeric"),
    "a bomb": (archive({"a.npy": bytes(1 << 22)}, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "a giant shape": (
        archive({"a.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}")}),
        "claims the shape",
    ),
    "an itemsize of zero": (
        archive({"a.npy": header("{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000,)}")}),
        ".",
    ),
    "a negative shape": (
        archive({"a.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}")}),
        "invalid shape",
    ),
    "records": (archive({"a.npy": array(np.zeros(2, [("x", "f4")]))}), "not numeric"),
    "nested": (archive({"a.npy": header("(" * 9000)}), "."),
    "a call": (archive({"a.npy": header("__import__('os').system('false')")}), "."),
    "no archive": (b"PK\x03\x04nothing", "BadZipFile"),
    "empty": (b"", "BadZipFile"),
}


@pytest.mark.parametrize("kind", HOSTILE_ARRAYS)
def test_hostile_arrays(kind):
    data, words = HOSTILE_ARRAYS[kind]
    with pytest.raises(ValueError, match=words):
        decode_arrays(data)


def test_overlapping_members():
    data = bytearray(archive({"a.npy": array(np.zeros(1 << 16))}))
    # A second entry of the directory for the same member.
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, end + 16)[0]
    entry = bytes(data[start:end])
    forged = data[:start] + entry * 50 + data[end:]
    end += 49 * len(entry)
    struct.pack_into("<HHI", forged, end + 8, 50, 50, 50 * len(entry))
    with pytest.raises(ValueError, match="larger than the file"):
        decode_arrays(bytes(forged))


DTYPES = st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_, np.complex64])


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0\\"), min_size=1, max_size=9)
ARRAYS = nps.arrays(DTYPES, nps.array_shapes(min_dims=0, min_side=0))


@given(st.dictionaries(NAMES, ARRAYS, max_size=3))
def test_arrays_round_trip(arrays):
    arrays = {name.replace(".npy", ""): value for name, value in arrays.items()}
    back = decode_arrays(archive({f"{name}.npy": array(value) for name, value in arrays.items()}))
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        np.testing.assert_array_equal(back[name], value)
        assert back[name].flags.writeable


HOSTILE_TENSORS = {
    "a header of 2^60 bytes": tensors("{}", length=1 << 60),
    "a tensor of 2^50 numbers": tensors(
        '{"a":{"dtype":"F32","shape":[1125899906842624],"data_offsets":[0,4503599627370496]}}'
    ),
    "offsets that overlap": tensors(
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "a shape that overflows": tensors('{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}'),
    "no header": b"",
    "no JSON": tensors("{" * 50),
    "nested": tensors('{"__metadata__":' + "[" * 100_000),
    "a pickle": pickle.dumps([1]),
    "an unknown dtype": tensors('{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,1]}}', b"1"),
}


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_hostile_tensors(kind):
    with pytest.raises(ValueError, match=r"."):
        decode_tensors(HOSTILE_TENSORS[kind])


def test_tensors_round_trip():
    expected = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3)}
    back = decode_tensors(save(expected))
    assert all(np.array_equal(back[name], value) for name, value in expected.items())


HOSTILE_JSON = {
    "deep lists": b"[" * 100_000,
    "deep mappings": b'{"a":' * 50_000,
    "half a surrogate pair": b'"\\ud800"',
    "half a key": b'{"\\uDfff": 1}',
    "half in bytes": b'"\xed\xa0\x80"',
    "many digits": b"1" * 5000,
    "no UTF-8": b"\xff",
    "nothing": b"",
    "no JSON": b"nul",
}


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_hostile_json(kind):
    with pytest.raises(ValueError, match=r"."):
        decode_json(HOSTILE_JSON[kind])


def test_json_round_trip():
    value = {"a": [1, 2.5, None, True, "\U0001f600 \\ud800"]}
    assert decode_json(json.dumps(value)) == decode_json(json.dumps(value, ensure_ascii=False).encode()) == value
    with pytest.raises(ValueError, match="MiB of JSON"):
        decode_json(b" " * ((1 << 26) + 1))


def test_hostile_files_take_little_memory():
    def read():
        for data, _ in HOSTILE_ARRAYS.values():
            refused(decode_arrays, data)
        for data in HOSTILE_TENSORS.values():
            refused(decode_tensors, data)

    def refused(reader, data):
        try:
            reader(data)
        except ValueError:
            return
        raise AssertionError("read")

    assert in_a_child(read, memory=MEMORY, seconds=20) < 300 << 20
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
