"""Run folders with truncated, swapped, newer or invalid files: problems are reported, nothing raises."""

from __future__ import annotations

import io
import json
import random
import shutil

import pytest
from helpers.fake_run import change_state, without_checksum, write_run
from rich.console import Console

from prunekit.cli import main
from prunekit.errors import RunFolderError
from prunekit.reporting import load_run, report
from prunekit.reporting.figures.gallery import gallery_figures
from prunekit.reporting.loader import MODELS
from prunekit.runs.run_dir import RunDir
from prunekit.runs.state import FORMAT

FILES = [
    "state.json", "recipe.yaml", "summary.json", "environment.json", "metrics.jsonl", "gates.npz", "slim/plan.json",
    "layers.json", "curves.json", "gallery/index.json", "gallery/0001-slim.png", "bench.json", "eval.json",
]  # fmt: skip
READ = [name for name in FILES if not name.endswith(".png")]
JSON = [name for name in READ if name.endswith(".json")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "csnet", units=("block",), epochs=3, measured_too=True)


@pytest.fixture(scope="module")
def whole(model):
    return load_run(model)


@pytest.fixture
def run(model, tmp_path):
    """A copy to damage."""
    return shutil.copytree(model, tmp_path / "csnet")


@pytest.fixture
def no_figures(monkeypatch):
    """Skip figures and page, which take most of the time; other tests draw damaged runs."""
    monkeypatch.setitem(report.__globals__, "report_figures", lambda runs, *_: iter(()))
    monkeypatch.setitem(report.__globals__, "render_page", lambda *_: "")


def report_output(path, **options):
    """Return the terminal output of a report."""
    console = Console(width=80, file=io.StringIO(), color_system=None)
    report([path], path.parent / "out", console, **options)
    return console.file.getvalue()


def the_same(found, whole):
    """Check that the loaded values are those of the intact run, or missing."""
    for part in MODELS:
        for key, value in found.summary.get(part, {}).items():
            if key == "metrics":
                assert value.items() <= whole.summary[part]["metrics"].items()
            else:
                assert value == whole.summary[part][key]
    for name in ("layers", "counters", "gates", "metrics", "bench", "evals"):
        mine, theirs = getattr(found, name), getattr(whole, name)
        assert not len(mine) or mine.equals(theirs) or (name == "metrics" and mine.equals(theirs.iloc[: len(mine)]))
    assert found.plan in (None, whole.plan) and found.recipe in ({}, whole.recipe)


def without_checksums(path):
    """Remove the checksums, so that damage must be detected from the content."""
    change_state(path, checksums={})


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("checksums", [True, False])
def test_truncated_file_is_reported(run, whole, name, checksums, no_figures):
    draw = random.Random(name)
    data = (run / name).read_bytes()
    if not checksums and name != "state.json":
        without_checksums(run)
    for place in {0, 1, len(data) - 2, *(draw.randrange(len(data)) for _ in range(3))}:
        (run / name).write_bytes(data[:place])
        found = load_run(run)
        # Without a checksum, a truncated recipe and metrics truncated at a line's end are valid.
        if name != "recipe.yaml" or checksums:
            the_same(found, whole)
            complete = name == "metrics.jsonl" and place > len(data) - 3
            assert any(line.startswith(name) for line in found.problems) or complete, (name, place)
        assert all("\n" not in line for line in found.problems)
    if checksums:
        assert name in report_output(run)


@pytest.mark.parametrize("name", READ)
def test_random_byte_changes_do_not_raise(run, name):
    draw = random.Random(name)
    data = (run / name).read_bytes()
    (run / "state.json").unlink()
    for _ in range(5):
        broken = bytearray(data)
        for _ in range(draw.choice((1, 1, 20))):
            broken[draw.randrange(len(data))] = draw.randrange(256)
        (run / name).write_bytes(broken)
        found = load_run(run)
        assert repr(found) and found._repr_html_()


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_reported(run, whole, name, no_figures):
    (run / name).unlink()
    found = load_run(run)
    the_same(found, whole)
    if name.endswith(".png"):
        assert "slim" not in found.gallery[1].files and "slim" in found.gallery[0].files
    else:
        assert any(line.startswith(name) for line in found.problems)
        assert name in report_output(run)


@pytest.mark.parametrize("name", JSON)
def test_content_of_another_file_is_reported(run, whole, name, no_figures):
    without_checksums(run)
    mine = (run / name).read_text()
    others = [(run / other).read_text() for other in JSON if other != name]
    for content in (*others, "[]", "{}", "null", "3", '"text"', '[{"a": 1}]', "[" * 100_000, '{"format": 1}'):
        (run / name).write_text(content)
        found = load_run(run)
        if name != "environment.json":
            the_same(found, whole)
        # environment.json may contain anything; an empty gallery or empty curves are valid.
        harmless = name == "environment.json" or content in ("[]", "{}", '{"format": 1}')
        assert any(line.startswith(name) for line in found.problems) or harmless, content[:80]
        (run / name).write_text(mine)


VALUES = [None, True, -1, 1.5, 1e300, "x", [], {}, [1], {"a": 1}, "\u2028<b>", 10**400, float("nan"), float("inf")]


def places(value, path=()):
    """Yield the paths of all values in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(document, path, value):
    if not path:
        return value
    copied = document.copy()
    copied[path[0]] = with_value(document[path[0]], path[1:], value)
    return copied


@pytest.mark.parametrize("name", [*JSON, "metrics.jsonl"])
def test_values_of_wrong_type_do_not_raise(run, name, no_figures):
    draw = random.Random(name)
    text = (run / name).read_text()
    if name != "state.json":
        without_checksums(run)
    document = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
    inner = [path for path in places(document) if path]
    for _ in range(8):
        path = draw.choice(inner)
        broken = with_value(document, path, draw.choice(VALUES))
        lines = [json.dumps(line) for line in broken] if name.endswith("l") else [json.dumps(broken)]
        (run / name).write_text("\n".join([*lines, ""]))
        try:
            found = load_run(run)
        except RunFolderError:
            assert path == ("format",), "only a newer format is refused"
            continue
        assert repr(found) and found._repr_html_() and all("\n" not in line for line in found.problems)
    (run / name).write_text("\n".join([*lines, ""]) if path != ("format",) else text)
    report_output(run)


@pytest.mark.parametrize("key", ["params", "macs", "paper_flops"])
@pytest.mark.parametrize("value", [-1, 1.5, "x", True, [], float("nan"), float("inf"), 10**400])
def test_invalid_counts_are_reported_and_dropped(run, key, value, no_figures):
    without_checksums(run)
    summary = json.loads((run / "summary.json").read_text())
    summary["dense"][key] = value
    (run / "summary.json").write_text(json.dumps(summary))
    found = load_run(run)
    assert key not in found.summary.get("dense", {})
    assert any(line.startswith("summary.json: ") for line in found.problems)
    if value != 10**400:
        assert any(f"dense.{key}" in line for line in found.problems)


def test_report_of_run_with_every_file_damaged(run):
    for place, name in enumerate(READ):
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[: len(data) * (place % 3) // 3] + b"\x00\xff")
    text = report_output(run)
    for name in READ:
        assert name in text
    assert "no model has been measured" in text


@pytest.mark.parametrize("name", ["slim/plan.json", "layers.json", "bench.json", "eval.json", "curves.json"])
def test_newer_file_format_is_reported(run, whole, name, no_figures):
    (run / "state.json").unlink()
    content = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps({**content, "format": 2}))
    found = load_run(run)
    the_same(found, whole)
    assert [line for line in found.problems if line.startswith(name) and "format 2" in line and "upgrade" in line]
    assert "format 2" in report_output(run)


@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 1, "groups": {}}', "[]"])
def test_invalid_summary_of_interrupted_run_is_reported(tmp_path, content):
    path = write_run(tmp_path / "run", units=("block",), stop="slim")
    without_checksums(path)
    (path / "summary.json").write_text(content)
    found = load_run(path)
    assert found.summary == {} and any(line.startswith("summary.json: not in") for line in found.problems)


@pytest.mark.parametrize("name", ["state.json", "summary.json"])
def test_newer_run_format_fails_with_one_line(run, name, capsys):
    content = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps({**content, "format": FORMAT + 1}))
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run)])
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.err.count("\n") == 1 and f"format {FORMAT + 1}" in out.err and not out.out
    assert not (run / "report").exists()


def test_not_a_run_folder_fails_with_one_line_and_writes_nothing(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as stop:
            main(["report", str(path), "--out", str(tmp_path / "out")])
        out = capsys.readouterr()
        assert stop.value.code == 2 and out.err.count("\n") == 1 and "not a run folder" in out.err
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_run_are_reported(run, tmp_path):
    other = write_run(tmp_path / "other", seed=1, units=("block",), epochs=5)
    (run / "state.json").unlink()
    shutil.copy(other / "layers.json", run)
    shutil.copy(other / "gates.npz", run)
    missing = load_run(run).problems
    assert any(line.startswith("layers.json: its slim model has") for line in missing)
    (run / "state.json").write_bytes((other / "state.json").read_bytes())
    missing = load_run(run).problems
    assert any(line.startswith("recipe.yaml:") and "another run" in line for line in missing)
    assert any(line.startswith("metrics.jsonl:") for line in missing)
    without_checksums(run)
    assert any(line.startswith("gates.npz: 5 epochs, metrics.jsonl has 3") for line in load_run(run).problems)


def test_missing_epochs_are_counted(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    without_checksum(run, "metrics.jsonl")
    missing = load_run(run).problems
    assert "metrics.jsonl: 2 of 3 epochs of train" in missing and "metrics.jsonl: 0 of 1 epochs of finetune" in missing
    for damaged in ("{", '{"stage": "train", "loss": 0.1}', '{"epoch": 2, "loss": 0.1}', "[1]", ""):
        (run / "metrics.jsonl").write_text("".join([lines[0], f"{damaged}\n", *lines[2:]]))
        found = load_run(run)
        assert found.metrics["epoch"].tolist() == [1, 3, 1]
        assert any("line 2 is damaged" in line for line in found.problems)
        assert any("epochs of train are not numbered 1, 2, 3" in line for line in found.problems)


@pytest.mark.parametrize("held", [0, 1])
def test_missing_baseline_epochs_are_counted(run, held):
    """The last of them are missing, or all."""
    recipe = (run / "recipe.yaml").read_text() + "baseline: true\n"
    (run / "recipe.yaml").write_text(recipe)
    first = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(first.replace('"train"', '"baseline"') * held)
    without_checksums(run)
    assert f"metrics.jsonl: {held} of 3 epochs of baseline" in load_run(run).problems
    (run / "recipe.yaml").write_text(recipe.replace("baseline: true", "baseline: false"))
    assert (f"metrics.jsonl: {held} of 3 epochs of baseline" in load_run(run).problems) == bool(held)


def test_missing_epochs_of_whole_stage_are_reported(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[-1])
    without_checksums(run)
    assert "metrics.jsonl: 0 of 3 epochs of train" in load_run(run).problems
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]["train"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert not any("epochs of train" in line for line in load_run(run).problems), "its training stands in another run"


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml", "environment.json", "gates.npz", "layers.json"])
def test_missing_file_without_checksum_is_reported(run, name):
    without_checksum(run, name)
    (run / name).unlink()
    assert f"{name}: missing" in load_run(run).problems


@pytest.mark.parametrize("name, key, needed", [("bench.json", "rows", "median_ms"), ("eval.json", "sets", "name")])
def test_rows_without_required_key_are_dropped(run, name, key, needed):
    without_checksums(run)
    held = json.loads((run / name).read_text())
    del held[key][1][needed]
    (run / name).write_text(json.dumps(held))
    found = load_run(run)
    assert len(found.bench if name == "bench.json" else found.evals) == len(held[key]) - 1
    assert any(f"{key}[1] has no {needed}" in line for line in found.problems)


def test_damaged_picture_is_left_out_of_gallery(run, monkeypatch):
    monkeypatch.setitem(report.__globals__, "report_figures", lambda runs, *_: gallery_figures(runs[0]))
    picture = run / "gallery" / "0001-slim.png"
    picture.write_bytes(picture.read_bytes()[:-1])
    picture.with_name("0000-dense.png").write_bytes(b"no picture")
    text = report_output(run)
    assert "gallery" in text and "index.html" in text
    for name in (picture.name, "0000-dense.png"):
        assert f"{name} is damaged" in text
    assert [list(example.files) for example in load_run(run).gallery] == [
        ["image", "truth", "slim", "finetuned"],
        ["image", "truth", "dense", "finetuned"],
        ["image", "truth", "dense", "slim", "finetuned"],
    ]


def test_lock_and_temporary_files_are_ignored(run):
    with RunDir.open(run, write=True) as held:
        held.update_summary("drift", {"max_abs_diff": 2.0})
        held.close()
    (run / "lock").write_text("{")
    (run / ".tmp-1").write_bytes(b"half")
    assert load_run(run).problems == []
