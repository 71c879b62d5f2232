"""The names of the package: lazy exports, what type checkers see, and the installed marker file."""

import ast
import configparser
import importlib
from pathlib import Path

import pytest

import prunekit

PACKAGE = Path(prunekit.__file__).parent


@pytest.mark.parametrize("name", prunekit.__all__)
def test_every_public_name_imports(name):
    assert getattr(prunekit, name) is not None
    assert name in dir(prunekit)


def test_type_checkers_see_the_runtime_names_and_modules():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            value = getattr(importlib.import_module(node.module), alias.name)
            seen[alias.asname or alias.name] = value
    assert sorted([*seen, "__version__"]) == sorted(prunekit.__all__)
    assert all(getattr(prunekit, name) is value for name, value in seen.items())


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="module 'prunekit' has no attribute 'prune'"):
        _ = prunekit.prune


def test_public_names_are_documented():
    for name in set(prunekit.__all__) - {"__version__"}:
        assert (getattr(prunekit, name).__doc__ or "").strip(), name


def test_py_typed_is_installed():
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    assert "py.typed" in config["options.package_data"]["prunekit"].split()
    assert (PACKAGE / "py.typed").is_file()
