"""What a run tells while it goes on: a live display in a terminal, a plain line an epoch everywhere.

The display is made of parts that are put into lines as they fit, so that nothing wraps however narrow the terminal is.
Nothing here knows where its figures come from: a training tells a :class:`Reporter`, ``prunekit watch`` reads a folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from prunekit.utils.io import os_error_reason
from prunekit.utils.logging import is_quiet, progress_logger

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
SPARK = 12  # columns of a sparkline
BAR, WIDEST = 6, 40  # columns of a bar: fewer say nothing, more say no more
GAP = "  "


def training_epochs(train: int, finetune: int, rounds: int = 1, baseline: bool = False) -> dict[str, int]:
    """The trainings of a run, in their order, and their epochs: "train", "baseline" where there is one, after each
    round of cuts but the last "step1", "step2" …, and "finetune"."""
    return {
        "train": train,
        **({"baseline": train} if baseline else {}),
        **{f"step{number}": finetune for number in range(1, rounds)},
        "finetune": finetune,
    }


def sparkline(values: Sequence[float], width: int = SPARK, ascii_only: bool = False) -> str:
    """Values as a line of blocks, the smallest the lowest and the largest the highest.

    Args:
        values: in their order; where there are more than ``width``, neighbours share a block as their mean.
        width: in columns, at most.
        ascii_only: draw with what every terminal has.
    """
    known = [value for value in values if math.isfinite(value)]
    count = min(len(known), width)
    edges = [round(index * len(known) / count) for index in range(count + 1)] if count else [0]
    means = [math.fsum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def format_duration(seconds: float) -> str:
    """A duration: 0:42, 1:05:03, 2 d 3:04:05."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    text = f"{hours}:{minutes:02}:{whole % 60:02}" if whole >= 3600 else f"{minutes}:{whole % 60:02}"
    return f"{days} d {text}" if days else text


def format_count(number: float) -> str:
    """A large number in a few columns: 24.3k, 1.52M."""
    power = min(len(str(round(abs(number)))) - 1, 9) // 3
    return f"{number / 1000**power:.3g}{('', 'k', 'M', 'G')[power]}"


@dataclass
class TrainingStatus:
    """What is known of one training at one moment.

    Attributes:
        stage: its name.
        epoch: the one under way, from 1.
        epochs: of how many; None where nobody says.
        share: of the training that is done, 0 … 1.
        left: seconds until it ends; None where nobody can tell.
        run_left: a guess of the seconds until all trainings of the run have ended; None where this is the last.
        losses: for the sparkline.
        line: what ``metrics.jsonl`` holds of an epoch, or as much of it as is known.
        courses: metric → its values, epoch by epoch.
    """

    stage: str
    epoch: int = 0
    epochs: int | None = None
    share: float = 0.0
    left: float | None = None
    run_left: float | None = None
    losses: Sequence[float] = ()
    line: dict[str, Any] = field(default_factory=dict)
    courses: dict[str, Sequence[float]] = field(default_factory=dict)

    def parts(self, ascii_only: bool) -> list[Text]:
        """What stands below the bar."""
        line, parts = self.line, []
        if "loss" in line:
            parts.append(f"loss {line['loss']:.3f} {sparkline(self.losses, SPARK, ascii_only)}".rstrip())
        if line.get("penalty"):
            name = "lambda" if ascii_only else "λ"
            parts += [
                f"penalty {_amount(line['penalty'])}",
                *([f"{name} {line['lambda']:.3g}"] if "lambda" in line else []),
            ]
        if "alive" in line:
            parts.append(f"alive {line['alive']}/{line['of']}")
        parts += _sizes(line)
        for name, values in self.courses.items():
            parts.append(f"{name} {values[-1]:.3f} {sparkline(values, SPARK, ascii_only)}")
        if self.run_left is not None:
            parts.append(f"run ~{format_duration(self.run_left)} left")
        return [Text(part) for part in parts]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        of = f"/{self.epochs}" if self.epochs else ""
        left = Text("" if self.left is None else f"{format_duration(self.left)} left")
        head = Text.assemble((self.stage, "bold"), f" epoch {self.epoch}{of}")
        parts = self.parts(options.ascii_only)
        if self.left is None and self.share >= 1:
            yield from wrap_parts([head, *parts], options.max_width)
            return
        yield from progress_line(head, self.share if self.epochs else None, left, options)
        yield from wrap_parts(parts, options.max_width)


def progress_line(head: Text, share: float | None, tail: Text, options: ConsoleOptions) -> Iterator[Text]:
    """One line: a head, a bar over what is left of the width (none where that is too little), and a tail."""
    width = min(WIDEST, options.max_width - head.cell_len - tail.cell_len - 2)
    if share is None or width < BAR:
        yield from wrap_parts([head, tail], options.max_width)
        return
    done = min(width, max(0, int(width * share)))
    full, rest = ("#", ".") if options.ascii_only else ("━", "─")
    yield _one_line(Text.assemble(head, " ", (full * done, "green"), (rest * (width - done), "dim"), " ", tail))


def wrap_parts(parts: Sequence[Text], width: int) -> Iterator[Text]:
    """Lines that hold the parts in their order, as many as fit into each; only a part that is wider itself is cut."""
    line = Text()
    for part in (part for part in parts if part):
        if line and line.cell_len + len(GAP) + part.cell_len > width:
            yield _one_line(line)
            line = Text()
        line = Text.assemble(line, GAP if line else "", part)
    if line:
        yield _one_line(line)


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "crop"
    return text


def _sizes(line: dict[str, Any]) -> list[str]:
    """The size against the budget: params 145k/100k."""
    budget = line.get("budget", {})
    return [
        f"{name} {format_count(size)}" + (f"/{format_count(budget[name])}" if name in budget else "")
        for name, size in line.get("size", {}).items()
    ]


def format_epoch(line: dict[str, Any], epochs: int | None = None) -> str:
    """One epoch of ``metrics.jsonl`` as a line, at most 80 columns with two metrics."""
    of = f"/{epochs}" if epochs else ""
    parts = [f"{line['stage']} {line['epoch']:{len(str(epochs or 100))}}{of}", f"loss {line['loss']:.3f}"]
    parts += [f"pen {_amount(line['penalty']):>5}"] if line["penalty"] else []
    parts += _sizes(line) or [f"alive {line['alive']:{len(str(line['of']))}}/{line['of']}"]
    parts += [f"cut {line['shrunk']['channels']}"] if "shrunk" in line else []
    parts += [f"{name} {value:.3f}" for name, value in line["metrics"].items()]
    seconds = line["seconds"]
    parts.append(f"{seconds:.{int(seconds < 9.95)}f} s" if seconds < 99.5 else format_duration(seconds))
    return " ".join(parts)


def _amount(number: float) -> str:
    return format_count(number) if abs(number) >= 1000 else f"{number:.2g}"


class Reporter:
    """Tells of stages, steps and epochs on a console.

    Args:
        console: where it goes.

    Attributes:
        log_file: a file that gets every line too, with the time; where it cannot be written, that is said once.
        training_epochs: those of the run, in their order, and their epochs; for the guess of how long the run will take.
    """

    def __init__(self, console: Console):
        self.console = console
        self.log_file: Path | None = None
        self.training_epochs: dict[str, int] = {}
        self._log_failed = False
        self._views: list[Any] = []
        self._live: Live | None = None
        self._training: _Training | None = None

    def info(self, text: str) -> None:
        """One line."""
        self.write_log(text)
        if not is_quiet():
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def debug(self, text: str) -> None:
        """One line, for the log alone; at the level debug the terminal shows it too."""
        self.write_log(text)
        progress_logger.debug("%s", text)

    def write_log(self, text: str) -> None:
        """One line, for the log alone at every level: the terminal shows it by itself, or not at all."""
        if self.log_file is None:
            return
        try:
            with self.log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{datetime.now().isoformat(' ', 'seconds')}  {text}\n")
        except OSError as error:
            # No run is lost for a line of its log; there may be room for the next.
            if not self._log_failed:
                self._log_failed = True
                self.console.print(
                    f"cannot write {self.log_file}: {os_error_reason(error)}; going on, lines of the log are lost",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the run: shows that it lives, says how long a training took, notes what broke it off."""
        began = time.monotonic()
        try:
            with self.spinner(name):
                yield
        except BaseException as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.debug(f"{name}: {'interrupted' if isinstance(error, KeyboardInterrupt) else f'failed: {reason}'}")
            raise
        if name in self.training_epochs:
            self.info(f"{name}: done in {format_duration(time.monotonic() - began)}")

    @contextmanager
    def spinner(self, title: str) -> Iterator[None]:
        """Something that takes a while and cannot say how long: its title and the time since it began."""
        view = _Busy(title)
        self._push(view)
        try:
            yield
        finally:
            self._pop(view)

    def start_training(
        self, stage: str, epochs: int, steps: int, first: int, losses: Sequence[float] = (), step: int = 0
    ) -> None:
        """A training begins.

        Args:
            stage: its name.
            epochs: how many there are.
            steps: in each.
            first: how many epochs are done before.
            losses: theirs.
            step: how many steps of the next one are done before.
        """
        self._training = _Training(stage, epochs, steps, first, list(losses), self._later(stage), step)
        self._push(self._training)

    def log_step(self, done: int, loss: float, penalty: float, weight: float, alive: int, total: int) -> None:
        """``done`` steps of the training are done; the figures are the last step's, ``weight`` is λ."""
        if self._training is not None:
            figures = {"loss": loss, "penalty": penalty, "lambda": weight, "alive": alive, "of": total}
            self._training.step(done, figures)

    def log_epoch(self, line: dict[str, Any]) -> None:
        """An epoch is done; ``line`` is what metrics.jsonl holds of it."""
        if self._training is not None:
            self._training.epoch(line)
        self.info(format_epoch(line, self._training and self._training.epochs))

    def end_training(self) -> None:
        """The training is over, or was broken off."""
        if self._training is not None:
            self._pop(self._training)
            self._training = None

    def progress_bar(self, title: str) -> _Counter:
        """A callable (done, total) that shows a bar of its own in a terminal; call its ``close`` at the end."""
        view = _Counter(title, self._pop)
        self._push(view)
        return view

    def _later(self, stage: str) -> int:
        """The epochs of the trainings that follow."""
        names = list(self.training_epochs)
        after = names[names.index(stage) + 1 :] if stage in names else []
        return sum(self.training_epochs[name] for name in after)

    def _push(self, view: Any) -> None:
        self._views.append(view)
        if self._live is None and self.console.is_interactive and not is_quiet():
            self._live = Live(console=self.console, get_renderable=self._top, transient=True, vertical_overflow="crop")
            self._live.start(refresh=True)

    def _pop(self, view: Any) -> None:
        if view in self._views:
            self._views.remove(view)
        if not self._views and self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _top(self) -> Any:
        return self._views[-1] if self._views else ""


class _Training:
    """A training under way, as a view of the live display."""

    def __init__(self, stage: str, epochs: int, steps: int, first: int, losses: list[float], later: int, step: int = 0):
        self.stage, self.epochs, self.steps, self.later = stage, epochs, steps, later
        self.first = self.done = first * steps + step
        self.losses = losses  # of the epochs that are done
        self.looks: list[float] = []  # within the one that is not
        self.line: dict[str, Any] = {}
        self.began = self.looked = time.monotonic()

    def step(self, done: int, figures: dict[str, Any]) -> None:
        self.done, self.looked = done, time.monotonic()
        self.looks.append(figures["loss"])
        self.line = {**self.line, **figures}

    def epoch(self, line: dict[str, Any]) -> None:
        self.losses, self.looks = [*self.losses, line["loss"]], []
        self.line, self.looked = line, time.monotonic()

    def figures(self) -> TrainingStatus:
        now, total = time.monotonic(), self.epochs * self.steps
        pace = (self.looked - self.began) / (self.done - self.first) if self.done > self.first else None
        left = None if pace is None else max(0.0, pace * (total - self.done) - (now - self.looked))
        looks = self.looks
        mean = [math.fsum(looks) / len(looks)] if looks else []
        return TrainingStatus(
            stage=self.stage,
            epoch=min(self.epochs, max(self.done - 1, self.first) // self.steps + 1),
            epochs=self.epochs,
            share=self.done / max(total, 1),
            left=left,
            run_left=left + pace * self.steps * self.later if self.later and left is not None else None,
            losses=[*self.losses, *mean] if self.losses else looks,
            line=self.line,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.figures()


class _Busy:
    """A title and the time since it began."""

    def __init__(self, title: str):
        self.title = title
        self.began = time.monotonic()
        self.spinners = {ascii_only: Spinner("line" if ascii_only else "dots") for ascii_only in (False, True)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wheel = self.spinners[options.ascii_only].render(console.get_time())
        elapsed = format_duration(time.monotonic() - self.began)
        yield from wrap_parts([Text.assemble(wheel, " ", (self.title, "bold"), " ", elapsed)], options.max_width)


class _Counter:
    """So many of so many, as a view of the live display."""

    def __init__(self, title: str, close: Callable[[Any], None]):
        self.title = title
        self.done, self.total = 0, 0
        self.began = time.monotonic()
        self._close = close

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def close(self) -> None:
        self._close(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        elapsed = time.monotonic() - self.began
        left = (
            f"{format_duration(elapsed / self.done * (self.total - self.done))} left"
            if self.done
            else format_duration(elapsed)
        )
        head = Text.assemble((self.title, "bold"), f" {self.done}/{self.total}" if self.total else "")
        yield from progress_line(head, self.done / self.total if self.total else None, Text(left), options)
