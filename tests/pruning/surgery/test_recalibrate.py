import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.networks import Row, init_norms, zero_gates
from torch import nn

import prunekit
from prunekit.config import registry
from prunekit.config.recipe import load
from prunekit.data.datasets import load_tensors
from prunekit.errors import PlanError
from prunekit.pipeline import stages
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.equivalence import zero_dead_gates
from prunekit.pruning.surgery.recalibrate import recalibrate
from prunekit.pruning.surgery.slim import slim
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES


def batches(count=4, size=6, side=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, side, side, generator=generator) * (k + 1) for k in range(count)]


def test_statistics_are_averages_over_batches():
    torch.manual_seed(0)
    model = Row()
    init_norms(model)
    data = batches()
    assert prunekit.recalibrate(model, iter(data)) == 4
    with torch.no_grad():
        seen = [model.conv1(x) for x in data]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    variance = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in seen]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bn1.running_var, variance, rtol=1e-4, atol=1e-5)
    # With batches of equal size, the mean is that of all images.
    torch.testing.assert_close(mean, torch.cat(seen).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_earlier_norms_use_batch_statistics():
    torch.manual_seed(0)
    model = Row()
    init_norms(model)
    data = batches()
    recalibrate(model, data)
    other = copy.deepcopy(model).train()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x in data:
            other(x)
    torch.testing.assert_close(model.bn3.running_var, other.bn3.running_var)


def test_modes_momenta_gradients_and_weights_are_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.Dropout(0.9), nn.BatchNorm2d(8))
    model.train()
    model[1].eval()
    model[2].eval()
    before = copy.deepcopy(dict(model.named_parameters()))
    assert recalibrate(model, batches()) == 4
    assert [module.training for module in model] == [True, False, False, True] and model.training
    assert (model[1].momentum, model[3].momentum) == (0.3, 0.1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert model[1].num_batches_tracked == 4


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).train()
    data = batches(1)
    recalibrate(model, data)
    torch.testing.assert_close(model[1].running_mean, data[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_wrong_statistics_are_corrected():
    torch.manual_seed(0)
    model = Row()
    init_norms(model)
    data = batches(8, 16)
    recalibrate(model, data)
    wanted = model(data[3])
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.running_mean += 1
            norm.running_var *= 5
    assert (model(data[3]) - wanted).abs().max() > 0.1
    recalibrate(model, data)
    torch.testing.assert_close(model(data[3]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_slim_and_gated_dense_model_stay_equivalent(seed, padding):
    """Constants folded into running means and those of carriers are still exact after recalibration."""
    torch.manual_seed(seed)
    model = Row(padding)
    example = init_norms(model, seed, size=16, beta=1.0)
    groups = find_groups(model, example)
    dead = zero_gates(model, groups, 0.5, seed)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups, exact=True)
    assert equivalence.carriers == padding and (padding or equivalence.folded)
    pair = zero_dead_gates(model, groups, dead).double(), small.double()
    data = [3 * torch.randn(4, 3, 16, 16, dtype=torch.float64) + 1 for _ in range(2)]
    with torch.no_grad():
        before = pair[0].eval()(data[0])
        for one in pair:
            recalibrate(one, data)
        after = [one.eval()(data[0]) for one in pair]
    assert (after[0] - before).abs().max() > 0.01
    torch.testing.assert_close(after[0], after[1], rtol=1e-6, atol=1e-6)


def test_norm_that_is_not_called_keeps_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.add_module("aside", nn.BatchNorm2d(4))
    model.forward = lambda x: model[1](model[0](x))
    model.aside.running_mean.fill_(7)
    recalibrate(model, batches())
    assert (model.aside.running_mean == 7).all()


def test_statistics_are_restored_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4, momentum=0.3))
    model[2].running_mean.fill_(7)
    good = torch.randn(3, 3, 4, 4)
    for data, message in (
        ([], "got no batch"),
        ([good, torch.full_like(good, float("nan"))], "statistics of 2 are not finite"),
        ([good, good[:1]], "fails on batch 2 .*use larger batches"),
    ):
        with pytest.raises(PlanError, match=message):
            recalibrate(model, data)
        assert (model[2].running_mean == 7).all() and model[2].momentum == 0.3 and model.training


def test_model_without_norms_is_not_run():
    assert recalibrate(nn.Conv2d(3, 4, 1), [torch.randn(1, 3, 4, 4)]) == 0


class Toy:
    """A stand-in for the run context: eight images, the saliency task, and a record of the calls."""

    def __init__(self, recalibrate):
        self.recipe = load("csnet", ["finetune.batch_size=3", f"slim.recalibrate={recalibrate}"])
        self.task = registry.tasks.get("saliency")()
        self.device = torch.device("cpu")
        self.messages, self.means = [], []
        self.reporter = SimpleNamespace(info=self.messages.append)
        build = registry.datasets.get("salient_shapes")
        self.sets = {split: load_tensors(build(split, size=16, train=8, val=4), 16) for split in ("train", "val")}
        self.tensors = self.sets.get

    def example(self):
        return torch.randn(2, 3, 16, 16)

    def measure(self, *_): ...


def record_means(context, run, name, model, *_):
    """Stand in for the training: record the running means that it starts from."""
    context.means.append(model.bn1.running_mean.clone())


@pytest.mark.parametrize("count", [0, 2, 9])
def test_finetune_stage_recalibrates_and_records_it(tmp_path, monkeypatch, count):
    torch.manual_seed(0)
    model = Row(padding=1)
    init_norms(model, size=16)
    start = model.bn1.running_mean.clone()
    monkeypatch.setattr(stages, "load_model", lambda *_: copy.deepcopy(model))
    monkeypatch.setattr(stages, "save_model", lambda *_: None)
    monkeypatch.setattr(stages, "train_model", record_means)
    seen = None
    for name in ("a", "b"):
        work = Toy(count)
        with RunDir.start(tmp_path / name, "name: toy\n", {}) as run:
            stages.finetune_stage(work, run)
            record = run.read_json("summary.json").get("recalibrated")
            if not count:
                assert record is None and torch.equal(work.means[0], start)
                continue
            assert set(record) == {"batches", "before", "after"} and record["before"] != record["after"]
            # Two whole batches of three of the eight images.
            assert record["batches"] == 2 and set(record["before"]) == set(record["after"]) == {"max_f", "mae"}
            assert any("norms recalibrated on 2 batches: " in line for line in work.messages)
            seen = work.means[0] if seen is None else seen
            assert torch.equal(work.means[0], seen) and not torch.equal(seen, start)
            for stage in STAGES[:4]:
                run.end(stage)
            run.restart_from("finetune")
            assert "recalibrated" not in run.read_json("summary.json")


def test_resumed_finetune_stage_does_not_recalibrate(tmp_path, monkeypatch):
    model = Row(padding=1)
    monkeypatch.setattr(stages, "load_model", lambda *_: copy.deepcopy(model))
    monkeypatch.setattr(stages, "save_model", lambda *_: None)
    monkeypatch.setattr(stages, "train_model", record_means)
    work = Toy(2)
    with RunDir.start(tmp_path / "run", "name: toy\n", {}) as run:
        run.save_checkpoint("finetune", 1, {"a": np.zeros(1)}, {"epoch": 1}, 1)
        stages.finetune_stage(work, run)
        assert "recalibrated" not in run.read_json("summary.json")
