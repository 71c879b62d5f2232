"""The stages of a run, one function each, in their order. Each reads what it needs from the run folder and writes its
result into it, so that a run can be picked up anywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from prunekit.counting import layers_table
from prunekit.data.images import encode_png
from prunekit.deploy.onnx import check_onnx, export_onnx
from prunekit.loading import MODELS, input_shape, load_model, newest_model, save_model, start_plan
from prunekit.plan import Builder, Group, Plan, digest
from prunekit.pruning.compose import compose
from prunekit.pruning.decay import NoDecay
from prunekit.pruning.extract import dead_channels, extract
from prunekit.pruning.groups import find_groups
from prunekit.pruning.life import scores
from prunekit.pruning.proof import Proof, difference, proof_inputs
from prunekit.pruning.slim import slim
from prunekit.rundir import RunDir
from prunekit.schema import Recipe
from prunekit.tasks.reference import reference
from prunekit.work import Work

GALLERY = 16  # fixed validation images
EXTREMES = 4  # best and worst ones beside them


def train_stage(work: Work, run: RunDir) -> None:
    model = work.start_model(run)
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
    first = start_plan(run)
    _write_plan(run, recipe, plan if first is None else compose(*work.builder(), first, groups, plan))


def slim_stage(work: Work, run: RunDir) -> None:
    recipe = work.recipe
    dense = load_model(run, "dense", recipe)
    example = work.example()
    groups = find_groups(dense, example)
    # From the gates, not from plan.json: that becomes the plan that held, and a stage that is done again must begin as
    # it began before.
    plan, first = extract(dense, groups, recipe.slim.threshold, recipe.slim.min_channels), start_plan(run)
    rebuilt, proof = slim(dense, plan, example, groups=groups, constants=recipe.slim.constants)
    held = proof.plan
    _write_plan(run, recipe, held if first is None else compose(*work.builder(), first, groups, held))
    save_model(run, "slim", rebuilt)
    work.measure(run, "slim", rebuilt)
    run.update_summary("proof", proof.to_json())
    largest, mean = difference(dense, rebuilt, [example])
    run.update_summary("drift", {"max_abs_diff": largest, "mean_abs_diff": mean})
    kept = sum(len(held.kept(group)) for group in groups if group.reason is None)
    of = sum(group.channels for group in groups if group.reason is None)
    summary = run.read_json("summary.json")
    ratios = {f"{key}_ratio": summary["slim"][key] / summary["dense"][key] for key in ("params", "macs")}
    run.update_summary("kept", {"channels": kept, "of": of, **ratios})
    run.write_json("layers.json", layers_table(dense, rebuilt, work.shape))
    work.reporter.say(_outcome(proof, kept, of, largest))


def finetune_stage(work: Work, run: RunDir) -> None:
    model = load_model(run, "slim", work.recipe)
    groups = find_groups(model, work.example())
    work.train(run, "finetune", model, groups, NoDecay(model, groups))
    save_model(run, "finetuned", model)
    work.measure(run, "finetuned", model)


def evaluate_stage(work: Work, run: RunDir) -> None:
    recipe, pairs = work.recipe, work.pairs("val")
    present = [name for name in MODELS if run.has(f"{name}/model.safetensors")]
    models = {name: load_model(run, name, recipe).to(work.device) for name in present}
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
    model = load_model(run, newest_model(run), work.recipe)
    example = work.example()
    file = export_onnx(model, example)
    gap = check_onnx(file, model, [example[:1], *[batch[:2] for batch in proof_inputs(model, example)]])
    run.write_bytes("model.onnx", file)
    run.update_summary("export", {"path": "model.onnx", "max_abs_diff": gap})
    work.reporter.say(f"export: model.onnx, {len(file) / 1000:.0f} kB; largest difference {gap:.1e}")


def report_stage(work: Work, run: RunDir) -> None:
    """The report itself is printed at the end, when the run is complete."""


STAGE_FUNCTIONS: dict[str, Callable[[Work, RunDir], None]] = {
    "train": train_stage,
    "extract": extract_stage,
    "slim": slim_stage,
    "finetune": finetune_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
    "report": report_stage,
}


def _outcome(proof: Proof, kept: int, of: int, drift: float) -> str:
    given = f", {proof.given_back} channels given back" if proof.given_back else ""
    carriers = f", {proof.carriers} as carriers of constants" if proof.carriers else ""
    return (
        f"slim: {kept} of {of} channels kept{carriers}{given}; proof holds: largest difference "
        f"{proof.max_abs_diff:.1e} (tolerance {proof.tolerance:.0e}); drift {drift:.3g}"
    )


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
            run.write_bytes(f"gallery/{index:04d}-{name}.png", encode_png(picture))
        entries.append({"index": index, "name": pairs.names[index], "fixed": index in shown, "kind": kinds.get(index)})
    run.write_json("gallery/index.json", entries)
