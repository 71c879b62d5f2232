"""Cuts in the middle of a training: what they move (nothing, where gates and β are zero), and what goes along."""

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
from prunekit.pruning.sparsity.decay import DynamicWeightDecay
from prunekit.pruning.sparsity.progressive import ProgressivePruning, height
from prunekit.pruning.surgery.cutter import Cutter, slice_tensor
from prunekit.pruning.surgery.make_plan import dead_channels
from prunekit.pruning.surgery.optimizer_state import slim_optimizer
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
        hold(model, groups, dead, beta=False)
    return model.double().train(), groups, example[:2].double()


@torch.no_grad()
def hold(model, groups, dead, beta=True):
    """Hold the last gates of these channels at zero, and β."""
    for group in groups:
        for index in last_gates(group) if dead.get(group.id) else ():
            gate = group.gates[index]
            norm = model.get_submodule(gate.norm)
            places = gate.slice[0] + torch.tensor(sorted(dead[group.id]))
            norm.weight[places] = 0
            if beta:
                norm.bias[places] = 0


def shrinking(model, groups, example, **options):
    def equip(left, of):
        return DynamicWeightDecay(left, of, 0.1), None

    options = {"every": 1, "threshold": 1e-9, "worth": 0.0, **options}
    made = ProgressivePruning(model, groups, example, equip=equip, **options)
    made.begin()
    made.look(model, groups)
    return made


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


def cutting(model, groups, plan):
    """From a tensor of the uncut model, by its name, to what the plan leaves of it."""
    masks = Cutter(model, groups).masks(dead_channels(groups, plan))

    def cut_like(name, value):
        owner, _, own = name.rpartition(".")
        axes = {axis: mask for (tensor, axis), mask in masks.items() if tensor == name}
        return slice_tensor(model.get_submodule(owner), own, value, axes)

    return cut_like


@pytest.mark.parametrize(
    "rule, name, seed", [(r, *case) for r in OPTIMIZERS for case in CASES if case[0] != "csnet" or r == "adam"]
)
def test_the_next_step_is_that_of_the_model_with_these_channels_held_at_zero(rule, name, seed):
    build = OPTIMIZERS[rule]
    model, groups, example = network(name, seed)
    dead = {g.id: set(np.flatnonzero(height(model, g) == 0).tolist()) for g in groups if g.reason is None}
    assert sum(map(len, dead.values())) > 3
    decay = DynamicWeightDecay(model, groups, 0.1)
    optimizer = build(rates(model, decay))
    hold(model, groups, dead)
    for number in range(2):  # so that the optimiser has a past
        step(model, decay, optimizer, example.roll(number, 0))
        hold(model, groups, dead)
    known = shrinking(model, groups, example)
    cut = known.cut(model, groups, decay, 1)
    plan = cut.plan
    assert dead_channels(groups, plan) == dead and not plan.added_bias and not plan.carriers
    left, _ = known.equipped(cut.model, cut.groups, None)
    made = build(rates(cut.model, left))
    past = slim_optimizer(optimizer, model, cut.model, groups, cut.plan).state
    for group in made.param_groups:
        made.state.update({p: past[p] for p in group["params"]})
    batch = example.flip(0)
    assert step(cut.model, left, made, batch) == pytest.approx(step(model, decay, optimizer, batch), abs=1e-12)
    compared, cut_like = 0, cutting(model, groups, plan)
    for key, value in model.state_dict().items():
        if key in cut.model.state_dict():
            mine = cut.model.state_dict()[key]
            torch.testing.assert_close(mine, cut_like(key, value), rtol=1e-7, atol=1e-9)
            compared += 1
    assert compared > 10
    parameters = dict(model.named_parameters())
    for key, parameter in cut.model.named_parameters():
        for kind, value in made.state[parameter].items():
            theirs = optimizer.state[parameters[key]][kind]
            if value.dim():
                theirs = cut_like(key, theirs)
            torch.testing.assert_close(value, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name, seed", CASES)
def test_constants_that_dead_channels_leave_are_there_in_train_mode_too(name, seed):
    """With β the cut moves nothing either: neither the output of the next step, nor the gradients of what is left."""
    model, groups, example = network(name, seed)
    known = shrinking(model, groups, example)
    cut = known.cut(model, groups, DynamicWeightDecay(model, groups), 1)
    carriers, cut_like = cut.plan.carriers, cutting(model, groups, cut.plan)
    batch = example.flip(0)
    outputs = [one(batch) for one in (model, cut.model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-9)
    for output in outputs:
        output.square().mean().backward()
    lost = {name for name, _ in model.named_parameters()} - {name for name, _ in cut.model.named_parameters()}
    assert all(any(key.startswith(f"{gone}.") for gone in cut.plan.removed) for key in lost)
    gates = {f"{gate.norm}.weight" for group in groups for gate in group.gates}
    for key in gates - lost if not carriers else ():
        mine = cut.model.get_parameter(key).grad
        theirs = cut_like(key, model.get_parameter(key).grad)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)


def test_what_has_been_alive_at_any_look_is_not_dead():
    model, groups, example = network("row", 0)
    known = ProgressivePruning(model, groups, example, every=1, threshold=1e-9, equip=None, worth=0.0)
    known.begin()
    higher = copy.deepcopy(model)
    with torch.no_grad():
        higher.bn2.weight[model.bn2.weight == 0] = 0.3
    known.look(higher, groups)
    known.look(model, groups)
    before = [g.channels for g in groups if g.reason is None]
    cut = known.cut(model, groups, DynamicWeightDecay(model, groups), 1)
    after = {g.id: g.channels for g in cut.groups}
    assert after["conv1"] == before[0] and after["conv2"] < before[1]


def test_a_row_that_an_earlier_gate_has_ended_is_not_over_yet():
    model, groups, _ = network("row", 0)
    group = groups[0] if groups[0].id == "conv1" else next(g for g in groups if g.id == "conv1")
    with torch.no_grad():
        model.bn1.weight.zero_()
        model.bn2.weight.fill_(1)
    assert (height(model, group) > 0.5).all()


def test_cuts_follow_one_another_and_their_plan_is_of_the_first_model():
    first, groups, example = network("csnet", 0)
    known = shrinking(first, groups, example)
    cut = known.cut(first, groups, DynamicWeightDecay(first, groups), 1)
    generator = torch.Generator().manual_seed(5)
    more = {
        g.id: set((torch.rand(g.channels, generator=generator) < 0.3).nonzero().flatten().tolist())
        for g in cut.groups
        if g.reason is None
    }
    hold(cut.model, cut.groups, more, beta=False)
    known.begin()
    known.look(cut.model, cut.groups)
    again = known.cut(cut.model, cut.groups, DynamicWeightDecay(cut.model, cut.groups), 2)
    assert again is not None and [one["epoch"] for one in known.records] == [1, 2]
    assert all(one["passed"] and one["max_abs_diff"] <= one["tolerance"] for one in known.records)
    rebuilt = apply_plan(copy.deepcopy(first), known.plan, example)
    shapes = {key: value.shape for key, value in again.model.state_dict().items()}
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    assert known.records[1]["params"] == sum(p.numel() for p in again.model.parameters())
    # Where each gate that is left stood in the first model.
    norms = [gate.norm for group in groups if group.reason is None for gate in group.gates]
    for norm, places in known.places(norms).items():
        assert f"{norm}.weight" not in shapes or len(places) == shapes[f"{norm}.weight"][0]
    # The same from a state.
    other = shrinking(first, groups, example)
    model = copy.deepcopy(first)
    left = other.restore(model, groups, known.state())
    assert [g.id for g in left] == [g.id for g in again.groups] and other.state() == known.state()
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_nothing_dead_no_cut():
    torch.manual_seed(0)
    model = Row(1)
    example = init_norms(model)
    groups = find_groups(model, example)
    known = shrinking(model, groups, example)
    assert known.cut(model, groups, DynamicWeightDecay(model, groups), 1) is None
    assert known.plan is None and not known.records


def test_carriers_and_channels_given_back_are_not_cut_over_and_over(monkeypatch):
    model, groups, example = network("row", 0)
    known = shrinking(model, groups, example)
    cut = known.cut(model, groups, DynamicWeightDecay(model, groups), 1)
    assert cut.plan.carriers
    known.begin()
    known.look(cut.model, cut.groups)
    monkeypatch.setattr("prunekit.pruning.sparsity.progressive.slim", None)
    assert known.cut(cut.model, cut.groups, DynamicWeightDecay(cut.model, cut.groups), 2) is None


def test_a_cut_that_spares_little_waits():
    model, groups, example = network("row", 0)
    known = shrinking(model, groups, example, worth=0.9)
    assert known.cut(model, groups, DynamicWeightDecay(model, groups), 1) is None and not known.records


def test_no_cut_goes_below_the_budget():
    model, groups, example = network("csnet", 0)
    dense = total(count_modules(model, (3, SIZE, SIZE))[0])["params"]
    free = shrinking(model, groups, example).cut(model, groups, DynamicWeightDecay(model, groups), 1)
    goal = (dense + free.record["params"]) // 2
    bound = shrinking(model, groups, example, goal=Budget("params", goal))
    record = bound.cut(model, groups, DynamicWeightDecay(model, groups), 1).record
    assert goal <= record["params"] < 1.05 * goal


def test_an_equivalence_check_that_fails_is_written_down_and_nothing_is_cut():
    model, groups, example = network("row", 0)
    with torch.no_grad():
        model.out.weight.zero_()  # the output does not vary, which proves nothing
    known = shrinking(model, groups, example)
    assert known.cut(model, groups, DynamicWeightDecay(model, groups), 3) is None
    (record,) = known.records
    assert record["epoch"] == 3 and not record["channels"] and "dead" in record["reason"]
    assert known.plan is None and known.state()["cuts"] == [record]


def test_weights_by_the_side_stay_relative_to_the_gates_there_were():
    model, groups, example = network("csnet", 1)

    def equip(left, of):
        return DynamicWeightDecay(left, of, 0.1, branch_weights="flops"), None

    hold(model, groups, {g.id: set(np.flatnonzero(height(model, g) == 0)) for g in groups if g.reason is None})
    decay, _ = equip(model, groups)
    known = ProgressivePruning(model, groups, example, every=1, threshold=1e-9, equip=equip, worth=0.0)
    known.begin()
    known.look(model, groups)
    with decay:
        model(example)
        decay.penalty()
    cut = known.cut(model, groups, decay, 1)
    left, _ = known.equipped(cut.model, cut.groups, None)
    values = []
    for one, held in ((model, decay), (cut.model, left)):
        with held:
            one(example)
            values.append(held.penalty().item())
    # What a cut channel's other gates still cost goes with it.
    assert left.state() == decay.state()
    fresh = equip(cut.model, cut.groups)[0]
    with fresh:
        cut.model(example)
        assert fresh.penalty().item() != pytest.approx(values[1], rel=1e-3)
