import numpy as np
import pytest
import torch
from helpers.zoo_attention import ATTENTION

import prunekit
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.isomorphic import structure
from prunekit.pruning.selection.selector import Selector

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = ATTENTION["own_width"]().eval()
    return model, find_groups(model, IMAGES)


def random_scores(groups, scale=lambda group: 1.0, seed=0):
    rng = np.random.default_rng(seed)
    return {group.id: rng.uniform(0.1, 1, group.channels) * scale(group) for group in groups}


def by_structure(model, groups):
    found = {}
    for group in (group for group in groups if group.reason is None):
        found.setdefault(structure(model, group), []).append(group)
    return found


def test_twins_in_two_blocks_have_the_same_structure(transformer):
    names = [sorted(group.id for group in own) for own in by_structure(*transformer).values()]
    assert ["blocks.0.fc1", "blocks.1.fc1"] in names and ["blocks.0.fc2", "blocks.1.fc2"] not in names


@pytest.mark.parametrize("seed", range(3))
def test_each_structure_loses_the_same_share_whatever_its_scale(transformer, seed):
    model, groups = transformer
    scores = random_scores(groups, lambda group: 10.0 ** (len(group.members) % 5), seed)
    dead = Selector(model, groups, scores, scope="isomorphic").select(pruning_ratio=0.4).dead
    for own in by_structure(model, groups).values():
        lost, width = sum(len(dead[group.id]) for group in own), sum(group.channels for group in own)
        assert abs(lost - 0.4 * width) <= 1 + 0.05 * width
        kept = [s for group in own for k, s in enumerate(scores[group.id]) if k not in dead[group.id]]
        gone = [scores[group.id][k] for group in own for k in dead[group.id]]
        assert not gone or max(gone) <= min(kept)  # the lowest of the structure


def test_pruner_meets_a_target_within_structures(transformer):
    model, _ = transformer
    options = {"importance": "magnitude", "target": {"params_ratio": 0.6}}
    _, report = prunekit.Pruner(model, IMAGES, isomorphic=True, **options).step()
    assert abs(report.after.params / report.before.params / 0.6 - 1) <= 0.02


def test_wrong_combinations_are_reported(transformer):
    model, groups = transformer
    with pytest.raises(prunekit.PrunekitError, match="drop one of the two"):
        prunekit.Pruner(model, IMAGES, pruning_ratio=0.3, isomorphic=True, global_pruning=False)
    with pytest.raises(prunekit.PrunekitError, match="give a pruning_ratio instead of a threshold"):
        prunekit.extract(model, groups, 0.1, scores=random_scores(groups), scope="isomorphic")
