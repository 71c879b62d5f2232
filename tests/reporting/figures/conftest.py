"""A run shared by the tests of a file, as figures do not modify it."""

from __future__ import annotations

import pytest
from helpers.fake_run import write_run

from prunekit.reporting.loader import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "csnet"
    return load_run(write_run(path, units=("block",), epochs=12, measured_too=True))
