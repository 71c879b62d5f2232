"""Training on DUTS: methods compared at one model size, the effect of single options, and the one-hour CPU recipe.

    python benchmarks/duts.py ~/DUTS-TR ~/DUTS-TE                    # everything: about five hours on two cores
    python benchmarks/duts.py ~/DUTS-TR ~/DUTS-TE --only dynamic l1 --seeds 0
    python benchmarks/duts.py ~/DUTS-TR ~/DUTS-TE --side-by-side     # two runs at a time, one thread each

Each run is a prunekit command, which is printed first. Complete runs are not repeated, and interrupted ones are resumed
(those that only fine-tune start again). The options are evaluated on 500 pairs held out of DUTS-TR, everything else on
the second folder. The summary and the tables of each run, without weights and images, are copied to
``benchmarks/results/duts``; ``table.md`` there is computed from these files only.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PRUNEKIT = [sys.executable, "-m", "prunekit.cli"]
COMPARE, LONG_ONE = "csnet_duts_compare", "csnet_duts_cpu"
WHOLE = [
    *("decay.name=none", "slim.importance=gate", "slim.threshold=0", "target.params_ratio=null"),
    "train.gradual_pruning.start=null",
]
WAYS = {
    "dynamic": [],
    "magnitude": ["decay.name=none", "slim.importance=magnitude"],
    "l1": ["decay.name=l1", "decay.weight=1e-3"],
    "scratch": ["decay.name=none", "target.params_ratio=null", "init_weights=fresh"],
    # The widest network within the budget, and one with as many multiply-adds as the learned layout.
    "narrow": ["backbone.options.width=9", *WHOLE],
    "narrow_macs": ["backbone.options.width=15", *WHOLE],
}
# Fine-tuned like the others, without removing channels.
UNCUT = {"dense": WHOLE[1:]}
# Compared with "plain" on pairs held out of DUTS-TR. OPTIONS apply to all trainings, TUNED to fine-tuning only.
HELD_OUT = "data.val_holdout=0.04738"
OPTIONS = {
    "plain": [],
    "bce_iou": ["train.loss=bce_iou", "finetune.loss=bce_iou"],
    "structure": ["train.loss=structure", "finetune.loss=structure"],
    "resized_crop": ["train.augment=resized_crop", "finetune.augment=resized_crop"],
}
TUNED = {"ema": ["finetune.ema=0.99"], "distill": ["finetune.distill.weight=0.5"]}
LONG = {"cpu": [], "cpu_uncut": ["baseline=false", *WHOLE]}
ALL = (*WAYS, *UNCUT, *OPTIONS, *TUNED, *LONG)
# Run → the run whose folder it reads.
AFTER = {"scratch": "dynamic", **dict.fromkeys(TUNED, "plain")}
BENCH = ["--size", "224", "--threads", "1", "--forms", "eager,ort", "--model", "dense,finetuned"]
# Run, model → its title in the table.
ROWS = {
    ("magnitude", "dense"): "dense, no decay",
    ("dense", "finetuned"): "dense, no decay, fine-tuned like those below",
    ("dynamic", "finetuned"): "dynamic weight decay",
    ("l1", "finetuned"): "l1 (network slimming)",
    ("magnitude", "finetuned"): "one-shot magnitude",
    ("scratch", "finetuned"): "the layout of dynamic, from scratch",
    ("narrow", "finetuned"): "uniform width 9 (same parameters), from scratch",
    ("narrow_macs", "finetuned"): "uniform width 15 (same multiply-adds), from scratch",
}
TIMED = "cpu"
# Run, model → its title, and the model of the timed run with the same layout.
LONG_ROWS = {
    ("cpu", "baseline"): ("dense, no decay", "dense"),
    ("cpu_uncut", "finetuned"): ("dense, no decay, fine-tuned like the slim one", "dense"),
    ("cpu", "dense"): ("dense, dynamic weight decay", "dense"),
    ("cpu", "slim"): ("slim", "finetuned"),
    ("cpu", "finetuned"): ("slim, fine-tuned", "finetuned"),
}
TABLES = ("*.csv", "*.md")
FIGURES = ("channels.png", "params_macs.png", "training.png", "gates_map.png", "precision_recall.png")


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield names and commands of the runs, each after the run that it reads."""
    root, test = f"data.root={args.train}", f"data.val_root={args.test}"
    wanted = args.only or ALL
    for kind in (kind for kind in (*WAYS, *UNCUT, *OPTIONS, *TUNED) if kind in wanted):
        for seed in args.seeds:
            name = f"{kind}-{seed}"
            before = str(args.runs / (needed(name) or ""))
            if kind in UNCUT:
                trained = str(args.runs / needed(f"{name}-slim"))
                yield f"{name}-slim", ["slim", trained, *UNCUT[kind], *args.overrides]
            if kind in WAYS:
                init = [f"init={before}"] if kind in AFTER else []
                words = ["run", COMPARE, root, test, f"seed={seed}", *WAYS[kind], *init]
            elif kind in OPTIONS:
                words = ["run", COMPARE, root, HELD_OUT, f"seed={seed}", *OPTIONS[kind]]
            else:
                words = ["finetune", before, *TUNED.get(kind, [])]
            yield name, [*words, *args.overrides]
    for name, overrides in LONG.items():
        if name in wanted:
            yield name, ["run", LONG_ONE, root, test, *overrides, *args.overrides]


def needed(name: str) -> str | None:
    """Return the run whose folder this one reads, if any."""
    kind, _, seed = name.removesuffix("-slim").rpartition("-")
    if kind in UNCUT:
        return f"magnitude-{seed}" if name.endswith("-slim") else f"{name}-slim"
    return f"{AFTER[kind]}-{seed}" if kind in AFTER else None


def depth(name: str) -> int:
    """Return the number of runs that must precede this one."""
    before = needed(name)
    return 0 if before is None else 1 + depth(before)


def run(name: str, words: list[str], runs: Path, threads: int | None) -> None:
    out = runs / name
    if words[0] != "run" and _status(out) == "complete":
        print(f"{name}: already complete", flush=True)
        return
    # Complete runs are resumed too, so that prunekit refuses those of another recipe.
    again = ["--resume" if words[0] == "run" else "--overwrite"] if out.exists() else []
    command = [*words, "--out", str(out), *again]
    print(f"prunekit {shlex.join(command)}\n", end="", flush=True)  # one write, since two runs may print at once
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with (runs / f"{name}.log").open("a") as log:
        subprocess.run([*PRUNEKIT, *command], stdout=log, stderr=subprocess.STDOUT, env=env, check=True)


def bench(out: Path) -> None:
    """Time the models of a run, unless that is done."""
    if not (out / "bench.json").is_file():
        command = ["bench", str(out), *BENCH]
        print(f"prunekit {shlex.join(command)}", flush=True)
        subprocess.run([*PRUNEKIT, *command], stdout=subprocess.DEVNULL, check=True)


def gather(name: str, runs: Path, results: Path) -> None:
    """Copy the summary and the report of a run, without weights and images; for single options without figures."""
    out = results / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in ("summary.json", "bench.json"):
        if (runs / name / file).is_file():
            shutil.copy(runs / name / file, out)
    command = ["report", str(runs / name), "--out", str(out / "report")]
    subprocess.run([*PRUNEKIT, *command], stdout=subprocess.DEVNULL, check=True)
    patterns = TABLES if name.rpartition("-")[0] in (*OPTIONS, *TUNED) else (*TABLES, *FIGURES)
    kept = {path for pattern in patterns for path in (out / "report").glob(pattern)}
    for path in (out / "report").iterdir():
        if path not in kept:
            path.unlink()


def table(found: dict[str, dict[str, Any]], times: dict[str, dict[str, Any]]) -> str:
    """Return the tables as Markdown: mean over seeds, with each seed in brackets; times per 224×224 image, one thread.

    Args:
        found: name of a run → its summary.
        times: name of a run → its ``bench.json``.
    """
    lines = ["| csnet_duts_compare | params | paper FLOPs | max F | MAE |", "|---|---:|---:|---:|---:|"]
    for (way, model), title in ROWS.items():
        parts = [s[model] for s in _seeds(found, way).values()]
        if parts:
            lines.append(f"| {title} | {_cells(parts)} |")
    options = [
        f"| {kind} | {_cells([s['finetuned'] for s in _seeds(found, kind).values()])} | {_gain(found, kind)} |"
        for kind in (*OPTIONS, *TUNED)
        if _seeds(found, kind)
    ]
    if options:
        lines += [
            "",
            "| option, on held-out pairs | params | paper FLOPs | max F | MAE | gain in max F |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        lines += options
    timed = [
        f"| {title} | {_cells([found[name][model]])} | {_ms(times.get(TIMED), alike)} |"
        for (name, model), (title, alike) in LONG_ROWS.items()
        if model in found.get(name, ())
    ]
    if timed:
        lines += ["", f"| {LONG_ONE} | params | paper FLOPs | max F | MAE | ms, eager | ms, ONNX Runtime |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|", *timed]
    return "\n".join(lines) + "\n"


def _seeds(found: dict[str, dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Return the summaries of a kind of run by seed."""
    return {name.rpartition("-")[2]: summary for name, summary in found.items() if name.rpartition("-")[0] == kind}


def _gain(found: dict[str, dict[str, Any]], kind: str) -> str:
    """Return the mean gain over "plain" on the seeds that both have."""
    own, plain = _seeds(found, kind), _seeds(found, "plain")
    both = [[s["finetuned"]["metrics"]["max_f"] for s in (own[seed], plain[seed])] for seed in own if seed in plain]
    return "" if kind == "plain" or not both else f"{statistics.fmean(a - b for a, b in both):+.4f}"


def _ms(times: dict[str, Any] | None, model: str) -> str:
    """Return median times in PyTorch and in ONNX Runtime."""
    rows = {row["form"]: row["median_ms"] for row in (times or {}).get("rows", ()) if row["model"] == model}
    return " | ".join(f"{rows[form]:.1f}" if form in rows else "" for form in ("eager", "ort"))


def _cells(parts: list[dict[str, Any]]) -> str:
    def sizes(key: str) -> str:
        found = sorted({part[key] for part in parts})
        return " and ".join(f"{value:,}" for value in found) if len(found) < 3 else f"{found[0]:,}–{found[-1]:,}"

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
    parser.add_argument("train", type=Path, help="images/ and GT/ for training")
    parser.add_argument("test", type=Path, help="images/ and GT/ for evaluation")
    parser.add_argument("overrides", nargs="*", help="key=value, for every run")
    parser.add_argument("--only", nargs="+", choices=ALL, help="run only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--side-by-side", action="store_true", help="two runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/duts"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "duts")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    todo = dict(commands(args))
    for name, before in ((name, needed(name)) for name in todo):
        if before and before not in todo and _status(args.runs / before) != "complete":
            sys.exit(f"{name} needs {before}, which is not in {args.runs}: add {before.rpartition('-')[0]} to --only")
    in_pairs = {name for name in todo if args.side_by_side and name not in LONG}

    def one(name: str) -> None:
        run(name, todo[name], args.runs, 1 if name in in_pairs else None)

    for level in sorted(set(map(depth, todo))):
        names = [name for name in todo if depth(name) == level]
        _all([name for name in names if name in in_pairs], one, 2)
        _all([name for name in names if name not in in_pairs], one, 1)
    for name in todo:
        if name == TIMED:
            bench(args.runs / name)
        if not name.endswith("-slim"):
            gather(name, args.runs, args.results)
    text = table(_read(args.results, "summary.json"), _read(args.results, "bench.json"))
    (args.results / "table.md").write_text(text)
    print(text)


def _all(names: list[str], do: Callable[[str], None], workers: int) -> None:
    """Process the names, several at a time; stop after the first failure."""
    with ThreadPoolExecutor(workers) as pool:
        doing = {name: pool.submit(do, name) for name in names}
        for name, future in doing.items():
            try:
                future.result()
            except subprocess.CalledProcessError:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{name} failed; see {name}.log in the folder of the runs")


def _read(results: Path, file: str) -> dict[str, dict[str, Any]]:
    """Return the content of this file by run."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob(f"*/{file}"))}


if __name__ == "__main__":
    main()
