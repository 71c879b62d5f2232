"""Reports of run folders: loading, tables, figures, an HTML page.

Imports from runs, config and utils only; nothing here imports torch.
"""

from __future__ import annotations

from prunekit.reporting.loader import Run, load_run
from prunekit.reporting.report import report
from prunekit.reporting.tables import counters_table, layers_table, summary_table

__all__ = ["Run", "counters_table", "layers_table", "load_run", "report", "summary_table"]
