"""Converts a CNN into one of gOctConvs (Gao et al., ECCV 2020, section 3.1; for two resolutions: Chen et al., "Drop an
Octave", ICCV 2019), so that sparse training learns the channels per resolution for each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.layers import octave_ops as ops
from prunekit.layers.goctconv import GOctConv, split_channels
from prunekit.layers.octave_ops import Attr, OctaveLayer, Octavized, Ref, Step
from prunekit.layers.octave_roles import KEPT, Role, roles
from prunekit.layers.octave_trace import Call, kept, trace
from prunekit.layers.optional import MultiScaleLayer
from prunekit.utils.text import closest_match, first_line

# Kinds of calls that process each branch separately.
_PER_BRANCH = ("depthwise", "norm", "prelu", "each", "pool")


def octavize(
    model: nn.Module, example: Tensor, split: Sequence[float] = (0.5, 0.5), keep: Sequence[str] = ()
) -> Octavized:
    """Return a copy of a CNN in which the convolutions between stem and head are gOctConvs.

    Every convolution with an odd square kernel, "same" zero padding and no dilation or groups is rewritten, with a
    norm and a PReLU per branch; its stride is kept. Depthwise convolutions, norms, PReLUs, elementwise functions,
    dropout, pooling and sums run per branch. Any other operation gets one tensor: the branches upsampled to the finest
    and concatenated. The stem and the head stay plain, but a stem whose channels a shortcut adds to a multi-scale
    feature produces the branches itself.

    With split [1, 0] the result computes the same as ``model``. With other splits each path and each norm gets its
    slice of the weights. ``octave_layers`` and ``octave_left`` of the result list what was rewritten and what was not.

    Args:
        model: takes one tensor; it is not modified.
        example: a batch of inputs, (N, C, H, W).
        split: the share of a layer's channels in each branch, finest first.
        keep: shell patterns of modules to leave unchanged, including their children.

    Raises:
        PlanError: torch.fx cannot trace the model, no convolution can be rewritten, or a pattern matches nothing.
        ValueError: a share is negative, or the shares do not add up to 1.
    """
    split_channels(1, split)
    names = [name for name, _ in model.named_modules()]
    for pattern in keep:
        if not any(kept(name, [pattern]) for name in names):
            near = closest_match(pattern, names)
            hint = f"did you mean {near!r}?" if near else f"the first are {', '.join(names[1:6])}"
            raise PlanError(f"keep: no module matches {pattern!r}; {hint}")
    if any(isinstance(module, MultiScaleLayer | GOctConv) for module in model.modules()):
        raise PlanError("the model already has multi-scale layers; octavize the original model instead")
    try:
        model = copy.deepcopy(model)
    except RuntimeError as error:
        raise PlanError(
            f"the model cannot be copied ({first_line(error)}); if it caches a computed tensor, as the old "
            "spectral_norm does, remove that first (torch.nn.utils.remove_spectral_norm)"
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
        # Call → the step that computes its value, and the step that merges its branches.
        self.step_of: dict[int, int] = {0: 0}
        self.merge_of: dict[int, int] = {}

    def run(self) -> Octavized:
        scales = getattr(self.model, "step_scales", dict)()
        for call in self.calls[1:]:
            if call.index not in self.step_of:
                self._rewrite(call, self.roles[call.index])
        if not any(self.roles[i].kind == "conv" for i in self.octave):
            convs = [f"{n}: {why}" for n, why in self.left.items() if isinstance(self.modules.get(n), nn.Conv2d)]
            why = f" ({'; '.join(convs[:4])}{'; …' if len(convs) > 4 else ''})" if convs else ": the model has none"
            raise PlanError(f"no convolution can become multi-scale{why}")
        self._list_rest()
        made = Octavized(self.steps, self.placed, self.tensors, set(self.model.state_dict()))
        for name, module in made.named_modules():
            # Plain containers are new.
            if type(module) is nn.Module and name in self.modules:
                module.training = self.modules[name].training
        made.training = self.model.training
        made.octave_layers, made.octave_left = self.layers, self.left
        sources = {name: self.origin.get(name, name) for name, _ in made.named_parameters()}
        made._scales = {name: scales[source] for name, source in sources.items() if source in scales}
        return made

    def _octave(self) -> set[int]:
        """Return the calls whose value has branches; not a sum with a plain side that no stem can produce."""
        stems = self._required_stems()
        multi_scale_stems: set[int] = set()
        while True:
            octave = self._propagate(multi_scale_stems)
            more = set(multi_scale_stems)
            for call in self.calls:
                if self.roles[call.index].kind == "sum" and octave.intersection(call.inputs):
                    more |= stems[call.index] or set()
            if more == multi_scale_stems:
                return octave
            multi_scale_stems = more

    def _required_stems(self) -> list[set[int] | None]:
        """For each call, the stem layers that must produce branches for it to have branches; None if it cannot."""
        needs: list[set[int] | None] = []
        for call in self.calls:
            kind, found = self.roles[call.index].kind, None
            if kind == "conv":
                found = {call.index} & self.stem
            elif kind in (*_PER_BRANCH, "sum"):
                parts = [needs[i] for i in call.inputs]
                found = None if None in parts else set().union(*parts)
            needs.append(found)
        return needs

    def _propagate(self, multi_scale_stems: set[int]) -> set[int]:
        octave: set[int] = set()
        for call in self.calls:
            kind = self.roles[call.index].kind
            makes = kind == "conv" and (call.index not in self.stem or call.index in multi_scale_stems)
            if makes or (kind in (*_PER_BRANCH, "sum") and octave.issuperset(call.inputs)):
                octave.add(call.index)
        return octave

    def _rewrite(self, call: Call, role: Role) -> None:
        if call.index in self.octave:
            source = call.inputs[0]
            if role.kind in ("conv", "depthwise", "norm", "prelu"):
                self._layer(call, role)
            elif role.kind == "sum":
                self._emit(call, Step(ops.add, tuple(Ref(self.step_of[i]) for i in call.inputs)))
            elif role.kind == "pool":
                self._emit(call, Step(ops.pool, kwargs={"feature": Ref(self.step_of[source]), **role.options}))
            else:
                self._each(call, ops.each)
        elif role.kind == "global" and call.inputs[0] in self.octave:
            self.left[call.label] = "global pooling: applied per branch, then concatenated"
            self._each(call, ops.pool_globally)
        else:
            self._leave(call, role)

    def _each(self, call: Call, by: Any) -> None:
        """Add a step that applies ``by`` with the function of this call to each branch."""
        feature = Ref(self.step_of[call.inputs[0]])
        kwargs = {key: False if key == "inplace" else value for key, value in call.kwargs.items()}
        rest = [arg for arg in call.args if not isinstance(arg, Ref)]
        if call.kind == "module":
            module = self._place(call.target)
            if hasattr(module, "inplace"):
                # A sum with an absent branch returns its other side, which may have other users.
                module.inplace = False
            self._emit(call, Step(by, (Attr(call.target), feature)))
            return
        called = (ops.call_method, feature, call.target) if call.kind == "method" else (call.target, feature)
        self._emit(call, Step(by, (*called, *rest), kwargs))

    def _leave(self, call: Call, role: Role) -> None:
        """Add the call unchanged, on plain tensors."""
        reasons = {"sum": "a sum with a plain tensor", "conv": "the stem: it reads the model's input"}
        why = "the model's output" if call.kind == "output" else reasons.get(role.kind, role.reason)
        whole = call.kind == "module" and (isinstance(self.modules[call.target], nn.Conv2d) or why == KEPT)
        if whole or self.octave.intersection(call.inputs):
            self.left[call.label if call.kind != "output" else "output"] = why or "its input has no branches"
        args, kwargs = self._filled(call.args), self._filled(call.kwargs)
        if call.kind == "module":
            self._place(call.target)
            step = Step(Attr(call.target), args, kwargs)
        elif call.kind == "attr":
            home, _, name = call.target.rpartition(".")
            self.tensors[call.target] = getattr(self.modules[home], name) if call.value is None else call.value
            step = Step(ops.identity, (Attr(call.target),))
        elif call.kind == "method":
            step = Step(ops.call_method, (args[0], call.target, *args[1:]), kwargs)
        elif call.kind == "output":
            step = Step(ops.identity, args)
        else:
            step = Step(call.target, args, kwargs)
        self._emit(call, step)

    def _filled(self, item: Any) -> Any:
        """Replace references to calls by references to steps that compute plain tensors."""
        return ops.map_leaves(item, lambda leaf: Ref(self._plain(leaf.index)) if isinstance(leaf, Ref) else leaf)

    def _plain(self, index: int) -> int:
        if index not in self.octave:
            return self.step_of[index]
        if index not in self.merge_of:
            self.steps.append(Step(ops.merge, (Ref(self.step_of[index]),)))
            self.merge_of[index] = len(self.steps)
        return self.merge_of[index]

    def _emit(self, call: Call, step: Step) -> None:
        self.steps.append(step)
        self.step_of[call.index] = len(self.steps)

    def _place(self, name: str) -> nn.Module:
        return self.placed.setdefault(name, self.modules[name])

    def _layer(self, call: Call, role: Role) -> None:
        """Add one layer for a convolution, norm and PReLU that form a chain, or for a part of such a chain."""
        chain = {role.kind: call}
        last = call
        for kind in ("norm", "prelu"):
            after = last.users[0] if len(last.users) == 1 else None
            if after is not None and self.roles[after].kind == kind and kind not in chain and "prelu" not in chain:
                last = chain[kind] = self.calls[after]
        name = call.target
        inputs = self.calls[call.inputs[0]]
        ins = split_channels(inputs.shape[1], self.split) if inputs.index in self.octave else [inputs.shape[1]]
        outs = split_channels(call.shape[1], self.split)
        conv = self.modules[name] if role.kind in ("conv", "depthwise") else None
        bias = conv.bias if role.kind == "conv" else None
        layer = OctaveLayer(
            mix=self._mix(name, conv, ins, outs) if role.kind == "conv" else None,
            convs=self._sliced(name, "convs", name, outs) if role.kind == "depthwise" else None,
            stride=conv.stride[0] if conv is not None else 1,
            norms=self._sliced(name, "norms", chain["norm"].target, outs, bias) if "norm" in chain else None,
            acts=self._sliced(name, "acts", chain["prelu"].target, outs) if "prelu" in chain else None,
        )
        for container in (layer, layer.mix, layer.convs, layer.norms, layer.acts):
            if container is not None:
                container.training = self.modules[name].training
        self.placed[name] = layer
        self.layers.append(name)
        self._emit(call, Step(Attr(name), (Ref(self.step_of[inputs.index]),)))
        for fused in chain.values():
            self.step_of[fused.index] = self.step_of[call.index]

    def _mix(self, name: str, conv: nn.Conv2d, ins: Sequence[int], outs: Sequence[int]) -> GOctConv:
        with torch.device("meta"):
            # Do not draw random numbers for weights that are replaced.
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
        """Return a copy of a module, with its slice of each tensor, for each branch with channels."""
        module, found = self.modules[name], {}
        if bias is not None and module.running_mean is not None:
            module.running_mean -= bias.detach()  # of the convolution before the norm
        for b, count in enumerate(channels):
            if not count:
                continue
            branch = found[str(b)] = copy.deepcopy(module)
            for part, tensor in [*module.named_parameters(), *module.named_buffers()]:
                # Not the single slope of a PReLU, nor num_batches_tracked.
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
        """List what was dropped: parameters that no forward uses, and hooks of modules that no longer exist."""
        used = {call.target for call in self.calls if call.kind in ("module", "attr")}
        above = tuple(f"{name}." for name in used)
        for name, module in self.modules.items():
            held = [f"{name}.{part}".removeprefix(".") for part, _ in module.named_parameters(recurse=False)]
            lost = [part for part in held if part not in used] if name not in used else []
            if lost and not name.startswith(above):
                self.left[name or lost[0]] = "never called, so it was dropped"
            elif (module._forward_hooks or module._forward_pre_hooks) and not (name in used or name.startswith(above)):
                self.left[name or "the model"] = "its hooks were dropped, since it is not a module of the result"


def _part(tensor: Tensor, axis: int, channels: Sequence[int], branch: int) -> Tensor:
    """Return the slice of a tensor that belongs to a branch; a parameter if the tensor is one."""
    part = tensor.detach().split(list(channels), axis)[branch].clone()
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
