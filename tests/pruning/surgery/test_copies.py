"""Copies share no state with what they were made from."""

import threading

import pytest
import torch
from helpers.networks import Row, init_norms
from torch import nn

import prunekit
from prunekit.errors import PlanError
from prunekit.pruning.surgery.copies import clone, copy_as
from prunekit.pruning.surgery.plan_builder import make_plan


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


class Biased(nn.Module):
    """Attention with a bias for each head and distance, kept in eval mode (as in LeViT, Graham et al., ICCV 2021)."""

    def __init__(self, heads=6):
        super().__init__()
        self.heads, self.kept = heads, {}
        self.first, self.last = nn.Linear(5, 8 * heads), nn.Linear(8 * heads, 3)
        self.biases = nn.Parameter(torch.randn(heads, 4))
        distances = torch.tensor([[abs(a - b) for a in range(4)] for b in range(4)])
        self.register_buffer("distances", distances, persistent=False)

    def train(self, mode=True):
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def bias(self, device):
        if self.training or str(device) not in self.kept:
            self.kept[str(device)] = self.biases[:, self.distances]
        return self.kept[str(device)]

    def forward(self, x):
        values = self.first(x).view(len(x), 4, -1, 8).transpose(1, 2)
        weights = ((values @ values.transpose(2, 3)) + self.bias(x.device)).softmax(-1)
        return self.last((weights @ values).transpose(1, 2).flatten(2)).mean(1)


def test_what_the_dense_model_keeps_is_dropped():
    torch.manual_seed(0)
    model, tokens = Biased().eval(), torch.randn(3, 4, 5)
    model(tokens)
    group = next(g for g in prunekit.find_groups(model, tokens) if g.channels == 6)
    assert group.reason is None
    plan = make_plan(model, prunekit.find_groups(model, tokens), {group.id: {0, 3}})
    small, _ = prunekit.slim(model, plan, tokens)
    assert small.biases.shape == (4, 4) and small(tokens).shape == (3, 3) and not small.training


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
