"""Ordinary CNN → the same network on features of several resolutions.

The convolutions between the stem and the head become gOctConvs (Gao et al., ECCV 2020, section 3.1; the idea of two
resolutions: Chen et al., "Drop an Octave", ICCV 2019), so that sparse training can learn for each layer how many
channels it needs at each resolution.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.config.registry import closest_match
from prunekit.errors import PlanError
from prunekit.layers.goctconv import GOctConv, split_channels
from prunekit.layers.octave_ops import (
    Attr,
    OctaveLayer,
    Octavized,
    Ref,
    Step,
    add,
    each,
    merge,
    method,
    pool,
    pool_globally,
    same,
)
from prunekit.layers.octave_roles import KEPT, Role, roles
from prunekit.layers.octave_trace import Call, kept, trace
from prunekit.layers.optional import MultiScaleLayer
from prunekit.utils.text import first_line

# What hands its branches on one by one.
_CARRIES = ("depthwise", "norm", "prelu", "each", "pool")


def octavize(
    model: nn.Module, example: Tensor, split: Sequence[float] = (0.5, 0.5), keep: Sequence[str] = ()
) -> Octavized:
    """A copy of a CNN in which the convolutions between the stem and the head are gOctConvs.

    Every convolution with an odd square kernel, "same" zero padding and no dilation or groups is rewritten, with a norm
    and a PReLU for each branch; its stride stays. Depthwise convolutions, norms, PReLUs, elementwise functions, dropout
    and poolings work on each branch, sums add branch to branch. Whatever else a feature meets gets one tensor: the
    branches up-sampled to the finest and put side by side; a mean over the image is taken of each branch first. The
    stem, which reads the model's input, and the head stay plain; but where a shortcut carries the stem's channels into
    a sum of branches, the stem is what makes the branches. (A path to a coarser branch max-pools.)

    With split [1, 0] the result computes what ``model`` does. With another each path has the slice of the
    convolution's weight between its channels, and each norm its slice, so that a trained model is a start.

    What was rewritten and what was not is in the result's ``octave_layers`` and ``octave_left``. (Two other ways were
    weighed. As a second return value it would be lost in each function that builds a model; as a warning no program
    could read it.)

    Args:
        model: takes one tensor; it is left as it is.
        example: a batch of inputs, (N, C, H, W).
        split: the share of a layer's channels in each branch, finest first.
        keep: patterns (as in a shell) of modules to leave as they are, with all that is in them.

    Raises:
        PlanError: torch.fx cannot follow the model, no convolution can be rewritten, or a pattern matches nothing.
        ValueError: shares that are negative or do not add up to 1.
    """
    split_channels(1, split)
    names = [name for name, _ in model.named_modules()]
    for pattern in keep:
        if not any(kept(name, [pattern]) for name in names):
            near = closest_match(pattern, names)
            hint = f"did you mean {near!r}?" if near else f"the first are {', '.join(names[1:6])}"
            raise PlanError(f"keep: no module matches {pattern!r}; {hint}")
    if any(isinstance(module, MultiScaleLayer | GOctConv) for module in model.modules()):
        raise PlanError("the model has layers of several resolutions already; octavize the ordinary one")
    try:
        model = copy.deepcopy(model)
    except RuntimeError as error:
        raise PlanError(
            f"the model cannot be copied ({first_line(error)}); does it hold on to what it computed, as the old "
            "spectral_norm does? Take that out first (torch.nn.utils.remove_spectral_norm)"
        ) from error
    return _Rewriter(model, trace(model, example, keep), split, keep).run()


class _Rewriter:
    def __init__(self, model: nn.Module, calls: Sequence[Call], split: Sequence[float], keep: Sequence[str]):
        self.model = model
        self.calls = calls
        self.split = split
        self.modules = dict(model.named_modules())
        self.roles, self.stem = roles(calls, self.modules, keep)
        self.octave = self._octave()
        self.steps: list[Step] = []
        self.placed: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}
        self.layers: list[str] = []
        self.left: dict[str, str] = {}
        # For each call, the step that has its value, and the one that has it as a plain tensor.
        self.at: dict[int, int] = {0: 0}
        self.plain: dict[int, int] = {}

    def run(self) -> Octavized:
        scales = getattr(self.model, "step_scales", dict)()
        for call in self.calls[1:]:
            if call.index not in self.at:
                self._rewrite(call, self.roles[call.index])
        if not any(self.roles[i].kind == "conv" for i in self.octave):
            convs = [f"{n}: {why}" for n, why in self.left.items() if isinstance(self.modules.get(n), nn.Conv2d)]
            raise PlanError(
                "no convolution can be rewritten for several resolutions"
                + (f" ({'; '.join(convs[:4])}{'; …' if len(convs) > 4 else ''})" if convs else ", since there is none")
            )
        self._list_rest()
        made = Octavized(self.steps, self.placed, self.tensors, set(self.model.state_dict()))
        for name, module in made.named_modules():
            # What only holds others has been made anew.
            if type(module) is nn.Module and name in self.modules:
                module.training = self.modules[name].training
        made.training = self.model.training
        made.octave_layers, made.octave_left = self.layers, self.left
        sources = {name: self.origin.get(name, name) for name, _ in made.named_parameters()}
        made._scales = {name: scales[source] for name, source in sources.items() if source in scales}
        return made

    # Which calls have branches.

    def _octave(self) -> set[int]:
        """The calls whose value has branches. A sum of which one side has none has none either, but where the stem can
        make them."""
        needs = self._needs()
        opened: set[int] = set()
        while True:
            octave = self._spread(opened)
            more = set(opened)
            for call in self.calls:
                if self.roles[call.index].kind == "sum" and octave.intersection(call.inputs):
                    more |= needs[call.index] or set()
            if more == opened:
                return octave
            opened = more

    def _needs(self) -> list[set[int] | None]:
        """For each call, the parts of the stem that have to make branches for it to have them; None where it cannot."""
        needs: list[set[int] | None] = []
        for call in self.calls:
            kind, found = self.roles[call.index].kind, None
            if kind == "conv":
                found = {call.index} & self.stem
            elif kind in (*_CARRIES, "sum"):
                parts = [needs[i] for i in call.inputs]
                found = None if None in parts else set().union(*parts)
            needs.append(found)
        return needs

    def _spread(self, opened: set[int]) -> set[int]:
        octave: set[int] = set()
        for call in self.calls:
            kind = self.roles[call.index].kind
            makes = kind == "conv" and (call.index not in self.stem or call.index in opened)
            if makes or (kind in (*_CARRIES, "sum") and octave.issuperset(call.inputs)):
                octave.add(call.index)
        return octave

    # The new steps.

    def _rewrite(self, call: Call, role: Role) -> None:
        if call.index in self.octave:
            source = call.inputs[0]
            if role.kind in ("conv", "depthwise", "norm", "prelu"):
                self._layer(call, role)
            elif role.kind == "sum":
                self._emit(call, Step(add, tuple(Ref(self.at[i]) for i in call.inputs)))
            elif role.kind == "pool":
                self._emit(call, Step(pool, kwargs={"feature": Ref(self.at[source]), **role.options}))
            else:
                self._each(call, each)
        elif role.kind == "global" and call.inputs[0] in self.octave:
            self.left[call.label] = "a mean over the image: each branch's is taken, and they are put side by side"
            self._each(call, pool_globally)
        else:
            self._leave(call, role)

    def _each(self, call: Call, by: Any) -> None:
        """A step that does ``by`` with this call's own function, for each branch."""
        feature = Ref(self.at[call.inputs[0]])
        kwargs = {key: False if key == "inplace" else value for key, value in call.kwargs.items()}
        rest = [arg for arg in call.args if not isinstance(arg, Ref)]
        if call.kind == "module":
            module = self._place(call.target)
            if hasattr(module, "inplace"):
                # A sum with an absent branch is its other side, which somebody else may read too.
                module.inplace = False
            self._emit(call, Step(by, (Attr(call.target), feature)))
        elif call.kind == "method":
            self._emit(call, Step(by, (method, feature, call.target, *rest), kwargs))
        else:
            self._emit(call, Step(by, (call.target, feature, *rest), kwargs))

    def _leave(self, call: Call, role: Role) -> None:
        """The call as it was, on plain tensors."""
        joined = [i for i in call.inputs if i in self.octave]
        why = role.reason
        if role.kind == "sum":
            why = "a sum of which one side has no branches"
        elif role.kind == "conv":
            why = "the stem: it reads the model's input"
        elif call.kind == "output":
            why = "the model's output"
        whole = call.kind == "module" and (isinstance(self.modules[call.target], nn.Conv2d) or why == KEPT)
        if joined or whole:
            self.left[call.label if call.kind != "output" else "output"] = why or "what it reads has no branches"
        args, kwargs = self._filled(call.args), self._filled(call.kwargs)
        if call.kind == "module":
            self._place(call.target)
            step = Step(Attr(call.target), args, kwargs)
        elif call.kind == "attr":
            home, _, name = call.target.rpartition(".")
            self.tensors[call.target] = getattr(self.modules[home], name) if call.value is None else call.value
            step = Step(same, (Attr(call.target),))
        elif call.kind == "method":
            step = Step(method, (args[0], call.target, *args[1:]), kwargs)
        elif call.kind == "output":
            step = Step(same, args)
        else:
            step = Step(call.target, args, kwargs)
        self._emit(call, step)

    def _filled(self, item: Any) -> Any:
        """Arguments that refer to steps with plain tensors instead of to calls."""
        if isinstance(item, Ref):
            return Ref(self._plain(item.index))
        if isinstance(item, dict):
            return {key: self._filled(part) for key, part in item.items()}
        if isinstance(item, slice):
            return slice(*(self._filled(part) for part in (item.start, item.stop, item.step)))
        return type(item)(self._filled(part) for part in item) if type(item) in (tuple, list) else item

    def _plain(self, index: int) -> int:
        if index not in self.octave:
            return self.at[index]
        if index not in self.plain:
            self.steps.append(Step(merge, (Ref(self.at[index]),)))
            self.plain[index] = len(self.steps)
        return self.plain[index]

    def _emit(self, call: Call, step: Step) -> None:
        self.steps.append(step)
        self.at[call.index] = len(self.steps)

    def _place(self, name: str) -> nn.Module:
        return self.placed.setdefault(name, self.modules[name])

    # The new layers.

    def _layer(self, call: Call, role: Role) -> None:
        """A convolution with the norm and the PReLU that alone take what it makes; or what there is of these."""
        chain = {role.kind: call}
        last = call
        for kind in ("norm", "prelu"):
            after = last.users[0] if len(last.users) == 1 else None
            if after is not None and self.roles[after].kind == kind and kind not in chain and "prelu" not in chain:
                last = chain[kind] = self.calls[after]
        name = call.target
        inputs = self.calls[call.inputs[0]]
        ins = self._split(inputs.shape[1]) if inputs.index in self.octave else [inputs.shape[1]]
        outs = self._split(call.shape[1])
        conv = self.modules[name] if role.kind in ("conv", "depthwise") else None
        bias = conv.bias if role.kind == "conv" else None
        layer = OctaveLayer(
            mix=self._mix(name, conv, ins, outs) if role.kind == "conv" else None,
            convs=self._sliced(name, "convs", name, outs) if role.kind == "depthwise" else None,
            stride=conv.stride[0] if conv is not None else 1,
            norms=self._sliced(name, "norms", chain["norm"].target, outs, bias) if "norm" in chain else None,
            acts=self._sliced(name, "acts", chain["prelu"].target, outs) if "prelu" in chain else None,
        )
        layer.training = self.modules[name].training
        for container in (layer.mix, layer.convs, layer.norms, layer.acts):
            if container is not None:
                container.training = layer.training
        self.placed[name] = layer
        self.layers.append(name)
        self._emit(call, Step(Attr(name), (Ref(self.at[inputs.index]),)))
        for fused in chain.values():
            self.at[fused.index] = self.at[call.index]

    def _split(self, channels: int) -> list[int]:
        return split_channels(channels, self.split)

    def _mix(self, name: str, conv: nn.Conv2d, ins: Sequence[int], outs: Sequence[int]) -> GOctConv:
        with torch.device("meta"):
            # No random number is drawn for weights that are replaced.
            mix = GOctConv(ins, outs, conv.kernel_size[0], stride=conv.stride[0], downsample="mixed")
        for key, path in mix.paths.items():
            i, j = map(int, key.split("to"))
            path.weight = _part(_part(conv.weight, 0, outs, j), 1, ins, i)
            path.training = conv.training
            self.origin[f"{name}.mix.paths.{key}.weight"] = f"{name}.weight"
        mix.paths.training = conv.training
        return mix

    def _sliced(
        self, layer: str, place: str, name: str, channels: Sequence[int], bias: Tensor | None = None
    ) -> dict[str, nn.Module]:
        """For each branch that has channels, a copy of a module with its part of each tensor.

        Args:
            bias: of the convolution before a norm, which the norm's running mean takes.
        """
        module, found = self.modules[name], {}
        if bias is not None and module.running_mean is not None:
            module.running_mean -= bias.detach()
        for b, count in enumerate(channels):
            if not count:
                continue
            branch = found[str(b)] = copy.deepcopy(module)
            for part, tensor in [*module.named_parameters(), *module.named_buffers()]:
                # A PReLU may have one slope for all channels, and a norm counts batches.
                if tensor.dim() and len(tensor) == sum(channels) > 1:
                    setattr(branch, part, _part(tensor, 0, channels, b))
                self.origin[f"{layer}.{place}.{b}.{part}"] = f"{name}.{part}"
            if isinstance(branch, nn.BatchNorm2d):
                branch.num_features = count
            elif isinstance(branch, nn.PReLU):
                branch.num_parameters = len(branch.weight)
            else:
                branch.groups = branch.in_channels = branch.out_channels = count
        return found

    def _list_rest(self) -> None:
        """Say what is gone: parameters that no forward uses, and hooks that have nothing to hang on to."""
        used = {call.target for call in self.calls if call.kind in ("module", "attr")}
        above = tuple(f"{name}." for name in used)
        for name, module in self.modules.items():
            held = [f"{name}.{part}".removeprefix(".") for part, _ in module.named_parameters(recurse=False)]
            lost = [part for part in held if part not in used] if name not in used else []
            if lost and not name.startswith(above):
                self.left[name or lost[0]] = "never called, so it is not there any more"
            elif (module._forward_hooks or module._forward_pre_hooks) and not (name in used or name.startswith(above)):
                self.left[name or "the model"] = "its hooks are gone, since it is no module any more"


def _part(tensor: Tensor, axis: int, channels: Sequence[int], branch: int) -> Tensor:
    """A branch's part of a tensor, as a parameter where that is one."""
    start = sum(channels[:branch])
    part = tensor.detach().narrow(axis, start, channels[branch]).clone()
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
