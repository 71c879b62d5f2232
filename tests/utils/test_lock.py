"""A lock notices that its folder has moved."""

import os

import pytest

from prunekit.errors import RunError
from prunekit.utils.lock import FolderLock


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "here").mkdir()
    lock = FolderLock(tmp_path / "here")
    lock.acquire()
    yield lock
    lock.release()


def test_a_folder_in_place_passes(lock, tmp_path, monkeypatch):
    lock.check_in_place()
    (tmp_path / "here/lock").unlink()
    lock.check_in_place()
    monkeypatch.chdir(tmp_path / "here")
    lock.check_in_place()


@pytest.mark.parametrize("removed", [False, True])
def test_a_folder_that_is_gone(lock, tmp_path, removed):
    if removed:
        (tmp_path / "here/lock").unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(RunError, match="removed; continue where" if removed else f"moved to {tmp_path / 'there'};"):
        lock.check_in_place()
    lock.release()
    assert not (tmp_path / "there/lock").exists() and not (tmp_path / "here").exists()


def test_the_lock_of_another_process_stays(lock, tmp_path, monkeypatch):
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/lock").write_text("another")
    # As on systems that do not tell where the file is.
    monkeypatch.setattr(os, "readlink", lambda _: str(tmp_path / "none"))
    with pytest.raises(RunError, match="moved or removed"):
        lock.check_in_place()
    lock.release()
    assert (tmp_path / "here/lock").read_text() == "another"
