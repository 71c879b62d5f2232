import os
from pathlib import Path

import pytest

from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import write_atomic


@pytest.fixture
def calls(monkeypatch):
    """Record fsync and rename calls with their files and sizes."""
    recorded = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        recorded.append(("fsync", path, None if path.is_dir() else path.stat().st_size))
        fsync(handle)

    def replaced(source, target):
        recorded.append(("replace", Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return recorded


@pytest.mark.parametrize("before", [None, b"old"])
def test_write_atomic_syncs_data_then_renames_then_syncs_folder(tmp_path, calls, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    write_atomic(path, b"x" * 100_000)
    (first, temporary, size), (then, source, target), (last, folder, _) = calls
    assert (first, then, last) == ("fsync", "replace", "fsync")
    assert temporary == source and target == path and size == 100_000 and folder == tmp_path
    assert path.read_bytes() == b"x" * 100_000


def test_new_folders_are_synced(tmp_path, calls):
    write_atomic(tmp_path / "a" / "b" / "file", b"x")
    folders = [path for kind, path, size in calls if kind == "fsync" and size is None]
    assert set(folders) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} and folders[-1] == tmp_path / "a" / "b"


def test_append_metrics_is_synced(tmp_path, calls):
    with RunDir.start(tmp_path / "run", "name: x\n", {}) as run:
        for number in (1, 2):
            calls.clear()
            run.append_metrics({"stage": "train", "epoch": number})
            path = run.path / "metrics.jsonl"
            assert calls[0] == ("fsync", path, path.stat().st_size)
            if number == 1:
                assert calls[1] == ("fsync", run.path, None)


def test_checkpoint_tensors_are_synced_before_their_checksum(tmp_path, calls):
    with RunDir.start(tmp_path / "run", "name: x\n", {}) as run:
        calls.clear()
        run.save_checkpoint("train", 1, {}, {}, keep=1)
        folder = run.path / "checkpoints"
        names = [path.name for kind, _, path in calls if kind == "replace"]
        assert names == ["train-0001.safetensors", "train-0001.json"]
        between = calls[[call[-1] for call in calls].index(folder / "train-0001.safetensors") + 1]
        assert between == ("fsync", folder, None)
