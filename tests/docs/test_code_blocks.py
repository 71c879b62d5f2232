"""Every code block of the README and the documentation runs, or is checked as far as it can be."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import pytest
from helpers.docs_pages import PAGES, ROOT, blocks, commands, start_names
from helpers.small_run import BY_THRESHOLD
from helpers.toy_run import quiet, shorten, toy_recipe, write_photos
from typer.main import get_command

from prunekit.cli import app, main
from prunekit.config import registry
from prunekit.config.recipe import load
from prunekit.pipeline.runner import run_recipe
from prunekit.sweep.space import combine, parse_settings

# Commands that read a run folder and take about a second; they are executed on a small run.
CHEAP = {"list", "groups", "report", "watch", "predict", "validate", "cp"}
SMALL = [
    *("backbone.options.width=8", "data.size=32", "data.options={train: 16, val: 4}", "train.epochs=1"),
    *(*BY_THRESHOLD, "decay.name=none", "finetune.epochs=0", "export.onnx=false"),
]
WITH_OVERRIDES = {"run", "groups", "validate", "slim", "finetune", "export"}
LANGUAGES = {"python", "sh", "console", "yaml", "ini", "text"}


def pages(*languages):
    return [page for page in PAGES if blocks(page, *languages)]


def test_languages_of_blocks_are_known():
    found = {word for page in PAGES for word in re.findall(r"^ *```(\w+)", (ROOT / page).read_text(), re.M)}
    assert found <= LANGUAGES
    bare = [page for page in PAGES if len(re.findall(r"^ *```", (ROOT / page).read_text(), re.M)) % 2]
    assert bare == []


@pytest.mark.parametrize("page", pages("python"))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for table in (value for value in vars(registry).values() if isinstance(value, registry.Registry)):
        table.names()  # loads the plugins
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    names = {"__name__": "docs", **start_names(page)}
    for block in blocks(page, "python"):
        ast.parse(block.code)
        if block.skip is None:
            exec(compile("\n" * block.line + block.code, str(ROOT / page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", pages("yaml"))
def test_yaml_blocks_are_valid_in_a_recipe(page, tmp_path):
    for number, block in enumerate(blocks(page, "yaml")):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(block.code if "base:" in block.code else f"base: csnet\n{block.code}")
        if block.skip is None:
            load(str(recipe), [])


@pytest.mark.parametrize("page", pages("ini"))
def test_ini_blocks_parse(page):
    for block in blocks(page, "ini"):
        configparser.ConfigParser().read_string(block.code)


@pytest.mark.parametrize("page", pages("sh", "console"))
def test_commands_and_their_options_exist(page):
    for block, words in commands(page):
        try:
            check_command(words)
        except Exception as error:
            raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error


def check_command(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/")
    if program == "torchrun":
        words = words[words.index(".venv/bin/prunekit") :]
        program = "prunekit"
    if program == "prunekit":
        check_prunekit(words[1:])
    elif program == "python" and words[1].endswith(".py"):
        script = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in script for word in words[2:] if word.startswith("--"))
    elif program == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif program in ("lint-imports", "mkdocs", "mypy", "ruff", "pytest"):
        assert words[1:2] in ([], ["serve"], ["build"], ["check"], ["format"]) or words[1].startswith(("-", "tests"))
    else:
        assert program in ("pip", "python3", "python", "git", "apt-get", "pre-commit"), "no check for this program"


def check_prunekit(words: list[str]) -> None:
    """Parse the command as the command line does; overrides must be keys and values that a recipe takes."""
    command = get_command(app).commands[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    overrides = context.params.get("overrides")
    if words[0] == "sweep":
        axes, fixed = parse_settings(context.params["settings"])
        for trial in combine(axes):
            load(context.params["recipe"], [*fixed, *(f"{a.key}={v}" for a, v in zip(axes, trial.values, strict=True))])
    if words[0] in WITH_OVERRIDES:
        named = context.params.get("recipe") or context.params.get("source") or "runs/"
        recipe = named if "/" not in named and "." not in named else ROOT / named
        if "tasks/" in named:
            return  # registers its task when it runs, which tests/test_examples.py does
        if named.endswith(".yaml") and not Path(recipe).exists():
            recipe = "csnet"  # the reader's own
        if named.startswith("runs/") or words[0] not in ("run", "groups", "validate"):
            recipe = "csnet_duts"  # a run of any recipe; this one takes the keys of data folders too
        if "/mobile.yaml" not in str(recipe):  # needs an installed plugin
            folder = ["data.root=DATA"] if recipe == "csnet_duts" else []
            load(str(recipe), [*folder, *(overrides or [])])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands name: two small runs, and images."""
    folder = tmp_path_factory.mktemp("docs")
    photos = write_photos(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        run_recipe(load("csnet", SMALL), folder / "runs" / "csnet", quiet())
        run_recipe(toy_recipe(photos, "train.epochs=1"), folder / "runs" / "other", quiet())
    (folder / "photos").symlink_to(photos / "dark")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def cheap_commands():
    found = {}
    for page in PAGES:
        for block, words in commands(page):
            folders = [word for word in words if word.startswith("runs/")]
            if words[0] == "prunekit" and words[1] in CHEAP and set(folders) <= {"runs/csnet", "runs/other"}:
                found.setdefault(" ".join(words), (block, words[1:]))
    return [pytest.param(words, id=text) for text, (_, words) in found.items() if "examples/" not in text]


@pytest.mark.parametrize("words", cheap_commands())
def test_cheap_commands_run(words, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    shorten(monkeypatch)
    words = [*words, "--once"] if words[0] == "watch" and "--once" not in words else words
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in (0, None), capsys.readouterr().err


def test_every_link_leads_to_a_file():
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "benchmarks/README.md",
        *(str(p.relative_to(ROOT)) for p in examples()),
    ):
        targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
        missing = [t for t in targets if "://" not in t and not (ROOT / page).parent.joinpath(t).exists()]
        assert missing == [], page


def examples():
    return (ROOT / "examples").glob("*/README.md")


def test_skipped_blocks_give_a_reason_that_readers_see():
    titles = [t for page in PAGES for t in re.findall(r"^ *```\w+ (\S.*)$", (ROOT / page).read_text(), re.M)]
    assert all(re.fullmatch(r'title="[^"]+"', title) for title in titles)
