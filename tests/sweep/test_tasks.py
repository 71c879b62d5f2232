import functools

from hypothesis import given
from hypothesis import strategies as st

from prunekit.config.recipe import load
from prunekit.sweep.space import combine, parse_settings
from prunekit.sweep.tasks import plan_tasks

AT_ONCE = "train.gradual_pruning.start=null"


@functools.cache
def loaded(recipe, overrides):
    return load(recipe, overrides)


def planned(*settings, recipe="digits_resnet"):
    axes, fixed = parse_settings(settings)
    trials = combine(axes)
    keys = [axis.key for axis in axes]
    overrides = [[*fixed, *map("=".join, zip(keys, trial.values, strict=True))] for trial in trials]
    return plan_tasks([trial.name for trial in trials], [loaded(recipe, tuple(one)) for one in overrides], overrides)


def shape(tasks):
    """(until, trials, position of the parent) of each run."""
    position = {task.folder: index for index, task in enumerate(tasks)}
    return [(task.until, task.trials, position.get(task.parent)) for task in tasks]


def test_budgets_share_the_training_before_gradual_pruning_for_each_seed():
    assert shape(planned("target.params_ratio=0.5,0.35,0.2", "seed=0,1"))[:2] == [
        ("gradual_pruning", (0, 2, 4), None),
        ("gradual_pruning", (1, 3, 5), None),
    ]


def test_budgets_share_the_whole_training_without_gradual_pruning():
    assert shape(planned("target.params_ratio=0.5,0.2", AT_ONCE)) == [
        ("extract", (0, 1), None),
        (None, (0,), 0),
        (None, (1,), 0),
    ]


def test_shared_runs_continue_each_other():
    assert shape(planned("target.params_ratio=0.5,0.2", "finetune.epochs=1,2"))[:3] == [
        ("gradual_pruning", (0, 1, 2, 3), None),
        ("finetune", (0, 1), 0),
        ("finetune", (2, 3), 0),
    ]


def test_nothing_is_shared_by_different_trainings():
    assert shape(planned("train.lr=1e-3,2e-3")) == [(None, (0,), None), (None, (1,), None)]
    # The threshold is part of each epoch's metrics.
    assert len(planned("slim.threshold=1e-3,1e-2")) == len(planned("slim.threshold=1e-3,1e-2", AT_ONCE)) == 2
    assert len(planned("train.on_nonfinite=stop,skip")) == 2


SETTINGS = [
    "target.params_ratio=0.5,0.2",
    "seed=0,1",
    "finetune.epochs=1,2",
    "train.lr=1,2",
    "slim.round_to=1,2",
    AT_ONCE,
]


@given(st.sets(st.sampled_from(SETTINGS), min_size=1, max_size=3).filter(lambda chosen: chosen != {AT_ONCE}))
def test_each_run_comes_after_its_parent_which_has_all_its_trials(chosen):
    tasks = planned(*sorted(chosen))
    trials = [task for task in tasks if task.until is None]
    assert sorted(task.trials[0] for task in trials) == list(range(2 ** len(chosen - {AT_ONCE})))
    seen = {}
    for task in tasks:
        assert task.parent is None or set(task.trials) < set(seen[task.parent].trials)
        assert task.folder not in seen
        seen[task.folder] = task
