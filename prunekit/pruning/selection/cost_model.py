"""The size of a slim model, predicted without building it.

Pruning a channel removes an entry from each axis of its group. So the length of every axis is linear in the number of
dead channels of each group. The size of a tensor is the product of the lengths of its axes. The multiply-adds of an
operation are that of the axes over which it multiplies (``Group.products``), times what pruning does not change, such
as positions. Which channels are dead does not matter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.flops import count_operations
from prunekit.operations.multiply_adds import MultiplyAdds
from prunekit.pruning.graph.axes import conv_groups
from prunekit.pruning.plan import Group, Product
from prunekit.pruning.selection.latency_model import LatencyModel, LatencyTable, Terms
from prunekit.pruning.surgery.axis_lengths import AxisLengths
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.utils.inputs import Example

Measure = Literal["params", "macs", "latency_ms"]


@dataclass(frozen=True)
class ModelSize:
    """Parameters, multiply-adds at the shape asked for (a multiply-add is 1, see ``prunekit.flops``), and the predicted
    latency in milliseconds where there is a table of latencies."""

    params: int
    macs: int
    latency_ms: float = math.nan

    def to_json(self) -> dict[str, int | float]:
        return {key: value for key, value in asdict(self).items() if value == value}


class SizeModel:
    """Predicts the size of a model without some of its channels.

    Args:
        example: the shape of one input without the batch, such as (C, H, W), or a batch of inputs.
        latencies: measured ones, to predict others from.

    Attributes:
        dense: the size of the dense model.
        latency: the model of latencies, if there is one.

    Raises:
        PlanError: the latencies are those of another model, or too few.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        example: Sequence[int] | Example,
        latencies: LatencyTable | None = None,
    ):
        self.groups, self._cutter = list(groups), Cutter(model, groups)
        rows = {axis: row for row, axis in enumerate(self._cutter.lengths)}

        # For each parameter: its size along the axes that are never pruned, the rows of those that are (the row after
        # the last is an axis of length 1), the groups that share its input axis, and its module.
        table = []
        most = max((parameter.dim() for parameter in model.parameters()), default=0)
        # A tensor of several modules has one name.
        tensors = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                tensor = tensors[id(parameter)]
                pruned = [axis for axis in range(parameter.dim()) if (tensor, axis) in rows]
                fixed = math.prod(length for axis, length in enumerate(parameter.shape) if axis not in pruned)
                axes = [*(rows[tensor, axis] for axis in pruned), *[len(rows)] * (most - len(pruned))]
                # The input axis of a convolution with groups is counted over all of its groups.
                shared = conv_groups(model, name) if key == "weight" and len(pruned) == 2 else 1
                # A module of which nothing can be pruned is the last one.
                table.append((fixed, *axes, shared, self._cutter.module_index.get(name, -1)))
        columns = np.array(table, np.int64).reshape(-1, most + 3).T.copy()
        self._fixed, self._axes = columns[0], columns[1 : most + 1]
        self._shared, self._owner = columns[most + 1 :]
        counted = count_operations(model, example)
        self._add_products(counted)
        self._product_modules = [name for (name, _, _), numbers in counted.products.items() for _ in numbers]
        self.latency: LatencyModel | None = None
        if latencies is not None:
            self._add_latency(latencies, *_kernels(model, counted))
        self.dense = self.size_without({})

    def _add_latency(self, table: LatencyTable, kernels: np.ndarray, kinds: Sequence[Any]) -> None:
        table.check(self.groups)
        # Products over one and over two axes of channels, such as those of depthwise convolutions, are of two kinds.
        kinds = list(zip(kinds, (self._loops < self._lengths.count).sum(0).tolist(), strict=True))
        none_dead = np.zeros(len(self.groups), np.int64)
        counted = self._multiplied / self._divided, self._loop_lengths(none_dead), kernels, kinds
        measured = [variant for variant in table.variants if variant.ms is not None]
        self.latency = table.fit(
            lambda vector: Terms(*counted, vector),
            [self._loop_lengths(self._dead_counts(variant.kept)) for variant in measured],
        )

    def _dead_counts(self, kept: Mapping[str, int]) -> np.ndarray:
        return np.array([group.channels - kept.get(group.id, group.channels) for group in self.groups], np.int64)

    def _loop_lengths(self, dead: np.ndarray) -> np.ndarray:
        """The numbers of channels over which each product multiplies, (axes, products)."""
        return np.append(self._lengths.without(dead), 1)[self._loops]

    def _add_products(self, counted: MultiplyAdds) -> None:
        """Find, for each product of tensors, its multiply-adds per entry of the axes that are pruned (a fraction, since
        convolutions with groups multiply with a part of their inputs), and the rows of these axes."""
        carried: dict[tuple[tuple[str, str, int, int], int], list[tuple[Group, Product]]] = defaultdict(list)
        for group in self.groups:
            for product in group.products:
                part = product.module, product.operation, product.call, product.part
                carried[part, product.axis].append((group, product))
        lengths = {axis: products[0][1].length for axis, products in carried.items()}
        self._lengths = AxisLengths(self.groups, lengths, carried)
        rows: dict[tuple[str, str, int, int], dict[int, int]] = defaultdict(dict)  # of each part, with their lengths
        numbered = [(axis, row, part, length) for row, ((part, axis), length) in enumerate(lengths.items())]
        for _, row, part, length in sorted(numbered, key=lambda one: one[:2]):  # outputs first
            rows[part][row] = length
        most = max(map(len, rows.values()), default=0)
        table = []
        for call, numbers in counted.products.items():
            for index, number in enumerate(numbers):
                own = rows.get((*call, index), {})
                entries = math.prod(own.values())
                common = math.gcd(number, entries)
                table.append((number // common, entries // common, *own, *[len(lengths)] * (most - len(own))))
        columns = np.array(table, np.int64).reshape(-1, most + 2).T
        self._multiplied, self._divided, self._loops = columns[0], columns[1], columns[2:]

    def size_without(self, dead: Mapping[str, Collection[int] | int]) -> ModelSize:
        """Return the size without some channels, and without what cannot live without them.

        Args:
            dead: for the ids of groups their dead channels, or how many there are. With convolutions with groups,
                numbers are exact only if they are what ``Cutter.complete`` leaves.
        """
        channels = {name: value for name, value in dead.items() if not isinstance(value, int)}
        if self._cutter.blocks and len(channels) == len(dead):
            dead, _ = self._cutter.complete(channels)
        values = [dead.get(group.id, 0) for group in self.groups]
        counts = np.array([n if isinstance(n, int) else len(n) for n in values], np.int64)
        counts, kept, gone = self._cutter.complete_counts(counts)
        lengths, gone = np.append(kept, 1), np.append(gone, False)
        sizes = self._fixed * lengths[self._axes].prod(0) // self._shared
        sizes[gone[self._owner]] = 0
        loops = self._loop_lengths(counts)
        macs = int((self._multiplied * loops.prod(0) // self._divided).sum())
        latency = math.nan if self.latency is None else self.latency(self.latency.terms(loops))
        return ModelSize(int(sizes.sum()), macs, latency)

    def layer_latencies(self, kept: Mapping[str, int] | None = None) -> dict[str, float]:
        """Predicted milliseconds of each module that multiplies, with so many channels of each group; by default all.

        What comes without a product, such as pooling, is part of the modules beside it.
        """
        assert self.latency is not None
        counts, _, _ = self._cutter.complete_counts(self._dead_counts(kept or {}))
        terms = self.latency.terms
        times = terms.of_products(terms(self._loop_lengths(counts)) * self.latency.weights)
        layers: dict[str, float] = {}
        for name, milliseconds in zip(self._product_modules, times.tolist(), strict=True):
            layers[name] = layers.get(name, 0.0) + milliseconds
        return layers

    def complete(self, dead: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
        """Add the channels that cannot live without the dead ones; both are numbers for each of ``groups``."""
        numbers = dict(zip((group.id for group in groups), dead.tolist(), strict=True))
        counts, _, _ = self._cutter.complete_counts(np.array([numbers.get(g.id, 0) for g in self.groups], np.int64))
        after = dict(zip((group.id for group in self.groups), counts.tolist(), strict=True))
        return np.array([after[group.id] for group in groups], np.int64)

    def per_cost(self, scores: Mapping[str, np.ndarray], measure: Measure, power: float) -> dict[str, np.ndarray]:
        """Divide the scores of channels by a power of the share of the measure that goes with one channel alone.

        The order of value per weight is Dantzig's greedy rule for knapsacks (1957); the problem is that of HALP
        (NeurIPS 2022), with parameters or multiply-adds for latency.

        Args:
            scores: for each group its channels' scores, (channels,), at least 0.
            power: 0 leaves the scores as they are; 1 is importance per parameter or multiply-add.

        Raises:
            PlanError: a score or the power is negative.
        """
        if not isinstance(power, int | float) or not 0 <= power < math.inf:
            raise PlanError(
                f"cost_power={power!r}: must be a number of at least 0; 1 ranks by importance per parameter or MAC"
            )
        dense = getattr(self.dense, measure)
        divided = {}
        for name, values in scores.items():
            values = np.asarray(values, float)
            if values.min(initial=0) < 0:
                raise PlanError(f"a score of {name} is negative; cost_power needs an importance of at least 0")
            # A channel that costs nothing of this measure is pruned last.
            cost = max(dense - getattr(self.size_without({name: 1}), measure), 1) / dense
            divided[name] = values / cost**power
        return divided


def _kernels(model: nn.Module, counted: MultiplyAdds) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """For each product the number of positions of its kernel, (products,), and its kind: the operation and that."""
    sizes, kinds = [], []
    for (module, operation, _), numbers in counted.products.items():
        weight = getattr(model.get_submodule(module), "weight", None)
        size = math.prod(weight.shape[2:]) if "conv" in operation and isinstance(weight, Tensor) else 1
        sizes += [size] * len(numbers)
        kinds += [(operation, size)] * len(numbers)
    return np.array(sizes, float), kinds
