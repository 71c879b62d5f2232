import os
import sys
from pathlib import Path

import pytest

from prunekit.config import registry
from prunekit.config.user_module import UserModule
from prunekit.errors import PluginError, RecipeError

NET = "def build(width: int = 4):\n    return width\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_path_is_relative_to_the_given_folder_and_pinned_absolute(here):
    (here / "nets").mkdir()
    (here / "nets" / "net.py").write_text(NET)
    found = UserModule.read("nets/../nets/net.py")
    assert found.path == here / "nets" / "net.py" and found.expected is None and found.change is None
    assert (
        UserModule.read("net.py", Path("nets")).pinned_path
        == found.pinned_path
        == f"{found.path}#sha256={found.digest[:16]}"
    )
    again = UserModule.read(found.pinned_path, Path("elsewhere"))
    assert again.path == found.path and again.change is None


def test_a_changed_file_is_detected(here):
    Path("net.py").write_text(NET)
    pinned = UserModule.read("net.py").pinned_path
    # Same length and time: a cache keyed by them would return the old function.
    os.utime("net.py", (1, 1))
    assert UserModule.read(pinned).load_function("build")() == 4
    Path("net.py").write_text(NET.replace("4", "5"))
    os.utime("net.py", (1, 1))
    found = UserModule.read(pinned)
    assert f"expected sha256 {pinned[-16:]}, now {found.digest[:16]}" in found.change
    assert found.load_function("build")() == 5
    assert not Path("__pycache__").exists()


def test_same_content_is_imported_once(here):
    Path("net.py").write_text(NET)
    assert UserModule.read("net.py").load_function("build") is UserModule.read("net.py").load_function("build")


def test_a_file_name_may_contain_a_hash_sign(here):
    Path("net#sha256=x.py").write_text(NET)
    assert UserModule.read("net#sha256=x.py").load_function("build")() == 4


def test_postponed_annotations_and_dataclasses(here):
    Path("net.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Config:\n    width: int = 3\n\ndef build(config: Config = Config()): ...\n"
    )
    build = UserModule.read("net.py").load_function("build")
    assert build.__annotations__["config"] == "Config"
    assert registry.backbones.options_of(build)["config"].default.width == 3


def test_annotations_are_not_postponed_by_default(here):
    Path("net.py").write_text("def build(width: int = 3): ...\n")
    assert UserModule.read("net.py").load_function("build").__annotations__["width"] is int


def test_a_path_that_is_not_utf8_is_refused(here):
    odd = here / os.fsdecode(b"odd\xff")
    odd.mkdir()
    (odd / "net.py").write_text(NET)
    with pytest.raises(RecipeError, match=r"is not UTF-8.*; rename the folder") as caught:
        UserModule.read("net.py", odd)
    str(caught.value).encode()


def test_what_every_module_has_is_no_builder(here):
    Path("net.py").write_text("def build(): ...\n")
    with pytest.raises(PluginError, match="has no function '__class__'"):
        UserModule.read("net.py").load_function("__class__")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import nothing_of_this_name", ["fails to import", "ModuleNotFoundError", "nothing_of_this_name"]),
        ("import beside_it", ["fails to import", "it cannot import its siblings", "beside_it a package"]),
        ("def build(:", ["fails to import", "SyntaxError", "line 1"]),
        ("raise RuntimeError('first\\nsecond')", ["RuntimeError: first second"]),
        ("import sys; sys.exit(3)", ["fails to import", "SystemExit: 3"]),
        ("def biuld(): ...", ["has no function 'build'; did you mean 'biuld'?"]),
        ("build = 3", ["has no function 'build'"]),
    ],
)
def test_import_errors_are_one_line_with_the_path(here, content, words):
    Path("beside_it.py").write_text("")
    Path("net.py").write_text(content)
    modules = set(sys.modules)
    with pytest.raises(PluginError) as caught:
        UserModule.read("net.py").load_function("build")
    assert str(here / "net.py") in str(caught.value) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    if "fails" in words[0]:
        assert not [name for name in set(sys.modules) - modules if name.startswith("net_")]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("gone.py", "does not exist"),
        (".", "is a folder"),
        ("net.py\0", "not a valid file name"),
        ("~no_such_user/x", "not a valid file name"),
    ],
)
def test_invalid_files(here, text, word):
    with pytest.raises(RecipeError, match=word) as caught:
        UserModule.read(text)
    assert "\n" not in str(caught.value)


def test_not_a_python_file(here):
    Path("net.txt").write_text(NET)
    with pytest.raises(PluginError, match=r"must end in \.py"):
        UserModule.read("net.txt").load_function("build")
