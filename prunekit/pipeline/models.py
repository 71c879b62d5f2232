"""Run folder → model, and model → run folder: weights from safetensors, the shape from the builder and the plan."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from prunekit import __version__
from prunekit.backbones import build
from prunekit.config import registry, yaml
from prunekit.config.schema import Recipe
from prunekit.config.user_module import UserModule
from prunekit.data.datasets import LabelDataset
from prunekit.errors import CheckpointError, PrunekitError
from prunekit.pruning.plan import Builder, Plan
from prunekit.pruning.provenance import Provenance, set_provenance
from prunekit.pruning.surgery.slim import apply_plan
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import Task

# "dense" is the model that was trained with decay: the builder's, or (with `init`) what another run ended with; where
# the training shrank, what was left of it. "baseline" has begun as that did, and was trained without decay.
MODELS = ("baseline", "dense", "slim", "finetuned")
# What the classes are called that the models tell apart, in the order of their outputs.
CLASSES = "classes.json"
# The plan of all that is gone when a training that shrinks has ended.
SHRUNK = "shrunk.json"


def read_recipe(run: RunDir) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    document, path = yaml.parse(run.read_text(RECIPE)), run.path / RECIPE
    if document.problems:
        problem = document.problems[0]
        raise CheckpointError(f"{path} is damaged (line {problem.line}: {problem.message}); put a copy of it back")
    try:
        return Recipe.model_validate(document.value)
    except ValidationError as error:
        first = error.errors()[0]
        key = yaml.format_path(first["loc"]) or "the top level"
        if first["type"] == "extra_forbidden":
            raise CheckpointError(
                f"{path}: this prunekit ({__version__}) does not know the key {key}; the run was written by prunekit "
                f"{run.version}: install that or a later one, or put a copy of the file back if it was edited"
            ) from error
        raise CheckpointError(f"{path} is damaged ({key}: {first['msg']}); put a copy of it back") from error


def build_dense(recipe: Recipe) -> nn.Module:
    """The dense model of a recipe, its first weights drawn from the recipe's seed.

    Raises:
        PluginError: it is built by a file that the user has not vouched for.
    """
    if recipe.backbone.file is not None:
        UserModule.read(recipe.backbone.file).check_trusted()
    torch.manual_seed(recipe.seed)
    return build(recipe.backbone.name, recipe.backbone.options, recipe.backbone.file)


def build_with_plan(recipe: Recipe, plan: Plan | None) -> nn.Module:
    """The dense model of a recipe in the shape of a plan, its weights not yet loaded."""
    model, shape, backbone = build_dense(recipe), input_shape(recipe), recipe.backbone
    if plan is not None:
        apply_plan(model, plan, torch.zeros(1, *shape))
    builder = Builder(name=backbone.name, options=backbone.options, file=backbone.file)
    set_provenance(model, Provenance(builder, () if plan is None else (plan,), shape))
    return model


def input_shape(recipe: Recipe) -> tuple[int, int, int]:
    """Channels, height and width of an input."""
    return 3, recipe.data.size, recipe.data.size


def read_plan(run: RunDir) -> Plan:
    """The plan of a run folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another dense model than the one beside it.
        PlanError: it is none.
    """
    plan, weights = Plan.from_json(run.read_json("plan.json"), str(run.path / "plan.json")), "dense/model.safetensors"
    if plan.dense_hash is not None and run.has(weights) and run.checksum(weights)[:16] != plan.dense_hash:
        raise CheckpointError(
            f"{run.path / 'plan.json'} was not made from {run.path / weights}: one of the two is of another run; put "
            "the old one back, or make the plan again with --from extract"
        )
    return plan


def read_classes(run: RunDir) -> list[str]:
    """What the classes are called that a run's models tell apart, in the order of their outputs; empty without any.

    Raises:
        CheckpointError: the file is damaged.
    """
    classes = run.read_json(CLASSES) if run.has(CLASSES) else []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{run.path / CLASSES} is not a list of names; start the run again with --overwrite")
    return classes


def read_task(run: RunDir, recipe: Recipe) -> tuple[Task, list[str]]:
    """The task of a run, and what :func:`read_classes` gives, whose errors it raises.

    Raises:
        CheckpointError: the task tells classes apart, and nothing says what they are called.
    """
    task, classes = registry.tasks.get(recipe.task)(), read_classes(run)
    if issubclass(task.dataset_type, LabelDataset) and not classes:
        raise CheckpointError(f"{run.path / CLASSES} is missing; write the names of the classes into it as a JSON list")
    return task, classes


def initial_plan(run: RunDir) -> Plan | None:
    """The plan of the model that the run began with, where that was slim already."""
    return Plan.from_json(run.read_json("init.json"), str(run.path / "init.json")) if run.has("init.json") else None


def initial_model(run: RunDir, recipe: Recipe) -> nn.Module:
    """The model that sparse training began with, in its shape alone: what the sizes of "dense" are of."""
    return build_with_plan(recipe, initial_plan(run))


def trained_plan(run: RunDir) -> Plan | None:
    """The plan of the model that sparse training ended with; None where nothing was cut of it then."""
    return Plan.from_json(run.read_json(SHRUNK), str(run.path / SHRUNK)) if run.has(SHRUNK) else initial_plan(run)


def plan_of(run: RunDir, name: str) -> Plan | None:
    """The plan, from the builder's model, of one of :data:`MODELS`; None where nothing is cut."""
    if name == "baseline":
        return initial_plan(run)
    return trained_plan(run) if name == "dense" else read_plan(run)


def newest_model(run: RunDir) -> str:
    """The last of :data:`MODELS` that the folder holds.

    Raises:
        CheckpointError: it holds none.
    """
    for name in reversed(MODELS):
        if run.has(f"{name}/model.safetensors"):
            return name
    raise CheckpointError(f"{run.path} holds no model yet; finish its training with: prunekit run … --resume")


def load_model(run: RunDir, name: str, recipe: Recipe | None = None) -> nn.Module:
    """One of :data:`MODELS` from a run folder, in eval mode on the CPU.

    Raises:
        CheckpointError: its file is missing, damaged or of another shape.
        PlanError: the plan does not fit the recipe's builder.
    """
    recipe = recipe or read_recipe(run)
    weights = run.read_tensors(f"{name}/model.safetensors")
    model = build_with_plan(recipe, plan_of(run, name))
    load_weights(model, weights, f"{run.path}/{name}/model.safetensors")
    return model.eval()


def load_weights(model: nn.Module, weights: dict[str, np.ndarray], where: str) -> None:
    """Load arrays into a model; raises CheckpointError, naming ``where`` and the first array that does not fit."""
    wanted = model.state_dict()
    for name in [*wanted, *weights]:
        if name not in weights:
            raise CheckpointError(f"{where} lacks {name}; it belongs to another plan or recipe")
        if name not in wanted:
            raise CheckpointError(f"{where} has {name}, which the model does not; it belongs to another plan or recipe")
        if tuple(wanted[name].shape) != weights[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {weights[name].shape}, the model needs {tuple(wanted[name].shape)}; "
                "it belongs to another plan or recipe"
            )
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})


def save_model(run: RunDir, name: str, model: nn.Module) -> str:
    """Write a model's weights into the run folder; the hash of what was written.

    Raises:
        PrunekitError: a weight is not finite.
    """
    arrays = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
    for key, value in arrays.items():
        if not np.isfinite(value).all():
            raise PrunekitError(f"{key} of the {name} model is not finite; train with a lower rate")
    run.write_tensors(f"{name}/model.safetensors", arrays)
    return run.checksum(f"{name}/model.safetensors")[:16]
