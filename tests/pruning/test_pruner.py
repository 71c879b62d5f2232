import copy
import warnings

import numpy as np
import pytest
import torch
import torch_pruning
from helpers.marks import slow
from helpers.networks import init_norms
from helpers.zoo import ZOO
from torch import nn

import prunekit
from prunekit.backbones.resnet import resnet
from prunekit.errors import PrunekitError, PrunekitWarning
from prunekit.pruning import pruner as pruner_module

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return resnet(8)


def step(model, **options):
    pruner = prunekit.Pruner(model, IMAGES, **{"importance": "magnitude", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrunekitWarning)
        return pruner.step()


def loss(model):
    return [nn.functional.cross_entropy(model(IMAGES), LABELS)]


def widths(report):
    return {name: after / before for name, (after, before) in report.layers.items() if name != "classifier"}


def test_uniform_ratio_prunes_the_same_share_of_each_layer(model):
    slim, report = step(model, pruning_ratio=0.5, global_pruning=False)
    assert set(widths(report).values()) == {0.5}
    assert report.layers["classifier"] == (10, 10)
    assert report.equivalence.passed and slim(IMAGES).shape == (4, 10)
    assert slim.conv.out_channels == 8


def test_global_ratio_lets_layers_compete(model):
    _, report = step(model, pruning_ratio=0.5)
    assert len(set(widths(report).values())) > 1
    prunable = {group.id: group for group in prunekit.find_groups(model, IMAGES) if group.reason is None}
    kept = sum(len(report.plan.kept(group)) for group in prunable.values())
    total = sum(group.channels for group in prunable.values())
    assert kept == total - total // 2


@pytest.mark.parametrize(
    "target", [{"macs_ratio": 0.5}, slow({"params_ratio": 0.4}), {"params": 30_000}, slow({"macs": 5_000_000})]
)
def test_target_is_reached(model, target):
    slim, report = step(model, target=target)
    ((name, value),) = target.items()
    measure = name.removesuffix("_ratio")
    goal = value * getattr(report.before, measure) if name.endswith("_ratio") else value
    assert 0.98 * goal <= getattr(report.after, measure) <= goal
    assert report.after == prunekit.count(slim, IMAGES)


@pytest.mark.parametrize("options", [{"pruning_ratio": 0.5}, slow({"pruning_ratio": 0.5, "global_pruning": False})])
def test_steps_end_at_the_ratio_of_one_step(model, options):
    _, at_once = step(model, importance="random", **options)
    pruner = prunekit.Pruner(model, IMAGES, importance="random", steps=3, **options)
    sizes = []
    for number in (1, 2, 3):
        slim, report = pruner.step()
        assert report.step == number and pruner.model is slim and report.equivalence.passed
        sizes.append(sum(after for after, _ in report.layers.values()))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    if "global_pruning" in options:
        assert report.after == at_once.after
    else:
        groups = prunekit.find_groups(model, IMAGES)
        kept = [sum(len(plan.kept(g)) for g in groups if g.reason is None) for plan in (at_once.plan,)]
        assert kept == [sum(g.channels for g in prunekit.find_groups(slim, IMAGES) if g.reason is None)]
    with pytest.raises(PrunekitError, match="all 3 steps of this Pruner are done; make a new one to prune further"):
        pruner.step()


@pytest.mark.parametrize(("steps", "times"), [(1, 1), (2, 2)])
def test_the_groups_of_a_slim_model_are_found_only_for_another_step(model, monkeypatch, steps, times):
    called = []
    monkeypatch.setattr(pruner_module, "find_groups", lambda *args: called.append(args) or prunekit.find_groups(*args))
    step(model, pruning_ratio=0.3, steps=steps)
    assert len(called) == times


def test_steps_continue_from_the_trained_model(model):
    pruner = prunekit.Pruner(model, IMAGES, importance="taylor", target={"macs_ratio": 0.5}, steps=2, loss=loss)
    slim, first = pruner.step()
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(slim)[0].backward()
        optimizer.step()
    _, second = pruner.step()
    assert second.before == first.after
    assert second.after.macs == pytest.approx(0.5 * first.before.macs, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"target": {"macs_ratio": 0.5}, "importance": "gate", "cost_power": 1},
        {"pruning_ratio": 0.4},
        {"pruning_ratio": 0.4, "global_pruning": False, "importance": "taylor", "loss": loss},
    ],
)
def test_gradual_pruning_leaves_nothing_to_lose(model, options):
    trained = copy.deepcopy(model).train()
    pruner = prunekit.Pruner(trained, IMAGES, **{"importance": "magnitude", **options})
    pruner_groups = [group for group in prunekit.find_groups(trained, IMAGES) if group.reason is None]
    gradual = pruner.gradual(8, start=0.25, end=0.75, rounds=2)
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss(trained)[0].backward()
        optimizer.step()
        gradual.step()
    slim, report = pruner.step()
    with torch.no_grad():
        dense, slimmed = trained.eval()(IMAGES), slim.eval()(IMAGES)
    assert torch.allclose(dense, slimmed, atol=1e-5 * float(dense.abs().max()))
    assert report.after.params < report.before.params
    if "target" in options:
        assert 0.49 <= report.after.macs / report.before.macs <= 0.5
    zeros = sum(int((v == 0).sum()) for v in prunekit.importance.gate(trained, pruner_groups).values())
    pruned = sum(group.channels - len(report.plan.kept(group)) for group in pruner_groups)
    assert zeros == pruned and not any(" tie " in note for note in report.notes)


def test_gradual_pruning_needs_one_step(model):
    with pytest.raises(PrunekitError, match=r"gradual\(\) needs a Pruner with steps=1, not 3"):
        prunekit.Pruner(model, IMAGES, pruning_ratio=0.5, steps=3).gradual(10)


def test_a_trained_copy_replaces_the_model(model):
    pruner = prunekit.Pruner(model, IMAGES, importance="magnitude", pruning_ratio=0.4, steps=2)
    slim, _ = pruner.step()
    copy = torch.optim.swa_utils.AveragedModel(slim).module
    pruner.model = copy
    last, _ = pruner.step()
    assert last is not copy and pruner.model is last
    with pytest.raises(PrunekitError, match=r"pruner.model must have the layers that step\(\) returned"):
        pruner.model = model


def test_ignored_layers_keep_their_channels(model):
    for ignored in ([model.conv, "stage2*"], ["conv", model.stage2]):
        _, report = step(model, pruning_ratio=0.5, ignored_layers=ignored)
        kept = {name for name, share in widths(report).items() if share == 1}
        assert kept >= {"conv", "stage1.0.conv2", *(name for name in report.layers if name.startswith("stage2"))}
        assert report.layers["stage3.0.conv1"][0] < 64


@pytest.mark.parametrize("options", [slow({}), {"pruning_ratio": 0.25}, {"target": {"params_ratio": 0.4}}])
def test_per_layer_ratio_overrides_the_ranking(model, options):
    ratios = {model.stage1[0].conv1: 0.5, "stage3.0.conv1": 0.75}
    _, report = step(model, per_layer_ratio=ratios, **options)
    assert report.layers["stage1.0.conv1"] == (8, 16) and report.layers["stage3.0.conv1"] == (16, 64)
    others = {n: share for n, share in widths(report).items() if n not in ("stage1.0.conv1", "stage3.0.conv1")}
    assert (min(others.values()) < 1) == bool(options)


def test_round_to_and_min_channels(model):
    _, report = step(model, pruning_ratio=0.9, round_to=8, min_channels=16)
    assert all(after % 8 == 0 and after >= 16 for name, (after, _) in report.layers.items() if name != "classifier")


def test_importance_functions(model):
    def last_channels_first(model, groups):
        return {group.id: torch.arange(group.channels).flip(0) for group in groups if group.reason is None}

    _, report = step(model, importance=last_channels_first, pruning_ratio=0.5, global_pruning=False)
    assert report.plan.groups["conv"] == list(range(8))
    gates, _ = step(model, importance=prunekit.importance.magnitude, pruning_ratio=0.5)
    assert prunekit.count(gates, IMAGES).params < prunekit.count(model, IMAGES).params
    _, report = step(model, importance="taylor", pruning_ratio=0.5, loss=lambda model: loss(model)[0])
    assert report.equivalence.passed


def test_report_is_readable(model):
    _, report = step(model, pruning_ratio=0.5, round_to=16)
    text = str(report).splitlines()
    assert text[0] == "step 1/1" and repr(report) == str(report)
    assert text[1].split() == ["params", f"{report.before.params:,}", "→", f"{report.after.params:,}",
                               f"({report.after.params / report.before.params:.1%})"]  # fmt: skip
    assert any("equivalence check passed" in line for line in text)
    assert text[-len(report.notes)].startswith("  note: ") and "round_to 16" in str(report)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3", "efficientnet"])
def test_target_is_reached_in_networks_whose_constants_vary(name):
    """Padded depthwise convolutions and squeeze-excite: with β, the cut channels emit no constants."""
    torch.manual_seed(0)
    mobile = ZOO[name]()
    example = init_norms(mobile, size=16)
    _, report = prunekit.Pruner(mobile, example, target={"macs_ratio": 0.5}).step()
    assert abs(report.after.macs / report.before.macs / 0.5 - 1) <= 0.02
    assert report.equivalence.given_back == 0 and 0 < report.equivalence.drift < 0.1 * report.equivalence.output_size
    assert report.equivalence.describe_drift() in str(report)


def test_the_model_given_is_not_changed(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(model, importance="taylor", loss=loss, pruning_ratio=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r'give pruning_ratio=0.5 \(of the channels\) or target={"macs_ratio": 0.5}'),
        ({"pruning_ratio": 0.5, "target": {"macs_ratio": 0.5}}, "pruning_ratio and target are both given"),
        ({"pruning_ratio": 50}, r"pruning_ratio=50: must be from 0 to 1; 0.3 prunes 30%"),
        ({"per_layer_ratio": {"conv": 1.5}}, "per_layer_ratio of conv=1.5: must be from 0 to 1"),
        ({"target": {"macs": 5_000_000, "params": 10}}, "a budget is one of .*; macs and params are given"),
        ({"target": {"mac_ratio": 0.5}}, "unknown target 'mac_ratio', did you mean 'macs_ratio'"),
        ({"target": {"macs_ratio": 1.5}}, "macs_ratio=1.5: must be above 0 and below 1"),
        ({"target": {"params": 10}}, "the budget of 10 params cannot be met"),
        ({"target": 0.5}, r'target=0.5: must be a dict such as {"macs_ratio": 0.5}'),
        ({"pruning_ratio": 0.5, "importance": "magnitud"}, "unknown importance 'magnitud', did you mean 'magnitude'"),
        ({"pruning_ratio": 0.5, "importance": "taylor"}, "importance='taylor' needs a loss"),
        (
            {"pruning_ratio": 0.5, "importance": "taylor", "loss": nn.CrossEntropyLoss()},
            "loss is CrossEntropyLoss, not",
        ),
        ({"pruning_ratio": 0.5, "importance": 3}, "importance is int; pass a name such as 'magnitude'"),
        (
            {"pruning_ratio": 0.5, "importance": torch_pruning.importance.MagnitudeImportance()},
            "is torch-pruning's Magnitude.*; use one of 'ablation', 'gate'",
        ),
        ({"pruning_ratio": 0.5, "ignored_layers": [nn.Conv2d(3, 8, 3)]}, "ignored_layers: Conv2d is not a module of"),
        ({"pruning_ratio": 0.5, "ignored_layers": ["head*"]}, r"no module with channels matches 'head\*'"),
        ({"pruning_ratio": 0.5, "ignored_layers": "conv"}, r"ignored_layers is a list of .*; write \['conv'\]"),
        ({"per_layer_ratio": {"conv": 0.5, "stage1.0.conv2": 0.25}}, "the ratios 0.5 and 0.25, and they can only be"),
        ({"pruning_ratio": 0.5, "cost_power": 1}, "cost_power needs a target, such as"),
        ({"target": {"macs_ratio": 0.5}, "cost_power": -1}, "cost_power=-1: must be a number of at least 0"),
        ({"pruning_ratio": 0.5, "steps": 0}, "steps=0: must be a whole number of at least 1"),
        ({"pruning_ratio": 0.5, "round_to": 0}, "round_to=0: must be at least 1"),
    ],
)
def test_unusable_arguments_are_reported_at_once(model, options, message):
    with pytest.raises(PrunekitError, match=message) as caught:
        prunekit.Pruner(model, IMAGES, **{"importance": "magnitude", **options})
    assert "\n" not in str(caught.value)


def test_unusable_models_inputs_and_scores_are_reported(model):
    with pytest.raises(PrunekitError, match="the model fails on inputs of shapes"):
        prunekit.Pruner(model, (IMAGES, IMAGES), pruning_ratio=0.5)
    with pytest.raises(PrunekitError, match=r"model is str, not a torch.nn.Module"):
        prunekit.Pruner("resnet", IMAGES, pruning_ratio=0.5)
    with pytest.raises(PrunekitError, match=r"importance returned list; return a dict from group.id"):
        step(model, importance=lambda model, groups: [1.0], pruning_ratio=0.5)
    with pytest.raises(PrunekitError, match=r"scores of conv have shape \(3,\), not \(16,\)"):
        step(model, importance=lambda model, groups: {g.id: np.ones(3) for g in groups}, pruning_ratio=0.5)
