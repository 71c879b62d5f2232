"""MkDocs hooks: the reference pages, which are generated from the code, and the list of design pages."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent

# Heading → exported names. A name that is in no section appears under "Other".
API = {
    "Pruning": ["Pruner", "PruningReport"],
    "Groups and plans": ["find_groups", "Group", "Plan", "extract", "importance"],
    "Sparse training": ["DynamicWeightDecay"],
    "Slimming": ["slim", "apply_plan", "slim_to_budget", "fit_budget", "EquivalenceReport"],
    "After slimming": ["recalibrate", "slim_optimizer"],
    "Saving, deployment and counting": ["save", "load", "deploy", "count", "ModelCost"],
    "Octave convolutions": ["octavize", "GOctConv"],
    "Recipes and runs": ["load_recipe", "run_recipe", "load_run"],
    "Plugins": [],
    "Errors": ["PrunekitError", "PrunekitWarning"],
}

RECIPE_INTRODUCTION = """\
A recipe is a YAML file with these keys. Each can also be set on the command line, as in
`prunekit run csnet train.epochs=20 data.root=~/photos`. `recipe.yaml` in a run folder has every key with its value.
`prunekit list` shows the names that `backbone`, `data`, `task` and the other components can have, and their options."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every page of docs/design into the navigation."""
    pages = sorted(path for path in (DOCS / "design").glob("*.md") if path.name != "index.md")
    for entry in config.nav or []:
        if "Design" in entry:
            entry["Design"] = ["design/index.md", *(f"design/{path.name}" for path in pages)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"reference/cli.md": cli_page, "reference/recipe.md": recipe_page, "reference/api.md": api_page}
    for path, page in pages.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Show Sphinx roles in docstrings (:func:`~a.b`) as code."""
    return re.sub(r":(?:func|class|meth|mod|data|attr|exc):<code>~?", "<code>", html)


def cli_page() -> str:
    """Every command with its arguments and options."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from prunekit.cli import app

    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="prunekit")
    # The list of commands has their help cut off; the table of contents lists them too.
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)
    return "# Command line\n\n" + re.sub(r"^# `prunekit`\n", "", text).replace(" <list[", " <").replace("]>`", ">`")


def recipe_page() -> str:
    """Every key of a recipe with its type, default and meaning."""
    from prunekit.config.reference_docs import render

    return f"# Recipe keys\n\n{RECIPE_INTRODUCTION}\n\n{render()}"


def api_page() -> str:
    """Every exported name, from its docstring."""
    import prunekit

    rest = {name for name in prunekit.__all__ if name != "__version__"} - {
        name for names in API.values() for name in names
    }
    registers = sorted(name for name in rest if name.startswith("register_"))
    sections = {**API, "Plugins": registers, "Other": sorted(rest - set(registers))}
    lines = ["# Python API", "", "Everything here is imported from `prunekit`."]
    for heading, names in sections.items():
        exported = [name for name in names if name in prunekit.__all__]
        if exported:
            lines += ["", f"## {heading}"]
        for name in exported:
            where = _definition(prunekit, name)
            lines += [
                "",
                f"::: {where}",
                "    options:",
                f'      heading: "prunekit.{name}"',
                f'      toc_label: "{name}"',
            ]
    return "\n".join(lines) + "\n"


def _definition(package: object, name: str) -> str:
    """The dotted path at which a name exported by the package is defined."""
    value = getattr(package, name)
    if inspect.ismodule(value):
        return value.__name__
    module = sys.modules[value.__module__]
    return f"{module.__name__}.{name if hasattr(module, name) else value.__name__}"
