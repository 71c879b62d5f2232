"""Where the runs of a sweep are processed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from prunekit.sweep.tasks import Task
from prunekit.sweep.worker import Outcome, is_done, run_task

_TICK_SECONDS = 0.5


class Monitor(Protocol):
    """What is told of the progress of a sweep."""

    def started(self, task: Task) -> None:
        """A task is about to be processed."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """A task has ended, in this sweep or an earlier one; or cannot start, since its parent failed."""

    def tick(self) -> None:
        """Called at least twice a second while tasks are processed."""


def run_locally(sweep: Path, recipe: str, tasks: Sequence[Task], jobs: int, threads: int, monitor: Monitor) -> None:
    """Process tasks on this machine, each after its parent.

    Args:
        sweep: folder of the sweep.
        recipe: as on the command line.
        tasks: of :func:`prunekit.sweep.tasks.plan_tasks`.
        jobs: processes at the same time.
        threads: of each process.
        monitor: is called in this thread.

    Raises:
        KeyboardInterrupt: after the runs have saved checkpoints and ended.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            process_tasks(
                sweep, tasks, jobs, lambda task: pool.submit(_run, sweep, recipe, task, threads, stop), _done, monitor
            )
        except BaseException:
            stop.set()
            raise


def _run(sweep: Path, recipe: str, task: Task, threads: int, stop: threading.Event) -> Outcome:
    try:
        return run_task(sweep, recipe, task, threads, stop)
    except Exception as error:  # such as a full disk; the other runs go on
        return Outcome("failed", f"{type(error).__name__}: {error}")


def _done(futures: Sequence[Future[Outcome]]) -> dict[Future[Outcome], Outcome]:
    done, _ = wait(futures, timeout=_TICK_SECONDS, return_when=FIRST_COMPLETED)
    return {future: future.result() for future in done}


def process_tasks(
    sweep: Path,
    tasks: Sequence[Task],
    jobs: int,
    submit: Callable[[Task], Any],
    done: Callable[[Sequence[Any]], Mapping[Any, Outcome]],
    monitor: Monitor,
) -> None:
    """Submit each task after its parent; the tasks of a failed parent fail with it.

    Args:
        sweep: folder of the sweep.
        tasks: each after its parent.
        jobs: tasks that are processed at the same time.
        submit: starts a task and returns a handle.
        done: waits a moment for these handles and returns the outcome of those that have ended.
        monitor: is called in this thread.
    """
    outcomes: dict[str, Outcome] = {}
    waiting, running = list(tasks), {}
    while waiting or running:
        for task in list(waiting):
            parent = outcomes.get(task.parent) if task.parent is not None else Outcome("complete")
            if is_done(sweep, task):
                outcome = Outcome("complete")
            elif parent is not None and parent.status != "complete":
                outcome = parent
            elif parent is not None and len(running) < jobs:
                waiting.remove(task)
                monitor.started(task)
                running[submit(task)] = task
                continue
            else:
                continue
            waiting.remove(task)
            outcomes[task.folder] = outcome
            monitor.ended(task, outcome)
        for handle, outcome in done(list(running)).items() if running else ():
            task = running.pop(handle)
            outcomes[task.folder] = outcome
            monitor.ended(task, outcome)
        monitor.tick()
