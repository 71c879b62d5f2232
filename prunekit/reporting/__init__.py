"""Tables, figures and a page of run folders."""

from __future__ import annotations

from prunekit.reporting.loader import Run, load_run
from prunekit.reporting.report import report
from prunekit.reporting.tables import counters_table, layers_table, summary_table

__all__ = ["Run", "counters_table", "layers_table", "load_run", "report", "summary_table"]
