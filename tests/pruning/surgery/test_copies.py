"""Copies share no state with what they were made from."""

import threading

import pytest
import torch
from helpers.networks import Row, init_norms
from torch import nn

import prunekit
from prunekit.errors import PlanError
from prunekit.pruning.surgery.copies import clone, copy_as


class Caching(nn.Module):
    """Keeps a tensor between calls in eval mode, in an attribute, a dictionary or a buffer."""

    def __init__(self, kind):
        super().__init__()
        self.row, self.kind, self.cache = Row(), kind, {}
        self.position = None
        if kind == "buffer":
            del self.position
            self.register_buffer("position", torch.zeros(0), persistent=False)

    def forward(self, x):
        side = x.shape[-1]
        if self.kind == "dict":
            if side not in self.cache:
                self.cache[side] = torch.linspace(0, 1, side, dtype=x.dtype)
            return self.row(x + self.cache[side])
        if self.position is None or self.position.shape != (side,):
            self.position = torch.linspace(0, 1, side, dtype=x.dtype)
        return self.row(x + self.position)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", ["attribute", "dict", "buffer"])
def test_slim_model_does_not_inherit_what_the_check_has_cached(kind, used):
    torch.manual_seed(0)
    model = Caching(kind)
    example = init_norms(model, size=16)
    if not used:
        fresh = Caching(kind)
        fresh.load_state_dict(model.state_dict())
        model = fresh.eval()
    groups = prunekit.find_groups(model, example)
    small, report = prunekit.slim(model, prunekit.extract(model, groups, pruning_ratio=0.3), example, groups=groups)
    assert report.passed
    assert small(example).dtype == model(example).dtype == torch.float32


def test_copies_have_one_dtype_and_leave_the_model_alone():
    model = Caching("attribute").half()
    model.position, model.steps = torch.ones(3, dtype=torch.half), torch.ones(2, dtype=torch.int64)
    copied = copy_as(model, torch.float64)
    assert copied.position.dtype == torch.float64 and copied.steps.dtype == torch.int64
    assert copied.row.conv1.weight.dtype == torch.float64 and not copied.training
    assert model.position.dtype == torch.half and model.training


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_computed_weights_are_copied_after_a_backward(norm):
    torch.manual_seed(0)
    model = Row()
    example = init_norms(model, size=16)
    model.out = norm(model.out)
    model.train()(example).sum().backward()
    model.eval()
    groups = prunekit.find_groups(model, example)
    small, report = prunekit.slim(model, prunekit.extract(model, groups, pruning_ratio=0.3), example, groups=groups)
    assert report.passed
    small.train()(example).sum().backward()


def test_what_cannot_be_copied_is_refused_with_advice():
    model = Row()
    model.lock = threading.Lock()
    with pytest.raises(PlanError, match=r"the model cannot be copied .*remove attributes such as a lock"):
        clone(model)
