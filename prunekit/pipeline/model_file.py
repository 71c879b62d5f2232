"""Save a model into one portable file, and load models from such files and from run folders.

The safetensors file holds the weights, and JSON metadata that says how to build the dense model and which plans to
apply. Loading never runs code that the file names unless the caller trusts it.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from prunekit import __version__
from prunekit.backbones import build
from prunekit.config.registry import describe_error
from prunekit.config.user_module import UserModule, trust_modules
from prunekit.config.yaml import format_path
from prunekit.errors import CheckpointError, PluginError, PrunekitError
from prunekit.pipeline.models import load_model, newest_model, shape_difference
from prunekit.pruning.plan import Builder, Plan
from prunekit.pruning.provenance import Provenance, get_provenance, set_provenance
from prunekit.pruning.surgery.slim import apply_plan
from prunekit.runs.run_dir import RunDir
from prunekit.utils.compiled import unwrap
from prunekit.utils.inputs import Example, as_example, from_spec, map_tensors, tensors_of, to_spec
from prunekit.utils.io import format_problem, os_error_reason, write_atomic
from prunekit.utils.safe_decode import decode_json
from prunekit.weights import locate, similar_name

FORMAT = 1
METADATA_KEY = "prunekit"
MAX_INPUT_ELEMENTS = 1 << 26  # of the input that a file asks to trace its plans with
MAX_INPUT_AXES = 5  # of a tensor that is described by its shape alone
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_IN_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)", re.DOTALL)
# Options of timm's and torchvision's builders that read or download weights, which the file has already.
_WEIGHT_OPTIONS = (
    *("pretrained", "weights", "weights_backbone", "checkpoint_path"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
)

Build = Callable[..., nn.Module]


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int
    version: str
    builder: Builder
    plans: list[Plan] = []
    # The shape of one input, without the batch, where it is a tensor of floats; else see ``to_spec``.
    input: list[int] | None = Field(None, min_length=1, max_length=MAX_INPUT_AXES - 1)
    example: Any = None


def save(
    model: nn.Module,
    path: str | Path,
    *,
    builder: str | Build | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Save a model with all that is needed to load it in another program.

    Args:
        model: a slim model from ``Pruner``, ``slim`` or ``slim_to_budget``, or a dense one.
        path: the file to write, such as ``slim.prunekit``.
        builder: builds the dense model: a registered backbone (``"csnet"``), a model of timm or torchvision
            (``"timm/resnet18"``), a function in a Python file (``"my_net.py:build"``, noted with the file's SHA-256) or
            in a package (``"package.module:function"``), or the function or class itself; one that is defined in a
            script, a notebook or a function is needed by ``load`` again. Not needed where the model came from ``load``.
        options: keyword arguments of the builder: numbers, strings, booleans, None, lists and dicts.

    Raises:
        PrunekitError: the builder is not known or fails, or does not make a model with these weights.
    """
    model = unwrap(model)
    provenance = get_provenance(model)
    if builder is not None:
        described = _describe_builder(builder, options)
    elif provenance.builder is None or not _can_be_imported(provenance.builder):
        raise CheckpointError(
            "save needs to know how to build the dense model; pass builder='timm/resnet18', 'my_net.py:build' or "
            "'package.module:build', and its arguments as options={…}"
        )
    elif options is not None:
        raise CheckpointError("options are given without a builder; pass builder=… as well")
    else:
        described = provenance.builder
    plans, given = list(provenance.plans), _describe_example(provenance.example)
    metadata = _Metadata(format=FORMAT, version=__version__, builder=described, plans=plans, **given)
    state = model.state_dict()
    if foreign := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        kind = type(state[foreign[0]]).__name__
        raise CheckpointError(f"{foreign[0]} of the model's state is {kind}, not a tensor; remove it")
    # Copies, since safetensors refuses tensors that share memory.
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    # Builds the model as load will, so that no file is written that cannot be loaded.
    rebuilt = _rebuild(metadata, builder if callable(builder) else _builder_function(described))
    if difference := shape_difference(rebuilt, weights):
        raise CheckpointError(
            f"the builder and the plans of this model do not rebuild it: {difference}; pass the builder and options of "
            "the dense model that was pruned"
        )
    text = metadata.model_dump_json(exclude_defaults=True)
    write_atomic(Path(path).expanduser(), to_safetensors(weights, {METADATA_KEY: text}))


def load(path: str | Path, *, trust: bool = False, builder: Build | None = None) -> nn.Module:
    """Load a model that ``save`` wrote, the newest model of a run folder, or one that comes with prunekit.

    Args:
        path: the file, a run folder, or the name of a model that comes with prunekit, such as "csnet-94k".
        trust: run the code that the file or the run folder names to build its model. Without it, only backbones that
            are registered with prunekit are built, and nothing is downloaded.
        builder: builds the dense model instead; called with the options in the file.

    Returns:
        the model in eval mode on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit the model that its builder makes.
        PluginError: the builder is code that is not trusted, is not there, or fails.
    """
    path = locate(Path(path).expanduser())
    if path.is_dir():
        if builder is not None:
            raise CheckpointError(f"{path} is a run folder, whose recipe names the builder; leave builder out")
        run = RunDir.open(path)
        with trust_modules(trust):
            return load_model(run, newest_model(run))
    metadata, weights = _read(path)
    if builder is None:
        if not _can_be_imported(metadata.builder):
            raise PluginError(
                f"{path} was saved with a builder that cannot be imported ({metadata.builder.name}); pass it as "
                "builder=…"
            )
        if not trust:
            _check_harmless(metadata.builder, path)
        builder = _builder_function(metadata.builder)
    model = _rebuild(metadata, builder)
    if difference := shape_difference(model, weights):
        raise CheckpointError(f"{path} does not fit the model that its builder makes: {difference}; was it changed?")
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    set_provenance(model, Provenance(metadata.builder, tuple(metadata.plans), _example(metadata)))
    return model.eval()


def _describe_example(example: Example | None) -> dict[str, Any]:
    """The fields of the metadata that describe an example."""
    if example is None:
        return {}
    if isinstance(example, Tensor) and example.is_floating_point() and example.dim() <= MAX_INPUT_AXES:
        return {"input": list(example.shape[1:])}
    return {"example": to_spec(example)}


def _example(metadata: _Metadata) -> Example | None:
    """The example that metadata describe, on the meta device. Raises ValueError where they are damaged."""
    shape = metadata.input
    if shape is not None and min(shape) < 1:
        raise ValueError(f"input: {shape} is not the shape of an input")
    example = from_spec(metadata.example) if shape is None else torch.empty(1, *shape, device="meta")
    if example is not None and sum(tensor.numel() for tensor in tensors_of(example)) > MAX_INPUT_ELEMENTS:
        raise ValueError(f"input: {shape or metadata.example} is not the shape of an input")
    return example if example is None else as_example(example)


def _read(path: Path) -> tuple[_Metadata, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not there{similar_name(path)}; give a file that prunekit.save wrote, a run folder, or a model "
            "that prunekit list shows"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os_error_reason(error)}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or was not written by prunekit.save ({error})") from error
    if text is None:
        raise CheckpointError(
            f"{path} holds weights alone and was not written by prunekit.save; build its model, then use "
            "safetensors.torch.load_model"
        )
    try:
        data = decode_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from error
    problem = format_problem(data.get("format") if isinstance(data, dict) else None, FORMAT)
    if problem is not None:
        raise CheckpointError(f"{path} {problem}; install a newer prunekit, or save the model again")
    try:
        metadata = _Metadata.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{path}: its metadata is damaged ({format_path(first['loc'])}: {first['msg']})"
        ) from None
    try:
        example = _example(metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from None
    if metadata.plans and example is None:
        raise CheckpointError(f"{path}: its metadata is damaged (input: {example} is not the shape of an input)")
    return metadata, weights


def _rebuild(metadata: _Metadata, builder: Build) -> nn.Module:
    """Build the dense model and apply the plans, without weights and without a trace in the random state."""
    with torch.random.fork_rng(devices=[]):
        try:
            model = builder(**metadata.builder.options)
        except PrunekitError:
            raise
        except Exception as error:
            raise PluginError(
                f"the builder {metadata.builder.name} fails with options={metadata.builder.options} "
                f"({describe_error(error)}); give it other options"
            ) from error
        if not isinstance(model, nn.Module):
            raise PluginError(
                f"the builder {metadata.builder.name} returned {type(model).__name__}, not a torch.nn.Module"
            )
        for plan in metadata.plans:
            example = _example(metadata)
            assert example is not None
            apply_plan(model, plan, map_tensors(lambda given: torch.zeros(given.shape, dtype=given.dtype), example))
    return model


def _describe_builder(builder: str | Build, options: Mapping[str, Any] | None) -> Builder:
    name, file = builder if isinstance(builder, str) else _import_path(builder), None
    if in_file := _IN_FILE.fullmatch(name):
        name, file = in_file["name"], UserModule.read(in_file["file"]).pinned_path
    plain = dict(options or {})
    if name.startswith(("timm/", "torchvision/")):
        plain = {key: value for key, value in plain.items() if key not in _WEIGHT_OPTIONS}
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"options cannot be written as JSON ({error}); use numbers, strings, booleans, None, lists and dicts"
        ) from error
    return Builder(name=name, options=json.loads(text), file=file)


def _import_path(function: Build) -> str:
    """Where a function can be imported from; ``__main__`` where it cannot."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__name__)
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module if found == function else '__main__'}:{name}"


def _can_be_imported(builder: Builder) -> bool:
    return not builder.name.startswith("__main__:")


def _builder_function(builder: Builder) -> Build:
    if builder.file is not None:
        source = UserModule.read(builder.file)
        if source.change is not None:
            raise PluginError(f"{source.change}; put that version back, or pass a function as builder=…")
        return source.load_function(builder.name)
    if not _IMPORT_PATH.fullmatch(builder.name):
        return lambda **options: build(builder.name, options)
    module, _, name = builder.name.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:
        raise PluginError(
            f"the builder {builder.name} cannot be imported ({describe_error(error)}); install its package, or pass a "
            "function as builder=…"
        ) from error
    if not callable(function):
        raise PluginError(f"the builder {builder.name} is not a function; name a function or a class")
    return function


def _check_harmless(builder: Builder, path: Path) -> None:
    """Raise PluginError where building would run code that the file chose, or download something."""
    if builder.file is not None or _IMPORT_PATH.fullmatch(builder.name):
        where = builder.name if builder.file is None else f"{builder.name} in {builder.file.partition('#')[0]}"
        raise PluginError(
            f"{path} builds its model with code: {where}; pass trust=True if you trust the file and that code, or your "
            "own function as builder=…"
        )
    given = [key for key in _WEIGHT_OPTIONS if builder.options.get(key)]
    if ":" in builder.name or given:
        what = given[0] if given else builder.name
        raise PluginError(f"{path} asks its builder for other weights ({what}); pass trust=True if you trust the file")
