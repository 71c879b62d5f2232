"""One process of a distributed training of a small model; test_distributed.py starts it as torchrun would.

    python rank.py FOLDER

Writes the weights of each run in RUNS to FOLDER/NAME-RANK.safetensors.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from prunekit.config import registry
from prunekit.config.schema import Training
from prunekit.data.datasets import load_tensors
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.pruning.sparsity.gradual import GradualPruning
from prunekit.runs.run_dir import RunDir
from prunekit.runs.worker_run_dir import WorkerRunDir
from prunekit.training.distillation import TrainingLoss
from prunekit.training.trainer import Trainer
from prunekit.training.training_job import TrainingJob
from prunekit.utils import distributed

SIZE = 16
IMAGES = 24
OPTIONS = {
    "batch_size": 4,
    "lr": 1e-3,
    "gate_lr": 1e-2,
    "optimizer": {"name": "sgd", "options": {"momentum": 0.9}},
    "augment": {"name": "crop_flip", "options": {"crop": 2}},
}


class Small(nn.Module):
    """Two convolutions with norms; the dropout makes each process use its random generator."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.act, self.drop = nn.PReLU(6), nn.Dropout(0.1)
        self.out = nn.Conv2d(6, 1, 1)
        self.register_buffer("constant", torch.tensor([1 / 3]))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x * self.constant * 3)))
        return self.out(self.drop(self.act(self.bn2(self.conv2(x)))))


class Silent:
    def __init__(self):
        self.messages = []

    def __getattr__(self, name):
        return lambda *_: None

    def info(self, text):
        self.messages.append(text)


def data(split, size=SIZE):
    build = registry.datasets.get("salient_shapes")
    return load_tensors(build(split, size=SIZE, train=IMAGES, val=4), size)


def train(run, epochs, accumulate=1, threshold=1e-3, gradual=False, **changes):
    """Return the trained model and the info messages."""
    torch.manual_seed(0)
    model, reporter = Small(), Silent()
    groups = find_groups(model, torch.zeros(1, 3, SIZE, SIZE))

    def prune(total_steps):
        # The main process chooses for all.
        choice = {group.id: {distributed.rank()} for group in groups if group.gates}
        return GradualPruning(model, groups, lambda *_: choice, total_steps, start=0.3, end=0.7)

    section = Training.model_validate({**OPTIONS, "epochs": epochs, "accumulate": accumulate, **changes})
    job = TrainingJob(
        stage="train",
        config=section,
        task=registry.tasks.get("saliency")(),
        loss=TrainingLoss(registry.tasks.get("saliency")().loss),
        train_data=data("train"),
        val_data=data("val"),
        seed=3,
        run=run,
        reporter=reporter,
        device=torch.device("cpu"),
        threshold=threshold,
        resized=partial(data, "train"),
        gradual_pruning=prune if gradual else None,
    )
    Trainer(model, job, groups, DynamicWeightDecay(model, groups, 0.1)).fit()
    return model, reporter.messages


# Run folder → training options: one step with each optimizer, and several epochs.
RUNS = {
    "sgd": {"epochs": 1, "batch_size": IMAGES // 2},
    "adam": {"epochs": 1, "batch_size": IMAGES // 2, "optimizer": {"name": "adam"}},
    "many": {"epochs": 3, "ema": 0.9},
    "gradual": {"epochs": 3, "gradual": True},
    "progressive": {"epochs": 2, "gradual": True, "progressive": {"sizes": [8, SIZE], "batch_sizes": [6, 4]}},
}


def open_run(folder):
    """Return a new run folder, which only the main process writes."""
    with distributed.main_process_first():
        return RunDir.start(folder, "name: test\n", {}) if distributed.is_main_process() else WorkerRunDir.open(folder)


def main(folder):
    distributed.init()
    for name, options in RUNS.items():
        with open_run(folder / name) as run:
            model, _ = train(run, **options)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, folder / f"{name}-{distributed.rank()}.safetensors")
    with open_run(folder / "death") as run:
        saliency = registry.tasks.get("saliency")
        loss = saliency.loss

        def killing_loss(task, logits, targets):
            if distributed.rank() and run.read_metrics():
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(task, logits, targets)

        saliency.loss = killing_loss
        train(run, epochs=9)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except distributed.LostProcessError as lost:
        print(lost)
        sys.exit(lost.exit_status)
