"""Reading run folders, whole, in part and damaged."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from fake_run import layer_rows

from prunekit.errors import RunFolderError
from prunekit.reporting import load_run


def test_a_whole_run(make_run):
    run = load_run(make_run())
    rows = layer_rows(0)
    assert (run.name, run.status, run.size, run.missing) == ("csnet", "complete", (64, 64), [])
    assert run.recipe["train"]["lr"] == 1e-4
    assert run.plan == {"format": 1, "groups": {"a": [0, 2]}}
    assert run.layers["macs_after"].tolist() == [row["macs"]["after"] for row in rows]
    assert run.layers["paper_flops_before"].isna().tolist() == [r["paper_flops"]["before"] is None for r in rows]
    assert all(run.layers[c].dtype == "Int64" for c in run.layers.columns[2:])
    assert run.counters["counter"].tolist() == ["ours", "fvcore", "thop", "torch"] * 2
    assert run.metrics["metrics.mae"].tolist() == [0.1, 0.1]


def test_numbers_beyond_double_precision_stay_exact(make_run):
    path = make_run() / "layers.json"
    written = json.loads(path.read_text())
    written["layers"][0]["macs"]["before"] = 2**53 + 1
    path.write_text(json.dumps(written))
    (path.parent / "state.json").unlink()
    assert load_run(path.parent).layers["macs_before"][0] == 2**53 + 1


@pytest.mark.parametrize("stop", ["train", "extract", "slim", "finetune"])
def test_an_interrupted_run_says_what_is_missing(make_run, stop):
    run = load_run(make_run(stop=stop))
    assert run.status == "interrupted"
    absent = {"train": {"metrics.jsonl", "plan.json", "layers.json"}, "extract": {"plan.json", "layers.json"}}
    expected = absent.get(stop, {"layers.json"} if stop == "slim" else set())
    assert {line.partition(":")[0] for line in run.missing} == expected
    assert isinstance(run.layers, pd.DataFrame)


@pytest.mark.parametrize("name", ["layers.json", "summary.json", "plan.json", "metrics.jsonl", "recipe.yaml"])
@pytest.mark.parametrize("content", ["{", "[1]\n", "", '{"layers": [{"layer": "a"}]}', "\udcff"])
def test_a_damaged_file_is_named_and_the_rest_is_read(make_run, name, content):
    path = make_run()
    (path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    # Without checksums, so that it is the content itself that has to be recognised too.
    for _ in range(2):
        run = load_run(path)
        assert run.name == "csnet"
        assert all(line.startswith(name) and "\n" not in line for line in run.missing)
        assert len(run.layers) or name == "layers.json"
        (path / "state.json").unlink(missing_ok=True)
    if content in ("{", "\udcff") and name != "metrics.jsonl":
        assert len(run.missing) == 1


def test_a_changed_file_is_named_by_its_checksum(make_run):
    path = make_run()
    (path / "plan.json").write_text("{}")
    run = load_run(path)
    assert run.plan is None and len(run.missing) == 1 and "--from extract" in run.missing[0]


def test_no_run_folder(tmp_path):
    with pytest.raises(RunFolderError):
        load_run(tmp_path)
