import subprocess
import sys

from prunekit.config import schema
from prunekit.config.reference_docs import render
from prunekit.config.yaml import format_path


def test_every_key_and_section_has_a_description():
    for path in schema.all_keys():
        section = schema.get_section(path)
        if section and section is not schema.Component:
            text = section.__doc__
        else:
            text = schema.get_section(path[:-1]).model_fields[path[-1]].description
        assert text and text.endswith("."), format_path(path)


def test_every_key_has_a_row_or_heading():
    lines = render().splitlines()
    for path in schema.all_keys():
        if path[:-1] in schema.COMPONENTS:
            continue
        key = format_path(path)
        assert sum(line.startswith((f"| `{key}` |", f"## `{key}`")) for line in lines) == 1, key
    rows = [line for line in lines if line.startswith("| `")]
    assert all(row.count(" | ") == 3 for row in rows) and any(row.startswith("| `base` |") for row in rows)


def test_types_bounds_and_defaults():
    text = render(level=3)
    assert "### Top level" in text
    for row in (
        "| `seed` | integer ≥ 0, < 4294967296 | `0` |",
        "| `data.val_holdout` | number > 0, < 1 or null | `null` |",
        "| `data.on_error` | `raise`, `skip` | `raise` |",
        "| `train.epochs` | integer ≥ 0 | required |",
        "| `train.optimizer` | name, or mapping with `name` and `options` | `adam` |",
        "| `target.params` | integer ≥ 1 or null | `null` |",
        "| `slim.ignored_layers` | list of strings | `[]` |",
    ):
        assert row in text, row


def test_module_prints_the_reference():
    command = [sys.executable, "-m", "prunekit.config.reference_docs"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == render() + "\n"
