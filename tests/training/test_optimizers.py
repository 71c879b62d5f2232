import pytest
import torch
from torch import nn

from prunekit.config import registry
from prunekit.training.optimizers import param_groups


class Stored(nn.Module):
    """y = a·tanh(w·x), with w stored ``scale`` times as large as it is used."""

    def __init__(self, scale):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = scale
        self.w = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64) * scale)
        self.a = nn.Parameter(torch.randn(3, 6, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x @ (self.w / self.scale).T) @ self.a.T

    def step_scales(self):
        return {"w": self.scale}


@pytest.mark.parametrize(
    "name, options",
    [
        ("adam", {"betas": (0.9, 0.99), "weight_decay": 5e-3}),
        ("adam", {"eps": 1e-2}),
        ("adamw", {"weight_decay": 0.1}),
        ("sgd", {"weight_decay": 1e-2, "nesterov": True}),
    ],
)
def test_scaled_parameter_trains_like_the_unscaled_one(name, options):
    models = [Stored(1.0), Stored(100.0)]
    optimizers = [registry.optimizers.get(name)(param_groups(model, 1e-2), **options) for model in models]
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
    assert (models[0].w - models[1].w / 100).abs().max() < 1e-12
    assert (models[0].a - models[1].a).abs().max() < 1e-12
    assert not torch.equal(models[0].w.detach(), Stored(1.0).w.detach())


def test_gates_have_their_learning_rate_and_no_second_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    optimizer = registry.optimizers.get("adam")(param_groups(model, 1e-3, 1e-2, ["1"]), weight_decay=0.5)
    rule = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rule[id(model[1].weight)] == (1e-2, 0.0)
    assert rule[id(model[2].weight)] == (1e-2, 0.5)
    assert rule[id(model[1].bias)] == rule[id(model[0].weight)] == (1e-3, 0.5)


def test_frozen_parameters_are_excluded():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    assert sum(len(share.params) for share in param_groups(model, 1e-3)) == 3
