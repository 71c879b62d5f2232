"""The stages of a run, from top to bottom. Each writes its result into the run folder and can be picked up there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn

from prunekit import registry
from prunekit.counting import count, counters, layer_rows, total
from prunekit.data.images import write_map
from prunekit.data.pairs import PairSet, Tensors, load_tensors, normalise
from prunekit.deploy.onnx import check_onnx, export_onnx
from prunekit.environment import environment
from prunekit.errors import PrunekitError, RecipeError
from prunekit.loading import MODELS, build_dense, input_shape, load_model, read_plan, save_model
from prunekit.optimizers import shares
from prunekit.plan import Builder, Group, Plan, digest
from prunekit.progress import Reporter
from prunekit.pruning.decay import Decay, NoDecay
from prunekit.pruning.extract import dead_channels, extract
from prunekit.pruning.groups import find_groups
from prunekit.pruning.life import scores
from prunekit.pruning.proof import difference, proof_inputs
from prunekit.pruning.slim import slim
from prunekit.reporting import report
from prunekit.rundir import STAGES, RunDir, holds_run
from prunekit.schema import Recipe, Training
from prunekit.tasks.reference import reference
from prunekit.training import Job, fit

GALLERY = 16  # fixed validation images
EXTREMES = 4  # best and worst ones beside them
PROOF_IMAGES = 8


def run_recipe(
    recipe: Recipe,
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start_from: str | None = None,
) -> Path:
    """Run a recipe from its first stage, or from where its folder stands, to the last.

    Args:
        recipe: from ``recipe.load``.
        out: the run folder.
        console: for progress and the report.
        resume: go on with the run that the folder holds.
        overwrite: replace it.
        start_from: with ``resume``, do this stage and the later ones again.

    Raises:
        PrunekitError: what went wrong; the folder then says how far the run came.
    """
    pending = _pending(out, resume, start_from)
    work = Work(recipe, Reporter(console))
    # Before the folder is made, so that a wrong recipe or a broken image leaves nothing behind.
    work.rehearse(load=any(stage in pending for stage in ("train", "finetune")))
    with RunDir.start(out, recipe.dump(), environment(recipe.seed), resume=resume, overwrite=overwrite) as run:
        work.reporter.log = out / "run.log"
        if start_from is not None:
            run.restart_from(start_from)
        for stage in STAGES:
            if run.is_done(stage):
                work.reporter.say(f"{stage}: done before")
                continue
            run.begin(stage)
            began = time.perf_counter()
            try:
                _STAGES[stage](work, run)
            finally:
                run.add_seconds(stage, round(time.perf_counter() - began, 3))
            run.end(stage)
        run.finish()
    report([out], None, console)
    return out


class Work:
    """What the stages share: the recipe, its data, its task."""

    def __init__(self, recipe: Recipe, reporter: Reporter):
        self.recipe = recipe
        self.reporter = reporter
        self.task = registry.tasks.get(recipe.task)()
        self.device = PartialState().device
        self.shape = input_shape(recipe)
        self._pairs: dict[str, PairSet] = {}
        self._tensors: dict[str, Tensors] = {}

    def pairs(self, split: str) -> PairSet:
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
            taken = registry.parameters(builder)
            keys = {key: value for key, value in given.items() if key in taken and value is not None}
            self._pairs[split] = builder(split, **keys, **data.options)
        return self._pairs[split]

    def tensors(self, split: str) -> Tensors:
        """The set in memory, at the recipe's size."""
        if split not in self._tensors:
            self._tensors[split] = load_tensors(self.pairs(split), self.recipe.data.size)
        return self._tensors[split]

    def example(self) -> Tensor:
        """A batch of normalised validation images, (N, 3, S, S), for tracing, proofs and checks."""
        return normalise(self.tensors("val").images[:PROOF_IMAGES])

    def rehearse(self, load: bool) -> None:
        """Build everything once that the recipe names, so that what is wrong is said before anything is written.

        Raises:
            PrunekitError: what is wrong.
        """
        model = build_dense(self.recipe)
        for split in ("train", "val"):
            self.pairs(split)
        for split in ("train", "val") if load else ():
            self.tensors(split)
        for stage in ("train", "finetune"):
            section: Training = getattr(self.recipe, stage)
            tries: list[tuple[str, Callable[[], Any]]] = [
                (
                    "optimizer",
                    lambda s=section: _named(registry.optimizers, s.optimizer)(shares(model, s.lr, s.gate_lr)),
                ),
                ("schedule", lambda s=section: _named(registry.schedules, s.schedule)(0.5)),
                (
                    "augment",
                    lambda s=section: _named(registry.augmentations, s.augment)(
                        torch.zeros(1, 3, 8, 8),
                        torch.zeros(1, 1, 8, 8),
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

    def decay(self, model: nn.Module, groups: list[Group]) -> Decay:
        section = self.recipe.decay
        return registry.decays.get(section.name)(model, groups, section.weight, **section.options)

    def train(self, run: RunDir, stage: str, model: nn.Module, groups: list[Group], decay: Decay) -> None:
        model.to(self.device)
        job = Job(
            stage=stage,
            section=getattr(self.recipe, stage),
            task=self.task,
            train=self.tensors("train"),
            val=self.tensors("val"),
            seed=self.recipe.seed,
            run=run,
            reporter=self.reporter,
            device=self.device,
            threshold=self.recipe.slim.threshold,
        )
        fit(model, job, groups, decay)
        model.cpu().eval()

    def measure(self, run: RunDir, part: str, model: nn.Module) -> None:
        """Write a model's size into its part of the summary."""
        counts, unknown = count(model, self.shape)
        held = run.read_json("summary.json").get(part, {})
        run.update_summary(part, {**held, **total(counts)})
        for name in unknown:
            self.reporter.say(f"not counted: {name} ({type(model.get_submodule(name)).__name__})")


def train_stage(work: Work, run: RunDir) -> None:
    model = build_dense(work.recipe)
    groups = find_groups(model, work.example())
    run.update_summary("skipped", {split: work.pairs(split).skipped for split in ("train", "val")})
    work.train(run, "train", model, groups, work.decay(model.to(work.device), groups))
    save_model(run, "dense", model)
    work.measure(run, "dense", model)


def extract_stage(work: Work, run: RunDir) -> None:
    recipe = work.recipe
    model = load_model(run, "dense", recipe)
    groups = find_groups(model, work.example())
    plan = extract(model, groups, recipe.slim.threshold, recipe.slim.min_channels)
    cut = sum(map(len, dead_channels(groups, plan).values()))
    of = sum(group.channels for group in groups if group.reason is None)
    work.reporter.say(f"extract: {cut} of {of} channels are dead at threshold {recipe.slim.threshold:g}")
    if not cut:
        work.reporter.say(
            f"nothing to cut: the smallest effective gate is {_smallest(model, groups):.3g}; "
            "raise decay.weight or slim.threshold, or train longer"
        )
    _write_plan(run, recipe, plan)


def slim_stage(work: Work, run: RunDir) -> None:
    recipe = work.recipe
    dense = load_model(run, "dense", recipe)
    example = work.example()
    rebuilt, proof = slim(dense, read_plan(run), example, constants=recipe.slim.constants)
    _write_plan(run, recipe, proof.plan)
    save_model(run, "slim", rebuilt)
    work.measure(run, "slim", rebuilt)
    run.update_summary("proof", proof.to_json())
    largest, mean = difference(dense, rebuilt, [example])
    run.update_summary("drift", {"max_abs_diff": largest, "mean_abs_diff": mean})
    summary = run.read_json("summary.json")
    kept = sum(len(k) if isinstance(k, list) else k for k in proof.plan.groups.values())
    of = sum(group.channels for group in find_groups(dense, example) if group.reason is None)
    run.update_summary(
        "kept",
        {
            "channels": kept,
            "of": of,
            "params_ratio": summary["slim"]["params"] / summary["dense"]["params"],
            "macs_ratio": summary["slim"]["macs"] / summary["dense"]["macs"],
        },
    )
    sides = {name: counters(model, work.shape) for name, model in (("dense", dense), ("slim", rebuilt))}
    rows = {
        "format": 1,
        "size": list(work.shape[1:]),
        "layers": layer_rows(dense, rebuilt, work.shape),
        "counters": {
            side: {name: {k: v for k, v in one.items() if k != "modules"} for name, one in by.items()}
            for side, by in sides.items()
        },
    }
    run.write_json("layers.json", rows)
    given = f", {proof.given_back} channels given back" if proof.given_back else ""
    work.reporter.say(
        f"slim: {kept} of {of} channels kept{given}; proof holds: largest difference {proof.max_abs_diff:.1e} "
        f"(tolerance {proof.tolerance:.0e}); drift {largest:.3g}"
    )


def finetune_stage(work: Work, run: RunDir) -> None:
    model = load_model(run, "slim", work.recipe)
    groups = find_groups(model, work.example())
    work.train(run, "finetune", model, groups, NoDecay(model, groups))
    save_model(run, "finetuned", model)
    work.measure(run, "finetuned", model)


def evaluate_stage(work: Work, run: RunDir) -> None:
    recipe, pairs = work.recipe, work.pairs("val")
    models = {name: load_model(run, name, recipe).to(work.device) for name in MODELS}
    curves, worst = {}, []
    for name, model in models.items():
        counter = work.reporter.counter(f"evaluate {name}")
        try:
            result = work.task.evaluate(model, pairs, recipe.data.size, 4 * recipe.train.batch_size, counter)
        finally:
            counter.close()
        run.update_summary(name, {**run.read_json("summary.json")[name], "metrics": result.metrics})
        curves[name] = result.curves
        worst = result.per_image_mae
        work.reporter.say(f"evaluate: {name:9} " + "  ".join(f"{k} {v:.4f}" for k, v in result.metrics.items()))
    run.write_json("curves.json", curves)
    found = reference(pairs)
    run.update_summary("reference", found)
    best = max(found, key=lambda key: found[key]["max_f"])
    work.reporter.say(f"evaluate: best trivial predictor: {best}, max_f {found[best]['max_f']:.4f}")
    run.update_summary("skipped", {split: work.pairs(split).skipped for split in ("train", "val")})
    _gallery(work, run, models, np.argsort(worst, kind="stable"))


def export_stage(work: Work, run: RunDir) -> None:
    if not work.recipe.export.onnx:
        run.remove_summary("export")
        return
    model = load_model(run, "finetuned", work.recipe)
    example = work.example()
    file = export_onnx(model, example)
    gap = check_onnx(file, model, [example[:1], *[batch[:2] for batch in proof_inputs(model, example)]])
    run.write_bytes("model.onnx", file)
    run.update_summary("export", {"path": "model.onnx", "max_abs_diff": gap})
    work.reporter.say(f"export: model.onnx, {len(file) / 1000:.0f} kB; largest difference {gap:.1e}")


def report_stage(work: Work, run: RunDir) -> None:
    """The report itself is printed at the end, when the run is complete."""


_STAGES: dict[str, Callable[[Work, RunDir], None]] = {
    "train": train_stage,
    "extract": extract_stage,
    "slim": slim_stage,
    "finetune": finetune_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
    "report": report_stage,
}


def _pending(out: Path, resume: bool, start_from: str | None) -> tuple[str, ...]:
    """The stages that will run."""
    if start_from is not None and start_from not in STAGES:
        near = registry.nearest(start_from, list(STAGES))
        raise RecipeError(
            f"--from {start_from}: no such stage"
            + (f", did you mean {near!r}?" if near else "")
            + f" ({', '.join(STAGES)})"
        )
    if not (resume and holds_run(out)):
        if start_from not in (None, STAGES[0]):
            raise PrunekitError(f"--from {start_from} needs a run that came so far, and {out} holds none")
        return STAGES
    done = RunDir.open(out).done
    first = STAGES.index(start_from) if start_from else len(STAGES)
    return tuple(stage for index, stage in enumerate(STAGES) if index >= first or stage not in done)


def _named(table: registry.Registry, named: Any) -> Callable[..., Any]:
    return lambda *args: table.get(named.name)(*args, **named.options)


def _write_plan(run: RunDir, recipe: Recipe, plan: Plan) -> None:
    backbone = recipe.backbone
    plan.builder = Builder(name=backbone.name, options=backbone.options, file=backbone.file)
    plan.input = list(input_shape(recipe))
    plan.recipe_hash = digest(recipe.model_dump(mode="json"))
    plan.dense_hash = run.checksum("dense/model.safetensors")[:16]
    run.write_json("plan.json", plan.to_json())


def _smallest(model: nn.Module, groups: list[Group]) -> float:
    return min((float(scores(model, group).min()) for group in groups if group.reason is None), default=float("inf"))


def _gallery(work: Work, run: RunDir, models: dict[str, nn.Module], by_mae: np.ndarray) -> None:
    pairs = work.pairs("val")
    shown = {int(i): "fixed" for i in np.linspace(0, len(pairs) - 1, min(GALLERY, len(pairs))).astype(int)}
    kinds = {**{int(i): "best" for i in by_mae[:EXTREMES]}, **{int(i): "worst" for i in by_mae[::-1][:EXTREMES]}}
    entries = []
    for index in sorted({*shown, *kinds}):
        image, mask = pairs.pair(index)
        pictures = {"image": image, "truth": mask}
        pictures |= {name: work.task.predict(model, image, work.recipe.data.size) for name, model in models.items()}
        for name, picture in pictures.items():
            target = run.path / "gallery" / f"{index:04d}-{name}.png"
            target.parent.mkdir(exist_ok=True)
            write_map(target, picture)
        entries.append({"index": index, "name": pairs.names[index], "fixed": index in shown, "kind": kinds.get(index)})
    run.write_json("gallery/index.json", entries)
