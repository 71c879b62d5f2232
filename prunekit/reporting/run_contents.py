"""Schemas of the files in a run folder, and their conversion to tables.

Each ``read_*`` function takes a decoded file, removes what does not match its schema, describes each removed part in
``problems``, and raises ValueError if nothing usable is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prunekit.reporting.validators import (
    ANY_KEY,
    BOOL,
    COUNT,
    DURATION,
    FRACTION,
    INVALID,
    NUMBER,
    OPTIONAL_COUNT,
    OPTIONAL_NUMBER,
    OPTIONAL_STRING,
    PIXELS,
    STRING,
    check_format,
    describe_problems,
    drop_invalid,
    optional,
    require_valid,
    type_name,
    validate_mapping,
)
from prunekit.runs.state import FORMAT as RUN_FORMAT
from prunekit.utils.safe_decode import decode_json

MODELS = ("baseline", "dense", "slim", "finetuned")
COUNTERS = ("prunekit", "fvcore", "thop", "torch")
QUANTITIES = ("channels", "params", "macs", "paper_flops", "fvcore_macs", "thop_macs")
GALLERY_PARTS = ("image", "truth", *MODELS)

_METRICS = {ANY_KEY: OPTIONAL_NUMBER}
_MODEL = {"params": COUNT, "macs": COUNT, "paper_flops": OPTIONAL_COUNT, "metrics": _METRICS}
_EQUIVALENCE = {
    **dict.fromkeys(("max_abs_diff", "tolerance", "float32_diff"), NUMBER),
    **dict.fromkeys(("given_back", "folded", "carriers", "params", "macs"), COUNT),
    "passed": BOOL,
    "reason": STRING,
    "inputs": [[COUNT]],
    "inexact": {ANY_KEY: NUMBER},
}
_SUMMARY = {
    "recipe": STRING,
    "status": STRING,
    **dict.fromkeys(MODELS, _MODEL),
    "kept": {"channels": COUNT, "of": COUNT, "params_ratio": NUMBER, "macs_ratio": NUMBER},
    "equivalence": {**_EQUIVALENCE, "steps": [_EQUIVALENCE]},
    "progressive_pruning": [{**_EQUIVALENCE, **dict.fromkeys(("epoch", "channels"), COUNT), "seconds": DURATION}],
    "drift": {ANY_KEY: NUMBER},
    "recalibrated": {"batches": COUNT, "before": _METRICS, "after": _METRICS},
    "reference": {ANY_KEY: _METRICS},
    "export": {"path": STRING, "max_abs_diff": NUMBER, "latency_ms": {ANY_KEY: DURATION}},
    "skipped": {ANY_KEY: COUNT},
    "skipped_steps": {ANY_KEY: COUNT},
    "seconds": {ANY_KEY: DURATION},
}
_BEFORE_AFTER = {"before": OPTIONAL_COUNT, "after": OPTIONAL_COUNT}
_LAYERS = {
    "size": [PIXELS],
    "layers": [{"layer": STRING, "branch": COUNT, **dict.fromkeys(QUANTITIES, _BEFORE_AFTER)}],
    "counters": {ANY_KEY: {ANY_KEY: {"params": COUNT, "macs": COUNT}}},
}
_PLAN = {
    "builder": {"name": STRING, "options": {}},
    "groups": {},
    "removed": [STRING],
    "added_bias": [STRING],
    "carriers": {ANY_KEY: [COUNT]},
    "splits": {ANY_KEY: [COUNT]},
    "notes": [STRING],
}
_EPOCH = {
    "stage": STRING,
    **dict.fromkeys(("epoch", "step", "alive", "of", "skipped"), COUNT),
    **dict.fromkeys(("loss", "penalty", "lambda", "lr"), NUMBER),
    "seconds": DURATION,
    **dict.fromkeys(("metrics", "size", "budget"), _METRICS),
}
_CURVES = {
    **{key: [FRACTION] for key in ("precision", "recall", "f")},
    "classes": [STRING],
    "confusion": [[COUNT]],
}
_ENVIRONMENT = {
    **dict.fromkeys(("prunekit", "python", "platform", "device"), STRING),
    "packages": {ANY_KEY: OPTIONAL_STRING},
    **dict.fromkeys(("threads", "processes"), COUNT),
    "command": [STRING],
}
_EVAL = {
    **dict.fromkeys(("name", "model", "mode", "folder"), STRING),
    **dict.fromkeys(("images", "skipped"), COUNT),
    "metrics": _METRICS,
    "seconds": DURATION,
}
_BENCH = {
    **dict.fromkeys(("model", "form", "device"), STRING),
    **dict.fromkeys(("batch", "threads"), COUNT),
    **dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "peak_mb"), optional(DURATION)),
}
_GALLERY = {"index": COUNT, "name": STRING, "fixed": BOOL, "kind": OPTIONAL_STRING}


@dataclass(frozen=True)
class GalleryImage:
    """A validation image of ``gallery/`` with the predictions of the models.

    Attributes:
        index: position in the validation set.
        name: name in the validation set.
        kind: "best" or "worst" by the error of the last model, or None.
        fixed: whether the image is among those shown for every run.
        files: "image", "truth" and model names → PNG file; only existing files.
        labels: "truth" and model names → class prediction, for those without a picture.
    """

    index: int
    name: str
    kind: str | None = None
    fixed: bool = False
    files: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)


def _without_nulls(value: Any) -> Any:
    # No version writes a null format, so that one is an error.
    return {k: v for k, v in value.items() if v is not None or k == "format"} if isinstance(value, dict) else value


def read_summary(value: Any, problems: list[str]) -> dict[str, Any]:
    summary = validate_mapping(_without_nulls(value), _SUMMARY, problems, RUN_FORMAT)
    if not {"recipe", "status", *MODELS} & value.keys():
        raise ValueError("it is not the summary of a run")
    for model in [model for model in MODELS if model in summary]:
        problems += [f"{model}.{key} is missing" for key in ("params", "macs") if key not in value[model]]
        if not {"params", "macs", "metrics"} & summary[model].keys():
            del summary[model]
    return summary


def read_plan(value: Any, problems: list[str]) -> dict[str, Any]:
    plan = validate_mapping(_without_nulls(value), _PLAN, problems)
    if "groups" not in plan:
        raise ValueError("it is not a plan, groups is missing")
    return plan


def read_environment(value: Any, problems: list[str]) -> dict[str, Any]:
    return validate_mapping(value, _ENVIRONMENT, problems)


def read_classes(value: Any, problems: list[str]) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("it is not a list of names")
    return value


def read_curves(value: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    check_format(value)
    curves = {}
    for model, entry in value.items():
        if model == "format":
            continue
        if model not in MODELS:
            problems.append(f"{model} is not a model")
            continue
        try:
            entry = require_valid(entry, _CURVES)
            if len({len(entry[key]) for key in ("precision", "recall", "f") if key in entry}) > 1:
                raise ValueError("its curves differ in length")
            matrix = entry.get("confusion", [])
            if {len(matrix), *map(len, matrix)} != {len(entry.get("classes", matrix))}:
                raise ValueError("its confusion matrix does not match its classes")
            curves[model] = entry
        except ValueError as error:
            problems.append(f"{model}: {error}")
    return curves


def read_layers(value: Any) -> tuple[pd.DataFrame, pd.DataFrame, tuple[int, int]]:
    """Return the tables ``layers`` and ``counters``, and the image size at which their MACs were counted."""
    if not isinstance(value, dict) or not {"size", "layers", "counters"} <= value.keys():
        raise ValueError("size, layers or counters is missing")
    valid = require_valid(value, _LAYERS)
    rows = []
    for index, row in enumerate(valid["layers"]):
        if "layer" not in row or "branch" not in row:
            raise ValueError(f"layers[{index}] has no layer and branch")
        counts = {f"{q}_{when}": row.get(q, {}).get(when) for q in QUANTITIES for when in ("before", "after")}
        rows.append({"layer": row["layer"], "branch": row["branch"], **counts})
    counter_rows = [
        {"model": model, "counter": counter, "params": counts.get("params"), "macs": counts.get("macs")}
        for model, counters in valid["counters"].items()
        for counter, counts in counters.items()
    ]
    if len(valid["size"]) != 2:
        raise ValueError("its size is not height and width")
    layers = pd.DataFrame(rows, columns=empty_layers().columns, dtype=object)
    if layers.duplicated(["layer", "branch"]).any():
        raise ValueError("it contains a branch of a layer twice")
    counters = pd.DataFrame(counter_rows, columns=empty_counters().columns, dtype=object)
    height, width = map(int, valid["size"])
    return _with_counts(layers, list(layers.columns[1:])), _with_counts(counters, ["params", "macs"]), (height, width)


def empty_layers() -> pd.DataFrame:
    counts = (f"{quantity}_{when}" for quantity in QUANTITIES for when in ("before", "after"))
    return pd.DataFrame(columns=["layer", "branch", *counts])


def empty_counters() -> pd.DataFrame:
    return pd.DataFrame(columns=["model", "counter", "params", "macs"])


def _with_counts(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    # As floats, counts above 2⁵³ would lose digits.
    exact = {c: pd.array([None if v is None else int(v) for v in table[c].tolist()], dtype="Int64") for c in columns}
    return table.assign(**exact)


def read_metrics(data: bytes, problems: list[str], finished: bool = True) -> pd.DataFrame:
    """Return a row for each line.

    An incomplete last line is skipped; it is a problem only if the run has ``finished``.
    """
    *lines, rest = data.split(b"\n")
    if rest and finished:
        problems.append("its last line is incomplete")
    rows = []
    for number, line in enumerate(lines, 1):
        line_problems: list[str] = []
        try:
            row = validate_mapping(decode_json(line), _EPOCH, line_problems)
            problems += [f"line {number}: {text}" for text in line_problems]
            if "stage" not in row or "epoch" not in row:
                raise ValueError("it has no stage and epoch")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number} is damaged ({str(error) or type(error).__name__})")
    if lines and not rows:
        raise ValueError(describe_problems(problems))
    table = pd.json_normalize(rows) if rows else pd.DataFrame()
    numeric = [c for c in table.columns if c.partition(".")[0] in {*_EPOCH} - {"stage"}]
    return table.assign(**{c: pd.to_numeric(table[c]) for c in numeric})


def read_gates(arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Convert norm → float array [epochs, channels] to a float32 table, epoch × (norm, channel)."""
    if not arrays:
        return empty_gates()
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(f"{name} is not an array of epochs × channels")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} contains numbers that are not finite")
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) > 1:
        raise ValueError("its norms differ in their number of epochs")
    widths = [array.shape[1] for array in arrays.values()]
    norms = np.repeat(np.array(list(arrays), object), widths)
    columns = pd.MultiIndex.from_arrays([norms, np.concatenate([*map(np.arange, widths)])], names=["norm", "channel"])
    values = np.concatenate(list(arrays.values()), axis=1, dtype=np.float32)
    return pd.DataFrame(values, index=pd.RangeIndex(1, lengths.pop() + 1, name="epoch"), columns=columns)


def empty_gates() -> pd.DataFrame:
    columns = pd.MultiIndex.from_arrays([[], []], names=["norm", "channel"])
    return pd.DataFrame(np.empty((0, 0), np.float32), index=pd.RangeIndex(1, 1, name="epoch"), columns=columns)


def _read_rows(value: Any, key: str, schema: dict[str, Any], required: list[str], problems: list[str]) -> pd.DataFrame:
    """Return the valid rows that have all required keys; nested mappings become columns ``outer.inner``."""
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise ValueError(f"it has no {key}")
    check_format(value)
    rows = []
    for index, row in enumerate(value[key]):
        row = drop_invalid(row, schema, f"{key}[{index}]", problems)
        if row is INVALID:
            continue
        if missing := [name for name in required if row.get(name) is None]:
            problems.append(f"{key}[{index}] has no {' and '.join(missing)}")
        else:
            rows.append(row)
    table = pd.json_normalize(rows) if rows else pd.DataFrame()
    known = [column for column in schema if column != "metrics"]
    return table.reindex(columns=[*known, *(c for c in table.columns if c not in schema)])


def read_evals(value: Any, problems: list[str]) -> pd.DataFrame:
    return _read_rows(value, "sets", _EVAL, ["name", "model", "mode"], problems)


def read_bench(value: Any, problems: list[str]) -> pd.DataFrame:
    table = _read_rows(value, "rows", _BENCH, ["model", "median_ms"], problems)
    device = value.get("device")
    table["device"] = table["device"].fillna(device if isinstance(device, str) else "unknown")
    table["size"] = [_image_size(size) for size in table["size"]] if "size" in table else None
    return table[["model", "form", "batch", "size", "threads", "device", "median_ms", "p10_ms", "p90_ms", "peak_mb"]]


def _image_size(size: Any) -> str | None:
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    return "×".join(str(int(side)) for side in sides) if all(map(PIXELS.accepts, sides)) else None


def read_gallery(value: Any, folder: Path, problems: list[str]) -> list[GalleryImage]:
    if not isinstance(value, list):
        raise ValueError(f"it is {type_name(value)}, expected a list")
    images = []
    for position, row in enumerate(value):
        entry = drop_invalid(row, _GALLERY, f"[{position}]", problems)
        if entry is INVALID or "index" not in entry or "name" not in entry:
            problems.append(f"[{position}] has no index and name")
            continue
        index = int(entry["index"])
        paths = {part: folder / f"{index:04d}-{part}.png" for part in GALLERY_PARTS}
        files = {part: path for part, path in paths.items() if path.is_file()}
        for part in [part for part, path in files.items() if not _is_complete_png(path)]:
            problems.append(f"{files.pop(part).name} is damaged")
        if not paths["image"].is_file():
            problems.append(f"{paths['image'].name} is missing")
        labels = {part: entry[part] for part in GALLERY_PARTS if part in entry and part not in files}
        images.append(GalleryImage(index, entry["name"], entry.get("kind"), entry.get("fixed", False), files, labels))
    return images


def _is_complete_png(path: Path) -> bool:
    """Check the first and last bytes only: a truncated file lacks the IEND chunk."""
    with path.open("rb") as file:
        signature = file.read(8)
        file.seek(max(0, path.stat().st_size - 8))
        return signature == b"\x89PNG\r\n\x1a\n" and file.read(4) == b"IEND"
