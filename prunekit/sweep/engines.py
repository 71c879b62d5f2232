"""Where the runs of a sweep are processed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from prunekit.errors import PrunekitError
from prunekit.runs.folders import is_run_folder
from prunekit.sweep.tasks import Task
from prunekit.sweep.worker import Outcome, is_done, run_task
from prunekit.utils.text import first_line

_TICK_SECONDS = 0.5
_RAY_RETRIES, _RAY_STOP_SECONDS = 3, 60.0


class Monitor(Protocol):
    """Receives the progress of a sweep."""

    def started(self, task: Task) -> None:
        """A task is about to be processed."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """A task has ended, in this sweep or an earlier one."""

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


def _run(
    sweep: Path, recipe: str, task: Task, threads: int, stop: threading.Event | None, cwd: str | None = None
) -> Outcome:
    try:
        return run_task(sweep, recipe, task, threads, stop, cwd)
    except Exception as error:  # such as a full disk; the other runs go on
        return Outcome("failed", f"{type(error).__name__}: {error}")


def run_on_ray(sweep: Path, recipe: str, tasks: Sequence[Task], jobs: int, threads: int, monitor: Monitor) -> None:
    """Process tasks on the Ray cluster that ``RAY_ADDRESS`` names or that runs here, else on one of this machine.

    All its machines need the folder of the sweep, the data and prunekit under the same paths. A task whose worker dies
    is repeated, and its run continues from the newest checkpoint.

    Args:
        As for :func:`run_locally`; each task reserves ``threads`` cores.

    Raises:
        PrunekitError: Ray is not installed.
        KeyboardInterrupt: after the runs have been asked to end.
    """
    try:
        import ray
    except ImportError as error:
        raise PrunekitError('Ray is not installed; add it with: pip install "prunekit[ray]"') from error
    sweep, cwd = sweep.resolve(), str(Path.cwd())
    ray.init(
        address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True
    )
    remote = ray.remote(num_cpus=threads, max_retries=_RAY_RETRIES)(_run)
    running: list[Any] = []

    def submit(task: Task) -> Any:
        running.append(remote.remote(sweep, recipe, task, threads, None, cwd))
        return running[-1]

    def done(handles: Sequence[Any]) -> dict[Any, Outcome]:
        ended, _ = ray.wait(list(handles), num_returns=1, timeout=_TICK_SECONDS)
        return {handle: _ray_outcome(ray, handle) for handle in ended}

    try:
        process_tasks(sweep, tasks, jobs, submit, done, monitor)
    except BaseException:
        for handle in running:
            ray.cancel(handle, force=False)
        ray.wait(running, num_returns=len(running), timeout=_RAY_STOP_SECONDS)
        raise
    finally:
        ray.shutdown()


def _ray_outcome(ray: Any, handle: Any) -> Outcome:
    try:
        return ray.get(handle)
    except ray.exceptions.RayError as error:  # its worker died too often
        return Outcome("failed", first_line(error))


ENGINES = {"local": run_locally, "ray": run_on_ray}


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
    """Submit each task after its parent; where that failed, its tasks start anew.

    Args:
        sweep: folder of the sweep.
        tasks: each after its parent.
        jobs: tasks that are processed at the same time.
        submit: starts a task and returns a handle.
        done: waits a moment for these handles and returns the outcome of those that have ended.
        monitor: is called in this thread.
    """
    waiting, running = needed(sweep, tasks), {}
    unfinished = {task.folder for task in waiting}
    while waiting or running:
        for task in list(waiting):
            if is_done(sweep, task):
                waiting.remove(task)
                unfinished.discard(task.folder)
                monitor.ended(task, Outcome("complete"))
            elif task.parent not in unfinished and len(running) < jobs:
                waiting.remove(task)
                monitor.started(task)
                running[submit(task)] = task
        for handle, outcome in done(list(running)).items() if running else ():
            task = running.pop(handle)
            unfinished.discard(task.folder)
            monitor.ended(task, outcome)
        monitor.tick()


def needed(sweep: Path, tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks without the shared runs that no trial has to continue any more."""
    kept: list[Task] = []
    for task in reversed(tasks):
        begins = {other.parent for other in kept if not is_run_folder(sweep / other.folder)}
        if task.until is None or task.folder in begins:
            kept.insert(0, task)
    return kept
