"""Latencies for a run's budget of time: measured once on this machine, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.config.schema import Recipe
from prunekit.deployment.bench.variants import VariantTimer, cached_table_path, random_variants, write_table
from prunekit.errors import ExportError
from prunekit.pipeline.models import input_shape
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.selection.budget import BudgetSearch
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.selection.latency_model import LatencyTable, Variant
from prunekit.pruning.selection.selector import Selection
from prunekit.pruning.selection.target import Budget
from prunekit.utils import distributed
from prunekit.utils.copying import copy_module
from prunekit.utils.io import cache_folder
from prunekit.utils.progress import Reporter

MAX_CORRECTIONS = 4
MAX_ERROR, MIN_RANK = 0.1, 0.9  # of predictions; worse ones are reported as noisy
CLOSE = 0.02  # relative deviation of a measured latency from its goal that is not corrected


def timed_example(recipe: Recipe) -> Tensor:
    """The images to time a recipe's network on."""
    size = recipe.latency.size or recipe.data.size
    shape = (recipe.latency.batch, input_shape(recipe)[0], size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class RunLatencies:
    """The latencies of models that are cut from a run's dense model.

    Attributes:
        table: measured, to predict others from.
        measures: whether other models can be measured, too: not with a table from another machine.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, groups: Sequence[Group], reporter: Reporter):
        section, self.reporter = recipe.latency, reporter
        self.groups = list(groups)
        self._timer: VariantTimer | None = None
        self.measures = section.table is None
        if section.table is not None:
            self.table = LatencyTable.read(Path(section.table))
            self._report(model)
            return
        self._arguments: tuple[Any, ...] = (
            *(copy_module(model), groups, timed_example(recipe)),
            *(section.runtime, section.threads),
        )
        # The modules do not show what a forward calls itself, and the recipe not what ``init`` changes.
        self._network = f"{recipe.backbone.model_dump_json()} {model}"
        with distributed.main_process_first():
            self.table = self._load_or_measure(section.variants)
        self._report(model)

    def _load_or_measure(self, variants: int) -> LatencyTable:
        table = self.timer.new_table()
        path = cached_table_path(cache_folder() / "latency", table, self.groups, self._network)
        if path.is_file():
            found = LatencyTable.read(path)
            if len(found.variants) >= variants:
                self.timer.dense_ms = found.variants[0].ms or 0.0
                return found
        kept = random_variants(self._arguments[0], self.groups, variants)
        with closing(self.reporter.progress_bar("measuring latencies")) as bar:
            times = self.timer.time(kept, lambda share: bar(share, 1.0))
        table.variants = [Variant(kept=k, ms=ms) for k, ms in zip(kept, times, strict=True)]
        write_table(path, table)
        return table

    @property
    def timer(self) -> VariantTimer:
        if self._timer is None:
            self._timer = VariantTimer(*self._arguments)
        return self._timer

    def _report(self, network: nn.Module) -> None:
        """Say what was measured, and how well others are predicted from it."""
        table = self.table
        model = SizeModel(network, self.groups, tuple(table.size), table).latency
        assert model is not None
        noisy = model.error > MAX_ERROR or model.rank < MIN_RANK
        hint = "; the measurements are noisy: repeat them while nothing else runs" if noisy else ""
        self.reporter.info(
            f"latency: {len(table.variants)} models in {table.setting}, "
            f"dense {table.variants[0].ms:.3g} ms; predictions differ from what was measured by "
            f"{model.error:.1%} (median), rank correlation {model.rank:.3f}{hint}"
        )

    def correct(self, search: BudgetSearch, goal: Budget, choice: Selection) -> Selection:
        """Measure what was chosen for a goal, and choose again for a corrected one until the two agree."""
        if not self.measures or not distributed.is_main_process():
            return choice  # The others get the choice of process 0.
        best, aim = (float("inf"), choice), goal.goal
        for _ in range(MAX_CORRECTIONS):
            deviation = self.measure(self._kept(choice)) / goal.goal - 1
            best = min(best, (abs(deviation), choice), key=lambda pair: pair[0])
            if best[0] <= CLOSE:
                break
            aim /= 1 + deviation
            smallest, dense = (goal.size(size) for size in (search.smallest, search.size_model.dense))
            choice = search.select(replace(goal, goal=min(max(aim, smallest), dense)))
        return best[1]

    def measure(self, kept: dict[str, int]) -> float:
        """Return the milliseconds of a model, on the scale of the table."""
        return self.timer.time([kept])[0]

    def measure_plan(self, plan: Plan) -> dict[str, Any] | None:
        """What the summary says of the slim model of a plan; None where nothing can be measured here."""
        if not self.measures:
            return None
        kept = {group.id: len(plan.kept(group)) for group in self.groups if group.reason is None}
        try:
            milliseconds = self.measure(kept)
        except ExportError:
            return None
        dense, table = self.timer.dense_ms, self.table
        return {
            **{key: getattr(table, key) for key in ("runtime", "version", "device", "threads", "batch", "size")},
            "dense_ms": round(dense, 4),
            "slim_ms": round(milliseconds, 4),
            "ratio": round(milliseconds / dense, 4),
        }

    def _kept(self, choice: Selection) -> dict[str, int]:
        return {g.id: g.channels - len(choice.dead[g.id]) for g in self.groups if g.reason is None}
