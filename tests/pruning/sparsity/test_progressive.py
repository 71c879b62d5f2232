"""Pruning during training: it changes nothing where gates and β are zero, and optimizer and decay continue."""

import copy

import numpy as np
import pytest
import torch
from helpers.networks import Residual, Row, csnet_with_dead_gates, init_norms

from prunekit.backbones.octresnet import octresnet
from prunekit.flops import count_modules, total
from prunekit.pruning.graph.gate_expr import last_gates
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.budget import Budget
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.pruning.sparsity.progressive import ProgressivePruning, max_effective_gate
from prunekit.pruning.surgery.cutter import Cutter, slice_tensor
from prunekit.pruning.surgery.optimizer_state import slim_optimizer
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.slim import apply_plan
from prunekit.training.optimizers import adam, param_groups, sgd

SIZE = 32
OPTIMIZERS = {
    "adam": lambda s: adam(s, betas=(0.9, 0.99), weight_decay=1e-4),
    "sgd": lambda s: sgd(s, momentum=0.9, nesterov=True, weight_decay=1e-4),
}
NETWORKS = {
    "csnet": None,
    "octresnet": lambda: octresnet(depth=8, width=8),
    "row": lambda: Row(1),
    "residual": Residual,
}
CASES = [("csnet", 0), ("octresnet", 0), *[(name, seed) for name in ("row", "residual") for seed in range(3)]]


def network(name, seed):
    """In float64 and train mode, of which half of the channels have their last gates at zero."""
    if name == "csnet":
        model, groups, example = csnet_with_dead_gates(seed, whole=0.0, size=16)
    else:
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        example = init_norms(model, seed, SIZE)
        groups = find_groups(model, example)
        generator = torch.Generator().manual_seed(seed)
        dead = {}
        for group in groups:
            if group.reason is None:
                chosen = torch.rand(group.channels, generator=generator) < 0.5
                chosen[0] = False
                dead[group.id] = set(chosen.nonzero().flatten().tolist())
        zero_gates_of(model, groups, dead, beta=False)
    return model.double().train(), groups, example[:2].double()


@torch.no_grad()
def zero_gates_of(model, groups, dead, beta=True):
    """Set the last gates of these channels to zero, and β."""
    for group in groups:
        for index in last_gates(group) if dead.get(group.id) else ():
            gate = group.gates[index]
            norm = model.get_submodule(gate.norm)
            places = gate.slice[0] + torch.tensor(sorted(dead[group.id]))
            norm.weight[places] = 0
            if beta:
                norm.bias[places] = 0


def observed_pruning(model, groups, example, **options):
    """Progressive pruning that has observed the model once."""

    def make_decay(model, groups):
        return DynamicWeightDecay(model, groups, 0.1), None

    options = {"every": 1, "threshold": 1e-9, "min_saving": 0.0, "make_decay": make_decay, **options}
    pruning = ProgressivePruning(model, groups, example, **options)
    pruning.reset()
    pruning.observe(model, groups)
    return pruning


def step(model, decay, optimizer, batch):
    """One step of sparse training; the loss."""
    optimizer.zero_grad()
    with decay:
        output = model(batch)
        loss = (output - batch.mean(1).mean()).square().mean()
        (loss + decay.penalty()).backward()
    optimizer.step()
    return loss.item()


def rates(model, decay):
    return param_groups(model, 1e-3, 1e-2, decay.norms)


def plan_slicer(model, groups, plan):
    """Return a function of the name and value of a dense tensor to what the plan keeps of it."""
    masks = Cutter(model, groups).masks(dead_channels(groups, plan))

    def cut_like(name, value):
        owner, _, own = name.rpartition(".")
        axes = {axis: mask for (tensor, axis), mask in masks.items() if tensor == name}
        return slice_tensor(model.get_submodule(owner), own, value, axes)

    return cut_like


@pytest.mark.parametrize(
    "rule, name, seed", [(r, *case) for r in OPTIMIZERS for case in CASES if case[0] != "csnet" or r == "adam"]
)
def test_next_step_equals_that_of_the_model_with_zeroed_channels(rule, name, seed):
    build = OPTIMIZERS[rule]
    model, groups, example = network(name, seed)
    dead = {g.id: set(np.flatnonzero(max_effective_gate(model, g) == 0).tolist()) for g in groups if g.reason is None}
    assert sum(map(len, dead.values())) > 3
    decay = DynamicWeightDecay(model, groups, 0.1)
    optimizer = build(rates(model, decay))
    zero_gates_of(model, groups, dead)
    for number in range(2):  # so that the optimiser has a past
        step(model, decay, optimizer, example.roll(number, 0))
        zero_gates_of(model, groups, dead)
    pruning = observed_pruning(model, groups, example)
    pruned = pruning.prune(model, groups, decay, 1)
    plan = pruned.plan
    assert dead_channels(groups, plan) == dead and not plan.added_bias and not plan.carriers
    left, _ = pruning.continue_decay(pruned.model, pruned.groups, None)
    made = build(rates(pruned.model, left))
    past = slim_optimizer(optimizer, model, pruned.model, groups, pruned.plan).state
    for group in made.param_groups:
        made.state.update({p: past[p] for p in group["params"]})
    batch = example.flip(0)
    assert step(pruned.model, left, made, batch) == pytest.approx(step(model, decay, optimizer, batch), abs=1e-12)
    compared, cut_like = 0, plan_slicer(model, groups, plan)
    for key, value in model.state_dict().items():
        if key in pruned.model.state_dict():
            mine = pruned.model.state_dict()[key]
            torch.testing.assert_close(mine, cut_like(key, value), rtol=1e-7, atol=1e-9)
            compared += 1
    assert compared > 10
    parameters = dict(model.named_parameters())
    for key, parameter in pruned.model.named_parameters():
        for kind, value in made.state[parameter].items():
            theirs = optimizer.state[parameters[key]][kind]
            if value.dim():
                theirs = cut_like(key, theirs)
            torch.testing.assert_close(value, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name, seed", CASES)
def test_constants_of_dead_channels_remain_in_train_mode(name, seed):
    """With β, pruning changes neither the output of the next step nor the gradients of what remains."""
    model, groups, example = network(name, seed)
    pruning = observed_pruning(model, groups, example)
    pruned = pruning.prune(model, groups, DynamicWeightDecay(model, groups), 1)
    carriers, cut_like = pruned.plan.carriers, plan_slicer(model, groups, pruned.plan)
    batch = example.flip(0)
    outputs = [one(batch) for one in (model, pruned.model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-9)
    for output in outputs:
        output.square().mean().backward()
    lost = {name for name, _ in model.named_parameters()} - {name for name, _ in pruned.model.named_parameters()}
    assert all(any(key.startswith(f"{gone}.") for gone in pruned.plan.removed) for key in lost)
    gates = {f"{gate.norm}.weight" for group in groups for gate in group.gates}
    for key in gates - lost if not carriers else ():
        mine = pruned.model.get_parameter(key).grad
        theirs = cut_like(key, model.get_parameter(key).grad)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)


def test_channel_alive_in_any_observation_is_kept():
    model, groups, example = network("row", 0)
    pruning = ProgressivePruning(model, groups, example, every=1, threshold=1e-9, make_decay=None, min_saving=0.0)
    pruning.reset()
    higher = copy.deepcopy(model)
    with torch.no_grad():
        higher.bn2.weight[model.bn2.weight == 0] = 0.3
    pruning.observe(higher, groups)
    pruning.observe(model, groups)
    before = [g.channels for g in groups if g.reason is None]
    pruned = pruning.prune(model, groups, DynamicWeightDecay(model, groups), 1)
    after = {g.id: g.channels for g in pruned.groups}
    assert after["conv1"] == before[0] and after["conv2"] < before[1]


def test_row_ended_by_an_earlier_gate_is_not_dead():
    model, groups, _ = network("row", 0)
    group = groups[0] if groups[0].id == "conv1" else next(g for g in groups if g.id == "conv1")
    with torch.no_grad():
        model.bn1.weight.zero_()
        model.bn2.weight.fill_(1)
    assert (max_effective_gate(model, group) > 0.5).all()


@pytest.mark.slow
def test_repeated_pruning_composes_a_plan_of_the_initial_model():
    first, groups, example = network("csnet", 0)
    pruning = observed_pruning(first, groups, example)
    pruned = pruning.prune(first, groups, DynamicWeightDecay(first, groups), 1)
    generator = torch.Generator().manual_seed(5)
    more = {
        g.id: set((torch.rand(g.channels, generator=generator) < 0.3).nonzero().flatten().tolist())
        for g in pruned.groups
        if g.reason is None
    }
    zero_gates_of(pruned.model, pruned.groups, more, beta=False)
    pruning.reset()
    pruning.observe(pruned.model, pruned.groups)
    again = pruning.prune(pruned.model, pruned.groups, DynamicWeightDecay(pruned.model, pruned.groups), 2)
    assert again is not None and [one["epoch"] for one in pruning.records] == [1, 2]
    assert all(one["passed"] and one["max_abs_diff"] <= one["tolerance"] for one in pruning.records)
    rebuilt = apply_plan(copy.deepcopy(first), pruning.plan, example)
    shapes = {key: value.shape for key, value in again.model.state_dict().items()}
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    assert pruning.records[1]["params"] == sum(p.numel() for p in again.model.parameters())
    # The positions of the remaining gates in the initial model.
    norms = [gate.norm for group in groups if group.reason is None for gate in group.gates]
    for norm, channels in pruning.kept_channels(norms).items():
        assert f"{norm}.weight" not in shapes or len(channels) == shapes[f"{norm}.weight"][0]
    # The same from a state.
    other = observed_pruning(first, groups, example)
    model = copy.deepcopy(first)
    left = other.restore(model, groups, pruning.state_dict())
    assert [g.id for g in left] == [g.id for g in again.groups] and other.state_dict() == pruning.state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_nothing_is_pruned_without_dead_channels():
    torch.manual_seed(0)
    model = Row(1)
    example = init_norms(model)
    groups = find_groups(model, example)
    pruning = observed_pruning(model, groups, example)
    assert pruning.prune(model, groups, DynamicWeightDecay(model, groups), 1) is None
    assert pruning.plan is None and not pruning.records


def test_carriers_and_restored_channels_are_not_pruned_repeatedly(monkeypatch):
    model, groups, example = network("row", 0)
    pruning = observed_pruning(model, groups, example)
    pruned = pruning.prune(model, groups, DynamicWeightDecay(model, groups), 1)
    assert pruned.plan.carriers
    pruning.reset()
    pruning.observe(pruned.model, pruned.groups)
    monkeypatch.setattr("prunekit.pruning.sparsity.progressive.slim", None)
    assert pruning.prune(pruned.model, pruned.groups, DynamicWeightDecay(pruned.model, pruned.groups), 2) is None


def test_small_savings_wait():
    model, groups, example = network("row", 0)
    pruning = observed_pruning(model, groups, example, min_saving=0.9)
    assert pruning.prune(model, groups, DynamicWeightDecay(model, groups), 1) is None and not pruning.records


def test_pruning_stops_at_the_budget():
    model, groups, example = network("csnet", 0)
    dense = total(count_modules(model, (3, SIZE, SIZE))[0])["params"]
    free = observed_pruning(model, groups, example).prune(model, groups, DynamicWeightDecay(model, groups), 1)
    goal = (dense + free.record["params"]) // 2
    bound = observed_pruning(model, groups, example, budget=Budget("params", goal))
    record = bound.prune(model, groups, DynamicWeightDecay(model, groups), 1).record
    assert goal <= record["params"] < 1.05 * goal


def test_failed_equivalence_check_is_recorded_and_nothing_is_pruned():
    model, groups, example = network("row", 0)
    with torch.no_grad():
        model.out.weight.zero_()  # the output does not vary, which proves nothing
    pruning = observed_pruning(model, groups, example)
    assert pruning.prune(model, groups, DynamicWeightDecay(model, groups), 3) is None
    (record,) = pruning.records
    assert record["epoch"] == 3 and not record["channels"] and "dead" in record["reason"]
    assert pruning.plan is None and pruning.state_dict()["records"] == [record]


def test_branch_weights_stay_relative_to_the_initial_gates():
    model, groups, example = network("csnet", 1)

    def make_decay(model, groups):
        return DynamicWeightDecay(model, groups, 0.1, branch_weights="flops"), None

    zero_gates_of(
        model,
        groups,
        {g.id: set(np.flatnonzero(max_effective_gate(model, g) == 0)) for g in groups if g.reason is None},
    )
    decay, _ = make_decay(model, groups)
    pruning = ProgressivePruning(model, groups, example, every=1, threshold=1e-9, make_decay=make_decay, min_saving=0.0)
    pruning.reset()
    pruning.observe(model, groups)
    with decay:
        model(example)
        decay.penalty()
    pruned = pruning.prune(model, groups, decay, 1)
    left, _ = pruning.continue_decay(pruned.model, pruned.groups, None)
    values = []
    for one, held in ((model, decay), (pruned.model, left)):
        with held:
            one(example)
            values.append(held.penalty().item())
    assert left.state_dict() == decay.state_dict()
    fresh = make_decay(pruned.model, pruned.groups)[0]
    with fresh:
        pruned.model(example)
        assert fresh.penalty().item() != pytest.approx(values[1], rel=1e-3)
