"""Loading complete and incomplete run folders."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from helpers.fake_run import gates, layer_rows, without_checksum, write_run

import prunekit
from prunekit.errors import RunFolderError
from prunekit.reporting import load_run
from prunekit.reporting.figures.tradeoff import tradeoff_figures
from prunekit.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return load_run(write_run(tmp_path_factory.mktemp("runs") / "csnet", epochs=4, measured_too=True))


def test_load_complete_run(whole):
    run, rows = whole, layer_rows(0)
    assert (run.name, run.status, run.size, run.problems) == ("csnet", "complete", (64, 64), [])
    assert run.setting("train.lr") == 1e-4 and run.setting("train.lr.x") is None and run.setting("no") is None
    assert run.plan["groups"] == {"a": [0, 2]} and run.done[0] == "train"
    assert run.layers["macs_after"].tolist() == [row["macs"]["after"] for row in rows]
    assert run.layers["paper_flops_before"].isna().tolist() == [r["paper_flops"]["before"] is None for r in rows]
    assert all(run.layers[c].dtype == "Int64" for c in run.layers.columns[1:])
    assert run.counters["counter"].tolist() == ["prunekit", "fvcore", "thop", "torch"] * 2
    assert run.metrics["metrics.mae"].tolist() == [0.1] * 5 and run.metrics["epoch"].tolist() == [1, 2, 3, 4, 1]
    assert run.environment["packages"]["torch"] and run.classes == []


def test_gates_are_indexed_by_epoch_norm_and_channel(whole):
    written = gates(layer_rows(0), 4)
    assert whole.gates.index.tolist() == [1, 2, 3, 4] and whole.gates.index.name == "epoch"
    assert whole.gates.columns.names == ["norm", "channel"] and (whole.gates.dtypes == np.float32).all()
    assert list(whole.gates.columns.unique("norm")) == list(written)
    for name, values in written.items():
        np.testing.assert_array_equal(whole.gates[name].to_numpy(), values)
        assert whole.gates[name].columns.tolist() == list(range(values.shape[1]))


def test_curves_gallery_bench_and_evals(whole):
    assert list(whole.curves) == ["dense", "slim", "finetuned"] and len(whole.curves["slim"]["f"]) == 256
    assert [(e.index, e.kind, e.fixed) for e in whole.gallery] == [
        (0, None, True),
        (1, "best", False),
        (3, "worst", False),
    ]
    for example in whole.gallery:
        assert list(example.files) == ["image", "truth", "dense", "slim", "finetuned"] and not example.labels
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in example.files.values())
    assert whole.bench["median_ms"].tolist() == [20.0, 12.5, 4.25] and set(whole.bench["size"]) == {"64×64"}
    assert whole.evals["name"].tolist() == ["ECSSD", "ECSSD", "PASCAL-S", "PASCAL-S"]
    assert whole.evals["metrics.max_f"].tolist() == [0.8] * 4


def test_latencies_of_a_budget_are_a_benchmark_until_there_is_one(make_run):
    latency = {"runtime": "onnxruntime", "version": "1.2", "device": "EPYC", "threads": 1, "batch": 1}
    latency |= {"size": [3, 224, 160], "dense_ms": 30.0, "slim_ms": 15.5, "ratio": 0.5167}
    path = make_run()

    def change(path, latency):
        with RunDir.open(path, write=True) as run:
            run.update_summary("latency", latency)

    change(path, latency)
    run = load_run(path)
    assert run.bench[["model", "form", "size", "threads", "device", "median_ms"]].values.tolist() == [
        ["dense", "ort", "224×160", 1, "EPYC", 30.0],
        ["slim", "ort", "224×160", 1, "EPYC", 15.5],
    ]
    assert any(figure.name == "tradeoff_latency" for figure in tradeoff_figures([run]))
    change(path, {**latency, "dense_ms": None})
    assert not len(load_run(path).bench)
    assert len(load_run(make_run("b", measured_too=True)).bench) > 2


def test_gallery_of_classification_has_labels(make_run):
    path = make_run()
    for picture in (path / "gallery").glob("0001-*.png"):
        if "image" not in picture.name:
            picture.unlink()
            without_checksum(path, f"gallery/{picture.name}")
    entry = {"index": 1, "name": "b", "fixed": True, "kind": None, "truth": "cat", "slim": {"class": "dog"}}
    with RunDir.open(path, write=True) as run:
        run.write_json("gallery/index.json", [entry])
        run.write_json("classes.json", ["cat", "dog"])
    run = load_run(path)
    assert list(run.gallery[0].files) == ["image"] and run.problems == [] and run.classes == ["cat", "dog"]
    assert run.gallery[0].labels == {"truth": "cat", "slim": {"class": "dog"}}


def test_counts_above_2_53_stay_exact(make_run):
    path = make_run() / "layers.json"
    written = json.loads(path.read_text())
    written["layers"][0]["macs"] = {"before": 2**53 + 1, "after": None}
    path.write_text(json.dumps(written))
    (path.parent / "state.json").unlink()
    assert load_run(path.parent).layers["macs_before"][0] == 2**53 + 1


@pytest.mark.parametrize("stop", ["train", "extract", "slim", "finetune", "evaluate"])
def test_missing_files_of_interrupted_run(make_run, stop):
    run = load_run(make_run(stop=stop))
    assert run.status == "interrupted"
    by_stage = {
        "train": ["metrics.jsonl", "gates.npz"],
        "extract": ["extract/plan.json"],
        "slim": ["layers.json"],
        "finetune": [],
        "evaluate": ["curves.json", "gallery/index.json"],
    }
    later = list(by_stage)[list(by_stage).index(stop) :]
    assert sorted(run.problems) == sorted(f"{name}: missing" for stage in later for name in by_stage[stage])
    assert isinstance(run.layers, pd.DataFrame) and isinstance(run.gates, pd.DataFrame)


def test_gates_of_unfinished_training_come_from_newest_checkpoint(make_run):
    path = make_run(stop="train")
    tensors = {"model/a": np.zeros(2), "gates/bn": np.array([[0.5, 0.25], [0.5, 0.125]], np.float32)}
    with RunDir.open(path, write=True) as run:
        run.begin("train")
        run.save_checkpoint("train", 1, {"gates/bn": tensors["gates/bn"][:1]}, {}, keep=2)
        run.save_checkpoint("train", 2, tensors, {}, keep=2)
    found = load_run(path)
    assert found.gates["bn"].to_numpy().tolist() == [[0.5, 0.25], [0.5, 0.125]]
    assert "gates.npz: missing" not in found.problems
    (path / "checkpoints" / "train-0002.safetensors").write_bytes(b"damaged")
    assert len(load_run(path).gates) == 1


def test_status_of_running_run(tmp_path):
    with RunDir.start(tmp_path / "run", "name: x\n", {}) as run:
        run.begin("train")
        assert load_run(tmp_path / "run").status == "running"
        run.append_metrics({"stage": "train", "epoch": 1, "loss": 0.5, "metrics": {}})
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "train", "epo')
        found = load_run(tmp_path / "run")
        assert len(found.metrics) == 1 and not any("metrics.jsonl" in line for line in found.problems)


def test_file_replaced_during_load_is_not_damaged(make_run, monkeypatch):
    path, opened = make_run(), RunDir.open

    def open_and_be_late(folder, **options):
        run = opened(folder, **options)
        if not late:
            late.append(True)
            with opened(folder, write=True) as other:
                other.update_summary("drift", {"max_abs_diff": 42.0})
        return run

    late: list[bool] = []
    monkeypatch.setattr(RunDir, "open", open_and_be_late)
    run = load_run(path)
    assert run.problems == [] and run.summary["drift"] == {"max_abs_diff": 42.0}


def test_not_a_run_folder(tmp_path):
    with pytest.raises(RunFolderError) as error:
        load_run(tmp_path)
    assert error.value.exit_status == 2 and "\n" not in str(error.value)


def test_load_summary_only(make_run, tmp_path):
    path = tmp_path / "alone"
    path.mkdir()
    (path / "summary.json").write_bytes((make_run() / "summary.json").read_bytes())
    run = load_run(path)
    assert run.status == "complete" and run.summary["slim"]["params"] and run.size is None
    assert any(line.startswith("state.json: missing") for line in run.problems)


# ---- repr


def test_repr_lists_models(whole):
    lines = repr(whole).splitlines()
    assert lines[0].startswith("Run csnet: complete, saliency, csnet, ")
    assert [line.split()[0] for line in lines[1:5]] == ["model", "dense", "slim", "finetuned"]
    assert f"{whole.summary['slim']['macs'] / 1e6:.3g} M" in lines[3] and "0.7400" in lines[3]
    assert "epochs: train 4, finetune 1" in lines[5] and len(lines) == 6


class Outline(HTMLParser):
    """The texts of an HTML fragment with their enclosing tags; fails if a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.seen = [], [], set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.seen.add(tag)
        assert set(attributes) <= {("style", "text-align: right;")}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(("/".join(self.open), data))


def test_repr_html_has_table_of_models(whole):
    outline = Outline(whole._repr_html_())
    heads = [text.strip() for tags, text in outline.texts if tags.endswith("th")]
    assert heads == ["model", "params", "MACs (64×64)", "max_f", "mae", "s_measure", "max_e"]
    cells = [text.strip() for tags, text in outline.texts if tags.endswith("td")]
    assert cells[::7] == ["dense", "slim", "finetuned"]
    assert prunekit.load_run is load_run


def test_repr_escapes_html_and_control_characters(whole):
    nasty = "<script>alert(1)</script>&\x1b[31m"
    summary = {**whole.summary, "dense": {**whole.summary["dense"], "metrics": {nasty: 0.5}}}
    recipe = {**whole.recipe, "task": nasty, "backbone": {"name": nasty}}
    metrics = whole.metrics.assign(stage=nasty)
    run = replace(whole, name=nasty, summary=summary, recipe=recipe, metrics=metrics, problems=[nasty])
    outline = Outline(run._repr_html_())
    assert outline.seen == {"h4", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert sum("<script>" in text for _, text in outline.texts) >= 5
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", repr(run))


@pytest.mark.parametrize("stop", ["train", "slim"])
def test_repr_of_incomplete_run(make_run, stop):
    run = load_run(make_run(stop=stop))
    assert "interrupted" in repr(run) and "problem: layers.json: missing" in repr(run)
    Outline(run._repr_html_())


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 3), np.float32)},
        {"a": np.ones(3, np.float32)},
        {"a": np.ones((2, 3), np.int64)},
        {"a": np.full((2, 3), np.nan, np.float32)},
    ],
)
def test_invalid_gates_are_dropped(make_run, arrays):
    path = make_run(units=("block",))
    with RunDir.open(path, write=True) as run:
        run.write_arrays("gates.npz", arrays)
    found = load_run(path)
    assert found.gates.shape == (0, 0) and [line[:11] for line in found.problems] == ["gates.npz: "]
