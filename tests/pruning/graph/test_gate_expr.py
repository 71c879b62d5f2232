import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prunekit.pruning.graph import gate_expr
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Gate, Group


def gates_of(*weights, variances=None):
    """A model of norms n0, n1, … with these γ, and their gates."""
    model = nn.Module()
    for i, weight in enumerate(weights):
        norm = nn.BatchNorm2d(len(weight))
        norm.weight.data = torch.tensor(weight)
        if variances is not None:
            norm.running_var = torch.tensor(variances[i])
        model.add_module(f"n{i}", norm)
    return model, [Gate(norm=f"n{i}", slice=(0, len(w))) for i, w in enumerate(weights)]


def score(combine, *weights, **options):
    model, gates = gates_of(*weights, **options)
    return gate_expr.gate_scores(
        model, Group(id="g", channels=len(weights[0]), members=[], gates=gates, combine=combine)
    )


def test_serial_score_is_that_of_the_last_norm_unless_a_gate_is_zero():
    found = score({"serial": [0, 1]}, [1e-3, 0.0, 5.0], [2.0, 3.0, 0.0])
    np.testing.assert_allclose(found, [2.0, 0.0, 0.0], rtol=1e-4)


def test_parallel_score_is_the_largest():
    found = score({"parallel": [0, 1]}, [1.0, 0.0, 0.0], [2.0, 3.0, 0.0])
    np.testing.assert_allclose(found, [2.0, 3.0, 0.0], rtol=1e-4)


def test_score_of_serial_inside_parallel():
    found = score({"parallel": [{"serial": [0, 1]}, 2]}, [0.0, 1.0], [9.0, 2.0], [0.0, 1.0])
    np.testing.assert_allclose(found, [0.0, 2.0], rtol=1e-4)


def test_effective_gate_depends_on_running_variance():
    found = score(0, [1.0, -1.0, 1.0], variances=[[1.0, 1e-5, 0.0]])
    np.testing.assert_allclose(found, [1.0, 0.5**0.5, 0.0], rtol=1e-4)


def test_build_and_resolve_expressions():
    a = gate_expr.append_gate(gate_expr.UNGATED, "a", 0)
    assert gate_expr.append_gate(a, "b", 2) == ("serial", a, ("gate", "b", 2))
    both = gate_expr.parallel([a, gate_expr.append_gate(gate_expr.UNGATED, "b", 0)])
    assert both == gate_expr.parallel([both, a])
    assert gate_expr.parallel([a, gate_expr.UNGATED]) == gate_expr.UNGATED
    later = gate_expr.parallel([gate_expr.append_gate(gate_expr.UNGATED, name, 3) for name in "ab"])
    assert later == ("parallel", ("gate", "a", 3), ("gate", "b", 3))
    gates, tree = gate_expr.resolve(later, 2)
    assert [tuple(g.slice) for g in gates] == [(3, 5), (3, 5)] and tree == {"parallel": [0, 1]}


@given(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=3, max_size=3))
def test_parallel_is_dead_only_if_all_parts_are(values):
    assert (score({"parallel": [0, 1, 2]}, *[[v] for v in values])[0] == 0) == (not any(values))
    assert (score({"serial": [0, 1, 2]}, *[[v] for v in values])[0] == 0) == (not all(values))


class Floors(nn.Module):
    """Floors of four depthwise branches that are added, with or without an identity."""

    def __init__(self, identity, floors=10):
        super().__init__()
        self.identity = identity
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.floors = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)) for _ in range(4))
            for _ in range(floors)
        )
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        for branches in self.floors:
            x = sum((branch(x) for branch in branches), start=x if self.identity else 0.0)
        return self.out(x)


@pytest.mark.parametrize("identity", [False, True])
def test_parallel_branches_share_what_they_have_in_common(identity):
    """As a tree, the expression has 4 ** 10 parts."""
    model = Floors(identity)
    group = next(group for group in find_groups(model, torch.randn(2, 3, 8, 8)) if group.id == "stem.0")
    assert len(group.gates) == 41 and len(gate_expr._inner_parts(group.combine)) <= 41 + 10
    assert gate_expr.gate_scores(model, group).min() > 0
    for gate, mask in zip(group.gates, gate_expr.zeroing_masks(model, group, [1]), strict=True):
        model.get_submodule(gate.norm).weight.data[torch.from_numpy(mask)] = 0
    assert (gate_expr.gate_scores(model, group) == 0).tolist() == [False, True, False, False]
