"""Read and write YAML: plain values of the YAML 1.2.2 core schema (section 10.3), with the position of each.

PyYAML's YAML 1.1 scalars are not used (there ``1e-4`` is a string, ``on`` a boolean and ``12:30`` a number in base 60).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from prunekit.utils.text import one_line

Path = tuple[str | int, ...]

MAX_BYTES = 1 << 18
# A few nested aliases can expand to billions of values, and JSON and pydantic recurse.
MAX_VALUES = 10_000
MAX_DEPTH = 50

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Problem:
    """What is wrong at a line and column (from 1), and the fix."""

    path: Path
    line: int
    column: int
    message: str


@dataclass
class Document:
    """A parsed document.

    The values are dicts with string keys, lists, strings, 64-bit integers, finite floats, booleans and None. A value
    with a problem is None, or absent if the problem is its key.
    """

    value: Any = None
    positions: dict[Path, tuple[int, int]] = field(default_factory=dict)  # line and column of a value, or of its key
    spans: dict[Path, tuple[int, int]] = field(default_factory=dict)  # start and end of a scalar in the text
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True  # False if the text could not be parsed, so that missing keys are not errors


def parse(source: bytes | str) -> Document:
    """Parse one YAML document; never raises for its content, see ``Document.problems``.

    Args:
        source: the text, or its bytes in UTF-8; at most 256 KiB, 50 levels and 10,000 values (an alias counts as all
            values it stands for).
    """
    document = Document()
    try:
        node = _compose(_decode(source))
        if node is not None:
            document.value = _Builder(document).build(node, (), _position(node.start_mark))
    except _UnreadableError as error:
        document.value, document.complete = None, False
        document.problems.append(error.problem)
    return document


def dump(value: Any) -> str:
    """Return plain values as block-style YAML with the keys in order; :func:`parse` returns equal values."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=MAX_BYTES
    )


class _UnreadableError(Exception):
    """The document cannot be read any further."""

    def __init__(self, message: str, line: int = 1, column: int = 1):
        self.problem = Problem((), line, column, message)


class _Loader(yaml.BaseLoader):
    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        # PyYAML recurses, and visits all open brackets for each new one.
        if self.flow_level >= MAX_DEPTH:
            raise _UnreadableError(f"nested deeper than {MAX_DEPTH} levels; flatten it", *_position(self.get_mark()))
        super().fetch_flow_collection_start(token)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML would write some line breaks (U+0085) unescaped, which are read as spaces.
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


for _name, _pattern in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


def _decode(source: bytes | str) -> str:
    if len(source) > MAX_BYTES:
        raise _UnreadableError(f"more than {MAX_BYTES // 1024} KiB, too large for a recipe; use another file")
    if isinstance(source, str):
        return source
    try:
        return source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Not `source`: utf-8-sig counts from after the byte order mark.
        position = _line_column(error.object[: error.start].decode())
        message = f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _UnreadableError(message, *position) from None


def _line_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _compose(text: str) -> yaml.Node | None:
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = one_line(error.problem or error.context)
        message = f"invalid YAML: {problem}; fix it here or just before, or quote the text"
        if error.context and error.context.startswith("expected a single document"):
            message = "a second document starts here; keep one per file"
        raise _UnreadableError(message, *(_position(mark) if mark else ())) from None
    except yaml.reader.ReaderError as error:
        message = f"character U+{ord(text[error.position]):04X} is not allowed in YAML; remove it"
        raise _UnreadableError(message, *_line_column(text[: error.position])) from None
    except RecursionError:
        raise _UnreadableError(f"nested deeper than {MAX_DEPTH} levels; flatten it") from None
    except (ValueError, OverflowError):
        # PyYAML does not check the numbers of escapes and directives: "\UFFFFFFFF", "%YAML 1.999…".
        message = "invalid YAML: an escape such as \\U or a % directive has a number out of range; remove it"
        raise _UnreadableError(message) from None


def _position(mark: yaml.Mark) -> tuple[int, int]:
    return mark.line + 1, mark.column + 1


class _Builder:
    """Converts nodes to plain values and adds positions and problems to the document."""

    def __init__(self, document: Document):
        self.document = document
        self.values = 0

    def build(self, node: yaml.Node, path: Path, position: tuple[int, int]) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _UnreadableError(f"more than {MAX_VALUES} values, aliases counted each time; write less", *position)
        # This also stops an alias inside its own anchor.
        if len(path) > MAX_DEPTH:
            message = f"nested deeper than {MAX_DEPTH} levels, or an alias contains itself; flatten it"
            raise _UnreadableError(message, *position)
        self.document.positions[path] = position
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.build(item, (*path, i), _position(item.start_mark)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and (tag == "str" or tag in _CORE):
            self.document.spans[path] = (node.start_mark.index, node.end_mark.index)
            try:
                return _scalar(tag, node.value)
            except ValueError as error:
                problem = str(error)
        else:
            problem = f"the tag {quote(node.tag.replace(_TAG, '!!'))} is not allowed; write a plain value"
        self.document.problems.append(Problem(path, *position, problem))
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            position = _position(key_node.start_mark)
            is_scalar = isinstance(key_node, yaml.ScalarNode)
            key = key_node.value if is_scalar else "?"
            if not (is_scalar and key_node.tag == _TAG + "str"):
                problem = "this key is not a string; write a name, or put it in quotes"
            elif _SURROGATE.search(key):
                problem = "this key contains half a surrogate pair; write the whole character"
            elif key in mapping:
                line, column = self.document.positions[(*path, key)]
                problem = f"duplicate key, first at {line}:{column}; remove one of them"
            else:
                mapping[key] = self.build(value_node, (*path, key), position)
                continue
            self.document.problems.append(Problem((*path, key), *position, problem))
        return mapping


def _scalar(tag: str, text: str) -> Any:
    """Return the value of a scalar; raise ValueError with a message for the user."""
    if tag == "str":
        if _SURROGATE.search(text):
            raise ValueError(f"{quote(text)} contains half a surrogate pair; write the whole character")
        return text
    if not re.fullmatch(_CORE[tag], text) and not (tag == "float" and re.fullmatch(_CORE["int"], text)):
        raise ValueError(f"{quote(text)} does not fit its tag !!{tag}; remove the tag")
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        # Check the length first: Python raises an error of its own for thousands of digits.
        value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) < 100 else 1 << 99
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{quote(text)} does not fit 64 bits; write a smaller number, or quote it")
        return value
    # Python reads all numbers of the core schema, except .inf and .nan.
    number = math.inf if text[-1].isalpha() else float(text)
    if not math.isfinite(number):
        raise ValueError(f"{quote(text)} is not finite; write a number")
    return number


def contains(value: Any, part: str | int) -> bool:
    """Return whether ``value[part]`` is an entry of a mapping or an item of a list."""
    return part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))


def quote(value: Any, limit: int = 60) -> str:
    """Return a value as one short line for a message."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else text[: limit - 2] + "…" + text[-1]


def format_path(path: Path) -> str:
    """Return a path as a user writes it: ``decay.options.curve[0]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += "." * bool(text) + (part if re.fullmatch(r"[\w-]{1,60}", part) else quote(part))
    return text
