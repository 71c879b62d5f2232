import math

import pytest
import torch
from torch import nn

from prunekit.config import registry
from prunekit.errors import RecipeError
from prunekit.tasks.base import Task
from prunekit.tasks.classification import Classification
from prunekit.tasks.saliency import Saliency
from prunekit.training.distillation import TrainingLoss

SHAPES = {Saliency: (2, 1, 4, 4), Classification: (5, 7)}


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_loss_is_smallest_at_the_teacher(kind, temperature):
    torch.manual_seed(0)
    teacher_logits = torch.randn(SHAPES[kind])
    logits = teacher_logits.clone().requires_grad_()
    loss = kind().distillation_loss(logits, teacher_logits, temperature)
    loss.backward()
    assert logits.grad.abs().max() < 1e-6
    assert kind().distillation_loss(teacher_logits + torch.randn(SHAPES[kind]), teacher_logits, temperature) > loss


def test_a_confident_teacher_gives_the_plain_loss():
    logits, masks = torch.randn(2, 1, 4, 4), (torch.rand(2, 1, 4, 4) > 0.5).float()
    torch.testing.assert_close(
        Saliency().distillation_loss(logits, 200 * masks - 100, 1.0), Saliency().loss(logits, masks)
    )
    scores, labels = torch.randn(5, 7), torch.arange(5)
    sure = 200 * nn.functional.one_hot(labels, 7).float()
    torch.testing.assert_close(
        Classification().distillation_loss(scores, sure, 1.0), Classification().loss(scores, labels)
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_gradient_size_does_not_depend_on_temperature(kind):
    """The factor temperature² of Hinton et al., section 2.1."""
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(SHAPES[kind]), torch.randn(SHAPES[kind])
    sizes = []
    for temperature in (20.0, 80.0):
        leaf = logits.clone().requires_grad_()
        kind().distillation_loss(leaf, teacher_logits, temperature).backward()
        sizes.append(float(leaf.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_weights_of_loss_and_distillation():
    task, images = Saliency(), torch.randn(2, 1, 4, 4)
    masks = (images > 0).float()
    alone = TrainingLoss(task.loss)
    assert alone.teacher_logits(images) is None and alone(images, masks, None) == task.loss(images, masks)
    both = TrainingLoss(task.loss, task, Twice(), weight=0.25, temperature=2.0)
    teacher_logits = both.teacher_logits(images.requires_grad_())
    assert torch.equal(teacher_logits, 2 * images) and not teacher_logits.requires_grad
    wanted = 0.75 * task.loss(images, masks) + 0.25 * task.distillation_loss(images, teacher_logits, 2.0)
    torch.testing.assert_close(both(images, masks, teacher_logits), wanted)


def test_task_without_distillation_loss_raises():
    plain = type("Plain", (Saliency,), {"distillation_loss": Task.distillation_loss})
    with pytest.raises(RecipeError, match=r"defines no distillation loss; set finetune.distill.weight=0"):
        plain().distillation_loss(torch.zeros(1), torch.zeros(1), 1.0)
    assert math.isfinite(registry.tasks.get("saliency")().distillation_loss(torch.zeros(1), torch.zeros(1), 1.0))
