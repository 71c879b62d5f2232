"""Export of a run's model to files that need no prunekit: the command ``export`` and the stage export."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from prunekit import __version__
from prunekit.config.schema import Export, Recipe
from prunekit.data.datasets import DEVIATION, MEAN, ImageDataset, image_tensor, normalize, resize
from prunekit.deployment.deploy import deploy
from prunekit.deployment.export.onnx import check_onnx, export_onnx, onnx_function
from prunekit.deployment.export.openvino import check_openvino, export_openvino, import_openvino
from prunekit.deployment.export.preprocessing import add_preprocessing
from prunekit.deployment.export.pt2 import check_pt2, export_pt2
from prunekit.deployment.export.quantize import quantize_onnx
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.values import accepted
from prunekit.errors import DataError, ExportError, PrunekitError, RecipeError
from prunekit.flops import count_modules, total
from prunekit.interop.csnet import export_csnet
from prunekit.interop.pickles import write_checkpoint, write_layout
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import MODELS, load_model, newest_model, read_classes, read_plan, read_recipe
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import main_output
from prunekit.utils.progress import Reporter
from prunekit.utils.text import suggest

FORMATS = ("onnx", "openvino", "pt2", "csnet")
CALIBRATION = 64  # training images
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "pt2"}
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}


@dataclass(frozen=True)
class Variant:
    """One form in which a model is exported."""

    form: str  # one of FORMATS
    plain: bool = False  # as it was trained, instead of its deployed form
    preprocess: bool = False  # takes uint8 images and returns what the task makes of the logits
    int8: bool = False

    def path(self, name: str, is_newest: bool) -> str:
        """Return its file in the run folder: ``model.onnx`` for the result of the run, else in ``exports/``."""
        if is_newest and self == Variant("onnx"):
            return "model.onnx"
        marks = {"plain": self.plain, "image": self.preprocess, "int8": self.int8}
        return f"exports/{'-'.join([name, *(mark for mark, is_set in marks.items() if is_set)])}{_SUFFIXES[self.form]}"


def variants(wanted: Export) -> list[Variant]:
    """Return the variants that a recipe asks for."""
    forms = [form for form in _RUNTIMES if getattr(wanted, form)]
    images = [Variant(form, preprocess=True) for form in forms if wanted.preprocess]
    return [*map(Variant, forms), *images, *([Variant("onnx", int8=True)] if wanted.int8 else [])]


def export_run(
    folder: Path,
    form: str,
    console: Console,
    *,
    model: str | None = None,
    overrides: list[str] | None = None,
    **marks: bool,
) -> list[Path]:
    """Export a model of a run into its folder; return the files written.

    Args:
        folder: the run folder.
        form: "onnx", "openvino", "pt2", or "csnet" (the published form, ``exports/csnet.pth.tar`` and ``.bin``).
        console: for messages.
        model: "baseline", "dense", "slim" or "finetuned"; None for the last that the run has.
        overrides: ``data.…=…``, where the run's data have moved, or where it has none.
        **marks: ``plain``, ``preprocess``, ``int8`` of :class:`Variant`.

    Raises:
        RecipeError: there is no such form or model, or the options exclude each other.
        ExportError: the model cannot be exported, or the file computes something else.
    """
    variant = Variant(form, **marks)
    _check_options(variant, model)
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
                reporter.info(f"{path}: {name} model, {path.stat().st_size / 1000:.0f} kB")
            return written
        if form == "openvino":
            import_openvino()
        with reporter.spinner("export"):
            return Exporter(RunContext(recipe, reporter), run, name).write(variant)


def _check_options(variant: Variant, model: str | None) -> None:
    form = variant.form
    if form not in FORMATS:
        raise RecipeError(f"--format {form}: no such form{suggest(form, FORMATS)} {', '.join(FORMATS)}")
    if model is not None and model not in MODELS:
        raise RecipeError(f"--model {model}: there are {', '.join(MODELS)}")
    given = [option for option in ("plain", "preprocess", "int8") if getattr(variant, option)]
    if form == "csnet" and given:
        raise RecipeError(f"--format csnet is the published form, without --{given[0]}; leave that out")
    if variant.int8 and form != "onnx":
        raise RecipeError(
            f"--int8 needs --format onnx, not {form}: ONNX Runtime quantizes, and OpenVINO reads its files"
        )
    if variant.int8 and variant.preprocess:
        raise RecipeError("--int8 and --preprocess exclude each other; preprocess the images yourself, or use float32")


def with_data(run: RunDir, overrides: list[str]) -> Recipe:
    """Return the recipe of a run with changed data settings; RecipeError for keys that are not below ``data``."""
    if not overrides:
        return read_recipe(run)
    from prunekit.config.recipe import load

    for override in overrides:
        if not override.startswith(("data.", "data=")):
            raise RecipeError(f"{override}: only keys below data can be set here, such as data.root=FOLDER")
    run.read_text(RECIPE)  # verifies its checksum
    return load(run.path / RECIPE, overrides, untrusted=True)


@dataclass
class Exporter:
    """Exports one model of a run, one of ``MODELS``; what several files need is made once.

    Args:
        model: the model itself, where it is not in the run folder.
        measure: time the deployed forms and take the fastest.
    """

    context: RunContext
    run: RunDir
    name: str
    model: nn.Module | None = None
    measure: bool = True
    records: dict[str, Any] = field(default_factory=dict)  # runtime → what deploy did
    shapes: dict[Variant, list[str | int]] = field(default_factory=dict)  # of the input, with names for free axes

    def __post_init__(self) -> None:
        self.network = without_subnormals(self.model or load_model(self.run, self.name, self.context.recipe))
        self.size = self.context.recipe.data.size
        self.images, self.source = self._check_images()
        self.example = self._prepare(self.images, (self.size, self.size))
        self.form = cache(self._form)
        self.onnx = cache(self._onnx)

    def write(self, variant: Variant) -> list[Path]:
        """Export one variant (for OpenVINO two files), compare it with the model, and only then write it."""
        is_newest = self.name == newest_model(self.run)
        path = variant.path(self.name, is_newest)
        if variant.int8:
            return self._write_int8(path)
        model, example, inputs = self._parts(variant)
        reference = self.network  # as it was trained, not its deployed form
        if variant.preprocess:
            reference = add_preprocessing(self.network, self.context.task, self.size)
        if variant.form == "pt2":
            files = {path: export_pt2(model, example, partial(self._metadata, variant))}
            check = partial(check_pt2, files[path])
        elif variant.form == "onnx":
            files = {path: self.onnx(variant)}
            check = partial(check_onnx, files[path])
        else:
            file = self.onnx(variant)
            xml, weights = export_openvino(file, self._metadata(variant, self.shapes[variant]))
            files = {path: xml, path.removesuffix(".xml") + ".bin": weights}
            check = partial(check_openvino, xml, weights)
        difference = check(reference, self._usable(reference, inputs, variant), path)
        written = [self.run.write_bytes(name, data) for name, data in files.items()]
        if is_newest and variant == Variant(variant.form):
            record = self.records[_RUNTIMES[variant.form]]
            self._update_summary({"path": path, "max_abs_diff": difference, "deployed": record})
        size = sum(map(len, files.values())) / 1000
        padding = 0 if variant.plain else self.records[_RUNTIMES[variant.form]].get("padded_bytes", 0) / 1000
        unit = " levels" if variant.preprocess and self.context.task.predicts_images else ""
        fixed = self._fixed_sides(variant)
        self.context.reporter.info(
            f"{self.run.path / path}: {self.name} model, {self._form_name(variant)}, {size:.0f} kB"
            + (f" ({size - padding:.0f} kB without the padding of channels)" if padding >= 0.5 else "")
            + f"; largest difference {difference:.1e}{unit} on {self.source}"
            + (f"; only for inputs of {fixed}, since the model or the format takes no other size" if fixed else "")
        )
        return written

    def quantize(self, images: int) -> tuple[bytes, bytes, int]:
        """Return the ONNX file, its int8 form, and how many training images, at most ``images``, calibrated it."""
        try:
            train = self.context.dataset("train")
        except PrunekitError as error:
            raise ExportError(f"int8 is calibrated on the recipe's data: {error}") from error
        rows = np.unique(np.linspace(0, len(train) - 1, min(images, len(train))).astype(int))
        batches = [self._prepare([train.image(int(row))], (self.size, self.size)).numpy() for row in rows]
        variant = Variant("onnx", int8=True)
        source = export_onnx(self.form("int8", False), self.example, partial(self._metadata, variant))
        return source, quantize_onnx(source, batches, self._metadata(variant, self.shapes[variant])), len(batches)

    def _write_int8(self, path: str) -> list[Path]:
        val = self.context.dataset("val")
        source, file, calibration = self.quantize(CALIBRATION)
        # Both in ONNX Runtime, so that only the precision differs.
        metrics = {"float32": self._evaluate(source, val, "float32"), "int8": self._evaluate(file, val, "int8")}
        written = self.run.write_bytes(path, file)
        self._update_summary({"int8": {"path": path, "images": len(val), "calibration": calibration, **metrics}})
        change = compared(metrics["float32"], metrics["int8"])
        self.context.reporter.info(
            f"{written}: {self.name} model in int8, {len(file) / 1000:.0f} kB; calibrated on {calibration} "
            f"training images; on {len(val)} validation images {change}"
        )
        return [written]

    def _evaluate(self, file: bytes, dataset: ImageDataset, title: str) -> dict[str, float]:
        with closing(self.context.reporter.progress_bar(f"evaluate {title}")) as bar:
            return self.context.task.evaluate(Computed(onnx_function(file)), dataset, self.size, 16, bar).metrics

    def _form(self, runtime: str, plain: bool) -> nn.Module:
        if plain:
            return self.network
        model, record = deploy(self.network, self.example, runtime=runtime, measure=self.measure)
        said = self.records[runtime] = record.to_json()
        if said.get("fallback_reason"):
            self.context.reporter.info(f"exported as it was trained, not deployed: {said['fallback_reason']}")
        for reason in said.get("rejected", ()):
            self.context.reporter.debug(f"deployed form without {reason}")
        return model

    def _form_name(self, variant: Variant) -> str:
        runtime = "int8" if variant.int8 else _RUNTIMES[variant.form]
        plain = variant.plain or self.records.get(runtime, {}).get("fallback_reason")
        return "plain" if plain else "deployed"

    def _usable(self, reference: nn.Module, inputs: list[Tensor], variant: Variant) -> list[Tensor]:
        """Return the inputs of the comparison that model and file take."""
        shape = self.shapes.get(variant, ["free"] * inputs[0].dim())
        fitting = [
            batch
            for batch in inputs
            if all(isinstance(free, str) or free == length for free, length in zip(shape, batch.shape, strict=True))
        ]
        return [batch for (batch,) in accepted(reference, fitting)] or inputs[:1]

    def _fixed_sides(self, variant: Variant) -> str:
        """Return height × width if the file takes no others, else an empty text."""
        first = 1 if variant.preprocess else 2
        sides = self.shapes.get(variant, [])[first : first + 2]
        return "" if any(isinstance(side, str) for side in sides) else "×".join(map(str, sides))

    def _parts(self, variant: Variant) -> tuple[nn.Module, Tensor, list[Tensor]]:
        """Return what is exported, an example input, and the inputs of the comparison."""
        model = self.form(_RUNTIMES[variant.form], variant.plain)
        side = self.size
        if variant.preprocess:
            model = add_preprocessing(model, self.context.task, side)
            inputs = [torch.from_numpy(image)[None] for image in self.images]
            pair = [resize(image_tensor(image), (side + 9, side - 4)).round() for image in self.images]
            inputs.append(torch.cat(pair).permute(0, 2, 3, 1).to(torch.uint8))
            return model, inputs[-1], inputs
        shapes = [(1, side, side), (2, side, side), (2, side - 3, side - 5), (1, side + 13, side + 6)]
        return model, self.example, [self._prepare(self.images[:n], (height, width)) for n, height, width in shapes]

    def _onnx(self, variant: Variant) -> bytes:
        model, example, _ = self._parts(variant)
        return export_onnx(model, example, partial(self._metadata, variant))

    def _check_images(self) -> tuple[list[np.ndarray], str]:
        try:
            dataset = self.context.dataset("val")
            images = [dataset.image(index) for index in range(min(2, len(dataset)))]
            if not images:
                raise DataError("the validation set is empty")
            return (images * 2)[:2], "validation images"
        except PrunekitError as error:
            self.context.reporter.debug(f"export: checked on noise: {error}")
            shapes = [(self.size + 11, self.size, 3), (self.size, self.size + 30, 3)]
            draw = np.random.default_rng(0).integers
            return [draw(0, 256, shape, np.uint8) for shape in shapes], "noise (the run's data cannot be read)"

    @staticmethod
    def _prepare(images: list[np.ndarray], size: tuple[int, int]) -> Tensor:
        return normalize(torch.cat([resize(image_tensor(image), size) for image in images]))

    def _metadata(self, variant: Variant, shape: list[str | int]) -> dict[str, str]:
        """Return what a file says about itself; of paths only the last part, since they describe this machine."""
        self.shapes[variant] = shape
        plan = read_plan(self.run, self.name)
        image = {"type": "uint8", "shape": shape, "values": "RGB, 0 to 255"}
        tensor = {"type": "float32", "shape": shape, "values": "RGB, normalized as in preprocessing"}
        metadata: dict[str, Any] = {
            "prunekit": __version__,
            "model": self.name,
            "form": self._form_name(variant),
            "precision": "int8" if variant.int8 else "float32",
            "task": self.context.recipe.task,
            "input": image if variant.preprocess else tensor,
            "preprocessing": {
                "inside": variant.preprocess,
                "size": [self.size, self.size],
                "resize": "bilinear, half-pixel, no anti-aliasing",
                "scale": 1 / 255,
                "mean": list(MEAN),
                "deviation": list(DEVIATION),
                "colours": "RGB",
            },
            **total(count_modules(self.network, (3, self.size, self.size))[0]),
            "macs_size": [self.size, self.size],
            "recipe": without_paths(self.context.recipe.model_dump(mode="json")),
            "plan": plan and without_paths(plan.to_json()),
            "classes": read_classes(self.run) or None,
        }
        return {
            key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
            for key, value in metadata.items()
            if value is not None
        }

    def _update_summary(self, entry: dict[str, Any]) -> None:
        export = self.run.read_json("summary.json").get("export", {})
        if entry.get("path", export.get("path")) != export.get("path"):
            export = {}
        self.run.update_summary("export", {**export, **entry})


class Computed(nn.Module):
    def __init__(self, compute: Callable[[np.ndarray], np.ndarray | list[np.ndarray]]):
        super().__init__()
        self.compute = compute

    def forward(self, image: Tensor) -> Tensor:
        return torch.from_numpy(main_output(self.compute(image.contiguous().numpy())))


def compared(before: dict[str, float], after: dict[str, float]) -> str:
    """Return metrics before and after a change, as text."""
    return "  ".join(f"{key} {value:.4f} → {after[key]:.4f}" for key, value in before.items())


LIBRARIES = ("timm/", "torchvision/", "transformers/")  # whose models are named, not paths


def without_paths(value: Any) -> Any:
    """Return JSON data in which texts that are paths have only their last part, without a checksum after it."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and not value.startswith(LIBRARIES):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2].partition("#")[0]
    return value
