"""A run for all tests of a file: figures change nothing of it."""

from __future__ import annotations

import pytest
from helpers.fake_run import write_run

from prunekit.reporting.loader import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "csnet"
    return load_run(write_run(path, units=("block",), epochs=12, measured_too=True))
