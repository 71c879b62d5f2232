"""What the script runs, and what it makes of what was found; no run is started."""

import json
from pathlib import Path

import duts
import pytest
from fake_run import write_run

from prunekit.recipe import load


def args(*more):
    return duts.parsed(["TRAIN", "TEST", *more])


def test_each_run_is_a_command_of_the_shipped_recipes():
    found = dict(duts.commands(args("data.cache=none", "--seeds", "0", "3", "--runs", "here")))
    assert list(found) == [f"{way}-{seed}" for way in duts.WAYS for seed in (0, 3)] + ["cpu"]
    for name, command in found.items():
        recipe, *overrides = command
        assert recipe == ("csnet_duts_cpu" if name == "cpu" else "csnet_duts_compare")
        assert overrides[:2] == ["data.root=TRAIN", "data.val_root=TEST"] and overrides[-1] == "data.cache=none"
    assert "seed=3" in found["l1-3"] and "init=here/dynamic-3" in found["scratch-3"]


def test_the_recipes_take_what_the_ways_say():
    for name, (recipe, *overrides) in duts.commands(args()):
        loaded = load(recipe, [text for text in overrides if not text.startswith("init=")] + ["init=RUN"])
        assert loaded.target.params_ratio == (None if name.startswith("scratch") else 0.25), name


def test_some_of_the_runs():
    assert [name for name, _ in duts.commands(args("--only", "l1", "cpu"))] == ["l1-0", "l1-1", "cpu"]
    with pytest.raises(SystemExit):
        args("--only", "nothing")


def test_what_is_complete_is_gathered_and_not_run_again(tmp_path, monkeypatch, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for seed, name in enumerate(("dynamic-0", "dynamic-1")):
        write_run(runs / name, seed=seed)
    calls = []
    monkeypatch.setattr(duts.subprocess, "run", lambda command, **_: calls.append(command) or report(command))

    def report(command):
        assert command[3] == "report"
        Path(command[-1]).mkdir()
        for name in ("summary.csv", "summary.tex", "channels.png", "gallery.png", "index.html"):
            (Path(command[-1]) / name).touch()

    duts.main(["a", "b", "--only", "dynamic", "--runs", str(runs), "--results", str(results)])
    assert len(calls) == 2 and capsys.readouterr().out.count("is there") == 2
    for name in ("dynamic-0", "dynamic-1"):
        assert (results / name / "summary.json").read_bytes() == (runs / name / "summary.json").read_bytes()
        assert {path.name for path in (results / name / "report").iterdir()} == {"summary.csv", "channels.png"}
    both = [json.loads((runs / name / "summary.json").read_text())["finetuned"] for name in ("dynamic-0", "dynamic-1")]
    row = next(line for line in (results / "table.md").read_text().splitlines() if "dynamic weight decay" in line)
    for part in both:
        assert f"{part['params']:,}" in row and f"{part['metrics']['max_f']:.4f}" in row


def test_what_broke_off_goes_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(duts.subprocess, "run", lambda command, **how: seen.append((command, how["env"])))
    (tmp_path / "l1-0").mkdir()
    duts.run("l1-0", ["csnet_duts_compare", "seed=0"], tmp_path, 1)
    duts.run("l1-1", ["csnet_duts_compare", "seed=1"], tmp_path, None)
    (first, how), (second, _) = seen
    assert first[-3:] == ["--out", str(tmp_path / "l1-0"), "--resume"] and how["OMP_NUM_THREADS"] == "1"
    assert second[-2:] == ["--out", str(tmp_path / "l1-1")]
