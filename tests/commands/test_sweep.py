import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.small_run import skip_export, skip_figures
from helpers.toy_run import outcome, quiet
from rich.console import Console

from prunekit.commands import sweep
from prunekit.commands.sweep import run_sweep
from prunekit.config.recipe import load
from prunekit.errors import Interrupted, RecipeError, RunError, RunFolderError
from prunekit.pipeline.runner import run_recipe
from prunekit.runs.run_dir import RunDir

FIXED = [
    "backbone.options={depth: 8, width: 4}",
    "train.epochs=4",
    "train.batch_size=256",
    "train.gradual_pruning.start=0.5",
    "train.gradual_pruning.end=0.75",
    "export.onnx=false",
]
RATIOS = "target.params_ratio=0.5,0.3"


@pytest.fixture
def without_figures(monkeypatch, tmp_path_factory):
    """Let trials skip their reports, and the sweep its figures; they take longest."""
    skip_figures(monkeypatch)
    program = tmp_path_factory.mktemp("bin") / "python"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom prunekit import cli, reporting\n"
        "reporting.report = lambda *_: None\ncli.main(sys.argv[3:])\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def swept(out, *settings, console=None, **options):
    return run_sweep("digits_resnet", [*settings, *FIXED], out, console or quiet(), jobs=1, **options)


def test_trials_equal_single_runs_and_share_the_training_before_pruning(tmp_path, monkeypatch, without_figures):
    text = io.StringIO()
    # The smallest network has more parameters than this.
    with pytest.raises(RunError) as error:
        swept(tmp_path / "sweep", f"{RATIOS},1e-6", console=Console(file=text, width=80))
    lines = str(error.value).splitlines()
    assert lines[0] == "1 trial failed; --resume repeats them"
    assert lines[1].startswith("params_ratio=1e-6: the budget of 0 params cannot be met;") and lines[1].endswith(
        "1e-6.log)"
    )
    printed = text.getvalue()
    assert printed.startswith("3 trials, 1 shared run; 1 run at a time, 1 thread each\nshared/")
    assert "params_ratio=0.5: complete (" in printed and "4 of 4 runs have ended\n" in printed
    assert max(map(len, printed.split("saved to")[0].splitlines())) <= 80
    ratio = "params_ratio=0.3"
    seconds = [
        RunDir.open(tmp_path / "sweep" / name).read_metrics()[0]["seconds"] for name in (ratio, "params_ratio=0.5")
    ]
    assert seconds[0] == seconds[1]
    rows = (tmp_path / "sweep/trials.csv").read_text().splitlines()
    assert rows[0].startswith("trial,params_ratio,status,model,top1,params,macs,seconds") and len(rows) == 4
    assert [row.split(",")[2] for row in rows[1:]] == ["complete", "complete", "failed"]
    assert (tmp_path / "sweep/report/summary.csv").is_file()
    skip_export(monkeypatch)
    run_recipe(load("digits_resnet", ["target.params_ratio=0.3", *FIXED]), tmp_path / "single", quiet())
    assert outcome(tmp_path / "sweep" / ratio) == outcome(tmp_path / "single")


def test_interrupted_sweep_continues(tmp_path, monkeypatch, without_figures):
    def interrupt(self):
        if (tmp_path / "sweep/params_ratio=0.5/checkpoints").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(sweep._Monitor, "tick", interrupt)
        swept(tmp_path / "sweep", RATIOS)
    assert RunDir.open(tmp_path / "sweep/params_ratio=0.5").status in ("interrupted", "complete")
    assert not (tmp_path / "sweep/trials.csv").exists()
    table = swept(tmp_path / "sweep", RATIOS, resume=True)
    assert table["status"].tolist() == ["complete"] * 2
    with pytest.raises(RunFolderError, match=r"sweep already holds a sweep; continue it with --resume"):
        swept(tmp_path / "sweep", RATIOS)
    with pytest.raises(
        RunFolderError, match=r"sweep is the sweep of digits_resnet .* target\.params_ratio=0\.5,0\.3; repeat that"
    ):
        swept(tmp_path / "sweep", "seed=0,1", resume=True)


@pytest.mark.slow
def test_killed_sweep_continues_to_the_same_results(tmp_path):
    command = ["sweep", "digits_resnet", RATIOS, "seed=0,1", *FIXED, "--jobs", "2", "--out"]
    arguments = [sys.executable, "-m", "prunekit.cli", *command]
    subprocess.run([*arguments, tmp_path / "whole"], check=True, stdout=subprocess.DEVNULL)
    for seconds in (5, 12, 20, 30):
        resume = ["--resume"] if (tmp_path / "killed/sweep.json").exists() else []
        process = subprocess.Popen([*arguments, tmp_path / "killed", *resume], stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*arguments, tmp_path / "killed", "--resume"], check=True, stdout=subprocess.DEVNULL)
    names = [f"params_ratio={ratio},seed={seed}" for ratio in (0.5, 0.3) for seed in (0, 1)]
    for name in names:
        assert outcome(tmp_path / "killed" / name) == outcome(tmp_path / "whole" / name)


def test_nothing_is_written_if_a_trial_is_wrong(tmp_path):
    with pytest.raises(RecipeError) as error:
        swept(tmp_path / "sweep", "target.params_ratio=0.5,2", "train.lr=1e-3,fast")
    assert len(str(error.value).splitlines()) == 2
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"photos holds files but no sweep, so nothing is written there"):
        swept(tmp_path / "photos", RATIOS)
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "a.jpg"]


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot use .*file: .*; choose another --out DIR"):
        swept(tmp_path / "file", RATIOS)


def test_damaged_plan(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(RunFolderError, match=r"sweep\.json is damaged; choose another --out DIR"):
        swept(tmp_path / "sweep", RATIOS, resume=True)


def test_dry_run(tmp_path, capsys):
    swept(tmp_path / "sweep", RATIOS, console=Console(width=80), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    shared = lines[0].split()[0]
    assert lines[0] == f"{shared}  until gradual_pruning" and lines[1] == f"params_ratio=0.5  continues {shared}"
    assert lines[-1] == "2 trials, 1 shared run" and not (tmp_path / "sweep").exists()
