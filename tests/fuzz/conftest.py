import logging

import pytest


@pytest.fixture(autouse=True)
def silence():
    logger = logging.getLogger("prunekit")
    level = logger.level
    yield
    logger.setLevel(level)
