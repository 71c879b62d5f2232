"""The messages that the troubleshooting page explains exist in the code."""

import ast
import re
from pathlib import Path

from prunekit import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def string_constants():
    for path in (ROOT / "prunekit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_quoted_messages_exist():
    messages = set(string_constants())
    tables = re.split(r"^\| message \| cause and fix \|$", PAGE, flags=re.M)[1:]
    quoted = [cell for table in tables for cell in re.findall(r"^\| `([^`]+)`", table, re.M)]
    assert len(quoted) > 30
    assert [text for text in quoted if not any(text in message for message in messages)] == []


def test_every_error_class_is_explained():
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert [name for name in classes if f"`{name}`" not in PAGE and name != "PrunekitError"] == []
