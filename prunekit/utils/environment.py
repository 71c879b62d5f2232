"""Where and how a run was made: versions, device, threads, commit, command line."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from prunekit import __version__
from prunekit.utils import distributed

_PACKAGES = ("torch", "numpy", "torch-pruning", "fvcore", "thop", "onnx", "onnxruntime", "accelerate", "pysodmetrics")


def environment(seed: int) -> dict[str, Any]:
    """What ``environment.json`` holds."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    return {
        "prunekit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "seed": seed,
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _commit() -> str | None:
    """The git commit of the working folder, where it is in a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
