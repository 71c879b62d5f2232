"""Make a run's newest model one that comes with prunekit: a small run folder with a model card.

    prunekit eval runs/csnet_duts_long --data DUTS-TE-200=~/DUTS-TE-200
    python benchmarks/ship_model.py runs/csnet_duts_long csnet-94k

The folder, ``prunekit/weights/NAME``, holds the recipe without paths, the plan, the weights and ``README.md``, whose
figures come from ``summary.json`` and ``eval.json`` of the run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from prunekit.config import schema
from prunekit.pipeline.models import load_model, newest_model, read_plan, read_recipe, save_model
from prunekit.runs import state
from prunekit.runs.run_dir import RunDir
from prunekit.weights import CARD

WEIGHTS = Path(__file__).resolve().parents[1] / "prunekit" / "weights"
LICENSES = {"folder": "DUTS is for research; so are these weights."}
CARD_TEXT = """# {name}

CSNet ×{width}, {params:,} parameters, for salient object detection; trained on DUTS-TR.

```python
model = prunekit.load("{name}")     # images [N, 3, H, W], normalized as ImageNet's, to logits [N, 1, H, W]
```

| data | images | max F | MAE | S-measure | max E |
|---|---|---|---|---|---|
{rows}

The protocol is that of the paper (Gao et al., ECCV 2020): inputs of {size}×{size}, maps compared at the
size of the mask.

- **Cost**: {params:,} parameters, {macs} multiply-adds at {size}×{size}.
- **Training**: `prunekit run {recipe}`{init}, {epochs} epochs in {hours:.1f} hours on {device};
  commit {commit}, seed {seed}.
- **Data**: DUTS-TR; {held_out} of its pairs were held out to choose the settings on.
- **Limits**: objects that stand out from the background of a photograph. Several small objects, transparent ones, and
  pictures of documents or screens give poor maps. There is no identity, class or depth in a map.
- **Terms**: {terms}
"""


def ship(folder: Path, name: str) -> Path:
    """Write ``prunekit/weights/NAME`` from a run folder; return it."""
    run = RunDir.open(folder)
    recipe, part = read_recipe(run), newest_model(run)
    summary, environment = run.read_json(state.SUMMARY), run.read_json("environment.json")
    out = WEIGHTS / name
    shutil.rmtree(out, ignore_errors=True)
    plan = read_plan(run, part)
    if plan is not None:
        plan.dense_hash = None  # of weights that are not in the folder
    shown = {key: environment[key] for key in ("prunekit", "packages", "device", "seed", "commit")}
    with RunDir.start(out, _without_paths(recipe).dump(), shown) as shipped:
        save_model(shipped, "slim", load_model(run, part, recipe), plan)
        shipped.write_json("layers.json", run.read_json("layers.json"))
        for row in run.read_metrics():
            if row["stage"] == "train":
                shipped.append_metrics(row)
        # With ``init``, the dense model is the one that the run began with, not the one of the recipe.
        of_dense = ("dense", "kept") if recipe.init is None else ()
        kept = {key: summary[key] for key in (*of_dense, "equivalence", "drift", "seconds") if key in summary}
        for key, value in {"slim": summary[part], **kept}.items():
            shipped.update_summary(key, value)
        for stage in ("train", "extract", "slim"):
            shipped.end(stage)
        shipped.finish()
        # The folder tells nothing about the machine that made it.
        shipped._write_state({**shipped._state, "host": "", "pid": 0})
    (out / "lock").unlink(missing_ok=True)
    sets = [entry for entry in run.read_json("eval.json")["sets"] if entry["mode"] == f"size {recipe.data.size}"]
    (out / CARD).write_text(_card(name, recipe, summary, part, sets, environment), encoding="utf-8")
    return out


def _without_paths(recipe: schema.Recipe) -> schema.Recipe:
    data = recipe.data.model_copy(update={"root": None, "val_root": None, "cache": "auto"})
    latency = recipe.latency.model_copy(update={"table": None})
    return recipe.model_copy(update={"data": data, "latency": latency, "init": None})


def _card(
    name: str, recipe: schema.Recipe, summary: dict[str, Any], part: str, sets: list[Any], environment: dict[str, Any]
) -> str:
    names = ("max_f", "mae", "s_measure", "max_e")
    rows = [
        f"| {entry['name']} | {entry['images']} | " + " | ".join(f"{entry['metrics'][n]:.4f}" for n in names) + " |"
        for entry in sets
    ]
    return CARD_TEXT.format(
        name=name,
        width=recipe.backbone.options["width"] // 20,
        params=summary[part]["params"],
        macs=f"{summary[part]['macs'] / 1e6:.0f} M",
        rows="\n".join(rows),
        size=recipe.data.size,
        recipe=recipe.name,
        init="" if recipe.init is None else f" from {Path(recipe.init).name}",
        epochs=recipe.train.epochs,
        hours=sum(summary["seconds"].values()) / 3600,
        device="one CPU core" if environment["device"] == "cpu" else environment["device"],
        commit=str(environment["commit"])[:7],
        seed=recipe.seed,
        held_out=f"{recipe.data.val_holdout or 0:.1%}",
        terms=LICENSES.get(recipe.data.name, "as prunekit."),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args(arguments)
    folder = ship(options.run, options.name)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
