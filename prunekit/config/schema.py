"""The recipe schema: keys, types, ranges, defaults and descriptions.

The fields are in the order in which a resolved recipe is written. :mod:`prunekit.config.messages` words the errors, and
:mod:`prunekit.config.conflicts` compares keys with each other.
"""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from prunekit.config import yaml


def _folder_name(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("is not a folder name; write one without slashes, such as 'csnet'")
    if name != name.strip() or any(unicodedata.category(c).startswith("C") for c in name):
        raise ValueError("has surrounding spaces or invisible characters; remove them")
    if len(name.encode()) > 200:
        raise ValueError("is longer than 200 bytes, too long for a folder name; shorten it")
    return name


def _quantity(value: Any) -> Any:
    """Convert 100k, 1.5M or 0.4G to an integer."""
    if not isinstance(value, str):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?)", value.strip())
    if match is None:
        raise ValueError("is not a number; write it as 100000, 100k, 1.5M or 0.4G")
    return round(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
Quantity = Annotated[int, Field(ge=1), BeforeValidator(_quantity)]
Options = dict[str, Any]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no type conversions (``True`` and ``1.5`` are not integers)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Component(Section):
    """A registered name with its options."""

    name: str
    """Registered name; `prunekit list` shows all names."""
    # Plain YAML values (a list where the builder takes a tuple): a recipe equals itself after a round trip.
    options: Options = {}
    """Options of the named builder; `prunekit list` shows them with their defaults."""


class Backbone(Section):
    """The dense model."""

    name: str
    """Registered name of the backbone or, with `backbone.file`, the name of a function in that file."""
    file: str | None = None
    """Python file that defines the backbone function; relative to the recipe's folder."""
    options: Options = {}
    """Arguments of the backbone."""


class Data(Section):
    """Training and validation images."""

    name: str
    """Registered name of the data set."""
    root: str | None = None
    """Folder of the training images, for data sets that read one."""
    val_root: str | None = None
    """Folder of the validation images; without it, a part of `data.root` is held out."""
    val_holdout: Ratio | None = None
    """Share of `data.root` held out for validation; null: 0.1 without `data.val_root`."""
    size: Count = 224
    """Height and width to which images are resized, in pixels."""
    on_error: Literal["raise", "skip"] = "raise"
    """Whether an unreadable or unpaired image stops the run or is skipped."""
    cache: Annotated[str, Field(min_length=1)] = "auto"
    """Folder that keeps decoded images for later runs; "auto": the user's cache folder, "none": decode in every run."""
    options: Options = {}
    """Options of the data set."""


class Checkpoint(Section):
    """When training writes a checkpoint, from which it can resume, and how many are kept."""

    every: Count = 1
    """Epochs between two checkpoints."""
    steps: Count | None = None
    """Optimizer steps between two checkpoints within an epoch."""
    minutes: Positive | None = 10.0
    """Minutes after which a checkpoint is written within an epoch."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    best: bool = True
    """Also keep the checkpoint with the best validation, by the first metric of the task."""


class Progressive(Section):
    """Smaller images in the first epochs of a stage (progressive resizing), since they take less time."""

    sizes: list[Count] = []
    """Image sizes in increasing order, the last is `data.size`; empty: `data.size` in all epochs."""
    milestones: list[Ratio] = []
    """Shares of the epochs after which the next size begins; empty: each size has as many epochs."""
    batch_sizes: list[Count] = []
    """Batch size at each size, the last is `batch_size`; empty: `batch_size` at all sizes."""
    strengths: list[Annotated[float, Field(ge=0, le=1)]] = []
    """Factor at each size on the option `strength` of the augmentation; empty: 1."""
    recalibrate: Natural = 0
    """Batches at `data.size` to recompute the BatchNorm statistics on after the last epoch; 0: off."""

    def first_epochs(self, epochs: int) -> list[int]:
        """Return the epoch, from 0, at which each size begins in a training of this many epochs."""
        count = len(self.sizes)
        return [round(share * epochs) for share in (0, *(self.milestones or [n / count for n in range(1, count)]))]


class Training(Section):
    """One training stage."""

    epochs: Natural
    """Number of epochs."""
    batch_size: Count = 16
    """Images per batch and process."""
    accumulate: Count = 1
    """Batches per optimizer step, in each process."""
    optimizer: Component = Component(name="adam")
    """Optimizer."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    gate_lr: Positive | None = None
    """Peak learning rate of the gates (BatchNorm weights); null: `lr`."""
    schedule: Component = Component(name="constant")
    """Learning rate schedule."""
    loss: Component = Component(name="task")
    """Loss; "task": the default loss of the task."""
    output_weights: list[NonNegative] = []
    """Weight of the loss of each output of a model with side outputs (deep supervision); empty: 1 each."""
    ema: Ratio | None = None
    """Decay per step of an exponential moving average of the weights, which becomes the stage's model; null: off."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the forward pass; "bf16" uses autocast."""
    augment: Component = Component(name="none")
    """Data augmentation."""
    progressive: Progressive = Progressive()
    sync_norms: bool = False
    """Synchronize BatchNorm statistics over all processes (GPUs only)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a loss, penalty or gradient that is not finite: stop, or skip the step; neither changes the weights."""
    fast: bool = True
    """Use prunekit's compiled CPU kernels where they apply."""
    compile: bool = False
    """Compile the model with `torch.compile` instead."""
    checkpoint: Checkpoint = Checkpoint()
    validate_every: Count = 1
    """Epochs between two validations; the last epoch is always validated."""


class GradualPruning(Section):
    """Channels that shrink to zero during sparse training, so that their removal changes nothing."""

    start: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the steps after which channels are chosen and the decay ends; null: choose only after training."""
    end: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the steps after which the chosen channels are zero."""
    power: Positive = 2.0
    """Power of the course to zero; 1 is linear."""
    rounds: Count = 1
    """Number of times channels are chosen between start and end; more than one needs a target."""


class SparseTraining(Training):
    """Training with sparsity decay."""

    gradual_pruning: GradualPruning = GradualPruning()


class Distill(Section):
    """Knowledge distillation while fine-tuning."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the distillation loss in the total loss; 0: off."""
    teacher: Literal["dense", "baseline"] = "dense"
    """Model of this run that serves as the teacher."""
    temperature: Positive = 1.0
    """Temperature that divides the logits of teacher and student."""


class FineTuning(Training):
    """Training of the slim model, also between pruning steps; without decay."""

    distill: Distill = Distill()


class Decay(Section):
    """The penalty that drives gates to zero during sparse training."""

    name: str = "dynamic"
    """Registered name of the decay."""
    weight: NonNegative = 1e-2
    """Strength λ of the penalty."""
    options: Options = {}
    """Options of the decay."""


class Target(Section):
    """Size of the slim model, its latency, or both; without a target, `slim.threshold` alone decides."""

    params: Quantity | None = None
    """Parameters of the slim model, such as 100000 or 100k."""
    macs: Quantity | None = None
    """MACs (multiply-adds) of the slim model for one image of the recipe's size, such as 0.4G."""
    params_ratio: Ratio | None = None
    """Parameters of the slim model as a share of the dense model's."""
    macs_ratio: Ratio | None = None
    """MACs of the slim model as a share of the dense model's."""
    latency_ms: Positive | None = None
    """Milliseconds of a call of the slim model; see `latency`."""
    latency_ratio: Ratio | None = None
    """Latency of the slim model as a share of the dense model's; see `latency`."""

    @property
    def given(self) -> dict[str, float]:
        """The keys that are set with their values: at most one of size and one of latency; empty without a target."""
        return {key: value for key, value in self.model_dump().items() if value is not None}

    @model_validator(mode="after")
    def _at_most_one(self) -> Target:
        for latency in (False, True):
            same = [key for key in self.given if key.startswith("latency") == latency]
            if len(same) > 1:
                raise ValueError(f"gives {' and '.join(same)}; keep one of them")
        return self


class Latency(Section):
    """Where the latency of `target.latency_ms` and `target.latency_ratio` is measured."""

    runtime: Literal["onnxruntime", "openvino", "torch"] = "onnxruntime"
    """Runtime of the exported model."""
    threads: Count | None = None
    """Threads of the runtime; null: as many as PyTorch uses."""
    batch: Count = 1
    """Images of a call."""
    size: Count | None = None
    """Height and width of the images; null: `data.size`."""
    variants: Annotated[int, Field(ge=10)] = 60
    """Number of models that are measured once, to predict the latency of others; kept in the user's cache folder."""
    table: str | None = None
    """File of `prunekit profile` with the latencies of another machine; nothing is measured here."""


class Slim(Section):
    """Which channels are pruned from the trained model."""

    importance: Component = Component(name="gate")
    """Importance by which channels are ranked."""
    cost_power: NonNegative = 0.0
    """Divides the importance of a channel by this power of its share of the target's params or MACs; 0: off, 1: rank by
    importance per param or MAC."""
    scope: Literal["global", "isomorphic", "layer"] = "global"
    """Rank channels over the whole model, or within layers of the same structure (as many of each kind of layer), or
    prune the same share of each layer."""
    steps: Count = 1
    """Pruning steps, with fine-tuning in between; more than one needs a target."""
    threshold: NonNegative = 1e-3
    """Effective gate up to which a channel is pruned; used with importance "gate" and no target."""
    exact: bool = False
    """Keep channels until the slim model equals the dense model with its dead gates at zero, instead of replacing what
    they emit by its mean. The model may stay larger than the target."""
    min_channels: Count = 1
    """Smallest number of channels kept in a layer."""
    round_to: Count = 1
    """Round the number of kept channels up to a multiple of this."""
    ignored_layers: list[str] = []
    """Modules that are not pruned, as shell-style patterns of their names."""
    recalibrate: Natural = 0
    """Batches of training data to recompute the BatchNorm statistics on before fine-tuning; 0: off."""


class Export(Section):
    """Files of the final model that run without prunekit."""

    onnx: bool = True
    """Write an ONNX file."""
    openvino: bool = False
    """Write an OpenVINO model."""
    pt2: bool = False
    """Write a `torch.export` program."""
    preprocess: bool = False
    """Also write each file with preprocessing included: uint8 images in, maps or probabilities out."""
    int8: bool = False
    """Also write an ONNX file quantized to int8."""


class Recipe(Section):
    """A run with all defaults filled in; returned by :func:`prunekit.config.recipe.load`."""

    name: Annotated[str, AfterValidator(_folder_name)]
    """Name of the run; the default run folder is runs/NAME."""
    # NumPy takes no seed above 32 bits.
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seed of all random numbers."""
    init: str | None = None
    """Run folder whose newest model training starts from."""
    init_weights: Literal["trained", "fresh"] = "trained"
    """With `init`: start from its weights, or take only its channel counts and initialize the weights anew."""
    backbone: Backbone
    task: str = "saliency"
    """Registered name of the task."""
    data: Data
    baseline: bool = False
    """Also train the model without decay, for comparison."""
    train: SparseTraining
    decay: Decay = Decay()
    target: Target = Target()
    latency: Latency = Latency()
    slim: Slim = Slim()
    finetune: FineTuning
    export: Export = Export()
    log: Literal["none", "tensorboard"] = "none"
    """Experiment tracker."""

    def dump(self) -> str:
        """Return the recipe as YAML with every default; it loads again to an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"))


# Keys that name a folder; `backbone.file` is made absolute where it is read.
PATHS = (("data", "root"), ("data", "val_root"), ("init",), ("latency", "table"))


def real_path(text: str) -> str:
    """Return a path that names the same folder wherever it is read."""
    return os.path.realpath(os.path.expanduser(text))


# Path of each component → its table in prunekit.config.registry.
COMPONENTS = {
    (stage, key): table
    for stage in ("train", "finetune")
    for key, table in (
        ("optimizer", "optimizers"),
        ("schedule", "schedules"),
        ("augment", "augmentations"),
        ("loss", "losses"),
    )
}
COMPONENTS["slim", "importance"] = "importances"
REGISTRIES = {("backbone",): "backbones", ("data",): "datasets", ("decay",): "decays", **COMPONENTS}


def get_section(path: yaml.Path) -> type[Section] | None:
    """Return the model of the section at this path, or None where there is none."""
    model: type[Section] | None = Recipe
    for key in path:
        field = model.model_fields.get(key) if model else None
        annotation = field.annotation if field else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    return model


def all_keys(path: yaml.Path = ()) -> list[yaml.Path]:
    """Return the path of every key below ``path``, sections included, in schema order."""
    keys = []
    model = get_section(path)
    for key in model.model_fields if model else ():
        keys += [(*path, key), *all_keys((*path, key))]
    return keys


def default_name(path: yaml.Path) -> str | None:
    """Return the default name of a section of :data:`REGISTRIES`, or None where the recipe must give it."""
    default = get_section(path).model_fields["name"].default
    if path in COMPONENTS:
        default = get_section(path[:-1]).model_fields[path[-1]].default.name
    return default if isinstance(default, str) else None
