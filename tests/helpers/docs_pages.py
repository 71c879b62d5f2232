"""The code blocks of the documentation, and the names that its Python examples start from."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name != "changelog.md"
]

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```", re.S | re.M)
_NAMES = re.compile(r"<!-- names: (\w+) -->")
_SNIPPET = re.compile(r'^ *--8<-- "([^"]+)"$', re.M)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, its language, its code with snippets included, and why it is not run."""

    page: str
    line: int
    language: str
    code: str
    skip: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    text = (ROOT / page).read_text()
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"] in languages:
            code = _SNIPPET.sub(lambda snippet: (ROOT / snippet[1]).read_text(), textwrap.dedent(match["code"]))
            skip = re.search(r'title="(not (?:run|loaded) by the tests: [^"]+)"', match["info"])
            line = text[: match.start()].count("\n") + 1
            found.append(Block(page, line, match["language"], code, skip and skip[1]))
    return found


def commands(page: str) -> list[tuple[Block, list[str]]]:
    """The shell commands of a page as lists of words; of console output, the lines that begin with ``$``."""
    found = []
    for block in blocks(page, "sh", "console"):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words:
                    found.append((block, words))
    return found


def start_names(page: str) -> dict[str, Any]:
    """The names that the first Python block of a page may use."""
    match = _NAMES.search((ROOT / page).read_text())
    torch.manual_seed(0)
    return NAMES[match[1]]() if match else {}


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Classifier(nn.Module):
    """A residual network for 3×8×8 images of 4 classes."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(width), ResidualBlock(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _classifier() -> dict[str, Any]:
    model = Classifier()
    labels = torch.arange(32) % 4
    images = torch.randn(32, 3, 8, 8) + labels[:, None, None, None] * 0.5
    return {
        "torch": torch,
        "Net": Classifier,
        "model": model,
        "images": images,
        "labels": labels,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.Adam(model.parameters(), lr=2e-2),
    }


def _trained_classifier() -> dict[str, Any]:
    names = _classifier()
    names["loader"] = list(zip(names["images"].split(8), names["labels"].split(8), strict=True))
    for _ in range(20):
        names["optimizer"].zero_grad()
        names["loss"](names["model"](names["images"]), names["labels"]).backward()
        names["optimizer"].step()
    names["model"].eval()
    return names


NAMES = {
    "torch": lambda: {"torch": torch},
    "classifier": _classifier,
    "trained_classifier": _trained_classifier,
}
