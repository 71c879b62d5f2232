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


class Grey(LabelDataset):
    """Flat images of the levels given, with labels; a level of None cannot be read."""

    def __init__(self, levels, labels, classes=4, tolerant=False):
        super().__init__([f"i{n}" for n in range(len(levels))], [f"c{n}" for n in range(classes)])
        self.held, self.skip_errors = dict(zip(self.names, zip(levels, labels, strict=True), strict=True)), tolerant

    def image(self, index):
        level = self.held[self.names[index]][0]
        if level is None:
            raise DataError(f"{self.names[index]} cannot be read")
        return np.full((5 + index, 7, 3), level, np.uint8)

    def label(self, index):
        return self.held[self.names[index]][1]


class Quarters(nn.Module):
    """Takes a level of 0 to 63 for class 0, of 64 to 127 for class 1, and so on."""

    def __init__(self, classes=4):
        super().__init__()
        self.norm, self.classes, self.seen = nn.BatchNorm2d(3), classes, []

    def forward(self, x):
        self.seen.append((tuple(x.shape), self.training))
        level = (x[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255
        # A little up, or the first level of each class would be as near to the class before.
        return -(((level[:, None] + 1e-3) / 64 - 0.5 - torch.arange(self.classes)) ** 2)


LEVELS, LABELS = [10, 70, 130, 200, 20, 90], [0, 1, 2, 3, 1, 0]


def test_figures_by_hand():
    found = task.evaluate(Quarters(), Grey(LEVELS, LABELS), 8, 4)
    assert found.metrics == {"top1": 4 / 6}
    assert found.curves["classes"] == ["c0", "c1", "c2", "c3"]
    assert found.curves["confusion"] == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    logits = [-((LEVELS[0] / 64 - 0.5 - k) ** 2) for k in range(4)]
    assert found.errors[0] == pytest.approx(1 - math.exp(logits[0]) / sum(map(math.exp, logits)), abs=1e-5)
    assert np.argmax(found.errors) in (4, 5) and found.names == [f"i{n}" for n in range(6)]
    assert task.reference(Grey(LEVELS, LABELS)) == {"majority": {"top1": 2 / 6}}
    assert task.quick(Quarters(), load_tensors(Grey(LEVELS, LABELS), 8), 4) == found.metrics


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 3)), min_size=1, max_size=20), st.integers(1, 7))
def test_the_confusion_matrix_holds_every_image_whatever_the_batch(pairs, batch):
    levels, labels = zip(*pairs, strict=True)
    found = task.evaluate(Quarters(), Grey(levels, labels), 8, batch)
    confusion = np.array(found.curves["confusion"])
    assert confusion.sum(1).tolist() == np.bincount(labels, minlength=4).tolist()
    assert found.metrics["top1"] == confusion.trace() / len(pairs)
    assert found.metrics["top1"] == np.mean([level // 64 == label for level, label in pairs])
    majority = task.reference(Grey(levels, labels))["majority"]["top1"]
    assert majority == max(labels.count(k) for k in range(4)) / len(labels)


def test_the_loss_is_the_cross_entropy():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]], dtype=torch.bfloat16)
    expected = (-math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-1))) + math.log(3)) / 2
    loss = task.loss(logits, torch.tensor([0, 2]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(IndexError):
        task.loss(logits, torch.tensor([0, 3]))


def test_a_prediction_is_a_row_of_a_table():
    image = np.full((9, 5, 3), 140, np.uint8)
    found = task.predict(Quarters(), image, 8)
    assert found.shape == (4,) and found.sum() == pytest.approx(1) and found.argmax() == 2
    row = task.show(found, ["a", "b", "c", "d"])
    assert row == {"class": "c", "probability": round(float(found[2]), 6)}


def test_the_model_comes_back_in_its_mode_and_sees_the_size_asked_for():
    model = Quarters().train()
    task.evaluate(model, Grey(LEVELS, LABELS), 8, 4)
    task.evaluate(model, Grey(LEVELS[:2], LABELS[:2]), None, 4)
    assert model.training and model.norm.training
    assert model.seen == [
        ((4, 3, 8, 8), False), ((2, 3, 8, 8), False), ((1, 3, 16, 16), False), ((1, 3, 16, 16), False)
    ]  # fmt: skip


def test_a_tolerant_set_loses_what_cannot_be_read():
    with pytest.raises(DataError, match="i1 cannot be read"):
        task.evaluate(Quarters(), Grey([10, None], [0, 1]), 8, 4)
    images = Grey([None, 10, None, 200], [0, 0, 1, 2], tolerant=True)
    found = task.evaluate(Quarters(), images, 8, 2)
    assert (images.skipped, found.names, found.metrics) == (2, ["i1", "i3"], {"top1": 0.5})


def test_an_empty_set_is_an_error():
    tensors = load_tensors(Grey(LEVELS, LABELS), 8)
    empty = type(tensors)(tensors.images[:0], tensors.targets[:0], tensors.sizes[:0])
    for call in (
        lambda: task.quick(Quarters(), empty, 4),
        lambda: task.evaluate(Quarters(), Grey([], []), 8, 4),
        lambda: task.evaluate(Quarters(), Grey([None], [0], tolerant=True), 8, 4),
        lambda: task.reference(Grey([], [])),
    ):
        with pytest.raises(DataError, match="no image to evaluate"):
            call()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.zeros(1, 4), None),
        (torch.zeros(1, 10), "4 classes, and the model gives 10 outputs; .*classes=4"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 4\) for one image, and the model gives \(1, 1, 8, 8\)"),
        ((torch.zeros(1, 4),), "the model gives tuple"),
    ],
)
def test_an_output_that_does_not_fit_is_said(output, said):
    fault = task.fault(output, 8, Grey(LEVELS, LABELS))
    if said is None:
        assert fault is None
    else:
        assert re.search(said, fault) and "\n" not in fault


def test_a_small_network_learns_the_digits():
    torch.manual_seed(0)
    tensors = load_tensors(digits("val"), 8)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    assert task.quick(model, tensors, 64)["top1"] < 0.3
    for _ in range(15):
        loss = task.loss(model(normalize(tensors.images)), tensors.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.quick(model, tensors, 64)["top1"] > 0.9
