"""The example program, plugin package and tasks run."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_your_model():
    file = EXAMPLES / "your_model.py"
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True)
    before, after = (int(word) for word in done.stdout.split(" parameters")[0].split(" → "))
    assert after < 0.8 * before
    assert "equivalence check passed: True" in done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a function that runs prunekit in a new environment with this one's packages and the example package."""
    folder = tmp_path_factory.mktemp("plugin")
    # A build leaves files next to its sources.
    shutil.copytree(EXAMPLES / "plugin_backbone", folder / "package")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"

    def call(*arguments):
        environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "COLUMNS": "80"}
        done = subprocess.run(
            [python, "-m", *map(str, arguments)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    site = next((folder / "env").glob("lib/python*/site-packages"))
    shown = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "shown.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(shown)))
    call("pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", folder / "package")
    return lambda *arguments: call("prunekit.cli", *arguments)


def test_plugin_is_listed_with_its_origin(installed):
    lines = installed("list").splitlines()
    (row,) = [line for line in lines if line.strip().startswith("mobile_saliency")]
    assert "prunekit-mobile 1.0" in row
    following = lines[lines.index(row) :]
    assert any("width=16, expansion=4" in line for line in following[:4])
    recipe, backbone = [line for line in lines if line.strip().startswith("csnet ") and "CSNet" in line]
    assert "prunekit 0" in backbone and "prunekit 0" not in recipe


def test_plugin_recipe_runs(installed):
    tiny = ["train.epochs=1", "finetune.epochs=1", "data.size=32", "data.options={train: 32, val: 8}"]
    # After two steps the gates are slightly above or below 1.
    tiny += ["backbone.options.width=4", "decay.weight=0", "slim.threshold=0.99", "--out", "run"]
    out = installed("run", "package/mobile.yaml", *tiny)
    kept, of = map(int, re.search(r"slim: (\d+) of (\d+) channels kept.*equivalence check passed", out).groups())
    assert 0 < kept < of and "run (complete)" in out
    output = " ".join(installed("groups", "run", "--model", "dense").split())
    assert "8 of 10 groups can be pruned" in output and "alive (effective gate above 0.99)" in output


def test_plugin_package_is_declared_in_setup_cfg():
    folder = EXAMPLES / "plugin_backbone"
    assert "[project]" not in (folder / "pyproject.toml").read_text()
    assert "prunekit.plugins" in (folder / "setup.cfg").read_text()
    assert {path.name for path in folder.iterdir() if path.name != "__pycache__"} == {
        "README.md", "mobile.yaml", "prunekit_mobile.py", "pyproject.toml", "setup.cfg"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "metrics", "onnx"),
    [("segmentation", ["miou", "pixel_accuracy"], "true"), ("regression", ["mae", "rmse"], "false")],
)
def test_task_example_runs_to_the_end(name, metrics, onnx, tmp_path):
    tiny = ["train.epochs=1", "finetune.epochs=1", "data.size=16", "data.options={train: 32, val: 4}"]
    tiny.append(f"export.onnx={onnx}")
    command = [sys.executable, "-m", "prunekit.cli", "run", EXAMPLES / "tasks" / f"{name}.yaml", *tiny]
    done = subprocess.run([*command, "--out", tmp_path / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for part in ("dense", "slim", "finetuned"):
        assert list(summary[part]["metrics"]) == metrics
    assert summary["kept"]["macs_ratio"] < 0.6
    assert (tmp_path / "run" / "report").is_dir()
