"""What `train.prune_every` saves: the same recipe with and without, trained side by side.

    python benchmarks/shrinking.py                                  # the default recipe: some ten minutes
    python benchmarks/shrinking.py csnet seed=1 data.size=32 --every 2 --out runs/both

The two take turns, an epoch each, so that whatever else the machine does meets both alike. What counts is the
processor's seconds (of all cores; set OMP_WAIT_POLICY=passive, or waiting counts as well), cuts and their equivalence checks
included. Then both are slimmed, fine-tuned and evaluated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from contextlib import AbstractContextManager, nullcontext
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
    """Two threads of which one runs at a time, each turn inside ``held``."""

    def __init__(self, held: AbstractContextManager[Any]):
        self.held, self.now, self.running = held, 0, {0, 1}
        self.change = threading.Condition()

    def wait(self, me: int) -> None:
        with self.change:
            self.change.wait_for(lambda: self.now == me)
        self.held.__enter__()

    def pass_on(self, me: int, last: bool = False) -> None:
        self.held.__exit__(None, None, None)
        with self.change:
            if last:
                self.running.discard(me)
            self.now = next(iter(self.running - {me}), me)
            self.change.notify_all()


class Alternating(Reporter):
    """Gives the turn away behind each epoch; notes the processor's seconds of each turn."""

    def __init__(self, turns: Turns, me: int, notes: Path):
        super().__init__(Console(quiet=True))
        self.turns, self.me, self.notes = turns, me, notes
        self.began = time.process_time()

    def log_epoch(self, line: dict[str, Any]) -> None:
        super().log_epoch(line)
        spent = {"stage": line["stage"], "epoch": line["epoch"], "seconds": time.process_time() - self.began}
        with self.notes.open("a") as file:
            file.write(json.dumps(spent) + "\n")
        self.turns.pass_on(self.me)
        self.turns.wait(self.me)
        self.began = time.process_time()


def both(recipes: tuple[Recipe, Recipe], folder: Path, held: AbstractContextManager[Any] | None = None) -> None:
    """Run two recipes in turns, into ``folder/0`` and ``folder/1``."""
    folder.mkdir(parents=True, exist_ok=True)
    turns = Turns(nullcontext() if held is None else held)
    failed: list[BaseException] = []

    def run(me: int) -> None:
        turns.wait(me)
        try:
            work = RunContext(recipes[me], Alternating(turns, me, folder / f"{me}.jsonl"))
            text = recipes[me].dump()
            with RunDir.start(folder / str(me), text, environment(recipes[me].seed), overwrite=True) as opened:
                for stage in STAGES:
                    opened.begin(stage)
                    STAGE_FUNCTIONS[stage](work, opened)
                    opened.end(stage)
        except BaseException as error:
            failed.append(error)
        turns.pass_on(me, last=True)

    threads = [threading.Thread(target=run, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def figures(path: Path) -> dict[str, Any]:
    """What one run took and came to."""
    run = RunDir.open(path)
    summary = run.read_json("summary.json")
    lines = [line for line in run.read_metrics() if line["stage"] == "train"]
    notes = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    spent = [one["seconds"] for one in notes if one["stage"] == "train"]
    return {
        "wall": [round(line["seconds"], 1) for line in lines],
        "epochs": [round(seconds, 1) for seconds in spent],
        "alive": [line["alive"] for line in lines],
        "cuts": [
            (one["epoch"], one["channels"], one.get("params"), one.get("seconds")) for one in summary.get("shrunk", [])
        ],
        "train": round(sum(spent), 1),
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
    given = parser.parse_args(arguments)
    plain = load(given.recipe, given.overrides)
    shrinking = load(given.recipe, [*given.overrides, f"train.prune_every={given.every}"])
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        both((plain, shrinking), out)
        show(out)


def show(out: Path) -> None:
    found = [figures(out / str(me)) for me in (0, 1)]
    for name, one in zip(("without", "with"), found, strict=True):
        print(name)
        for key, value in one.items():
            print(f"  {key:10} {value}")
    print(f"sparse stage: {found[0]['train'] / found[1]['train']:.2f} times sooner")
    print(f"params: {found[1]['params'] / found[0]['params'] - 1:+.1%}")


if __name__ == "__main__":
    main()
