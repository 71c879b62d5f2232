"""What `train.prune_every` saves: a recipe with and without it, trained side by side.

    python benchmarks/progressive_pruning.py                                  # the default recipe: about ten minutes
    python benchmarks/progressive_pruning.py csnet seed=1 data.size=32 --every 2 --out runs/both

The two runs alternate after each epoch, so that other load on the machine affects both equally. CPU seconds are
compared (of all cores; set OMP_WAIT_POLICY=passive, or waiting counts as well), including pruning and its equivalence
checks. Then both are slimmed, fine-tuned and evaluated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from prunekit.config.recipe import load
from prunekit.config.schema import Recipe
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.stages import STAGE_FUNCTIONS
from prunekit.runs.run_dir import RunDir
from prunekit.utils.environment import environment
from prunekit.utils.progress import Reporter

STAGES = ("train", "extract", "slim", "finetune", "evaluate")


class Turns:
    """Lets one of two threads run at a time."""

    def __init__(self):
        self.current, self.running = 0, {0, 1}
        self.changed = threading.Condition()

    def wait(self, index: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.current == index)

    def pass_on(self, index: int, last: bool = False) -> None:
        with self.changed:
            if last:
                self.running.discard(index)
            self.current = next(iter(self.running - {index}), index)
            self.changed.notify_all()


class AlternatingReporter(Reporter):
    """Lets the other run continue after each epoch; logs the CPU seconds of each epoch."""

    def __init__(self, turns: Turns, index: int, log: Path):
        super().__init__(Console(quiet=True))
        self.turns, self.index, self.log = turns, index, log
        self.started = time.process_time()

    def log_epoch(self, line: dict[str, Any]) -> None:
        super().log_epoch(line)
        row = {"stage": line["stage"], "epoch": line["epoch"], "seconds": time.process_time() - self.started}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.turns.pass_on(self.index)
        self.turns.wait(self.index)
        self.started = time.process_time()


def run_both(recipes: tuple[Recipe, Recipe], folder: Path) -> None:
    """Run two recipes alternately, into ``folder/0`` and ``folder/1``."""
    folder.mkdir(parents=True, exist_ok=True)
    turns = Turns()
    errors: list[BaseException] = []

    def run(index: int) -> None:
        turns.wait(index)
        try:
            recipe = recipes[index]
            context = RunContext(recipe, AlternatingReporter(turns, index, folder / f"{index}.jsonl"))
            with RunDir.start(folder / str(index), recipe.dump(), environment(recipe.seed), overwrite=True) as run_dir:
                for stage in STAGES:
                    run_dir.begin(stage)
                    STAGE_FUNCTIONS[stage](context, run_dir)
                    run_dir.end(stage)
        except BaseException as error:
            errors.append(error)
        turns.pass_on(index, last=True)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def results(path: Path) -> dict[str, Any]:
    """The time and the metrics of one run."""
    run = RunDir.open(path)
    summary = run.read_json("summary.json")
    lines = [line for line in run.read_metrics() if line["stage"] == "train"]
    log = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in log if row["stage"] == "train"]
    steps = summary.get("progressive_pruning", [])
    return {
        "wall": [round(line["seconds"], 1) for line in lines],
        "epochs": [round(value, 1) for value in seconds],
        "alive": [line["alive"] for line in lines],
        "pruned": [(step["epoch"], step["channels"], step.get("params"), step.get("seconds")) for step in steps],
        "train": round(sum(seconds), 1),
        **{name: summary[name]["metrics"] for name in ("dense", "slim", "finetuned")},
        "params": summary["slim"]["params"],
        "macs": summary["slim"]["macs"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="csnet")
    parser.add_argument("overrides", nargs="*", help="key=value, for both runs")
    parser.add_argument("--every", type=int, default=1, help="train.prune_every of the second run")
    parser.add_argument("--out", type=Path, help="keep the two runs here")
    options = parser.parse_args(arguments)
    plain = load(options.recipe, options.overrides)
    pruned = load(options.recipe, [*options.overrides, f"train.prune_every={options.every}"])
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        run_both((plain, pruned), out)
        print_results(out)


def print_results(out: Path) -> None:
    plain, pruned = (results(out / str(index)) for index in (0, 1))
    for name, values in (("without", plain), ("with", pruned)):
        print(name)
        for key, value in values.items():
            print(f"  {key:10} {value}")
    print(f"sparse training: {plain['train'] / pruned['train']:.2f} times faster")
    print(f"params: {pruned['params'] / plain['params'] - 1:+.1%}")


if __name__ == "__main__":
    main()
