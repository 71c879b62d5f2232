"""Models of run folders, out of and into other forms: what the commands ``export`` and ``import`` do."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from prunekit.counting import count, layers_table, total
from prunekit.deploy.onnx import check_onnx, export_onnx
from prunekit.environment import environment
from prunekit.errors import RecipeError
from prunekit.interop.csnet import Layout, export_csnet, import_csnet
from prunekit.interop.pickles import read_checkpoint, read_layout, write_checkpoint, write_layout
from prunekit.loading import build_dense, input_shape, load_model, newest_model, read_recipe, save_model
from prunekit.plan import Builder, digest
from prunekit.progress import Reporter
from prunekit.registry import nearest
from prunekit.rundir import RunDir
from prunekit.schema import Recipe

FORMATS = ("onnx", "csnet")

# What the published models were trained and fine-tuned with (Gao et al., ECCV 2020); a run that goes on from an
# imported model begins with this, and with the data that its user names.
_PUBLISHED = {
    "data": {"name": "folder", "size": 224},
    "train": {"epochs": 0, "batch_size": 24, "lr": 1e-4},
    "finetune": {
        "epochs": 20,
        "batch_size": 24,
        "lr": 1e-6,
        "optimizer": {"name": "adam", "options": {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 5e-3}},
        "augment": {"name": "crop_flip", "options": {"crop": 15, "hflip": 0.25, "vflip": 0.25}},
    },
}


def import_run(checkpoint: Path, layout: Path | None, out: Path, console: Console, *, overwrite: bool = False) -> Path:
    """Make a run folder of a published CSNet.

    Args:
        checkpoint: the ``.pth.tar``.
        layout: its ``.bin``; None for a dense ×1 or ×2.
        out: the run folder; its name becomes the run's.

    Raises:
        CheckpointError: a file cannot be read, or the two do not fit.
    """
    state = read_checkpoint(checkpoint)
    learned = None if layout is None else Layout.parse(read_layout(layout), str(layout))
    width, plan, model = import_csnet(state, learned, str(checkpoint))
    try:
        recipe = Recipe.model_validate(
            {
                "name": out.name,
                "backbone": {"name": "csnet", "options": {"width": width, "split": [0.5, 0.5]}},
                **_PUBLISHED,
            }
        )
    except ValueError:
        raise RecipeError(f"--out {out}: {out.name!r} is no name for a run; choose another") from None
    part = "dense" if plan is None else "slim"
    reporter = Reporter(console)
    with RunDir.start(out, recipe.dump(), environment(recipe.seed), overwrite=overwrite) as run:
        save_model(run, part, model)
        if plan is not None:
            plan.builder = Builder(name="csnet", options=recipe.backbone.options)
            plan.input = list(input_shape(recipe))
            plan.recipe_hash = digest(recipe.model_dump(mode="json"))
            run.write_json("plan.json", plan.to_json())
        sums = total(count(model, input_shape(recipe))[0])
        run.update_summary(part, sums)
        # Beside a slim model stands the dense one that it is a plan of: which channels of each layer were learned.
        sides = (model, None) if plan is None else (build_dense(recipe), model)
        run.write_json("layers.json", layers_table(*sides, input_shape(recipe)))
        for stage in ("train",) if plan is None else ("train", "extract", "slim"):
            run.end(stage)
        run.finish()
    reporter.say(
        f"{out}: CSNet ×{width // 20}, {part}, {sums['params']:,} params, {sums['macs']:,} MACs, "
        f"{sums['paper_flops']:,} paper FLOPs (224×224)"
    )
    return out


def export_run(folder: Path, form: str, console: Console, *, model: str | None = None) -> list[Path]:
    """Write a run's model in another form, into the run folder.

    Args:
        form: "onnx" (``model.onnx``; ``exports/NAME.onnx`` for a model that is not the last) or "csnet" (the published
            form, ``exports/csnet.pth.tar`` and ``.bin``).
        model: "dense", "slim" or "finetuned"; None for the last that the run has.

    Returns:
        the files written.

    Raises:
        RecipeError: no such form.
        ExportError: the model has no such form, or the file does not compute what the model does.
    """
    if form not in FORMATS:
        near = nearest(form, list(FORMATS))
        raise RecipeError(
            f"--format {form}: no such form" + (f", did you mean {near!r}?" if near else ";") + f" {', '.join(FORMATS)}"
        )
    reporter = Reporter(console)
    with RunDir.open(folder, write=True) as run:
        name = model or newest_model(run)
        recipe = read_recipe(run)
        network = load_model(run, name, recipe)
        if form == "onnx":
            shape = input_shape(recipe)
            example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
            file = export_onnx(network, example)
            gap = check_onnx(file, network, [example[:1], example, example[..., : shape[1] - 3, : shape[2] - 5]])
            # model.onnx is the run's result; another of its models stands beside it.
            result = name == newest_model(run)
            path = "model.onnx" if result else f"exports/{name}.onnx"
            written = [run.write_bytes(path, file)]
            if result:
                run.update_summary("export", {"path": path, "max_abs_diff": gap})
        else:
            state, layout = export_csnet(network)
            written = [
                run.write_bytes("exports/csnet.pth.tar", write_checkpoint(state)),
                run.write_bytes("exports/csnet.bin", write_layout(layout.dump())),
            ]
    for path in written:
        reporter.say(f"{path}: the {name} model, {path.stat().st_size / 1000:.0f} kB")
    return written


def derived_recipe(folder: Path, overrides: list[str]) -> Recipe:
    """The recipe of a run folder with some keys set anew.

    Raises:
        RecipeError: as ``recipe.load``.
    """
    from prunekit.recipe import load

    RunDir.open(folder)
    return load(folder / "recipe.yaml", overrides)
