"""Models in run folders: weights, and a plan where the shape differs from that of the recipe's backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from prunekit import __version__
from prunekit.backbones import build
from prunekit.config import registry, yaml
from prunekit.config.schema import Recipe
from prunekit.config.user_module import UserModule
from prunekit.data.datasets import LabelDataset
from prunekit.errors import CheckpointError, PrunekitError, RecipeError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Builder, Group, Plan
from prunekit.pruning.provenance import Provenance, set_provenance
from prunekit.pruning.surgery.slim import apply_plan
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import Task
from prunekit.utils.text import suggest

# "dense" was trained with decay, "baseline" without; both begin as the builder's model or as that of another run.
MODELS = ("baseline", "dense", "slim", "finetuned")
# The names of the classes, in the order of the model's outputs.
CLASSES = "classes.json"
DENSE_WEIGHTS = "dense/model.safetensors"


def read_recipe(run: RunDir) -> Recipe:
    """Read the resolved recipe of a run; CheckpointError if it is missing or damaged."""
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


def read_classes(run: RunDir) -> list[str]:
    """Read the classes of a run, in the order of the model's outputs; empty where it has none."""
    classes = run.read_json(CLASSES) if run.has(CLASSES) else []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{run.path / CLASSES} is not a list of names; start the run again with --overwrite")
    return classes


def read_task(run: RunDir, recipe: Recipe) -> tuple[Task, list[str]]:
    """Return the task of a run and its classes; CheckpointError if it needs classes and they cannot be read."""
    task, classes = registry.tasks.get(recipe.task)(), read_classes(run)
    if issubclass(task.dataset_type, LabelDataset) and not classes:
        raise CheckpointError(f"{run.path / CLASSES} is missing; write the names of the classes into it as a JSON list")
    return task, classes


def read_plan(run: RunDir, name: str) -> Plan | None:
    """Read ``<name>/plan.json``; None where there is none, since the model has the builder's shape.

    CheckpointError if it is damaged or was made from another dense model, PlanError if it is not a plan.
    """
    file = f"{name}/plan.json"
    if not run.has(file):
        return None
    plan = Plan.from_json(run.read_json(file), str(run.path / file))
    if plan.dense_hash is not None and run.has(DENSE_WEIGHTS) and run.checksum(DENSE_WEIGHTS)[:16] != plan.dense_hash:
        raise CheckpointError(
            f"{run.path / file} was not made from {run.path / DENSE_WEIGHTS}: one of the two belongs to another run; "
            "put the old one back, or make the plan again with --from extract"
        )
    return plan


def build_dense(recipe: Recipe) -> nn.Module:
    """Build the dense model of a recipe with its seed; PluginError if that needs a file that is not trusted."""
    backbone = recipe.backbone
    if backbone.file is not None:
        UserModule.read(backbone.file).check_trusted()
    torch.manual_seed(recipe.seed)
    return build(backbone.name, backbone.options, backbone.file)


def build_with_plan(recipe: Recipe, plan: Plan | None) -> nn.Module:
    """Build the dense model of a recipe and give it the shape of a plan; its weights are to be loaded next."""
    model, shape, backbone = build_dense(recipe), input_shape(recipe), recipe.backbone
    if plan is not None:
        example = torch.zeros(1, *shape)
        apply_plan(model, plan, example, _groups(recipe, model, example))
    builder = Builder(name=backbone.name, options=backbone.options, file=backbone.file)
    set_provenance(model, Provenance(builder, () if plan is None else (plan,), torch.empty(1, *shape, device="meta")))
    return model


# The groups of dense models by builder and shape: a command loads several models of a run.
_known_groups: dict[tuple[object, ...], list[Group]] = {}


def _groups(recipe: Recipe, model: nn.Module, example: torch.Tensor) -> list[Group]:
    if recipe.backbone.file is not None:
        return find_groups(model, example)  # the file may change
    builder = registry.backbones.get(recipe.backbone.name)
    key = builder, recipe.backbone.model_dump_json(), tuple(example.shape)
    if key not in _known_groups:
        _known_groups[key] = find_groups(model, example)
    return _known_groups[key]


def input_shape(recipe: Recipe) -> tuple[int, int, int]:
    """Return channels, height and width of an input."""
    return 3, recipe.data.size, recipe.data.size


def newest_model(run: RunDir) -> str:
    """Return the last of :data:`MODELS` that the run has; CheckpointError if it has none."""
    if not (found := trained_models(run)):
        raise CheckpointError(f"{run.path} holds no model yet; finish its training with: prunekit run … --resume")
    return found[-1]


def trained_models(run: RunDir) -> list[str]:
    """Return those of :data:`MODELS` that the run has."""
    return [name for name in MODELS if run.has(f"{name}/model.safetensors")]


def choose_model(run: RunDir, name: str | None) -> str:
    """Return the model that ``--model`` names, by default the newest; RecipeError if the run does not have it."""
    newest, known = newest_model(run), trained_models(run)
    if name is None or name in known:
        return name or newest
    raise RecipeError(f"--model {name}: {run.path} has no such model{suggest(name, known)} it has {', '.join(known)}")


def load_model(run: RunDir, name: str, recipe: Recipe | None = None) -> nn.Module:
    """Load a model from a run folder, in eval mode on the CPU.

    Args:
        run: the run folder.
        name: one of :data:`MODELS`, or "init".
        recipe: of the run, where it is known already.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights or the plan (PlanError) do not fit.
    """
    path, weights = f"{run.path}/{name}/model.safetensors", run.read_tensors(f"{name}/model.safetensors")
    model = build_with_plan(recipe or read_recipe(run), read_plan(run, name))
    if difference := shape_difference(model, weights):
        raise CheckpointError(f"{path} belongs to another plan or recipe: {difference}; put the right file back")
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in weights.items()})
    return model.eval()


def shape_difference(model: nn.Module, weights: Mapping[str, Tensor | np.ndarray]) -> str | None:
    """The first difference between the names and shapes of a rebuilt model's state and of weights, if any."""
    state = model.state_dict()
    for name in [*state, *weights]:
        if name not in weights:
            return f"{name} is in the rebuilt model alone"
        if name not in state:
            return f"{name} is not in the rebuilt model"
        if state[name].shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, and {tuple(state[name].shape)} in the rebuilt model"
    return None


def save_model(run: RunDir, name: str, model: nn.Module, plan: Plan | None = None) -> None:
    """Write a model into the run folder: its plan, then its weights; PrunekitError if a weight is not finite."""
    arrays = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
    for key, value in arrays.items():
        if not np.isfinite(value).all():
            raise PrunekitError(f"{key} of the {name} model is not finite; train with a lower rate")
    # Weights count as a model, so a kill must not leave them without their plan.
    if plan is not None:
        run.write_json(f"{name}/plan.json", plan.to_json())
    run.write_tensors(f"{name}/model.safetensors", arrays)


def create_initial_model(run: RunDir, recipe: Recipe) -> tuple[nn.Module, Plan | None]:
    """Return the model that training begins with, and its plan: the builder's, or a copy of the newest of ``init``."""
    if recipe.init is None:
        return build_dense(recipe), None
    # The run may be gone later, so its model is copied.
    if not run.has("init/model.safetensors"):
        source = open_initial_run(recipe)
        name = newest_model(source)
        plan = read_plan(source, name)
        if plan is not None:
            plan.dense_hash = None  # of the other run
        fresh = recipe.init_weights == "fresh"
        save_model(run, "init", build_with_plan(recipe, plan) if fresh else load_model(source, name), plan)
    return load_model(run, "init", recipe).train(), read_plan(run, "init")


def open_initial_run(recipe: Recipe) -> RunDir:
    """Open the run that ``init`` names; RecipeError if it has another backbone."""
    source = RunDir.open(Path(recipe.init).expanduser())
    theirs, ours = read_recipe(source).backbone, recipe.backbone
    if theirs != ours:
        raise RecipeError(
            f"init: {recipe.init} has the backbone {theirs.name} {theirs.options}, "
            f"the recipe {ours.name} {ours.options}; give them the same"
        )
    return source
