import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from prunekit.config.recipe import load
from prunekit.errors import RecipeError
from prunekit.tasks.classification import Classification
from prunekit.tasks.losses import bce_iou, structure, task_loss, total_loss
from prunekit.tasks.saliency import Saliency

MAKERS = {"bce_iou": bce_iou, "structure": structure}


def batch(seed=0, size=16, count=3):
    generator = torch.Generator().manual_seed(seed)
    masks = (F.interpolate(torch.rand(count, 1, 4, 4, generator=generator), size) > 0.5).float()
    return torch.randn(count, 1, size, size, generator=generator), masks


def test_the_tasks_own():
    task, (logits, masks) = Saliency(), batch()
    assert task_loss(task)(logits, masks) == task.loss(logits, masks)


def test_bce_and_iou_by_hand():
    # One pixel of four is in the mask; all are found with one half.
    masks = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 2, 2)
    both, either = 0.5, 4 * 0.5 + 1 - 0.5
    wanted = math.log(2) + 2 * (1 - (both + 1) / (either + 1))
    assert float(bce_iou(Saliency(), iou=2.0)(torch.zeros(1, 1, 2, 2), masks)) == pytest.approx(wanted)


def test_structure_as_published():
    """At the size that its window is meant for; each image by itself, as the paper has it."""
    logits, masks = batch(size=64)
    weight = 1 + 5 * (F.avg_pool2d(masks, 31, 1, 15) - masks).abs()
    crossed = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    crossed = (weight * crossed).sum((2, 3)) / weight.sum((2, 3))
    found = torch.sigmoid(logits)
    both, either = (found * masks * weight).sum((2, 3)), ((found + masks) * weight).sum((2, 3))
    wanted = (crossed + 1 - (both + 1) / (either - both + 1)).mean()
    torch.testing.assert_close(structure(Saliency(), size=64)(logits, masks), wanted)


def test_structure_looks_at_outlines():
    """What is wrong at an outline counts more than what is wrong inside."""
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 16:] = 1
    right = 8 * (2 * masks - 1)
    loss = structure(Saliency(), size=32, window=9)
    losses = []
    for column in (17, 28):
        wrong = right.clone()
        wrong[..., column] *= -1
        losses.append(float(loss(wrong, masks)))
    assert losses[0] > 1.3 * losses[1]


@pytest.mark.parametrize(("size", "side"), [(352, 31), (224, 19), (64, 5), (8, 3)])
def test_the_window_shrinks_with_the_image(monkeypatch, size, side):
    sides = []
    pool = F.avg_pool2d
    monkeypatch.setattr(F, "avg_pool2d", lambda x, kernel, *rest: sides.append(kernel) or pool(x, kernel, *rest))
    structure(Saliency())(torch.zeros(1, 1, size, size), torch.zeros(1, 1, size, size))
    assert sides == [side]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=25)
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]), fill=st.sampled_from([None, 0.0, 1.0]))
def test_loss_is_finite_nonnegative_and_smallest_at_the_masks(name, seed, scale, fill):
    logits, masks = batch(seed)
    masks = masks if fill is None else torch.full_like(masks, fill)
    loss = MAKERS[name](Saliency())
    logits = (scale * logits).requires_grad_()
    found = loss(logits, masks)
    found.backward()
    assert found.ndim == 0 and math.isfinite(found.detach()) and found >= 0 and torch.isfinite(logits.grad).all()
    assert loss(40 * (2 * masks - 1), masks) < 1e-4 and loss(40 * (1 - 2 * masks), masks) > 1


@pytest.mark.parametrize("name", MAKERS)
def test_task_without_masks_raises(name):
    with pytest.raises(RecipeError, match=f"the loss {name} compares maps with masks, .* class labels; .*task"):
        MAKERS[name](Classification())


@pytest.mark.parametrize(
    "options", [{"window": 4}, {"window": 0}, {"gain": -1.0}, {"size": 0}], ids=lambda o: next(iter(o))
)
def test_options_out_of_range_raise(options):
    with pytest.raises(ValueError, match=r"structure: window=.* must be odd"):
        structure(Saliency(), **options)
    with pytest.raises(ValueError, match=r"iou=-1\.0 must be at least 0"):
        bce_iou(Saliency(), iou=-1.0)


def test_recipe_sets_loss_and_options():
    recipe = load("csnet", ["train.loss=structure", "finetune.loss={name: bce_iou, options: {iou: 0.5}}"])
    assert recipe.train.loss.options == {"window": 31, "gain": 5.0, "size": 352}
    assert recipe.finetune.loss.options == {"iou": 0.5}
    with pytest.raises(RecipeError, match="unknown loss 'structur', did you mean 'structure'"):
        load("csnet", ["train.loss=structur"])


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_loss_of_side_outputs_is_a_weighted_sum(kind):
    (main, masks), side = batch(), batch(1, size=8)[0]
    loss = Saliency().loss
    resized = F.interpolate(side, (16, 16), mode="bilinear", align_corners=False)
    assert total_loss(loss)(main, masks) == loss(main, masks)
    assert total_loss(loss)(kind([main, side]), masks) == loss(main, masks) + loss(resized, masks)
    weighted = total_loss(loss, [1.0, 0.5])(kind([main, side]), masks)
    assert weighted == pytest.approx(loss(main, masks) + 0.5 * loss(resized, masks))
    with pytest.raises(RecipeError, match="output_weights has 1 weight, and the model returns 2 outputs in training"):
        total_loss(loss, [1.0])(kind([main, side]), masks)
