import re

import pytest

from prunekit.errors import RecipeError
from prunekit.sweep.space import Axis, combine, parse_settings, short_titles


def test_commas_separate_values_except_within_brackets_and_quotes():
    axes, fixed = parse_settings(
        [
            "target.params_ratio=0.5, 0.35",
            "decay={name: l1, weight: 1},{name: none}",
            "seed=1",
            "name=\"a,b\",'c'",
            "x=[1,2]",
        ]
    )
    assert axes == [
        Axis("target.params_ratio", ("0.5", "0.35")),
        Axis("decay", ("{name: l1, weight: 1}", "{name: none}")),
        Axis("name", ('"a,b"', "'c'")),
    ]
    assert fixed == ["seed=1", "x=[1,2]"]


def test_problems_of_all_settings_are_reported_together():
    with pytest.raises(RecipeError) as error:
        parse_settings(["seed", "train.lr=1,,2", "a=1,1", "b=1,2", "b=3"])
    assert str(error.value).splitlines() == [
        "seed: has no '='; write KEY=VALUE,VALUE, such as target.params_ratio=0.5,0.35",
        "train.lr=1,,2: a value is empty; write null where a key is to have none",
        "a=1,1: has a value twice; give each once",
        "b: is given twice; give all its values at once",
    ]
    with pytest.raises(RecipeError, match=r"no key has several values; .* or use: prunekit run"):
        parse_settings(["seed=1"])


def test_all_combinations_in_order():
    axes = [Axis("target.params_ratio", ("0.5", "0.3")), Axis("seed", ("0", "1"))]
    assert [trial.name for trial in combine(axes)] == [
        "params_ratio=0.5,seed=0",
        "params_ratio=0.5,seed=1",
        "params_ratio=0.3,seed=0",
        "params_ratio=0.3,seed=1",
    ]
    assert combine(axes)[1].values == ("0.5", "1")


def test_random_combinations_are_distinct_and_reproducible():
    axes = [Axis("a", tuple("12345")), Axis("b", tuple("12345"))]
    drawn = combine(axes, 7, seed=1)
    assert len({trial.values for trial in drawn}) == 7 and drawn == combine(axes, 7, seed=1) != combine(axes, 7, seed=2)
    for count in (0, 26):
        with pytest.raises(RecipeError, match=rf"--trials {count}: must be from 1 to 25"):
            combine(axes, count)


def test_names_are_file_names_and_distinct():
    names = [trial.name for trial in combine([Axis("init", ("runs/a b", "runs/a:b"))])]
    assert len(set(names)) == 2 and all(re.fullmatch("init=runs-a-b-[0-9a-f]{8}", name) for name in names)
    # More values leave the names of the others as they are.
    assert [trial.name for trial in combine([Axis("init", ("runs/a!b", "runs/a b", "runs/a:b"))])][1:] == names
    axes = [Axis("train.lr", ("1", "2")), Axis("finetune.lr", ("1", "2")), Axis("seed", ("0", "1"))]
    assert short_titles(axes) == ["train.lr", "finetune.lr", "seed"]
    assert short_titles([Axis("target.params", ("1", "2"))]) == ["target.params"]  # params is a result
