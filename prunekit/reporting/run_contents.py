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

from prunekit.reporting import validators as v
from prunekit.runs.state import FORMAT as RUN_FORMAT
from prunekit.utils.safe_decode import decode_json

MODELS = ("baseline", "dense", "slim", "finetuned")
COUNTERS = ("prunekit", "fvcore", "thop", "torch")
QUANTITIES = ("channels", "params", "macs", "paper_flops", "fvcore_macs", "thop_macs")
LAYER_COLUMNS = ["layer", "branch", *(f"{q}_{when}" for q in QUANTITIES for when in ("before", "after"))]
COUNTER_COLUMNS = ["model", "counter", "params", "macs"]
GALLERY_PARTS = ("image", "truth", *MODELS)

_METRICS = {v.ANY_KEY: v.OPTIONAL_NUMBER}
_MODEL = {"params": v.COUNT, "macs": v.COUNT, "paper_flops": v.OPTIONAL_COUNT, "metrics": _METRICS}
_EQUIVALENCE = {
    **dict.fromkeys(("max_abs_diff", "tolerance", "float32_diff", "drift", "drift_mean", "output_size"), v.NUMBER),
    **dict.fromkeys(("given_back", "folded", "carriers", "params", "macs"), v.COUNT),
    "passed": v.BOOL,
    "reason": v.STRING,
    "inputs": [[v.COUNT]],
    "inexact": {v.ANY_KEY: v.NUMBER},
}
_SUMMARY = {
    "recipe": v.STRING,
    "status": v.STRING,
    **dict.fromkeys(MODELS, _MODEL),
    "kept": {"channels": v.COUNT, "of": v.COUNT, "params_ratio": v.NUMBER, "macs_ratio": v.NUMBER, "cut": v.NUMBER},
    "equivalence": {**_EQUIVALENCE, "steps": [_EQUIVALENCE]},
    "drift": {v.ANY_KEY: v.NUMBER},
    "latency": {
        **dict.fromkeys(("runtime", "version", "device"), v.STRING),
        **dict.fromkeys(("threads", "batch"), v.COUNT),
        **dict.fromkeys(("dense_ms", "slim_ms"), v.DURATION),
        "size": [v.PIXELS],
        "ratio": v.NUMBER,
    },
    "recalibrated": {"batches": v.COUNT, "before": _METRICS, "after": _METRICS},
    "reference": {v.ANY_KEY: _METRICS},
    "export": {"path": v.STRING, "max_abs_diff": v.NUMBER, "latency_ms": {v.ANY_KEY: v.DURATION}},
    "skipped": {v.ANY_KEY: v.COUNT},
    "skipped_steps": {v.ANY_KEY: v.COUNT},
    "seconds": {v.ANY_KEY: v.DURATION},
}
_BEFORE_AFTER = {"before": v.OPTIONAL_COUNT, "after": v.OPTIONAL_COUNT}
_LAYERS = {
    "size": [v.PIXELS],
    "layers": [{"layer": v.STRING, "branch": v.COUNT, **dict.fromkeys(QUANTITIES, _BEFORE_AFTER)}],
    "counters": {v.ANY_KEY: {v.ANY_KEY: {"params": v.COUNT, "macs": v.COUNT}}},
}
_PLAN = {
    "builder": {"name": v.STRING, "options": {}},
    "groups": {},
    "removed": [v.STRING],
    "added_bias": [v.STRING],
    "carriers": {v.ANY_KEY: [v.COUNT]},
    "splits": {v.ANY_KEY: [v.COUNT]},
    "notes": [v.STRING],
}
_EPOCH = {
    "stage": v.STRING,
    **dict.fromkeys(("epoch", "step", "size", "alive", "of", "skipped"), v.COUNT),
    **dict.fromkeys(("loss", "penalty", "lambda", "lr"), v.NUMBER),
    "seconds": v.DURATION,
    "metrics": _METRICS,
}
_CURVES = {
    **{key: [v.FRACTION] for key in ("precision", "recall", "f")},
    "classes": [v.STRING],
    "confusion": [[v.COUNT]],
}
_ENVIRONMENT = {
    **dict.fromkeys(("prunekit", "python", "platform", "device"), v.STRING),
    "packages": {v.ANY_KEY: v.OPTIONAL_STRING},
    **dict.fromkeys(("threads", "processes"), v.COUNT),
    "command": [v.STRING],
}
_EVAL = {
    **dict.fromkeys(("name", "model", "mode", "folder"), v.STRING),
    **dict.fromkeys(("images", "skipped"), v.COUNT),
    "metrics": _METRICS,
    "seconds": v.DURATION,
}
_BENCH = {
    **dict.fromkeys(("model", "form", "device"), v.STRING),
    **dict.fromkeys(("batch", "threads"), v.COUNT),
    **dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "peak_mb"), v.optional(v.DURATION)),
}
_GALLERY = {"index": v.COUNT, "name": v.STRING, "fixed": v.BOOL, "kind": v.OPTIONAL_STRING}


@dataclass(frozen=True)
class GalleryImage:
    """A validation image of ``gallery/`` with the predictions of the models.

    Args:
        index, name: in the validation set.
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
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if item is not None or key == "format"}


def read_summary(value: Any, problems: list[str]) -> dict[str, Any]:
    summary = v.validate_mapping(_without_nulls(value), _SUMMARY, problems, RUN_FORMAT)
    if not {"recipe", "status", *MODELS} & value.keys():
        raise ValueError("it is not the summary of a run")
    for model in [model for model in MODELS if model in summary]:
        problems += [f"{model}.{key} is missing" for key in ("params", "macs") if key not in value[model]]
        if not {"params", "macs", "metrics"} & summary[model].keys():
            del summary[model]
    return summary


def read_plan(value: Any, problems: list[str]) -> dict[str, Any]:
    plan = v.validate_mapping(_without_nulls(value), _PLAN, problems)
    if "groups" not in plan:
        raise ValueError("it is not a plan, groups is missing")
    return plan


def read_environment(value: Any, problems: list[str]) -> dict[str, Any]:
    return v.validate_mapping(value, _ENVIRONMENT, problems)


def read_classes(value: Any, problems: list[str]) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("it is not a list of names")
    return value


def read_curves(value: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    v.check_format(value)
    curves = {}
    for model, entry in value.items():
        if model == "format":
            continue
        if model not in MODELS:
            problems.append(f"{model} is not a model")
            continue
        try:
            entry = v.require_valid(entry, _CURVES)
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
    valid = v.require_valid(value, _LAYERS)
    rows = []
    for index, row in enumerate(valid["layers"]):
        if "layer" not in row or "branch" not in row:
            raise ValueError(f"layers[{index}] has no layer and branch")
        counts = [row.get(q, {}).get(when) for q in QUANTITIES for when in ("before", "after")]
        rows.append([row["layer"], row["branch"], *counts])
    counter_rows = [
        [model, counter, counts.get("params"), counts.get("macs")]
        for model, counters in valid["counters"].items()
        for counter, counts in counters.items()
    ]
    if len(valid["size"]) != 2:
        raise ValueError("its size is not height and width")
    layers, counters = (
        _counts_table(LAYER_COLUMNS, rows, texts=1),
        _counts_table(COUNTER_COLUMNS, counter_rows, texts=2),
    )
    if layers.duplicated(["layer", "branch"]).any():
        raise ValueError("it contains a branch of a layer twice")
    height, width = map(int, valid["size"])
    return layers, counters, (height, width)


def _counts_table(columns: list[str], rows: list[list[Any]], texts: int) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    # As floats, counts above 2⁵³ would lose digits.
    counts = {c: pd.array([None if n is None else int(n) for n in table[c].tolist()], "Int64") for c in columns[texts:]}
    return table.assign(**counts)


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
            row = v.validate_mapping(decode_json(line), _EPOCH, line_problems)
            problems += [f"line {number}: {text}" for text in line_problems]
            if "stage" not in row or "epoch" not in row:
                raise ValueError("it has no stage and epoch")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number} is damaged ({str(error) or type(error).__name__})")
    if lines and not rows:
        raise ValueError(v.describe_problems(problems))
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
    norms = [(name, channel) for name, array in arrays.items() for channel in range(array.shape[1])]
    return _gates_table(norms, np.concatenate(list(arrays.values()), axis=1, dtype=np.float32))


def empty_gates() -> pd.DataFrame:
    return _gates_table([], np.empty((0, 0), np.float32))


def _gates_table(norms: list[tuple[str, int]], values: np.ndarray) -> pd.DataFrame:
    columns = pd.MultiIndex.from_arrays([[name for name, _ in norms], [c for _, c in norms]], names=["norm", "channel"])
    return pd.DataFrame(values, index=pd.RangeIndex(1, len(values) + 1, name="epoch"), columns=columns)


def _read_rows(value: Any, key: str, schema: dict[str, Any], required: list[str], problems: list[str]) -> pd.DataFrame:
    """Return the valid rows that have all required keys; nested mappings become columns ``outer.inner``."""
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise ValueError(f"it has no {key}")
    v.check_format(value)
    rows = []
    for index, row in enumerate(value[key]):
        row = v.drop_invalid(row, schema, f"{key}[{index}]", problems)
        if row is v.INVALID:
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
    table, device = _read_rows(value, "rows", _BENCH, ["model", "median_ms"], problems), value.get("device")
    table["device"] = table["device"].fillna(device if isinstance(device, str) else "unknown")
    table["size"] = [_image_size(size) for size in table["size"]] if "size" in table else None
    return table[["model", "form", "batch", "size", "threads", "device", "median_ms", "p10_ms", "p90_ms", "peak_mb"]]


def bench_of_budget(latency: dict[str, Any]) -> pd.DataFrame:
    """The latencies that a budget of time was measured by, as rows of a benchmark; empty where they are incomplete."""
    size = latency.get("size", [])
    form = {"onnxruntime": "ort", "torch": "deployed"}.get(latency.get("runtime", ""), latency.get("runtime"))
    setting = {**{key: latency.get(key) for key in ("batch", "threads", "device")}, "form": form, "size": size[1:]}
    found = {model: latency.get(f"{model}_ms") for model in ("dense", "slim")}
    if None in (*setting.values(), *found.values()):
        return pd.DataFrame()
    return read_bench({"rows": [{"model": model, "median_ms": ms, **setting} for model, ms in found.items()]}, [])


def _image_size(size: Any) -> str | None:
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    return "×".join(str(int(side)) for side in sides) if all(map(v.PIXELS.accepts, sides)) else None


def read_gallery(value: Any, folder: Path, problems: list[str]) -> list[GalleryImage]:
    if not isinstance(value, list):
        raise ValueError(f"it is {v.type_name(value)}, expected a list")
    images = []
    for position, row in enumerate(value):
        entry = v.drop_invalid(row, _GALLERY, f"[{position}]", problems)
        if entry is v.INVALID or "index" not in entry or "name" not in entry:
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
