"""What may stand in a recipe: keys, types, ranges and defaults.

The order of the fields is the order in which a resolved recipe is written. The text of an error comes from
:mod:`prunekit.config.recipe`, which knows the place; here stand the rules alone.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from prunekit.config import yaml

Options = dict[str, Any]


def _folder_name(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("is no name for a folder; write one without slashes, such as 'csnet'")
    if name != name.strip() or any(unicodedata.category(c).startswith("C") for c in name):
        raise ValueError("has blanks around it or invisible characters; remove them")
    if len(name.encode()) > 200:
        raise ValueError("is longer than 200 bytes, too long for a folder; shorten it")
    return name


class Section(BaseModel):
    """Base of all parts: no unknown keys, no conversions (``True`` or ``1.5`` is no whole number), not changeable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Named(Section):
    """A registered name with its options; in a recipe the name may stand alone.

    ``options`` hold plain YAML values (a list where the builder has a tuple), so that a recipe equals itself after a
    round trip through its file.
    """

    name: str
    options: Options = {}

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Backbone(Section):
    """The dense model: a registered name, or the function ``name`` in ``file``."""

    name: str
    file: str | None = None
    options: Options = {}


class Data(Section):
    """Where images come from. ``val_holdout`` is the share of ``root`` kept for validation; ``size`` in pixels.

    ``cache`` is the folder in which decoded images are kept for later runs: "auto" for the user's cache folder, "none"
    to decode them in every run.
    """

    name: str
    root: str | None = None
    val_root: str | None = None
    val_holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    size: Annotated[int, Field(ge=1)] = 224
    on_error: Literal["raise", "skip"] = "raise"
    cache: Annotated[str, Field(min_length=1)] = "auto"
    options: Options = {}


class Checkpoint(Section):
    """When the state of a training is written, from which it goes on to the same weights whatever stopped it.

    Behind each ``every`` epochs and, within an epoch too, each ``steps`` steps and when ``minutes`` have passed since
    the last one. The newest ``keep`` stay and, with ``best``, the one behind the epoch with the best validation, by the
    first of the task's metrics.
    """

    every: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = 10.0
    keep: Annotated[int, Field(ge=1)] = 2
    best: bool = True


class Training(Section):
    """One stage of training; ``gate_lr`` None means ``lr``.

    ``loss`` is what the task learns by; ``ema`` keeps a mean of the weights over about 1 / (1 - ema) steps, and that is
    the model that the stage ends with. ``accumulate`` batches make one step of the optimiser, in each process;
    ``sync_norms`` lets norms see the batches of all processes as one (on GPUs alone). ``on_nonfinite`` says what
    becomes of a step in which a loss, a penalty or a gradient is not finite: "stop" ends the training, "skip" leaves
    the step out and goes on; neither changes the model.
    ``fast`` lets prunekit's own kernels compute a step; ``compile`` gives the model to ``torch.compile`` instead.
    """

    epochs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    optimizer: Named = Named(name="adam")
    lr: Annotated[float, Field(gt=0)] = 1e-3
    gate_lr: Annotated[float, Field(gt=0)] | None = None
    schedule: Named = Named(name="constant")
    loss: Named = Named(name="task")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    augment: Named = Named(name="none")
    sync_norms: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    fast: bool = True
    compile: bool = False
    checkpoint: Checkpoint = Checkpoint()


class SparseTraining(Training):
    """Training with decay; each ``prune_every`` epochs the channels that are dead by then are cut out."""

    prune_every: Annotated[int, Field(ge=1)] | None = None


class Distill(Section):
    """Learning from what the ``teacher``, a model of the same run, gives for an image, beside what the data say.

    ``weight`` is the teacher's share of the loss, 0 without one; ``temperature`` divides the logits of both.
    """

    weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    teacher: Literal["dense", "baseline"] = "dense"
    temperature: Annotated[float, Field(gt=0)] = 1.0


class FineTuning(Training):
    """Training of the slim model, also between the rounds of cuts; no decay."""

    distill: Distill = Distill()


class Decay(Section):
    """What drives gates to zero, and how strongly."""

    name: str = "dynamic"
    weight: Annotated[float, Field(ge=0)] = 1e-2
    options: Options = {}


def _quantity(value: Any) -> Any:
    """A whole number, where it is written as people say it: 100k, 0.4G."""
    if not isinstance(value, str):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?)", value.strip())
    if match is None:
        raise ValueError("is no number; write it as 100000, 100k, 1.5M or 0.4G")
    return round(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])


Quantity = Annotated[int, BeforeValidator(_quantity), Field(ge=1)]
Ratio = Annotated[float, Field(gt=0, lt=1)]


class Target(Section):
    """How large the slim model is to be, by one of four measures; ratios are slim ÷ dense. None given: no budget, and
    ``slim.threshold`` alone decides."""

    params: Quantity | None = None
    macs: Quantity | None = None
    params_ratio: Ratio | None = None
    macs_ratio: Ratio | None = None

    @model_validator(mode="after")
    def _one(self) -> Target:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"gives {' and '.join(given)}; keep one of them")
        return self


class Slim(Section):
    """How a trained model becomes a plan, and what the plan may do.

    ``importance`` scores the channels; ``threshold`` is compared with the effective gate and holds for the importance
    "gate" without a target; ``scope`` compares scores over the whole model, or takes the same share of each layer;
    ``steps`` cuts in as many rounds, fine-tuned in between; ``ignored_layers`` are patterns of modules that are not cut;
    ``round_to`` makes channel counts multiples; ``recalibrate`` is how many batches of training data the norms'
    statistics are measured on anew before fine-tuning.
    """

    importance: Named = Named(name="gate")
    scope: Literal["global", "layer"] = "global"
    steps: Annotated[int, Field(ge=1)] = 1
    threshold: Annotated[float, Field(ge=0)] = 1e-3
    constants: Literal["carrier", "fold", "keep", "drop"] = "carrier"
    min_channels: Annotated[int, Field(ge=1)] = 1
    round_to: Annotated[int, Field(ge=1)] = 1
    ignored_layers: list[str] = []
    recalibrate: Annotated[int, Field(ge=0)] = 0


class Export(Section):
    """The files that need no prunekit: which forms of the last model, in its deployed form; with ``preprocess`` each
    once more, with uint8 pictures in and maps or probabilities out; with ``int8`` an ONNX file in int8, too."""

    onnx: bool = True
    openvino: bool = False
    pt2: bool = False
    preprocess: bool = False
    int8: bool = False


class Recipe(Section):
    """All that a run needs, with every default filled in; made by :func:`prunekit.config.recipe.load`.

    ``init`` is a run whose newest model the training begins with; with ``init_weights`` "fresh" only its layout is
    taken, and the weights are drawn anew. ``baseline``: the model is also trained without decay, to be compared with.
    """

    name: Annotated[str, AfterValidator(_folder_name)]
    # Above 32 bits numpy takes no seed.
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    init: str | None = None
    init_weights: Literal["trained", "fresh"] = "trained"
    backbone: Backbone
    task: str = "saliency"
    data: Data
    baseline: bool = False
    train: SparseTraining
    decay: Decay = Decay()
    target: Target = Target()
    slim: Slim = Slim()
    finetune: FineTuning
    export: Export = Export()
    log: Literal["none", "tensorboard"] = "none"

    def dump(self) -> str:
        """The recipe as YAML, every default written out; it loads again to an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"))


def conflicts(recipe: Recipe) -> list[tuple[yaml.Path, str]]:
    """What is right by itself and wrong beside the rest: the key at fault, what is wrong and its mend."""
    found: list[tuple[yaml.Path, str]] = []
    if all(value is None for value in recipe.target.model_dump().values()):
        add = "add target.params, target.macs, target.params_ratio or target.macs_ratio"
        name = recipe.slim.importance.name
        if name != "gate":
            found.append(
                (("slim", "importance"), f"the importance {name!r} ranks channels but has no threshold; {add}")
            )
        if recipe.slim.steps > 1:
            found.append((("slim", "steps"), f"{recipe.slim.steps} steps need a size to go to; {add}"))
        if recipe.slim.scope == "layer":
            found.append(
                (("slim", "scope"), f"the same share of each layer needs a size that says how much it is; {add}")
            )
    if recipe.train.prune_every is not None and recipe.slim.scope == "layer":
        found.append(
            (
                ("train", "prune_every"),
                "cuts dead channels wherever they are, and slim.scope 'layer' the same share of each layer; drop one",
            )
        )
    if recipe.init_weights == "fresh" and recipe.init is None:
        found.append((("init_weights",), "'fresh' takes the layout of a run; name one with init=RUN"))
    distill = recipe.finetune.distill
    if distill.weight and distill.teacher == "baseline" and not recipe.baseline:
        found.append((("finetune", "distill", "teacher"), "there is no baseline; set baseline=true, or take 'dense'"))
    for stage in ("train", "finetune"):
        section: Training = getattr(recipe, stage)
        if section.sync_norms and section.compile:
            found.append(
                ((stage, "sync_norms"), f"a compiled model cannot wait for other processes; drop it or {stage}.compile")
            )
    return found


def is_same_run(held: str, now: str) -> bool:
    """Whether a run that was begun with one resolved recipe may go on with another, both as :meth:`Recipe.dump` writes
    them: they say the same, but for what becomes of steps that are not finite. (More keys than that could change and
    leave what is done as it is; but then a recipe no longer says what its run has done.)"""
    try:
        one, other = (Recipe.model_validate(yaml.parse(text).value) for text in (held, now))
    except ValueError:
        return held == now
    loose = {"train": {"on_nonfinite"}, "finetune": {"on_nonfinite"}}
    return one.model_dump(exclude=loose) == other.model_dump(exclude=loose)


# Where a name is looked up: path of the section → the table in prunekit.config.registry.
NAMED = {
    (stage, key): table
    for stage in ("train", "finetune")
    for key, table in (
        ("optimizer", "optimizers"),
        ("schedule", "schedules"),
        ("augment", "augmentations"),
        ("loss", "losses"),
    )
}
NAMED["slim", "importance"] = "importances"
REGISTRIES = {("backbone",): "backbones", ("data",): "datasets", ("decay",): "decays", **NAMED}


def section(path: yaml.Path) -> type[Section] | None:
    """The model that stands at this path, or None where there is none."""
    model: type[Section] | None = Recipe
    for key in path:
        field = model.model_fields.get(key) if model else None
        kind = field.annotation if field else None
        model = kind if isinstance(kind, type) and issubclass(kind, Section) else None
    return model


def all_keys(path: yaml.Path = ()) -> list[yaml.Path]:
    """The path of every key below ``path``, sections included, in their order."""
    found = []
    model = section(path)
    for key in model.model_fields if model else ():
        found += [(*path, key), *all_keys((*path, key))]
    return found


def default_name(path: yaml.Path) -> str | None:
    """The name that a section of :data:`REGISTRIES` has where the recipe gives none."""
    default = section(path).model_fields["name"].default
    if path in NAMED:
        default = section(path[:-1]).model_fields[path[-1]].default.name
    return default if isinstance(default, str) else None
