"""Well-formed files with arbitrary values give a valid result or a PrunekitError."""

import json

import pytest
from helpers.in_a_child import in_a_child
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.config import recipe, schema, yaml
from prunekit.config.schema import Recipe
from prunekit.errors import PlanError, PrunekitError
from prunekit.pruning.plan import Plan
from prunekit.reporting import run_contents
from prunekit.utils.safe_decode import decode_json

ODD = st.sampled_from(
    [None, True, 0, -1, 1 << 63, 10**30, 0.5, 1e308, "", "x", "../x", "\0", "1e-4", "null", "~", "60k"]
)
SCALARS = ODD | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def any_of(keys, inner=VALUES):
    return st.fixed_dictionaries({}, optional=dict.fromkeys(keys, inner))


def section(path=()):
    """Mappings with some keys of a section and arbitrary values."""
    model = schema.get_section(path)
    inner = {
        key: VALUES | section((*path, key)) if schema.get_section((*path, key)) else VALUES
        for key in model.model_fields
    }
    return st.fixed_dictionaries({}, optional=inner)


GOOD = {
    "name": "good",
    "backbone": {"name": "csnet", "options": {"width": 10}},
    "data": {"name": "salient_shapes"},
    "train": {"epochs": 1},
    "finetune": {"epochs": 1},
}


@settings(max_examples=60)
@given(section(), st.sampled_from(["", *GOOD]))
def test_recipes(tmp_path_factory, value, kept):
    # A file would be trusted and run. Half of the time all but one part are valid, so that later checks run too.
    for key in ("backbone", "base"):
        if isinstance(value.get(key), dict):
            value[key].pop("file", None)
    value = {**value, **{key: GOOD[key] for key in GOOD if key != kept}} if kept else value
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(json.dumps(value))
    try:
        loaded = recipe.load(path)
    except PrunekitError as error:
        assert str(error) and all(line.count("recipe.yaml") <= 2 for line in str(error).splitlines())
    else:
        assert Recipe.model_validate(yaml.parse(loaded.dump()).value) == loaded


@settings(max_examples=60)
@given(any_of(Plan.model_fields) | VALUES)
def test_plans(value):
    try:
        plan = Plan.from_json(value)
    except PlanError as error:
        assert "\n" not in str(error)
    else:
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


SUMMARY = [
    *run_contents.MODELS,
    "recipe",
    "status",
    "kept",
    "equivalence",
    "drift",
    "reference",
    "export",
    "skipped",
    "seconds",
]


@settings(max_examples=60)
@given(any_of(SUMMARY, VALUES | any_of(["params", "macs", "metrics", "passed", "steps", "path"])))
def test_summaries(value):
    faults = []
    try:
        found = run_contents.read_summary(value, faults)
    except ValueError:
        return
    # Accepted values can be written; rejected ones are reported.
    assert json.loads(json.dumps(found, allow_nan=False)) is not None
    assert found.keys() <= value.keys() and (faults or found.keys() == {k for k, v in value.items() if v is not None})


@settings(max_examples=60)
@given(st.lists(any_of(["stage", "epoch", "step", "loss", "lambda", "metrics", "size"]), max_size=4))
def test_metrics(lines):
    faults = []
    try:
        table = run_contents.read_metrics(b"".join(json.dumps(line).encode() + b"\n" for line in lines), faults)
    except ValueError:
        return
    assert len(table) <= len(lines) and (faults or len(table) == len(lines))


@given(VALUES)
def test_json(value):
    assert decode_json(json.dumps(value).encode()) == decode_json(json.dumps(value, ensure_ascii=False)) == value


@given(st.binary(max_size=300))
def test_yaml_never_raises_and_round_trips(data):
    document = yaml.parse(data)
    if not document.problems:
        assert yaml.parse(yaml.dump(document.value)).value == document.value


HUGE = 1 << 17
LONG = {
    "brackets": b"[" * HUGE,
    "brackets closed": b"[" * (HUGE // 2) + b"]" * (HUGE // 2),
    "braces": b"{a: " * (HUGE // 4),
    "dashes": b"- " * HUGE,
    "questions": b"? " * HUGE,
    "colons": b"a: " * (HUGE // 3),
    "bangs": b"!" * HUGE,
    "lines": b"a\n" * HUGE,
    "one key": b"k: 1\n" * (HUGE // 16),
    "keys": b"".join(b"k%d: 1\n" % n for n in range(9000)),
    "anchors": b"".join(b"- &a%d x\n" % n for n in range(12000)),
    "steps": b"".join(b" " * n + b"a:\n" for n in range(500)),
    "blanks": b"a: " + b"x " * (HUGE // 2),
    "escapes": b'a: "' + b"\\x41" * (HUGE // 4) + b'"',
    "a quote that never ends": b"a: '" + b"x\n" * (HUGE // 2),
}


@pytest.mark.parametrize("kind", LONG)
def test_large_documents_take_little_time_and_memory(kind):
    assert len(LONG[kind]) <= yaml.MAX_BYTES
    assert in_a_child(lambda: yaml.parse(LONG[kind]), memory=1 << 29, seconds=6) < 300 << 20
