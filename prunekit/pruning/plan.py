"""Groups and plans: what can be cut together, and what is kept. Both are JSON, and neither needs torch.

A plan holds, for each group, the channels kept, not a mask of weights: with the dense builder it says how to rebuild
the slim model, and no pickle is needed. (Two other forms were weighed. A list of channel counts is smaller but cannot
say which channels of the dense model live on, so nothing could be proved. A slim architecture of its own would need
every backbone to understand widths.)
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunekit.config.yaml import format_path
from prunekit.errors import PlanError
from prunekit.utils.io import format_problem, is_newer

FORMAT = 1


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Member(_Schema):
    """An axis of a tensor that a group cuts: channel k stands at offset + k·stride … offset + (k+1)·stride − 1.

    ``reads`` is true where the axis takes the channels in, false where it makes them or hands them on. Along the input
    axis of a convolution with groups, places are counted over all of its input channels. ``into`` names the norm behind
    a reader, where whatever is added to the reader's output can be taken from that norm's running mean instead.
    """

    tensor: str
    axis: int = Field(ge=0)
    offset: int = Field(0, ge=0)
    stride: int = Field(1, ge=1)
    reads: bool = False
    into: str | None = None


class Gate(_Schema):
    """The γ of a BatchNorm that scale a group's channels: ``slice`` is [start, stop) in that norm.

    ``activation`` is what follows the norm: the name of a PReLU module, of a function such as "relu", or None.
    """

    norm: str
    slice: tuple[int, int]
    activation: str | None = None


class Group(_Schema):
    """Channels that can only be cut together.

    Attributes:
        id: made from the name of the first parameter; the same in every process.
        channels: how many there are.
        members: the axes that lose an entry with a channel.
        gates: the norms' γ that decide.
        combine: how: an index into ``gates``, or {"serial": [...]} (one dead gate kills a channel), or {"parallel":
            [...]} (all must be dead), nested; None where nothing decides.
        params, macs: what one channel costs, in parameters and in multiply-adds at the example's size.
        reason: why the group cannot be cut; None where it can.
    """

    id: str
    channels: int
    members: list[Member]
    gates: list[Gate] = []
    combine: Any = None
    params: int = 0
    macs: int = 0
    reason: str | None = None

    @property
    def producers(self) -> list[str]:
        """The modules whose output channels are this group's."""
        return [m.tensor.removesuffix(".weight") for m in self.members if not m.reads and m.tensor.endswith(".weight")]

    @property
    def readers(self) -> list[Member]:
        """The input axes that read this group's channels."""
        return [m for m in self.members if m.reads]


class Builder(_Schema):
    """The function that builds the dense model."""

    name: str
    options: dict[str, Any] = {}
    file: str | None = None


class Plan(_Schema):
    """What is kept of a dense model.

    Attributes:
        groups: for each group's id the channels kept, ascending; a number n stands for the first n.
        removed: modules that are gone, because nothing is left of what they compute or read.
        added_bias: convolutions that got a bias from constants folded into them.
        carriers: for each group's id the kept channels that carry only a constant.
        splits: for each multi-scale layer the channels kept in each branch.
        notes: what is not as it was asked for (nothing cut, a tie, a layer left whole), a sentence each.
    """

    format: int = FORMAT
    builder: Builder | None = None
    input: list[int] | None = None
    recipe_hash: str | None = None
    dense_hash: str | None = None
    groups: dict[str, list[int] | int] = {}
    removed: list[str] = []
    added_bias: list[str] = []
    carriers: dict[str, list[int]] = {}
    splits: dict[str, list[int]] = {}
    notes: list[str] = []

    def kept(self, group: Group) -> list[int]:
        """The channels of this group that stay; all of them where the plan does not name it.

        Raises:
            PlanError: channels that the group does not have.
        """
        kept = self.groups.get(group.id, group.channels)
        kept = list(range(kept)) if isinstance(kept, int) else kept
        if kept and (kept[0] < 0 or kept[-1] >= group.channels or any(a >= b for a, b in pairwise(kept))):
            raise PlanError(
                f"the plan keeps channels of {group.id} that it does not have (it has {group.channels}); "
                "extract the plan again from this model"
            )
        return kept

    def check(self, groups: list[Group]) -> None:
        """See that the plan speaks of these groups.

        Raises:
            PlanError: it names a group that is not there, or cuts one that cannot be cut.
        """
        known = {group.id: group for group in groups}
        for name in self.groups:
            if name not in known:
                raise PlanError(
                    f"the plan names a group {name!r} that the model does not have; it was made for another model"
                )
        for group in groups:
            if len(self.kept(group)) < group.channels and group.reason:
                raise PlanError(f"the plan cuts {group.id}, which cannot be cut: {group.reason}")

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Any, name: str = "plan.json") -> Plan:
        """Read a plan.

        Raises:
            PlanError: it is none, or of a newer format.
        """
        held = data.get("format", FORMAT) if isinstance(data, dict) else FORMAT
        if (fault := format_problem(held, FORMAT)) is not None:
            mend = "pip install --upgrade prunekit" if is_newer(held, FORMAT) else "extract it again"
            raise PlanError(f"{name} {fault}; {mend}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = format_path(first["loc"]) or "the top level"
            raise PlanError(f"{name} is no plan: {where}: {first['msg']}; extract it again") from None


def digest(data: Any) -> str:
    """A short stable hash of something that JSON can hold."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
