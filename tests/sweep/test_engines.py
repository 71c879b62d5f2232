import sys
import types
from itertools import count
from pathlib import Path

import pytest

from prunekit.errors import PrunekitError
from prunekit.runs.run_dir import RunDir
from prunekit.sweep import engines
from prunekit.sweep.engines import process_tasks, run_on_ray
from prunekit.sweep.tasks import Task
from prunekit.sweep.worker import Outcome

COMPLETE = Outcome("complete")


class Record:
    """Keeps the order of events; runs end in the order in which they started."""

    def __init__(self, failing=(), done=()):
        self.events, self.failing, self.already_done = [], failing, done
        self.running, self.most, self.numbers = {}, 0, count()

    def submit(self, task):
        number = next(self.numbers)
        self.running[number] = task
        self.most = max(self.most, len(self.running))
        return number

    def done(self, handles):
        first = min(handles)
        task = self.running.pop(first)
        return {first: Outcome("failed", "it broke") if task.folder in self.failing else COMPLETE}

    def started(self, task):
        self.events.append(("started", task.folder))

    def ended(self, task, outcome):
        self.events.append((outcome.status, task.folder))

    def tick(self):
        pass


def task(folder, parent=None, until=None):
    return Task(folder, (), until, parent, (0,))


def processed(monkeypatch, tmp_path, tasks, jobs, **options):
    record = Record(**options)
    monkeypatch.setattr(engines, "is_done", lambda sweep, one: one.folder in record.already_done)
    process_tasks(tmp_path, tasks, jobs, record.submit, record.done, record)
    return record


TREE = [task("shared", until="extract"), task("a", "shared"), task("b", "shared"), task("c")]


def test_a_task_starts_after_its_parent(monkeypatch, tmp_path):
    record = processed(monkeypatch, tmp_path, TREE, 2)
    assert record.events.index(("complete", "shared")) < record.events.index(("started", "a"))
    assert {event for event in record.events if event[0] == "complete"} == {("complete", t.folder) for t in TREE}
    assert record.most == 2


@pytest.mark.parametrize("jobs", [1, 3])
def test_trials_of_a_failed_shared_run_start_on_their_own(monkeypatch, tmp_path, jobs):
    record = processed(monkeypatch, tmp_path, TREE, jobs, failing=["shared"])
    ended = [event for event in record.events if event[0] != "started"]
    assert sorted(ended) == [("complete", "a"), ("complete", "b"), ("complete", "c"), ("failed", "shared")]
    assert record.events.index(("failed", "shared")) < record.events.index(("started", "a")) and record.most <= jobs


def test_a_shared_run_that_no_trial_needs_is_not_repeated(monkeypatch, tmp_path):
    assert processed(monkeypatch, tmp_path, TREE, 1).events[0] == ("started", "shared")
    for name in ("a", "b"):
        RunDir.start(tmp_path / name, "name: test\n", {}).close()
    assert processed(monkeypatch, tmp_path, TREE, 1).events[0] == ("started", "a")


def test_done_tasks_are_not_repeated(monkeypatch, tmp_path):
    record = processed(monkeypatch, tmp_path, TREE, 1, done=["a", "c"])
    assert [folder for status, folder in record.events if status == "started"] == ["shared", "b"]
    assert ("complete", "a") in record.events and ("complete", "c") in record.events


class FakeRay(types.ModuleType):
    """Ray, as far as it is used: calls are made when they are waited for."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self):
        super().__init__("ray")
        self.cancelled, self.options, self.is_up = [], None, False

    def init(self, **options):
        self.is_up = True

    def shutdown(self):
        self.is_up = False

    def remote(self, **options):
        self.options = options
        return lambda function: types.SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def wait(self, handles, num_returns, timeout):
        return handles[:num_returns], handles[num_returns:]

    def get(self, handle):
        function, arguments = handle
        return function(*arguments)

    def cancel(self, handle, force):
        self.cancelled.append(handle)


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def test_ray_runs_tasks_in_the_folder_of_the_command(ray, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    def run_task(sweep, recipe, one, threads, stop, cwd):
        calls.append((sweep, recipe, one.folder, threads, cwd))
        if one.folder == "c":
            raise ray.exceptions.RayError("its worker died\nfour times")
        return COMPLETE

    monkeypatch.setattr(engines, "_run", run_task)
    record = Record()
    run_on_ray(Path("sweep"), "csnet", TREE, 2, 3, record)
    assert ("complete", "a") in record.events and ("failed", "c") in record.events
    assert calls[0] == (tmp_path / "sweep", "csnet", "shared", 3, str(tmp_path))
    assert ray.options["num_cpus"] == 3 and ray.options["max_retries"] > 0 and not ray.is_up


def test_interrupt_cancels_the_tasks_on_ray(ray, tmp_path):
    class Interrupting(Record):
        def tick(self):
            raise KeyboardInterrupt

    ray.wait = lambda handles, **_: ([], handles)
    with pytest.raises(KeyboardInterrupt):
        run_on_ray(tmp_path, "csnet", TREE, 2, 1, Interrupting())
    assert len(ray.cancelled) == 2 and not ray.is_up


def test_ray_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PrunekitError, match=r'Ray is not installed; add it with: pip install "prunekit\[ray\]"'):
        run_on_ray(tmp_path, "csnet", TREE, 1, 1, Record())
