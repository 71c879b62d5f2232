import copy

import pytest
import torch
from helpers.networks import csnet_with_dead_gates, init_norms
from helpers.zoo import ZOO

from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.optimizer_state import slim_optimizer
from prunekit.pruning.surgery.slim import apply_plan, slim

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def trained(name, seed=0):
    """A network with dead gates, its groups and an example."""
    if name == "csnet":
        model, groups, example = csnet_with_dead_gates(seed)
    else:
        torch.manual_seed(seed)
        model = ZOO[name]()
        example = init_norms(model, seed)
        groups = find_groups(model, example)
        with torch.no_grad():
            for group in groups:
                if group.reason is None and group.channels > 2:
                    for gate in group.gates:
                        model.get_submodule(gate.norm).weight[gate.slice[0] : gate.slice[0] + 2] = 0
    return model, groups, example


def stepped(model, example, build):
    optimizer = build(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(before)
    return optimizer


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", ["csnet", "resnext", "unet_transposed", "vgg"])
def test_optimizer_state_is_sliced_like_the_parameters(name, build):
    """State that equals the parameters must equal them after slimming."""
    model, groups, example = trained(name)
    optimizer = stepped(model, example, build)
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.dim():
                optimizer.state[parameter][key] = parameter.detach().clone()
    plan = extract(model, groups)
    small = apply_plan(copy.deepcopy(model), plan, example)
    made = slim_optimizer(optimizer, model, small, groups, plan)
    assert type(made) is type(optimizer) and made is not optimizer
    assert {p for group in made.param_groups for p in group["params"]} == set(small.parameters())
    compared = 0
    for parameter in small.parameters():
        for value in made.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.dim():
                assert torch.equal(value, parameter)
                compared += 1
    assert compared or build is OPTIMIZERS["plain sgd"]


def test_slim_optimizer_trains_the_slim_model_only():
    model, groups, example = trained("csnet")
    optimizer = stepped(model, example, OPTIMIZERS["adam"])
    small, equivalence = slim(model, extract(model, groups), example, groups=groups)
    made = slim_optimizer(optimizer, model, small, groups, equivalence.plan)
    dense = {name: value.clone() for name, value in model.named_parameters()}
    slim_before = {name: value.clone() for name, value in small.named_parameters()}
    small.train()(example).square().mean().backward()
    made.step()
    assert all(torch.equal(value, dense[name]) for name, value in model.named_parameters())
    assert any(not torch.equal(value, slim_before[name]) for name, value in small.named_parameters())
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    assert int(next(iter(made.state.values()))["step"]) == 3


def test_added_bias_joins_the_parameter_group_of_its_weight():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1, bias=False)
    )
    example = init_norms(model)
    with torch.no_grad():
        model[1].weight[1], model[1].bias[1] = 0, 3
    groups = find_groups(model, example)
    optimizer = torch.optim.Adam([{"params": model[:2].parameters()}, {"params": model[2].parameters(), "lr": 1e-4}])
    small, equivalence = slim(model, extract(model, groups), example)
    made = slim_optimizer(optimizer, model, small, groups, equivalence.plan)
    assert equivalence.plan.added_bias == ["2"]
    assert [len(group["params"]) for group in made.param_groups] == [3, 2] and made.param_groups[1]["lr"] == 1e-4
    assert made.param_groups[1]["params"][1] is small[2].bias


def test_slim_optimizer_rejects_another_model():
    model, groups, example = trained("csnet")
    small, equivalence = slim(model, extract(model, groups), example, groups=groups)
    with pytest.raises(PlanError, match="not the dense model's"):
        slim_optimizer(
            torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1), model, small, groups, equivalence.plan
        )
    optimizer = stepped(model, example, OPTIMIZERS["adam"])
    with pytest.raises(PlanError, match="does not fit the plan"):
        slim_optimizer(optimizer, model, model, groups, equivalence.plan)
