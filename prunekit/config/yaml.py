"""YAML as recipes use it: plain values under the core schema of YAML 1.2.2 (section 10.3), with the place of each.

PyYAML does the scanning, the parsing and the writing; only its YAML 1.1 ideas of what a scalar means are left out
(there ``1e-4`` is text, ``on`` a boolean and ``12:30`` a number in base 60). Nothing in a document can run code: no
Python object is ever built from a tag.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

Path = tuple[str | int, ...]

MAX_BYTES = 1 << 18
# Small aliases to aliases can stand for billions of values, and what comes after us (JSON, pydantic) recurses.
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
    """What is wrong at one place of a document (line and column from 1), and how to mend it."""

    path: Path
    line: int
    column: int
    message: str


@dataclass
class Document:
    """What was read.

    Attributes:
        value: dicts with text keys, lists, text, whole numbers of 64 bits, finite numbers, booleans and None. What
            ``problems`` complains about is None here, or absent where the key is at fault.
        places: path of keys and indices → (line, column), both from 1; for an entry of a mapping the place of its key.
        problems: everything wrong that could be seen.
        complete: False where the text could not be read at all, so that nothing follows from what is absent.
    """

    value: Any = None
    places: dict[Path, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True


def parse(source: bytes | str) -> Document:
    """Read one YAML document; never raises for its content, see ``Document.problems``.

    Args:
        source: the text, or its bytes in UTF-8; at most 256 KiB, 50 levels and 10,000 values (an alias counts for
            all that it stands for).
    """
    document = Document()
    try:
        node = _compose(_decode(source))
        if node is not None:
            document.value = _Builder(document).build(node, (), _position(node))
    except _Unreadable as error:
        document.value, document.complete = None, False
        document.problems.append(Problem((), error.line, error.column, error.message))
    return document


def dump(value: Any) -> str:
    """Plain values as YAML in block style, keys in their order; :func:`parse` gives equal values back."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=MAX_BYTES
    )


class _Unreadable(Exception):
    """Reading cannot go on."""

    def __init__(self, message: str, line: int = 1, column: int = 1):
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's loader as far as nodes; it has no constructor."""

    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        # PyYAML looks at all open brackets for each new one, until Python's stack ends.
        if self.flow_level >= MAX_DEPTH:
            mark = self.get_mark()
            raise _Unreadable(f"nested deeper than {MAX_DEPTH} levels; flatten it", mark.line + 1, mark.column + 1)
        super().fetch_flow_collection_start(token)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else, so that any reader sees text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes some line breaks (U+0085 alone) so that they come back as blanks; escapes are safe.
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


for _name, _pattern in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


def _decode(source: bytes | str) -> str:
    if len(source) > MAX_BYTES:
        raise _Unreadable(f"more than {MAX_BYTES // 1024} KiB, which is no recipe; give another file")
    if isinstance(source, str):
        return source
    try:
        return source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The exception's own object, because utf-8-sig counts from behind the byte order mark.
        before = error.object[: error.start].decode("utf-8")
        line, column = _line_column(before)
        byte = error.object[error.start]
        raise _Unreadable(f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8", line, column) from None


def _line_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _compose(text: str) -> yaml.Node | None:
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        if error.context and error.context.startswith("expected a single document"):
            raise _Unreadable("a second document starts here; keep one in a file", line, column) from None
        what = " ".join(f"{error.problem or error.context}".split())
        raise _Unreadable(f"not YAML: {what}; mend it here or just before, or quote the text", line, column) from None
    except yaml.reader.ReaderError as error:
        line, column = _line_column(text[: error.position])
        raise _Unreadable(
            f"character U+{ord(text[error.position]):04X} may not stand in YAML; remove it", line, column
        ) from None
    except RecursionError:
        raise _Unreadable(f"nested deeper than {MAX_DEPTH} levels; flatten it") from None
    except (ValueError, OverflowError):
        # PyYAML converts escapes and directives unchecked: "\UFFFFFFFF" is no character, %YAML 1.999… no version.
        raise _Unreadable(
            "not YAML: an escape such as \\U or a % directive has a number out of range; remove it"
        ) from None


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


class _Builder:
    """Turns nodes into plain values and writes places and problems into the document."""

    def __init__(self, document: Document):
        self.document = document
        self.values = 0

    def build(self, node: yaml.Node, path: Path, place: tuple[int, int]) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _Unreadable(f"more than {MAX_VALUES} values, aliases counted each time; write less", *place)
        # This also ends an alias that stands inside what it names.
        if len(path) > MAX_DEPTH:
            raise _Unreadable(f"nested deeper than {MAX_DEPTH} levels, or an alias holds itself; flatten it", *place)
        self.document.places[path] = place
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.build(item, (*path, i), _position(item)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and (tag == "str" or tag in _CORE):
            try:
                return _scalar(tag, node.value)
            except ValueError as error:
                return self._complain(path, place, str(error))
        shown = node.tag.replace(_TAG, "!!")
        return self._complain(path, place, f"the tag {quote(shown)} is not allowed here; write a plain value")

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _position(key_node)
            if not (isinstance(key_node, yaml.ScalarNode) and key_node.tag == _TAG + "str"):
                name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
                self._complain((*path, name), place, "this key is not text; write a name, or put it in quotes")
                continue
            key = key_node.value
            if _SURROGATE.search(key):
                self._complain((*path, key), place, "this key holds half a character; write the whole one")
            elif key in found:
                line, column = self.document.places[(*path, key)]
                first = f"it stands already at {line}:{column}"
                self._complain((*path, key), place, f"duplicate key; {first}, remove one of the two")
            else:
                found[key] = self.build(value_node, (*path, key), place)
        return found

    def _complain(self, path: Path, place: tuple[int, int], message: str) -> None:
        self.document.problems.append(Problem(path, *place, message))


def _scalar(tag: str, text: str) -> Any:
    """The value of a scalar; ValueError with the sentence for the user where it has none."""
    if tag == "str":
        if _SURROGATE.search(text):
            raise ValueError(f"{quote(text)} holds half a character; write the whole one")
        return text
    if not re.fullmatch(_CORE[tag], text) and not (tag == "float" and re.fullmatch(_CORE["int"], text)):
        raise ValueError(f"{quote(text)} does not fit its tag !!{tag}; remove the tag")
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        # The length first: Python refuses to convert thousands of digits, with a sentence about itself.
        value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) < 100 else 1 << 99
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{quote(text)} does not fit 64 bits; write a smaller number, or put text in quotes")
        return value
    # Behind the tag stand only numbers that Python writes alike, and .inf and .nan.
    number = math.inf if text[-1].isalpha() else float(text)
    if not math.isfinite(number):
        raise ValueError(f"{quote(text)} is not finite; write a number")
    return number


def contains(value: Any, part: str | int) -> bool:
    """Whether ``value[part]`` is an entry of a mapping or an item of a list."""
    return part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))


def quote(value: Any, limit: int = 60) -> str:
    """A value as one short line for a message."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= limit else shown[: limit - 2] + "…" + shown[-1]


def format_path(path: Path) -> str:
    """A path as one writes it: ``decay.options.curve[0]``."""
    shown = ""
    for part in path:
        if isinstance(part, int):
            shown += f"[{part}]"
        else:
            shown += "." * bool(shown) + (part if re.fullmatch(r"[\w-]{1,60}", part) else quote(part))
    return shown
