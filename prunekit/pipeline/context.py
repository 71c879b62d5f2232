"""What the stages of a run share: the recipe, its data, its task, and where its model comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import FineTuning, Recipe, Training
from prunekit.data.cache import cached_tensors, data_folder
from prunekit.data.datasets import ImageDataset, Tensors, normalize
from prunekit.errors import DataError, PlanError, RecipeError
from prunekit.flops import count_modules, total
from prunekit.pipeline.models import (
    CLASSES,
    build_dense,
    build_with_plan,
    initial_plan,
    input_shape,
    load_model,
    load_weights,
    newest_model,
    plan_of,
    read_classes,
    read_recipe,
    save_model,
)
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.layers import match_layers
from prunekit.pruning.sparsity.decay import Decay
from prunekit.pruning.sparsity.lambda_controller import LambdaController
from prunekit.pruning.sparsity.progressive import ProgressivePruning
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import Task, inference
from prunekit.training.acceleration import channels_last
from prunekit.training.distillation import TrainingLoss
from prunekit.training.job import TrainingJob, no_tracker
from prunekit.training.optimizers import param_groups
from prunekit.training.trackers import check_tracker, track
from prunekit.training.trainer import Trainer, bind_options
from prunekit.utils import distributed
from prunekit.utils.progress import Reporter, training_epochs

CHECK_IMAGES = 8


class RunContext:
    """What the stages share: the recipe, its data, its task."""

    def __init__(self, recipe: Recipe, reporter: Reporter):
        self.recipe = recipe
        self.reporter = reporter
        self.task: Task = registry.tasks.get(recipe.task)()
        self.device = PartialState().device
        self.shape = input_shape(recipe)
        epochs = recipe.train.epochs, recipe.finetune.epochs
        reporter.training_epochs = training_epochs(*epochs, recipe.slim.steps, recipe.baseline)
        self._pairs: dict[str, ImageDataset] = {}
        self._tensors: dict[str, Tensors] = {}

    def pairs(self, split: str) -> ImageDataset:
        """The training or the validation set."""
        if split not in self._pairs:
            data = self.recipe.data
            builder = registry.datasets.get(data.name)
            given = {
                "root": data.root,
                "val_root": data.val_root,
                "val_holdout": data.val_holdout,
                "size": data.size,
                "seed": self.recipe.seed,
                "on_error": data.on_error,
            }
            taken = registry.parameter_names(builder)
            keys = {key: value for key, value in given.items() if key in taken and value is not None}
            missing = [key for key in registry.required_parameters(builder) if key in given and key not in keys]
            if missing:
                raise DataError(f"the data set {data.name} needs {' and '.join(f'data.{key}' for key in missing)}")
            self._pairs[split] = builder(split, **keys, **data.options)
        return self._pairs[split]

    def tensors(self, split: str) -> Tensors:
        """The set in memory, at the recipe's size."""
        if split not in self._tensors:
            with self.reporter.spinner(f"reading data ({split})"):
                self._tensors[split] = cached_tensors(
                    self.pairs(split),
                    self.recipe.data.size,
                    data_folder(self.recipe.data.cache),
                    self.reporter.info,
                    keep=distributed.is_main_process(),
                )
        return self._tensors[split]

    def example(self) -> Tensor:
        """A batch of normalised validation images, (N, 3, S, S), for tracing, equivalence checks and checks."""
        return normalize(self.tensors("val").images[:CHECK_IMAGES])

    def start_model(self, run: RunDir) -> nn.Module:
        """The model that training begins with: the builder's, or what the run that the recipe names has ended with.

        That run may be gone later, so its model is copied into this folder.
        """
        if self.recipe.init is None:
            return build_dense(self.recipe)
        if not run.has("init/model.safetensors"):
            source = self._source()
            name = newest_model(source)
            plan = plan_of(source, name)
            if plan is not None:
                run.write_json("init.json", plan.to_json())
            fresh = self.recipe.init_weights == "fresh"
            save_model(run, "init", build_with_plan(self.recipe, plan) if fresh else load_model(source, name))
        model = build_with_plan(self.recipe, initial_plan(run))
        load_weights(model, run.read_tensors("init/model.safetensors"), str(run.path / "init"))
        return model

    def builder(self) -> tuple[nn.Module, list[Group]]:
        """The builder's dense model and its groups."""
        model = build_dense(self.recipe)
        return model, find_groups(model, torch.zeros(1, *self.shape))

    def _source(self) -> RunDir:
        """The run that the recipe begins from; raises RecipeError where it is of another backbone."""
        source = RunDir.open(Path(self.recipe.init).expanduser())
        theirs, ours = read_recipe(source).backbone, self.recipe.backbone
        if theirs != ours:
            raise RecipeError(
                f"init: {self.recipe.init} has the backbone {theirs.name} {theirs.options}, "
                f"the recipe {ours.name} {ours.options}; give them the same"
            )
        return source

    def rehearse(self, load: bool, begin: bool = False) -> None:
        """Build everything once that the recipe names, so that what is wrong is said before anything is written.

        Args:
            load: read the data too.
            begin: look at the run that this one begins from, too.

        Raises:
            PrunekitError: what is wrong.
        """
        check_tracker(self.recipe)
        for stage in ("train", "finetune"):
            if getattr(self.recipe, stage).sync_norms and self.device.type == "cpu":
                raise RecipeError(
                    f"{stage}.sync_norms: norms over several processes (SyncBatchNorm) exist on GPUs alone, and this "
                    f"run is on the CPU; set {stage}.sync_norms=false"
                )
        model = build_dense(self.recipe)
        self._fits(model)
        if self.recipe.slim.ignored_layers:
            try:
                match_layers(model, find_groups(model, torch.zeros(1, *self.shape)), self.recipe.slim.ignored_layers)
            except PlanError as error:
                raise RecipeError(f"slim.{error}") from error
        if self.recipe.init is not None and begin:
            source = self._source()
            load_model(source, newest_model(source))
            self.agree(source)
        for split in ("train", "val") if load else ():
            self.tensors(split)
        if self.recipe.finetune.distill.weight:
            nothing = torch.zeros(1, 1, 1, 1)
            self.task.distillation_loss(nothing, nothing, 1.0)
        for stage in ("train", "finetune"):
            section: Training = getattr(self.recipe, stage)
            tries: list[tuple[str, Callable[[], Any]]] = [
                (
                    "optimizer",
                    lambda s=section: bind_options(registry.optimizers, s.optimizer)(
                        param_groups(model, s.lr, s.gate_lr)
                    ),
                ),
                ("schedule", lambda s=section: bind_options(registry.schedules, s.schedule)(0.5)),
                ("loss", lambda s=section: bind_options(registry.losses, s.loss)(self.task)),
                (
                    "augment",
                    lambda s=section: bind_options(registry.augmentations, s.augment)(
                        torch.zeros(1, 3, 8, 8),
                        self.pairs("train").empty_targets(1, 8),
                        torch.full((1, 2), 8.0),
                        torch.Generator().manual_seed(0),
                    ),
                ),
            ]
            for key, call in tries:
                try:
                    call()
                except (TypeError, ValueError) as error:
                    raise RecipeError(f"{stage}.{key}: {error}") from error

    def agree(self, run: RunDir) -> None:
        """Hold the classes of the data against those that the models of this run tell apart.

        Raises:
            RecipeError: they are others, or in another order.
        """
        ours = list(self.pairs("train").classes)
        theirs = read_classes(run) if run.has(CLASSES) else ours
        if ours != theirs:
            raise RecipeError(
                f"data: its classes are {', '.join(ours)}, and the models of {run.path} have learned "
                f"{', '.join(theirs)}; name data with the same classes, or start a run of its own"
            )

    def keep_classes(self, run: RunDir) -> None:
        """Write down what the classes are called, where there are any; errors as for :meth:`agree`."""
        self.agree(run)
        if self.pairs("train").classes and not run.has(CLASSES):
            run.write_json(CLASSES, list(self.pairs("train").classes))

    def _fits(self, model: nn.Module) -> None:
        """Raise RecipeError where task, data set and model do not belong together."""
        recipe, size = self.recipe, self.recipe.data.size
        train, val = self.pairs("train"), self.pairs("val")
        for images in (train, val):
            if not isinstance(images, self.task.dataset_type):
                raise RecipeError(
                    f"task {recipe.task} learns from {self.task.dataset_type.targets}, and the data set {recipe.data.name} has "
                    f"{images.targets}; name another task or another data set (see: prunekit list)"
                )
        if train.classes != val.classes:
            raise RecipeError(f"data set {recipe.data.name}: training and validation differ in their classes; mend it")
        try:
            with inference(model):
                output = model(torch.zeros(1, *self.shape))
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"backbone {recipe.backbone.name} cannot take an image of {size}×{size} ({reason}); "
                "set another data.size"
            ) from error
        fault = self.task.check_output(output, size, train)
        if fault is not None:
            raise RecipeError(f"task {recipe.task} with backbone {recipe.backbone.name}: {fault}")

    def decay(self, model: nn.Module, groups: list[Group]) -> Decay:
        section = self.recipe.decay
        return registry.decays.get(section.name)(model, groups, section.weight, **section.options)

    def train(
        self,
        run: RunDir,
        stage: str,
        model: nn.Module,
        groups: list[Group],
        decay: Decay,
        steering: LambdaController | None = None,
        shrinking: ProgressivePruning | None = None,
    ) -> nn.Module:
        """Train a model in place; the model, or (``shrinking``) what is left of it. ``stage`` names its lines and
        states, and all but "train" and "baseline" are fine-tuning."""
        model.to(self.device)
        section = self.recipe.train if stage in ("train", "baseline") else self.recipe.finetune
        job = TrainingJob(
            stage=stage,
            config=section,
            task=self.task,
            loss=self._training_loss(run, section),
            train_data=self.tensors("train"),
            val_data=self.tensors("val"),
            seed=self.recipe.seed,
            run=run,
            reporter=self.reporter,
            device=self.device,
            threshold=self.recipe.slim.threshold,
            lambda_controller=steering,
            progressive_pruning=shrinking,
            tracker=functools.partial(track, self.recipe, run.path, stage)
            if distributed.is_main_process()
            else no_tracker,
        )
        return Trainer(model, job, groups, decay).fit().cpu().eval()

    def _training_loss(self, run: RunDir, section: Training) -> TrainingLoss:
        loss = bind_options(registry.losses, section.loss)(self.task)
        if not (isinstance(section, FineTuning) and section.distill.weight):
            return TrainingLoss(loss)
        distill = section.distill
        model = load_model(run, distill.teacher, self.recipe).to(self.device)
        # What it refuses, the model that learns refuses as well, and that is said.
        teacher = channels_last(model, model, lambda _: None)
        return TrainingLoss(loss, self.task, teacher, distill.weight, distill.temperature)

    def measure(self, run: RunDir, part: str, model: nn.Module) -> None:
        """Write a model's size into its part of the summary."""
        counts, unknown = count_modules(model, self.shape)
        held = run.read_json("summary.json").get(part, {})
        run.update_summary(part, {**held, **total(counts)})
        for name in unknown:
            self.reporter.info(f"not counted: {name} ({type(model.get_submodule(name)).__name__})")
