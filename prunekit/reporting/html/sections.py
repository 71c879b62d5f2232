"""The sections of the page: texts, figures and tables. What is absent or invalid in a run is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunekit.reporting.html.figures import EmbeddedFigure
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import format_number, format_seconds, short_number
from prunekit.reporting.table_writers import format_cells, is_numeric
from prunekit.reporting.tables import ReportTable, macs_title

_MAX_RECIPE = 100_000  # characters
_TALL, _WIDE = 16, 8  # a table with more rows or columns scrolls in a box with its headers in sight
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; empty fields are not shown.

    ``cards`` are (label, value, note, tone), where the tone is "good", "bad" or empty; ``tables`` are from
    :func:`page_table`.
    """

    id: str
    title: str
    paragraphs: Sequence[str] = ()
    cards: Sequence[tuple[str, str, str, str]] = ()
    problems: Sequence[str] = ()
    items: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()
    tables: Sequence[dict[str, Any]] = ()
    figures: Sequence[EmbeddedFigure] = ()
    text: str | None = None


def page_table(table: ReportTable, hidden: tuple[str, ...] = (), note: str | None = None) -> dict[str, Any]:
    """Prepare a table for the template: each cell with its text and, to sort by, its raw number.

    The first column names the row. Hidden and empty columns are left out.
    """
    data = table.data.drop(columns=[name for name in hidden if name in table.data])
    data = data[[c for i, c in enumerate(data) if not i or (data[c].notna() & (data[c].astype(object) != "")).any()]]
    numeric = is_numeric(data)
    values = zip(*(data[column].tolist() for column in data), strict=True)
    rows = [
        [(text, None if not number or pd.isna(value) else value) for text, value, number in zip(*row, strict=True)]
        for row in ((texts, raw, numeric) for texts, raw in zip(format_cells(data), values, strict=True))
    ]
    return {
        "title": table.title,
        "note": table.note if note is None else note,
        "columns": list(zip(map(str, data.columns), numeric, strict=True)),
        "rows": rows,
        "tall": len(rows) > _TALL,
        "wide": len(numeric) > _WIDE,
    }


def lead(run: Run) -> str:
    """Describe the run: "A csnet for saliency on …", and whether it is complete."""
    backbone, data = (_name(run.recipe.get(key)) for key in ("backbone", "data"))
    task = run.recipe.get("task")
    words = [
        f"A {backbone}" if backbone else "A network",
        f"for {task}" if isinstance(task, str) else "",
        f"on {data}" if data else "",
        f"at {run.size[0]}×{run.size[1]} pixels" if run.size else "",
    ]
    states = {"complete": "The run is complete", "unknown": "The status of the run is unknown"}
    state = states.get(run.status, f"The run is not complete: {run.status}")
    return f"{' '.join(word for word in words if word)}. {state}."


def _name(section: Any) -> str | None:
    name = section.get("name") if isinstance(section, dict) else section
    return name if isinstance(name, str) else None


def comparison_sections(
    runs: Sequence[Run], tables: Sequence[ReportTable], figures: Sequence[EmbeddedFigure]
) -> Iterator[Section]:
    """Yield the sections that compare several runs."""
    summary, *others = tables
    models = [page_table(summary, note="")] if len(summary.data) else []
    yield Section(
        "summary",
        "Summary",
        [] if models else ["No model has been measured yet."],
        items=[f"{run.name}: {results(run)}" for run in runs if "dense" in run.summary],
        problems=[f"{run.name}: not complete ({run.status})" for run in runs if run.status != "complete"],
        tables=models,
    )
    if figures:
        yield Section("figures", "Figures", figures=figures)
    for table in others:
        if table.name != "notes":  # in the sections of their runs
            yield Section(table.name, table.title, tables=[page_table(table)])


def run_sections(
    run: Run, prefix: str, tables: Sequence[ReportTable], figures: Sequence[EmbeddedFigure], published: bool
) -> Iterator[Section]:
    """Yield the sections about one run.

    Args:
        run: the run.
        prefix: keeps the ids distinct from those of other runs.
        tables: tables of the run.
        figures: figures of the run.
        published: the tables contain the published models too, so that the column "run" is needed.
    """
    models = [
        page_table(table, () if published else ("run",), note="")
        for table in tables
        if table.name == "summary" and len(table.data)
    ]
    yield Section(
        f"{prefix}summary", "Summary", [results(run)], cards(run), run.problems, tables=models + _reference(run)
    )
    if figures:
        yield Section(f"{prefix}figures", "Figures", figures=figures)
    for table in tables:
        if table.name not in ("summary", "notes", "seconds"):
            yield Section(f"{prefix}{table.name}", table.title, tables=[page_table(table, ("run",))])
    equivalence = _equivalence(run)
    if equivalence:
        yield Section(f"{prefix}equivalence", "Equivalence check", equivalence_text(run), pairs=equivalence)
    notes = (run.plan or {}).get("notes")
    if notes:
        yield Section(f"{prefix}notes", "Notes on the plan", items=notes)
    recipe, remark = _recipe(run)
    if recipe:
        yield Section(f"{prefix}recipe", "Recipe", remark, text=recipe)
    yield Section(f"{prefix}environment", "Environment", pairs=list(_environment(run)))


# ---- summary


def last_model(run: Run) -> str:
    """Return the last model of a run: finetuned, slim or dense."""
    return next((name for name in ("finetuned", "slim") if run.model(name)), "dense")


def cards(run: Run) -> list[tuple[str, str, str, str]]:
    """Return the key figures: parameters, MACs, paper FLOPs, channels, metrics, equivalence check."""
    name = last_model(run)
    dense, last = run.model("dense"), run.model(name)
    out = []
    for label, key in (("Parameters", "params"), (macs_title(run), "macs"), ("Paper FLOPs (224×224)", "paper_flops")):
        before, after = dense.get(key), last.get(key)
        if after is not None:
            value, note = _change(before, after, format_number if key == "params" else short_number)
            out.append((label, value, note, ""))
    kept = run.summary.get("kept", {})
    channels, total = kept.get("channels"), kept.get("of")
    if channels is not None and total:
        out.append(("Channels kept", f"{channels:,} of {total:,}", f"{channels / total:.1%} of the prunable ones", ""))
    for metric, value in list(run.model_metrics(name).items())[:2]:
        before = run.model_metrics("dense").get(metric)
        if name == "dense" or before is None:
            out.append((metric, f"{value:.3f}", name, ""))
        else:
            out.append((metric, f"{before:.3f} → {value:.3f}", f"dense → {name}", ""))
    equivalence = run.summary.get("equivalence", {})
    if "passed" in equivalence:
        difference, tolerance = equivalence.get("max_abs_diff"), equivalence.get("tolerance")
        unknown = difference is None or tolerance is None
        note = "" if unknown else f"largest difference {_power(difference)}, tolerance {_power(tolerance)}"
        value, tone = ("passed", "good") if equivalence["passed"] else ("failed", "bad")
        out.append(("Equivalence check", value, note, tone))
    return out


def _change(before: Any, after: Any, form: Callable[[Any], str]) -> tuple[str, str]:
    if before is None or before == after:
        return form(after), ""
    return f"{form(before)} → {form(after)}", f"{after / before:.1%} of the dense model" if before else ""


def results(run: Run) -> str:
    """Describe the results in two or three sentences."""
    if not run.model("dense"):
        return "No model has been measured yet."
    sentences = []
    before, after = run.model("dense").get("params"), run.model("slim").get("params")
    if before and after:
        sentences.append(f"Slimming kept {after:,} of {before:,} parameters ({after / before:.1%}).")
    for metric in list(run.model_metrics(last_model(run)))[:1]:
        labels = {"dense": "dense", "slim": "slim before fine-tuning", "finetuned": "fine-tuned"}
        values = {name: run.model_metrics(name).get(metric) for name in labels}
        parts = [f"{value:.3f} {labels[name]}" for name, value in values.items() if value is not None]
        sentences.append(f"{metric} is {' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)}.")
    if last_model(run) == "dense":
        sentences.append("There is no slim model yet.")
    return " ".join([*sentences, *equivalence_text(run)[:1]])


def _reference(run: Run) -> list[dict[str, Any]]:
    reference = run.summary.get("reference", {})
    known = {name: {k: v for k, v in metrics.items() if v is not None} for name, metrics in reference.items()}
    rows = [{"predictor": str(name), **metrics} for name, metrics in known.items() if metrics]
    note = "Metrics of predictors that ignore the image, or most of it, on the same data."
    return [page_table(ReportTable("reference", "Trivial predictors", note, pd.DataFrame(rows)))] if rows else []


# ---- equivalence check


def equivalence_text(run: Run) -> list[str]:
    """Return the verdict and its meaning, a paragraph each; empty if there was no equivalence check."""
    equivalence = run.summary.get("equivalence", {})
    if "passed" not in equivalence:
        return []
    difference, tolerance = equivalence.get("max_abs_diff"), equivalence.get("tolerance")
    detail = ""
    if difference is not None and tolerance is not None:
        detail = (
            ": the largest difference between the slim model and the dense model with its dead gates set to zero is "
            f"{_power(difference)}, the tolerance {_power(tolerance)}"
        )
    reason = f" ({equivalence['reason']})" if equivalence.get("reason") else ""
    return [
        f"The equivalence check {'passed' if equivalence['passed'] else 'failed'}{reason}{detail}.",
        "Both models are compared in float64, on data, where they may differ by rounding only. The drift is the "
        "difference from the dense model as trained: the effect of the threshold before fine-tuning.",
    ]


def _equivalence(run: Run) -> list[tuple[str, str]]:
    equivalence, drift = run.summary.get("equivalence", {}), run.summary.get("drift", {})
    export = run.summary.get("export", {})
    differences = {
        "largest difference, float64": equivalence.get("max_abs_diff"),
        "tolerance": equivalence.get("tolerance"),
        "largest difference, float32": equivalence.get("float32_diff"),
        "drift, largest": drift.get("max_abs_diff"),
        "drift, mean": drift.get("mean_abs_diff"),
        f"{export.get('path')}, largest difference": export.get("max_abs_diff") if "path" in export else None,
    }
    channels = {
        "channels with folded constants": equivalence.get("folded"),
        "channels kept as carriers of constants": equivalence.get("carriers"),
        "channels restored": equivalence.get("given_back"),
    }
    inputs = ["×".join(map(str, shape)) for shape in equivalence.get("inputs", [])]
    rows = [("passed", "yes" if equivalence["passed"] else "no")] if "passed" in equivalence else []
    rows += [(title, _format_difference(value)) for title, value in differences.items() if value is not None]
    rows += [("inputs: images × channels × height × width", ", ".join(inputs))] if inputs else []
    return rows + [(title, f"{value:,}") for title, value in channels.items() if value is not None]


# ---- recipe, environment


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    for key, value in run.environment.items():
        if key == "packages":
            for package, version in value.items():
                yield str(package), "not installed" if version is None else str(version)
        elif value is not None and key != "format":
            yield str(key), " ".join(value) if key == "command" else str(value)
    times = [f"{stage} {format_seconds(value)}" for stage, value in run.summary.get("seconds", {}).items()]
    if times:
        yield "time", ", ".join(times)
    skipped = [f"{count:,} of {split}" for split, count in run.summary.get("skipped", {}).items() if count]
    if skipped:
        yield "skipped images", ", ".join(skipped)
    yield "run folder", str(run.path)


def _recipe(run: Run) -> tuple[str, list[str]]:
    """Return the text of the file, and a remark if it is truncated."""
    try:
        text = (run.path / "recipe.yaml").read_text("utf-8", "replace")
    except OSError:
        return "", []
    if len(text) <= _MAX_RECIPE:
        return text, []
    return text[:_MAX_RECIPE], [f"The first {_MAX_RECIPE:,} of {len(text):,} characters."]


def _format_difference(value: float) -> str:
    return _power(value, 3) if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _power(value: float, digits: int = 2) -> str:
    """``1.6×10⁻¹⁵``, which no line break can split."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}×10{f'{int(exponent)}'.translate(_SUPERSCRIPTS)}"
