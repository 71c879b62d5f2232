"""The settings of a sweep: values for keys of a recipe, and the trials that combine them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.errors import RecipeError
from prunekit.utils.io import sha256

_PAIRS = {"[": "]", "{": "}", "(": ")"}
_MAX_NAME = 100
# Of the table of trials, beside axes and metrics.
RESULT_COLUMNS = ("trial", "status", "model", "params", "macs", "latency ms", "seconds")


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and its values, as YAML."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Attributes:
        name: of its folder.
        values: of each axis, as YAML.
    """

    name: str
    values: tuple[str, ...]


def parse_settings(settings: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Return the axes, of settings ``key=value,value``, and the settings with a single value.

    Commas within brackets, braces and quotes belong to a value.

    Raises:
        RecipeError: one line per setting that is wrong.
    """
    axes, fixed, problems = [], [], []
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = _split(text)
        if not equals:
            problems.append(f"{setting}: has no '='; write KEY=VALUE,VALUE, such as target.params_ratio=0.5,0.35")
        elif len(values) == 1:
            fixed.append(setting)
        elif not all(values):
            problems.append(f"{setting}: a value is empty; write null where a key is to have none")
        elif len(set(values)) < len(values):
            problems.append(f"{setting}: has a value twice; give each once")
        else:
            axes.append(Axis(key, tuple(values)))
    keys = [axis.key for axis in axes] + [setting.partition("=")[0] for setting in fixed]
    problems += [
        f"{key}: is given twice; give all its values at once" for key in dict.fromkeys(keys) if keys.count(key) > 1
    ]
    if not problems and not axes:
        problems.append("no key has several values; give one as KEY=VALUE,VALUE, or use: prunekit run")
    if problems:
        raise RecipeError("\n".join(problems))
    return axes, fixed


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    values, closing, quote = [""], [], None
    for character in text:
        if quote is not None:
            quote = None if character == quote else quote
        elif character in "'\"" and not values[-1].strip():
            quote = character
        elif character in _PAIRS:
            closing.append(_PAIRS[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == "," and not closing:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values]


def combine(axes: Sequence[Axis], trials: int | None = None, seed: int = 0) -> list[Trial]:
    """Return all combinations of the values, the last axis changing fastest; or so many of them, drawn at random.

    Raises:
        RecipeError: there are fewer combinations than ``trials``.
    """
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    if trials is not None:
        if not 1 <= trials <= len(combinations):
            raise RecipeError(f"--trials {trials}: must be from 1 to {len(combinations)}, the number of combinations")
        combinations = sorted(random.Random(seed).sample(combinations, trials), key=combinations.index)
    titles = short_titles(axes)
    names = [",".join(map("=".join, zip(titles, values, strict=True))) for values in combinations]
    return [Trial(_file_name(name), values) for name, values in zip(names, combinations, strict=True)]


def _file_name(name: str) -> str:
    """Return a name for a folder; one that had to be changed ends with a digest, since others may be changed alike."""
    file_name = re.sub(r"[^A-Za-z0-9.,=_-]+", "-", name)[:_MAX_NAME]
    return file_name if file_name == name else f"{file_name}-{sha256(name.encode())[:8]}"


def short_titles(axes: Sequence[Axis]) -> list[str]:
    """Return the last part of each key; the whole key where two end alike, or a column of the results has that name."""
    short = [axis.key.rpartition(".")[2] for axis in axes]
    unclear = {*RESULT_COLUMNS, *(name for name in short if short.count(name) > 1)}
    return [axis.key if name in unclear else name for axis, name in zip(axes, short, strict=True)]
