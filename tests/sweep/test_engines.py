from itertools import count

import pytest

from prunekit.sweep import engines
from prunekit.sweep.engines import process_tasks
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


def task(folder, parent=None):
    return Task(folder, (), None, parent, (0,))


def processed(monkeypatch, tmp_path, tasks, jobs, **options):
    record = Record(**options)
    monkeypatch.setattr(engines, "is_done", lambda sweep, one: one.folder in record.already_done)
    process_tasks(tmp_path, tasks, jobs, record.submit, record.done, record)
    return record


TREE = [task("shared"), task("a", "shared"), task("b", "shared"), task("c")]


def test_a_task_starts_after_its_parent(monkeypatch, tmp_path):
    record = processed(monkeypatch, tmp_path, TREE, 2)
    assert record.events.index(("complete", "shared")) < record.events.index(("started", "a"))
    assert {event for event in record.events if event[0] == "complete"} == {("complete", t.folder) for t in TREE}
    assert record.most == 2


@pytest.mark.parametrize("jobs", [1, 3])
def test_tasks_of_a_failed_parent_fail_and_the_others_go_on(monkeypatch, tmp_path, jobs):
    record = processed(monkeypatch, tmp_path, TREE, jobs, failing=["shared"])
    ended = [event for event in record.events if event[0] != "started"]
    assert sorted(ended) == [("complete", "c"), ("failed", "a"), ("failed", "b"), ("failed", "shared")]
    assert ("started", "a") not in record.events and record.most <= jobs


def test_done_tasks_are_not_repeated_even_without_their_parent(monkeypatch, tmp_path):
    record = processed(monkeypatch, tmp_path, TREE, 1, done=["a", "c"])
    assert [folder for status, folder in record.events if status == "started"] == ["shared", "b"]
    assert ("complete", "a") in record.events and ("complete", "c") in record.events
