import numpy as np
import pytest
import torch
from torch import nn

from prunekit.config import registry
from prunekit.data.datasets import Tensors
from prunekit.errors import TrainingError
from prunekit.tasks.base import Task, inference


def test_every_task_names_its_metrics():
    for entry in registry.tasks:
        task = entry.build()
        assert isinstance(task, Task) and task.metric_names
        assert task.lower_is_better <= set(task.metric_names)


class Lower(registry.tasks.get("saliency")):
    metric_names = ("mae", "max_f")


def test_best_compares_the_first_metric_in_its_direction():
    found = {"a": {"max_f": 0.9, "mae": 0.5}, "b": {"max_f": 0.3, "mae": 0.1}}
    assert registry.tasks.get("saliency")().best(found) == "a" and Lower().best(found) == "b"


def test_inference_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 1, 1)).train()
    model[0].eval()
    with inference(model) as device:
        assert device == torch.device("cpu") and not any(m.training for m in model.modules())
        assert not model(torch.ones(1, 3, 2, 2)).requires_grad
    assert [m.training for m in model.modules()] == [True, False, True, True]


class ReturnsNaN(nn.Module):
    """Returns a map or two logits with a NaN."""

    def __init__(self, maps):
        super().__init__()
        self.maps, self.weight = maps, nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = x[:, :1] * self.weight if self.maps else x.mean((2, 3))[:, :2] * self.weight
        y.view(-1)[1] = float("nan")
        return y


@pytest.mark.parametrize("name", ["saliency", "classification"])
def test_nonfinite_output_gives_no_prediction_and_no_metrics(name):
    task, model = registry.tasks.get(name)(), ReturnsNaN(name == "saliency")
    with pytest.raises(TrainingError, match="the model's output for an image is not finite"):
        task.predict(model, np.zeros((16, 16, 3), np.uint8), 16)
    targets = torch.zeros(2, 1, 16, 16, dtype=torch.uint8) if name == "saliency" else torch.zeros(2, dtype=torch.int64)
    assert (
        task.validate(model, Tensors(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), targets, torch.ones(2, 2)), 2) == {}
    )
