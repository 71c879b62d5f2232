"""How a model was made: its dense builder and the plans applied to it. Recorded by ``slim``, read by ``save``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from prunekit.pruning.plan import Builder, Plan
from prunekit.utils.compiled import unwrap

_ATTRIBUTE = "_prunekit_provenance"  # of the model; deep copies keep it


@dataclass(frozen=True)
class Provenance:
    """The origin of a slim model."""

    builder: Builder | None = None  # of the dense model; None where prunekit does not know it
    plans: tuple[Plan, ...] = ()  # those applied to the dense model, in order
    input: tuple[int, ...] | None = None  # shape of one input, with which the plans can be applied again


def get_provenance(model: nn.Module) -> Provenance:
    return getattr(unwrap(model), _ATTRIBUTE, Provenance())


def set_provenance(model: nn.Module, provenance: Provenance) -> None:
    setattr(model, _ATTRIBUTE, provenance)


def record_plan(slim: nn.Module, dense: nn.Module, plan: Plan, input_shape: Sequence[int]) -> None:
    """Record that ``plan`` made ``slim`` of ``dense``, whose input has this shape (without the batch)."""
    before = get_provenance(dense)
    set_provenance(slim, replace(before, plans=(*before.plans, plan), input=before.input or tuple(input_shape)))
