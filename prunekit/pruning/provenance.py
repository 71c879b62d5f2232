"""How a model was made: its dense builder and the plans applied to it. Recorded by ``slim``, read by ``save``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from prunekit.pruning.plan import Builder, Plan

_ATTRIBUTE = "_prunekit_provenance"


@dataclass(frozen=True)
class Provenance:
    """The origin of a slim model.

    Attributes:
        builder: builds the dense model; None where prunekit does not know it.
        plans: the plans that were applied to the dense model, in order.
        input: shape of one input without the batch, with which the plans can be applied again.
    """

    builder: Builder | None = None
    plans: tuple[Plan, ...] = ()
    input: tuple[int, ...] | None = None


def get_provenance(model: nn.Module) -> Provenance:
    """The recorded origin of a model; empty where nothing is recorded."""
    return getattr(model, _ATTRIBUTE, Provenance())


def set_provenance(model: nn.Module, provenance: Provenance) -> None:
    """Record the origin of a model. Deep copies of the model keep it."""
    setattr(model, _ATTRIBUTE, provenance)


def record_plan(slim: nn.Module, dense: nn.Module, plan: Plan, input_shape: Sequence[int]) -> None:
    """Record that ``plan`` made ``slim`` of ``dense``, whose input has this shape (without the batch)."""
    before = get_provenance(dense)
    set_provenance(slim, replace(before, plans=(*before.plans, plan), input=before.input or tuple(input_shape)))
