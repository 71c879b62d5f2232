"""A run as text and as HTML, for the prompt and for notebooks. Whatever comes from a file is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from prunekit.reporting.number_format import NOTHING, short_number, size_text, written_out
from prunekit.reporting.run_contents import PARTS

_SHOWN = 4  # metrics


def as_text(run: Any) -> str:
    """A few lines: what it is, its models, and what there is of it."""
    rows = _models(run)
    lines = [f"Run {_plain(run.name)}: {_headline(run)}"]
    if len(rows) > 1:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(["", row[0].ljust(len(first)), *others]).rstrip())
    lines.append(_holdings(run))
    lines += [f"missing: {_plain(line)}" for line in run.missing]
    return "\n".join(lines)


def as_html(run: Any) -> str:
    """A heading, a table of the models, and what there is of the run; without scripts and styles of its own."""
    rows = _models(run)
    out = [f"<h4>{escape(run.name)}</h4><p>{escape(_headline(run))}</p>"]
    if len(rows) > 1:
        head, *body = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for row, tag in _tagged(rows)]
        out.append(
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{r}</tr>' for r in body)}</tbody></table>"
        )
    out.append(f"<p>{escape(_holdings(run))}</p>")
    if run.missing:
        out.append("<p>missing:</p><ul>" + "".join(f"<li>{escape(line)}</li>" for line in run.missing) + "</ul>")
    return "".join(out)


def _tagged(rows: list[list[str]]) -> list[tuple[list[str], str]]:
    return [(row, "td" if index else "th") for index, row in enumerate(rows)]


def _headline(run: Any) -> str:
    task, backbone = run.setting("task"), run.setting("backbone.name")
    what = [run.status, *(str(word) for word in (task, backbone) if isinstance(word, str))]
    kept = run.summary.get("kept", {})
    if "channels" in kept and "of" in kept:
        what.append(f"{kept['channels']:,} of {kept['of']:,} channels kept")
    return _plain(f"{', '.join(what)}; in {run.path}")


def _models(run: Any) -> list[list[str]]:
    parts = [part for part in PARTS if part in run.summary]
    names = list(dict.fromkeys(key for part in parts for key in run.summary[part].get("metrics", {})))[:_SHOWN]
    rows = [["model", "params", f"MACs {size_text(run.size)}", *map(_plain, names)]]
    for part in parts:
        held = run.summary[part]
        metrics = held.get("metrics", {})
        rows.append(
            [
                part,
                *(short_number(held.get(key)) if held.get(key) is not None else NOTHING for key in ("params", "macs")),
                *(written_out(metrics.get(name), 4) for name in names),
            ]
        )
    return rows


def _holdings(run: Any) -> str:
    epochs = run.metrics["stage"].value_counts(sort=False) if len(run.metrics) else {}
    trained = ", ".join(f"{count} of {stage}" for stage, count in epochs.items()) or "none"
    return _plain(
        f"layers {len(run.layers)} rows; metrics: epochs {trained}; gates {len(run.gates)} epochs × "
        f"{run.gates.shape[1]:,} channels"
    )


def _plain(text: str) -> str:
    """Without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)
