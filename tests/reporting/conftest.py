"""Run folders for the tests of reports."""

from __future__ import annotations

import pytest
from helpers.fake_run import write_run


@pytest.fixture
def make_run(tmp_path):
    """``make_run(name, …)`` writes ``tmp_path/name``; the rest as for :func:`write_run`."""
    return lambda name="csnet", **options: write_run(tmp_path / name, **options)
