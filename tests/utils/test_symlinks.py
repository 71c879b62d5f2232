"""Links that a run folder from somebody else may hold: nothing is read or written through them."""

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


PLACES = (
    "model.onnx",
    "lock",
    "metrics.jsonl",
    "state.json",
    "run.log",
    "dense/model.safetensors",
    "gallery/9-image.png",
)


@pytest.mark.parametrize("place", [*PLACES, "report", "exports", "checkpoints", "report/deep/er"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "dangling", "through another"])
def test_a_link_that_leads_out_is_refused_by_name(run, outside, place, kind):
    path = run / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    target = outside if place in ("report", "exports", "checkpoints") else outside / "file"
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


def test_commands_write_nothing_through_it(run, outside, capsys):
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


def test_overwrite_takes_the_links_away_and_truncates_nothing(run, outside):
    (run / "lock").symlink_to(outside / "file")
    with pytest.raises(RunFolderError, match="cannot lock"):
        RunDir.start(run, "name: one\n", {}, overwrite=True)
    (run / "lock").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(outside / "file")
    RunDir.start(run, "name: one\n", {}, overwrite=True).close()
    assert (outside / "file").read_text() == "not yours" and not (run / "metrics.jsonl").is_symlink()


def test_a_pipe_is_refused_and_not_waited_for(run):
    os.mkfifo(run / "eval.json")
    with pytest.raises(RunFolderError, match=r"eval\.json is neither a file nor a folder"):
        RunDir.open(run)


def test_links_that_stay_within_and_a_link_to_the_folder_are_fine(run, tmp_path):
    (run / "latest.json").symlink_to("summary.json")
    (tmp_path / "link").symlink_to(run)
    check_no_external_links(tmp_path / "link")
    assert RunDir.open(tmp_path / "link").read_json("latest.json")["status"] == "complete"


def test_a_name_cannot_play_tricks_on_a_terminal(run, outside):
    (run / "a\x1b[2J\nb").symlink_to(outside)
    with pytest.raises(RunFolderError) as error:
        RunDir.open(run)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x"])
def test_names_that_lead_out_are_no_files_of_a_run(run, name):
    with RunDir.open(run, write=True) as held:
        for act in (held.read_bytes, held.has, lambda n: held.write_bytes(n, b"")):
            with pytest.raises(ValueError, match="no path inside"):
                act(name)


def test_an_index_names_no_pictures(run):
    """Pictures are found by number, so an index cannot point anywhere."""
    index = run / "gallery" / "index.json"
    entry = {"index": 0, "name": "../../../etc/passwd", "image": "/etc/passwd", "files": {"image": "../x"}}
    index.write_text(json.dumps([entry]))
    (run / "state.json").unlink()
    for example in load_run(run).gallery:
        assert all(path.parent == run / "gallery" for path in example.files.values())
