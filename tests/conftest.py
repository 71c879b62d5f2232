"""Shared set-up: one thread per test process, a seed per test, and reproducible Hypothesis examples."""

import os
import signal
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# Of the processes that tests start, too: threads of several processes on one core wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

# Plain pytest draws the same examples every time and never fails for being slow; the long forms explore.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("plain", derandomize=True, **UNTIMED)
settings.register_profile("soak", **UNTIMED)
settings.load_profile("soak" if os.environ.get("PRUNEKIT_SOAK") else "plain")

# Shells ignore SIGINT for background processes, but Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Not the cache of the user; shared by all processes and runs, so that the kernels are compiled once.
os.environ["PRUNEKIT_CACHE"] = str(Path(tempfile.gettempdir()) / f"prunekit-tests-{os.getuid()}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed each test by its name, since the tests that ran before it in the same process vary."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(scope="session", autouse=True)
def quick_timing():
    """Time the candidates of a deployed form once each: which of them is the fastest is no matter to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.deployment.deploy.ROUNDS", 1)
        yield
