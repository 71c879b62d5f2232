"""Models wrapped by torch.compile are seen through, so that names, plans and files fit the plain model."""

import pytest
import torch
from helpers.networks import Residual, Row, init_norms
from torch import nn

import prunekit
from prunekit.utils.compiled import unwrap


def compiled_row():
    torch.manual_seed(0)
    model = Row()
    example = init_norms(model, size=16)
    wrapped = torch.compile(model, backend="eager")
    wrapped(example)
    return model, wrapped, example


def test_unwrap_returns_the_module_inside_and_others_as_they_are():
    model, wrapped, _ = compiled_row()
    assert unwrap(wrapped) is model and unwrap(model) is model


def test_groups_plans_and_files_of_a_compiled_model_fit_the_plain_one(tmp_path):
    model, wrapped, example = compiled_row()
    groups = prunekit.find_groups(wrapped, example)
    assert [group.id for group in groups] == [group.id for group in prunekit.find_groups(model, example)]
    plan = prunekit.extract(wrapped, groups, pruning_ratio=0.4, ignored_layers=["conv2"])
    small, report = prunekit.slim(wrapped, plan, example, groups=groups)
    assert type(small) is Row and report.passed
    prunekit.apply_plan(Row(), report.plan, example)
    optimizer = prunekit.slim_optimizer(torch.optim.SGD(wrapped.parameters()), wrapped, small, groups, report.plan)
    assert optimizer.param_groups[0]["params"][0] is small.conv1.weight
    prunekit.save(torch.compile(small, backend="eager"), tmp_path / "row", builder=Row)
    assert torch.equal(prunekit.load(tmp_path / "row", builder=Row)(example), small(example))


@pytest.mark.parametrize("target", [{"macs_ratio": 0.6}, None])
def test_pruner_and_budget_take_compiled_models(target):
    _, wrapped, example = compiled_row()
    pruner = prunekit.Pruner(wrapped, example, pruning_ratio=None if target else 0.4, target=target, steps=2)
    small, _ = pruner.step()
    pruner.model = torch.compile(small, backend="eager")
    smaller, report = pruner.step()
    assert report.equivalence.passed and type(smaller) is Row
    plan = prunekit.fit_budget(wrapped, prunekit.find_groups(wrapped, example), example, params_ratio=0.6)
    assert "conv1" in plan.groups and type(prunekit.slim_to_budget(wrapped, example, params_ratio=0.6)[0]) is Row


def test_a_compiled_part_keeps_its_place():
    torch.manual_seed(0)
    model = nn.Sequential(Residual())
    example = init_norms(model, size=16)
    model[0] = torch.compile(model[0], backend="eager")
    groups = prunekit.find_groups(model, example)
    small, report = prunekit.slim(model, prunekit.extract(model, groups, pruning_ratio=0.3), example, groups=groups)
    assert report.passed and small(example).shape == (4, 5)
