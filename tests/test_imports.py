"""Packages, and what importing prunekit costs: these modules must not import torch, since commands answer at once."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = [
    "prunekit",
    "prunekit.cli",
    "prunekit.commands.list",
    "prunekit.commands.watch",
    "prunekit.config.recipe",
    "prunekit.errors",
    "prunekit.pruning.plan",
    "prunekit.reporting",
    "prunekit.runs.checkpoint_store",
    "prunekit.runs.worker_run_dir",
    "prunekit.runs.run_dir",
    "prunekit.training.schedules",
    "prunekit.utils.safe_decode",
    "prunekit.utils.exit_status",
    "prunekit.utils.launcher",
    "prunekit.utils.progress",
    "prunekit.utils.signals",
    "prunekit.utils.symlinks",
]
HEAVY = ("torch", "accelerate", "torch_pruning")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_module_does_not_import_torch(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_in_the_wheel():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split()) - {"prunekit.recipes"}  # from another folder
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "prunekit").rglob("__init__.py")}
    assert listed == found
