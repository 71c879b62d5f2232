"""What the stages of a run share: the recipe, its task, and its data, read on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import Recipe
from prunekit.data.cache import cached_tensors, data_folder
from prunekit.data.datasets import ImageDataset, Tensors, normalize
from prunekit.errors import DataError
from prunekit.flops import count_modules, total
from prunekit.pipeline.latency import RunLatencies
from prunekit.pipeline.models import input_shape
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group
from prunekit.pruning.surgery.equivalence import check_sizes
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import Task
from prunekit.utils import distributed
from prunekit.utils.progress import Reporter, training_epochs

EXAMPLE_IMAGES = 8


class RunContext:
    """What the stages of a run share.

    Attributes:
        shape: of an input: channels, height, width.
        stop_before_pruning: whether the training stops where gradual pruning would begin.
    """

    def __init__(self, recipe: Recipe, reporter: Reporter, *, stop_before_pruning: bool = False):
        self.recipe = recipe
        self.reporter = reporter
        self.task: Task = registry.tasks.get(recipe.task)()
        self.device: torch.device = PartialState().device
        self.shape = input_shape(recipe)
        self.stop_before_pruning = stop_before_pruning
        epochs = recipe.train.epochs, recipe.finetune.epochs
        reporter.training_epochs = training_epochs(*epochs, recipe.slim.steps, recipe.baseline)
        self._datasets: dict[str, ImageDataset] = {}
        self._tensors: dict[tuple[str, int], Tensors] = {}
        self._dense_groups: list[Group] | None = None
        self._latencies: RunLatencies | None = None
        self._check_sizes: Sequence[tuple[int, ...]] | None = None

    def dataset(self, split: str) -> ImageDataset:
        """Return the data set of a split, "train" or "val"."""
        if split not in self._datasets:
            self._datasets[split] = _build_dataset(self.recipe, split)
        return self._datasets[split]

    def tensors(self, split: str, size: int | None = None) -> Tensors:
        """Return a split as tensors in memory, at the recipe's size or another; read once.

        Raises:
            DataError: they cannot be read, or an image could be read only at the recipe's size.
        """
        data = self.recipe.data
        key = split, size or data.size
        if key not in self._tensors:
            # The recipe's size first: it drops unreadable images, so that all sizes have the same rows.
            count = None if key[1] == data.size else len(self.tensors(split))
            what = split if count is None else f"{split}, {key[1]}×{key[1]}"
            with self.reporter.spinner(f"reading data ({what})"):
                folder, keep = data_folder(data.cache), distributed.is_main_process()
                found = cached_tensors(self.dataset(split), key[1], folder, self.reporter.info, keep=keep)
            if count not in (None, len(found)):
                raise DataError(
                    f"data: {count} images could be read at {data.size}×{data.size}, and now {len(found)}; restore the "
                    "images, and continue with --resume"
                )
            self._tensors[key] = found
        return self._tensors[key]

    def data_checksums(self) -> dict[str, str]:
        """Return a SHA-256 of the images and targets of each split, in their order; their paths do not matter."""
        checksums = {}
        for split in ("train", "val"):
            digest = hashlib.sha256()
            for tensor in (self.tensors(split).images, self.tensors(split).targets):
                digest.update(np.ascontiguousarray(tensor.numpy()).data)
            checksums[split] = digest.hexdigest()
        return checksums

    def example(self) -> Tensor:
        """Return a few normalized validation images, (N, 3, S, S), for tracing and equivalence checks."""
        return normalize(self.tensors("val").images[:EXAMPLE_IMAGES])

    def dense_groups(self, model: nn.Module) -> list[Group]:
        """Return the groups of the model that training begins with, in any state of its weights; traced once."""
        if self._dense_groups is None:
            self._dense_groups = find_groups(model, self.example())
        return self._dense_groups

    def check_sizes(self, model: nn.Module) -> Sequence[tuple[int, ...]]:
        """Return the image sizes of equivalence checks for the dense model and those cut from it; found once."""
        if self._check_sizes is None:
            self._check_sizes = check_sizes(model, self.example())
        return self._check_sizes

    def latencies(self, model: nn.Module, groups: Sequence[Group]) -> RunLatencies:
        """Return the latencies of models that are cut from this one, measured or read at the first call."""
        if self._latencies is None:
            self._latencies = RunLatencies(self.recipe, model, groups, self.reporter)
        return self._latencies

    def measure(self, run: RunDir, part: str, model: nn.Module) -> None:
        """Write a model's params, MACs and paper FLOPs into its part of the summary."""
        counts, uncounted = count_modules(model, self.shape)
        run.update_summary(part, {**run.read_json("summary.json").get(part, {}), **total(counts)})
        for name in uncounted:
            self.reporter.info(f"not counted: {name} ({type(model.get_submodule(name)).__name__})")


def _build_dataset(recipe: Recipe, split: str) -> ImageDataset:
    data = recipe.data
    builder = registry.datasets.get(data.name)
    settings = {key: getattr(data, key) for key in ("root", "val_root", "val_holdout", "size", "on_error")}
    settings["seed"] = recipe.seed
    given = {key: settings[key] for key in registry.accepted(builder, settings) if settings[key] is not None}
    missing = [key for key in registry.required_parameters(builder) if key in settings and key not in given]
    if missing:
        raise DataError(f"the data set {data.name} needs {' and '.join(f'data.{key}' for key in missing)}")
    return builder(split, **given, **data.options)
