import numpy as np
import pytest
import torch
from torch import nn

from prunekit.config import registry
from prunekit.deployment.export.onnx import check_onnx, export_onnx
from prunekit.deployment.export.preprocessing import add_preprocessing
from prunekit.errors import ExportError

SALIENCY, CLASSIFICATION = registry.tasks.get("saliency"), registry.tasks.get("classification")


def model_for(task):
    torch.manual_seed(0)
    head = [nn.Conv2d(3, 1, 3, padding=1)] if issubclass(task, SALIENCY) else [nn.Flatten(), nn.Linear(3 * 16 * 16, 5)]
    return nn.Sequential(*head).eval()


class Scores(CLASSIFICATION):
    def activation(self, logits):
        return logits


class OwnPostprocess(CLASSIFICATION):
    def postprocess(self, scores, size):
        return scores.argmax(0).numpy()


@pytest.mark.parametrize("task", [SALIENCY, CLASSIFICATION, Scores])
def test_output_is_the_prediction_of_the_task(task):
    model = model_for(task)
    wrapped = add_preprocessing(model, task(), 16)
    image = np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8)
    expected = task().predict(model, image, 16)
    output = wrapped(torch.from_numpy(image)[None])[0].detach().numpy()
    assert output.shape == expected.shape and output.dtype == expected.dtype
    assert np.abs(output.astype(float) - expected.astype(float)).max() <= (1 if task is SALIENCY else 1e-6)


def test_exported_saliency_takes_images_of_any_size():
    wrapped = add_preprocessing(model_for(SALIENCY), SALIENCY(), 16)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((2, 20, 30, 3), (1, 16, 16, 3))]
    assert check_onnx(export_onnx(wrapped, images[0]), wrapped, images) <= 1


def test_task_with_its_own_postprocessing_is_rejected():
    with pytest.raises(ExportError, match="OwnPostprocess, which overrides postprocess"):
        add_preprocessing(model_for(CLASSIFICATION), OwnPostprocess(), 16)
