"""The script runs, and what it reports is what it says; no time is judged."""

import copy
import json
import math

import pytest
import surgery
import torch
from architectures import TINY

ARGS = "--networks tiny-resnet --depths 1 2 --repeats 1 --depth-repeats 1 --size 64".split()


def test_all_of_it_on_tiny_networks(capsys):
    results = surgery.main([*ARGS, "--json"])
    assert json.loads(capsys.readouterr().out) == results
    assert [r["network"] for r in results["networks"]] == ["tiny-resnet"]
    for result in results["networks"]:
        assert result["params_ours"] < result["params"] and result["params_theirs"] < result["params"]
        assert all(value["median"] > 0 for value in result["seconds"].values())
        assert result["seconds_theirs_all_groups"] > 0 and result["seconds_their_pruner"] > 0
        mine, other = result["difference"]["ours"], result["difference"]["theirs"]
        assert max(mine["random_float64"], mine["pink_float64"]) < 1e-12
        assert max(mine["random_float32"], mine["pink_float32"]) < 1e-5
        assert min(other["random_relative"], other["pink_relative"]) > 1e-3
    assert [[p["layers"] for p in d["points"]] for d in results["depth"]] == [[13, 21], [13, 21]]
    assert all(math.isfinite(d[f"exponent_{side}"]) for d in results["depth"] for side in ("ours", "theirs"))


def test_the_tables(capsys):
    surgery.main([*ARGS[:2], "--depths", "--repeats", "1", "--size", "64", "--quick"])
    out = capsys.readouterr().out
    assert out.count("tiny-resnet") == 3 and "ours ÷ theirs" in out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows[:3]} == {rows[0].count("|")} and "–" in rows[2]


@pytest.mark.parametrize("name", TINY)
def test_both_sides_cut_the_same_channels(name):
    case = surgery.prepare(TINY[name], 64, share=0.3, beta=0.0)
    mine = surgery.cut(copy.deepcopy(case.model), case.groups, case)
    other = surgery.torch_pruning_cut(copy.deepcopy(case.model), case)
    assert case.channels == sum(len(channels) for channels in case.roots.values()) > 0
    # Without constants (β = 0) there is nothing to carry, so they are the same model.
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(mine(case.example), other(case.example))


@pytest.mark.parametrize("name", TINY)
def test_the_cases_are_what_they_say(name):
    case = surgery.prepare(TINY[name], 64, share=0.3, beta=0.1)
    norms = [m for m in case.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    gates = torch.cat([norm.weight for norm in norms])
    assert 0.2 < (gates == 0).float().mean() < 0.35
    assert 0.07 < torch.cat([norm.bias for norm in norms]).std() < 0.13
    assert not case.model.training


def test_pink_noise_is_smoother_than_white():
    image = surgery.pink(4, 32, torch.Generator().manual_seed(0))
    assert image.shape == (4, 3, 32, 32) and (image.std((1, 2, 3)) - 1).abs().max() < 1e-5
    assert (image[..., 1:] - image[..., :-1]).std() < 0.8


def test_exponent():
    assert surgery.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert math.isnan(surgery.exponent([1], [1]))
