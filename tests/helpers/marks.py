"""Parameters of which only the first ones run in plain ``pytest``."""

import pytest


def seeds(count: int, plain: int = 1) -> list:
    """Return the seeds 0 … count − 1; those from ``plain`` on are marked slow."""
    return [seed if seed < plain else pytest.param(seed, marks=pytest.mark.slow) for seed in range(count)]
