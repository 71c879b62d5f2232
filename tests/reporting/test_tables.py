"""Tables: their numbers, their headers, and what a terminal of 80 columns shows."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from prunekit.errors import CheckpointError
from prunekit.reporting import counters_table, layers_table, load_run, summary_table
from prunekit.reporting.tables import short, terminal_table, write_csv, write_markdown, written_out


def test_summary_has_the_numbers_of_the_folder_and_their_ratios(make_run):
    run = load_run(make_run(baseline=True))
    table = summary_table([run]).set_index("model")
    assert table.index.tolist() == ["baseline", "dense", "slim", "finetuned"]
    assert table.columns.tolist() == [
        "run", "params", "MACs (64×64)", "paper FLOPs (224×224)", "max_f", "mae", "s_measure", "max_e",
        "params ÷ dense", "MACs ÷ dense",
    ]  # fmt: skip
    for name, row in table.iterrows():
        part = run.summary[name]
        assert (row["params"], row["MACs (64×64)"], row["max_f"]) == (
            part["params"],
            part["macs"],
            part["metrics"]["max_f"],
        )
        assert row["params ÷ dense"] == part["params"] / run.summary["dense"]["params"]
    assert pd.isna(table.loc["slim", "paper FLOPs (224×224)"])


def test_parts_that_have_not_run_have_no_row(make_run):
    assert summary_table([load_run(make_run(stop="finetune"))])["model"].tolist() == ["dense", "slim"]
    assert len(summary_table([load_run(make_run("b", stop="train"))])) == 0


def test_runs_of_two_sizes_do_not_share_a_column_of_macs(make_run):
    run = load_run(make_run(stop="finetune"))
    other = replace(run, name="other", size=(32, 48))
    table = summary_table([run, other])
    assert table["MACs (64×64)"].isna().tolist() == [False, False, True, True]
    assert table["MACs (32×48)"].isna().tolist() == [True, True, False, False]


def test_metrics_of_other_tasks_come_along(make_run):
    run = load_run(make_run(stop="extract"))
    run.summary["dense"]["metrics"] = {"novel": 0.5, "top1": 0.9, "flag": True, "text": "x"}
    columns = summary_table([run]).columns.tolist()
    assert columns[5:7] == ["novel", "top1"] and len(columns) == 9


def test_layers_have_a_row_for_each_layer_and_branch(make_run):
    run = load_run(make_run())
    table = layers_table(run)
    assert len(table) == len(run.layers)
    assert (
        "MACs after (64×64)" in table and "paper FLOPs before (224×224)" in table and "thop MACs after (64×64)" in table
    )
    assert table["MACs after (64×64)"].sum() == run.summary["slim"]["macs"]


def test_counters_note_just_what_differs(make_run):
    table = counters_table(load_run(make_run())).set_index(["model", "quantity"])
    assert table.loc[("dense", "params"), "note"] == ""
    row = table.loc[("dense", "MACs (64×64)")]
    assert row["note"].startswith(f"thop {row['thop'] - row['ours']:+,} (+")
    assert "fvcore" not in row["note"] and pd.isna(table.loc[("slim", "params"), "torch"])


def test_csv_is_raw_and_markdown_is_for_people(make_run, tmp_path):
    table = summary_table([load_run(make_run())])
    table.loc[0, "run"] = "a|b"
    table.loc[0, "params"] = 210_985
    back = pd.read_csv(write_csv(table, tmp_path / "t.csv"))
    assert back["params"][0] == 210_985 and back["mae"].tolist() == table["mae"].tolist()
    text = write_markdown(table, tmp_path / "t.md").read_text()
    assert " 210,985 |" in text and "a\\|b" in text and " – |" in text and "nan" not in text.lower()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1


def test_an_empty_table_can_be_written(make_run, tmp_path):
    table = summary_table([load_run(make_run(stop="train"))])
    assert write_csv(table, tmp_path / "t.csv").read_text().startswith("run,model,params")
    assert "params" in write_markdown(table, tmp_path / "t.md").read_text()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        write_csv(pd.DataFrame(), tmp_path / "file" / "t.csv")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (210_985, "210,985"), (999_499, "999,499"), (999_999, "1 M"), (35_300_000, "35.3 M"),
        (610_638_784, "611 M"), (999_999_999, "1 G"), (1.25e12, "1.25 T"), (pd.NA, "–"),
    ],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short(value) == text


@given(st.integers(0, 10**15))
def test_short_numbers_are_short_and_near(value):
    text = short(value)
    assert len(text) <= 7 or value >= 10**15
    number, _, unit = text.replace(",", "").partition(" ")
    assert float(number) * {"": 1, "M": 1e6, "G": 1e9, "T": 1e12}[unit] == pytest.approx(value, rel=0.0051)


@given(st.integers(0, 10**18))
def test_numbers_written_out_are_exact(value):
    assert int(written_out(value).replace(",", "")) == value


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("several", [False, True])
def test_the_terminal_table_fits_and_says_what_it_leaves_out(make_run, width, several):
    runs = [load_run(make_run(baseline=True))]
    for part in ("baseline", "dense", "slim", "finetuned"):
        runs[0].summary[part]["params"] = 999_499
        runs[0].summary[part]["metrics"]["top1"] = 0.5
    if several:
        runs.append(replace(runs[0], name="a_run_with_a_name_that_is_long", size=(32, 32)))
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal_table(runs, console))
    text = console.file.getvalue()
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(re.findall(r"(?<!÷)dense +999,499 ", text)) == len(runs)
    assert "64×64" in text and "999,499" in text
    for column in ("max_f", "mae", "top1"):
        assert column in text
    assert "max_e" in text


def test_a_run_of_unknown_size_has_its_macs(make_run):
    path = make_run(stop="slim")
    assert json.loads((path / "summary.json").read_text())["dense"]["macs"]
    table = summary_table([load_run(path)])
    assert "MACs (size unknown)" in table and len(table) == 1


@pytest.mark.parametrize("several", [False, True])
def test_published_models_stand_below_the_runs(make_run, several):
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
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(terminal_table(runs, console, published=True))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert text.index("finetuned") < text.index("published,") < text.index("ECSSD") < text.index("CSNet-L ×2")
    # The columns of sizes that the published models share with the runs stay to the last.
    assert "718 M" in text and "0.916" in text
