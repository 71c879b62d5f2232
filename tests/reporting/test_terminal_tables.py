"""Tables in the terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from prunekit.reporting import counters_table, load_run
from prunekit.reporting.tables import bench_table, evals_table
from prunekit.reporting.terminal_tables import terminal_layers, terminal_summary, terminal_table


def printed(make, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(make(console))
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("several", [False, True])
def test_summary_fits_and_names_left_out_columns(make_run, width, several):
    runs = [load_run(make_run(baseline=True, measured_too=True))]
    for part in ("baseline", "dense", "slim", "finetuned"):
        runs[0].summary[part]["params"] = 999_499
        runs[0].summary[part]["metrics"]["top1"] = 0.5
    if several:
        runs.append(replace(runs[0], name="a_run_with_a_name_that_is_long", size=(32, 32)))
    text = printed(lambda console: terminal_summary(runs, console), width)
    assert len(re.findall(r"(?<!÷)dense +999,499 ", text)) == len(runs)
    assert "64×64" in text and "999,499" in text and "…" not in text.replace("a_run_with_a_…", "")
    for column in ("max_f", "mae", "top1", "max_e", "seconds", "latency"):
        assert column in text


@pytest.mark.parametrize("several", [False, True])
def test_published_models_have_their_own_section(make_run, several):
    runs = [load_run(make_run(name)) for name in ("a", "b")][: 1 + several]
    text = printed(lambda console: terminal_summary(runs, console, published=True))
    assert text.index("finetuned") < text.index("published,") < text.index("ECSSD") < text.index("CSNet-L ×2")
    # Measures of size that the published models share with the runs are left out last.
    assert "718 M" in text and "0.916" in text


def test_columns_and_sort(make_run):
    runs = [load_run(make_run(name, seed=i)) for i, name in enumerate("ab")]
    text = printed(lambda console: terminal_summary(runs, console, columns="model,mae,run", sort="mae,run"))
    head, _, *rows = (line.split() for line in text.splitlines() if line.strip())
    assert head == ["model", "mae", "run"]
    assert rows[:6] == [
        ["dense", "0.060", "a"], ["dense", "0.060", "b"], ["finetuned", "0.060", "a"], ["finetuned", "0.060", "b"],
        ["slim", "0.063", "a"], ["slim", "0.063", "b"],
    ]  # fmt: skip


def test_sorted_summary_labels_published_models(make_run):
    runs = [load_run(make_run())]
    text = printed(lambda console: terminal_summary(runs, console, published=True, sort="-max_f"))
    lines = [line for line in text.splitlines() if re.search(r"0\.\d", line)]
    assert "published, ECSSD" in lines[0] and "CSNet-L ×2" in lines[0] and lines[2].startswith("csnet")


def test_small_values_are_not_displayed_as_zero(make_run):
    run = load_run(make_run(stop="extract"))
    run.summary["dense"]["metrics"] = {"error": 0.00001}
    assert "1.0e-05" in printed(lambda console: terminal_summary([run], console))


def test_other_tables_fit(make_run):
    run = load_run(make_run(measured_too=True))
    for table in (evals_table([run]), bench_table([run]), counters_table(run)):
        text = printed(lambda console, table=table: terminal_table(table, False, console))
        assert len(text.splitlines()) >= len(table) + 2


def test_measurements_fit_80_columns_without_broken_words(make_run):
    run = load_run(make_run(measured_too=True))
    sets = evals_table([run]).assign(s_measure=0.8, max_e=0.9, set="DUTS-TE, all images")
    sets["model"] = "finetuned"
    bench = bench_table([run]).assign(form="onnx-int8", device="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
    for table in (sets, bench.assign(batch=[1, 8, 64], threads=[1, 2, 16])):
        table["run"] = "a_run_with_a_long_name"
        for with_run in (False, True):
            text = printed(lambda console, table=table, with_run=with_run: terminal_table(table, with_run, console))
            words = set(text.split())
            assert {*table["model"], *(["a_run_with_a_long_name"] if with_run else [])} <= words
            assert all(
                name in " ".join(text.split()) for name in table.columns.drop(["run", "form"], errors="ignore")[3:]
            )


def test_equal_settings_are_in_the_caption(make_run):
    run = load_run(make_run(measured_too=True))
    text = printed(lambda console: terminal_table(bench_table([run]), False, console))
    assert text.splitlines()[0].split() == ["model", "form", "median", "ms", "p10", "ms", "p90", "ms", "peak", "MB"]
    assert "batch 1; size 64×64; threads 1; device cpu" in text
    text = printed(lambda console: terminal_table(evals_table([run]), False, console))
    assert "size 64; images 40; skipped 0" in text and "mode" not in text.split()


def test_terminal_layers(make_run):
    run = load_run(make_run(units=("block",)))
    text = printed(lambda console: terminal_layers(run))
    for layer, rows in run.layers.groupby("layer"):
        line = next(line for line in text.splitlines() if line.startswith(f"{layer} "))
        before, after = ("+".join(map(str, rows[f"channels_{when}"])) for when in ("before", "after"))
        assert f"{before} → {after}" in line
    assert "64×64" in text


def test_control_characters_are_replaced(make_run):
    run = replace(load_run(make_run()), name="a\x1b[31mb\nc")
    run.layers["layer"] = "x\x1b]0;y"
    for make in (lambda console: terminal_summary([run, run], console), lambda console: terminal_layers(run)):
        assert "\x1b" not in printed(make)
