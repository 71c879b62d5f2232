"""Copy a recipe to a new file: the command ``cp``."""

from __future__ import annotations

import json
from pathlib import Path

from prunekit.config import yaml
from prunekit.config.overrides import find_recipe, shipped_recipes
from prunekit.errors import RecipeError
from prunekit.utils.io import write_atomic


def copy_recipe(source: str, target: Path, overwrite: bool = False) -> Path:
    """Copy a recipe with its comments so that the copy runs.

    Relative paths in ``base`` and ``backbone.file`` become absolute, and the commands in the comments name the copy.

    Args:
        source: recipe file, or name of a shipped recipe.
        target: new file, or an existing folder.

    Raises:
        RecipeError: the recipe does not exist or is not YAML, or the target exists.
    """
    path = find_recipe(source)
    target = target / path.name if target.is_dir() else target
    if target.exists() and (not overwrite or target.samefile(path)):
        raise RecipeError(f"{target}: already exists; choose another file" + " or use --overwrite" * (not overwrite))
    data = path.read_bytes()
    document = yaml.parse(data)
    if not document.complete:
        problem = document.problems[0]
        raise RecipeError(f"{path}:{problem.line}:{problem.column}: {problem.message}")
    text = data.decode("utf-8-sig")
    for key, (start, end) in sorted(document.spans.items(), key=lambda item: item[1], reverse=True):
        name = yaml.parse(text[start:end]).value if key in (("base",), ("backbone", "file")) else None
        if isinstance(name, str) and (path.parent / name).is_file():
            text = text[:start] + json.dumps(str((path.parent / name).resolve())) + text[end:]
    if path in shipped_recipes().values():
        text = text.replace(f"recipes/{path.name}", str(target))
    write_atomic(target, text.encode())
    return target
