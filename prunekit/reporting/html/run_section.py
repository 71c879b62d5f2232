"""What the page says about one run, in words and figures. A part that is absent or not as it should be is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from prunekit.reporting.html.figures import Illustration
from prunekit.reporting.html.tables import PageTable, page_table
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import seconds_text, short_number, written_out
from prunekit.reporting.tables import Named, macs_title

# A recipe is a page or two; what is longer is none, and would swell the page.
_LONG_RECIPE = 100_000
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Card:
    """A figure of the headline; ``tone`` is "good", "bad" or empty."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own; what is empty is not shown."""

    id: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    drawings: Sequence[Illustration] = ()
    text: str | None = None


def lead(run: Run) -> str:
    """What the run is: "CSNet on …", and whether it is complete."""
    backbone, data = (_name(run.recipe.get(key)) for key in ("backbone", "data"))
    task = run.recipe.get("task")
    words = [f"a {backbone}" if backbone else "a network"]
    if isinstance(task, str):
        words.append(f"for {task}")
    if data:
        words.append(f"on {data}")
    if run.size:
        words.append(f"at {run.size[0]}×{run.size[1]} pixels")
    told = {"complete": "The run is complete", "unknown": "Nobody knows whether the run is complete"}
    state = told.get(run.status, f"The run is not complete: {run.status}")
    text = " ".join(words)
    return f"{text[0].upper()}{text[1:]}. {state}."


def run_sections(
    run: Run, prefix: str, named: Mapping[str, Named], drawings: Sequence[Illustration], alone: bool
) -> Iterator[Section]:
    """The sections about one run.

    Args:
        run: the run.
        prefix: keeps their ids apart from another run's.
        named: the run's tables by stem, without its name.
        drawings: the run's figures.
        alone: no other run is in the report, so that a column of its name says nothing.
    """
    models = [page_table(named["summary"], ("run",) if alone else ())] if "summary" in named else []
    models = [replace(table, note="") for table in models if table.rows]
    yield Section(
        f"{prefix}summary",
        "Summary",
        [in_words(run)],
        headline(run),
        list(run.missing),
        tables=models + _reference(run),
    )
    if drawings:
        yield Section(f"{prefix}figures", "Figures", drawings=drawings)
    for stem, one in named.items():
        if stem not in ("summary", "notes", "seconds"):
            yield Section(f"{prefix}{stem}", one.title, tables=[page_table(one, ("run",))])
    equivalence = _equivalence(run)
    if equivalence:
        yield Section(f"{prefix}equivalence check", "Equivalence check", equivalence_words(run), pairs=equivalence)
    notes = (run.plan or {}).get("notes")
    if notes:
        yield Section(f"{prefix}notes", "Notes on the plan", items=notes)
    remark, recipe = _recipe(run)
    if recipe is not None:
        yield Section(f"{prefix}recipe", "Recipe", remark, text=recipe)
    yield Section(f"{prefix}environment", "Environment", pairs=list(_environment(run)))


# ---- the headline


def headline(run: Run) -> list[Card]:
    """What went in and what came out: channels, parameters, MACs, paper FLOPs, metrics, equivalence check."""
    dense, last = _part(run, "dense"), _part(run, last_model(run))
    cards = []
    for label, key in (("Parameters", "params"), (macs_title(run), "macs"), ("Paper FLOPs (224×224)", "paper_flops")):
        before, after = dense.get(key), last.get(key)
        if after is not None:
            exact = key == "params"
            cards.append(_change(label, before, after, written_out if exact else short_number))
    kept = run.summary.get("kept", {})
    channels, of = kept.get("channels"), kept.get("of")
    if channels is not None and of:
        cards.append(Card("Channels kept", f"{channels:,} of {of:,}", f"{channels / of:.1%} of those that can go"))
    for name, value in list(_metrics(last).items())[:2]:
        before = _metrics(dense).get(name)
        if last is dense or before is None:
            cards.append(Card(name, f"{value:.3f}", last_model(run)))
        else:
            cards.append(Card(name, f"{before:.3f} → {value:.3f}", f"dense → {last_model(run)}"))
    equivalence = run.summary.get("equivalence", {})
    if "passed" in equivalence:
        largest, allowed = equivalence.get("max_abs_diff"), equivalence.get("tolerance")
        note = (
            f"largest difference {_power(largest)}, allowed {_power(allowed)}" if None not in (largest, allowed) else ""
        )
        cards.append(
            Card(
                "Equivalence check",
                *(("passed", note, "good") if equivalence["passed"] else ("failed", note, "bad")),
            )
        )
    return cards


def last_model(run: Run) -> str:
    """The model that a run has come to: finetuned, slim or dense."""
    return next((name for name in ("finetuned", "slim") if _part(run, name)), "dense")


def _change(label: str, before: Any, after: Any, form: Any) -> Card:
    if before is None or before == after:
        return Card(label, form(after))
    return Card(label, f"{form(before)} → {form(after)}", f"{after / before:.1%} of the dense model" if before else "")


def in_words(run: Run) -> str:
    """What has become of the model, in two or three sentences."""
    if not _part(run, "dense"):
        return "No model has been measured yet."
    words = []
    dense, slim, last = (_part(run, name) for name in ("dense", "slim", last_model(run)))
    before, after = dense.get("params"), slim.get("params")
    if before and after:
        words.append(f"Slimming left {after:,} of {before:,} parameters ({after / before:.1%}).")
    for name in list(_metrics(last))[:1]:
        models = ((dense, "dense"), (slim, "slim before fine-tuning"), (_part(run, "finetuned"), "fine-tuned"))
        steps = [f"{_metrics(part)[name]:.3f} {said}" for part, said in models if name in _metrics(part)]
        words.append(f"{name} is {_enumerated(steps)}.")
    if last_model(run) == "dense":
        words.append("It has no slim model yet.")
    return " ".join([*words, *equivalence_words(run)[:1]])


def _enumerated(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _reference(run: Run) -> list[PageTable]:
    rows = []
    for name, reached in run.summary.get("reference", {}).items():
        metrics = _metrics({"metrics": reached})
        if metrics:
            rows.append({"predictor": str(name), **metrics})
    note = "What predictors that look at nothing, or at little, reach on the same data."
    return [page_table(Named("reference", "Trivial predictors", note, pd.DataFrame(rows)))] if rows else []


# ---- the equivalence check


def equivalence_words(run: Run) -> list[str]:
    """The verdict in a sentence, and what it means in another; nothing where there is no equivalence check."""
    equivalence = run.summary.get("equivalence", {})
    if "passed" not in equivalence:
        return []
    largest, allowed = equivalence.get("max_abs_diff"), equivalence.get("tolerance")
    figures = ""
    if largest is not None and allowed is not None:
        figures = (
            f": the slim model and the dense one with its dead gates at zero differ by {_power(largest)} "
            f"at most; {_power(allowed)} is allowed"
        )
    reason = f" ({equivalence['reason']})" if equivalence.get("reason") else ""
    verdict = "passed" if equivalence["passed"] else "failed"
    return [
        f"The equivalence check {verdict}{reason}{figures}.",
        "Both were compared in float64, on data, where nothing but rounding may tell them apart. The drift is the "
        "difference from the dense model as trained: what the threshold has cost before fine-tuning.",
    ]


def _equivalence(run: Run) -> list[tuple[str, str]]:
    equivalence, drift = run.summary.get("equivalence", {}), run.summary.get("drift", {})
    inputs = ["×".join(map(str, shape)) for shape in equivalence.get("inputs", [])]
    rows = [
        ("passed", {True: "yes", False: "no"}.get(equivalence.get("passed")) if "passed" in equivalence else None),
        ("largest difference, float64", _small(equivalence.get("max_abs_diff"))),
        ("allowed", _small(equivalence.get("tolerance"))),
        ("largest difference, float32", _small(equivalence.get("float32_diff"))),
        ("inputs: images × channels × height × width", ", ".join(inputs) or None),
        ("constants folded, channels", _count(equivalence.get("folded"))),
        ("channels kept as carriers of constants", _count(equivalence.get("carriers"))),
        ("channels given back", _count(equivalence.get("given_back"))),
        ("drift, largest", _small(drift.get("max_abs_diff"))),
        ("drift, mean", _small(drift.get("mean_abs_diff"))),
    ]
    export = run.summary.get("export", {})
    if "path" in export:
        rows.append((f"{export['path']}, largest difference", _small(export.get("max_abs_diff"))))
    return [(name, value) for name, value in rows if value is not None]


# ---- the environment


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    for key, value in run.environment.items():
        if key == "packages":
            for package, version in value.items():
                yield str(package), "not installed" if version is None else str(version)
        elif key == "command":
            yield key, " ".join(value)
        elif value is not None and key != "format":
            yield str(key), str(value)
    times = [f"{stage} {seconds_text(value)}" for stage, value in run.summary.get("seconds", {}).items()]
    if times:
        yield "time", ", ".join(times)
    left_out = [f"{count:,} of {split}" for split, count in run.summary.get("skipped", {}).items() if count]
    if left_out:
        yield "images left out", ", ".join(left_out)
    yield "run folder", str(run.path)


def _recipe(run: Run) -> tuple[list[str], str | None]:
    """A remark where there is one, and the text as it stands in the file."""
    try:
        text = (run.path / "recipe.yaml").read_text("utf-8", "replace")
    except OSError:
        return [], None
    if len(text) <= _LONG_RECIPE:
        return [], text or None
    return [f"The first {_LONG_RECIPE:,} of {len(text):,} characters."], text[:_LONG_RECIPE]


# ---- what a run's summary may lack


def _part(run: Run, name: str) -> dict[str, Any]:
    return run.summary.get(name, {})


def _metrics(part: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in part.get("metrics", {}).items() if value is not None}


def _count(value: Any) -> str | None:
    return None if value is None else f"{value:,}"


def _small(value: Any) -> str | None:
    return None if value is None else _power(value, 3) if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _power(value: float, digits: int = 2) -> str:
    """``1.6×10⁻¹⁵``, which no line breaks apart."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}×10{f'{int(exponent)}'.translate(_RAISED)}"


def _name(section: Any) -> str | None:
    name = section.get("name") if isinstance(section, dict) else section
    return name if isinstance(name, str) else None
