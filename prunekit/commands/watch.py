"""``prunekit watch``: show the progress of a run from another process.

It takes no lock and writes figures into ``report/`` only. A file that is being replaced or half written is skipped, and
read again the next time.
"""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.text import Text

from prunekit.config.yaml import parse
from prunekit.errors import CheckpointError, PrunekitError, RunFolderError
from prunekit.runs.artifacts import METRICS, RECIPE
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES, training_position
from prunekit.runs.state import STATE
from prunekit.utils.progress import TrainingStatus, format_duration, training_epochs, wrap_parts
from prunekit.utils.text import plural
from prunekit.weights import is_shipped

RECENT_EPOCHS = 5  # the time left is estimated from the mean of these
DRAWING_SHARE = 1 / 5  # of the time at most: drawing takes the processor from the training
NUMBERS = ("loss", "penalty", "lambda", "alive", "of", "seconds")


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run folder at one moment."""

    path: Path
    status: str  # "running", "complete", "interrupted", "failed", "unknown", or "killed" (its process is gone)
    stage: str | None  # the last that started; None before the first
    process: tuple[Any, Any]  # id and host
    epochs: dict[str, int] = field(default_factory=dict)  # training → number of epochs in the recipe
    lines: list[dict[str, Any]] = field(default_factory=list)  # complete ones of metrics.jsonl
    damaged: int = 0  # number of damaged lines, except for a last line that may be half written
    altered: bool = False  # metrics.jsonl does not match its checksum although all lines are complete
    age: float | None = None  # seconds since the last line was written; None before the first
    last_log_line: str = ""  # of run.log

    @property
    def finished(self) -> bool:
        return self.status != "running"

    @property
    def version(self) -> tuple[Any, ...]:
        """Changes if there is something new to show."""
        return len(self.lines), self.lines[-1]["stage"] if self.lines else None, self.finished

    def trainings(self) -> Iterator[TrainingStatus]:
        """The trainings that have started."""
        current = self.stage if self.status == "running" else None
        stages = list(dict.fromkeys(line["stage"] for line in self.lines))
        for stage in stages:
            lines = [line for line in self.lines if line["stage"] == stage]
            # The trainings "step1", … belong to the stage "slim".
            last = stage == self.lines[-1]["stage"] and current in STAGES
            yield self._training(stage, lines, last and training_position(stage)[0] == STAGES.index(current))
        if current in self.epochs and current not in stages:
            yield TrainingStatus(current, 1, self.epochs[current])

    def _training(self, stage: str, lines: list[dict[str, Any]], running: bool) -> TrainingStatus:
        epochs, done = self.epochs.get(stage), lines[-1]["epoch"]
        running = running and epochs is not None and done < epochs
        recent = [line["seconds"] for line in lines[-RECENT_EPOCHS:]]
        seconds_per_epoch = math.fsum(recent) / len(recent)
        left = max(0.0, seconds_per_epoch * (epochs - done) - (self.age or 0.0)) if running else None
        names = list(self.epochs)
        metrics = dict.fromkeys(name for line in lines for name in line["metrics"])
        later = sum(self.epochs[name] for name in names[names.index(stage) + 1 :]) if stage in names else 0
        return TrainingStatus(
            stage=stage,
            epoch=done + 1 if running else done,
            epochs=epochs,
            progress=done / epochs if epochs else 0.0,
            seconds_left=left,
            run_seconds_left=left + seconds_per_epoch * later if left is not None and later else None,
            losses=[line["loss"] for line in lines],
            line=lines[-1],
            histories={name: [line["metrics"][name] for line in lines if name in line["metrics"]] for name in metrics},
        )

    def _status_parts(self) -> list[str]:
        pid, host = self.process
        stage = self.stage or "its first stage"
        if self.status == "running":
            number = f"stage {stage}, {STAGES.index(stage) + 1} of {len(STAGES)}" if stage in STAGES else ""
            return ["running", number, f"process {pid}{f' on {host}' if host != socket.gethostname() else ''}"]
        return {
            "complete": ["complete"],
            "interrupted": [f"interrupted in {stage}", "continue with --resume"],
            "killed": [f"killed in {stage}", f"process {pid} no longer exists", "continue with --resume"],
            "failed": [f"failed in {stage}"],
        }.get(self.status, ["its state cannot be read"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = [Text(self.path.resolve().name, "bold"), *map(Text, self._status_parts())]
        yield from wrap_parts(parts, options.max_width)
        trainings = list(self.trainings())
        yield from trainings
        training = bool(trainings) and trainings[-1].seconds_left is not None
        notes = []
        if not trainings and not self.finished:
            notes.append("no epoch has finished yet")
        if self.last_log_line and not training:
            notes.append(self.last_log_line)
        if training and self.age is not None:
            notes.append(f"last epoch {format_duration(self.age)} ago")
        if self.damaged:
            notes.append(f"{METRICS}: {plural(self.damaged, 'damaged line')} skipped")
        if self.altered:
            notes.append(f"{METRICS}: does not match its checksum; its numbers may be wrong")
        for note in notes:
            yield from wrap_parts([Text(note)], options.max_width)


def read_snapshot(path: str | Path) -> RunSnapshot:
    """Read the current state of a run folder.

    Raises:
        RunFolderError: it is not a run folder, or needs a newer prunekit.
        CheckpointError: ``state.json`` is damaged.
    """
    run = RunDir.open(path)
    if is_shipped(run.path):
        raise RunFolderError(f"{path} comes with prunekit and is complete; show it with: prunekit report {path}")
    state = _parse_json(_read_bytes(run.path / STATE))
    status, stage = run.status, state.get("stage")
    lines, damaged = _parse_metrics(_read_bytes(run.path / METRICS))
    try:
        run.read_metrics()
        altered = False
    except CheckpointError:
        altered = not damaged
    try:
        age = max(0.0, time.time() - (run.path / METRICS).stat().st_mtime) if lines else None
    except OSError:
        age = None
    return RunSnapshot(
        path=run.path,
        status="killed" if status == "interrupted" and state.get("status") == "running" else status,
        stage=stage if stage in STAGES else None,
        process=(state.get("pid"), state.get("host")),
        epochs=_parse_epochs(_read_bytes(run.path / RECIPE)),
        lines=lines,
        damaged=damaged,
        altered=altered,
        age=age,
        last_log_line=_last_line(_read_bytes(run.path / "run.log")),
    )


def watch(path: str | Path, console: Console, every: float = 5.0, once: bool = False) -> None:
    """Show a run until it has finished, and draw the figures of its training after each epoch.

    Args:
        console: a terminal is updated in place; otherwise each change is printed.
        every: seconds between two readings.
        once: read and print once.

    Raises:
        PrunekitError: the folder is not or no longer a run folder, or ``every`` is not a positive number.
    """
    if not 0 < every < math.inf:
        raise PrunekitError(f"--every {every:g}: must be a number of seconds above 0, such as 5")
    snapshot = read_snapshot(path)
    figures, shown = FigureWriter(snapshot.path), None
    if once or snapshot.finished:
        console.print(snapshot)
        console.print(Text(figures.update(snapshot)), soft_wrap=True)
        return
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop") if console.is_interactive else None

    def refresh() -> None:
        message = Text(figures.message, no_wrap=True, overflow="crop")
        live.update(Group(snapshot, message) if message else snapshot, refresh=True)

    try:
        with live or nullcontext():
            while True:
                if live is not None:
                    refresh()
                elif shown != snapshot.version:
                    console.print(snapshot)
                shown = snapshot.version
                figures.update(snapshot)
                if snapshot.finished:
                    break
                time.sleep(every)
                snapshot = _next_snapshot(path, every)
            if live is not None:
                refresh()
            else:
                console.print(Text(figures.message), soft_wrap=True)
    except KeyboardInterrupt:
        pass  # The usual way to stop watching.


def _next_snapshot(path: str | Path, every: float) -> RunSnapshot:
    """Read the folder, and again after a moment if it is being replaced by --overwrite."""
    try:
        return read_snapshot(path)
    except PrunekitError:
        time.sleep(max(every, 1.0))
        return read_snapshot(path)


class FigureWriter:
    """Draws the figures of a training into ``report/`` if there are new epochs; ``message`` says what, or why not."""

    def __init__(self, path: Path):
        self.path, self.message = path, ""
        self._drawn: tuple[Any, ...] | None = None
        self._not_before = 0.0

    def update(self, snapshot: RunSnapshot) -> str:
        """Draw, if it is time to; return the message."""
        start = time.monotonic()
        if snapshot.version == self._drawn or (start < self._not_before and not snapshot.finished):
            return self.message
        self._drawn = snapshot.version
        if not snapshot.lines:
            self.message = "no figures: no epoch has finished"
            return self.message
        # Imported here because matplotlib and pandas take long.
        from prunekit.reporting import load_run
        from prunekit.reporting.figures import training_figures, write_figure

        try:
            folder, names = self.path / "report", []
            for drawing in training_figures(load_run(self.path)):
                write_figure(drawing.figure, folder / drawing.name)
                names.append(drawing.name)
            self.message = f"figures in {folder}: {', '.join(names) or 'none'}"
        except CheckpointError as error:
            self.message = f"no figures: {error}"  # The folder may be read-only.
        end = time.monotonic()
        self._not_before = end + (end - start) * (1 / DRAWING_SHARE - 1)
        return self.message


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _parse_metrics(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The complete lines, and the number of damaged ones; the last line may be half written."""
    *complete, _ = data.split(b"\n")
    lines = [line for line in map(_parse_json, complete) if _is_epoch(line)]
    return lines, len(complete) - len(lines)


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
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _parse_epochs(data: bytes) -> dict[str, int]:
    """Training → epochs in the recipe; empty if it cannot be read."""
    try:
        recipe = parse(data.decode()).value
        counts = recipe["train"]["epochs"], recipe["finetune"]["epochs"], recipe["slim"]["steps"]
        baseline = recipe.get("baseline") is True
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return training_epochs(*counts, baseline) if all(isinstance(count, int) for count in counts) else {}


def _last_line(data: bytes) -> str:
    """The last line of a log, without its time and without control characters."""
    lines = data.decode("utf-8", "replace").splitlines()
    text = lines[-1].partition("  ")[2] if lines else ""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)
