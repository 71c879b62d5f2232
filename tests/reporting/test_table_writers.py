"""Tables as files: equal numbers in every format, everything escaped."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import CheckpointError
from prunekit.reporting import load_run, summary_table
from prunekit.reporting.number_format import compact_number
from prunekit.reporting.table_writers import (
    PAGE_ROWS,
    escape_latex,
    write_csv,
    write_json,
    write_latex,
    write_markdown,
    write_table,
)
from prunekit.reporting.tables import report_tables


def test_csv_and_json_are_raw_markdown_and_latex_formatted(make_run, tmp_path):
    table = summary_table([load_run(make_run())])
    table.loc[0, "run"] = "a|b_c"
    table.loc[0, "params"] = 210_985
    paths = {path.suffix: path for path in write_table(table, tmp_path / "t")}
    back = pd.read_csv(paths[".csv"])
    assert back["params"][0] == 210_985 and back["mae"].tolist() == table["mae"].tolist()
    rows = json.loads(paths[".json"].read_text())
    assert [row["params"] for row in rows] == table["params"].tolist() and type(rows[0]["params"]) is int
    assert [row["mae"] for row in rows] == table["mae"].tolist()
    assert rows[1]["paper FLOPs (224×224)"] is None and list(rows[0]) == table.columns.tolist()
    text = paths[".md"].read_text()
    assert " 210,985 |" in text and "a\\|b\\_c" in text and " – |" in text and "nan" not in text.lower()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1
    text = paths[".tex"].read_text()
    assert "& 210,985 &" in text and r"a\textbar{}b\_c" in text and r"& \textendash{} &" in text
    assert "nan" not in text.lower() and "MACs" in text and r"(64$\times$64)" in text


def test_all_tables_are_valid_in_every_format(make_run, tmp_path):
    for one in report_tables([load_run(make_run(baseline=True, measured_too=True))], published=True):
        for path in write_table(one.data, tmp_path / one.stem, one.latex_columns):
            check(path, one.data if path.suffix != ".tex" or one.latex_columns is None else one.data[one.latex_columns])


def check(path, table):
    text = path.read_text()
    if path.suffix == ".json":
        assert len(json.loads(text)) == len(table)
    elif path.suffix == ".csv":
        assert {len(row) for row in csv.reader(io.StringIO(text))} == {len(table.columns)}
    elif path.suffix == ".md":
        lines = text.splitlines()
        assert len(lines) == len(table) + 2
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(table.columns) + 1}
    else:
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        heads = len(rows) - len(table)
        assert heads in (1, 2)
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table.columns) - 1}
        kind = "longtable" if len(table) > PAGE_ROWS else "tabular"
        assert text.count(f"\\begin{{{kind}}}") == text.count(f"\\end{{{kind}}}") == 1
        for rule in ("toprule", "midrule", "bottomrule"):
            assert text.count(f"\\{rule}") == 1
        depth = 0
        for sign in re.findall(r"(?<!\\)(?:\\\\)*([{}])", text):
            depth += 1 if sign == "{" else -1
            assert depth >= 0
        assert depth == 0


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(names, names, st.one_of(st.none(), st.floats(-1e9, 1e9)))
def test_any_name_is_escaped_in_every_format(tmp_path_factory, head, name, number):
    table = pd.DataFrame({f"x{head}": pd.array([number, 1.0], "Float64"), "run": [name, "b"], "model": ["a", "\ud800"]})
    folder = tmp_path_factory.mktemp("formats")
    for path in write_table(table, folder / "t"):
        if path.suffix == ".csv":
            rows = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
            assert rows[1][1] == re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", name) and len(rows) == 3
        elif path.suffix == ".json":
            assert json.loads(path.read_text())[0]["run"] == name
        elif path.suffix == ".md":
            lines = path.read_text().split("\n")
            assert len(lines) == 5 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 4 for line in lines[:-1])
        else:
            check(path, table)


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("a_b & 50% of #1 for $2", r"a\_b \& 50\% of \#1 for \$2"),
        ("\\input{x}", r"\textbackslash{}input\{x\}"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("CSNet ×1 ÷ –", r"CSNet $\times$1 $\div$ \textendash{}"),
        ("a--b\n[c]", "a-{}-b [c]"),
        ("[c]", "{}[c]"),
    ],
)
def test_escape_latex(text, escaped):
    assert escape_latex(text) == escaped


def test_narrow_latex_is_for_a_column_of_a_paper(make_run, tmp_path):
    run = load_run(make_run(baseline=True, measured_too=True))
    run.summary["slim"] |= {"params": 73_345, "macs": 2_000_000}
    run.summary["slim"]["metrics"] = {"max_f": 0.9, "mae": 0.05, "top1": 0.7352}
    table = summary_table([run])
    text = write_latex(table, tmp_path / "t.tex", narrow=True).read_text()
    rows = [
        [cell.strip() for cell in line.removesuffix(r" \\").split("&")] for line in text.splitlines() if "&" in line
    ]
    heads = [" ".join(filter(None, parts)) for parts in zip(*rows[:2], strict=True)]
    slim = dict(zip(heads, rows[4], strict=True))
    assert slim["model"] == "slim" and slim["params"] == "73.3k" and slim[r"MACs (64$\times$64)"] == "2.00M"
    assert slim[r"max F $\uparrow$"] == r"\textbf{0.900}" and slim[r"MAE $\downarrow$"] == r"\textbf{0.050}"
    assert slim["params (\\%)"] == f"{100 * 73_345 / run.summary['dense']['params']:.1f}"
    # One value is not the best of several.
    assert slim[r"top-1 $\uparrow$ (\%)"] == "73.5"
    assert rows[5][heads.index("model")] == "fine-tuned"
    # Of the other two metrics, the baseline has the best values.
    assert text.count("textbf") == 4
    assert text.count("{") == text.count("}")


def test_narrow_latex_has_one_column_of_macs(make_run, tmp_path):
    runs = [load_run(make_run("a")), replace(load_run(make_run("b", seed=1)), size=(32, 32))]
    one = report_tables(runs)[0]
    text = write_latex(one.data[one.latex_columns], tmp_path / "t.tex", narrow=True).read_text()
    assert text.count("MACs") == 1 and "64" not in text.partition("midrule")[0]
    assert all(compact_number(run.summary[name]["macs"]) in text for run in runs for name in ("dense", "slim"))


def test_all_of_equal_best_values_are_bold(tmp_path):
    table = pd.DataFrame({"model": list("abc"), "max_f": pd.array([0.5, 0.5, None], "Float64")})
    assert "textbf" not in write_latex(table, tmp_path / "t.tex", narrow=True).read_text()
    table["max_f"] = pd.array([0.5, 0.5, 0.25], "Float64")
    assert write_latex(table, tmp_path / "t.tex", narrow=True).read_text().count(r"\textbf{0.500}") == 2


def test_latex_minus_and_hyphen(tmp_path):
    table = pd.DataFrame({"name": ["-a"], "value": [-0.5]})
    assert "-a & $-$0.5000" in write_latex(table, tmp_path / "t.tex").read_text()


def test_long_table_is_longtable(make_run, tmp_path):
    run = load_run(make_run())
    one = next(one for one in report_tables([run]) if one.name == "layers")
    text = write_latex(one.data, tmp_path / "t.tex").read_text()
    assert len(one.data) > PAGE_ROWS and r"\begin{longtable}" in text and r"\endhead" in text
    assert "longtable" in text.splitlines()[0] and "booktabs" in text.splitlines()[0]


def test_empty_table(make_run, tmp_path):
    table = summary_table([load_run(make_run(stop="train"))])
    assert write_csv(table, tmp_path / "t.csv").read_text().startswith("run,model,params")
    assert "params" in write_markdown(table, tmp_path / "t.md").read_text()
    assert json.loads(write_json(table, tmp_path / "t.json").read_text()) == []
    assert r"\bottomrule" in write_latex(table, tmp_path / "t.tex").read_text()


def test_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        write_csv(pd.DataFrame(), tmp_path / "file" / "t.csv")
