"""Groups and plans: which channels can only be pruned together, and which are kept. Both are JSON and need no torch."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunekit.config.yaml import format_path
from prunekit.errors import PlanError
from prunekit.utils.io import format_problem, is_newer

FORMAT = 1


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Span(_Schema):
    """Where an axis has the channels of a group.

    Channel k has the entries offset + k·stride … offset + (k+1)·stride − 1, and again ``period`` entries later, for
    each of ``repeats``: pairs (count, period). Where two groups have the same entries, an entry disappears with a
    channel of either, as with heads and the channels of each head.
    """

    axis: int = Field(ge=0)  # the input axis of a grouped convolution counts the channels of all its groups
    offset: int = Field(0, ge=0)
    stride: int = Field(1, ge=1)
    repeats: tuple[tuple[int, int], ...] = ()

    @property
    def times(self) -> int:
        """How many entries a channel has."""
        return self.stride * math.prod(count for count, _ in self.repeats)

    def entries(self, channels: np.ndarray) -> np.ndarray:
        """Return the entries of some channels, those of one channel after another."""
        first = self.offset + channels * self.stride
        if self.times == 1:
            return first
        places = np.zeros(1, np.int64)
        for count, period in (*self.repeats, (self.stride, 1)):
            places = (places[:, None] + np.arange(count) * period).ravel()
        return (first[:, None] + places).ravel()


class Member(Span):
    """An axis of a parameter or buffer from which a group's channels are removed."""

    tensor: str
    reads: bool = False  # takes the channels as input; otherwise it produces them or passes them on
    pads: bool = False  # what the axis reads is padded, before or by the module: border and interior differ
    next_norm: str | None = None  # after a reader; its running mean can absorb a shift of the reader's output

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]


class Statistic(Span):
    """An axis over which an operation computes a statistic, such as the mean of a norm: after the cut over the channels
    that are left."""

    module: str  # that calls the operation
    operation: str
    call: int  # its number among the module's calls of this operation


class Product(Span):
    """An axis over which an operation multiplies: its multiply-adds are proportional to the length.

    Axes that a reshape has merged are listed one by one; ``axis`` is their number, not that of a tensor's axis.
    """

    module: str  # that calls the operation
    operation: str
    call: int  # its number among the module's calls of this operation
    part: int = 0  # of an attention: 0 for queries times keys, 1 for the weights times values
    length: int


class Attribute(_Schema):
    """A number of a module that is the length of an axis, such as "head_dim", or "config.hidden_size"."""

    module: str
    name: str
    index: int | None = None  # in a tuple or a list
    size: int
    lost: int = 1  # what goes with each channel

    def after(self, kept: int, channels: int, size: int) -> int:
        """Its value after a cut that keeps so many of a group's channels; ``size`` is the one before."""
        if self.lost * channels == self.size:
            return size * kept // channels  # other groups may be factors of it, too
        return size - self.lost * (channels - kept)


class Gate(_Schema):
    """The weights γ of a BatchNorm that scale a group's channels."""

    norm: str
    slice: tuple[int, int]  # [start, stop) of the channels in the norm
    activation: str | None = None  # what follows: the name of a PReLU module, or of a function such as "relu"


class Group(_Schema):
    """Channels that can only be pruned together.

    Attributes:
        id: derived from the name of the first parameter; the same in every process.
        channels: number of channels.
        members: the axes that lose an entry with each channel.
        gates: the gates that decide whether a channel is dead.
        combine: the gate expression: an index into ``gates``, {"serial": [...]} (dead if any part is) or
            {"parallel": [...]} (dead if all parts are), nested; None without gates.
        statistics: the operations that compute a statistic over the channels.
        products: the operations that multiply over the channels.
        zeroed: whether something other than a layer reads the channels, so that they must be zero to be pruned.
        attributes: numbers that modules keep, which follow.
        params, macs: cost of one channel, in parameters and in multiply-adds at the example's size; what two axes of
            one tensor or operation have in common counts for both.
        reason: why the group cannot be pruned; None where it can.
    """

    id: str
    channels: int
    members: list[Member]
    gates: list[Gate] = []
    combine: Any = None
    statistics: list[Statistic] = []
    products: list[Product] = []
    zeroed: bool = False
    attributes: list[Attribute] = []
    params: int = 0
    macs: int = 0
    reason: str | None = None

    @property
    def producers(self) -> list[str]:
        """The modules that output the group's channels."""
        return [m.module for m in self.members if not m.reads and m.tensor.endswith(".weight")]

    @property
    def readers(self) -> list[Member]:
        """The input axes that read the group's channels."""
        return [m for m in self.members if m.reads]


class Builder(_Schema):
    """The function that builds the dense model."""

    name: str
    options: dict[str, Any] = {}
    file: str | None = None


class Plan(_Schema):
    """What to keep of a dense model.

    Attributes:
        groups: for each group's id the kept channels, ascending; a number n means the first n.
        removed: modules that are removed because they have no inputs or no outputs left.
        added_bias: convolutions that get a bias, from constants folded into them.
        carriers: for each group's id the kept channels that only carry a constant.
        splits: for each multi-scale layer the number of channels kept in each branch.
        notes: where the plan differs from what was requested, a sentence each.
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
        """Return the kept channels of a group; all of them where the plan does not name it.

        Raises:
            PlanError: the plan names channels that the group does not have.
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
        """Raise PlanError where the plan names a group that does not exist, or prunes one that cannot be pruned."""
        known = {group.id for group in groups}
        if unknown := [name for name in self.groups if name not in known]:
            raise PlanError(
                f"the plan names a group {unknown[0]!r} that the model does not have; it was made for another model"
            )
        for group in groups:
            if len(self.kept(group)) < group.channels and group.reason:
                raise PlanError(f"the plan prunes {group.id}, which cannot be pruned: {group.reason}")

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Any, name: str = "plan.json") -> Plan:
        """Parse a plan; raise PlanError, with its ``name``, where it is not a plan or of a newer format."""
        version = data.get("format", FORMAT) if isinstance(data, dict) else FORMAT
        if (fault := format_problem(version, FORMAT)) is not None:
            fix = "pip install --upgrade prunekit" if is_newer(version, FORMAT) else "extract it again"
            raise PlanError(f"{name} {fault}; {fix}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = format_path(first["loc"]) or "the top level"
            raise PlanError(f"{name} is not a plan: {where}: {first['msg']}; extract it again") from None


def digest(data: Any) -> str:
    """Return a short stable hash of JSON data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
