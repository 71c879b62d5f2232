"""Every architecture of the zoo: random gates die, the slim model computes the same, and its parameters are gone."""

import pytest
import torch
from networks import kill, params, settle
from zoo import ZOO

from prunekit.pruning.extract import extract
from prunekit.pruning.groups import find_groups
from prunekit.pruning.slim import slim


def prepared(name, seed):
    torch.manual_seed(seed)
    model = ZOO[name]()
    example = settle(model, seed)
    return model, example, find_groups(model, example)


@pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(ZOO))
def test_random_dead_gates(name, seed):
    model, example, groups = prepared(name, seed)
    kill(model, groups, 0.2 + 0.2 * seed, seed)
    small, proof = slim(model, extract(model, groups), example, groups=groups)
    assert proof.holds and proof.max_abs_diff <= proof.tolerance
    with torch.no_grad():
        other = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed + 99))
        a, b = model.double()(other.double()), small.double()(other.double())
    assert (a - b).abs().max() <= 2e-6 * max(1, a.abs().max())
    assert params(small) < params(model)
