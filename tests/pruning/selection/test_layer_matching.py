import pytest
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.selection.layer_matching import match_layers


@pytest.mark.parametrize(
    ("patterns", "ids"),
    [
        ([], set()),
        (["conv1"], {"conv1"}),
        (["depthwise"], {"conv1"}),
        (["bn3"], {"conv2"}),
        (["conv[12]"], {"conv1", "conv2"}),
        (["bn1", "out"], {"conv1", "out"}),
        (["*"], {"conv1", "conv2", "out"}),
    ],
)
def test_pattern_matches_groups_a_module_produces_or_passes_on(row, patterns, ids):
    assert match_layers(*row, patterns) == ids


def test_module_name_includes_modules_inside_it(branched):
    model, groups = branched
    names = match_layers(model, groups, ["stage1.1"])
    assert names == {"stage1.1.mix.paths.0to0", "stage1.1.mix.paths.0to1"}
    assert names == match_layers(model, groups, ["stage1.1.*"]) and names < match_layers(model, groups, ["stage1"])


def test_pattern_without_match_names_closest_module(row):
    with pytest.raises(PlanError, match=r"no module with channels matches 'depthwize'; did you mean 'depthwise'\?"):
        match_layers(*row, ["conv1", "depthwize"])
    with pytest.raises(PlanError, match="matches 'layer\\[0-9]'; the first are conv1, "):
        match_layers(*row, ["layer[0-9]"])


def test_modules_match_as_their_names_do(row, branched):
    model, groups = row
    assert match_layers(model, groups, [model.conv1, model.bn3]) == match_layers(model, groups, ["conv1", "bn3"])
    assert match_layers(model, groups, [model, "conv1"]) == {"conv1", "conv2", "out"}
    model, groups = branched
    stage = model.get_submodule("stage1.1")
    assert match_layers(model, groups, [stage]) == match_layers(model, groups, ["stage1.1"])


def test_unusable_layers_are_reported(row):
    model, groups = row
    with pytest.raises(
        PlanError, match="ignored_layers: Conv2d is not a module of this model; pass one of its modules"
    ):
        match_layers(model, groups, [nn.Conv2d(3, 8, 3)])
    model.extra = nn.Identity()
    with pytest.raises(PlanError, match=r"sizes: extra \(Identity\) has no channels; pass the layer"):
        match_layers(model, groups, [model.extra], "sizes")
    with pytest.raises(PlanError, match=r"ignored_layers is a list of modules or patterns; write \['conv1'\]"):
        match_layers(model, groups, "conv1")
    with pytest.raises(PlanError, match="is a list of modules or patterns"):
        match_layers(model, groups, model.conv1)
