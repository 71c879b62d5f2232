import json
import shutil
from pathlib import Path

import pytest
from helpers.small_run import small_run
from rich.console import Console

from prunekit.commands.bench import bench_run, ratios
from prunekit.errors import RecipeError
from prunekit.reporting import load_run
from prunekit.reporting.tables import bench_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_rows_table_and_report(folder, tmp_path, capsys):
    folder = shutil.copytree(folder, tmp_path / "tiny")
    console = Console(width=80)
    found = bench_run(folder, console, batches="1,2", threads="1", forms="eager,deployed,ort,openvino", seconds=0.01)
    assert found == json.loads((folder / "bench.json").read_text())
    assert len(found["rows"]) == 2 * 2 * 4 and found["matmul_gflops"]["1"] > 0
    for row in found["rows"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["peak_mb"] >= row["base_mb"] > 0
    # ONNX Runtime alone takes less memory than PyTorch.
    memory = {(r["model"], r["form"]): r["base_mb"] for r in found["rows"]}
    assert memory["slim", "ort"] < memory["slim", "eager"]
    assert len(found["ratios"]) == 8 and all(0 < r["macs_ratio"] < 1 for r in found["ratios"])
    out = capsys.readouterr().out
    assert "preparing dense\n" in out and "timing: 0 of 16 rows done\n" in out and "timing: 16 of 16 rows" in out
    assert "GFLOP/s" in out and "MACs + " not in out and max(map(len, out.split("saved to")[0].splitlines())) <= 80
    run = load_run(folder)
    assert not [line for line in run.problems if "bench" in line]
    table = bench_table([run])
    assert len(table) == 16 and set(table["form"]) == {"eager", "deployed", "ort", "openvino"}


def test_ratios():
    row = {"form": "ort", "batch": 1, "size": 8, "threads": 1, "macs": 100, "params": 10, "median_ms": 4.0}
    slim = {**row, "model": "slim", "macs": 50, "params": 2, "median_ms": 2.4}
    (found,) = ratios([{**row, "model": "dense"}, slim])
    assert (found["latency_ratio"], found["macs_ratio"], found["params_ratio"]) == (0.6, 0.5, 0.2)
    assert ratios([slim]) == []


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("--batch 0", {"batches": "0"}),
        ("--threads two", {"threads": "two"}),
        ("did you mean 'eager'", {"forms": "eagre"}),
        ("--model finetuned", {"models": "finetuned"}),
        ("--seconds", {"seconds": 0}),
    ],
)
def test_invalid_arguments(folder, message, arguments):
    with pytest.raises(RecipeError, match=message):
        bench_run(folder, Console(), **arguments)
    assert not (folder / "bench.json").exists()


def test_a_stop_saves_what_was_measured(folder, tmp_path, monkeypatch):
    folder = shutil.copytree(folder, tmp_path / "tiny")

    def stop(self, done, share):
        if share:
            raise KeyboardInterrupt

    monkeypatch.setattr("prunekit.commands.bench._TimingView.update", stop)
    with pytest.raises(KeyboardInterrupt):
        bench_run(folder, Console(), batches="1,2", threads="1", forms="eager", seconds=0.01)
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert [(row["model"], row["batch"]) for row in rows] == [("dense", 1), ("slim", 1)]


def test_with_out_nothing_is_written_into_the_run_folder(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bench_run(folder, Console(), threads="1", forms="eager", seconds=0.01, out=tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 2


def test_untrained_dense_model_is_timed_at_every_size(tmp_path):
    found = bench_run(Path("csnet-94k"), Console(), sizes="96", forms="ort", models="dense", seconds=0.01, out=tmp_path)
    assert [(row["model"], row["size"]) for row in found["rows"]] == [("dense", 96)]
