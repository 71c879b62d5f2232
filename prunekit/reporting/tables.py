"""Tables of runs, with raw numbers; missing values are NA.

A header names the unit and convention: MACs count one multiply-add as one, on an image of the given size; "paper FLOPs"
follow the CSNet paper and are always at 224×224; "÷ dense" is the ratio to the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunekit.reporting.loader import COUNTERS, MODELS, Run
from prunekit.reporting.number_format import file_stem, format_size
from prunekit.reporting.published import LABEL, PUBLISHED
from prunekit.reporting.validators import is_number
from prunekit.runs.stage_order import STAGES

MACS = "MACs ("
LATENCY = "latency ms"
PAPER_FLOPS = "paper FLOPs (224×224)"
PARAMS_RATIO, MACS_RATIO = "params ÷ dense", "MACs ÷ dense"
SECONDS = "seconds"
_RESERVED = {
    *("run", "set", "model", "mode", "images", "skipped", "params"),
    *(PAPER_FLOPS, PARAMS_RATIO, MACS_RATIO, SECONDS),
}
_LAYER_TITLES = {
    "channels": "channels {}",
    "share": "share of channels {}",
    "params": "params {}",
    "macs": "MACs {} {}",
    "fvcore_macs": "fvcore MACs {} {}",
    "thop_macs": "thop MACs {} {}",
    "paper_flops": "paper FLOPs {} (224×224)",
}
_BENCH_TITLES = {"median_ms": "median ms", "p10_ms": "p10 ms", "p90_ms": "p90 ms", "peak_mb": "peak MB"}
# The stages that produce a model. The stage train also trains a baseline, whose epochs are counted separately.
_STAGES_OF_MODEL = {"dense": ("train",), "slim": ("extract", "slim"), "finetuned": ("finetune",)}


@dataclass(frozen=True)
class ReportTable:
    """A table of a report.

    Args:
        name: distinct among the tables of a run.
        latex_columns: the columns that fit a printed page; None: all.
        run: with several runs, the name of the run that it is about; empty for all.
    """

    name: str
    title: str
    note: str
    data: pd.DataFrame
    latex_columns: list[str] | None = None
    run: str = ""

    @property
    def stem(self) -> str:
        """The stem of its files."""
        return f"{file_stem(self.run)}-{self.name}" if self.run else self.name


def macs_title(run: Run) -> str:
    """Return the header of the MACs in the summary."""
    return f"MACs {format_size(run.size)}"


def layers_macs_title(run: Run) -> str:
    """Return the header of the MACs of layers and counters; a derived run may have another image size than these."""
    return f"MACs {format_size(run.layers_size or run.size)}"


def summary_table(runs: Sequence[Run], published: bool = False) -> pd.DataFrame:
    """Return a row for each run and model (baseline, dense, slim, finetuned).

    Columns: run, model, params, MACs (a column per image size), paper FLOPs, the metrics, latency if measured (a column
    per measurement setting), the ratios of params and MACs to the run's dense model, and the seconds of the stages that
    produced the model.

    Args:
        runs: with distinct names.
        published: append the published CSNet models, as run "published, ECSSD".
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, None] = {}
    for run in runs:
        dense = run.model("dense")
        latency_title, latencies = latency(run)
        for name in filter(run.model, MODELS):
            model = run.model(name)
            values = {_metric_title(k): v for k, v in run.model_metrics(name).items() if is_number(v)}
            metrics |= dict.fromkeys(values)
            rows.append(
                {
                    "run": run.name,
                    "model": name,
                    "params": model.get("params"),
                    macs_title(run): model.get("macs"),
                    PAPER_FLOPS: model.get("paper_flops"),
                    **values,
                    **({latency_title: latencies[name]} if name in latencies else {}),
                    PARAMS_RATIO: _ratio(model.get("params"), dense.get("params")),
                    MACS_RATIO: _ratio(model.get("macs"), dense.get("macs")),
                    SECONDS: _seconds(run, name),
                }
            )
    for model in PUBLISHED if published else ():
        counts = {"params": model.params, PAPER_FLOPS: model.paper_flops}
        rows.append({"run": LABEL, "model": model.name, **counts, **model.metrics})
        metrics |= dict.fromkeys(model.metrics)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    macs, latency_titles = ([c for c in columns if c.startswith(prefix)] for prefix in (MACS, LATENCY))
    counts = ["params", *macs, PAPER_FLOPS]
    return _typed(rows, ["run", "model"], counts, [*metrics, *latency_titles, PARAMS_RATIO, MACS_RATIO, SECONDS])


def _typed(
    rows: Any, texts: Sequence[str], counts: Sequence[str] = (), fractions: Sequence[str] = (), last: Sequence[str] = ()
) -> pd.DataFrame:
    """Return the rows as a table of texts, whole numbers and floats, then further texts."""
    # By way of objects: as floats, counts above 2⁵³ would lose digits.
    table = pd.DataFrame(rows, columns=[*texts, *counts, *fractions, *last], dtype=object)
    return table.astype({**dict.fromkeys(counts, "Int64"), **dict.fromkeys(fractions, "Float64")})


def latency(run: Run) -> tuple[str, dict[str, float]]:
    """Return the column title and the median latency in ms of each model.

    From ``bench.json``, the setting (form, batch, size, threads, device) measured for the most models is used; ties are
    resolved by the run's own image size, then the smallest batch and number of threads. Without ``bench.json``, the
    latencies of a budget of time are used, or that of the exported model in the summary. A fine-tuned model that was
    not measured gets the latency of the slim one, which is the same network with other weights.
    """
    title, latencies = LATENCY, {}
    if len(run.bench):
        own_size = format_size(run.size).strip("()")

        def rank(item: tuple[str, pd.DataFrame]) -> tuple[Any, ...]:
            batch, size, threads = item[1][["batch", "size", "threads"]].iloc[0]
            counts = (float("inf") if pd.isna(n) else n for n in (batch, threads))
            return -item[1]["model"].nunique(), size != own_size, *counts

        setting, rows = min(run.bench.groupby(bench_settings(run), sort=False), key=rank)
        title = f"{LATENCY} ({setting})"
        latencies = rows.groupby("model", sort=False)["median_ms"].last().to_dict()
    else:
        export = run.summary.get("export") or {}
        measured = export.get("latency_ms") or {}
        latencies = {model: measured[model] for model in MODELS if model in measured}
        exported = next((model for model in reversed(MODELS) if model in run.summary), None)
        if exported and exported not in latencies and "median" in measured:
            latencies[exported] = measured["median"]
        title = f"{LATENCY} ({export['path']})" if latencies and "path" in export else LATENCY
    if "slim" in latencies:
        latencies.setdefault("finetuned", latencies["slim"])
    return title, {model: float(value) for model, value in latencies.items() if model in MODELS}


def bench_settings(run: Run) -> list[str]:
    """Return the setting of each latency measurement, such as "eager, batch 1, 64×64, threads 1, cpu"."""
    words = {"form": "", "batch": "batch ", "size": "", "threads": "threads ", "device": ""}
    rows = run.bench[list(words)].to_dict("records") if len(run.bench) else []
    known = [{key: value for key, value in row.items() if not pd.isna(value)} for row in rows]
    return [", ".join(f"{words[k]}{v if isinstance(v, str) else int(v)}" for k, v in row.items()) for row in known]


def layers_table(run: Run) -> pd.DataFrame:
    """Return a row for each layer and branch, in network order, with every count before and after slimming.

    A share is the branch's fraction of the channels of its layer; after slimming it is the learned split.
    """
    table = run.layers[["layer", "branch"]].copy()
    size = format_size(run.layers_size or run.size)
    for quantity, title in _LAYER_TITLES.items():
        for when in ("before", "after"):
            values = _shares(run.layers, when) if quantity == "share" else run.layers[f"{quantity}_{when}"]
            table[title.format(when, size)] = values
    return table


def _shares(layers: pd.DataFrame, when: str) -> pd.Series:
    channels = layers[f"channels_{when}"].astype("Float64")
    # The share is NA where a count of the layer is unknown or no channel is left.
    totals = layers["layer"].map(channels.groupby(layers["layer"]).agg(lambda column: column.sum(skipna=False)))
    totals = totals.astype("Float64")
    return channels / totals.mask(totals == 0)


def counters_table(run: Run) -> pd.DataFrame:
    """Return params and MACs of the dense and the slim model by each counter, with a note where they differ.

    Columns: model, quantity, prunekit, fvcore, thop, torch, note. A counter that does not provide a quantity is NA and
    does not count as a difference.
    """
    rows = []
    for model in dict.fromkeys(run.counters["model"]):
        counters = run.counters[run.counters["model"] == model].set_index("counter")
        for quantity, title in (("params", "params"), ("macs", layers_macs_title(run))):
            values = {name: counters[quantity].get(name, pd.NA) for name in COUNTERS}
            rows.append({"model": model, "quantity": title, **values, "note": _differences(values)})
    return _typed(rows, ["model", "quantity"], COUNTERS, last=["note"])


def differing_counters(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows and counters of a :func:`counters_table` that differ, and the counters that agree everywhere.

    If all agree, the table has all rows, but only the counts of prunekit, and no note.
    """
    differs = {n: (table[n].notna() & (table[n] != table["prunekit"]).fillna(True)).any() for n in COUNTERS[1:]}
    agreeing = [name for name in COUNTERS[1:] if table[name].notna().any() and not differs[name]]
    kept = [name for name in COUNTERS[1:] if differs[name]]
    rows = table[table["note"] != ""] if (table["note"] != "").any() else table.drop(columns="note")
    return rows.drop(columns=[name for name in COUNTERS[1:] if name not in kept]), agreeing


def _differences(values: dict[str, Any]) -> str:
    ours = values["prunekit"]
    if pd.isna(ours):
        return "prunekit is missing"
    notes = []
    for name, value in values.items():
        if not pd.isna(value) and value != ours:
            percent = 100 * (value - ours) / ours if ours else 0.0
            relative = f" ({percent:{'+,.0f' if abs(percent) >= 100 else '+.2g'}} %)" if ours else ""
            notes.append(f"{name} {value - ours:+,}{relative}")
    return "; ".join(notes)


def epochs_table(run: Run) -> pd.DataFrame:
    """Return ``Run.metrics`` with metric columns named after the metric, unless another column has that name."""
    columns = [str(column) for column in run.metrics.columns]
    short = {column: column.removeprefix("metrics.") for column in columns}
    return run.metrics.rename(columns={column: name for column, name in short.items() if name not in columns})


def evals_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each model and dataset measured by ``prunekit eval``.

    Columns: run, set, model, mode, images, skipped, the metrics, seconds.
    """
    table = _joined(runs, "evals").rename(columns={"name": "set"})
    metrics = {str(c): _metric_title(c.removeprefix("metrics.")) for c in table if c.startswith("metrics.")}
    table = _typed(table, ["run", "set", "model", "mode"], ["images", "skipped"], [*metrics, SECONDS])
    return table.rename(columns=metrics)


def bench_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each measurement by ``prunekit bench``.

    Columns: run, model, form, batch, size, threads, device, the median, 10th and 90th percentile of the milliseconds
    per batch, the peak memory.
    """
    texts = ["run", "model", "form", "batch", "size", "threads", "device"]
    table = _typed(_joined(runs, "bench"), texts, fractions=list(_BENCH_TITLES))
    return table.astype({"batch": "Int64", "threads": "Int64"}).rename(columns=_BENCH_TITLES)


def _joined(runs: Sequence[Run], name: str) -> pd.DataFrame:
    tables = [getattr(run, name).assign(run=run.name) for run in runs if len(getattr(run, name))]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def seconds_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each run: the seconds of each stage, summed over resumptions, and their total."""
    rows = []
    for run in runs:
        seconds = {k: v for k, v in (run.summary.get("seconds") or {}).items() if k in STAGES and is_number(v)}
        if seconds:
            total = round(sum(seconds.values()), 3)
            rows.append({"run": run.name, **{f"{stage} s": v for stage, v in seconds.items()}, "total s": total})
    stages = [f"{stage} s" for stage in STAGES if any(f"{stage} s" in row for row in rows)]
    return _typed(rows, ["run"], fractions=[*stages, "total s"])


def budget_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each target in a run's recipe.

    Columns: run, target, measure, budget, dense, slim (sizes in that measure), within budget (yes or no).
    """
    rows = []
    for run in runs:
        targets = run.setting("target")
        for key, value in targets.items() if isinstance(targets, dict) else ():
            measure, is_ratio = key.removesuffix("_ratio"), key.endswith("_ratio")
            if measure not in ("params", "macs") or not is_number(value):
                continue
            dense, slim = (run.model(model).get(measure) for model in ("dense", "slim"))
            budget: Any = None if is_ratio and dense is None else round(value * dense) if is_ratio else int(value)
            target = f"{key} {value:g}" if is_ratio else f"{key} {value:,}"
            within = None if None in (budget, slim) else "yes" if slim <= budget else "no"
            title = "params" if measure == "params" else macs_title(run)
            rows.append((run.name, target, title, budget, dense, slim, within))
    return _typed(rows, ["run", "target", "measure"], ["budget", "dense", "slim"], last=["within budget"])


def notes_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each note of the runs' plans: deviations from what was requested."""
    return _typed([(run.name, note) for run in runs for note in (run.plan or {}).get("notes", [])], ["run", "note"])


_COMMON_TABLES = (
    ("seconds", "Time", "Seconds of each stage, summed over resumptions.", seconds_table),
    ("budget", "Budget", "The target size and the size of the slim model.", budget_table),
    ("evals", "Datasets", "Metrics of the models on whole datasets.", evals_table),
    ("bench", "Latency", "Milliseconds per batch: median, 10th and 90th percentile.", bench_table),
    ("notes", "Notes on the plans", "Deviations from what was requested.", notes_table),
)


def report_tables(runs: Sequence[Run], published: bool = False) -> list[ReportTable]:
    """Return all tables with data, except the epochs.

    First the tables of all runs, then those of each run; with several runs, these name their run.
    """
    summary = summary_table(runs, published)
    tables = [ReportTable("summary", "Models", "Every model of every run.", summary, _narrow_columns(summary))]
    tables += [ReportTable(*texts, data) for *texts, make in _COMMON_TABLES if len(data := make(runs))]
    for run in runs:
        owner = run.name if len(runs) > 1 else ""
        if len(run.counters):
            note = "Counts of the same models by four counters; the note says where one differs from prunekit."
            tables.append(ReportTable("counters", "Counters", note, counters_table(run), run=owner))
        if len(run.layers):
            note = "Each layer and branch before and after slimming, in network order."
            data = layers_table(run)
            narrow = [c for c in data.columns if not str(c).startswith(("fvcore", "thop", "paper"))]
            tables.append(ReportTable("layers", "Layers", note, data, narrow, owner))
    return tables


def _narrow_columns(summary: pd.DataFrame) -> list[str]:
    """Return the columns of a summary that fit one column of a paper: sizes and two metrics."""
    several = summary["run"].nunique() > 1
    macs = [c for c in summary if c.startswith(MACS) and summary[c].notna().any()]
    metrics = [c for c in summary if c not in _RESERVED and not c.startswith((MACS, LATENCY))]
    known = [column for column in metrics if summary[column].notna().any()][:2]
    return [*(["run"] if several else []), "model", "params", *([] if several else [PARAMS_RATIO]), *macs, *known]


def _metric_title(name: str) -> str:
    """Return the header of a metric; a custom metric may have the name of another column."""
    return f"metrics.{name}" if name in _RESERVED or name.startswith((MACS, LATENCY)) else name


def _seconds(run: Run, model: str) -> float | None:
    is_baseline = run.metrics["stage"] == "baseline" if "seconds" in run.metrics else []
    baseline = float(run.metrics.loc[is_baseline, "seconds"].sum()) if len(is_baseline) else 0.0
    if model == "baseline":
        return round(baseline, 3) or None
    by_stage = run.summary.get("seconds") or {}
    seconds = [by_stage[stage] for stage in _STAGES_OF_MODEL[model] if is_number(by_stage.get(stage))]
    return round(sum(seconds) - (baseline if model == "dense" else 0.0), 3) if seconds else None


def _ratio(value: Any, dense: Any) -> float | None:
    return value / dense if is_number(value) and is_number(dense) and dense else None
