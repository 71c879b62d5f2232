from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from prunekit.cli import main
from prunekit.commands.groups import dump, format_gates, inspect_groups, show_groups
from prunekit.config.recipe import load
from prunekit.errors import CheckpointError, RecipeError
from prunekit.pipeline.models import build_dense, load_model, save_model
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Gate, Group
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.slim import slim
from prunekit.runs.run_dir import RunDir

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, width, 1, groups=width)
        self.norm2 = nn.BatchNorm2d(width)
        self.loose = nn.Conv2d(width, 6, 1)
        self.head = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        x = torch.relu(self.norm2(self.wide(torch.relu(self.norm1(self.stem(x))))))
        return self.head(self.loose(x))

def build(width: int = 8):
    return Net(width)
"""
RECIPE = """
name: mine
backbone: {file: net.py, name: build}
data: {name: salient_shapes, size: 32}
train: {epochs: 1}
finetune: {epochs: 1}
slim: {threshold: 0.5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe, and a run of it with a dense model, of which 3 gates are zero, and a slim one."""
    folder = tmp_path_factory.mktemp("inspection")
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "net.py").write_text(NET)
    recipe = load(folder / "mine.yaml")
    model = build_dense(recipe)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        model(images)
    model.norm1.weight.data[:3] = 0
    model.eval()
    with RunDir.start(folder / "runs" / "one", recipe.dump(), {}) as run:
        save_model(run, "dense", model)
        groups = find_groups(model, images)
        rebuilt, equivalence = slim(model, extract(model, groups, 0.01), images, groups=groups)
        save_model(run, "slim", rebuilt, equivalence.plan)
    return folder


def shown(inspection, width=80):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        show_groups(inspection, console)
    return capture.get()


def test_groups_of_a_recipe(folder):
    found = inspect_groups(str(folder / "mine.yaml"))
    model = build_dense(load(folder / "mine.yaml"))
    assert found.groups == find_groups(model, torch.zeros(1, 3, 32, 32))
    assert found.params == sum(p.numel() for p in model.parameters())
    assert (found.model, found.shape, found.alive) == ("dense", (3, 32, 32), None)
    # The MACs of a channel grow with the size.
    larger = inspect_groups(str(folder / "mine.yaml"), ["data.size=64"])
    assert larger.groups[0].macs == 4 * found.groups[0].macs


def test_alive_channels_of_a_run(folder):
    run = RunDir.open(folder / "runs" / "one")
    found = inspect_groups(str(folder / "runs" / "one"), model="dense")
    model = load_model(run, "dense")
    gated = [group for group in found.groups if group.reason is None and group.gates]
    assert found.alive == {group.id: int((gate_scores(model, group) > 0.5).sum()) for group in gated}
    first = found.groups[0]
    assert found.alive[first.id] <= first.channels - 3
    none = inspect_groups(str(folder / "runs" / "one"), ["slim.threshold=1e9"], model="dense")
    assert set(none.alive.values()) == {0} and none.threshold == 1e9


def test_default_is_the_newest_model(folder):
    dense = inspect_groups(str(folder / "runs" / "one"), model="dense")
    newest = inspect_groups(str(folder / "runs" / "one"))
    assert newest.model == "slim" and newest.params < dense.params
    assert (dense.groups[0].id, dense.groups[0].channels) == ("stem", 8)
    assert (newest.groups[0].id, newest.groups[0].channels) == ("stem", 5)


def test_table_fits_the_width_and_has_every_group(folder):
    for source, width in (("mine.yaml", 80), ("runs/one", 80), ("runs/one", 60)):
        found = inspect_groups(str(folder / source), model="dense" if "runs" in source else None)
        text = shown(found, width)
        assert max(map(len, text.splitlines())) <= width
        for group in found.groups:
            alive = "" if found.alive is None else rf"\s+{found.alive.get(group.id, '–')}"
            row = rf"^{group.id}\s+{group.channels}{alive}\s+{group.params:,}\s+{group.macs:,}$"
            assert re.search(row, text, re.MULTILINE), group.id
            assert (f"cannot be pruned: {group.reason}" if group.reason else format_gates(group)) in " ".join(
                text.split()
            )
    assert "  norm1 → norm2\n" in text


def test_totals(folder):
    text = " ".join(shown(inspect_groups(str(folder / "mine.yaml"))).split())
    assert "2 of 4 groups can be pruned, 14 channels 2 of 4 groups cannot be pruned, 4 channels:" in text
    assert "1 × the model's output" in text
    run = inspect_groups(str(folder / "runs" / "one"), model="dense")
    expected = f"14 channels, {run.alive['stem']} of the 8 with gates alive (effective gate above 0.5)"
    assert expected in " ".join(shown(run).split()) and run.alive["stem"] <= 5


def test_long_names_are_folded(folder):
    found = inspect_groups(str(folder / "mine.yaml"))
    found.groups[0].id = long = "a.very." + "deep." * 20 + "conv"
    assert long in "".join(shown(found).split())
    assert max(map(len, shown(found).splitlines())) <= 80


def test_json(folder):
    found = inspect_groups(str(folder / "runs" / "one"), model="dense")
    read = json.loads(dump(found))
    alive = [group.pop("alive") for group in read["groups"]]
    assert [Group.model_validate(group) for group in read["groups"]] == found.groups
    assert alive == [found.alive.get(group.id) for group in found.groups]
    assert (read["model"], read["input"], read["threshold"]) == ("dense", [3, 32, 32], 0.5)
    assert json.loads(dump(inspect_groups(str(folder / "mine.yaml"))))["threshold"] is None


def group(combine, *norms):
    gates = [Gate(norm=name, slice=(start, start + 2)) for name, start in norms]
    return Group(id="g", channels=2, members=[], gates=gates, combine=combine)


@pytest.mark.parametrize(
    ("combine", "names", "text"),
    [
        (None, [], "no gate"),
        (0, ["bn"], "bn"),
        ({"serial": [0, 1]}, ["bn1", "bn2"], "bn1 → bn2"),
        ({"parallel": [0, 1]}, ["a.bn", "b.bn"], "(a | b).bn"),
        ({"parallel": [0, 1]}, ["l.0.bn2", "l.1.bn2"], "l.(0 | 1).bn2"),
        ({"parallel": [0, 1]}, ["l.0", "l.0.bn"], "l.(0 | 0.bn)"),
        ({"serial": [{"parallel": [0, 1]}, 2]}, ["x.a", "x.b", "x.c"], "x.(a | b) → x.c"),
        ({"parallel": [{"serial": [0, 1]}, 2]}, ["a", "b", "c"], "(a → b) | c"),
        ({"parallel": [0, 1, 2, 3]}, list("abcd"), "a | b | c | d"),
        ({"parallel": [0, 1, 2, 3, 4, 5]}, list("abcdef"), "a | b | … 3 more … | f"),
    ],
)
def test_format_gates(combine, names, text):
    assert format_gates(group(combine, *((name, 0) for name in names))) == text


def test_format_gates_of_a_slice():
    assert format_gates(group(0, ("bn", 4))) == "bn@4"


@pytest.mark.parametrize("seed", range(20))
def test_factored_names_expand_to_the_names(seed):
    rng = np.random.default_rng(seed)
    names = [".".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(rng.integers(2, 5))]
    text = format_gates(group({"serial": list(range(len(names)))}, *((name, 0) for name in names)))
    head, _, rest = text.partition("(") if "(" in text else ("", "", text)
    middle, _, tail = rest.partition(")")
    assert [f"{head}{part}{tail}" for part in middle.split(" → ")] == names


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("csnett", None, "did you mean 'csnet'"),
        ("{}/runs/onne", None, "did you mean .*/runs/one"),
        ("{}/mine.yml", None, "did you mean .*/mine.yaml"),
        ("{}/runs", None, "neither a recipe nor a run folder"),
        ("{}/runs/one", "dens", "has no such model, did you mean 'dense'"),
        ("{}/runs/one", "finetuned", "has no such model; it has dense, slim"),
        ("{}/mine.yaml", "slim", "is not a run folder; a recipe has only the dense model"),
    ],
)
def test_unknown_names_get_a_hint(folder, source, model, message):
    with pytest.raises(RecipeError, match=message) as caught:
        inspect_groups(source.format(folder), model=model)
    assert "\n" not in str(caught.value)


def test_run_without_a_model(folder, tmp_path):
    with RunDir.start(tmp_path / "run", load(folder / "mine.yaml").dump(), {}):
        pass
    with pytest.raises(CheckpointError, match="holds no model yet"):
        inspect_groups(str(tmp_path / "run"))


def test_command(folder, capsys):
    for arguments, word in ((["data.size=48"], "input 3×48×48"), (["--json"], '"groups"')):
        with pytest.raises(SystemExit) as stop:
            main(["groups", str(folder / "mine.yaml"), *arguments])
        # A long path folds the line.
        assert stop.value.code == 0 and word in " ".join(capsys.readouterr().out.split())
