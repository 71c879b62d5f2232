"""Tables of runs, with raw numbers.

A header names its unit and convention: MACs count one multiply-add as one, on an image of the size that stands there;
"paper FLOPs" are the convention of the CSNet paper and always at 224×224; "÷ dense" is the ratio to the dense model.
What is not known is missing (NA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunekit.reporting.loader import COUNTERS, PARTS, Run
from prunekit.reporting.number_format import NOTHING, file_stem, size_text, written_out
from prunekit.reporting.published import LABEL, PUBLISHED
from prunekit.reporting.validators import is_number
from prunekit.runs.stage_order import STAGES

__all__ = [
    "NOTHING", "Named", "bench_table", "budget_table", "counters_table", "epochs_table", "evals_table", "latency",
    "layers_macs_title", "layers_table", "macs_title", "notes_table", "seconds_table", "size_text",
    "summary_table", "tables", "written_out",
]  # fmt: skip

MACS = "MACs ("
LATENCY = "latency ms"
PAPER_FLOPS = "paper FLOPs (224×224)"
PARAMS_RATIO, MACS_RATIO = "params ÷ dense", "MACs ÷ dense"
SECONDS = "seconds"
_TITLES = {
    "channels": "channels {}",
    "share": "share of channels {}",
    "params": "params {}",
    "macs": "MACs {} {}",
    "fvcore_macs": "fvcore MACs {} {}",
    "thop_macs": "thop MACs {} {}",
    "paper_flops": "paper FLOPs {} (224×224)",
}
# The stages that make a model. Sparse training and a baseline are one; of that the baseline's epochs are its own.
_MADE_IN = {"dense": ("train",), "slim": ("extract", "slim"), "finetuned": ("finetune",)}


@dataclass(frozen=True)
class Named:
    """A table and what stands around it.

    Attributes:
        name: the stem of its files.
        title: a heading, such as "Models".
        note: a sentence on how to read it.
        table: one row each of what the title says.
        narrow: the columns that fit a page of paper; None: all.
    """

    name: str
    title: str
    note: str
    table: pd.DataFrame
    narrow: list[str] | None = None


def macs_title(run: Run) -> str:
    """The header of a column of MACs in the summary."""
    return f"MACs {size_text(run.size)}"


def layers_macs_title(run: Run) -> str:
    """The header of a column of MACs of layers and of counters: a run that was derived from one of another image size
    has its layers from there."""
    return f"MACs {size_text(run.layers_size or run.size)}"


def summary_table(runs: Sequence[Run], published: bool = False) -> pd.DataFrame:
    """A row for each run and model (baseline, dense, slim, finetuned) that is there; with ``published`` one for each
    published CSNet below them, whose run is called "published, ECSSD".

    Columns: run, model, params, MACs (one column for each image size), paper FLOPs, the metrics that the runs hold, in
    their order there, latency where it was measured (one column for each way of measuring), params and MACs as ratios
    to the dense model of the same run, and the seconds of the stages that made the model. What is not known is missing
    (NA), such as the metrics of another run's task.
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, None] = {}
    for run in runs:
        dense = _part(run, "dense")
        latency_title, took = latency(run)
        for name in PARTS:
            part = _part(run, name)
            if not part:
                continue
            found = {_metric(k): v for k, v in (part.get("metrics") or {}).items() if is_number(v)}
            metrics |= dict.fromkeys(found)
            rows.append(
                {
                    "run": run.name,
                    "model": name,
                    "params": part.get("params"),
                    macs_title(run): part.get("macs"),
                    PAPER_FLOPS: part.get("paper_flops"),
                    **found,
                    **({latency_title: took[name]} if name in took else {}),
                    PARAMS_RATIO: _ratio(part.get("params"), dense.get("params")),
                    MACS_RATIO: _ratio(part.get("macs"), dense.get("macs")),
                    SECONDS: _seconds(run, name),
                }
            )
    for one in PUBLISHED if published else ():
        sizes = {"params": one.params, PAPER_FLOPS: one.paper_flops}
        rows.append({"run": LABEL, "model": one.name, **sizes, **one.metrics})
        metrics |= dict.fromkeys(one.metrics)
    found = list(dict.fromkeys(key for row in rows for key in row))
    macs, latencies = ([key for key in found if key.startswith(word)] for word in (MACS, LATENCY))
    counts = ["params", *macs, PAPER_FLOPS]
    fractions = [*metrics, *latencies, PARAMS_RATIO, MACS_RATIO, SECONDS]
    # Of objects: among floats, counts above 2⁵³ would lose their last digits.
    table = pd.DataFrame(rows, columns=["run", "model", *counts, *fractions], dtype=object)
    return table.astype({**dict.fromkeys(counts, "Int64"), **dict.fromkeys(fractions, "Float64")})


def latency(run: Run) -> tuple[str, dict[str, float]]:
    """The median latency of the models, in milliseconds, and the header that says how it was measured.

    Of what ``bench.json`` holds, the measurements are taken that were made in one way (form, batch, size, threads,
    device) for the most models, at the run's own image size and the smallest batch and number of threads; without
    it, what the summary has for the exported model. A fine-tuned model that was not measured itself has the latency
    of the slim one: it is the same network with other weights.
    """
    title, took = LATENCY, {}
    if len(run.bench):
        own = size_text(run.size).strip("()")
        ways = run.bench.groupby(["form", "batch", "size", "threads", "device"], sort=False, dropna=False)

        def rank(item: tuple[tuple[Any, ...], pd.DataFrame]) -> tuple[Any, ...]:
            (_, batch, size, threads, _), rows = item
            return -rows["model"].nunique(), size != own, *(float("inf") if pd.isna(n) else n for n in (batch, threads))

        (form, batch, size, threads, device), rows = min(ways, key=rank)
        how = [form, f"batch {_whole(batch)}", size, f"threads {_whole(threads)}", device]
        title = f"{LATENCY} ({', '.join(str(word) for word in how if not pd.isna(word) and NOTHING not in str(word))})"
        took = rows.groupby("model", sort=False)["median_ms"].last().to_dict()
    else:
        export = run.summary.get("export") or {}
        measured = export.get("latency_ms") or {}
        took = {part: measured[part] for part in PARTS if part in measured}
        exported = next((part for part in reversed(PARTS) if part in run.summary), None)
        if exported and exported not in took and "median" in measured:
            took[exported] = measured["median"]
        title = f"{LATENCY} ({export['path']})" if took and "path" in export else LATENCY
    if "slim" in took:
        took.setdefault("finetuned", took["slim"])
    return title, {part: float(value) for part, value in took.items() if part in PARTS}


def layers_table(run: Run) -> pd.DataFrame:
    """A row for each layer and branch, in the order of the network; every count before and after slimming.

    A share is that of the branch in the channels of its layer; after slimming it is the split that was learned.
    """
    table = run.layers[["layer", "branch"]].copy()
    for quantity, title in _TITLES.items():
        for when in ("before", "after"):
            head = title.format(when, size_text(run.layers_size or run.size))
            table[head] = _shares(run.layers, when) if quantity == "share" else run.layers[f"{quantity}_{when}"]
    return table


def _shares(layers: pd.DataFrame, when: str) -> pd.Series:
    channels = layers[f"channels_{when}"].astype("Float64")
    # A sum over unknown counts is unknown, and a layer of which nothing is left has no split.
    of = layers["layer"].map(channels.groupby(layers["layer"]).agg(lambda column: column.sum(skipna=False)))
    of = of.astype("Float64")
    return channels / of.mask(of == 0)


def counters_table(run: Run) -> pd.DataFrame:
    """Params and MACs of the dense and the slim model as each counter has them, and a note wherever they differ.

    Columns: model, quantity, ours, fvcore, thop, torch, note. A counter that does not give a quantity is missing
    (NA) and does not count as differing.
    """
    rows = []
    for model in dict.fromkeys(run.counters["model"]):
        counted = run.counters[run.counters["model"] == model].set_index("counter")
        for quantity, title in (("params", "params"), ("macs", layers_macs_title(run))):
            values = {name: counted[quantity].get(name, pd.NA) for name in COUNTERS}
            rows.append({"model": model, "quantity": title, **values, "note": _differences(values)})
    table = pd.DataFrame(rows, columns=["model", "quantity", *COUNTERS, "note"], dtype=object)
    return table.astype(dict.fromkeys(COUNTERS, "Int64"))


def _differences(values: dict[str, Any]) -> str:
    ours = values["ours"]
    if pd.isna(ours):
        return "ours is missing"
    notes = []
    for name, value in values.items():
        if name == "ours" or pd.isna(value) or value == ours:
            continue
        percent = 100 * (value - ours) / ours if ours else 0.0
        share = f" ({percent:{'+,.0f' if abs(percent) >= 100 else '+.2g'}} %)" if ours else ""
        notes.append(f"{name} {value - ours:+,}{share}")
    return "; ".join(notes)


def epochs_table(run: Run) -> pd.DataFrame:
    """A row for each epoch of each training, as ``Run.metrics``; a metric's column is named as the metric, unless
    another column is."""
    heads = [str(column) for column in run.metrics.columns]
    shorter = {head: head.removeprefix("metrics.") for head in heads}
    return run.metrics.rename(columns={head: name for head, name in shorter.items() if name not in heads})


def evals_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each model and data set measured by ``prunekit eval``: run, set, model, mode, images, left out, the
    metrics, and seconds."""
    frames = [run.evals.assign(run=run.name) for run in runs if len(run.evals)]
    if not frames:
        return pd.DataFrame(columns=["run", "set", "model"])
    table = pd.concat(frames, ignore_index=True)
    metrics = [column for column in table.columns if column.startswith("metrics.")]
    table = table[["run", "name", "model", "mode", "images", "skipped", *metrics, "seconds"]]
    table = table.astype({"images": "Int64", "skipped": "Int64", **dict.fromkeys([*metrics, "seconds"], "Float64")})
    titles = {column: _metric(column.removeprefix("metrics.")) for column in metrics}
    return table.rename(columns={"name": "set", "skipped": "left out", **titles})


def bench_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each measurement by ``prunekit bench``: run, model, form, batch, size, threads, device, the median, the
    10th and 90th percentile of milliseconds for a batch, and the largest memory in use."""
    frames = [run.bench.assign(run=run.name) for run in runs if len(run.bench)]
    if not frames:
        return pd.DataFrame(columns=["run", "model", "median ms"])
    table = pd.concat(frames, ignore_index=True)
    table = table[["run", *(column for column in table.columns if column != "run")]]
    measured = {"median_ms": "median ms", "p10_ms": "p10 ms", "p90_ms": "p90 ms", "peak_mb": "peak MB"}
    table = table.astype({"batch": "Int64", "threads": "Int64", **dict.fromkeys(measured, "Float64")})
    return table.rename(columns=measured)


def seconds_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each run: the seconds of each stage, over all resumptions, and their total."""
    rows = []
    for run in runs:
        taken = {k: v for k, v in (run.summary.get("seconds") or {}).items() if k in STAGES and is_number(v)}
        if taken:
            rows.append(
                {"run": run.name, **{f"{k} s": v for k, v in taken.items()}, "total s": round(sum(taken.values()), 3)}
            )
    found = [f"{stage} s" for stage in STAGES if any(f"{stage} s" in row for row in rows)]
    table = pd.DataFrame(rows, columns=["run", *found, "total s"])
    return table.astype(dict.fromkeys([*found, "total s"], "Float64"))


def budget_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each run with a budget: run, what the recipe's ``target`` asks for, the measure, the budget in it, the
    dense and the slim model in it, and whether the slim one is within it."""
    rows = []
    for run in runs:
        target = run.setting("target")
        for key, value in target.items() if isinstance(target, dict) else ():
            measure, is_ratio = key.removesuffix("_ratio"), key.endswith("_ratio")
            if measure not in ("params", "macs") or not is_number(value):
                continue
            dense, slim = (_part(run, part).get(measure) for part in ("dense", "slim"))
            goal = None if is_ratio and dense is None else round(value * dense) if is_ratio else int(value)
            within = None if None in (goal, slim) else "yes" if slim <= goal else "no"
            title = "params" if measure == "params" else macs_title(run)
            asked = f"{key} {value:g}" if is_ratio else f"{key} {value:,}"
            rows.append(
                {
                    "run": run.name, "asked": asked, "measure": title, "budget": goal, "dense": dense, "slim": slim,
                    "within": within,
                }
            )  # fmt: skip
    table = pd.DataFrame(rows, columns=["run", "asked", "measure", "budget", "dense", "slim", "within"], dtype=object)
    return table.astype(dict.fromkeys(("budget", "dense", "slim"), "Int64"))


def notes_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each note of the runs' plans: what came out otherwise than it was asked for."""
    rows = [{"run": run.name, "note": note} for run in runs for note in (run.plan or {}).get("notes", [])]
    return pd.DataFrame(rows, columns=["run", "note"])


def tables(runs: Sequence[Run], published: bool = False) -> list[Named]:
    """All tables that these runs have the data for, but for the epochs: first those that set the runs side by side,
    then each run's own, whose names begin with the run's where there are several."""
    by_all: list[tuple[str, str, str, Callable[[Sequence[Run]], pd.DataFrame]]] = [
        ("seconds", "Time", "Seconds of each stage, over all resumptions.", seconds_table),
        ("budget", "Budget", "The size that was asked for, and the size of the slim model.", budget_table),
        ("evals", "Data sets", "What the models reach on whole data sets.", evals_table),
        ("bench", "Latency", "Milliseconds for a batch: median, 10th and 90th percentile.", bench_table),
        ("notes", "Notes on the plans", "What came out otherwise than it was asked for.", notes_table),
    ]
    out = [Named("summary", "Models", "Every model of every run.", summary_table(runs, published))]
    out += [Named(name, title, note, table) for name, title, note, make in by_all if len(table := make(runs))]
    for run in runs:
        prefix = f"{file_stem(run.name)}-" if len(runs) > 1 else ""
        if len(run.counters):
            note = "The same models as four counters have them; the note says where one differs from ours."
            out.append(Named(f"{prefix}counters", "Counters", note, counters_table(run)))
        if len(run.layers):
            note = "Each layer and branch before and after slimming, in the order of the network."
            table = layers_table(run)
            narrow = [c for c in table.columns if not str(c).startswith(("fvcore", "thop", "paper"))]
            out.append(Named(f"{prefix}layers", "Layers", note, table, narrow))
    return out


def _metric(name: str) -> str:
    """The header of a metric; a user's own may be called as another column is."""
    taken = {
        "run",
        "set",
        "model",
        "mode",
        "images",
        "left out",
        "params",
        PAPER_FLOPS,
        PARAMS_RATIO,
        MACS_RATIO,
        SECONDS,
    }
    return f"metrics.{name}" if name in taken or name.startswith((MACS, LATENCY)) else name


def _part(run: Run, name: str) -> dict[str, Any]:
    part = run.summary.get(name)
    return part if isinstance(part, dict) else {}


def _seconds(run: Run, part: str) -> float | None:
    taken = run.summary.get("seconds") or {}
    found = [taken[stage] for stage in _MADE_IN.get(part, ()) if is_number(taken.get(stage))]
    timed = "seconds" in run.metrics
    own = float(run.metrics.loc[run.metrics["stage"] == "baseline", "seconds"].sum()) if timed else 0.0
    if part == "baseline":
        return round(own, 3) if own else None
    return round(sum(found) - (own if part == "dense" else 0.0), 3) if found else None


def _ratio(value: Any, dense: Any) -> float | None:
    return value / dense if is_number(value) and is_number(dense) and dense else None


def _whole(value: Any) -> str:
    return NOTHING if pd.isna(value) else f"{int(value)}"
