"""Parameters of which only the first ones run in plain ``pytest``."""

import pytest


def slow(*values):
    """Return a parameter that does not run in plain ``pytest``."""
    return pytest.param(*values, marks=pytest.mark.slow)


def seeds(count: int, plain: int = 1) -> list:
    """Return the seeds 0 … count − 1; those from ``plain`` on are marked slow."""
    return [seed if seed < plain else slow(seed) for seed in range(count)]
