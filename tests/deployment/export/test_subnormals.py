import numpy as np
import torch
from torch import nn

from prunekit.deployment.export.subnormals import flush_subnormals, subnormal_count, without_subnormals


def test_subnormal_numbers_become_zero():
    values = np.array([0, 1e-40, -1e-40, 1.2e-38, -1], np.float32)
    assert subnormal_count(values) == 2
    assert (
        flush_subnormals(values).tolist() == [0, 0, 0, values[3], -1] and flush_subnormals(values).dtype == np.float32
    )
    assert subnormal_count(values.astype(np.float64)) == 0


def test_model_is_copied():
    model = nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight[0] = model.running_var[1] = 1e-40
    clean = without_subnormals(model)
    assert clean.weight.tolist() == [0, 1] and clean.running_var.tolist() == [1, 0]
    assert model.weight[0] != 0 and model.running_var[1] != 0
