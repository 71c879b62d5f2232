"""The script runs, and what it reports is what it says; no time is judged."""

import json

import pytest
import torch
import training

ARGS = "--width 8 --size 32 --batch 2 --rounds 1 --times 1".split()


def test_all_of_it_on_a_tiny_network(capsys):
    results = training.main([*ARGS, "--json"])
    assert json.loads(capsys.readouterr().out) == results
    assert results["model"] == {"width": 8, "size": 32, "batch": 2}
    assert set(results["seconds"]) == {"straightforward", "ours"}
    assert all(len(values) == 1 and values[0] > 0 for values in results["seconds"].values())
    seconds = results["seconds"]
    assert results["ratio"] == pytest.approx(seconds["straightforward"][0] / seconds["ours"][0])
    for shares in results["profile"].values():
        assert all(value >= 0 for value in shares.values())
        assert shares["depthwise, forward"] > 0 and shares["norm and PReLU, backward"] > 0 and shares["optimiser"] > 0
    assert (
        results["data_seconds"] > 0 and results["dying"]["protected"].keys() == results["dying"]["unprotected"].keys()
    )
    table = training.text(results)
    assert table.count("\n| straightforward |") == 1 and "| protected |" in table


def test_both_ways_compute_the_same():
    losses = {}
    for name in ("straightforward", "ours"):
        case = training.Case(8, 32, 2)
        with getattr(training, name)(case) as step:
            losses[name] = [step() for _ in range(3)]
        losses[name].append(float(sum(p.detach().abs().sum() for p in case.model.parameters())))
    assert losses["ours"][:2] == pytest.approx(losses["straightforward"][:2], rel=1e-4)
    # Adam divides each gradient by its size, so that after two steps a rounding of small ones shows.
    assert losses["ours"][2:] == pytest.approx(losses["straightforward"][2:], rel=1e-3)


def test_the_profile_tells_depthwise_from_other_convolutions():
    conv = torch.nn.Conv2d(4, 4, 3, groups=4)
    x = torch.zeros(2, 4, 8, 8)
    found = training.shares(lambda: conv(x).sum().backward())
    assert found["depthwise, forward"] > 0 and found["convolution, forward"] == 0
