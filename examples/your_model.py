"""Prune a model that prunekit has never seen: `python examples/your_model.py`."""

import torch
from torch import nn

import prunekit

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
)  # fmt: skip
images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 4
images += labels[:, None, None, None] * 0.5

groups = prunekit.find_groups(model, images[:2])  # what can be cut together
optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
with prunekit.DynamicWeightDecay(model, groups, weight=1) as decay:
    for _ in range(300):
        loss = nn.functional.cross_entropy(model(images), labels) + decay.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
plan = prunekit.extract(model, groups, threshold=5e-2)
slim, proof = prunekit.slim(model, plan, images[:8])

print(f"{sum(p.numel() for p in model.parameters())} → {sum(p.numel() for p in slim.parameters())} parameters")
print(f"proof holds: {proof.holds}, largest difference {proof.max_abs_diff:.1e}")
