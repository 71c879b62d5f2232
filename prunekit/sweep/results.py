"""The results of a sweep as tables: its trials, their means over seeds, and what each key changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prunekit.errors import PrunekitError
from prunekit.reporting import load_run
from prunekit.reporting.columns import metric as known_metric
from prunekit.reporting.tables import LATENCY, latency
from prunekit.sweep.space import Axis, Trial, short_titles

COSTS = ("params", "macs", LATENCY)


def trials_table(sweep: Path, axes: Sequence[Axis], trials: Sequence[Trial]) -> tuple[pd.DataFrame, str | None]:
    """Return a row for each trial, and the name of the metric by which models are compared.

    Columns: ``trial``, a column per axis, ``status``, the metrics, params, MACs and latency of the newest model, and
    the seconds of all its stages, also those that it shares with others.
    """
    rows, metric, titles = [], None, short_titles(axes)
    for trial in trials:
        row = {"trial": trial.name, **dict(zip(titles, trial.values, strict=True)), "status": "missing"}
        try:
            run = load_run(sweep / trial.name)
        except PrunekitError:
            rows.append(row)
            continue
        name = next((name for name in ("finetuned", "slim", "dense") if run.model(name)), None)
        metrics = run.model_metrics(name) if name else {}
        metric = metric or next(iter(metrics), None)
        row |= {"status": run.status, "model": name, **metrics}
        if name:
            row |= {key: run.model(name).get(key) for key in ("params", "macs")}
            milliseconds = latency(run)[1]
            row |= {LATENCY: milliseconds[name]} if name in milliseconds else {}
        row["seconds"] = sum((run.summary.get("seconds") or {}).values())
        rows.append(row)
    return pd.DataFrame(rows), metric


def on_front(table: pd.DataFrame, metric: str) -> pd.Series:
    """Return for each row whether no other one is at least as good in the metric and all costs, and better in one."""
    # A cost that only some have cannot compare all.
    costs = [cost for cost in COSTS if cost in table and table.loc[table[metric].notna(), cost].notna().all()]
    sign = 1 if known_metric(metric).lower_is_better else -1
    points = table[costs].assign(metric=sign * table[metric]).astype(float)
    known = points.dropna()
    front = [
        not ((known <= point).all(axis=1) & (known < point).any(axis=1)).any()
        for point in known.itertuples(index=False)
    ]
    return pd.Series(front, known.index, bool).reindex(table.index, fill_value=False)


def means_table(table: pd.DataFrame, titles: Sequence[str], metric: str) -> pd.DataFrame | None:
    """Return the means over the seeds of each setting, with the metric's standard deviation and the number of seeds.

    None where no seeds were compared.
    """
    others = [title for title in titles if title != "seed"]
    if len(others) == len(titles) or not others:
        return None
    groups = table[table[metric].notna()].groupby(others, sort=False)
    columns = {metric: (metric, "mean"), "std": (metric, "std"), "seeds": (metric, "count")}
    columns |= {cost: (cost, "mean") for cost in COSTS if cost in table}
    return groups.agg(**columns).reset_index()


def importance_table(table: pd.DataFrame, titles: Sequence[str], metric: str) -> pd.DataFrame:
    """Return for each key the share of the metric's variance that its means explain, and its best value.

    In a full grid the shares are those of an analysis of variance; what is missing to 1 are interactions.
    """
    known = table[table[metric].notna()]
    total = known[metric].var(ddof=0)
    rows = []
    for title in titles:
        means = known.groupby(title, sort=False)[metric].mean()
        best = means.idxmin() if known_metric(metric).lower_is_better else means.idxmax()
        between = ((known[title].map(means) - known[metric].mean()) ** 2).mean()
        rows.append({"key": title, "share of variance": between / total if total else 0.0, "best value": best})
    return pd.DataFrame(rows).sort_values("share of variance", ascending=False, ignore_index=True)
