import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.data.datasets import MaskDataset, load_tensors, normalize
from prunekit.data.mask_folder import folder
from prunekit.data.salient_shapes import salient_shapes
from prunekit.errors import DataError
from prunekit.tasks.saliency import Saliency
from prunekit.tasks.saliency_metrics import SaliencyMetrics

REAL = Path(__file__).parents[2] / "../shared/data"
task = Saliency()


class Pairs(MaskDataset):
    """Pairs of arrays; None is an unreadable pair."""

    def __init__(self, pairs, skip_errors=False):
        super().__init__([str(i) for i in range(len(pairs))])
        self.stored, self.skip_errors = dict(zip(self.names, pairs, strict=True)), skip_errors

    def image(self, index):
        return self.pair(index)[0]

    def mask(self, index):
        return self.pair(index)[1]

    def pair(self, index):
        if self.stored[self.names[index]] is None:
            raise DataError(f"{self.names[index]} cannot be read")
        return self.stored[self.names[index]]


class Red(nn.Module):
    """Returns the logits of the denormalized red channel."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen = []

    def forward(self, x):
        self.seen.append((tuple(x.shape), self.training, torch.is_grad_enabled()))
        return torch.logit((x[:, :1] * 0.229 + 0.485).clamp(1e-6, 1 - 1e-6))


class Recording(Saliency):
    """Keeps the maps of an evaluation."""

    def __init__(self):
        self.maps = []

    def postprocess(self, scores, size):
        self.maps.append(super().postprocess(scores, size))
        return self.maps[-1]


def red(levels):
    """An image with this red channel."""
    return np.stack([levels, np.full_like(levels, 90), np.full_like(levels, 30)], -1)


def test_loss_is_mean_binary_cross_entropy():
    logits = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    masks = torch.tensor([1, 0], dtype=torch.uint8).view(1, 1, 1, 2)
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert task.loss(logits, masks).item() == pytest.approx(expected, rel=1e-6)
    assert task.loss(logits.bfloat16(), masks).dtype == torch.float32


def test_predict_follows_the_published_protocol():
    levels = np.random.default_rng(0).integers(0, 256, (5, 9), dtype=np.uint8)

    def to(row_count, column_count, values):
        """Half-pixel bilinear by hand, one axis after the other."""
        for axis, count in ((0, row_count), (1, column_count)):
            side = values.shape[axis]
            at = np.clip((np.arange(count) + 0.5) * side / count - 0.5, 0, side - 1)
            values = np.apply_along_axis(lambda line: np.interp(at, np.arange(side), line), axis, values)  # noqa: B023
        return values

    expected = to(5, 9, to(8, 8, levels / 255.0)) * 255
    saliency = task.predict(Red(), red(levels), 8)
    assert saliency.dtype == np.uint8 and saliency.shape == (5, 9)
    clear = np.abs(expected - np.rint(expected)) > 0.01
    assert np.array_equal(saliency[clear], np.floor(expected)[clear].astype(np.uint8)), "truncated, not rounded"


def test_predict_uses_evaluation_mode_without_gradients():
    model = Red().train()
    model.norm.eval()
    task.predict(model, red(np.zeros((4, 4), np.uint8)), 8)
    assert model.seen == [((1, 3, 8, 8), False, False)]
    assert model.training and not model.norm.training
    with pytest.raises(RuntimeError):
        task.predict(nn.Sequential(nn.Conv2d(1, 1, 1)), red(np.zeros((4, 4), np.uint8)), 8)
    assert torch.is_grad_enabled()


def square(side=16):
    mask = np.zeros((side, side), np.uint8)
    mask[4:10, 5:12] = 255
    return mask


def test_perfect_map_has_perfect_metrics():
    found = task.evaluate(Red(), Pairs([(red(square()), square())] * 3), 16, 2)
    assert set(found.metrics) == set(Saliency.metric_names)
    assert found.metrics["max_f"] == pytest.approx(1) and found.metrics["mae"] == pytest.approx(0, abs=1e-6)
    assert found.metrics["s_measure"] == pytest.approx(1, abs=0.02) and found.metrics["max_e"] > 0.99


def test_max_f_is_computed_from_mean_curves():
    """Computed by hand for two images of four pixels; PySODMetrics stretches each map to 0 … 255."""
    metrics = SaliencyMetrics()
    metrics.update(np.array([[255, 200], [100, 0]], np.uint8), np.array([[255, 0], [0, 0]], np.uint8))
    metrics.update(np.array([[255, 200], [100, 0]], np.uint8), np.array([[0, 255], [255, 0]], np.uint8))
    # Precision and recall of the two images when the maps are cut at 255, 200, 100 and 0.
    precision = (np.array([1, 1 / 2, 1 / 3, 1 / 4]) + np.array([0, 1 / 2, 2 / 3, 1 / 2])) / 2
    recall = (np.array([1, 1, 1, 1]) + np.array([0, 1 / 2, 1, 1])) / 2
    f = 1.3 * precision * recall / (0.3 * precision + recall)
    curves = metrics.curves()
    for level, at in ((255, 0), (200, 1), (100, 2), (0, 3)):
        assert curves["precision"][255 - level] == pytest.approx(precision[at])
        assert curves["recall"][255 - level] == pytest.approx(recall[at])
        assert curves["f"][255 - level] == pytest.approx(f[at])
    assert metrics.compute()["max_f"] == pytest.approx(f.max())
    # |map - mask|: 0, 200, 100, 0 in the first image; 255, 55, 155, 0 in the second.
    assert metrics.errors == pytest.approx([300 / 255 / 4, 465 / 255 / 4])
    assert metrics.compute()["mae"] == pytest.approx((300 + 465) / 255 / 8)


def test_curves_have_256_points_and_recall_increases():
    found = task.evaluate(Red(), salient_shapes("val", size=32, val=4), 32, 3)
    assert {key: len(values) for key, values in found.curves.items()} == {"precision": 256, "recall": 256, "f": 256}
    assert np.all(np.diff(found.curves["recall"]) >= 0) and found.curves["recall"][-1] == 1
    assert found.metrics["max_f"] == max(found.curves["f"]) and len(found.errors) == 4
    assert np.mean(found.errors) == pytest.approx(found.metrics["mae"])


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9))
def test_metrics_do_not_depend_on_batch_size(first, second):
    pairs = salient_shapes("val", size=24, val=5)
    one, other = (task.evaluate(Red(), pairs, 16, size) for size in (first, second))
    assert one.metrics == pytest.approx(other.metrics, abs=1e-4)


def test_maps_of_one_batch_have_the_sizes_of_their_images():
    pairs = Pairs([(red(square(16)), square(16)), (red(square(24)[:20]), square(24)[:20])])
    calls = []
    model = Red()
    task = Recording()
    found = task.evaluate(model, pairs, 16, 8, progress=lambda *done: calls.append(done))
    assert model.seen[0][0] == (2, 3, 16, 16) and calls == [(2, 2)]
    assert [one.shape for one in task.maps] == [(16, 16), (20, 24)] and found.names == ["0", "1"]
    assert np.array_equal(task.maps[1], task.predict(Red(), pairs.image(1), 16))


def test_own_size_runs_images_singly_at_multiples_of_16():
    pairs = Pairs([(red(square(16)), square(16)), (red(square(24)[:20]), square(24)[:20])])
    model = Red()
    task = Recording()
    task.evaluate(model, pairs, None, 8)
    assert [shape for shape, *_ in model.seen] == [(1, 3, 16, 16), (1, 3, 32, 32)]
    assert np.array_equal(task.maps[0] > 200, square(16) > 0)
    assert np.array_equal(task.maps[1], task.predict(Red(), pairs.image(1), None))


def test_large_batches_are_split_on_a_cpu():
    model = Red()
    task.evaluate(model, Pairs([(red(square()), square())] * 6), 224, 6)
    assert [shape[0] for shape, *_ in model.seen] == [4, 2]
    model = Red()
    task.evaluate(model, Pairs([(red(square()), square())] * 6), 64, 6)
    assert [shape[0] for shape, *_ in model.seen] == [6]


def test_model_that_refuses_channels_last_is_evaluated():
    class Views(Red):
        def forward(self, x):
            return super().forward(x.view(-1).view_as(x))

    model = Views()
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert np.array_equal(task.predict(model, red(square()), 16), task.predict(Red(), red(square()), 16))


def test_validate_equals_evaluate_at_the_same_size():
    pairs = salient_shapes("val", size=32, val=6)
    quick = task.validate(Red(), load_tensors(pairs, 32), 4)
    full = task.evaluate(Red(), pairs, 32, 4).metrics
    assert quick == pytest.approx({key: full[key] for key in ("mae", "max_f")}, abs=1e-6)


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("fill", [0, 255])
def test_empty_and_full_masks_give_finite_metrics(level, fill):
    for levels in (np.full((8, 8), level, np.uint8), np.arange(64, dtype=np.uint8).reshape(8, 8)):
        metrics = SaliencyMetrics()
        metrics.update(levels, np.full((8, 8), fill, np.uint8))
        assert all(math.isfinite(value) for value in metrics.compute().values())


def test_empty_data_set_raises():
    with pytest.raises(DataError, match="no image to evaluate"):
        task.evaluate(Red(), Pairs([]), 16, 4)
    with pytest.raises(DataError, match="no image to evaluate"):
        task.evaluate(Red(), Pairs([None, None], skip_errors=True), 16, 4)
    tensors = load_tensors(salient_shapes("val", size=16, val=1), 16)
    with pytest.raises(DataError, match="no image to evaluate"):
        task.validate(Red(), type(tensors)(tensors.images[:0], tensors.targets[:0], tensors.sizes[:0]), 4)


def test_unreadable_pair_raises_or_is_dropped():
    good = (red(square()), square())
    with pytest.raises(DataError, match="1 cannot be read"):
        task.evaluate(Red(), Pairs([good, None, good]), 16, 2)
    pairs = Pairs([None, good, None, None, good], skip_errors=True)
    found = task.evaluate(Red(), pairs, 16, 2)
    assert (pairs.skipped, found.names, len(found.errors)) == (3, ["1", "4"], 2)


def test_a_small_network_learns():
    """The loss falls, and so does the MAE."""
    torch.manual_seed(0)
    tensors = load_tensors(salient_shapes("train", size=32, train=8), 32)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 5, padding=2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    before = task.validate(model, tensors, 8)["mae"]
    for _ in range(30):
        loss = task.loss(model(normalize(tensors.images)), tensors.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 and task.validate(model, tensors, 8)["mae"] < before


@pytest.mark.skipif(not (REAL / "DUTS-TR-mini").is_dir(), reason="the shared data (not in the repository) is not here")
def test_maps_of_photographs_have_their_sizes():
    pairs = folder("val", root="unused", val_root=str(REAL / "DUTS-TR-mini"))
    pairs.names = pairs.names[:6]
    task = Recording()
    found = task.evaluate(Red(), pairs, 64, 4)
    assert all(task.maps[i].shape == pairs.mask(i).shape for i in range(6))
    assert 0 < found.metrics["max_f"] < 1 and found.metrics["mae"] < 1


@pytest.mark.parametrize("kind", ["full", "empty", "full or empty", None])
def test_masks_that_are_all_full_or_empty_are_reported(kind):
    full, empty = np.full((8, 8), 255, np.uint8), np.zeros((8, 8), np.uint8)
    half = np.repeat([empty[0], full[0]], 4, 0)
    masks = {"full": [full, full], "empty": [empty], "full or empty": [full, empty], None: [full, half]}[kind]
    pairs = Pairs([(np.zeros((8, 8, 3), np.uint8), mask) for mask in masks])
    expected = kind and f"all {len(masks)} masks are {kind}; check that they are 255 for object and 0 for background"
    assert pairs.target_warning(load_tensors(pairs, 8).targets) == expected
    assert task.evaluate(Red(), pairs, 8, 2).warning == expected


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 7)])
@pytest.mark.parametrize("kind", ["full", "empty", "half"])
def test_no_metric_exceeds_one(shape, kind):
    mask = np.zeros(shape, np.uint8)
    mask.flat[: {"full": mask.size, "empty": 0, "half": mask.size // 2}[kind]] = 255
    metrics = SaliencyMetrics()
    metrics.update(mask, mask)
    assert all(0 <= value <= 1 for value in metrics.compute().values())


@pytest.mark.parametrize("edge", [(slice(-1, None), slice(2, 5)), (slice(1, 3), slice(-1, None))])
def test_the_s_measure_of_an_object_at_the_edge_is_finite(edge):
    mask = np.zeros((6, 8), np.uint8)
    mask[edge] = 255
    metrics = SaliencyMetrics()
    metrics.update(mask, mask)
    assert 0.9 < metrics.compute()["s_measure"] <= 1
