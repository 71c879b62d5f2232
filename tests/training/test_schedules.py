from __future__ import annotations

import inspect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.config import registry
from prunekit.training import schedules

progress = st.floats(0, 1, exclude_max=True)
share = st.floats(0, 1, exclude_max=True)
factor = st.floats(0, 1)
positive = st.floats(0, 1, exclude_min=True)


@given(progress, share, factor)
def test_cosine_stays_in_range(progress, warmup, final):
    assert 0 < schedules.cosine(progress, warmup=warmup, final=final) <= 1


@given(progress, st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), unique=True).map(sorted), positive)
def test_step_stays_in_range(progress, milestones, factor):
    assert 0 < schedules.step(progress, milestones=milestones, factor=factor) <= 1


@given(progress, share, positive, positive)
def test_one_cycle_stays_in_range(progress, warmup, start, final):
    assert 0 < schedules.one_cycle(progress, warmup=warmup, start=start, final=final) <= 1


@given(progress, progress, st.floats(0, 0.9))
def test_increases_during_warmup_and_decreases_after(one, other, warmup):
    low, high = sorted((one, other))
    for rate in (schedules.cosine, schedules.one_cycle):
        if high <= warmup:
            assert rate(low, warmup=warmup) <= rate(high, warmup=warmup) + 1e-12
        if low >= warmup:
            assert rate(low, warmup=warmup) >= rate(high, warmup=warmup) - 1e-12


def test_values():
    almost = math.nextafter(1, 0)
    assert schedules.constant(0.7) == 1
    assert schedules.cosine(0) == 1
    assert schedules.cosine(0.5) == pytest.approx(0.5)
    assert schedules.cosine(0.05, warmup=0.1) == pytest.approx(0.5)
    assert schedules.cosine(0.1, warmup=0.1) == 1
    assert schedules.cosine(almost, final=0.2) == pytest.approx(0.2)
    assert schedules.cosine(almost) == schedules.SMALLEST
    assert [schedules.step(p) for p in (0, 0.66, 2 / 3, 0.9)] == pytest.approx([1, 1, 0.1, 0.01])
    assert schedules.one_cycle(0) == pytest.approx(0.04)
    assert schedules.one_cycle(0.3) == 1
    assert schedules.one_cycle(0.15) == pytest.approx(0.52)
    assert schedules.one_cycle(almost) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("name", "progress", "options", "words"),
    [
        ("constant", 1.0, {}, "progress=1.0"),
        ("constant", float("nan"), {}, "progress=nan"),
        ("cosine", -0.1, {}, "progress=-0.1"),
        ("cosine", 0, {"warmup": 1.0}, "warmup=1.0"),
        ("cosine", 0, {"final": 1.5}, "final=1.5"),
        ("step", 0, {"milestones": [0.5, 0.5]}, r"milestones=\[0.5, 0.5\]"),
        ("step", 0, {"milestones": [0.0]}, "milestones="),
        ("step", 0, {"milestones": [1.0]}, "milestones="),
        ("step", 0, {"factor": 0.0}, "factor=0.0"),
        ("one_cycle", 0, {"start": 0.0}, "start=0.0"),
        ("one_cycle", 0, {"final": 2.0}, "final=2.0"),
        ("one_cycle", 0, {"warmup": -0.1}, "warmup=-0.1"),
    ],
)
def test_arguments_out_of_range_raise(name, progress, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        getattr(schedules, name)(progress, **options)
    assert "must be" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["constant", "cosine", "step", "one_cycle"])
def test_schedules_are_registered_and_options_have_defaults(name):
    assert registry.schedules.get(name) is getattr(schedules, name)
    options = registry.schedules.options(name)
    assert "progress" not in options
    assert all(p.default is not inspect.Parameter.empty and p.annotation is not p.empty for p in options.values())
