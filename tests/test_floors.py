"""The house has floors: a file imports from floors below its own, and from its siblings without a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "prunekit"

# Longest prefix wins.
FLOORS = {
    "errors": 0,
    "registry": 1,
    "files": 1,
    "yaml12": 1,
    "schedules": 1,
    "progress": 1,
    "interrupts": 1,
    "endings": 1,
    "logs": 1,
    "environment": 1,
    "processes": 1,
    "launch": 1,
    "userfile": 1,
    "decoding": 1,
    "enclosed": 1,
    "optimizers": 2,
    "schema": 2,
    "sources": 2,
    "recipe": 2,
    "checkpoints": 2,
    "runfiles": 2,
    "state": 2,
    "stageorder": 2,
    "rundir": 2,
    "onlooker": 2,
    "plan": 2,
    "layers": 2,
    "native": 2,
    "data": 2,
    "backbones": 3,
    "tasks": 3,
    "counting": 3,
    "pruning": 4,
    "deploy": 4,
    "reporting": 4,
    "loading": 5,
    "interop": 5,
    "exchange": 6,
    "work": 6,
    "stages": 6,
    "following": 6,
    "slimming": 6,
    "stepping": 4,
    "averaging": 4,
    "distilling": 4,
    "job": 5,
    "gatecourse": 5,
    "training_state": 5,
    "training": 5,
    "updating": 5,
    "trackers": 5,
    "watching": 6,
    "prediction": 6,
    "evaluation": 6,
    "exporting": 6,
    "benching": 6,
    "pipeline": 6,
    "listing": 6,
    "inspection": 6,
    "cli": 7,
}
TORCH_FREE = {"errors", "registry", "files", "yaml12", "schedules", "progress", "schema", "sources", "recipe"} | {
    "interrupts",
    "endings",
    "logs",
    "launch",
    "userfile",
    "listing",
    "checkpoints",
    "runfiles",
    "state",
    "stageorder",
    "rundir",
    "onlooker",
    "decoding",
    "enclosed",
    "plan",
    "reporting",
    "watching",
    "cli",
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Every import of the package's own, late ones too."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
        if isinstance(node, ast.ImportFrom) and node.module == "prunekit":
            names = [f"prunekit.{alias.name}" for alias in node.names if alias.name in FLOORS]
        found |= {name for name in names if name}
    return found


def own(names: set[str]) -> set[str]:
    return {name.removeprefix("prunekit.") for name in names if name.startswith("prunekit.")}


@pytest.mark.parametrize("name, path", [pytest.param(n, p, id=n or "prunekit") for n, p in modules()])
def test_imports_go_down(name, path):
    if not name:
        assert not own(imports(path)), "prunekit/__init__.py exports lazily"
        return
    room = name.partition(".")[0]
    assert room in FLOORS, f"{name} stands on no floor; give it one in DESIGN's table and here"
    for other in own(imports(path)):
        below = other.partition(".")[0]
        assert below == room or FLOORS[below] <= FLOORS[room], f"{name} (floor {FLOORS[room]}) imports {other} above it"


def test_no_circle():
    graph = {name: own(imports(path)) for name, path in modules()}
    names = set(graph)
    # What is imported from a package's __init__ is not told apart from it; a module does not wait for its own package.
    edges = {name: {o for o in others if o in names and not name.startswith(f"{o}.")} for name, others in graph.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join((*way, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("room", sorted(TORCH_FREE))
def test_torch_free_rooms(room):
    for name, path in modules():
        if name.partition(".")[0] == room:
            top = {i.partition(".")[0] for i in imports(path, top_only=True)}
            assert not top & {"torch", "accelerate", "torch_pruning"}, name


def test_files_are_short():
    long = {name: n for name, path in modules() if (n := len(path.read_text().splitlines())) > 400}
    assert not long
