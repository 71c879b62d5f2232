import os
from pathlib import Path

from hypothesis import HealthCheck, settings


def test_plain_pytest_draws_the_same_examples_and_never_fails_for_being_slow():
    assert settings.default.deadline is None and HealthCheck.too_slow in settings.default.suppress_health_check
    assert settings.default.derandomize or os.environ.get("PRUNEKIT_SOAK")
    files = [
        path for path in Path(__file__).parent.rglob("*.py") if path.name not in ("conftest.py", Path(__file__).name)
    ]
    assert not [path for path in files if "deadline=" in path.read_text()]
