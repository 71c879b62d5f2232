"""Progress of a run: a live display in a terminal of any width, in ASCII too; one plain line per epoch elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from prunekit.utils.io import os_error_reason
from prunekit.utils.logging import is_quiet, progress_logger
from prunekit.utils.text import one_line, si

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
SPARKLINE_WIDTH = 12
MIN_BAR_WIDTH, MAX_BAR_WIDTH = 6, 40
GAP = "  "


def training_epochs(train: int, finetune: int, rounds: int = 1, baseline: bool = False) -> dict[str, int]:
    """Return name → epochs of the trainings of a run: train, baseline, step1, step2, …, finetune."""
    steps = {f"step{number}": finetune for number in range(1, rounds)}
    return {"train": train} | ({"baseline": train} if baseline else {}) | steps | {"finetune": finetune}


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH, ascii_only: bool = False) -> str:
    """Return finite values as blocks of different heights; beyond ``width``, neighbors are averaged."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(len(finite), width)
    edges = [round(index * len(finite) / count) for index in range(count + 1)] if count else [0]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def format_duration(seconds: float) -> str:
    """Return 0:42, 1:05:03 or 2 d 3:04:05."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    text = f"{hours}:{minutes:02}:{whole % 60:02}" if whole >= 3600 else f"{minutes}:{whole % 60:02}"
    return f"{days} d {text}" if days else text


def _format_penalty(number: float) -> str:
    return si(number) if abs(number) >= 1000 else f"{number:.2g}"


def format_epoch(line: dict[str, Any], epochs: int | None = None) -> str:
    """Return a line of ``metrics.jsonl`` as text, at most 80 columns wide with two metrics."""
    total = f"/{epochs}" if epochs else ""
    parts = [f"{line['stage']} {line['epoch']:{len(str(epochs or 100))}}{total}", f"loss {line['loss']:.3f}"]
    parts += [f"pen {_format_penalty(line['penalty']):>5}"] if line["penalty"] else []
    parts += [f"alive {line['alive']:{len(str(line['of']))}}/{line['of']}"]
    parts += [f"{name} {value:.3f}" for name, value in line["metrics"].items()]
    seconds = line["seconds"]
    parts.append(f"{seconds:.{int(seconds < 9.95)}f} s" if seconds < 99.5 else format_duration(seconds))
    return " ".join(parts)


@dataclass
class TrainingStatus:
    """The state of a training at one moment, which renders itself."""

    stage: str
    epoch: int = 0  # from 1
    epochs: int | None = None
    progress: float = 0.0  # from 0 to 1
    seconds_left: float | None = None  # None: unknown
    run_seconds_left: float | None = None  # until all trainings end; None if this is the last one
    losses: Sequence[float] = ()
    line: dict[str, Any] = field(default_factory=dict)  # the known part of an epoch's line in metrics.jsonl
    histories: dict[str, Sequence[float]] = field(default_factory=dict)  # metric → value of each epoch

    def _parts(self, ascii_only: bool) -> list[Text]:
        line, parts = self.line, []
        if "loss" in line:
            parts.append(f"loss {line['loss']:.3f} {sparkline(self.losses, ascii_only=ascii_only)}".rstrip())
        if line.get("penalty"):
            parts.append(f"penalty {_format_penalty(line['penalty'])}")
            if "lambda" in line:
                parts.append(f"{'lambda' if ascii_only else 'λ'} {line['lambda']:.3g}")
        if "alive" in line:
            parts.append(f"alive {line['alive']}/{line['of']}")
        for name, values in self.histories.items():
            parts.append(f"{name} {values[-1]:.3f} {sparkline(values, ascii_only=ascii_only)}")
        if self.run_seconds_left is not None:
            parts.append(f"run ~{format_duration(self.run_seconds_left)} left")
        return [Text(part) for part in parts]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = f"/{self.epochs}" if self.epochs else ""
        head = Text.assemble((self.stage, "bold"), f" epoch {self.epoch}{total}")
        parts = self._parts(options.ascii_only)
        if self.seconds_left is None and self.progress >= 1:
            yield from wrap_parts([head, *parts], options.max_width)
            return
        left = Text("" if self.seconds_left is None else f"{format_duration(self.seconds_left)} left")
        yield from progress_line(head, self.progress if self.epochs else None, left, options)
        yield from wrap_parts(parts, options.max_width)


def progress_line(head: Text, progress: float | None, tail: Text, options: ConsoleOptions) -> Iterator[Text]:
    """Yield one line of head, bar and tail; without a bar if the progress is unknown or the terminal too narrow."""
    width = min(MAX_BAR_WIDTH, options.max_width - head.cell_len - tail.cell_len - 2)
    if progress is None or width < MIN_BAR_WIDTH:
        yield from wrap_parts([head, tail], options.max_width)
        return
    done = min(width, max(0, int(width * progress)))
    full, rest = ("#", ".") if options.ascii_only else ("━", "─")
    yield _single_line(Text.assemble(head, " ", (full * done, "green"), (rest * (width - done), "dim"), " ", tail))


def wrap_parts(parts: Sequence[Text], width: int) -> Iterator[Text]:
    """Yield lines that contain the parts in order; only a part that is wider than a line is cropped."""
    line = Text()
    for part in (part for part in parts if part):
        if line and line.cell_len + len(GAP) + part.cell_len > width:
            yield _single_line(line)
            line = Text()
        line = Text.assemble(line, GAP if line else "", part)
    if line:
        yield _single_line(line)


def _single_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "crop"
    return text


class Reporter:
    """Reports messages, stages, steps and epochs to a console, which has the live display, and a log file."""

    def __init__(self, console: Console):
        self.console = console
        self.log_file: Path | None = None
        self.training_epochs: dict[str, int] = {}  # of the run's trainings by name, to estimate the remaining time
        self._log_failed = False
        self._views: list[Any] = []
        self._live: Live | None = None
        self._training: _TrainingView | None = None

    def info(self, text: str) -> None:
        """Print and log a message."""
        self.write_log(text)
        if not is_quiet():
            self._print(text)

    def debug(self, text: str) -> None:
        """Log a message; the terminal shows it at level debug."""
        self.write_log(text)
        progress_logger.debug("%s", text)

    def write_log(self, text: str) -> None:
        """Write a message to the log file only."""
        if self.log_file is None:
            return
        try:
            with self.log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{datetime.now().isoformat(' ', 'seconds')}  {text}\n")
        except OSError as error:
            # The run continues; there may be space for the next line.
            if not self._log_failed:
                self._log_failed = True
                self._print(f"cannot write {self.log_file}: {os_error_reason(error)}; continuing, log lines are lost")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within ``with``, show a stage; report how long a training took, and log the exception that ends it."""
        start = time.monotonic()
        try:
            with self.spinner(name):
                yield
        except BaseException as error:
            reason = one_line(error)
            self.debug(f"{name}: {'interrupted' if isinstance(error, KeyboardInterrupt) else f'failed: {reason}'}")
            raise
        if name in self.training_epochs:
            self.info(f"{name}: done in {format_duration(time.monotonic() - start)}")

    @contextmanager
    def spinner(self, title: str) -> Iterator[None]:
        """Within ``with``, show a title and the elapsed time."""
        with closing(_SpinnerView(title, self._pop)) as view:
            self._push(view)
            yield

    def progress_bar(self, title: str) -> _ProgressBarView:
        """Show a bar; call the returned object with (done, total), and ``close`` it at the end."""
        view = _ProgressBarView(title, self._pop)
        self._push(view)
        return view

    def start_training(
        self,
        stage: str,
        epochs: int,
        steps: int,
        first: int,
        losses: Sequence[float] = (),
        step: int = 0,
        costs: Sequence[float] = (),
    ) -> None:
        """Show a training.

        Args:
            stage: its name.
            epochs: number of epochs.
            steps: steps per epoch.
            first: number of epochs already done.
            losses: losses of these epochs.
            step: number of steps already done in the next epoch.
            costs: relative duration of each epoch, where they differ.
        """
        names = list(self.training_epochs)
        later = names[names.index(stage) + 1 :] if stage in names else []
        later_steps = steps * sum(self.training_epochs[name] for name in later)
        self._training = _TrainingView(stage, epochs, steps, first * steps + step, later_steps, list(losses), costs)
        self._push(self._training)

    def log_step(self, done: int, loss: float, penalty: float, weight: float, alive: int, total: int) -> None:
        """Report that ``done`` steps are done; ``weight`` is λ, ``alive`` of ``total`` channels are not dead."""
        if self._training is not None:
            figures = {"loss": loss, "penalty": penalty, "lambda": weight, "alive": alive, "of": total}
            self._training.log_step(done, figures)

    def log_epoch(self, line: dict[str, Any]) -> None:
        """Report an epoch, given its line in ``metrics.jsonl``."""
        if self._training is not None:
            self._training.log_epoch(line)
        self.info(format_epoch(line, self._training and self._training.epochs))

    def end_training(self) -> None:
        """Hide the training."""
        self._pop(self._training)
        self._training = None

    def _push(self, view: Any) -> None:
        self._views.append(view)
        if self._live is None and self.console.is_interactive and not is_quiet():
            self._live = Live(
                console=self.console, get_renderable=self._innermost, transient=True, vertical_overflow="crop"
            )
            self._live.start(refresh=True)

    def _pop(self, view: Any) -> None:
        if view in self._views:
            self._views.remove(view)
        if not self._views and self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _innermost(self) -> Any:
        return self._views[-1] if self._views else ""


@dataclass(eq=False)
class _TrainingView:
    stage: str
    epochs: int
    steps: int
    done: int
    later_steps: int
    epoch_losses: list[float]
    costs: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.first = self.done
        self.step_losses: list[float] = []  # of the current epoch
        self.line: dict[str, Any] = {}
        self.started = self.updated = time.monotonic()

    def log_step(self, done: int, figures: dict[str, Any]) -> None:
        self.done, self.updated = done, time.monotonic()
        self.step_losses.append(figures["loss"])
        self.line = {**self.line, **figures}

    def log_epoch(self, line: dict[str, Any]) -> None:
        self.epoch_losses, self.step_losses = [*self.epoch_losses, line["loss"]], []
        self.line, self.updated = line, time.monotonic()

    def _work(self, done: int) -> float:
        """Return the cost of this many steps; a step of a training whose epochs cost the same costs 1."""
        if not self.costs:
            return done
        epochs, steps = divmod(done, self.steps)
        return self.steps * math.fsum(self.costs[:epochs]) + steps * math.fsum(self.costs[epochs : epochs + 1])

    def status(self) -> TrainingStatus:
        total, left, run_left = self.epochs * self.steps, None, None
        if self.done > self.first:
            work, whole = self._work(self.done), self._work(total)
            seconds_per_work = (self.updated - self.started) / (work - self._work(self.first))
            left = max(0.0, seconds_per_work * (whole - work) - (time.monotonic() - self.updated))
            later = self.later_steps * whole / max(total, 1)  # as if those cost the same
            run_left = left + seconds_per_work * later if later else None
        losses = self.step_losses
        if self.epoch_losses:
            losses = [*self.epoch_losses, *([math.fsum(losses) / len(losses)] if losses else [])]
        epoch = min(self.epochs, max(self.done - 1, self.first) // self.steps + 1)
        progress = self.done / max(total, 1)
        return TrainingStatus(self.stage, epoch, self.epochs, progress, left, run_left, losses, self.line)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.status()


class _View:
    """A title that is shown until ``close``."""

    def __init__(self, title: str, close: Callable[[Any], None]):
        self.title, self.close = Text(title, "bold"), partial(close, self)
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started


class _SpinnerView(_View):
    def __init__(self, title: str, close: Callable[[Any], None]):
        super().__init__(title, close)
        self.spinners = {ascii_only: Spinner("line" if ascii_only else "dots") for ascii_only in (False, True)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spinner = self.spinners[options.ascii_only].render(console.get_time())
        text = Text.assemble(spinner, " ", self.title, " ", format_duration(self.elapsed))
        yield from wrap_parts([text], options.max_width)


class _ProgressBarView(_View):
    done: float = 0
    total: float = 0

    def __call__(self, done: float, total: float) -> None:
        """Set the progress: counts, which are shown, or a share of 1.0."""
        self.done, self.total = done, total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tail = format_duration(self.elapsed)
        if self.done:
            tail = f"{format_duration(self.elapsed / self.done * (self.total - self.done))} left"
        is_count = isinstance(self.total, int) and self.total
        head = Text.assemble(self.title, f" {self.done}/{self.total}" if is_count else "")
        yield from progress_line(head, self.done / self.total if self.total else None, Text(tail), options)
