"""Prune your own model: `python examples/your_model.py`."""

import torch
from torch import nn

import prunekit


class Net(nn.Module):
    """A residual network; nothing in it depends on prunekit.

    Shape:
        input: (N, 3, H, W); output: logits (N, 4).
    """

    def __init__(self, width: int = 24):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(y)))
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
model, loss = Net(), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 4
images += labels[:, None, None, None] * 0.5

groups = prunekit.find_groups(model, images[:2])  # which channels can only be pruned together
with prunekit.DynamicWeightDecay(model, groups, weight=1) as decay:
    for _ in range(300):
        optimizer.zero_grad()
        (loss(model(images), labels) + decay.penalty()).backward()  # your loop, and one more term
        optimizer.step()
plan = prunekit.extract(model, groups, threshold=5e-2)
slim, equivalence = prunekit.slim(model, plan, images[:8])

print(f"{sum(p.numel() for p in model.parameters())} → {sum(p.numel() for p in slim.parameters())} parameters")
print(f"equivalence check passed: {equivalence.passed}, largest difference {equivalence.max_abs_diff:.1e}")
