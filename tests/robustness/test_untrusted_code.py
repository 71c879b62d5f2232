"""Code named by an untrusted run folder does not run, and no module can run what it reads."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunekit.cli import main
from prunekit.config import recipe, user_module

ROOT = Path(__file__).parents[2]
NET = """
from pathlib import Path
from torch import nn

Path({mark!r}).touch()


def build(width: int = 4):
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(stem, nn.Conv2d(width, 1, 1))
"""
RECIPE = """
name: theirs
backbone: {file: net.py, name: build}
data: {name: salient_shapes, size: 16, options: {train: 4, val: 2}}
train: {epochs: 0}
finetune: {epochs: 0}
export: {onnx: false}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder made elsewhere, and the file of its backbone."""
    home = tmp_path_factory.mktemp("theirs")
    patch = pytest.MonkeyPatch()
    patch.setenv("PRUNEKIT_CACHE", str(home / "cache"))
    patch.setattr("prunekit.reporting.report", lambda *_: None)
    (home / "net.py").write_text(NET.format(mark=str(home / "mark")))
    (home / "mine.yaml").write_text(RECIPE)
    with pytest.raises(SystemExit) as stop:
        main(["run", str(home / "mine.yaml"), "--out", str(home / "run")])
    assert not stop.value.code and (home / "mark").exists()
    patch.undo()
    return home


@pytest.fixture
def untrusted(made, tmp_path, monkeypatch):
    """A copy of the folder on a machine where nothing is trusted; the file ``mark`` appears if its code runs."""
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(user_module, "_trusted", set())
    monkeypatch.setattr(user_module, "_modules", {})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "run", tmp_path / "run")
    (made / "mark").unlink(missing_ok=True)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "run"


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0, capsys.readouterr().err


COMMANDS = {
    "predict": ["predict", "run", "photo.png", "--out", "maps"],
    "groups": ["groups", "run"],
    "groups with keys": ["groups", "run", "data.size=32"],
    "export": ["export", "run", "--format", "onnx"],
    "export with keys": ["export", "run", "--format", "onnx", "data.size=16"],
    "bench": ["bench", "run", "--forms", "eager"],
    "eval": ["eval", "run", "--data", "a=set"],
    "slim": ["slim", "run"],
    "finetune": ["finetune", "run"],
    "init": ["run", "other.yaml"],
}


def plant(folder, made, where):
    """Let the run folder name its code in one of several ways."""
    text = (made / "run" / "recipe.yaml").read_text()
    pinned = next(line for line in text.splitlines() if line.strip().startswith("file: "))
    named = {
        "pinned": pinned.strip().removeprefix("file: ").strip("'\""),
        "inside": "run/net.py",
        "beside the recipe": "net.py",
        "in a folder above": "run/../run/net.py",
    }[where]
    shutil.copy(made / "net.py", folder / "net.py")
    (folder / "recipe.yaml").write_text(text.replace(pinned.strip(), f"file: {json.dumps(named)}"))
    # An attacker can forge the checksums.
    (folder / "state.json").unlink()
    (folder.parent / "set" / "images").mkdir(parents=True)
    (folder.parent / "set" / "GT").mkdir()
    for part in ("images", "GT"):
        shutil.copy(folder.parent / "photo.png", folder.parent / "set" / part / "photo.png")
    other = RECIPE.replace("name: theirs", "name: other\ninit: run").replace(
        "{file: net.py, name: build}", "{name: csnet, options: {width: 10}}"
    )
    (folder.parent / "other.yaml").write_text(other)


@pytest.mark.parametrize("where", ["pinned", "inside", "beside the recipe", "in a folder above"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_do_not_run_untrusted_code(made, untrusted, capsys, command, where):
    plant(untrusted, made, where)
    status, error = call(capsys, *COMMANDS[command])
    assert status in (2, 3) and error.count("\n") == 1, error
    # Unless it is pinned, the file may not be found.
    assert "--trust" in error or "does not exist" in error or (command == "init" and "init" in error), error
    assert not (made / "mark").exists()


@pytest.mark.parametrize("command", ["report", "watch"])
def test_reports_do_not_run_code(made, untrusted, capsys, command):
    status, error = call(capsys, command, untrusted, *(["--once"] if command == "watch" else []))
    assert status == 0, error
    assert not (made / "mark").exists()


def test_trust_is_asked_once_per_content(made, untrusted, capsys):
    status, error = call(capsys, *COMMANDS["groups"])
    assert status == 2 and f"{made / 'net.py'} is code named by a run folder" in error
    assert call(capsys, *COMMANDS["groups"], "--trust")[0] == 0 and (made / "mark").exists()
    user_module._trusted.clear()  # As in another process.
    assert call(capsys, *COMMANDS["predict"])[0] == 0
    (untrusted.parent / "net.py").write_text("raise SystemExit(7)")
    text = (untrusted / "recipe.yaml").read_text()
    (untrusted / "state.json").unlink()
    (untrusted / "recipe.yaml").write_text(text.replace(str(made / "net.py"), str(untrusted.parent / "net.py")))
    status, error = call(capsys, *COMMANDS["predict"], "--overwrite")
    assert status == 2 and "has changed (expected sha256" in error and "--trust" in error


def test_a_recipe_that_the_user_runs_is_trusted(made, untrusted, capsys):
    shutil.copy(made / "net.py", "net.py")
    Path("mine.yaml").write_text(RECIPE)
    recipe.load("mine.yaml")
    assert (made / "mark").exists()
    assert call(capsys, *COMMANDS["groups"])[0] == 0


FORBIDDEN = {
    *(f"pickle.{name}" for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads")),
    *(f"marshal.{name}" for name in ("load", "loads")),
    *(
        f"yaml.{name}"
        for name in ("load", "load_all", "unsafe_load", "full_load", "UnsafeLoader", "FullLoader", "Loader")
    ),
    *("torch.load", "torch.jit.load", "torch.package", "torch.hub", "torch.export.load", "torch.save"),
    *("numpy.load", "numpy.memmap", "numpy.lib.format.read_array", "pandas.read_pickle", "pandas.eval"),
    *("eval", "exec", "__import__", "importlib.import_module", "runpy"),
    *("os.system", "os.popen", "subprocess.Popen", "subprocess.run", "ctypes.CDLL"),
    *("joblib", "dill", "cloudpickle", "shelve", "multiprocessing", "torch.multiprocessing"),
}
# File → exceptions.
ALLOWED = {
    "interop/pickles.py": {
        "torch.load",
        "torch.save",
        "pickle._Unpickler",
        "pickle._Unpickler.dispatch",
    },  # weights_only, and a restricted reader
    "config/user_module.py": {"exec"},  # only if trusted
    "deployment/export/pt2.py": {"torch.export.load"},  # of what was just written
    "deployment/bench/timing.py": {"subprocess.Popen"},
    "native/library.py": {"ctypes.CDLL", "subprocess.run"},  # our own sources
    "sweep/worker.py": {"ctypes.CDLL", "subprocess.Popen"},  # the C library; prunekit with the user's own arguments
    "training/acceleration.py": {"ctypes.CDLL"},  # torch's own library
    "utils/environment.py": {"subprocess.run"},
    "backbones/external.py": {"importlib.import_module"},  # timm and torchvision
    "__init__.py": {"importlib.import_module"},
    "pipeline/model_file.py": {"importlib.import_module"},  # only with trust=True
}


def uses(path):
    """Return the dotted names that a file uses or imports, with aliases resolved."""
    tree, aliases, found = ast.parse(path.read_text()), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[(alias.asname or alias.name).split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found |= {node.module, f"{node.module}.{alias.name}"}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            found.add(".".join([aliases.get(node.id, node.id), *reversed(parts)]))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "prunekit").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_can_run_what_it_reads(path):
    name = str(path.relative_to(ROOT / "prunekit"))
    used = {use for use in uses(path) for bad in FORBIDDEN if use == bad or use.startswith(f"{bad}.")}
    assert used - ALLOWED.get(name, set()) == set()
    text = path.read_text()
    assert "allow_pickle=True" not in text and "weights_only=False" not in text and "shell=True" not in text


def test_every_exception_is_needed():
    for name, allowed in ALLOWED.items():
        assert allowed <= uses(ROOT / "prunekit" / name), name


def test_torch_load_reads_only_weights():
    tree = ast.parse((ROOT / "prunekit" / "interop" / "pickles.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert calls
    for call in calls:
        assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)


def test_forbidden_names_are_detected(tmp_path):
    for text in (
        "import pickle as p\np.loads(b'')",
        "from torch import load\nload('x')",
        "import torch\ntorch.load('x')",
        "from yaml import unsafe_load as y",
        "import joblib",
        "eval('1')",
        "import numpy as np\nnp.load('x')",
        "import multiprocessing.pool",
    ):
        (tmp_path / "a.py").write_text(text)
        assert {u for u in uses(tmp_path / "a.py") for bad in FORBIDDEN if u == bad or u.startswith(f"{bad}.")}, text
