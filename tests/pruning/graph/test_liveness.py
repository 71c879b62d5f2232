import numpy as np
import torch
from helpers.networks import Row

from prunekit.backbones.octresnet import octresnet
from prunekit.backbones.resnet import resnet
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.liveness import (
    below_threshold,
    dead_layers,
    essential_groups,
    group_by_layer,
    removable,
)


def test_branches_of_a_layer_are_removable(row, branched):
    assert not any(removable(row[0], group) for group in row[1])
    model, groups = branched
    layer = next(layer for layer in group_by_layer(groups) if any(g.id == "stage1.1.mix.paths.0to0" for g in layer))
    assert {group.id for group in layer} == {"stage1.1.mix.paths.0to0", "stage1.1.mix.paths.0to1"}
    assert all(removable(model, group) for group in layer)


def test_branch_is_removable_if_its_reader_has_other_inputs():
    """The classifier of an OctResNet reads both branches of the last stage."""
    model = octresnet(depth=8, width=8)
    groups = find_groups(model, torch.zeros(2, 3, 8, 8))
    last = {
        group.id: removable(model, group) for group in groups if any("classifier" in m.tensor for m in group.readers)
    }
    assert list(last.values()) == [True, True] and len(last) == 2
    whole = resnet(depth=8, width=8)
    groups = find_groups(whole, torch.zeros(2, 3, 8, 8))
    assert not any(removable(whole, group) for group in groups)


def test_essential_groups_of_plain_and_branched_layers(row, branched):
    assert [[group.id for group in one] for one in essential_groups(*row)] == [["conv1"], ["conv2"]]
    model, groups = branched
    sets = [{group.id for group in one} for one in essential_groups(model, groups)]
    assert {"stage1.1.mix.paths.0to0", "stage1.1.mix.paths.0to1"} in sets
    assert set().union(*sets) == {group.id for group in groups if group.reason is None}


def test_below_threshold_needs_all_branches_below(branched):
    model, groups = branched
    fine, coarse = "stage1.1.mix.paths.0to0", "stage1.1.mix.paths.0to1"
    values = {group.id: np.full(group.channels, 0.5) for group in groups}
    values[fine][:] = 1e-5

    def found():
        return below_threshold(essential_groups(model, groups), 1e-3, lambda group: values[group.id])

    assert found() == {}
    values[coarse][:] = [*[0.0] * (len(values[coarse]) - 1), 1e-3]
    assert found() == {f"{fine} + {coarse}": 1e-3}


def test_dead_layers():
    model = Row()
    groups = find_groups(model, torch.randn(1, 3, 16, 16))
    assert dead_layers(model, groups) == []
    with torch.no_grad():
        model.bn3.weight.zero_()
    assert dead_layers(model, groups) == ["conv2"]
