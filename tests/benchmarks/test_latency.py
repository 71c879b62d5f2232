"""The scripts run, and their ratios match their measurements. No time is asserted."""

import json
import math

import latency
import pytest
import scaling


@pytest.mark.slow
def test_latency_of_a_random_slim_network(capsys):
    given = "--width 10 --size 32 --seconds 0.01 --threads 1 --forms eager,deployed --json".split()
    result = latency.main(given)
    assert json.loads(capsys.readouterr().out) == result
    dense, slim = result["models"]["dense"], result["models"]["slim"]
    assert slim["params"] < dense["params"] and result["slim_over_dense"]["MACs"] == slim["macs"] / dense["macs"]
    assert slim["faster"]["deployed than eager"] == slim["ms"]["eager"] / slim["ms"]["deployed"]
    assert slim["limits_ms"]["MACs"] == pytest.approx(2 * slim["macs"] / result["gflops"] / 1e6)
    latency.show(result)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


@pytest.mark.slow
def test_scaling(capsys):
    given = "--widths 8 16 --depths --sizes 32 48 --batches --width 8 --size 32 --seconds 0.01 --threads 1".split()
    result = scaling.main(given)
    assert set(result) == {"width", "resolution"} and "exponent" in capsys.readouterr().out
    assert result["resolution"]["exponents"]["MACs"] == pytest.approx(2, abs=0.05)
    assert all(math.isfinite(p) for axis in result.values() for p in axis["exponents"].values())
    assert all(ratios[0] == 1 for axis in result.values() for ratios in axis["ratios"].values())


def test_fit_exponent():
    assert scaling.fit_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert math.isnan(scaling.fit_exponent([1], [1]))
