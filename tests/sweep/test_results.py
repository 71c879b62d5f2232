import pandas as pd
import pytest

from prunekit.sweep.results import importance_table, means_table, on_front

TABLE = pd.DataFrame(
    {
        "ratio": ["0.5", "0.5", "0.2", "0.2"],
        "seed": ["0", "1", "0", "1"],
        "top1": [0.9, 0.8, 0.7, 0.75],
        "mae": [0.1, 0.2, 0.3, 0.4],
        "params": [50, 50, 20, 20],
        "macs": [5, 6, 2, 2],
    }
)


def test_front_holds_what_nothing_dominates():
    assert on_front(TABLE, "top1").tolist() == [True, False, False, True]
    assert on_front(TABLE, "mae").tolist() == [True, False, True, False]


def test_failed_trials_are_not_on_the_front_and_a_cost_that_some_lack_is_ignored():
    table = TABLE.assign(top1=[0.9, None, 0.7, 0.75], **{"latency ms": [1.0, None, None, 2.0]})
    assert on_front(table, "top1").tolist() == [True, False, False, True]


def test_equal_trials_are_both_on_the_front():
    assert on_front(pd.concat([TABLE[:1]] * 2, ignore_index=True), "top1").all()


def test_means_over_seeds():
    means = means_table(TABLE, ["ratio", "seed"], "top1")
    assert means["ratio"].tolist() == ["0.5", "0.2"] and means["seeds"].tolist() == [2, 2]
    assert means["top1"].tolist() == pytest.approx([0.85, 0.725])
    assert means["std"].tolist() == pytest.approx([0.0707107, 0.0353553], rel=1e-5)
    assert means["macs"].tolist() == [5.5, 2]
    assert means_table(TABLE, ["ratio"], "top1") is None and means_table(TABLE, ["seed"], "top1") is None


def test_importance_is_the_share_of_variance():
    shares = importance_table(TABLE, ["ratio", "seed"], "top1").set_index("key")
    # Deviations of the means from 0.7875: ±0.0625 by ratio, ±0.0125 by seed; the variance of all is 0.00546875.
    assert shares["share of variance"].to_dict() == pytest.approx({"ratio": 5 / 7, "seed": 1 / 35})
    assert shares["best value"].to_dict() == {"ratio": "0.5", "seed": "0"}
    assert importance_table(TABLE, ["ratio"], "mae")["best value"].tolist() == ["0.5"]
