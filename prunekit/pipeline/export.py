"""A run's model as files that need no prunekit: what ``prunekit export`` and a run's export stage do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from prunekit import __version__
from prunekit.config.registry import closest_match
from prunekit.config.schema import Export, Recipe
from prunekit.data.datasets import DEVIATION, MEAN, ImageDataset, image_tensor, normalize, resize
from prunekit.deployment.deploy import deploy
from prunekit.deployment.export.onnx import check_onnx, export_onnx, onnx_function
from prunekit.deployment.export.openvino import check_openvino, export_openvino, import_openvino
from prunekit.deployment.export.preprocessing import add_preprocessing
from prunekit.deployment.export.pt2 import check_pt2, export_pt2
from prunekit.deployment.export.quantize import quantize_onnx
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.errors import DataError, ExportError, PrunekitError, RecipeError
from prunekit.flops import count_modules, total
from prunekit.interop.csnet import export_csnet
from prunekit.interop.pickles import write_checkpoint, write_layout
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import MODELS, load_model, newest_model, plan_of, read_classes, read_recipe
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.run_dir import RunDir
from prunekit.utils.progress import Reporter

FORMATS = ("onnx", "openvino", "pt2", "csnet")
CALIBRATION = 64  # training images
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "pt2"}
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}


@dataclass(frozen=True)
class Variant:
    """What is to be written.

    Attributes:
        form: "onnx", "openvino" or "pt2".
        plain: the model as it was trained, and not its deployed form.
        preprocess: uint8 pictures in, and what the task makes of the logits out.
        int8: quantised.
    """

    form: str
    plain: bool = False
    preprocess: bool = False
    int8: bool = False

    def path(self, name: str, is_newest: bool) -> str:
        """Where it lies in the run folder: ``model.onnx`` is the run's result, all others are ``exports/…``."""
        if is_newest and self == Variant("onnx"):
            return "model.onnx"
        marks = {"plain": self.plain, "image": self.preprocess, "int8": self.int8}
        return f"exports/{'-'.join([name, *(mark for mark, given in marks.items() if given)])}{_SUFFIXES[self.form]}"


def variants(wanted: Export) -> list[Variant]:
    """What a recipe asks for: each form, and beside it the variants."""
    forms = [form for form in _RUNTIMES if getattr(wanted, form)]
    images = [Variant(form, preprocess=True) for form in forms if wanted.preprocess]
    return [*map(Variant, forms), *images, *([Variant("onnx", int8=True)] if wanted.int8 else [])]


def export_run(
    folder: Path,
    form: str,
    console: Console,
    *,
    model: str | None = None,
    plain: bool = False,
    preprocess: bool = False,
    int8: bool = False,
    overrides: list[str] | None = None,
) -> list[Path]:
    """Write a run's model in another form, into the run folder.

    Args:
        form: "onnx", "openvino", "pt2", or "csnet" (the published form, ``exports/csnet.pth.tar`` and ``.bin``).
        model: "baseline", "dense", "slim" or "finetuned"; None for the last that the run has.
        plain, preprocess, int8: as for :class:`Variant`.
        overrides: ``data.…=…``, where the run's data are elsewhere now, or where it has none.

    Returns:
        the files written.

    Raises:
        RecipeError: no such form or model, or options that do not go together.
        ExportError: the model has no such form, or the file does not compute what the model does.
    """
    if form not in FORMATS:
        near = closest_match(form, list(FORMATS))
        raise RecipeError(
            f"--format {form}: no such form" + (f", did you mean {near!r}?" if near else ";") + f" {', '.join(FORMATS)}"
        )
    if model is not None and model not in MODELS:
        raise RecipeError(f"--model {model}: there are {', '.join(MODELS)}")
    given = [name for name, on in (("plain", plain), ("preprocess", preprocess), ("int8", int8)) if on]
    if form == "csnet" and given:
        raise RecipeError(f"--format csnet is the published form, without --{given[0]}; leave that out")
    if int8 and form != "onnx":
        raise RecipeError(
            f"--int8 is made by ONNX Runtime's tools, for --format onnx; OpenVINO reads that too ({form})"
        )
    if int8 and preprocess:
        raise RecipeError("--int8 and --preprocess exclude each other; prepare the images outside, or stay in float32")
    reporter = Reporter(console)
    with RunDir.open(folder, write=True) as run:
        recipe = with_data(run, overrides or [])
        name = model or newest_model(run)
        if form == "csnet":
            state, layout = export_csnet(load_model(run, name, recipe))
            written = [
                run.write_bytes("exports/csnet.pth.tar", write_checkpoint(state)),
                run.write_bytes("exports/csnet.bin", write_layout(layout.dump())),
            ]
            for path in written:
                reporter.info(f"{path}: the {name} model, {path.stat().st_size / 1000:.0f} kB")
            return written
        if form == "openvino":
            import_openvino()
        with reporter.spinner("export"):
            return Exporter(RunContext(recipe, reporter), run, name).write(Variant(form, plain, preprocess, int8))


def with_data(run: RunDir, overrides: list[str]) -> Recipe:
    """The recipe of a run, with other data.

    Raises:
        RecipeError: a key is not one of the data, or as ``recipe.load``.
    """
    if not overrides:
        return read_recipe(run)
    from prunekit.config.recipe import load

    for override in overrides:
        if not override.startswith(("data.", "data=")):
            raise RecipeError(f"{override}: only keys of the data can be set here, such as data.root=FOLDER")
    run.read_text(RECIPE)  # whose checksum is held against it
    return load(run.path / RECIPE, overrides, untrusted=True)


@dataclass
class Exporter:
    """Writes files of one model of a run; what several of them need is made once.

    Args:
        name: "baseline", "dense", "slim" or "finetuned".
    """

    work: RunContext
    run: RunDir
    name: str
    records: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = without_subnormals(load_model(self.run, self.name, self.work.recipe))
        self.size = self.work.recipe.data.size
        self.images, self.source = self._images()
        self.example = self._tensors(2, (self.size, self.size))
        self.form = cache(self._form)
        self.onnx = cache(self._onnx)

    def write(self, variant: Variant) -> list[Path]:
        """Make one file (of OpenVINO two), hold it against the model, and only then write it.

        Raises:
            ExportError: as for :func:`export_run`.
        """
        is_newest = self.name == newest_model(self.run)
        path = variant.path(self.name, is_newest)
        if variant.int8:
            return self._int8(path)
        model, example, inputs = self._parts(variant)
        # What is compared with is the model as it was trained, not its deployed form.
        wanted = add_preprocessing(self.network, self.work.task, self.size) if variant.preprocess else self.network
        if variant.form == "pt2":
            files = {path: export_pt2(model, example, self._metadata(variant))}
            gap = check_pt2(files[path], wanted, inputs, path)
        elif variant.form == "onnx":
            files = {path: self.onnx(variant)}
            gap = check_onnx(files[path], wanted, inputs, path)
        else:
            xml, weights = export_openvino(self.onnx(variant), self._metadata(variant))
            files = {path: xml, path.removesuffix(".xml") + ".bin": weights}
            gap = check_openvino(xml, weights, wanted, inputs, path)
        written = [self.run.write_bytes(name, data) for name, data in files.items()]
        if is_newest and variant == Variant(variant.form):
            self._note({"path": path, "max_abs_diff": gap, "deployed": self.records[_RUNTIMES[variant.form]]})
        size = sum(map(len, files.values())) / 1000
        unit = " levels" if variant.preprocess and self.work.task.predicts_images else ""
        self._say(
            f"{self.run.path / path}: {self.name} model, {'plain' if variant.plain else 'deployed'}, {size:.0f} kB; "
            f"differs by at most {gap:.1e}{unit} on {self.source}"
        )
        return written

    def _int8(self, path: str) -> list[Path]:
        try:
            train, val = self.work.pairs("train"), self.work.pairs("val")
        except PrunekitError as error:
            raise ExportError(f"int8 is calibrated on the recipe's data: {error}") from error
        places = np.unique(np.linspace(0, len(train) - 1, min(CALIBRATION, len(train))).astype(int))
        batches = [self._prepared([train.image(int(i))], (self.size, self.size)).numpy() for i in places]
        source = export_onnx(self.form("int8", False), self.example)
        file = quantize_onnx(source, batches, self._metadata(Variant("onnx", int8=True)))
        metrics = {}
        for title, one in (("float32", source), ("int8", file)):
            # The float32 file, too, in ONNX Runtime: what differs is the precision alone.
            metrics[title] = self._evaluate(onnx_function(one), val, title)
        lost = {key: [value, metrics["int8"][key]] for key, value in metrics["float32"].items()}
        written = self.run.write_bytes(path, file)
        note = {"path": path, "images": len(val), "calibration": len(batches), **metrics}
        self._note({"int8": note})
        change = "  ".join(f"{key} {before:.4f} → {after:.4f}" for key, (before, after) in lost.items())
        self._say(
            f"{written}: {self.name} model in int8, {len(file) / 1000:.0f} kB; calibrated on {len(batches)} "
            f"training images; on {len(val)} validation images {change}"
        )
        return [written]

    def _evaluate(
        self, compute: Callable[[np.ndarray], np.ndarray], pairs: ImageDataset, title: str
    ) -> dict[str, float]:
        counter = self.work.reporter.progress_bar(f"evaluate {title}")
        try:
            return self.work.task.evaluate(Computed(compute), pairs, self.size, 16, counter).metrics
        finally:
            counter.close()

    def _form(self, runtime: str, plain: bool) -> nn.Module:
        if plain:
            return self.network
        model, record = deploy(self.network, self.example, runtime=runtime)
        self.records[runtime] = record.to_json()
        return model

    def _parts(self, variant: Variant) -> tuple[nn.Module, Tensor, list[Tensor]]:
        """What is exported, an example for it, and what it is checked on."""
        model = self.form(_RUNTIMES[variant.form], variant.plain)
        side = self.size
        if variant.preprocess:
            model = add_preprocessing(model, self.work.task, side)
            inputs = [torch.from_numpy(image)[None] for image in self.images[:2]]
            pair = [resize(image_tensor(image), (side + 9, side - 4)).round() for image in self.images[:2]]
            inputs.append(torch.cat(pair).permute(0, 2, 3, 1).to(torch.uint8))
            return model, inputs[-1], inputs
        shapes = [(1, side, side), (2, side, side), (2, side - 3, side - 5), (1, side + 13, side + 6)]
        return model, self.example, [self._tensors(n, (h, w)) for n, h, w in shapes]

    def _onnx(self, variant: Variant) -> bytes:
        model, example, _ = self._parts(variant)
        return export_onnx(model, example, self._metadata(variant) if variant.form == "onnx" else None)

    def _images(self) -> tuple[list[np.ndarray], str]:
        """Two pictures to check on, and what they are."""
        try:
            pairs = self.work.pairs("val")
            images = [pairs.image(index) for index in range(min(2, len(pairs)))]
            if not images:
                raise DataError("the validation set is empty")
            return (images * 2)[:2], "validation images"
        except PrunekitError as error:
            self.work.reporter.debug(f"export: checked on noise: {error}")
            noise = np.random.default_rng(0)
            shapes = [(self.size + 11, self.size, 3), (self.size, self.size + 30, 3)]
            return [
                noise.integers(0, 256, shape, np.uint8) for shape in shapes
            ], "noise (the run's data cannot be read)"

    def _tensors(self, count: int, size: tuple[int, int]) -> Tensor:
        return self._prepared(self.images[:count], size)

    @staticmethod
    def _prepared(images: list[np.ndarray], size: tuple[int, int]) -> Tensor:
        return normalize(torch.cat([resize(image_tensor(image), size) for image in images]))

    def _metadata(self, variant: Variant) -> dict[str, str]:
        """What a file says of itself; nothing of this machine: of paths no more than the last part is told."""
        plan = plan_of(self.run, self.name) if self.run.has("plan.json") or self.name in ("baseline", "dense") else None
        sizes = total(count_modules(self.network, (3, self.size, self.size))[0])
        picture = {"type": "uint8", "shape": ["N", "H", "W", 3], "values": "RGB, 0 to 255"}
        tensor = {"type": "float32", "shape": ["N", 3, "H", "W"], "values": "RGB, normalised as in preprocessing"}
        said: dict[str, Any] = {
            "prunekit": __version__,
            "model": self.name,
            "form": "plain" if variant.plain else "deployed",
            "precision": "int8" if variant.int8 else "float32",
            "task": self.work.recipe.task,
            "input": picture if variant.preprocess else tensor,
            "preprocessing": {
                "inside": variant.preprocess,
                "size": [self.size, self.size],
                "resize": "bilinear, half-pixel, no anti-aliasing",
                "scale": 1 / 255,
                "mean": list(MEAN),
                "deviation": list(DEVIATION),
                "colours": "RGB",
            },
            **sizes,
            "macs_size": [self.size, self.size],
            "recipe": without_paths(self.work.recipe.model_dump(mode="json")),
            "plan": None if plan is None else without_paths(plan.to_json()),
            "classes": read_classes(self.run) or None,
        }
        return {
            key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
            for key, value in said.items()
            if value is not None
        }

    def _note(self, part: dict[str, Any]) -> None:
        held = self.run.read_json("summary.json").get("export", {})
        if part.get("path", held.get("path")) != held.get("path"):
            held = {}
        self.run.update_summary("export", {**held, **part})

    def _say(self, text: str) -> None:
        self.work.reporter.info(text)


class Computed(nn.Module):
    """A function of arrays where a model is wanted."""

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray]):
        super().__init__()
        self.compute = compute

    def forward(self, image: Tensor) -> Tensor:
        return torch.from_numpy(self.compute(image.contiguous().numpy()))


def without_paths(value: Any) -> Any:
    """JSON in which a text that is a path has only its last part, and no checksum behind it."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and not value.startswith(("timm/", "torchvision/")):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2].partition("#")[0]
    return value
