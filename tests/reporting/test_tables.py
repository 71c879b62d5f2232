"""Values and headers of the tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.reporting import counters_table, layers_table, load_run, summary_table
from prunekit.reporting.number_format import format_number, format_seconds, short_number
from prunekit.reporting.tables import (
    bench_table,
    budget_table,
    differing_counters,
    epochs_table,
    evals_table,
    latency,
    notes_table,
    report_tables,
    seconds_table,
)

MACS = "MACs (64×64)"


def test_summary_table_values_and_ratios(make_run):
    run = load_run(make_run(baseline=True))
    table = summary_table([run]).set_index("model")
    assert table.index.tolist() == ["baseline", "dense", "slim", "finetuned"]
    assert table.columns.tolist() == [
        "run", "params", MACS, "paper FLOPs (224×224)", "max_f", "mae", "s_measure", "max_e",
        "params ÷ dense", "MACs ÷ dense", "seconds",
    ]  # fmt: skip
    for name, row in table.iterrows():
        part = run.summary[name]
        assert (row["params"], row[MACS], row["max_f"]) == (part["params"], part["macs"], part["metrics"]["max_f"])
        assert row["params ÷ dense"] == part["params"] / run.summary["dense"]["params"]
    assert pd.isna(table.loc["slim", "paper FLOPs (224×224)"])
    # The slim model is produced by extract and slim, 1.5 s each.
    assert table["seconds"].tolist()[1:] == [1.5, 3.0, 1.5] and pd.isna(table.loc["baseline", "seconds"])


def test_summary_table_of_incomplete_run(make_run):
    assert summary_table([load_run(make_run(stop="finetune"))])["model"].tolist() == ["dense", "slim"]
    assert len(summary_table([load_run(make_run("b", stop="train"))])) == 0


def test_macs_have_a_column_per_image_size(make_run):
    run = load_run(make_run(stop="finetune"))
    other = replace(run, name="other", size=(32, 48))
    table = summary_table([run, other])
    assert table[MACS].isna().tolist() == [False, False, True, True]
    assert table["MACs (32×48)"].isna().tolist() == [True, True, False, False]


def test_layers_have_their_own_image_size(make_run):
    path = make_run(stop="finetune")
    (path / "state.json").unlink()
    (path / "recipe.yaml").write_text((path / "recipe.yaml").read_text().replace("size: 64", "size: 32"))
    run = load_run(path)
    assert "MACs (32×32)" in summary_table([run]) and "MACs after (64×64)" in layers_table(run)
    assert MACS in counters_table(run)["quantity"].tolist()


def test_counts_above_2_53_stay_exact_next_to_missing_ones(make_run):
    run = load_run(make_run(stop="finetune"))
    run.summary["dense"]["paper_flops"] = 2**53 + 1
    assert summary_table([run])["paper FLOPs (224×224)"].tolist() == [2**53 + 1, pd.NA]


def test_unknown_metrics_are_included(make_run):
    run = load_run(make_run(stop="extract"))
    run.summary["dense"]["metrics"] = {"novel": 0.5, "top1": 0.9, "flag": True, "text": "x"}
    columns = summary_table([run]).columns.tolist()
    assert columns[5:7] == ["novel", "top1"] and len(columns) == 10


def test_metric_with_reserved_name_is_prefixed(make_run):
    run = load_run(make_run(stop="extract"))
    held = run.summary["dense"]
    held["metrics"] = {"params": 0.5, "seconds": 0.25, "MACs (64×64)": 0.1}
    row = summary_table([run]).iloc[0]
    assert (row["params"], row[MACS], row["seconds"]) == (held["params"], held["macs"], 1.5)
    assert row["metrics.params"] == 0.5 and row["metrics.seconds"] == 0.25 and row["metrics.MACs (64×64)"] == 0.1


def test_layers_table(make_run):
    run = load_run(make_run())
    table = layers_table(run)
    assert len(table) == len(run.layers)
    for head in ("MACs after (64×64)", "paper FLOPs before (224×224)", "thop MACs after (64×64)"):
        assert head in table
    assert table["MACs after (64×64)"].sum() == run.summary["slim"]["macs"]


def test_layers_table_shares(make_run):
    run = load_run(make_run())
    run.layers.loc[:1, "channels_after"] = 0
    table = layers_table(run)
    for layer, rows in table.groupby("layer"):
        for when in ("before", "after"):
            channels, shares = rows[f"channels {when}"], rows[f"share of channels {when}"]
            if not channels.sum():
                assert shares.isna().all(), layer
            else:
                assert shares.tolist() == pytest.approx((channels / channels.sum()).tolist()), layer


def test_share_is_missing_if_a_count_is_unknown(make_run):
    run = load_run(make_run())
    layers = run.layers.copy()
    layers.loc[0, "channels_after"] = pd.NA
    shares = layers_table(replace(run, layers=layers))["share of channels after"]
    assert shares[:2].isna().all() and not shares[2:].isna().all()


def test_counters_table_notes_differences_only(make_run):
    table = counters_table(load_run(make_run())).set_index(["model", "quantity"])
    assert table.loc[("dense", "params"), "note"] == ""
    row = table.loc[("dense", MACS)]
    assert row["note"].startswith(f"thop {row['thop'] - row['prunekit']:+,} (+")
    assert "fvcore" not in row["note"] and pd.isna(table.loc[("slim", "params"), "torch"])


def test_only_counters_that_differ_are_shown(make_run):
    run = load_run(make_run())
    table, agreeing = differing_counters(counters_table(run))
    assert table.columns.tolist() == ["model", "quantity", "prunekit", "thop", "note"] and len(table) == 2
    assert agreeing == ["fvcore", "torch"]
    same = run.counters.assign(macs=run.counters.groupby("model")["macs"].transform("first"))
    table, agreeing = differing_counters(counters_table(replace(run, counters=same)))
    assert table.columns.tolist() == ["model", "quantity", "prunekit"] and len(table) == 4
    assert agreeing == ["fvcore", "thop", "torch"]


def test_summary_for_a_paper_has_few_columns(make_run):
    runs = [load_run(make_run(name, baseline=True, measured_too=True)) for name in "ab"]
    one, several = (report_tables(found)[0].latex_columns for found in (runs[:1], runs))
    assert one == ["model", "params", "params ÷ dense", MACS, "max_f", "mae"]
    assert several == ["run", "model", "params", MACS, "max_f", "mae"]


def test_latency_uses_the_same_setting_for_all_models(make_run):
    run = load_run(make_run(measured_too=True))
    # The slim model was also measured in ONNX Runtime, but the dense one was not.
    title = "latency ms (eager, batch 1, 64×64, threads 1, cpu)"
    assert latency(run) == (title, {"dense": 20.0, "slim": 12.5, "finetuned": 12.5})
    assert summary_table([run])[title].tolist() == [20.0, 12.5, 12.5]
    assert latency(replace(run, bench=run.bench.iloc[::-1])) == latency(run)
    larger = run.bench.assign(batch=8, median_ms=1000.0)
    assert latency(replace(run, bench=pd.concat([larger, run.bench], ignore_index=True)))[0] == title
    other = replace(run, name="other", bench=run.bench.assign(device="a GPU"))
    assert sum(c.startswith("latency ms") for c in summary_table([run, other])) == 2


def test_latency_of_exported_model_without_bench(make_run):
    run = load_run(make_run())
    assert latency(run) == ("latency ms", {})
    run.summary["export"] = {"path": "model.onnx", "latency_ms": {"dense": 9.0, "slim": 4.0}}
    assert latency(run) == ("latency ms (model.onnx)", {"dense": 9.0, "slim": 4.0, "finetuned": 4.0})
    run.summary["export"]["latency_ms"] = {"median": 5.0, "p90": 7.0}
    assert latency(run)[1] == {"finetuned": 5.0}


def test_bench_and_evals_tables(make_run):
    runs = [load_run(make_run("a", measured_too=True)), load_run(make_run("b"))]
    bench = bench_table(runs)
    assert bench["run"].tolist() == ["a"] * 3 and bench["median ms"].tolist() == [20.0, 12.5, 4.25]
    assert set(bench["size"]) == {"64×64"} and set(bench["device"]) == {"cpu"}
    sets = evals_table(runs)
    assert sets["set"].tolist() == ["ECSSD", "ECSSD", "PASCAL-S", "PASCAL-S"] and sets["max_f"].tolist() == [0.8] * 4
    assert len(bench_table(runs[1:])) == len(evals_table(runs[1:])) == 0


def test_seconds_table(make_run):
    table = seconds_table([load_run(make_run()), load_run(make_run("b", stop="slim"))])
    assert table["total s"].tolist() == [10.5, 3.0]
    assert table.loc[1, "extract s"] == 1.5 and pd.isna(table.loc[1, "slim s"])


@pytest.mark.parametrize("key, share", [("params", None), ("macs", None), ("params_ratio", 0.9), ("macs_ratio", 0.1)])
def test_budget_table(make_run, key, share):
    run = load_run(make_run())
    measure = key.removesuffix("_ratio")
    dense, slim = run.summary["dense"][measure], run.summary["slim"][measure]
    asked = slim if share is None else share
    run.recipe["target"] = {"params": None, key: asked}
    row = budget_table([run]).iloc[0]
    assert (row["dense"], row["slim"]) == (dense, slim)
    assert row["budget"] == (slim if share is None else round(share * dense))
    assert row["within budget"] == ("yes" if slim <= row["budget"] else "no") and row["target"].startswith(key)
    assert len(budget_table([load_run(make_run("b"))])) == 0


def test_notes_table(make_run):
    table = notes_table([load_run(make_run()), load_run(make_run("b", stop="extract"))])
    assert table["run"].tolist() == ["csnet"] and "cannot be pruned" in table["note"][0]


def test_epochs_table(make_run):
    table = epochs_table(load_run(make_run(epochs=4)))
    assert table["stage"].tolist() == ["train"] * 4 + ["finetune"] and table["epoch"].tolist() == [1, 2, 3, 4, 1]
    assert {"loss", "penalty", "lambda", "alive", "mae", "max_f"} <= set(table.columns)


def test_table_stems(make_run):
    runs = [load_run(make_run(name, measured_too=True)) for name in ("a", "b")]
    names = [one.stem for one in report_tables(runs)]
    assert names == [
        "summary", "seconds", "evals", "bench", "notes", "a-counters", "a-layers", "b-counters", "b-layers",
    ]  # fmt: skip
    assert [one.stem for one in report_tables(runs[:1])][-2:] == ["counters", "layers"]
    assert [one.stem for one in report_tables([load_run(make_run("c", stop="train"))])] == ["summary"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (210_985, "210,985"), (999_499, "999,499"), (999_999, "1 M"), (35_300_000, "35.3 M"),
        (610_638_784, "611 M"), (999_999_999, "1 G"), (1.25e12, "1.25 T"), (pd.NA, "–"),
    ],
)  # fmt: skip
def test_short_number(value, text):
    assert short_number(value) == text


@given(st.integers(0, 10**15))
def test_short_number_is_short_and_accurate(value):
    text = short_number(value)
    assert len(text) <= 7 or value >= 10**15
    number, _, unit = text.replace(",", "").partition(" ")
    assert float(number) * {"": 1, "M": 1e6, "G": 1e9, "T": 1e12}[unit] == pytest.approx(value, rel=0.0051)


@given(st.integers(0, 10**18))
def test_format_number_is_exact_for_counts(value):
    assert int(format_number(value).replace(",", "")) == value


@given(st.floats(-1e6, 1e6), st.integers(1, 5))
def test_format_number_never_rounds_to_zero(value, digits):
    shown = float(format_number(value, digits).replace(",", ""))
    assert shown == pytest.approx(value, abs=0.51 * 10**-digits, rel=0) and (shown != 0) == (value != 0)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (41.2, "41 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7510, "2 h 05 min")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_macs_of_run_with_unknown_image_size(make_run):
    path = make_run(stop="slim")
    (path / "recipe.yaml").write_text("name: x\n")
    assert json.loads((path / "summary.json").read_text())["dense"]["macs"]
    table = summary_table([load_run(path)])
    assert "MACs (size unknown)" in table and len(table) == 1


@pytest.mark.parametrize("several", [False, True])
def test_summary_table_with_published_models(make_run, several):
    runs = [load_run(make_run(name)) for name in ("a", "b")][: 1 + several]
    table = summary_table(runs, published=True)
    own = summary_table(runs)
    pd.testing.assert_frame_equal(table.iloc[: len(own)], own)
    rows = table.iloc[len(own) :].set_index("model")
    assert set(rows["run"]) == {"published, ECSSD"}
    assert rows["params"].to_dict() == {
        "CSNet ×1": 210_985, "CSNet ×2": 788_631, "CSNet-L ×1": 93_647, "CSNet-L ×2": 140_894,
    }  # fmt: skip
    assert rows.loc["CSNet-L ×2", ["max_f", "mae", "s_measure", "max_e"]].tolist() == [0.9156, 0.0645, 0.8928, 0.9310]
    assert rows.loc["CSNet ×2", ["max_f", "mae", "s_measure", "max_e"]].isna().all()
