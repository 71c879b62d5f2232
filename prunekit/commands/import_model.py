"""``prunekit import``: make a run folder of a published CSNet."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from prunekit.config.schema import Recipe
from prunekit.errors import RecipeError
from prunekit.flops import count_modules, layers_table, total
from prunekit.interop.csnet import CSNetLayout, import_csnet
from prunekit.interop.pickles import read_checkpoint, read_layout
from prunekit.pipeline.models import build_dense, input_shape, save_model
from prunekit.pruning.plan import Builder, digest
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.run_dir import RunDir
from prunekit.utils.environment import environment
from prunekit.utils.progress import Reporter

# The published training options (Gao et al., ECCV 2020), the defaults of runs that start from an imported model.
_PUBLISHED_RECIPE = {
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
        checkpoint: the ``.pth.tar`` file.
        layout: its ``.bin`` file; None for a dense ×1 or ×2 model.
        out: the run folder; the run gets its name.

    Raises:
        CheckpointError: a file cannot be read, or the two do not match.
    """
    state = read_checkpoint(checkpoint)
    learned = None if layout is None else CSNetLayout.parse(read_layout(layout), str(layout))
    width, plan, model = import_csnet(state, learned, str(checkpoint))
    backbone = {"name": "csnet", "options": {"width": width, "split": [0.5, 0.5]}}
    try:
        recipe = Recipe.model_validate({"name": out.name, "backbone": backbone, **_PUBLISHED_RECIPE})
    except ValueError:
        raise RecipeError(f"--out {out}: {out.name!r} is not a valid run name; choose another") from None
    part = "dense" if plan is None else "slim"
    shape = input_shape(recipe)
    with RunDir.start(out, recipe.dump(), environment(recipe.seed), overwrite=overwrite) as run:
        if plan is not None:
            plan.builder = Builder(name="csnet", options=recipe.backbone.options)
            plan.input = list(shape)
            plan.recipe_hash = digest(recipe.model_dump(mode="json"))
        save_model(run, part, model, plan)
        cost = total(count_modules(model, shape)[0])
        run.update_summary(part, cost)
        # A slim model is compared with its dense one, to show the learned channels of each layer.
        models = (model, None) if plan is None else (build_dense(recipe), model)
        run.write_json("layers.json", layers_table(*models, shape))
        for stage in ("train",) if plan is None else ("train", "extract", "slim"):
            run.end(stage)
        run.finish()
    Reporter(console).info(
        f"{out}: CSNet ×{width // 20}, {part}, {cost['params']:,} params, {cost['macs']:,} MACs, "
        f"{cost['paper_flops']:,} paper FLOPs (224×224)"
    )
    return out


def derived_recipe(folder: Path, overrides: list[str]) -> Recipe:
    """The recipe of a run folder with overrides.

    Raises:
        RecipeError: as for ``recipe.load``.
        CheckpointError: the recipe is not the one that the run was made with.
    """
    from prunekit.config.recipe import load

    run = RunDir.open(folder)
    run.read_text(RECIPE)  # Verifies its checksum.
    return load(run.path / RECIPE, overrides, untrusted=True)
