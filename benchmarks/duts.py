"""Real photographs: ways to the same size side by side, and the hour-long recipe with its dense baseline.

    python benchmarks/duts.py ~/DUTS-TR ~/DUTS-TE                    # all of it: some two hours on two cores
    python benchmarks/duts.py ~/DUTS-TR ~/DUTS-TE --only dynamic l1 --seeds 0
    python benchmarks/duts.py ~/DUTS-TR ~/DUTS-TE --side-by-side     # two runs at a time, one thread each

Each run is a command of prunekit's, which is printed first. One that is complete is not run again, and one that was
broken off goes on. What they found is gathered in ``benchmarks/results/duts``: the summary and the tables of each run,
no weights and no pictures; ``table.md`` there is made of the summaries alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMPARE = "csnet_duts_compare"
# In the order in which they can be run: the last one takes the layout that the first has learned.
WAYS = {
    "dynamic": [],
    "magnitude": ["decay.name=none", "slim.criterion=magnitude"],
    "l1": ["decay.name=l1", "decay.weight=1e-4"],
    "scratch": ["decay.name=none", "target.params_ratio=null", "init_weights=fresh"],
}
LONG = {"cpu": "csnet_duts_cpu"}
# Run, model → what it is called in the table.
ROWS = {
    ("magnitude", "dense"): "dense, no decay",
    ("dynamic", "finetuned"): "dynamic weight decay",
    ("l1", "finetuned"): "l1 (network slimming)",
    ("magnitude", "finetuned"): "one-shot magnitude",
    ("scratch", "finetuned"): "the layout of dynamic, from scratch",
}
FILES = ("*.csv", "*.md", "channels.png", "params_macs.png", "training.png", "gates_map.png", "precision_recall.png")


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The runs and their commands."""
    data = [f"data.root={args.train}", f"data.val_root={args.test}"]
    wanted = args.only or [*WAYS, *LONG]
    for way, overrides in WAYS.items():
        for seed in args.seeds if way in wanted else ():
            init = [f"init={args.runs / f'dynamic-{seed}'}"] if way == "scratch" else []
            yield f"{way}-{seed}", [COMPARE, *data, f"seed={seed}", *overrides, *init, *args.overrides]
    for name, recipe in LONG.items():
        if name in wanted:
            yield name, [recipe, *data, *args.overrides]


def run(name: str, arguments: list[str], runs: Path, threads: int | None) -> None:
    out = runs / name
    if _status(out) == "complete":
        print(f"{name}: is there", flush=True)
        return
    command = [sys.executable, "-m", "prunekit.cli", "run", *arguments, "--out", str(out)]
    command += ["--resume"] if out.exists() else []
    print(f"prunekit {shlex.join(command[3:])}\n", end="", flush=True)  # in one piece: there may be two
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with (runs / f"{name}.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=True)


def gather(name: str, runs: Path, results: Path) -> None:
    """Take over a run's summary and what its report says, without weights and photographs."""
    out = results / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(runs / name / "summary.json", out)
    subprocess.run(
        [sys.executable, "-m", "prunekit.cli", "report", str(runs / name), "--out", str(out / "report")],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    kept = {path for pattern in FILES for path in (out / "report").glob(pattern)}
    for path in (out / "report").iterdir():
        if path not in kept:
            path.unlink()


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Markdown, of the summaries by the names of their runs; of several seeds the mean, and each in brackets."""
    lines = ["| | params | paper FLOPs | max F | MAE |", "|---|---:|---:|---:|---:|"]
    for (way, model), title in ROWS.items():
        parts = [s[model] for name, s in summaries.items() if name.rpartition("-")[0] == way]
        if parts:
            lines.append(f"| {title} | {_cells(parts)} |")
    for name in LONG:
        for model in ("baseline", "dense", "slim", "finetuned") if name in summaries else ():
            if model in summaries[name]:
                lines.append(f"| {LONG[name]}: {model} | {_cells([summaries[name][model]])} |")
    return "\n".join(lines) + "\n"


def _cells(parts: list[dict[str, Any]]) -> str:
    def sizes(key: str) -> str:
        found = sorted({part[key] for part in parts})
        return " and ".join(f"{value:,}" for value in found)

    def figures(key: str) -> str:
        found = [part["metrics"][key] for part in parts]
        each = f" ({', '.join(f'{value:.4f}' for value in found)})" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.4f}{each}"

    return " | ".join([sizes("params"), sizes("paper_flops"), figures("max_f"), figures("mae")])


def _status(out: Path) -> str | None:
    path = out / "summary.json"
    return json.loads(path.read_text()).get("status") if path.is_file() else None


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="images/ and GT/ to learn from")
    parser.add_argument("test", type=Path, help="images/ and GT/ for the figures")
    parser.add_argument("overrides", nargs="*", help="key=value, for every run")
    parser.add_argument("--only", nargs="+", choices=[*WAYS, *LONG], help="some of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--side-by-side", action="store_true", help="two runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/duts"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "duts")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    todo = dict(commands(args))
    for group in ([n for n in todo if not n.startswith("scratch")], [n for n in todo if n.startswith("scratch")]):
        with ThreadPoolExecutor(2 if args.side_by_side else 1) as pool:
            threads = 1 if args.side_by_side else None
            for done in [pool.submit(run, name, todo[name], args.runs, threads) for name in group]:
                done.result()
    for name in todo:
        gather(name, args.runs, args.results)
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(args.results.glob("*/summary.json"))}
    text = table(found)
    (args.results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
