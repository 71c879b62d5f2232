"""Faster training steps by replaced forwards, within ``with``; parameters, state and gradients stay on the modules.

Groups, decays, optimizers and checkpoints are not affected. Why these optimizations: docs/design/training.md.
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
from prunekit.utils.copying import kept_modes
from prunekit.utils.text import first_line

Forward = Callable[[Tensor], Tensor]
Say = Callable[[str], None]


@contextmanager
def fast_steps(model: nn.Module, groups: Sequence[Group], config: Training, say: Say) -> Iterator[Forward]:
    """Yield an equivalent, faster forward of a model for training.

    In evaluation mode, for unsupported modules and without a C++ compiler, modules compute as usual.

    Args:
        model: on its training device.
        groups: of the model; they name the PReLUs that are the only readers of a norm.
        config: ``fast`` and ``compile`` select the optimizations.
        say: receives a message for each optimization that is not available.
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
            stack.enter_context(_replaced_forwards(_pointwise_forwards(model)))
            library = load()
            if isinstance(library, NoKernels):
                say(f"training without the kernels for CPUs: {library}")
            else:
                kernels.enter_context(_replaced_forwards(_kernel_forwards(model, groups)))
        # The kernels return channels-last tensors, so a model that refuses these trains without the kernels.
        yield channels_last(model, model, say, kernels.close)


def channels_last(
    forward: Forward, model: nn.Module, say: Say, on_refusal: Callable[[], None] = lambda: None
) -> Forward:
    """Return the forward of a model with channels-last images.

    A model that takes views of its features may refuse these; then ``on_refusal`` is called and images are unchanged.
    """
    refused: bool | None = None

    def run(images: Tensor) -> Tensor:
        nonlocal refused
        if refused is None:
            refused = _refuses_channels_last(model, images[:2], say)
            if refused:
                on_refusal()
        return forward(images if refused else images.contiguous(memory_format=torch.channels_last))

    return run


@torch.no_grad()
def _refuses_channels_last(model: nn.Module, images: Tensor, say: Say) -> bool:
    # In evaluation mode: a failing forward in train mode would change statistics and random generators, and a resumed
    # training would change them once more than an uninterrupted one.
    with kept_modes(model):
        model.eval()
        try:
            model(images.contiguous(memory_format=torch.channels_last))
        except RuntimeError as error:
            # Other errors are raised again by the training forward.
            if "view" in str(error):
                say(f"training without channels-last, which the model refuses ({first_line(error)})")
                return True
    return False


class _Compiled:
    """The model through ``torch.compile``, on an accelerator with CUDA graphs; uncompiled if that fails."""

    def __init__(self, model: nn.Module, on_cpu: bool, say: Say):
        self.model, self.say = model, say
        mode = "default" if on_cpu else "reduce-overhead"
        # Compiled again for each image size: code for any size, which PyTorch makes at the second one, is slower, and
        # a training that resumes at that size would compute with other code.
        self.forward: Forward | None = torch.compile(model, mode=mode, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        if self.forward is None:
            return self.model(images)
        try:
            torch.compiler.cudagraph_mark_step_begin()
            return self.forward(images)
        except Exception as error:  # compilers raise many types
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.say(f"train.compile: the model does not compile ({first_line(error)[:200]}); training without")
            self.forward = None
            return self.model(images)


def _pointwise_forwards(model: nn.Module) -> dict[nn.Module, Forward]:
    """Return forwards of strided 1×1 convolutions that subsample first, which is equivalent.

    Otherwise oneDNN's backward writes out of bounds for channels-last features with fewer than 8 channels and even
    sides (seen with PyTorch 2.13).
    """

    def forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
        down, across = conv.stride
        return F.conv2d(x[..., ::down, ::across], conv.weight, conv.bias, groups=conv.groups)

    return {
        module: functools.partial(forward, module)
        for module in model.modules()
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid")
        if max(module.stride) > 1
    }


def _kernel_forwards(model: nn.Module, groups: Sequence[Group]) -> dict[nn.Module, Forward]:
    """Return forwards through the kernels for the modules that they support."""
    modules = dict(model.named_modules())
    activations = {gate.norm: modules.get(gate.activation or "") for group in groups for gate in group.gates}
    forwards: dict[nn.Module, Forward] = {}
    for name, module in modules.items():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and module.momentum:
            act = activations.get(name)
            act = act if type(act) is nn.PReLU and act not in forwards and not module._forward_hooks else None
            pair = _NormAct(module, act)
            forwards[module] = pair.norm_forward
            if act is not None:
                forwards[act] = pair.act_forward
    paths = {m for holder in modules.values() if isinstance(holder, DepthwiseModules) for m in holder.values()}
    for module in modules.values():
        if type(module) is nn.Conv2d and (module in paths or module.groups > 1) and _is_depthwise(module):
            forwards[module] = functools.partial(_depthwise_forward, module)
    return forwards


@contextmanager
def _replaced_forwards(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Set these forwards on modules whose forward nobody else has replaced; remove them at the end."""
    modules = [module for module in forwards if "forward" not in vars(module)]
    for module in modules:
        module.forward = forwards[module]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def sync_batch_norms(model: nn.Module) -> Iterator[None]:
    """Within ``with``, norms in train mode use the statistics of all processes, as ``SyncBatchNorm``; on GPUs.

    The modules themselves are unchanged, so that groups, decays and checkpoints are not affected.
    """

    def synced_forward(norm: nn.modules.batchnorm._BatchNorm) -> Forward:
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(norm).train()
        return lambda x: synced(x) if norm.training else type(norm).forward(norm, x)

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with _replaced_forwards({norm: synced_forward(norm) for norm in norms}):
        yield


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.bias is None
        and conv.padding_mode == "zeros"
    )


@dataclass
class _NormAct:
    """A norm and the PReLU that follows it, computed together in the norm's forward; or a norm alone."""

    norm: nn.BatchNorm2d
    act: nn.PReLU | None
    last: Tensor | None = None

    def norm_forward(self, x: Tensor) -> Tensor:
        norm, act = self.norm, self.act
        same_dtype = x.dtype == norm.weight.dtype and (act is None or act.weight.dtype == x.dtype)
        # PyTorch raises an error for one value per channel.
        if not norm.training or not usable(x) or not same_dtype or x.numel() == x.shape[1]:
            return nn.BatchNorm2d.forward(norm, x)
        norm.num_batches_tracked.add_(1)
        y, means = norm_act(x, norm, None if act is None else act.weight)
        y.channel_means = means
        self.last = y
        return y

    def act_forward(self, x: Tensor) -> Tensor:
        last, self.last = self.last, None
        return x if x is last else nn.PReLU.forward(self.act, x)


def _depthwise_forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not conv.training or not usable(x) or x.dtype != conv.weight.dtype:
        return nn.Conv2d.forward(conv, x)
    return depthwise(x, conv.weight)


# Parameters of glibc's mallopt, and their defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_MALLOC_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}
_MALLOC_REUSE = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


@contextmanager
def reuse_memory() -> Iterator[None]:
    """Within ``with``, keep freed memory for later allocations, where glibc would return it to the system.

    Zeroing fresh pages costs more than computing on them. No effect with other C libraries.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    is_glibc = libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if is_glibc:
        for key, value in _MALLOC_REUSE.items():
            libc.mallopt(key, value)
    try:
        yield
    finally:
        if is_glibc:
            for key, value in _MALLOC_DEFAULTS.items():
                libc.mallopt(key, value)
            libc.malloc_trim(0)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Within ``with``, treat subnormal numbers as zero in every thread.

    PyTorch sets the processor's flag only for the calling thread. New threads inherit it, so OpenMP's are restarted.
    """
    torch.set_flush_denormal(True)
    _restart_threads()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        _restart_threads()


def _restart_threads() -> None:
    """End the threads of OpenMP; the next parallel loop starts new ones."""
    try:
        pause = ctypes.CDLL("libgomp.so.1" if sys.platform == "linux" else None).omp_pause_resource_all
    except (OSError, AttributeError, TypeError):
        return
    pause(_OMP_PAUSE_HARD)


_OMP_PAUSE_HARD = 2  # of OpenMP 5.0
