import copy
import math

import pytest
import torch
from helpers import rank
from torch import nn

from prunekit.config.schema import Training
from prunekit.data.datasets import normalize
from prunekit.errors import TrainingError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import Decay, DynamicWeightDecay, NoDecay
from prunekit.runs.run_dir import RunDir
from prunekit.training.checkpoint import TrainingPosition
from prunekit.training.distillation import TrainingLoss
from prunekit.training.gate_history import GateHistory
from prunekit.training.step import MAX_CONSECUTIVE_SKIPS, TrainingStep

SIZE = 16


class MeanSquaredError:
    """A task whose loss has a factor that a test may set to NaN."""

    factor = 1.0

    def loss(self, output, targets):
        return self.factor * (output - targets).square().mean()


class Job:
    stage, device = "train", torch.device("cpu")

    def __init__(self, **changes):
        self.config = Training.model_validate({"epochs": 1, **changes})
        self.task, self.messages = MeanSquaredError(), []
        self.loss = TrainingLoss(self.task.loss)
        self.reporter = self

    def info(self, text):
        self.messages.append(text)


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


def make_step(optimizer=torch.optim.Adam, accumulate=1, model=rank.Small, **changes):
    torch.manual_seed(0)
    model = model().train()
    how = {"fused": True} if optimizer is not torch.optim.RMSprop else {}
    return model, TrainingStep(model, optimizer(model.parameters(), lr=1e-2, **how), Job(**changes), accumulate)


def state(model, step):
    """Copies of everything that a step changes."""
    held = [value.clone() for value in model.state_dict().values()]
    for kept in step.optimizer.state_dict()["state"].values():
        held += [value.clone() for value in kept.values() if isinstance(value, torch.Tensor)]
    return held


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def spoil(what, model, step, decay):
    """Make this not finite in the next step."""
    if what == "loss":
        step.job.task.factor = math.nan
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
    "large gradient": r"the gradient of conv2\.weight is 1\.0e\+25, whose square overflows,",
    "statistic": r"the statistic bn1\.running_var is inf",
    "gate": r"the gate bn2\.weight is nan",
}


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("what", FAULTS)
def test_nonfinite_step_changes_nothing_and_names_the_cause(what, synchronous):
    model, step = make_step()
    step.synchronous, decay, position = synchronous, Penalty(), TrainingPosition()
    for seed in range(3):
        position.advance(step(model, decay, [batch(seed)]))
    step.check(0, 2)
    spoil(what, model, step, decay)
    before, sums = state(model, step), position.sums.clone()
    result = step(model, decay, [batch(3)])
    position.advance(result)
    assert step.failed == synchronous and not result.finite
    assert torch.equal(position.sums, sums) and sums[2] == 3
    assert all(a.equal(b) or (a.isnan() & b.isnan()).any() for a, b in zip(state(model, step), before, strict=True))
    with pytest.raises(
        TrainingError, match=f"^{FAULTS[what]} at epoch 5, step 4; try a lower train.lr or decay.weight"
    ):
        step.check(4, 3)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_skipped_steps_leave_no_trace(optimizer):
    """The very first step and a later one are skipped, synchronously and on the device."""
    ends = []
    for synchronous, bad in ((True, ()), (True, (0, 2)), (None, (0, 2))):
        model, step = make_step(optimizer, on_nonfinite="skip")
        step.synchronous = synchronous or not isinstance(step.optimizer, torch.optim.Adam)
        position, good_seeds = TrainingPosition(), iter(range(9))
        for number in range(3 + len(bad)):
            step.job.task.factor = math.inf if number in bad else 1.0
            seed = 100 if number in bad else next(good_seeds)
            torch.manual_seed(seed)  # for dropout
            position.advance(step(model, Penalty(), [batch(seed)]))
        step.check(0, number)
        assert position.sums[2] == 3 and position.sums.isfinite().all()
        assert step.job.messages == ([] if not bad else ["train: 2 steps skipped: the loss is inf at epoch 1, step 1"])
        ends.append((state(model, step), position.sums))
    for end in ends[1:]:
        assert equal(end[0], ends[0][0]) and torch.equal(end[1], ends[0][1])


def test_too_many_consecutive_skips_stop_the_training():
    model, step = make_step(on_nonfinite="skip")
    step.job.task.factor = math.nan
    last = MAX_CONSECUTIVE_SKIPS - 1
    for number in range(last):
        step(model, Penalty(), [batch(number)])
        step.check(0, number)
    step(model, Penalty(), [batch(last)])
    message = f"the loss is nan at epoch 1, step {last + 1}, and {last + 1} steps in a row were"
    with pytest.raises(TrainingError, match=message):
        step.check(0, last)


class Plain(nn.Module):
    """No layer depends on the whole batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def test_accumulated_batches_equal_one_large_batch():
    images, targets = batch(0, 12)
    whole, one = make_step(torch.optim.SGD, model=Plain)
    parts, three = make_step(torch.optim.SGD, 3, model=Plain)
    result = one(whole, NoDecay(whole, []), [(images, targets)])
    accumulated = three(parts, NoDecay(parts, []), zip(images.split(4), targets.split(4), strict=True))
    assert float(accumulated.loss) == pytest.approx(float(result.loss), rel=1e-6)
    assert (parts.conv.weight - whole.conv.weight).abs().max() <= 1e-7
    assert (parts.conv.weight - Plain().conv.weight).abs().max() > 1e-4


def test_norm_statistics_and_penalty_are_means_over_accumulated_batches():
    model, step = make_step(accumulate=2)
    groups = find_groups(model, torch.zeros(1, 3, SIZE, SIZE))
    first = copy.deepcopy(model)
    with DynamicWeightDecay(model, groups, 0.1) as decay:
        result = step(model, decay, [batch(0), batch(1)])
    single = []
    for seed in range(2):
        one = copy.deepcopy(first)
        penalty = DynamicWeightDecay(one, groups, 0.1)
        with penalty, torch.no_grad():
            one(normalize(batch(seed)[0]))
            single.append((one.bn1.running_mean, one.bn2.running_var, penalty.penalty()))
    mean, variance, penalty = (sum(pair) / 2 for pair in zip(*single, strict=True))
    assert (model.bn1.running_mean - mean).abs().max() <= 1e-6
    assert (model.bn2.running_var - variance).abs().max() <= 1e-6
    assert float(result.penalty) == pytest.approx(float(penalty), rel=1e-2)  # dropout comes after the decayed norms
    assert model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_training_stops_at_or_skips_a_nonfinite_loss(tmp_path, monkeypatch, how):
    loss, calls = rank.registry.tasks.get("saliency").loss, []

    def spoiled_loss(task, logits, targets):
        calls.append(1)
        return loss(task, logits, targets) * (math.nan if len(calls) in (8, 9) else 1)

    monkeypatch.setattr(rank.registry.tasks.get("saliency"), "loss", spoiled_loss)
    with RunDir.start(tmp_path / "run", "name: test\n", {}) as run:
        if how == "stop":
            match = (
                "the loss is nan at epoch 2, step 2; .*to skip such steps, use --resume with train.on_nonfinite=skip"
            )
            with pytest.raises(TrainingError, match=match):
                rank.train(run, epochs=3)
            assert all(torch.isfinite(torch.from_numpy(a)).all() for a in run.load_checkpoint("train")[0].values())
            assert len(run.read_metrics()) == 1
        model, messages = rank.train(run, epochs=3, on_nonfinite="skip")
        lines = run.read_metrics()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    skipped = [line.get("skipped") for line in lines]
    assert skipped == ([None, 2, None] if how == "skip" else [None, 1, None])
    assert [line["step"] for line in lines] == [6, 12, 18] and all(math.isfinite(line["loss"]) for line in lines)
    assert messages[0].startswith("train: 1 step skipped: the loss is nan at epoch 2, step ")
    assert RunDir.open(tmp_path / "run").read_json("summary.json")["skipped_steps"] == {
        "train": sum(filter(None, skipped))
    }


def test_layers_without_living_channels_are_reported_once(tmp_path):
    with RunDir.start(tmp_path / "run", "name: test\n", {}) as run:
        _, messages = rank.train(run, epochs=2, threshold=10.0)
    (message,) = messages
    assert message.startswith("train: no channel of conv1 and conv2 is above the threshold 10 any more, the best has ")
    assert message.endswith("train with a lower decay.weight, or exclude its norms with decay.options.exclude")


def test_a_layer_is_reported_when_its_last_channel_dies():
    model = rank.Small()
    history = GateHistory(model, find_groups(model, torch.zeros(1, 3, SIZE, SIZE)), 1e-3)
    with torch.no_grad():
        model.bn2.weight[1:] = 0
    assert history.warning() is None
    with torch.no_grad():
        model.bn2.weight[0] = 5e-4
    assert "no channel of conv2 is above" in history.warning() and history.warning() is None
