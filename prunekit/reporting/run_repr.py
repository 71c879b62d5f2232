"""Text and HTML representations of a run, for the prompt and for notebooks; content of files is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from tabulate import tabulate

from prunekit.reporting.number_format import format_number, format_size, printable, short_number
from prunekit.reporting.run_contents import MODELS

_MAX_METRICS = 4


def as_text(run: Any) -> str:
    lines = [f"Run {printable(run.name)}: {_headline(run)}"]
    heads, rows = _models(run)
    if rows:
        table = tabulate([heads, *rows], tablefmt="plain", disable_numparse=True, colalign=_align(heads))
        lines += [f"  {line}".rstrip() for line in table.splitlines()]
    lines += [_counts(run), *(f"problem: {printable(line)}" for line in run.problems)]
    return "\n".join(lines)


def as_html(run: Any) -> str:
    heads, rows = _models(run)
    table = tabulate(rows, heads, tablefmt="html", disable_numparse=True, colalign=_align(heads)) if rows else ""
    html = f"<h4>{escape(run.name)}</h4><p>{escape(_headline(run))}</p>{table}<p>{escape(_counts(run))}</p>"
    if run.problems:
        html += "<p>problems:</p><ul>" + "".join(f"<li>{escape(line)}</li>" for line in run.problems) + "</ul>"
    return html


def _headline(run: Any) -> str:
    names = (run.setting("task"), run.setting("backbone.name"))
    parts = [run.status, *(name for name in names if isinstance(name, str))]
    kept = run.summary.get("kept", {})
    if "channels" in kept and "of" in kept:
        parts.append(f"{kept['channels']:,} of {kept['of']:,} channels kept")
    return printable(f"{', '.join(parts)}; in {run.path}")


def _models(run: Any) -> tuple[list[str], list[list[str]]]:
    models = [model for model in MODELS if model in run.summary]
    metrics = list(dict.fromkeys(key for model in models for key in run.model(model).get("metrics", {})))[:_MAX_METRICS]
    heads = ["model", "params", f"MACs {format_size(run.size)}", *map(printable, metrics)]
    rows = [
        [
            model,
            *(short_number(run.model(model).get(key)) for key in ("params", "macs")),
            *(format_number(run.model(model).get("metrics", {}).get(name), 4) for name in metrics),
        ]
        for model in models
    ]
    return heads, rows


def _align(heads: list[str]) -> list[str]:
    return ["left", *["right"] * (len(heads) - 1)]


def _counts(run: Any) -> str:
    epochs = run.metrics["stage"].value_counts(sort=False) if len(run.metrics) else {}
    trained = ", ".join(f"{stage} {count}" for stage, count in epochs.items()) or "none"
    return printable(
        f"layers: {len(run.layers)} rows; epochs: {trained}; "
        f"gates: {len(run.gates)} epochs × {run.gates.shape[1]:,} channels"
    )
