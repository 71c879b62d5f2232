"""What the files of a run folder may hold: what does not fit is taken out and named, so that nothing wrong is shown.

Every function takes what was read, appends to ``faults`` a sentence for each thing it takes out, and raises ValueError
where nothing is left to show. A kill, a full disk, an editor or a newer prunekit may have been at any file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prunekit.reporting.validators import (
    COUNT,
    DURATION,
    EACH,
    FLAG,
    GONE,
    MAYBE_COUNT,
    MAYBE_NUMBER,
    MAYBE_TEXT,
    NUMBER,
    SHARE,
    SIZE,
    TEXT,
    describe_problem,
    drop_invalid,
    kind_of,
    known,
    mapping,
    or_null,
    whole,
)
from prunekit.utils.decode import decode_json

PARTS = ("baseline", "dense", "slim", "finetuned")
COUNTERS = ("ours", "fvcore", "thop", "torch")
COUNTED = ("channels", "params", "macs", "paper_flops", "fvcore_macs", "thop_macs")
SHOWN = ("image", "truth", *PARTS)

_MODEL = {"params": COUNT, "macs": COUNT, "paper_flops": MAYBE_COUNT, "metrics": {EACH: MAYBE_NUMBER}}
_EQUIVALENCE = {
    **dict.fromkeys(("max_abs_diff", "tolerance", "float32_diff"), NUMBER),
    **dict.fromkeys(("given_back", "folded", "carriers", "params", "macs"), COUNT),
    "passed": FLAG,
    "reason": TEXT,
    "inputs": [[COUNT]],
    "inexact": {EACH: NUMBER},
}
_SUMMARY = {
    "recipe": TEXT,
    "status": TEXT,
    **dict.fromkeys(PARTS, _MODEL),
    "kept": {"channels": COUNT, "of": COUNT, "params_ratio": NUMBER, "macs_ratio": NUMBER},
    "equivalence": {**_EQUIVALENCE, "steps": [_EQUIVALENCE]},
    "shrunk": [{**_EQUIVALENCE, **dict.fromkeys(("epoch", "channels"), COUNT), "seconds": DURATION}],
    "drift": {EACH: NUMBER},
    "recalibrated": {"batches": COUNT, "before": {EACH: MAYBE_NUMBER}, "after": {EACH: MAYBE_NUMBER}},
    "reference": {EACH: {EACH: MAYBE_NUMBER}},
    "export": {"path": TEXT, "max_abs_diff": NUMBER, "latency_ms": {EACH: DURATION}},
    "skipped": {EACH: COUNT},
    "skipped_steps": {EACH: COUNT},
    "seconds": {EACH: DURATION},
}
_SIDES = {"before": MAYBE_COUNT, "after": MAYBE_COUNT}
_LAYERS = {
    "size": [SIZE],
    "layers": [{"layer": TEXT, "branch": COUNT, **dict.fromkeys(COUNTED, _SIDES)}],
    "counters": {EACH: {EACH: {"params": COUNT, "macs": COUNT}}},
}
_PLAN = {
    "builder": {"name": TEXT, "options": {}},
    "groups": {},
    "removed": [TEXT],
    "added_bias": [TEXT],
    "carriers": {EACH: [COUNT]},
    "splits": {EACH: [COUNT]},
    "notes": [TEXT],
}
_LINE = {
    "stage": TEXT,
    **dict.fromkeys(("epoch", "step", "alive", "of", "skipped"), COUNT),
    **dict.fromkeys(("loss", "penalty", "lambda", "lr"), NUMBER),
    "seconds": DURATION,
    **{key: {EACH: MAYBE_NUMBER} for key in ("metrics", "size", "budget")},
}
_CURVES = {
    **{key: [SHARE] for key in ("precision", "recall", "f")},
    "classes": [TEXT],
    "confusion": [[COUNT]],
}
_ENVIRONMENT = {
    **dict.fromkeys(("prunekit", "python", "platform", "device"), TEXT),
    "packages": {EACH: MAYBE_TEXT},
    **dict.fromkeys(("threads", "processes"), COUNT),
    "command": [TEXT],
}
_EVAL = {
    **dict.fromkeys(("name", "model", "mode", "folder"), TEXT),
    "images": COUNT,
    "skipped": COUNT,
    "metrics": {EACH: MAYBE_NUMBER},
    "seconds": DURATION,
}
_BENCH = {
    **dict.fromkeys(("model", "form", "device"), TEXT),
    "batch": COUNT,
    "threads": COUNT,
    **dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "peak_mb"), or_null(DURATION)),
}


# ---- the files, one by one


def _without_nulls(value: Any) -> Any:
    # A format of null never was; that is told.
    return {k: v for k, v in value.items() if v is not None or k == "format"} if isinstance(value, dict) else value


def summary(value: Any, faults: list[str]) -> dict[str, Any]:
    found = mapping(_without_nulls(value), _SUMMARY, faults)
    if not {"recipe", "status", *PARTS} & value.keys():
        raise ValueError("it is no summary of a run")
    for part in [part for part in PARTS if part in found]:
        faults += [f"{part}.{key} is not there" for key in ("params", "macs") if key not in value[part]]
        if not {"params", "macs", "metrics"} & found[part].keys():
            del found[part]
    return found


def plan(value: Any, faults: list[str]) -> dict[str, Any]:
    found = mapping(_without_nulls(value), _PLAN, faults)
    if "groups" not in found:
        raise ValueError("it is no plan, it has no groups")
    return found


def environment(value: Any, faults: list[str]) -> dict[str, Any]:
    return mapping(value, _ENVIRONMENT, faults)


def classes(value: Any, faults: list[str]) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("it is no list of names")
    return value


def curves(value: Any, faults: list[str]) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"it is {kind_of(value)}, where a mapping is wanted")
    known(value)
    out = {}
    for part, held in value.items():
        if part == "format":
            continue
        if part not in PARTS:
            faults.append(f"{part} is no model")
            continue
        try:
            one = whole(held, _CURVES)
            if len({len(one[key]) for key in ("precision", "recall", "f") if key in one}) > 1:
                raise ValueError("its curves differ in length")
            rows = one.get("confusion", [])
            if {len(rows), *map(len, rows)} != {len(one.get("classes", rows))}:
                raise ValueError("its confusion matrix does not fit its classes")
            out[part] = one
        except ValueError as error:
            faults.append(f"{part}: {error}")
    return out


def layers(value: Any) -> tuple[pd.DataFrame, pd.DataFrame, tuple[int, int]]:
    """The tables ``layers`` and ``counters``, and the size that their MACs are counted at."""
    if not isinstance(value, dict) or not {"size", "layers", "counters"} <= value.keys():
        raise ValueError("it has no size, layers and counters")
    written = whole(value, _LAYERS)
    rows = []
    for index, row in enumerate(written["layers"]):
        if "layer" not in row or "branch" not in row:
            raise ValueError(f"layers[{index}] has no layer and branch")
        flat = {"layer": row["layer"], "branch": row["branch"]}
        for quantity in COUNTED:
            flat |= {f"{quantity}_{when}": row.get(quantity, {}).get(when) for when in ("before", "after")}
        rows.append(flat)
    counts = [
        {"model": model, "counter": counter, "params": counted.get("params"), "macs": counted.get("macs")}
        for model, counters in written["counters"].items()
        for counter, counted in counters.items()
    ]
    if len(written["size"]) != 2:
        raise ValueError("its size is not height and width")
    by_layer = pd.DataFrame(rows, columns=empty_layers().columns, dtype=object)
    if by_layer.duplicated(["layer", "branch"]).any():
        raise ValueError("a branch of a layer stands in it twice")
    height, width = map(int, written["size"])
    return (
        _counts(by_layer, [c for c in by_layer.columns if c != "layer"]),
        _counts(pd.DataFrame(counts, columns=empty_counters().columns, dtype=object), ["params", "macs"]),
        (height, width),
    )


def empty_layers() -> pd.DataFrame:
    return pd.DataFrame(columns=["layer", "branch", *(f"{q}_{when}" for q in COUNTED for when in ("before", "after"))])


def empty_counters() -> pd.DataFrame:
    return pd.DataFrame(columns=["model", "counter", "params", "macs"])


def _counts(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    # Counts beside a null would turn into floats; a nullable integer keeps them exact.
    exact = {c: pd.array([None if v is None else int(v) for v in table[c].tolist()], dtype="Int64") for c in columns}
    return table.assign(**exact)


def metrics(data: bytes, faults: list[str], cut_off: bool = True) -> pd.DataFrame:
    """A row for each line. Half a line at the end is left out; a run that goes on or was broken off may leave one, and
    with ``cut_off`` it is a fault."""
    *lines, rest = data.split(b"\n")
    if rest and cut_off:
        faults.append("its last line is cut off")
    rows = []
    for number, line in enumerate(lines, 1):
        found: list[str] = []
        try:
            row = mapping(decode_json(line), _LINE, found)
            faults += [f"line {number}: {text}" for text in found]
            if "stage" not in row or "epoch" not in row:
                raise ValueError("it has no stage and epoch")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number} is damaged ({str(error) or type(error).__name__})")
    if lines and not rows:
        raise ValueError(describe_problem(faults))
    table = pd.json_normalize(rows) if rows else pd.DataFrame()
    known_numbers = [c for c in table.columns if c.partition(".")[0] in {*_LINE} - {"stage"}]
    return table.assign(**{c: pd.to_numeric(table[c]) for c in known_numbers})


def gates(arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Epoch × (norm, channel), float32."""
    if not arrays:
        return empty_gates()
    lengths = set()
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(f"{name} is no table of epochs × channels")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        lengths.add(len(array))
    if len(lengths) > 1:
        raise ValueError("its norms differ in their number of epochs")
    columns = pd.MultiIndex.from_arrays(
        [
            np.repeat(np.array(list(arrays), object), [array.shape[1] for array in arrays.values()]),
            np.concatenate([np.arange(array.shape[1]) for array in arrays.values()]),
        ],
        names=["norm", "channel"],
    )
    values = np.concatenate(list(arrays.values()), axis=1, dtype=np.float32)
    return pd.DataFrame(values, index=pd.RangeIndex(1, lengths.pop() + 1, name="epoch"), columns=columns)


def empty_gates() -> pd.DataFrame:
    columns = pd.MultiIndex.from_arrays([[], []], names=["norm", "channel"])
    return pd.DataFrame(np.empty((0, 0), np.float32), index=pd.RangeIndex(1, 1, name="epoch"), columns=columns)


def _table(value: Any, key: str, wanted: dict[str, Any], needed: tuple[str, ...], faults: list[str]) -> pd.DataFrame:
    """The rows that fit and have what is needed; mappings in them become columns ``outer.inner``."""
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise ValueError(f"it has no {key}")
    known(value)
    rows = []
    for index, row in enumerate(value[key]):
        sifted = drop_invalid(row, wanted, f"{key}[{index}]", faults)
        if sifted is not GONE and all(sifted.get(name) is not None for name in needed):
            rows.append(sifted)
        elif sifted is not GONE:
            faults.append(f"{key}[{index}] has no {' and '.join(n for n in needed if sifted.get(n) is None)}")
    first = list(wanted)
    table = pd.json_normalize(rows) if rows else pd.DataFrame()
    return table.reindex(columns=[*(c for c in first if c != "metrics"), *(c for c in table.columns if c not in first)])


def evals(value: Any, faults: list[str]) -> pd.DataFrame:
    return _table(value, "sets", _EVAL, ("name", "model", "mode"), faults)


def bench(value: Any, faults: list[str]) -> pd.DataFrame:
    table = _table(value, "rows", _BENCH, ("model", "median_ms"), faults)
    device = value.get("device")
    table["device"] = table["device"].fillna(device if isinstance(device, str) else "unknown")
    table["size"] = [_side(size) for size in table["size"]] if "size" in table else None
    return table[["model", "form", "batch", "size", "threads", "device", "median_ms", "p10_ms", "p90_ms", "peak_mb"]]


def _side(size: Any) -> str | None:
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    return "×".join(str(int(side)) for side in sides) if all(SIZE.fits(side) for side in sides) else None


@dataclass(frozen=True)
class Example:
    """One validation image of ``gallery/`` and what the models make of it.

    Attributes:
        index: its place in the validation set.
        name: its name there.
        kind: "best" or "worst" by the error of the last model, or None.
        fixed: whether it is one of the images that are always shown.
        files: "image", "truth", and the models' names → the picture, a PNG; only those that are there.
        said: what stands for a picture where there is none: the truth's and the models' words, as of a class.
    """

    index: int
    name: str
    kind: str | None = None
    fixed: bool = False
    files: dict[str, Path] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)


def gallery(value: Any, folder: Path, faults: list[str]) -> list[Example]:
    if not isinstance(value, list):
        raise ValueError(f"it is {kind_of(value)}, where a list is wanted")
    out = []
    wanted = {"index": COUNT, "name": TEXT, "fixed": FLAG, "kind": MAYBE_TEXT}
    for place, row in enumerate(value):
        entry = drop_invalid(row, wanted, f"[{place}]", faults)
        if entry is GONE or "index" not in entry or "name" not in entry:
            faults.append(f"[{place}] has no index and name")
            continue
        index = int(entry["index"])
        paths = {name: folder / f"{index:04d}-{name}.png" for name in SHOWN}
        files = {name: path for name, path in paths.items() if path.is_file()}
        for name in [name for name, path in files.items() if not _is_png(path)]:
            faults.append(f"{files.pop(name).name} is damaged")
        if not paths["image"].is_file():
            faults.append(f"{paths['image'].name} is not there")
        said = {name: entry[name] for name in SHOWN if name in entry and name not in files}
        out.append(Example(index, entry["name"], entry.get("kind"), entry.get("fixed", False), files, said))
    return out


def _is_png(path: Path) -> bool:
    """Whether it begins and ends as a PNG does: one that is cut off does not. The pictures themselves are not read."""
    with path.open("rb") as file:
        begins = file.read(8) == b"\x89PNG\r\n\x1a\n"
        file.seek(max(0, path.stat().st_size - 8))
        return begins and file.read(4) == b"IEND"
