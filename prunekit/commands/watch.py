"""``prunekit watch``: a run that is going on, or over, from another process.

It reads the run folder and nothing else, holds no lock, and writes figures into ``report/`` alone. What it reads may be
replaced at that moment, or be half written: a file that cannot be read now is read the next time.
"""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from prunekit.config.yaml import parse
from prunekit.errors import CheckpointError, PrunekitError
from prunekit.runs.artifacts import METRICS, RECIPE
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES, training_position
from prunekit.runs.state import STATE
from prunekit.utils.progress import TrainingStatus, format_duration, training_epochs, wrap_parts

RECENT = 5  # epochs whose mean says how long the next will take
SHARE = 5  # figures take at most one part in so many of the time, since the training needs the processor too
NUMBERS = ("loss", "penalty", "lambda", "alive", "of", "seconds")


@dataclass(frozen=True)
class Glance:
    """What a run folder shows at one moment.

    Attributes:
        path: the folder.
        status: running, complete, interrupted, failed, unknown, or killed (it says that it runs, and its process is
            gone).
        stage: the last that began; None before the first.
        process: its number and the host it runs on.
        epochs: of each training, as the recipe says.
        lines: of ``metrics.jsonl``, those that are whole.
        damaged: how many others there are, the last one aside, which may be half written.
        altered: whether all lines are whole, and yet not those that were written.
        age: seconds since the last line was written; None before the first.
        said: the last line of ``run.log``.
    """

    path: Path
    status: str
    stage: str | None
    process: tuple[Any, Any]
    epochs: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    altered: bool = False
    age: float | None = None
    said: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.status != "running"

    @property
    def course(self) -> tuple[Any, ...]:
        """What changes where there is something new to draw."""
        return len(self.lines), self.lines[-1]["stage"] if self.lines else None, self.over

    def trainings(self) -> Iterator[TrainingStatus]:
        """The trainings that have begun, each with its figures."""
        under_way = self.status == "running" and self.stage
        for stage in dict.fromkeys(line["stage"] for line in self.lines):
            lines = [line for line in self.lines if line["stage"] == stage]
            # Its training may stand within a stage of another name, as those of "slim" do.
            last = stage == self.lines[-1]["stage"]
            yield self._figures(stage, lines, bool(under_way and last and _within(stage, self.stage)))
        fresh = under_way in self.epochs and all(line["stage"] != under_way for line in self.lines)
        if fresh:
            yield TrainingStatus(under_way, 1, self.epochs[under_way])

    def _figures(self, stage: str, lines: list[dict[str, Any]], going: bool) -> TrainingStatus:
        epochs, done = self.epochs.get(stage), lines[-1]["epoch"]
        going = going and epochs is not None and done < epochs
        recent = [line["seconds"] for line in lines[-RECENT:]]
        pace = math.fsum(recent) / len(recent)
        left = max(0.0, pace * (epochs - done) - (self.age or 0.0)) if going else None
        names = list(self.epochs)
        later = sum(self.epochs[name] for name in names[names.index(stage) + 1 :]) if stage in names else 0
        return TrainingStatus(
            stage=stage,
            epoch=done + 1 if going else done,
            epochs=epochs,
            share=done / epochs if epochs else 0.0,
            left=left,
            run_left=left + pace * later if left is not None and later else None,
            losses=[line["loss"] for line in lines],
            line=lines[-1],
            courses={name: [line["metrics"].get(name, math.nan) for line in lines] for name in lines[-1]["metrics"]},
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pid, host = self.process
        stage = self.stage or "its first stage"
        at = f" on {host}" if host != socket.gethostname() else ""
        number = f"stage {self.stage}, {STAGES.index(self.stage) + 1} of {len(STAGES)}" if self.stage in STAGES else ""
        told = {
            "running": ["running", number, f"process {pid}{at}"],
            "complete": ["complete"],
            "interrupted": [f"interrupted in {stage}", "go on with --resume"],
            "killed": [f"killed in {stage}", f"process {pid} is gone", "go on with --resume"],
            "failed": [f"failed in {stage}"],
        }.get(self.status, ["it has no state that can be read"])
        yield from wrap_parts([Text(self.path.resolve().name, "bold"), *map(Text, told)], options.max_width)
        trained = list(self.trainings())
        yield from trained
        if not trained and not self.over:
            yield from wrap_parts([Text("no epoch is done yet")], options.max_width)
        notes = [self.said] if self.said and not (trained and trained[-1].left is not None) else []
        if trained and trained[-1].left is not None and self.age is not None:
            notes.append(f"last epoch {format_duration(self.age)} ago")
        if self.damaged:
            notes.append(f"{METRICS}: {self.damaged} damaged line{'s' if self.damaged > 1 else ''} left out")
        if self.altered:
            notes.append(f"{METRICS}: not as it was written; its figures may be wrong")
        for note in notes:
            yield from wrap_parts([Text(note)], options.max_width)


def look(path: str | Path) -> Glance:
    """What the folder shows now.

    Raises:
        RunFolderError: it is no run folder, or needs a newer prunekit.
        CheckpointError: ``state.json`` is damaged.
    """
    run = RunDir.open(path)
    state = _mapping(_bytes(run.path / STATE))
    status, stage = run.status, state.get("stage")
    lines, damaged = _lines(_bytes(run.path / METRICS))
    try:
        run.read_metrics()
        altered = False
    except CheckpointError:
        altered = not damaged
    try:
        age = max(0.0, time.time() - (run.path / METRICS).stat().st_mtime) if lines else None
    except OSError:
        age = None
    return Glance(
        path=run.path,
        status="killed" if status == "interrupted" and state.get("status") == "running" else status,
        stage=stage if stage in STAGES else None,
        process=(state.get("pid"), state.get("host")),
        epochs=_epochs(_bytes(run.path / RECIPE)),
        lines=lines,
        damaged=damaged,
        altered=altered,
        age=age,
        said=_last(_bytes(run.path / "run.log")),
    )


def watch(path: str | Path, console: Console, every: float = 5.0, once: bool = False) -> None:
    """Show how a run goes until it is over, and draw its training's figures anew after each epoch.

    Args:
        path: the run folder.
        console: where it is shown; where it is no terminal, only what is new is printed.
        every: seconds between two looks.
        once: look once and return.

    Raises:
        PrunekitError: the folder is no run folder or has become none, or ``every`` is no time.
    """
    if not 0 < every < math.inf:
        raise PrunekitError(f"--every {every:g}: give the seconds between two looks, such as 5")
    glance = look(path)
    if once or glance.over:
        console.print(glance)
        console.print(Text(Drawer(glance.path).draw(glance)), soft_wrap=True)
        return
    drawer, shown = Drawer(glance.path), None
    view = Live(console=console, auto_refresh=False, vertical_overflow="crop") if console.is_interactive else None
    try:
        if view is not None:
            view.start()
        while True:
            if view is not None:
                view.update(_Frame(glance, drawer.said), refresh=True)
            elif shown != glance.course:
                console.print(glance)
            shown = glance.course
            drawer.draw(glance)
            if glance.over:
                break
            time.sleep(every)
            glance = _next(path, every)
        if view is not None:
            view.update(_Frame(glance, drawer.said), refresh=True)
        else:
            console.print(Text(drawer.said), soft_wrap=True)
    except KeyboardInterrupt:
        pass  # Which is how one stops watching.
    finally:
        if view is not None:
            view.stop()


def _next(path: str | Path, every: float) -> Glance:
    """The next look; while a run is replaced by --overwrite there is none for a moment."""
    try:
        return look(path)
    except PrunekitError:
        time.sleep(max(every, 1.0))
        return look(path)


class Drawer:
    """Draws the figures of a training into ``report/``, where there is something new to draw.

    Attributes:
        said: what was drawn, or why it was not.
    """

    def __init__(self, path: Path):
        self.path = path
        self.said = ""
        self._drawn: tuple[Any, ...] | None = None
        self._due = 0.0

    def draw(self, glance: Glance) -> str:
        """Draw, if it is time to; what there is to say about it."""
        began = time.monotonic()
        if glance.course == self._drawn or (began < self._due and not glance.over):
            return self.said
        self._drawn = glance.course
        if not glance.lines:
            self.said = "no figures: no epoch is done"
            return self.said
        # matplotlib and pandas take longer to import than all else here.
        from prunekit.reporting import load_run
        from prunekit.reporting.figures import training_figures, write_figure

        try:
            folder = self.path / "report"
            names = []
            for drawing in training_figures(load_run(self.path)):
                write_figure(drawing.figure, folder / drawing.name)
                names.append(drawing.name)
            self.said = f"figures in {folder}: {', '.join(names) or 'none'}"
        except CheckpointError as error:
            # As in a folder that belongs to someone else; the rest can be shown all the same.
            self.said = f"no figures: {error}"
        took = time.monotonic() - began
        self._due = time.monotonic() + (SHARE - 1) * took
        return self.said


@dataclass(frozen=True)
class _Frame:
    glance: Glance
    note: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.glance
        yield from wrap_parts([Text(self.note)], options.max_width)


# ---- what may be half written


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _mapping(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines that hold what an epoch has, and how many others there are but the one that may be half written."""
    *whole, _ = data.split(b"\n")
    found = [line for line in map(_mapping, whole) if _is_epoch(line)]
    return found, len(whole) - len(found)


def _is_epoch(line: dict[str, Any]) -> bool:
    try:
        training_position(line["stage"])
    except (PrunekitError, KeyError, TypeError, AttributeError):
        return False
    metrics = line.get("metrics")
    return (
        isinstance(line.get("epoch"), int)
        and all(_is_number(line.get(key)) for key in NUMBERS)
        and isinstance(metrics, dict)
        and all(map(_is_number, metrics.values()))
        and all(
            isinstance(sizes, dict) and all(map(_is_number, sizes.values()))
            for sizes in (line.get("size", {}), line.get("budget", {}))
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _epochs(data: bytes) -> dict[str, int]:
    """The trainings that the recipe names; none where it cannot be read."""
    try:
        recipe = parse(data.decode()).value
        counts = recipe["train"]["epochs"], recipe["finetune"]["epochs"], recipe["slim"]["steps"]
        baseline = recipe.get("baseline") is True
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return training_epochs(*counts, baseline) if all(isinstance(count, int) for count in counts) else {}


def _last(data: bytes) -> str:
    """The last line of a log, without its time and without what a terminal would take for an order."""
    lines = data.decode("utf-8", "replace").splitlines()
    text = lines[-1].partition("  ")[2] if lines else ""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)


def _within(training: str, stage: str | None) -> bool:
    return stage in STAGES and training_position(training)[0] == STAGES.index(stage)
