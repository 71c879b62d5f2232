"""Error messages for values that do not fit a pydantic model: what is wrong and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pydantic

from prunekit.config import schema, yaml
from prunekit.config.yaml import format_path, quote
from prunekit.utils.text import closest_match, suggest

# Keys of other tools → what to use here.
_OTHER_NAMES = {
    "device devices gpu gpus cuda accelerator": "the device is chosen automatically, a GPU where there is one; choose "
    "with CUDA_VISIBLE_DEVICES=0 before the command (CUDA_VISIBLE_DEVICES= for the CPU)",
    "out output out_dir output_dir save_dir run_dir project": "use the option --out DIR",
    "resume": "use the option --resume",
    "workers num_workers": "images are read once and kept in memory; remove it",
    "threads num_threads": "set OMP_NUM_THREADS=N before the command",
    "amp bf16 fp16 half mixed_precision": "use train.precision=bf16",
    "model arch architecture net network": "use backbone",
    "dataset": "use data",
    "image_size img_size imgsz input_size resolution": "use data.size",
    "height width": "images are resized to squares; use data.size",
    "max_epochs n_epochs num_epochs": "use train.epochs",
    "batch bs": "use train.batch_size",
    "learning_rate": "use train.lr",
    "weight_decay momentum betas": "use train.optimizer.options",
    "lambda": "use decay.weight",
    "amount prune_ratio pruning_ratio ratio sparsity": "use target.params_ratio or target.macs_ratio, the share that "
    "is kept",
    "pretrained resume_from weights": "use init=RUN with a run folder; weights of your own: see backbone.file",
    "num_classes": "the classes are those of the data; remove it",
}
_HINTS = {name: hint for names, hint in _OTHER_NAMES.items() for name in names.split()}
_SIDES = re.compile(r"\D*(\d{1,6})\D+(\d{1,6})\D*")


def group_by_path(error: pydantic.ValidationError, value: Any) -> dict[yaml.Path, list[Any]]:
    """Group errors by their path in ``value``; pydantic reports each member of a union separately."""
    groups: dict[yaml.Path, list[Any]] = {}
    for item in error.errors(include_url=False):
        path: yaml.Path = ()
        inner = value
        for part in item["loc"]:
            if yaml.contains(inner, part):
                inner = inner[part]
            elif item["type"] != "missing" or part != item["loc"][-1]:
                break
            path = (*path, part)
        groups.setdefault(path, []).append(item)
    return groups


def describe_value(errors: Sequence[Any], path: yaml.Path = ()) -> str:
    """Return what is wrong with the value at a path; ``errors`` has one item per member of a union."""
    value = errors[0]["input"]
    if path == ("data", "size") and (sides := _SIDES.fullmatch(str(value))):
        side = max(map(int, sides.groups()))
        return f"{quote(value)}: images are resized to squares only; write one number, such as {side}"
    if any(item["type"] in ("int_type", "int_from_float", "float_type") for item in errors):
        if isinstance(value, str) and type(yaml.parse(value).value) in (int, float):
            return f"{quote(value)} is a string; remove the quotes"
        if isinstance(value, float) and value.is_integer():
            return f"{quote(value)} is not an integer; write {int(value)}"
    return f"{quote(value)} {' or '.join(dict.fromkeys(map(_requirement, errors)))}"


def _requirement(error: dict[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "string_type":
        return "must be a string; put it in quotes"
    message = re.sub(r"^\w+ should ", "must ", error["msg"])
    return message.replace("an object", "a mapping of 'key: value' lines").replace(
        "valid array", "list, such as [1, 2]"
    )


def describe_missing_key(path: yaml.Path) -> str:
    if section := schema.get_section(path):
        required = [key for key, field in section.model_fields.items() if field.is_required()]
        return f"is missing; add the section with {' and '.join(required)}"
    return f"is missing; add '{path[-1]}: …'"


def describe_unknown_key(path: yaml.Path) -> str:
    known = list((schema.get_section(path[:-1]) or schema.Recipe).model_fields)
    if hint := _HINTS.get(path[-1].lower()):
        return f"unknown key; {hint}"
    # The same key in another section is a better hint than a similar key in this one.
    elsewhere = [format_path(other) for other in schema.all_keys() if other[-1] == path[-1]]
    if elsewhere:
        return f"unknown key here; use {' or '.join(elsewhere[:3])}"
    match = closest_match(path[-1][:100], known)
    hint = f", did you mean {format_path((*path[:-1], match))!r}?" if match else "; remove it,"
    return f"unknown key{hint} known keys: {', '.join(known)}"


def describe_unknown_option(path: yaml.Path, owner: str, known: Sequence[str]) -> str:
    section_key = (*path[:-2], path[-1])
    if section_key in schema.all_keys():
        return f"{owner} has no such option; write it as {format_path(section_key)}"
    hint = suggest(path[-1][:100], known)
    return f"{owner} has no such option{hint} known options: {', '.join(known) or 'none'}"
