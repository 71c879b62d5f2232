"""Steps in which a number is not finite, and steps of several batches."""

import copy
import math

import pytest
import torch
from helpers import rank
from torch import nn

from prunekit.config.schema import SparseTraining
from prunekit.errors import TrainingError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.decay import Decay, DynamicWeightDecay, NoDecay
from prunekit.runs.run_dir import RunDir
from prunekit.training import step as updating
from prunekit.training.distillation import TrainingLoss
from prunekit.training.gate_history import GateHistory
from prunekit.training.step import MOST, TrainingStep

SIZE = 16


class Mean:
    """A task whose loss is far from all targets, times a factor that a test may spoil."""

    factor = 1.0

    def loss(self, output, targets):
        return self.factor * (output - targets).square().mean()


class Job:
    stage, device = "train", torch.device("cpu")

    def __init__(self, **changes):
        self.section = SparseTraining.model_validate({"epochs": 1, **changes})
        self.task, self.said = Mean(), []
        self.criterion = TrainingLoss(self.task.loss)
        self.reporter = self

    def info(self, text):
        self.said.append(text)


class Penalty(Decay):
    value = 0.0

    def penalty(self):
        return torch.tensor(self.value)


def batch(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        torch.rand(count, 1, SIZE, SIZE, generator=generator),
    )


def made(optimizer=torch.optim.Adam, accumulate=1, model=rank.Small, **changes):
    torch.manual_seed(0)
    model = model().train()
    how = {"fused": True} if optimizer is not torch.optim.RMSprop else {}
    return model, TrainingStep(model, optimizer(model.parameters(), lr=1e-2, **how), Job(**changes), accumulate)


def state(model, update):
    """All that a step changes, copied."""
    held = [value.clone() for value in model.state_dict().values()]
    for kept in update.optimizer.state_dict()["state"].values():
        held += [value.clone() for value in kept.values() if isinstance(value, torch.Tensor)]
    return held


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def spoil(what, model, update, decay, batches):
    """Let this not be finite in the next step."""
    if what == "loss":
        update.job.task.factor = math.nan
    elif what == "penalty":
        decay.value = math.inf
    elif what == "gradient":
        model.conv2.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), -math.inf))
    elif what == "large gradient":
        model.conv2.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e25))
    elif what == "statistic":
        model.bn1.register_forward_hook(lambda norm, *_: [norm.running_var.data.fill_(math.inf), None][1])
    elif what == "gate":
        with torch.no_grad():
            model.bn2.weight[3] = math.nan


FAULTS = {
    "loss": "the loss is nan",
    "penalty": "the penalty is inf",
    "gradient": r"the gradient of conv2\.weight is -inf",
    "large gradient": r"the gradient of conv2\.weight is 1\.0e\+25, whose square no number holds,",
    "statistic": r"the statistic bn1\.running_var is inf",
    "gate": r"the gate bn2\.weight is nan",
}


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "on the device"])
@pytest.mark.parametrize("what", FAULTS)
def test_a_step_that_is_not_finite_changes_nothing_and_says_what_was_wrong(what, waits):
    model, update = made()
    update.waits, decay, sums = waits, Penalty(), torch.zeros(3, dtype=torch.float64)
    for seed in range(3):
        update(model, decay, [batch(seed)], sums)
    update.look(0, 2)
    spoil(what, model, update, decay, batch)
    before, counted = state(model, update), sums.clone()
    update(model, decay, [batch(3)], sums)
    assert update.troubled == waits
    assert torch.equal(sums, counted) and sums[2] == 3
    assert all(a.equal(b) or (a.isnan() & b.isnan()).any() for a, b in zip(state(model, update), before, strict=True))
    with pytest.raises(
        TrainingError, match=f"^{FAULTS[what]} at epoch 5, step 4; try a lower train.lr or decay.weight"
    ):
        update.look(4, 3)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_what_is_skipped_might_never_have_been(optimizer):
    """The first step of all, and one in between; on the device as in waiting for it."""
    ends = []
    for waits, bad in ((True, ()), (True, (0, 2)), (None, (0, 2))):
        model, update = made(optimizer, on_nonfinite="skip")
        adam = isinstance(update.optimizer, torch.optim.Adam)
        update.waits = waits or not adam
        sums = torch.zeros(3, dtype=torch.float64)
        good = iter(range(9))
        for step in range(3 + len(bad)):
            update.job.task.factor = math.inf if step in bad else 1.0
            number = 100 if step in bad else next(good)
            torch.manual_seed(number)  # of dropout
            update(model, Penalty(), [batch(number)], sums)
        update.look(0, step)
        assert sums[2] == 3 and sums.isfinite().all()
        assert update.job.said == ([] if not bad else ["train: 2 steps skipped: the loss is inf at epoch 1, step 1"])
        ends.append((state(model, update), sums))
    for end in ends[1:]:
        assert equal(end[0], ends[0][0]) and torch.equal(end[1], ends[0][1])


def test_too_many_in_a_row_stop_what_skips():
    model, update = made(on_nonfinite="skip")
    update.job.task.factor = math.nan
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(MOST - 1):
        update(model, Penalty(), [batch(step)], sums)
        update.look(0, step)
    update(model, Penalty(), [batch(MOST)], sums)
    with pytest.raises(TrainingError, match=f"the loss is nan at epoch 1, step {MOST}, and {MOST} steps in a row were"):
        update.look(0, MOST - 1)


class Plain(nn.Module):
    """Nothing that sees a batch as a whole."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def test_batches_that_are_accumulated_are_one_large_one_where_nothing_sees_them_as_such():
    images, targets = batch(0, 12)
    whole, one = made(torch.optim.SGD, model=Plain)
    parts, three = made(torch.optim.SGD, 3, model=Plain)
    sums = torch.zeros(3, dtype=torch.float64)
    loss, _ = one(whole, NoDecay(whole, []), [(images, targets)], sums)
    mean, _ = three(parts, NoDecay(parts, []), zip(images.split(4), targets.split(4), strict=True), sums)
    assert float(mean) == pytest.approx(float(loss), rel=1e-6)
    assert (parts.conv.weight - whole.conv.weight).abs().max() <= 1e-7
    assert (parts.conv.weight - Plain().conv.weight).abs().max() > 1e-4


def test_norms_and_penalty_see_accumulated_batches_as_side_by_side():
    model, update = made(accumulate=2)
    groups = find_groups(model, torch.zeros(1, 3, SIZE, SIZE))
    first = copy.deepcopy(model)
    sums = torch.zeros(3, dtype=torch.float64)
    with DynamicWeightDecay(model, groups, 0.1) as decay:
        update(model, decay, [batch(0), batch(1)], sums)
    moved = []
    for seed in range(2):
        one = copy.deepcopy(first)
        penalty = DynamicWeightDecay(one, groups, 0.1)
        with penalty, torch.no_grad():
            one(updating.normalize(batch(seed)[0]))
            moved.append((one.bn1.running_mean, one.bn2.running_var, penalty.penalty()))
    mean, variance, penalty = (sum(pair) / 2 for pair in zip(*moved, strict=True))
    assert (model.bn1.running_mean - mean).abs().max() <= 1e-6
    assert (model.bn2.running_var - variance).abs().max() <= 1e-6
    assert float(sums[1]) == pytest.approx(float(penalty), rel=1e-2)  # dropout is behind what is decayed
    assert model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_training_meets_a_loss_that_is_not_finite(tmp_path, monkeypatch, how):
    loss, calls = rank.registry.tasks.get("saliency").loss, []

    def spoiled(task, logits, targets):
        calls.append(1)
        return loss(task, logits, targets) * (math.nan if len(calls) in (8, 9) else 1)

    monkeypatch.setattr(rank.registry.tasks.get("saliency"), "loss", spoiled)
    with RunDir.start(tmp_path / "run", "name: test\n", {}) as run:
        if how == "stop":
            match = "the loss is nan at epoch 2, step 2; .*train.on_nonfinite=skip with --resume goes on"
            with pytest.raises(TrainingError, match=match):
                rank.train(run, epochs=3)
            assert all(torch.isfinite(torch.from_numpy(a)).all() for a in run.load_checkpoint("train")[0].values())
            assert len(run.read_metrics()) == 1
        model, said = rank.train(run, epochs=3, on_nonfinite="skip")
        lines = run.read_metrics()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    skipped = [line.get("skipped") for line in lines]
    assert skipped == ([None, 2, None] if how == "skip" else [None, 1, None])
    assert [line["step"] for line in lines] == [6, 12, 18] and all(math.isfinite(line["loss"]) for line in lines)
    assert said[0].startswith("train: 1 step skipped: the loss is nan at epoch 2, step ")
    assert RunDir.open(tmp_path / "run").read_json("summary.json")["skipped_steps"] == {
        "train": sum(filter(None, skipped))
    }


def test_layers_without_a_living_channel_are_named_once_while_training(tmp_path):
    with RunDir.start(tmp_path / "run", "name: test\n", {}) as run:
        _, said = rank.train(run, epochs=2, threshold=10.0)
    assert len(said) == 1
    assert said[0].startswith("train: no channel of conv1 and conv2 is above the threshold 10 any more, the best has ")
    assert said[0].endswith("train with a lower decay.weight, or leave its norms out in decay.options.exclude")


def test_a_layer_is_named_when_it_has_lost_its_last_channel():
    model = rank.Small()
    course = GateHistory(model, find_groups(model, torch.zeros(1, 3, SIZE, SIZE)), 1e-3)
    with torch.no_grad():
        model.bn2.weight[1:] = 0
    assert course.warning() is None
    with torch.no_grad():
        model.bn2.weight[0] = 5e-4
    assert "no channel of conv2 is above" in course.warning() and course.warning() is None
