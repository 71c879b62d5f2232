import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.data.datasets import LabelDataset, load_tensors, normalize
from prunekit.data.digits import digits
from prunekit.errors import DataError
from prunekit.tasks.classification import Classification

task = Classification()


class Gray(LabelDataset):
    """Gray images of these levels with labels; a level of None is unreadable."""

    def __init__(self, levels, labels, classes=4, skip_errors=False):
        super().__init__([f"i{n}" for n in range(len(levels))], [f"c{n}" for n in range(classes)])
        self.held, self.skip_errors = dict(zip(self.names, zip(levels, labels, strict=True), strict=True)), skip_errors

    def image(self, index):
        level = self.held[self.names[index]][0]
        if level is None:
            raise DataError(f"{self.names[index]} cannot be read")
        return np.full((5 + index, 7, 3), level, np.uint8)

    def label(self, index):
        return self.held[self.names[index]][1]


class Quarters(nn.Module):
    """Predicts class 0 for levels 0 to 63, class 1 for 64 to 127, and so on."""

    def __init__(self, classes=4):
        super().__init__()
        self.norm, self.classes, self.seen = nn.BatchNorm2d(3), classes, []

    def forward(self, x):
        self.seen.append((tuple(x.shape), self.training))
        level = (x[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255
        # The offset breaks the tie between two classes at the first level of each.
        return -(((level[:, None] + 1e-3) / 64 - 0.5 - torch.arange(self.classes)) ** 2)


LEVELS, LABELS = [10, 70, 130, 200, 20, 90], [0, 1, 2, 3, 1, 0]


def test_metrics_of_a_small_example():
    found = task.evaluate(Quarters(), Gray(LEVELS, LABELS), 8, 4)
    assert found.metrics == {"top1": 4 / 6}
    assert found.curves["classes"] == ["c0", "c1", "c2", "c3"]
    assert found.curves["confusion"] == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    logits = [-((LEVELS[0] / 64 - 0.5 - k) ** 2) for k in range(4)]
    assert found.errors[0] == pytest.approx(1 - math.exp(logits[0]) / sum(map(math.exp, logits)), abs=1e-5)
    assert np.argmax(found.errors) in (4, 5) and found.names == [f"i{n}" for n in range(6)]
    assert task.trivial_scores(Gray(LEVELS, LABELS)) == {"majority": {"top1": 2 / 6}}
    assert task.validate(Quarters(), load_tensors(Gray(LEVELS, LABELS), 8), 4) == found.metrics


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 3)), min_size=1, max_size=20), st.integers(1, 7))
def test_confusion_matrix_counts_every_image_for_any_batch_size(pairs, batch):
    levels, labels = zip(*pairs, strict=True)
    found = task.evaluate(Quarters(), Gray(levels, labels), 8, batch)
    confusion = np.array(found.curves["confusion"])
    assert confusion.sum(1).tolist() == np.bincount(labels, minlength=4).tolist()
    assert found.metrics["top1"] == confusion.trace() / len(pairs)
    assert found.metrics["top1"] == np.mean([level // 64 == label for level, label in pairs])
    majority = task.trivial_scores(Gray(levels, labels))["majority"]["top1"]
    assert majority == max(labels.count(k) for k in range(4)) / len(labels)


def test_loss_is_cross_entropy():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]], dtype=torch.bfloat16)
    expected = (-math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-1))) + math.log(3)) / 2
    loss = task.loss(logits, torch.tensor([0, 2]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(IndexError):
        task.loss(logits, torch.tensor([0, 3]))


def test_prediction_renders_as_columns_of_a_table():
    image = np.full((9, 5, 3), 140, np.uint8)
    found = task.predict(Quarters(), image, 8)
    assert found.shape == (4,) and found.sum() == pytest.approx(1) and found.argmax() == 2
    row = task.render(found, ["a", "b", "c", "d"])
    assert row == {"class": "c", "probability": round(float(found[2]), 6)}


def test_evaluation_uses_the_size_and_restores_the_mode():
    model = Quarters().train()
    task.evaluate(model, Gray(LEVELS, LABELS), 8, 4)
    task.evaluate(model, Gray(LEVELS[:2], LABELS[:2]), None, 4)
    assert model.training and model.norm.training
    assert model.seen == [
        ((4, 3, 8, 8), False), ((2, 3, 8, 8), False), ((1, 3, 16, 16), False), ((1, 3, 16, 16), False)
    ]  # fmt: skip


def test_skip_errors_drops_unreadable_images():
    with pytest.raises(DataError, match="i1 cannot be read"):
        task.evaluate(Quarters(), Gray([10, None], [0, 1]), 8, 4)
    images = Gray([None, 10, None, 200], [0, 0, 1, 2], skip_errors=True)
    found = task.evaluate(Quarters(), images, 8, 2)
    assert (images.skipped, found.names, found.metrics) == (2, ["i1", "i3"], {"top1": 0.5})


def test_empty_data_set_raises():
    tensors = load_tensors(Gray(LEVELS, LABELS), 8)
    empty = type(tensors)(tensors.images[:0], tensors.targets[:0], tensors.sizes[:0])
    for call in (
        lambda: task.validate(Quarters(), empty, 4),
        lambda: task.evaluate(Quarters(), Gray([], []), 8, 4),
        lambda: task.evaluate(Quarters(), Gray([None], [0], skip_errors=True), 8, 4),
        lambda: task.trivial_scores(Gray([], [])),
    ):
        with pytest.raises(DataError, match="no image to evaluate"):
            call()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(1, 4), None),
        (torch.zeros(1, 10), "4 classes, and the model has 10 outputs; .*classes=4"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 4\) for one image, not \(1, 1, 8, 8\)"),
        ((torch.zeros(1, 4),), "for one image, not tuple"),
    ],
)
def test_output_of_wrong_shape_is_described(output, message):
    fault = task.check_output(output, 8, Gray(LEVELS, LABELS))
    if message is None:
        assert fault is None
    else:
        assert re.search(message, fault) and "\n" not in fault


def test_a_small_network_learns_digits():
    torch.manual_seed(0)
    tensors = load_tensors(digits("val"), 8)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    assert task.validate(model, tensors, 64)["top1"] < 0.3
    for _ in range(15):
        loss = task.loss(model(normalize(tensors.images)), tensors.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.validate(model, tensors, 64)["top1"] > 0.9
