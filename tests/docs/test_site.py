"""The documentation site builds without warnings, loads nothing from other hosts and covers the whole interface."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import prunekit
from prunekit.cli import app
from prunekit.config.schema import all_keys

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def text_of(site, page):
    return re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text())


def test_pages_load_nothing_from_other_hosts(site):
    loaded = {
        url
        for page in site.rglob("*.html")
        for url in re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
    }
    assert loaded == set()
    assert [page for page in site.rglob("*.css") if re.search(r"url\([\"']?https?:", page.read_text())] == []


def test_recipe_reference_has_every_key(site):
    text = text_of(site, "reference/recipe")
    assert [key for key in map(".".join, all_keys()) if key.rpartition(".")[2] not in text] == []


def test_cli_reference_has_every_command_and_option(site):
    text = text_of(site, "reference/cli")
    for name, command in get_command(app).commands.items():
        assert f"prunekit {name}" in text
        for parameter in command.params:
            assert all(option in text for option in parameter.opts if option.startswith("--"))


def test_api_reference_has_every_export(site):
    text = text_of(site, "reference/api")
    assert [name for name in prunekit.__all__ if name != "__version__" and f"prunekit.{name}" not in text] == []


def test_every_page_is_in_the_navigation(site):
    pages = {path.relative_to(site).parent.as_posix() for path in site.rglob("index.html")}
    links = re.findall(r'<a href="([^"#]*)" class="md-nav__link', (site / "index.html").read_text())
    assert {link.strip("/") for link in links} >= pages - {"."}
