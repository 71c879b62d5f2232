"""What the script runs, and what it makes of what was found; no run is started."""

import json
import subprocess
import time
from pathlib import Path

import duts
import pytest
from helpers.fake_run import write_run

from prunekit.config.recipe import load


def args(*more):
    return duts.parsed(["TRAIN", "TEST", *more])


def test_each_run_is_a_command_of_the_shipped_recipes():
    found = dict(duts.commands(args("data.cache=none", "--seeds", "0", "3", "--runs", "here")))
    kinds = [*duts.WAYS, *duts.UNCUT, *duts.OPTIONS, *duts.TUNED]
    assert [n for n in found if not n.endswith("slim")] == [f"{kind}-{seed}" for kind in kinds for seed in (0, 3)] + [
        *duts.LONG
    ]
    for name, (verb, first, *overrides) in found.items():
        kind = name.rpartition("-")[0]
        assert overrides[-1] == "data.cache=none"
        if kind in duts.TUNED:
            assert (verb, first) == ("finetune", f"here/plain-{name[-1]}")
        elif kind in duts.UNCUT:
            assert (verb, first) == ("finetune", f"here/{name}-slim")
            assert found[f"{name}-slim"][:2] == ["slim", f"here/magnitude-{name[-1]}"]
        elif not name.endswith("slim"):
            assert (verb, first) == ("run", "csnet_duts_cpu" if name in duts.LONG else "csnet_duts_compare")
            assert overrides[0] == "data.root=TRAIN"
            assert overrides[1] == ("data.val_holdout=0.04738" if kind in duts.OPTIONS else "data.val_root=TEST")
    assert "seed=3" in found["l1-3"] and "init=here/dynamic-3" in found["scratch-3"]


def test_the_recipes_take_what_the_runs_say():
    loaded = {}
    for name, (verb, recipe, *overrides) in duts.commands(args("--seeds", "0")):
        overrides = ["data.root=TRAIN", *(text for text in overrides if not text.startswith("init=")), "init=RUN"]
        loaded[name.removesuffix("-0")] = load(recipe if verb == "run" else duts.COMPARE, overrides)
    ratios = {name: recipe.target.params_ratio for name, recipe in loaded.items()}
    assert [ratios.pop(name) for name in ("scratch", "narrow", "narrow_macs", "dense-0-slim", "cpu_uncut")] == [
        None
    ] * 5
    assert ratios.pop("cpu") == 0.2
    assert set(ratios.values()) == {0.25}
    assert loaded["ema"].finetune.ema == 0.99 and loaded["distill"].finetune.distill.weight == 0.5
    assert loaded["structure"].train.loss == loaded["structure"].finetune.loss != loaded["plain"].train.loss
    assert loaded["resized_crop"].train.augment == loaded["resized_crop"].finetune.augment


def test_an_option_is_held_against_plain_runs_that_never_saw_the_second_folder():
    found = dict(duts.commands(args()))
    base = found["plain-0"]
    for kind, overrides in duts.OPTIONS.items():
        assert found[f"{kind}-0"] == [*base, *overrides] and not any("TEST" in word for word in base)


def test_some_of_the_runs():
    assert [name for name, _ in duts.commands(args("--only", "l1", "cpu"))] == ["l1-0", "l1-1", "cpu"]
    with pytest.raises(SystemExit):
        args("--only", "nothing")


def test_what_was_found_is_gathered(tmp_path, monkeypatch):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for seed, name in enumerate(("dynamic-0", "dynamic-1")):
        write_run(runs / name, seed=seed)
    calls = []

    def prunekit(command, **_):
        calls.append(command[3])
        if command[3] == "run":
            assert command[-1] == "--resume", "which refuses another recipe, and does nothing where all is done"
            return
        Path(command[-1]).mkdir()
        for name in ("summary.csv", "summary.tex", "channels.png", "gallery.png", "index.html"):
            (Path(command[-1]) / name).touch()

    monkeypatch.setattr(duts.subprocess, "run", prunekit)
    duts.main(["a", "b", "--only", "dynamic", "--runs", str(runs), "--results", str(results)])
    assert calls == ["run", "run", "report", "report"]
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
    for name in ("l1-0", "ema-0"):
        (tmp_path / name).mkdir()
    duts.run("l1-0", ["run", "csnet_duts_compare", "seed=0"], tmp_path, 1)
    duts.run("l1-1", ["run", "csnet_duts_compare", "seed=1"], tmp_path, None)
    duts.run("ema-0", ["finetune", "plain-0"], tmp_path, None)
    (first, how), (second, _), (third, _) = seen
    assert first[-3:] == ["--out", str(tmp_path / "l1-0"), "--resume"] and how["OMP_NUM_THREADS"] == "1"
    assert second[-2:] == ["--out", str(tmp_path / "l1-1")]
    assert third[-3:] == ["--out", str(tmp_path / "ema-0"), "--overwrite"]


def nothing_but_runs(monkeypatch, run):
    monkeypatch.setattr(duts, "run", run)
    monkeypatch.setattr(duts, "gather", lambda *_: None)
    monkeypatch.setattr(duts, "bench", lambda *_: None)


def test_runs_that_need_others_wait_for_them(tmp_path, monkeypatch):
    over, threads = set(), {}

    def run(name, words, runs, number):
        assert duts.needed(name) is None or duts.needed(name) in over
        time.sleep(0.02)
        over.add(name)
        threads[name] = number

    nothing_but_runs(monkeypatch, run)
    out = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    duts.main(["a", "b", "--side-by-side", "--seeds", "0", *out])
    assert {f"{name}-0" for name in duts.AFTER} | {"dense-0", "dense-0-slim", *duts.LONG} <= over
    assert {threads.pop(name) for name in duts.LONG} == {None} and set(threads.values()) == {1}, (
        "the long ones have the machine to themselves"
    )


def test_a_run_that_others_need_and_that_is_not_there_is_named(tmp_path, monkeypatch):
    nothing_but_runs(monkeypatch, lambda *_: pytest.fail("nothing is run"))
    out = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"ema-0 needs plain-0, which is not in .*: add plain to --only"):
        duts.main(["a", "b", "--only", "ema", "--seeds", "0", *out])


def test_the_first_run_that_fails_is_the_last(tmp_path, monkeypatch):
    begun = []

    def run(name, *_):
        begun.append(name)
        raise subprocess.CalledProcessError(2, "prunekit")

    nothing_but_runs(monkeypatch, run)
    out = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="dynamic-0 failed; see dynamic-0\\.log in the folder of the runs"):
        duts.main(["a", "b", "--seeds", "0", *out])
    assert begun[0] == "dynamic-0" and len(begun) < 4


def test_gains_and_latencies_stand_in_the_table():
    def summary(max_f):
        return {"finetuned": {"params": 10, "paper_flops": 20, "metrics": {"max_f": max_f, "mae": 0.1}}}

    found = {"plain-0": summary(0.5), "plain-1": summary(0.75), "ema-0": summary(0.625), "cpu": summary(0.25)}
    found["cpu"]["baseline"] = found["cpu"]["finetuned"]
    found["cpu_uncut"] = summary(0.5)
    found |= {f"l1-{seed}": summary(0.25) for seed in range(3)}
    for seed in range(3):
        found[f"l1-{seed}"]["finetuned"]["params"] = 1000 + seed
    times = [("dense", "eager", 8.25), ("dense", "ort", 4), ("finetuned", "eager", 2)]
    rows = [dict(zip(("model", "form", "median_ms"), each, strict=True)) for each in times]
    text = duts.table(found, {"cpu": {"rows": rows}}).splitlines()
    assert "| plain | 10 | 20 | 0.6250 (0.5000, 0.7500) | 0.1000 (0.1000, 0.1000) |  |" in text
    assert any(line.startswith("| l1 (network slimming) | 1,000–1,002 | 20 | 0.2500 (0.2500, ") for line in text)
    assert "| ema | 10 | 20 | 0.6250 | 0.1000 | +0.1250 |" in text, "of the seed that both have"
    assert "| dense, no decay | 10 | 20 | 0.2500 | 0.1000 | 8.2 | 4.0 |" in text
    assert "| slim, fine-tuned | 10 | 20 | 0.2500 | 0.1000 | 2.0 |  |" in text
    assert "| dense, no decay, fine-tuned like the slim one | 10 | 20 | 0.5000 | 0.1000 | 8.2 | 4.0 |" in text


def test_a_run_is_timed_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(duts.subprocess, "run", lambda command, **_: calls.append(command))
    duts.bench(tmp_path)
    (tmp_path / "bench.json").touch()
    duts.bench(tmp_path)
    assert [call[3:5] for call in calls] == [["bench", str(tmp_path)]]
