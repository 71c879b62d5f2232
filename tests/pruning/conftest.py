import pytest
import torch
from helpers.networks import Row, small_csnet

from prunekit.pruning.graph.groups import find_groups


@pytest.fixture(scope="module")
def row():
    model = Row()
    return model, find_groups(model, torch.randn(1, 3, 16, 16))


@pytest.fixture(scope="module")
def branched():
    model = small_csnet()
    return model, find_groups(model, torch.randn(1, 3, 32, 32))
