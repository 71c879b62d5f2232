"""The same training step in less time, for the while of a ``with``; parameters, state and gradients stay where they
are, so that groups, decays, optimisers and checkpoints notice nothing.

What a step of CSNet costs on a CPU is memory, not arithmetic. So features lie channels-last; a norm and the PReLU
behind it, and depthwise convolutions, go through kernels of our own that touch every number as rarely as they can; and
the memory of one step is kept for the next instead of being asked for page by page again.

Forwards are set on the modules themselves and taken off at the end. In evaluation mode, for what the kernels do not
take, and where they cannot be compiled, a module computes as ever.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.config.schema import Training
from prunekit.layers.optional import DepthwiseModules
from prunekit.native.library import NoKernels, load
from prunekit.native.ops import depthwise, norm_act, usable
from prunekit.pruning.plan import Group

Forward = Callable[[Tensor], Tensor]


@contextmanager
def fast_steps(
    model: nn.Module, groups: Sequence[Group], config: Training, say: Callable[[str], None]
) -> Iterator[Forward]:
    """Within ``with``, a forward that does what the model does, faster.

    Args:
        model: on the device on which it is trained.
        groups: of the model; they tell which PReLU takes what a norm puts out, and nothing else does.
        config: its ``fast`` and ``compile`` select what is done.
        say: takes a line where something that would make it faster cannot be had.
    """
    with ExitStack() as stack, ExitStack() as kernels:
        first = next(model.parameters(), None)
        on_cpu = first is not None and first.device.type == "cpu"
        if config.fast and on_cpu:
            stack.enter_context(reuse_memory())
        if config.compile:
            compiled = _Compiled(model, on_cpu, say)
            yield compiled if on_cpu else channels_last(compiled, model, say)
            return
        if not config.fast:
            yield model
            return
        if on_cpu:
            stack.enter_context(_replaced(_thinned(model)))
            why = load()
            if isinstance(why, NoKernels):
                say(f"training without the kernels for CPUs: {why}")
            else:
                kernels.enter_context(_replaced(_kernels(model, groups)))
        # What the kernels give lies channels-last too.
        yield channels_last(model, model, say, kernels.close)


def channels_last(
    forward: Forward, model: nn.Module, say: Callable[[str], None], without: Callable[[], None] = lambda: None
) -> Forward:
    """The forward of this model, given its images in this format; convolutions pass it on. A model that takes views of
    its features may refuse it; then ``without`` is called."""
    refused: bool | None = None

    def run(images: Tensor) -> Tensor:
        nonlocal refused
        if refused is None:
            refused = _refuses(model, images[:2], say)
            if refused:
                without()
        return forward(images if refused else images.contiguous(memory_format=torch.channels_last))

    return run


@torch.no_grad()
def _refuses(model: nn.Module, images: Tensor, say: Callable[[str], None]) -> bool:
    """Asked in evaluation mode: a forward in train mode that breaks off half-way has moved statistics and random
    generators, and a training that goes on from a state would move them once more than one that was never stopped."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        # All others come again where they belong.
        if "view" in str(error):
            say(f"training without channels-last, which the model refuses ({str(error).splitlines()[0]})")
            return True
    finally:
        for module, mode in modes.items():
            module.training = mode
    return False


class _Compiled:
    """The model through ``torch.compile``; on an accelerator with CUDA graphs, since a step there is bound by the
    launches of its hundreds of small kernels. What cannot be compiled runs as it is, with a word."""

    def __init__(self, model: nn.Module, on_cpu: bool, say: Callable[[str], None]):
        self.model, self.say = model, say
        self.forward: Forward | None = torch.compile(model, mode="default" if on_cpu else "reduce-overhead")

    def __call__(self, images: Tensor) -> Tensor:
        if self.forward is None:
            return self.model(images)
        try:
            torch.compiler.cudagraph_mark_step_begin()
            return self.forward(images)
        except Exception as error:  # The compiler's are of many kinds, and none of them is the model's fault.
            if isinstance(error, torch.OutOfMemoryError):
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.say(f"train.compile: the model does not compile ({said[:200]}); it trains without")
            self.forward = None
            return self.model(images)


def _thinned(model: nn.Module) -> dict[nn.Module, Forward]:
    """Forwards of the 1×1 convolutions with a stride: they take every so many-th pixel first, which is the same.

    As they are, oneDNN's backward writes past its memory where features lie channels-last, channels are few (below 8)
    and sides even (seen with PyTorch 2.13).
    """

    def thinned(conv: nn.Conv2d, x: Tensor) -> Tensor:
        down, across = conv.stride
        return F.conv2d(x[..., ::down, ::across], conv.weight, conv.bias, groups=conv.groups)

    return {
        module: functools.partial(thinned, module)
        for module in model.modules()
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid")
        if max(module.stride) > 1
    }


def _kernels(model: nn.Module, groups: Sequence[Group]) -> dict[nn.Module, Forward]:
    """Forwards through the kernels, for the modules that they know."""
    modules = dict(model.named_modules())
    behind = {gate.norm: modules.get(gate.activation or "") for group in groups for gate in group.gates}
    taken: dict[nn.Module, Forward] = {}
    for name, module in modules.items():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and module.momentum:
            act = behind.get(name)
            act = act if type(act) is nn.PReLU and act not in taken and not module._forward_hooks else None
            pair = _Pair(module, act)
            taken[module] = pair.normed
            if act is not None:
                taken[act] = pair.activated
    inside = {m for holder in modules.values() if isinstance(holder, DepthwiseModules) for m in holder.values()}
    for module in modules.values():
        if type(module) is nn.Conv2d and (module in inside or module.groups > 1) and _is_depthwise(module):
            taken[module] = _Depthwise(module).forward
    return taken


@contextmanager
def _replaced(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Set these forwards, but for modules that somebody has changed already, and take them off again."""
    taken = [module for module in forwards if "forward" not in vars(module)]
    for module in taken:
        module.forward = forwards[module]
    try:
        yield
    finally:
        for module in taken:
            del module.forward


@contextmanager
def sync_batch_norms(model: nn.Module) -> Iterator[None]:
    """Within ``with``, norms in train mode take mean and variance over the batches of all processes; on GPUs.

    Each has the forward of a ``SyncBatchNorm`` with its own parameters and statistics; the modules stay what they are,
    so that groups, decays and whatever is saved do not know of it.
    """

    def synced(norm: nn.modules.batchnorm._BatchNorm) -> Forward:
        over_all = nn.SyncBatchNorm.convert_sync_batchnorm(norm).train()
        return lambda x: over_all(x) if norm.training else type(norm).forward(norm, x)

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with _replaced({norm: synced(norm) for norm in norms}):
        yield


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.bias is None
        and conv.padding_mode == "zeros"
    )


@dataclass
class _Pair:
    """A norm and the PReLU behind it, or a norm alone."""

    norm: nn.BatchNorm2d
    act: nn.PReLU | None
    last: Tensor | None = None

    def normed(self, x: Tensor) -> Tensor:
        norm, act = self.norm, self.act
        alike = x.dtype == norm.weight.dtype and (act is None or act.weight.dtype == x.dtype)
        # One number a channel has no deviation, and PyTorch says so.
        if not norm.training or not usable(x) or not alike or x.numel() == x.shape[1]:
            return nn.BatchNorm2d.forward(norm, x)
        norm.num_batches_tracked.add_(1)
        y, means = norm_act(x, norm, None if act is None else act.weight)
        y.channel_means = means
        self.last = y
        return y

    def activated(self, x: Tensor) -> Tensor:
        last, self.last = self.last, None
        return x if x is last else nn.PReLU.forward(self.act, x)


@dataclass
class _Depthwise:
    conv: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        if not self.conv.training or not usable(x) or x.dtype != self.conv.weight.dtype:
            return nn.Conv2d.forward(self.conv, x)
        return depthwise(x, self.conv.weight)


# glibc's numbers for mallopt, and its own defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


@contextmanager
def reuse_memory() -> Iterator[None]:
    """Keep freed memory for the next request, which glibc hands back to the system where it is large.

    Every feature of every step would come in pages that the system has to clear: a sum of two features takes 48 ms
    instead of 7. Nothing happens where the C library is another.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    known = libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if known:
        for key, value in _KEEPING.items():
            libc.mallopt(key, value)
    try:
        yield
    finally:
        if known:
            for key, value in _DEFAULTS.items():
                libc.mallopt(key, value)
            libc.malloc_trim(0)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Take subnormal numbers for zero, in every thread that computes.

    A processor's flag for it belongs to a thread, and PyTorch sets it for the calling one alone. New threads inherit
    it, so the others are ended and come again when they are needed.
    """
    torch.set_flush_denormal(True)
    _renew_threads()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        _renew_threads()


def _renew_threads() -> None:
    """End the threads of OpenMP; the next parallel loop starts new ones. Nothing where it knows no such call."""
    try:
        pause = ctypes.CDLL("libgomp.so.1" if sys.platform == "linux" else None).omp_pause_resource_all
    except (OSError, AttributeError, TypeError):
        return
    pause(_PAUSE_HARD)


_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0
