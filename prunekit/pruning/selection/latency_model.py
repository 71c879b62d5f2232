"""Latency of a slim model on one machine, predicted from the measured latencies of other slim models.

The latency is modeled as a sum over the products of the network (convolutions, linear layers, products of matrices).
Each takes a constant, a time per channel that it reads, a time per channel that it writes, and a time per multiply-add,
with the channels rounded up to vectors, whose length is chosen by the error of the predictions. What comes without a
product, such as pooling, resampling and concatenation, costs by channel and position, too, and goes with the layers
beside it. All times are at least zero and are fitted to the measured latencies by least squares; those of one kind of
layer are drawn towards a common value, since there are more of them than measurements.

That latency is a step function of the channels, and that channels should be chosen by what they save, is from HALP
(Shen et al., NeurIPS 2022), which takes each layer from a table instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import nnls
from scipy.stats import spearmanr

from prunekit.errors import PlanError
from prunekit.pruning.plan import Group
from prunekit.utils.io import format_problem
from prunekit.utils.text import plural

FORMAT = 1
VECTORS = (1, 4, 8, 16)  # channels; 1: none
REGULARIZATION = 1.0
DENSE_WEIGHT = 3.0  # of the dense model among the measured ones, since ratios refer to it
FOLDS = 5
MIN_VARIANTS = 10


class Variant(BaseModel):
    """A slim model and its latency."""

    model_config = ConfigDict(extra="forbid")
    kept: dict[str, int]  # number of channels of each group that can be pruned
    ms: float | None = Field(None, gt=0)  # milliseconds of a call; None where not yet measured


class LatencyTable(BaseModel):
    """Latencies of slim models on one machine; the first is the dense model. A JSON file holds the same.

    Attributes:
        runtime: "onnxruntime", "openvino" or "torch"; any other name for times of another machine.
        device: the machine's name.
        threads, batch, size: of the measured calls; the size is the shape of one input without the batch.
    """

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    runtime: str
    version: str = ""
    device: str = ""
    threads: int = 1
    batch: int = 1
    size: list[int]
    variants: list[Variant] = []
    _last_fit: ClassVar[tuple[bytes, LatencyModel] | None] = None

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Read a table from a file.

        Raises:
            PlanError: the file cannot be read, or is no table.
        """
        try:
            data = json.loads(path.read_text())
            if isinstance(data, dict) and (problem := format_problem(data.get("format", FORMAT), FORMAT)):
                raise PlanError(f"{path}: {problem}")
            return cls.model_validate(data)
        except OSError as error:
            raise PlanError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise PlanError(f"{path}: {place}: {first['msg']}; make it with prunekit profile") from error
        except ValueError as error:
            raise PlanError(f"{path}: is not JSON ({error}); make it with prunekit profile") from error

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @property
    def setting(self) -> str:
        """Where the models were timed, such as "onnxruntime, 224×224, 1 thread"."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.runtime}, {'×'.join(map(str, self.size[1:]))}, {plural(self.threads, 'thread')}{batch}"

    def fit(self, terms: Callable[[int], Terms], lengths: Sequence[np.ndarray]) -> LatencyModel:
        """Return the model with the vectors that predict best.

        Args:
            terms: of a network, for a length of the vectors.
            lengths: the numbers of channels of each variant that was measured.
        """
        milliseconds = np.array([variant.ms for variant in self.variants if variant.ms is not None])
        key = terms(1).dense.tobytes() + np.stack(lengths).tobytes() + milliseconds.tobytes()
        last = LatencyTable._last_fit  # The same latencies are fitted several times in a run.
        if last is None or last[0] != key:
            found = []
            for vector in VECTORS:
                own = terms(vector)
                found.append(LatencyModel(own, np.stack([own(variant) for variant in lengths]), milliseconds))
            last = LatencyTable._last_fit = key, min(found, key=lambda model: model.error)
        return last[1]

    def check(self, groups: Sequence[Group]) -> None:
        """Raise PlanError where the table is not one of a model with these groups, or has too few measurements."""
        measured = [variant for variant in self.variants if variant.ms is not None]
        if len(measured) < MIN_VARIANTS:
            raise PlanError(
                f"the latency table has {len(measured)} measured variants; measure at least {MIN_VARIANTS}, the more "
                "the better"
            )
        widths = {group.id: group.channels for group in groups if group.reason is None}
        if any(kept > widths[name] for v in measured for name, kept in v.kept.items() if name in widths) or any(
            v.kept.keys() != widths.keys() for v in measured
        ):
            raise PlanError("the latency table is one of another model; measure this one with prunekit profile")


class Terms:
    """The terms of the latency, for any number of channels.

    Args:
        multiplied: for each product what its number of multiply-adds is beside the channels, (products,).
        lengths: the numbers of channels over which each product multiplies, (axes, products), those of its output
            first, 1 where it has fewer.
        kernels: positions of each product's kernel, (products,).
        kinds: what each product is, such as ("conv2d", 9).
        vector: number of channels that the machine computes together.
    """

    def __init__(
        self, multiplied: np.ndarray, lengths: np.ndarray, kernels: np.ndarray, kinds: Sequence[Any], vector: int = 1
    ):
        self._multiplied, self._positions, self.vector = multiplied, multiplied / kernels, vector
        self._is_axis = lengths > 1  # Axes of one channel may be there to fill the rows.
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        kind_of_product = np.array([numbers[kind] for kind in kinds], int)
        rows = len(lengths) + 2
        # Each term's kind: that of its product, and what it counts.
        self.kinds = (np.arange(rows)[:, None] * len(numbers) + kind_of_product).ravel()
        self.dense = self(lengths)

    def of_products(self, terms: np.ndarray) -> np.ndarray:
        """Return the sums of each product's terms, (products,)."""
        return terms.reshape(-1, len(self._multiplied)).sum(0)

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        """Return the terms for some numbers of channels, (terms,): of each product 1, channels, multiply-adds."""
        alive = lengths.prod(0) > 0
        vectors = np.where(self._is_axis, -(-lengths // self.vector) * self.vector, lengths)
        rows = [np.ones(len(alive)), *(self._positions * vectors), self._multiplied * vectors.prod(0)]
        return (alive * np.stack(rows)).ravel()


class LatencyModel:
    """Predicts latencies from terms.

    Args:
        terms: of the products of the model; how to count the channels.
        variants: the terms of the measured models, (variants, terms); the first is the dense model.
        milliseconds: their latencies, (variants,).

    Attributes:
        error: median of the relative errors on variants that were left out of the fit (cross-validation).
        rank: correlation of their predicted and measured ranks (Spearman).
    """

    def __init__(self, terms: Terms, variants: np.ndarray, milliseconds: np.ndarray):
        self.terms = terms
        self.weights = self._fit(variants, milliseconds)
        left_out = np.zeros(len(variants))
        folds = np.arange(len(variants)) % FOLDS
        folds[0] = -1  # The dense model is in each fit.
        for fold in range(FOLDS):
            out = folds == fold
            left_out[out] = variants[out] @ self._fit(variants[~out], milliseconds[~out])
        predicted, measured = left_out[1:], milliseconds[1:]
        self.error = float(np.median(np.abs(predicted / measured - 1)))
        self.rank = float(spearmanr(predicted, measured)[0])

    def __call__(self, terms: np.ndarray) -> float:
        """Return the latency in milliseconds."""
        return float(terms @ self.weights)

    def _fit(self, variants: np.ndarray, milliseconds: np.ndarray) -> np.ndarray:
        dense, kinds = self.terms.dense, self.terms.kinds
        used = np.flatnonzero(dense)
        _, kind = np.unique(kinds[used], return_inverse=True)
        sums, counts = np.bincount(kind, dense[used]), np.bincount(kind)
        # The unknowns: milliseconds of each term in the dense model, then their means in each kind.
        size = dense[used] / (sums / counts)[kind]
        data = np.zeros((len(variants), len(used) + len(sums)))
        data[:, : len(used)] = variants[:, used] / dense[used] / milliseconds[:, None]
        wanted = np.ones(len(data))
        data[0], wanted[0] = DENSE_WEIGHT * data[0], DENSE_WEIGHT
        ties = np.zeros((len(used), data.shape[1]))
        ties[np.arange(len(used)), np.arange(len(used))] = 1 / size
        ties[np.arange(len(used)), len(used) + kind] = -1
        ties *= REGULARIZATION * len(sums) / milliseconds[0]
        rows, values = np.concatenate([data, ties]), np.concatenate([wanted, np.zeros(len(ties))])
        solution, _ = nnls(rows, values, maxiter=20_000)
        weights = np.zeros(len(dense))
        weights[used] = solution[: len(used)] / dense[used]
        return weights
