"""What importing prunekit costs: the command line answers at once, so these modules must not import torch."""

import subprocess
import sys

import pytest

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
