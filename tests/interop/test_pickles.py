import builtins
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from helpers.in_a_child import in_a_child
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.errors import CheckpointError
from prunekit.interop import pickles
from prunekit.interop.pickles import read_checkpoint, read_layout, write_checkpoint, write_layout


class Calls:
    """Pickled as a function call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Nested:
    """Pickled as a call whose argument is another call."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return list, ([self.inner],)


def hostile(mark):
    """Pickles that create the file ``mark`` if their code runs."""
    system = Calls(os.system, f"touch {mark}")
    evaluates = Calls(builtins.eval, f"open({str(mark)!r}, 'w').close()")
    loader = Calls(np.load, str(mark))
    return {"system": system, "eval": evaluates, "load": loader, "nested": Nested(system)}


NAMES = {"system": "posix.system", "eval": "eval", "load": "load", "nested": "list"}


@pytest.mark.parametrize("kind", sorted(NAMES))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_layout_that_calls_a_function_is_rejected(tmp_path, kind, protocol):
    mark, file = tmp_path / "mark", tmp_path / "a.bin"
    for value in (hostile(mark)[kind], [[3, hostile(mark)[kind]]]):
        file.write_bytes(pickle.dumps(value, protocol=protocol))
        with pytest.raises(CheckpointError, match=rf"asks to run \S*{NAMES[kind]}.*not run") as error:
            read_layout(file)
        assert "\n" not in str(error.value) and not mark.exists()


@pytest.mark.parametrize("kind", ["system", "eval", "load", "nested"])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_checkpoint_that_calls_a_function_is_rejected(tmp_path, kind, form):
    mark, file = tmp_path / "mark", tmp_path / "a.pth.tar"
    value = {"state_dict": {"a": torch.ones(1)}, "epoch": hostile(mark)[kind]}
    torch.save(value, file, _use_new_zipfile_serialization=form == "zip")
    names = {**NAMES, "nested": "system|list"}
    with pytest.raises(CheckpointError, match=rf"asks to run \S*({names[kind]}).*not run") as error:
        read_checkpoint(file)
    assert "\n" not in str(error.value) and not mark.exists()


def test_object_arrays_are_rejected(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(pickle.dumps([np.array([1, "a"], object)]))
    with pytest.raises(CheckpointError, match="not a layout"):
        read_layout(file)


@pytest.mark.parametrize("value", [{"a": 1}, "text", 3, [None], [[True]], [[[[[[1]]]]]], [set()]])
def test_other_values_than_numbers_are_rejected(tmp_path, value):
    file = tmp_path / "a.bin"
    file.write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError):
        read_layout(file)


@given(
    st.lists(
        st.lists(
            st.lists(st.integers(0, 200).map(float), min_size=1, max_size=4).map(np.array), min_size=2, max_size=3
        ),
        max_size=5,
    )
)
def test_layout_round_trip(tmp_path_factory, layout):
    file = tmp_path_factory.mktemp("layout") / "a.bin"
    file.write_bytes(write_layout([*layout, [3, 4, 6, 4]]))
    assert b"numpy._core" not in file.read_bytes()
    content = read_layout(file)
    assert content[-1] == [3, 4, 6, 4]
    for a, b in zip(content, layout, strict=False):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    # An ordinary unpickler reads it too.
    assert len(pickle.loads(file.read_bytes())) == len(layout) + 1


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_random_bytes_raise_checkpoint_errors(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("fuzz") / "a"
    for content in (data, b"\x80\x03" + data, b"PK\x03\x04" + data):
        file.write_bytes(content)
        for read in (read_layout, read_checkpoint):
            try:
                read(file)
            except CheckpointError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_rejected(tmp_path, share):
    layout = write_layout([[3, np.array([1.0, 2.0])]] * 20)
    checkpoint = write_checkpoint({"a": torch.randn(50, 50)})
    for data, read in ((layout, read_layout), (checkpoint, read_checkpoint)):
        file = tmp_path / "a"
        file.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CheckpointError, match="download it again"):
            read(file)


def test_missing_or_wrong_files(tmp_path):
    for read in (read_layout, read_checkpoint):
        with pytest.raises(CheckpointError, match="does not exist"):
            read(tmp_path / "none")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(tmp_path)
    file = tmp_path / "a"
    file.write_bytes(bytes(2_000_000))
    with pytest.raises(CheckpointError, match="Is it another file"):
        read_layout(file)
    buffer = io.BytesIO()
    torch.save({"epoch": 3}, buffer)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="has no state dict"):
        read_checkpoint(file)


def test_data_parallel_prefix_is_removed(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(write_checkpoint({"module.a": torch.ones(2), "module.b": torch.zeros(1)}))
    assert set(read_checkpoint(file)) == {"a", "b"}


def archived(state, compression=zipfile.ZIP_STORED, again=0):
    """A checkpoint with compressed members, or with its largest member listed several times."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(write_checkpoint(state))) as old, zipfile.ZipFile(out, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        new.filelist.extend([max(new.filelist, key=lambda member: member.file_size)] * again)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (archived({"a": torch.zeros(1 << 20)}, zipfile.ZIP_DEFLATED), "members are compressed"),
        (archived({"a": torch.zeros(9000)}, again=90), "claim to be larger than the file"),
        (write_checkpoint({"a": torch.ones(1).expand(10**9)}), "claims more numbers than it has"),
        (write_checkpoint({1: torch.ones(1)}), "tensors without names"),
    ],
    ids=["packed", "overlapping", "one number for many", "no names"],
)
def test_checkpoint_larger_when_read_is_rejected(tmp_path, data, words):
    file = tmp_path / "a"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(file)


def folded(value, levels):
    for _ in range(levels):
        value = [value] * 1000
    return pickle.dumps(value, protocol=3)


GLOBAL = b"cnumpy.core.multiarray\n_reconstruct\n"
GROWING = {
    "lists of lists": (folded(1.0, 4), "more than 100000 numbers"),
    "an array named often": (folded(np.zeros(100), 1), "more than 100000 numbers"),
    "room for 64 GB": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b".", "not a layout"),
    "attributes of a function": (b"\x80\x02" + GLOBAL + b"N}U\x0c__defaults__)s\x86b0].", "not a layout"),
    "many digits": (b"I" + b"9" * 60_000 + b"\n.", "not a layout"),
    "a deep list": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested too deeply"),
}


@pytest.mark.parametrize("kind", GROWING)
def test_layout_larger_when_read_is_rejected(tmp_path, kind):
    file = tmp_path / "a.bin"
    data, words = GROWING[kind]
    file.write_bytes(data)

    def read():
        with pytest.raises(CheckpointError, match=words):
            read_layout(file)

    assert in_a_child(read, memory=1 << 29, seconds=10) < 200 << 20
    read()
    assert pickles._reconstruct.__defaults__ is None
