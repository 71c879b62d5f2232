"""One thread a test process: the networks are small, and tests run side by side. Each begins from a seed of its own."""

import os
import signal
import tempfile
import zlib
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# A shell ignores it for what it starts in the background, and a program keeps to that; what Ctrl-C does is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Not the user's own; the same for all processes and runs, so that the kernels are compiled once.
os.environ["PRUNEKIT_CACHE"] = str(Path(tempfile.gettempdir()) / f"prunekit-tests-{os.getuid()}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the fixtures: which tests a process has run already is different each time."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))
