from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.config import yaml as yaml12

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(
        ["1e-4", "0o17", "0x1F", "on", "No", "~", "12:30", "2001-01-01", ".inf", "<<", "=", "1_000", "- a", ""]
    )
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def read(text):
    document = yaml12.parse(text)
    assert not document.problems
    return document.value


def get_problem(text):
    (problem,) = yaml12.parse(text).problems
    return problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2E+3", -2000.0),
        ("007", 7),
        ("+12", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("", None),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("'5'", "5"),
    ],
)
def test_core_schema(text, value):
    found = read(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["on", "off", "Yes", "no", "y", "12:30:00", "1_000", "2001-12-14", "0b1", "017:1", "tRue"]
)
def test_yaml_1_1_scalars_are_strings(text):
    assert read(f"key: {text}") == {"key": text}


def test_merge_keys_are_ordinary_keys():
    assert read("a: &a {x: 1}\nb: {<<: *a}") == {"a": {"x": 1}, "b": {"<<": {"x": 1}}}


def test_positions_of_keys_and_items():
    positions = yaml12.parse("a:\n  b: [1, 2]\n  c: x\n").positions
    assert positions == {
        (): (1, 1),
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
        ("a", "b", 0): (2, 7),
        ("a", "b", 1): (2, 10),
        ("a", "c"): (3, 3),
    }


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("a: 1\na: 2", 2, 1, "duplicate key, first at 1:1; remove"),
        ("a: .inf", 1, 1, "not finite"),
        ("a: [1, -.INF]", 1, 8, "not finite"),
        ("a: .nan", 1, 1, "not finite"),
        ("a: 1e999", 1, 1, "not finite"),
        ("a: 18446744073709551616", 1, 1, "64 bits"),
        ("a: " + "9" * 5000, 1, 1, "64 bits"),
        ("a: 0x" + "f" * 5000, 1, 1, "64 bits"),
        ("a: !!python/object/apply:os.system ['false']", 1, 1, "tag '!!python/object/apply:os.system'"),
        ("a: !mine 3", 1, 1, "tag '!mine'"),
        ("a: !!int x", 1, 1, "does not fit its tag"),
        ("1: a", 1, 1, "key is not a string"),
        ("a: {~: 1}", 1, 5, "key is not a string"),
        ("? [a]\n: 1", 1, 3, "key is not a string"),
        ('a: "\\ud800"', 1, 1, "half a surrogate pair"),
        ('"\\ud800": 1', 1, 1, "half a surrogate pair"),
        ("a: 1\n---\nb: 2", 2, 1, "second document"),
        ("a: [1,\nb: }", 2, 4, "invalid YAML"),
        ("a: *b", 1, 4, "undefined alias"),
        ("a: &a [*a]", 1, 4, "contains itself"),
        ("a: " + "[" * 60 + "]" * 60, 1, 54, "nested deeper"),
        ("[" * 5000, 1, 51, "nested deeper"),
        ("a: 1\nb: \x01", 2, 4, "U+0001"),
        (b"a: 1\nbc: \xff", 2, 5, "0xff is not UTF-8"),
        (b"\xef\xbb\xbfa: \xff", 1, 4, "0xff is not UTF-8"),
        ('a: "\\UFFFFFFFF"', 1, 1, "out of range"),
        ("# " + "x" * yaml12.MAX_BYTES, 1, 1, "more than 256 KiB"),
    ],
)
def test_problem_has_a_position(text, line, column, words):
    problem = get_problem(text)
    assert (problem.line, problem.column) == (line, column)
    assert words in problem.message and "\n" not in problem.message


def test_all_problems_at_once():
    document = yaml12.parse("a: .inf\na: 1\nb: !x 1\n2: 3\nc: fine\n")
    assert [p.line for p in document.problems] == [1, 2, 3, 4]
    assert document.complete and document.value == {"a": None, "b": None, "c": "fine"}


def test_alias_bomb_is_rejected():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "more than 10000 values" in get_problem("\n".join(levels)).message
    assert read("a: &a [1]\nb: *a") == {"a": [1], "b": [1]}


def test_byte_order_mark_is_removed():
    assert read("\ufeffa: 1".encode()) == {"a": 1}


@given(values)
def test_dump_and_parse_round_trip(value):
    text = yaml12.dump({"key": value})
    found = read(text)
    assert found == {"key": value}
    assert repr(found) == repr({"key": value})  # 1, 1.0 and True are equal, but not the same type.
    assert read(text.encode()) == found


@given(st.text(alphabet="01eEoxX.:_-+ynaoNfs~TruefalseNULL", max_size=8))
def test_strings_are_quoted_for_yaml_1_1_readers(text):
    assert yaml.safe_load(yaml12.dump({"key": text})) == {"key": text}


@settings(max_examples=300)
@given(
    st.text(max_size=200) | st.binary(max_size=200) | st.text(alphabet="ab:{}[]-,&*!%#\"'\\UxFn?|> \n\t0.", max_size=60)
)
def test_any_input_is_parsed_or_has_problems(source):
    document = yaml12.parse(source)
    assert document.complete or document.problems

    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
        assert not isinstance(value, float) or math.isfinite(value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)

    check(document.value)
    assert all("\n" not in p.message and p.line >= 1 and p.column >= 1 for p in document.problems)


def test_format_path_and_quote():
    assert yaml12.format_path(("a", "b", 0, "c d", "e\n")) == "a.b[0].'c d'.'e\\n'"
    assert [yaml12.quote(v) for v in (None, True, 1.5, "x")] == ["null", "true", "1.5", "'x'"]
    assert len(yaml12.quote("x" * 1000)) <= 60
