"""Classifies each call of a traced network: it runs per branch, becomes a gOctConv, or needs one tensor, and why."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from prunekit.layers.octave_ops import Ref, refs
from prunekit.layers.octave_trace import Call, kept

_EACH_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Sigmoid, nn.Tanh, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_EACH_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.softplus, F.softsign, F.logsigmoid, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh,
    F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout, torch.clamp,
    # With a number; of two features it is a sum.
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div,
}  # fmt: skip
_EACH_METHODS = {"relu", "sigmoid", "tanh", "clamp", "contiguous", "clone", "add", "sub", "mul", "div"}
_COMMUTES = (operator.add, operator.mul)
_SUMS = (operator.add, operator.iadd, torch.add, "add")
_POOLS: dict[Any, tuple[Callable[..., Any], tuple[str, ...]]] = {
    F.max_pool2d: (F.max_pool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    torch.max_pool2d: (F.max_pool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    F.avg_pool2d: (
        F.avg_pool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
}  # fmt: skip
_POOL_MODULES = {nn.MaxPool2d: F.max_pool2d, nn.AvgPool2d: F.avg_pool2d}
KEPT = "named in keep"
_ONE_TENSOR = "it needs all channels in one tensor"


@dataclass
class Role:
    """How a call treats a multi-scale feature."""

    # "conv", "depthwise", "norm", "prelu", "each" (elementwise or channelwise), "sum", "pool", "global" or "other"
    kind: str
    reason: str = ""  # why the kind is "other"
    options: dict[str, Any] = field(default_factory=dict)  # for "pool": the arguments of ``octave_ops.pool``


def roles(calls: Sequence[Call], modules: Mapping[str, nn.Module], keep: Sequence[str]) -> tuple[list[Role], set[int]]:
    """Return the role of each call, and the indices of the stem. Modules that match ``keep`` stay unchanged."""
    classifier = _Classifier(calls, modules, keep)
    return [classifier.role(call) for call in calls], classifier.stem


class _Classifier:
    def __init__(self, calls: Sequence[Call], modules: Mapping[str, nn.Module], keep: Sequence[str]):
        self.calls, self.modules, self.keep = calls, modules, keep
        self.count = Counter(call.target for call in calls if call.kind in ("module", "attr"))
        self.owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
        self.stem = stem_of(calls, modules)
        self.head = head_of(calls, modules)

    def role(self, call: Call) -> Role:
        if call.kind == "module":
            return self._module(call)
        if call.kind not in ("function", "method") or call.shape is None or len(call.shape) != 4:
            # A mean over height and width may drop these axes.
            return self._global(call) or Role("other", _ONE_TENSOR)
        features = [i for i in call.inputs if len(self.calls[i].shape or ()) == 4]
        if call.target in _SUMS and len(features) == 2 and len(call.args) == 2 and not call.kwargs:
            a, b = (self.calls[i].shape for i in features)
            return Role("sum") if a == b else Role("other", f"a sum of the different shapes {a} and {b}")
        found = self._global(call) or self._pool(call)
        if found:
            return found
        known = call.target in (_EACH_FUNCTIONS if call.kind == "function" else _EACH_METHODS)
        # The feature must come first, unless the operation commutes, and be the only tensor.
        first = bool(call.args) and (isinstance(call.args[0], Ref) or call.target in _COMMUTES)
        rest = [arg for arg in call.args if not isinstance(arg, Ref)]
        if known and first and len(rest) == len(call.args) - 1 and not refs((rest, call.kwargs)) and features:
            return Role("each")
        return Role("other", _ONE_TENSOR)

    def _module(self, call: Call) -> Role:
        module = self.modules[call.target]
        weighs = isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.PReLU)
        why = self._whole(call.target, module)
        kind = type(module)
        if kind is nn.Conv2d and not why:
            why = self._convolution(call, module)
            if not why:
                return Role("depthwise" if module.groups > 1 else "conv")
        if why or kind not in (nn.BatchNorm2d, nn.PReLU, nn.AdaptiveAvgPool2d, *_POOL_MODULES, *_EACH_MODULES):
            return Role("other", why or (f"an unsupported {kind.__name__}" if weighs else _ONE_TENSOR))
        if len(self.calls[call.inputs[0]].shape or ()) != 4:
            return Role("other", _ONE_TENSOR)
        if kind in _POOL_MODULES:
            return _pooling(_POOL_MODULES[kind], {n: getattr(module, n) for n in _POOLS[_POOL_MODULES[kind]][1]})
        if kind is nn.AdaptiveAvgPool2d:
            return Role("global") if _fixed(module.output_size) else Role("other", _ONE_TENSOR)
        return Role({nn.BatchNorm2d: "norm", nn.PReLU: "prelu"}.get(kind, "each"))

    def _whole(self, name: str, module: nn.Module) -> str:
        """Return why the module must stay unchanged, or "" if it need not."""
        parameters = dict(module.named_parameters())
        shared = any(self.owners[id(p)] > 1 or self.count[f"{name}.{part}"] for part, p in parameters.items())
        reasons = {
            KEPT: kept(name, self.keep),
            "it is called more than once": parameters and self.count[name] > 1,
            "its weight is computed (a parametrization)": parameters and parametrize.is_parametrized(module),
            "it has hooks": module._forward_hooks or module._forward_pre_hooks,
            "its weight is used elsewhere too": shared,
        }
        return next((why for why, applies in reasons.items() if applies), "")

    def _convolution(self, call: Call, conv: nn.Conv2d) -> str:
        """Return why the convolution cannot become multi-scale, or "" if it can."""
        (kernel, *sides), (stride, *strides) = conv.kernel_size, conv.stride
        alone = conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels
        wanted = tuple(kernel // 2 * d for d in conv.dilation)
        fitting = (wanted, "same", "valid") if kernel * max(conv.dilation) == 1 else (wanted, "same")
        reasons = {
            "the head: it computes the model's output": call.index in self.head,
            "its input is not a batch of images": len(call.shape or ()) != 4,
            f"it has {conv.groups} groups": conv.groups > 1 and not alone,
            f"its kernel is {conv.kernel_size} with stride {conv.stride}, not an odd square with one stride": (
                kernel % 2 == 0 or [kernel] != sides or [stride] != strides
            ),
            f"its dilation is {conv.dilation}": not alone and conv.dilation != (1, 1),
            f"its padding is {conv.padding}, but only {wanted} keeps the branch sizes consistent": (
                conv.padding not in fitting
            ),
            f"its padding mode is {conv.padding_mode!r}, not zeros": conv.padding_mode != "zeros",
            "it has a bias and no following norm that could absorb it": (
                not alone and conv.bias is not None and self.following_norm(call) is None
            ),
        }
        return next((why for why, applies in reasons.items() if applies), "")

    def following_norm(self, call: Call) -> Call | None:
        """Return the BatchNorm that is the only user of this call and can be rewritten."""
        after = self.calls[call.users[0]] if len(call.users) == 1 else None
        if after is None or after.kind != "module" or type(self.modules[after.target]) is not nn.BatchNorm2d:
            return None
        return None if self._whole(after.target, self.modules[after.target]) else after

    def _pool(self, call: Call) -> Role | None:
        function, names = _POOLS.get(call.target, (None, ()))
        if function is None or refs((call.args[1:], call.kwargs)) or len(call.args) > len(names) + 1:
            return None
        options = {"stride": None, "padding": 0, "ceil_mode": False}
        return _pooling(function, options | dict(zip(names, call.args[1:], strict=False)) | call.kwargs)

    def _global(self, call: Call) -> Role | None:
        source = self.calls[call.inputs[0]] if len(call.inputs) == 1 else None
        if source is None or len(source.shape or ()) != 4 or not call.args:
            return None
        if call.kind == "function" and call.target is F.adaptive_avg_pool2d:
            size = call.args[1] if len(call.args) > 1 else call.kwargs.get("output_size")
            return Role("global") if _fixed(size) else None
        if (call.kind, call.target) in (("function", torch.mean), ("method", "mean")):
            axes = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
            if isinstance(axes, tuple | list) and sorted(axis % 4 for axis in axes) == [2, 3]:
                return Role("global")
        return None


def _pooling(function: Callable[..., Any], options: dict[str, Any]) -> Role:
    """Return the role of a pooling: "pool" if it keeps the branch sizes consistent, else "other"."""
    options = dict(options)
    kernel, padding = options["kernel_size"], options["padding"]
    stride = options["stride"] or kernel
    square = [side[0] if isinstance(side, tuple | list) and len(set(side)) == 1 else side
              for side in (kernel, stride, padding)]  # fmt: skip
    k, s, p = square
    plain = all(isinstance(side, int) for side in square) and options.get("dilation", 1) in (1, (1, 1), [1, 1])
    if plain and not options.pop("return_indices", False):
        centered = k % 2 == 1 and p == k // 2 and not options["ceil_mode"]
        if centered or (k == s and p == 0):
            floor = not centered and not options["ceil_mode"]
            return Role("pool", options={"function": function, **options, "stride": s, "floor": floor})
    return Role(
        "other",
        f"its window (kernel {kernel}, stride {stride}, padding {padding}) does not keep the branch sizes consistent",
    )


def stem_of(calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> set[int]:
    """Return the first layers with weights: those that the input reaches through no other such layer."""
    before, found = {0}, set()
    for call in calls[1:]:
        if before.intersection(call.inputs):
            (found if _mixes(call, modules) else before).add(call.index)
    return found


def head_of(calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> set[int]:
    """Return the last layers with weights: those that reach the output through no other such layer and no sum."""
    found, waiting = set(), list(calls[-1].inputs)
    while waiting:
        call = calls[waiting.pop()]
        if _mixes(call, modules):
            found.add(call.index)
        elif not (call.target in _SUMS and len(call.inputs) > 1):
            waiting += call.inputs
    return found


def _mixes(call: Call, modules: Mapping[str, nn.Module]) -> bool:
    return call.kind == "module" and any(p.dim() > 1 for p in modules[call.target].parameters())


def _fixed(size: Any) -> bool:
    return isinstance(size, int) or (isinstance(size, tuple | list) and all(isinstance(side, int) for side in size))
