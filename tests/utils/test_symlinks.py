import json
import os

import pytest
from helpers.fake_run import write_run

from prunekit.cli import main
from prunekit.errors import RunFolderError
from prunekit.reporting import load_run
from prunekit.runs.run_dir import RunDir
from prunekit.utils.symlinks import check_no_external_links


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "one")


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("not yours")
    return folder


PATHS = (
    "model.onnx",
    "lock",
    "metrics.jsonl",
    "state.json",
    "run.log",
    "dense/model.safetensors",
    "gallery/9-image.png",
)


@pytest.mark.parametrize("name", [*PATHS, "report", "exports", "checkpoints", "report/deep/er"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "dangling", "through another"])
def test_links_out_of_the_folder_are_rejected(run, outside, name, kind):
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    target = outside if name in ("report", "exports", "checkpoints") else outside / "file"
    if kind == "relative":
        target = os.path.relpath(target, path.parent)
    elif kind == "dangling":
        target = outside / "new"
    elif kind == "through another":
        (run / "inner").symlink_to(outside)
        target = run / "inner" / "file"
    path.symlink_to(target)
    for act in (
        lambda: RunDir.open(run),
        lambda: RunDir.open(run, write=True),
        lambda: RunDir.start(run, "name: one\n", {}, resume=True),
        lambda: load_run(run),
    ):
        with pytest.raises(RunFolderError, match=r"leads out of the run folder") as error:
            act()
        assert str(path if kind != "through another" else run / "inner") in str(error.value) or str(path) in str(
            error.value
        )
        assert "\n" not in str(error.value)
    assert [entry.name for entry in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "not yours"


def test_commands_do_not_write_through_links(run, outside, capsys):
    (run / "report").symlink_to(outside)
    for command in (
        ["report"],
        ["watch", "--once"],
        ["bench"],
        ["export", "--format", "onnx"],
        ["eval", "--data", "a=b"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([command[0], str(run), *command[1:]])
        assert stop.value.code == 2 and "leads out of the run folder" in capsys.readouterr().err
    assert [entry.name for entry in outside.iterdir()] == ["file"]


def test_overwrite_removes_links_and_not_their_targets(run, outside):
    (run / "lock").symlink_to(outside / "file")
    with pytest.raises(RunFolderError, match="cannot lock"):
        RunDir.start(run, "name: one\n", {}, overwrite=True)
    (run / "lock").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(outside / "file")
    RunDir.start(run, "name: one\n", {}, overwrite=True).close()
    assert (outside / "file").read_text() == "not yours" and not (run / "metrics.jsonl").is_symlink()


def test_pipes_are_rejected(run):
    os.mkfifo(run / "eval.json")
    with pytest.raises(RunFolderError, match=r"eval\.json is neither a file nor a folder"):
        RunDir.open(run)


def test_links_within_the_folder_and_to_it_are_allowed(run, tmp_path):
    (run / "latest.json").symlink_to("summary.json")
    (tmp_path / "link").symlink_to(run)
    check_no_external_links(tmp_path / "link")
    assert RunDir.open(tmp_path / "link").read_json("latest.json")["status"] == "complete"


def test_control_characters_in_names_are_not_printed(run, outside):
    (run / "a\x1b[2J\nb").symlink_to(outside)
    with pytest.raises(RunFolderError) as error:
        RunDir.open(run)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x"])
def test_file_names_must_stay_within_the_run(run, name):
    with RunDir.open(run, write=True) as held:
        for act in (held.read_bytes, held.has, lambda n: held.write_bytes(n, b"")):
            with pytest.raises(ValueError, match="not a path inside"):
                act(name)


def test_gallery_index_cannot_name_files_elsewhere(run):
    index = run / "gallery" / "index.json"
    entry = {"index": 0, "name": "../../../etc/passwd", "image": "/etc/passwd", "files": {"image": "../x"}}
    index.write_text(json.dumps([entry]))
    (run / "state.json").unlink()
    for example in load_run(run).gallery:
        assert all(path.parent == run / "gallery" for path in example.files.values())
