import torch
from torch import nn

from prunekit import registry
from prunekit.tasks.base import Task, inference


def test_every_task_says_what_it_measures():
    for entry in registry.tasks:
        task = entry.build()
        assert isinstance(task, Task) and task.metric_names
        assert task.lower_is_better <= set(task.metric_names)


class Lower(registry.tasks.get("saliency")):
    metric_names = ("mae", "max_f")


def test_the_best_is_by_the_first_metric_and_its_direction():
    found = {"a": {"max_f": 0.9, "mae": 0.5}, "b": {"max_f": 0.3, "mae": 0.1}}
    assert registry.tasks.get("saliency")().best(found) == "a" and Lower().best(found) == "b"


def test_inference_leaves_every_module_in_its_mode():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 1, 1)).train()
    model[0].eval()
    with inference(model) as device:
        assert device == torch.device("cpu") and not any(m.training for m in model.modules())
        assert not model(torch.ones(1, 3, 2, 2)).requires_grad
    assert [m.training for m in model.modules()] == [True, False, True, True]
