"""What a run tells while it goes on: a bar in a terminal, a plain line an epoch elsewhere."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Tells of stages, steps and epochs on a console.

    Args:
        console: where it goes.

    Attributes:
        log: a file that gets every line too, with the time.
    """

    def __init__(self, console: Console):
        self.console = console
        self.log: Path | None = None
        self._bar: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """One line."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(' ', 'seconds')}  {text}\n")
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, stage: str, steps: int, done: int) -> None:
        """A stage of training begins, with ``done`` of its steps done before."""
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(stage, total=steps, completed=done, figures="")
        self._bar.start()

    def step(self, done: int, loss: float, penalty: float, alive: int, of: int) -> None:
        """``done`` steps are done; the figures are the last step's."""
        if self._bar is not None:
            figures = f"loss {loss:.3f} pen {penalty:.2g} alive {alive}"
            self._bar.update(self._task, completed=done, figures=figures)

    def epoch(self, line: dict[str, Any]) -> None:
        """An epoch is done; ``line`` is what metrics.jsonl holds of it."""
        metrics = " ".join(f"{name} {value:.3f}" for name, value in line["metrics"].items())
        sizes = "".join(
            f"{name} {_short(size)}/{_short(line['budget'][name])} " for name, size in line.get("size", {}).items()
        )
        # At most 80 columns with two metrics.
        self.say(
            f"{line['stage']:8} {line['epoch']:3} loss {line['loss']:.3f} pen {line['penalty']:.2g} "
            f"{sizes or 'alive {alive}/{of} '.format(**line)}{metrics} {line['seconds']:.0f} s"
        )

    def stop(self) -> None:
        """The stage is over, or was broken off."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def counter(self, title: str) -> Any:
        """A callable (done, total) that shows a bar of its own in a terminal; call its ``close`` at the end."""
        return _Counter(self.console, title)


def _short(number: float) -> str:
    """A large number in a few columns: 24.3k, 1.52M."""
    power = min(len(str(round(number))) - 1, 9) // 3
    return f"{number / 1000**power:.3g}{('', 'k', 'M', 'G')[power]}"


class _Counter:
    def __init__(self, console: Console, title: str):
        self._bar = Progress(
            TextColumn("{task.description:9}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None)
        self._bar.start()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._bar.stop()
