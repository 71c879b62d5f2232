"""Files of a run folder after kills, full disks and flipped bits."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prunekit.errors import CheckpointError, RunFolderError, WriteError
from prunekit.runs import state
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES
from prunekit.utils import io

RECIPE = "name: tiny\nseed: 0\ntrain:\n  lr: 1e-3\n"


@pytest.fixture
def run(tmp_path):
    with RunDir.start(tmp_path / "run", RECIPE, {"threads": 1}) as made:
        yield made


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def leftovers(path: Path) -> list[Path]:
    return list(path.rglob(f"{io.TEMP_PREFIX}*"))


# ---- files

WRITES = {
    "text": lambda run, v: run.write_text("sub/a.txt", f"{v}"),
    "json": lambda run, v: run.write_json("sub/a.json", {"v": v}),
    "arrays": lambda run, v: run.write_arrays("sub/a.npz", {"v": np.full(3, v)}),
    "tensors": lambda run, v: run.write_tensors("sub/a.safetensors", {"v": np.full(3, v)}),
    "metrics": lambda run, v: run.append_metrics({"stage": "train", "epoch": v}),
    "summary": lambda run, v: run.update_summary("part", v),
    "seconds": lambda run, v: run.add_seconds("train", v),
    "begin": lambda run, v: run.begin(STAGES[v]),
    "end": lambda run, v: run.end(STAGES[v]),
    "checkpoint": lambda run, v: run.save_checkpoint("train", v, {"v": np.full(3, v)}, {"v": v}, 1),
}


def failing(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


def readable(run: RunDir) -> None:
    """Read every file that has a checksum."""
    fresh = RunDir.open(run.path)
    for name in json.loads((run.path / "state.json").read_text())["checksums"]:
        fresh.read_bytes(name)
    fresh.read_metrics()


# Metrics are appended, so nothing is replaced there.
FAILURES = [(n, call) for n in WRITES for call in ("open", "fsync", "replace") if (n, call) != ("metrics", "replace")]


@pytest.mark.parametrize(("name", "call"), FAILURES)
def test_failed_write_leaves_old_files_and_no_temporary_ones(run, monkeypatch, name, call):
    write = WRITES[name]
    write(run, 1)
    before = contents(run.path)
    with monkeypatch.context() as patch:
        if call == "open":
            for module in ("prunekit.utils.io.open", "prunekit.runs.artifacts.open"):
                patch.setattr(module, failing, raising=False)
        else:
            patch.setattr(os, call, failing)
        with pytest.raises(WriteError) as error:
            write(run, 2)
    assert str(run.path) in one_line(error) and "No space left on device; free space" in one_line(error)
    assert error.value.exit_status == 3
    after = contents(run.path)
    # Except state.json, which records what a file will be before it is written.
    assert {k: v for k, v in after.items() if k != "state.json"} == {
        k: v for k, v in before.items() if k != "state.json"
    }
    assert not leftovers(run.path)
    readable(run)
    write(run, 2)
    readable(run)


class Killed(BaseException):
    """Simulates SIGKILL: once raised, every later system call raises it too."""


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_kill_between_any_two_calls_leaves_readable_folder(tmp_path, write):
    for moment in range(100):
        with RunDir.start(tmp_path / str(moment), RECIPE, {}) as run:
            write(run, 1)
            left = moment

            def counted(call):
                def count(*args, **options):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return call(*args, **options)

                return count

            with pytest.MonkeyPatch.context() as patch:
                for name in ("replace", "fsync", "unlink"):
                    patch.setattr(os, name, counted(getattr(os, name)))
                try:
                    write(run, 2)
                except Killed:
                    survived = False
                else:
                    survived = True
            readable(run)
            if write is WRITES["checkpoint"]:
                tensors, state = run.load_checkpoint("train")
                assert state["v"] == tensors["v"][0] and state["v"] in (1, 2)
            if survived:
                assert moment > 0
                return
    pytest.fail("the write never ended")


def test_files_get_default_permissions(run):
    mask = os.umask(0o022)
    try:
        path = run.write_text("a.txt", "")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("name", "stage"), [("extract/plan.json", "extract"), ("dense/model.safetensors", "train"), ("x", None)]
)
def test_flipped_bit_is_reported_with_stage_to_repeat(run, name, stage):
    data = bytearray(run.write_bytes(name, b"[1, 2, 3]").read_bytes())
    data[1] ^= 1
    (run.path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        RunDir.open(run.path).read_bytes(name)
    assert name in one_line(error) and "damaged" in one_line(error) and "--overwrite" in one_line(error)
    assert stage is None or f"--from {stage}" in one_line(error)
    (run.path / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        run.read_bytes(name)


@pytest.mark.parametrize("read", ["read_json", "read_arrays", "read_tensors"])
@pytest.mark.parametrize("data", [b"", b"{", b"PK\x03\x04", b"\xff" * 20, b"\x93NUMPY", b"[1"])
def test_damaged_file_without_checksum_is_named(run, read, data):
    (run.path / "odd").write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        getattr(run, read)("odd")
    assert "odd" in one_line(error)


def test_pickles_are_neither_written_nor_read(run):
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        run.write_arrays("a.npz", {"a": np.array([{}], dtype=object)})
    np.savez(run.path / "evil.npz", a=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError):
        run.read_arrays("evil.npz")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, -np.inf])])
def test_non_finite_number_is_refused_with_its_key(run, value):
    with pytest.raises(CheckpointError) as error:
        run.write_json("a.json", {"metrics": [{"mae": value}]})
    assert "metrics[0].mae" in one_line(error)
    assert not (run.path / "a.json").exists()
    with pytest.raises(CheckpointError):
        run.append_metrics({"loss": value})
    assert run.read_metrics() == []


def test_names_outside_the_folder_are_refused(run):
    for name in ("../a", "/tmp/a", "a/../../b"):
        with pytest.raises(ValueError, match="inside"):
            run.write_text(name, "")


def test_more_than_one_metadata_key_is_refused(run):
    with pytest.raises(ValueError, match="one key"):
        run.write_tensors("a.safetensors", {}, {"a": "1", "b": "2"})


SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)
ARRAYS = st.dictionaries(
    st.text("abcfile._0", min_size=1, max_size=6),
    arrays.arrays(st.sampled_from([np.float32, np.int64, np.bool_]), SHAPES),
    max_size=3,
)


@settings(max_examples=15)
@given(ARRAYS)
def test_arrays_and_tensors_round_trip(values):
    with tempfile.TemporaryDirectory() as folder, RunDir.start(folder, RECIPE, {}) as run:
        for write, read in ((run.write_arrays, run.read_arrays), (run.write_tensors, run.read_tensors)):
            first = write("a", {k: v.T for k, v in values.items()}).read_bytes()
            back = read("a")
            assert set(back) == set(values)
            for key, value in values.items():
                assert back[key].dtype == value.dtype and back[key].shape == value.T.shape
                np.testing.assert_array_equal(back[key], value.T)
            assert write("a", {k: v.T for k, v in values.items()}).read_bytes() == first


def test_failed_replacement_keeps_old_and_new_content_valid(run, monkeypatch):
    path = run.write_text("a.txt", "old")

    def refused(written, data):
        if written == path:
            failing()
        io.write_atomic(written, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("prunekit.runs.artifacts.write_atomic", refused)
        run.write_text("a.txt", "new")
    run.close()
    held = (run.path / "state.json").read_bytes()
    assert "replacing" in json.loads(held)
    for text, holds in (("old", True), ("new", True), ("odd", False)):
        path.write_text(text)
        for write in (False, True):
            (run.path / "state.json").write_bytes(held)
            with contextlib.closing(RunDir.open(run.path, write=write)) as opened:
                # Opening for writing records which of the two it is.
                assert write == ("replacing" not in json.loads((run.path / "state.json").read_text()))
                if holds:
                    assert opened.read_text("a.txt") == text
                    assert not write or opened.checksum("a.txt") == io.sha256(text.encode())
                else:
                    with pytest.raises(CheckpointError):
                        opened.read_text("a.txt")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_exit_status_of_write_errors(tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(CheckpointError) as error:
        io.write_atomic(tmp_path / "a", b"")
    mistake = number in (errno.EACCES, errno.EROFS, errno.ENOTDIR)
    assert error.value.exit_status == (2 if mistake else 3) and ("permissions" in one_line(error)) == mistake


def test_missing_recorded_file_is_reported(run):
    run.write_text("extract/plan.json", "{}").unlink()
    assert run.has("extract/plan.json") and not run.has("layers.json")
    with pytest.raises(CheckpointError, match=r"extract/plan\.json is missing.*--from extract"):
        run.read_json("extract/plan.json")
    run.write_text("eval.json", "{}").unlink()
    assert not run.has("eval.json"), "which is the user's to remove"


# ---- state


@pytest.mark.parametrize("place", range(0, 600, 37))
def test_flipped_bit_in_state_is_reported(run, place):
    run.end("train")
    data = bytearray((run.path / "state.json").read_bytes())
    data[place % len(data)] ^= 1
    (run.path / "state.json").write_bytes(data)
    with pytest.raises((CheckpointError, RunFolderError), match=r"state\.json"):
        RunDir.open(run.path)


@pytest.mark.parametrize("name", ["../other/state.json", "/etc/hostname"])
def test_state_naming_files_outside_the_folder_is_refused(run, name):
    held = {**json.loads((run.path / "state.json").read_text()), "checksums": {name: "0" * 64}}
    (run.path / "state.json").write_bytes(state.encode(held))
    with pytest.raises(CheckpointError, match="which is outside the folder"):
        RunDir.open(run.path)


# ---- metrics


def test_metrics_are_verified_by_checksum(run):
    for epoch in range(1, 4):
        run.append_metrics({"stage": "train", "epoch": epoch, "loss": 0.5})
    path = run.path / "metrics.jsonl"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    more = b'{"stage": "train", "epoch": 4, "loss": 0.5}\n'
    # A kill can leave a line without its checksum, or half a line.
    for text in (good, good + more, good + more[:9], good + more + more[:9]):
        path.write_bytes(text)
        RunDir.open(run.path).read_metrics()
    bad = [good[:-9], b"".join(lines[:2]), b"".join(lines[1:]), b"".join(lines[::-1]), b"", good + more + more]
    for text in (*bad, good.replace(b"0.5", b"0.6", 1)):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged.*--from train"):
            RunDir.open(run.path).read_metrics()
        with pytest.raises(CheckpointError):
            run.append_metrics({"stage": "train", "epoch": 4, "loss": 0.5})
        assert path.read_bytes() == text


def test_truncate_works_on_damaged_metrics(run):
    run.append_metrics({"stage": "train", "epoch": 1})
    (run.path / "metrics.jsonl").write_bytes(b"{")
    run.truncate_metrics("train", 0)
    assert run.read_metrics() == []


def test_half_a_line_is_removed_before_the_next(run):
    run.append_metrics({"stage": "train", "epoch": 1})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "tr')
    assert len(RunDir.open(run.path).read_metrics()) == 1
    run.append_metrics({"stage": "train", "epoch": 2})
    assert [m["epoch"] for m in run.read_metrics()] == [1, 2]


def test_damaged_line_is_named(run):
    (run.path / "metrics.jsonl").write_text('{"stage": "train"}\n{oops}\n{}\n')
    with pytest.raises(CheckpointError) as error:
        run.read_metrics()
    assert "line 2" in one_line(error)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(STAGES), st.integers(1, 5))), st.sampled_from(STAGES), st.integers(0, 5))
def test_truncate_keeps_earlier_lines(lines, stage, epoch):
    with tempfile.TemporaryDirectory() as folder, RunDir.start(folder, RECIPE, {}) as run:
        for where, number in lines:
            run.append_metrics({"stage": where, "epoch": number})
        run.truncate_metrics(stage, epoch)
        order = STAGES.index
        expected = [(s, e) for s, e in lines if order(s) < order(stage) or (s == stage and e <= epoch)]
        assert [(m["stage"], m["epoch"]) for m in run.read_metrics()] == expected


# ---- summary


def test_update_and_remove_summary(run):
    run.update_summary("dense", {"params": np.int64(5)})
    run.update_summary("slim", {"params": 3})
    run.remove_summary("dense")
    run.remove_summary("dense")
    assert run.read_json("summary.json") == {"format": 2, "recipe": "tiny", "status": "running", "slim": {"params": 3}}
