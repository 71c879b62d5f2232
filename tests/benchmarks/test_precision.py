"""The script tells the metrics of each form; float32 forms are the model's own, and lower precision is another file."""

import math

import precision
import pytest
from helpers.small_run import small_run


def test_precision(tmp_path, capsys):
    forms = "eager,deployed,deployed_bf16,ort,ort_int8"
    found = precision.main([str(small_run(tmp_path / "tiny")), "--forms", forms])
    assert list(found) == forms.split(",")
    for form in ("deployed", "ort"):
        assert found[form]["top1"] == pytest.approx(found["eager"]["top1"], abs=3e-3)
    assert all(math.isfinite(value) for metrics in found.values() for value in metrics.values())
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(found) and len({line.count("|") for line in rows}) == 1
