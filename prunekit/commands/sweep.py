"""``prunekit sweep``: one run for each combination of values, and a report of all."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prunekit.commands.results import simple_table
from prunekit.config.recipe import load
from prunekit.config.schema import Recipe
from prunekit.errors import Interrupted, PrunekitError, RecipeError, RunError, RunFolderError
from prunekit.reporting import report
from prunekit.runs.folders import is_run_folder
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES
from prunekit.sweep.engines import ENGINES
from prunekit.sweep.results import COSTS, importance_table, means_table, on_front, trials_table
from prunekit.sweep.space import Axis, Trial, combine, parse_settings, short_titles
from prunekit.sweep.tasks import Task, plan_tasks
from prunekit.sweep.worker import Outcome, log_path
from prunekit.utils.environment import available_cores
from prunekit.utils.io import TEMP_PREFIX, encode_json, make_folder, os_error_reason, write_atomic
from prunekit.utils.lock import FolderLock
from prunekit.utils.progress import format_duration
from prunekit.utils.safe_decode import decode_json
from prunekit.utils.text import plural, si

SWEEP, FORMAT = "sweep.json", 1
_REFRESH_SECONDS = 2.0
_MANY = 1000


def run_sweep(
    recipe: str,
    settings: Sequence[str],
    out: Path,
    console: Console,
    *,
    trials: int | None = None,
    seed: int = 0,
    engine: str = "local",
    jobs: int | None = None,
    threads: int = 1,
    resume: bool = False,
    dry_run: bool = False,
) -> pd.DataFrame:
    """Run a recipe once for each combination of values, and report all runs together; return a row per trial.

    Args:
        recipe: recipe file, or name of a shipped recipe.
        settings: ``key=value,value`` for the axes, ``key=value`` for all trials.
        out: folder of the sweep: ``sweep.json``, a run folder per trial, ``shared``, ``logs``, ``trials.csv`` and
            ``report``.
        console: for progress and results.
        trials: number of combinations, drawn at random; None for all.
        seed: of that draw.
        engine: a key of ``ENGINES``.
        jobs: runs at the same time at most; None: as many as there are cores.
        threads: of each run.
        resume: continue the sweep in the folder. It may have more values than before.
        dry_run: only print what would run.

    Raises:
        RecipeError: a setting or a recipe is wrong; nothing has been written.
        RunFolderError: the folder holds another sweep or something else.
        RunError: some trials failed; the others are complete.
        Interrupted: the runs have saved checkpoints.
    """
    if engine not in ENGINES:
        raise RecipeError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    # Ray knows how many fit, on machines that may come and go.
    jobs = jobs or (available_cores() if engine == "local" else _MANY)
    axes, fixed = parse_settings(settings)
    chosen = combine(axes, trials, seed)
    overrides = [
        [*fixed, *(f"{axis.key}={value}" for axis, value in zip(axes, one.values, strict=True))] for one in chosen
    ]
    recipes = _load_all(recipe, overrides)
    tasks = plan_tasks([trial.name for trial in chosen], recipes, overrides)
    if dry_run:
        _print_plan(tasks, console)
        return pd.DataFrame()
    plan = {
        "format": FORMAT,
        "recipe": recipe,
        "settings": list(fixed),
        "axes": {axis.key: list(axis.values) for axis in axes},
        "trials": trials,
        "seed": seed,
    }
    lock = _lock_folder(out, resume)
    try:
        _write_plan(out, plan, tasks)
        several = f"{plural(jobs, 'run')} at a time" if engine == "local" else "as many at a time as the cluster can"
        console.print(
            f"{plural(len(chosen), 'trial')}, {plural(len(tasks) - len(chosen), 'shared run')}; "
            f"{several}, {plural(threads, 'thread')} each",
            highlight=False,
        )
        monitor = _Monitor(out, axes, chosen, tasks, recipes, console)
        try:
            with monitor:
                ENGINES[engine](out, recipe, tasks, jobs, threads, monitor)
        except KeyboardInterrupt as stop:
            raise Interrupted from stop
        table = _report(out, axes, chosen, console)
    finally:
        lock.release()
    # A shared run that failed is no loss: its trials have started on their own.
    failed = [(task, text) for task, text in monitor.failed if task.until is None]
    if failed:
        lines = [f"{task.folder}: {text} (see {log_path(out, task)})" for task, text in failed]
        raise RunError("\n".join([f"{plural(len(lines), 'trial')} failed; --resume repeats them", *lines]))
    return table


def _load_all(recipe: str, overrides: Sequence[Sequence[str]]) -> list[Recipe]:
    """Load the recipe of each trial; RecipeError with the problems of all."""
    recipes, problems = [], {}
    for one in overrides:
        try:
            recipes.append(load(recipe, one))
        except RecipeError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise RecipeError("\n".join(problems))
    return recipes


def _lock_folder(out: Path, resume: bool) -> FolderLock:
    """Make the folder of the sweep and lock it; RunFolderError if it holds something else."""
    try:
        if (out / SWEEP).is_file():
            if not resume:
                raise RunFolderError(
                    f"{out} already holds a sweep; continue it with --resume, or choose another --out DIR"
                )
        elif out.exists() and any(e.name != "lock" and not e.name.startswith(TEMP_PREFIX) for e in out.iterdir()):
            raise RunFolderError(
                f"{out} holds files but no sweep, so nothing is written there; choose another --out DIR"
            )
        make_folder(out)
    except OSError as error:
        raise RunFolderError(f"cannot use {out}: {os_error_reason(error)}; choose another --out DIR") from error
    lock = FolderLock(out)
    lock.acquire()
    return lock


def _write_plan(out: Path, plan: dict[str, Any], tasks: Sequence[Task]) -> None:
    """Write ``sweep.json``; RunFolderError if the sweep that is there has another plan, except for more values."""
    if (out / SWEEP).is_file():
        try:
            old = decode_json((out / SWEEP).read_bytes())
            is_same = all(old[key] == plan[key] for key in ("format", "recipe", "settings", "trials", "seed"))
            old_axes, axes = old["axes"], plan["axes"]
            is_same = is_same and list(old_axes) == list(axes) and all(set(old_axes[k]) <= set(axes[k]) for k in axes)
            known = shlex.join([*old["settings"], *(f"{key}={','.join(values)}" for key, values in old_axes.items())])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{out / SWEEP} is damaged; choose another --out DIR") from error
        if not is_same:
            draw = "" if old["trials"] is None else f" --trials {old['trials']} --seed {old['seed']}"
            raise RunFolderError(
                f"{out} is the sweep of {old['recipe']} {known}{draw}; repeat that, where these lists of values may "
                "be longer, or choose another --out DIR"
            )
    write_atomic(out / SWEEP, encode_json({**plan, "runs": [task.to_json() for task in tasks]}, SWEEP))


def _print_plan(tasks: Sequence[Task], console: Console) -> None:
    for task in tasks:
        parent = f"  continues {task.parent}" if task.parent else ""
        end = f"  until {task.until}" if task.until else ""
        console.print(f"{task.folder}{end}{parent}", highlight=False, soft_wrap=True)
    shared = sum(task.until is not None for task in tasks)
    console.print(f"{plural(len(tasks) - shared, 'trial')}, {plural(shared, 'shared run')}", highlight=False)


class _Monitor:
    """A live table in a terminal, else a line for each run that starts or ends."""

    def __init__(
        self,
        out: Path,
        axes: Sequence[Axis],
        trials: Sequence[Trial],
        tasks: Sequence[Task],
        recipes: Sequence[Recipe],
        console: Console,
    ):
        self.out, self.axes, self.console = out, axes, console
        self.values = {trial.name: trial.values for trial in trials}
        self.epochs = {task.folder: recipes[task.trials[0]].train.epochs for task in tasks}
        self.status = {task.folder: "waiting" for task in tasks}
        self.begun: dict[str, float] = {}
        self.failed: list[tuple[Task, str]] = []
        self.live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> _Monitor:
        if self.console.is_terminal:
            self.live = Live(self._table(), console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def started(self, task: Task) -> None:
        self.status[task.folder] = "running"
        self.begun[task.folder] = time.monotonic()
        if self.live is None:
            self._say(f"{task.folder}: started")

    def ended(self, task: Task, outcome: Outcome) -> None:
        self.status[task.folder] = outcome.status
        if outcome.status == "failed":
            self.failed.append((task, outcome.message))
        if self.live is None:
            begun = self.begun.get(task.folder)
            took = "not started" if begun is None else format_duration(time.monotonic() - begun)
            done = sum(status not in ("waiting", "running") for status in self.status.values())
            self._say(f"{task.folder}: {outcome.status} ({took}); {done} of {len(self.status)} runs have ended")

    def tick(self) -> None:
        if self.live is not None and time.monotonic() - self._drawn > _REFRESH_SECONDS:
            self.live.update(self._table(), refresh=True)
            self._drawn = time.monotonic()

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _table(self) -> Table:
        table = simple_table([*short_titles(self.axes), "status"], ["time"])
        for folder, status in self.status.items():
            values = self.values.get(folder, (folder, *[""] * (len(self.axes) - 1)))
            time_taken = format_duration(time.monotonic() - self.begun[folder]) if status == "running" else ""
            table.add_row(*values, self._progress(folder) if status == "running" else status, time_taken)
        counts = Counter(self.status.values())
        table.caption = ", ".join(f"{count} {status}" for status, count in counts.items())
        return table

    def _progress(self, folder: str) -> str:
        try:
            run = RunDir.open(self.out / folder)
            if run.stage != STAGES[0]:
                return run.stage or "starting"
            rows = [row for row in run.read_metrics() if row["stage"] == STAGES[0]]
        except PrunekitError:
            return "starting"
        return f"train {len(rows)}/{self.epochs[folder]}"


def _report(out: Path, axes: Sequence[Axis], trials: Sequence[Trial], console: Console) -> pd.DataFrame:
    table, metric = trials_table(out, axes, trials)
    write_atomic(out / "trials.csv", table.to_csv(index=False).encode())
    titles = short_titles(axes)
    if metric is not None:
        runs = [out / trial.name for trial in trials if is_run_folder(out / trial.name)]
        report(runs, out / "report", Console(quiet=True))
        means = means_table(table, titles, metric)
        costs = [cost for cost in COSTS if cost in table]
        if means is None:
            console.print(_rendered(table, titles, [metric, *costs], on_front(table, metric)))
        else:
            others = [title for title in titles if title != "seed"]
            console.print(_rendered(table, titles, [metric, *costs]))
            console.print(_rendered(means, others, [metric, "std", "seeds", *costs], on_front(means, metric)))
        console.print("* on the Pareto front: nothing is better in the metric and in each cost", highlight=False)
        if len(titles) > 1 and table[metric].nunique() > 1:
            shares = importance_table(table, titles, metric)
            console.print(_rendered(shares, ["key", "best value"], ["share of variance"]))
    files = [out / "trials.csv", *([] if metric is None else [out / "report"])]
    console.print(Text(f"saved to {' and '.join(map(str, files))}"), soft_wrap=True)
    return table


def _rendered(table: pd.DataFrame, left: Sequence[str], right: Sequence[str], marks: pd.Series | None = None) -> Table:
    rendered = simple_table(left, [*right, *([] if marks is None else [""])])
    for index, row in table.iterrows():
        numbers = [_number(row[column], column) for column in right]
        mark = [] if marks is None else ["*" if marks[index] else ""]
        rendered.add_row(*(str(row[column]) for column in left), *numbers, *mark)
    return rendered


def _number(value: Any, column: str) -> str:
    if pd.isna(value):
        return ""
    if column in ("params", "macs"):
        return si(value)
    return str(int(value)) if column == "seeds" else f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"
