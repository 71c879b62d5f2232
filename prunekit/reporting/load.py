"""A run folder as tables in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from prunekit.errors import CheckpointError
from prunekit.rundir import RunDir
from prunekit.yaml12 import parse

PARTS = ("baseline", "dense", "slim", "finetuned")
COUNTERS = ("ours", "fvcore", "thop", "torch")
COUNTED = ("channels", "params", "macs", "paper_flops", "fvcore_macs", "thop_macs")


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        name: the folder's name.
        path: the folder.
        status: running, complete, interrupted, failed or unknown.
        summary: ``summary.json``; a part whose stage has not run is absent.
        size: height and width, in pixels, of the image that the MACs are counted on; None where nobody says.
        layers: a row for each layer and branch, in the order of the network: ``layer``, ``branch`` and, for each
            of channels, params, macs, paper_flops, fvcore_macs and thop_macs, ``<quantity>_before`` and ``…_after``.
        counters: a row for each model (dense, slim) and counter (ours, fvcore, thop, torch): ``params``, ``macs``.
        metrics: a row for each epoch; the metrics of the task are columns named ``metrics.<name>``.
        plan: ``plan.json``, or None.
        recipe: ``recipe.yaml``.
        missing: the files that are not there or damaged, each with the reason.
    """

    name: str
    path: Path
    status: str
    summary: dict[str, Any]
    size: tuple[int, int] | None
    layers: pd.DataFrame
    counters: pd.DataFrame
    metrics: pd.DataFrame
    plan: dict[str, Any] | None
    recipe: dict[str, Any]
    missing: list[str]


def load_run(path: str | Path) -> Run:
    """Read a run folder, complete or not.

    Raises:
        RunFolderError: the folder is no run folder, or needs a newer prunekit.
        CheckpointError: its ``state.json`` is damaged.
    """
    run = RunDir.open(path)
    missing: list[str] = []

    def read(name: str, how: Callable[[], Any], otherwise: Any) -> Any:
        if not (run.path / name).exists():
            missing.append(f"{name}: not there")
            return otherwise
        try:
            return how()
        except CheckpointError as error:
            missing.append(f"{name}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            missing.append(f"{name}: not as prunekit writes it ({text})")
        return otherwise

    recipe = read("recipe.yaml", lambda: _recipe(run.read_text("recipe.yaml")), {})
    summary = read("summary.json", lambda: _mapping(run.read_json("summary.json")), {})
    metrics = read("metrics.jsonl", lambda: pd.json_normalize(run.read_metrics()), pd.DataFrame())
    plan = read("plan.json", lambda: _mapping(run.read_json("plan.json")), None)
    layers, counters, size = read(
        "layers.json", lambda: _layers(run.read_json("layers.json")), (_empty_layers(), _empty_counters(), None)
    )
    return Run(
        name=run.path.resolve().name,
        path=run.path,
        status=run.status if run.status != "unknown" else str(summary.get("status", "unknown")),
        summary=summary,
        size=size,
        layers=layers,
        counters=counters,
        metrics=metrics,
        plan=plan,
        recipe=recipe,
        missing=missing,
    )


def _recipe(text: str) -> dict[str, Any]:
    document = parse(text)
    if document.problems:
        raise ValueError(f"line {document.problems[0].line}: {document.problems[0].message}")
    return _mapping(document.value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a mapping is wanted, not {type(value).__name__}")
    return value


def _layers(written: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, tuple[int, int]]:
    rows = []
    for row in written["layers"]:
        flat = {"layer": str(row["layer"]), "branch": int(row["branch"])}
        for quantity in COUNTED:
            counted = row.get(quantity) or {}
            flat |= {f"{quantity}_{when}": counted.get(when) for when in ("before", "after")}
        rows.append(flat)
    counts = [
        {"model": model, "counter": counter, "params": counted.get("params"), "macs": counted.get("macs")}
        for model, counters in written["counters"].items()
        for counter, counted in counters.items()
    ]
    height, width = written["size"]
    layers = pd.concat([_empty_layers(), pd.DataFrame(rows)]) if rows else _empty_layers()
    return _whole(layers), _whole(pd.DataFrame(counts) if counts else _empty_counters()), (int(height), int(width))


def _empty_layers() -> pd.DataFrame:
    return pd.DataFrame(columns=["layer", "branch", *(f"{q}_{when}" for q in COUNTED for when in ("before", "after"))])


def _empty_counters() -> pd.DataFrame:
    return pd.DataFrame(columns=["model", "counter", "params", "macs"])


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    # Counts beside a null would turn into floats; a nullable integer keeps them exact.
    counts = [c for c in table.columns if c not in ("layer", "model", "counter")]
    numbers = {c: pd.to_numeric(table[c]).convert_dtypes() for c in counts}
    return table.assign(**{c: n if len(n.dropna()) else n.astype("Int64") for c, n in numbers.items()})
