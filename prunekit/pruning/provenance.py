"""How a model was made: its dense builder and the plans applied to it. Recorded by ``slim``, read by ``save``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from prunekit.pruning.plan import Builder, Plan
from prunekit.utils.compiled import unwrap
from prunekit.utils.inputs import Example, first_inputs, on_meta

_ATTRIBUTE = "_prunekit_provenance"  # of the model; deep copies keep it


@dataclass(frozen=True)
class Provenance:
    """The origin of a slim model."""

    builder: Builder | None = None  # of the dense model; None where prunekit does not know it
    plans: tuple[Plan, ...] = ()  # those applied to the dense model, in order
    example: Example | None = None  # one input on the meta device, with which the plans can be applied again


def get_provenance(model: nn.Module) -> Provenance:
    return getattr(unwrap(model), _ATTRIBUTE, Provenance())


def set_provenance(model: nn.Module, provenance: Provenance) -> None:
    setattr(model, _ATTRIBUTE, provenance)


def record_plan(slim: nn.Module, dense: nn.Module, plan: Plan, example: Example) -> None:
    """Record that ``plan`` made ``slim`` of ``dense``."""
    before = get_provenance(dense)
    example = on_meta(first_inputs(example, 1))
    known = example if before.example is None else before.example
    set_provenance(slim, replace(before, plans=(*before.plans, plan), example=known))
