"""What the README shows is so."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Somebody's network: blocks with a shortcut, an activation of their own, no word of pruning.
MY_NET = """
import torch
from torch import nn

class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))

class MyNet(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

torch.manual_seed(0)
model, loss = MyNet(), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
labels = torch.arange(32) % 4
images = torch.randn(32, 3, 8, 8) + labels[:, None, None, None] * 0.5
"""
SHOW = """
print(sum(p.numel() for p in model.parameters()), sum(p.numel() for p in slim.parameters()), equivalence.passed)
"""


def ten_lines():
    section = README.split("## Your network in ten lines\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_your_network_in_ten_lines(tmp_path):
    code = ten_lines()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "my_net.py").write_text(MY_NET)
    (tmp_path / "run.py").write_text(code + SHOW)
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, holds = done.stdout.split()
    assert int(after) < 0.9 * int(before) and holds == "True"


def test_the_example_has_the_same_lines():
    body = ten_lines().partition("\n\n")[2]
    assert body in (ROOT / "examples" / "your_model.py").read_text()


def test_files_that_it_links_to_are_there():
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert "examples/your_model.py" in links
    assert [target for target in links if not (ROOT / target).exists()] == []


def test_commands_that_it_shows_exist():
    from prunekit.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    blocks = "".join(re.findall(r"^```(?:sh)?\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    shown = set(re.findall(r"^(?:\$ )?prunekit (\w+)", blocks, re.MULTILINE))
    assert {"run", "groups", "list"} <= shown <= known
