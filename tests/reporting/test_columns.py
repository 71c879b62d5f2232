"""Column selection and sorting."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import PrunekitError
from prunekit.reporting.columns import arrange_table

TABLE = pd.DataFrame(
    {
        "run": ["a", "a", "B"],
        "params": pd.array([30, 10, 20], "Int64"),
        "MACs (64×64)": pd.array([3, 1, None], "Int64"),
        "MACs (8×8)": pd.array([None, None, 2], "Int64"),
        "params ÷ dense": pd.array([1.0, 0.5, None], "Float64"),
        "latency ms (onnx, batch 1)": pd.array([None, 0.5, None], "Float64"),
    }
)


@pytest.mark.parametrize(
    "names, columns",
    [
        ("params,run", ["params", "run"]),
        (" params , RUN, params", ["params", "run"]),
        ("macs", ["MACs (64×64)", "MACs (8×8)"]),
        ("MACs (8×8)", ["MACs (8×8)"]),
        ("params_ratio", ["params ÷ dense"]),
        ("params ÷ dense", ["params ÷ dense"]),
        ("latency_ms,run", ["latency ms (onnx, batch 1)", "run"]),
        ("latency ms (onnx, batch 1),run", ["latency ms (onnx, batch 1)", "run"]),
    ],
)
def test_find_columns_by_name(names, columns):
    table = arrange_table(TABLE, names, None)
    assert table.columns.tolist() == columns and len(table) == 3


@pytest.mark.parametrize(
    "option, word",
    [("parms", "'params'"), ("mac", "'MACs'"), ("zzz", "run, params, MACs"), ("params,,run", "empty"), ("", "empty")],
)
@pytest.mark.parametrize("which", ["--columns", "--sort"])
def test_unknown_column_suggests_nearest(option, word, which):
    with pytest.raises(PrunekitError, match=which) as error:
        arrange_table(TABLE, *((option, None) if which == "--columns" else (None, option)))
    assert word in str(error.value) and "\n" not in str(error.value) and error.value.exit_status == 2


@pytest.mark.parametrize(
    "sort, params",
    [
        ("params", [10, 20, 30]),
        ("-params", [30, 20, 10]),
        ("run,params", [10, 30, 20]),
        ("-run,params", [20, 10, 30]),
        ("macs", [10, 20, 30]),
        ("params_ratio", [10, 30, 20]),
        ("-params_ratio", [30, 10, 20]),
        ("-latency_ms", [10, 30, 20]),
    ],
)
def test_sort_is_stable_with_missing_values_last(sort, params):
    table = arrange_table(TABLE, None, sort)
    assert table["params"].tolist() == params and table.index.tolist() == [0, 1, 2]
    assert arrange_table(TABLE, "run", sort)["run"].tolist() == table["run"].tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 3))), max_size=12), st.booleans())
def test_sort_matches_python(rows, descending):
    table = pd.DataFrame({"place": range(len(rows)), "a": [a for a, _ in rows]}).astype("Int64")
    table["b"] = pd.array([b for _, b in rows], "Int64")
    sign = -1 if descending else 1
    found = arrange_table(table, None, f"{'-' * descending}b,a")["place"].tolist()
    key = lambda i: (rows[i][1] is None, sign * (rows[i][1] or 0), rows[i][0], i)  # noqa: E731
    assert found == sorted(range(len(rows)), key=key)
