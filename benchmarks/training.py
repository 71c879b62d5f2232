"""A training step of prunekit beside the straightforward loop: how much faster, and where the time of either goes.

    python benchmarks/training.py                 # CSNet ×2, 224 × 224, batch 24: the tables in README.md; ten minutes
    python benchmarks/training.py --json
    python benchmarks/training.py --width 10 --size 32 --batch 4 --rounds 1        # seconds

The straightforward loop is written here, without what prunekit trains with: contiguous features, one convolution for
each path, PyTorch's own norms and PReLUs, a hook and a term of the penalty for each norm. Both compute the same, in
float32, and are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from prunekit.backbones.csnet import csnet
from prunekit.config.schema import Training
from prunekit.data.augment import crop_flip
from prunekit.data.cache import cached_tensors
from prunekit.data.datasets import MaskDataset, normalize
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.training.acceleration import fast_steps, flush_denormals

WEIGHT = 1e-2
KINDS = {
    "convolution, forward": ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "aten::thnn_conv2d"),
    "convolution, backward": ("aten::convolution_backward",),
    "norm and PReLU, forward": ("aten::native_batch_norm", "aten::_prelu_kernel", "_NormAct"),
    "norm and PReLU, backward": (
        "aten::native_batch_norm_backward",
        "aten::_prelu_kernel_backward",
        "_NormActBackward",
    ),
    "up-sampling": ("aten::upsample_bilinear2d", "aten::upsample_bilinear2d_backward"),
    "pooling": (
        "aten::max_pool2d_with_indices",
        "aten::max_pool2d_with_indices_backward",
        "aten::avg_pool2d",
        "aten::avg_pool2d_backward",
    ),
    "depthwise, forward": ("_Depthwise",),
    "depthwise, backward": ("_DepthwiseBackward",),
    "sums and means": ("aten::sum", "aten::mean", "aten::add", "aten::add_", "aten::abs"),
}


class Case:
    """One model under training, and batches for it."""

    def __init__(self, width: int, size: int, batch: int, seed: int = 0):
        torch.manual_seed(seed)
        self.model = csnet(width).train()
        self.groups: list[Group] = find_groups(self.model, torch.zeros(1, 3, size, size))
        self.images = torch.randn(batch, 3, size, size)
        self.masks = (torch.rand(batch, 1, size, size) > 0.5).float()


class LayerByLayer:
    """Dynamic weight decay as one would write it: a hook on each activation, a term of the penalty for each norm."""

    def __init__(self, model: nn.Module, groups: list[Group]):
        pairs = {gate.norm: gate.activation for group in groups if group.reason is None for gate in group.gates}
        self.terms: list[Tensor] = []
        self.hooks = [
            model.get_submodule(act).register_forward_hook(self._hook(model.get_submodule(norm)))
            for norm, act in pairs.items()
        ]

    def _hook(self, norm: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, y: Tensor) -> None:
            response = y.detach().mean((2, 3)).abs().mean(0)
            self.terms.append(0.5 * WEIGHT * (response * norm.weight**2).sum())

        return hook

    def penalty(self) -> Tensor:
        terms, self.terms = self.terms, []
        return sum(terms)


@contextmanager
def straightforward(case: Case) -> Iterator[Callable[[], float]]:
    """The loop that one writes first; gives its step, which gives the loss."""
    decay = LayerByLayer(case.model, case.groups)
    optimizer = torch.optim.Adam(case.model.parameters(), 1e-4)

    def step() -> float:
        loss = F.binary_cross_entropy_with_logits(case.model(case.images), case.masks) + decay.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    yield step
    for hook in decay.hooks:
        hook.remove()


@contextmanager
def ours(case: Case, compiled: bool = False) -> Iterator[Callable[[], float]]:
    """The step as ``prunekit run`` takes it."""
    section = Training(epochs=1, compile=compiled)
    optimizer = torch.optim.Adam(case.model.parameters(), 1e-4, fused=True)
    decay = DynamicWeightDecay(case.model, case.groups, WEIGHT)
    with decay, fast_steps(case.model, case.groups, section, print) as forward:

        def step() -> float:
            loss = F.binary_cross_entropy_with_logits(forward(case.images), case.masks) + decay.penalty()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        yield step


def timed(step: Callable[[], Any], times: int) -> list[float]:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return found


def race(
    ways: dict[str, Callable[[], Any]], rounds: int, times: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of each way's steps, in turns, and the shares of one more step at the end. A way's first step in each
    round is not counted: ours asks the system for memory in it, the others do so in every step."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    profiles = {}
    for number in range(rounds):
        for name, way in ways.items():
            with way() as step:
                step()
                seconds[name] += timed(step, times)
                if number == rounds - 1:
                    profiles[name] = shares(step)
    return seconds, profiles


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one step by what takes them."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        step()
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    found = dict.fromkeys([*KINDS, "optimiser", "all else"], 0.0)
    for event in record.key_averages(group_by_input_shape=True):
        kind = kinds.get(event.key)
        if kind is None:
            kind = "optimiser" if "adam" in event.key.lower() or "_foreach" in event.key else "all else"
        elif kind.startswith("convolution") and len(event.input_shapes) > 2:
            weight = event.input_shapes[2 if "backward" in event.key else 1]
            if weight and weight[1] == 1 < weight[0]:
                kind = kind.replace("convolution", "depthwise")
        found[kind] += event.self_cpu_time_total / 1e6
    return found


class Drawn(MaskDataset):
    """Pictures of files that are drawn instead of read, so that nothing has to lie on a disk but their names."""

    def __init__(self, folder: Path, count: int, size: int):
        super().__init__([f"{index:05d}" for index in range(count)])
        self.folder, self.size = folder, size
        for name in self.names:
            (folder / name).touch()

    def image(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (self.size, self.size, 3), generator=generator, dtype=torch.uint8).numpy()

    def mask(self, index: int) -> Any:
        return self.image(index)[..., 0]

    def files(self, index: int) -> list[Path]:
        return [self.folder / self.names[index]]


def pipeline(size: int, batch: int, batches: int, rounds: int) -> dict[str, float]:
    """Seconds a batch that the data takes from the mapped file to what the model sees, from the second epoch on."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        cached_tensors(Drawn(pictures, batch * batches, size), size, Path(folder) / "kept", print)
        tensors = cached_tensors(Drawn(pictures, batch * batches, size), size, Path(folder) / "kept", print)
        generator = torch.Generator().manual_seed(0)
        seconds: list[float] = []
        for epoch in range(rounds + 1):
            order = torch.randperm(len(tensors), generator=generator)
            for rows in order.split(batch):
                began = time.perf_counter()
                drawn = tensors.images[rows], tensors.targets[rows], tensors.sizes[rows]
                images, _ = crop_flip(*drawn, generator)
                normalize(images).contiguous(memory_format=torch.channels_last)
                if epoch:
                    seconds.append(time.perf_counter() - began)
        return {"batch": statistics.median(seconds)}


def dying(width: int, size: int, batch: int, protected: bool, times: int) -> dict[str, float]:
    """Seconds a step while most gates stand at a value on their way to zero."""
    case = Case(width, size, batch)
    gates = [m.weight for m in case.model.modules() if isinstance(m, nn.BatchNorm2d)]
    biases = [m.bias for m in case.model.modules() if isinstance(m, nn.BatchNorm2d)]
    found = {}
    with ExitStack() as stack:
        stack.enter_context(flush_denormals() if protected else nullcontext())
        step = stack.enter_context(ours(case))
        for value in (1.0, 1e-20, 1e-36, 1e-38, 1e-39, 1e-40, 1e-41, 1e-42, 0.0):
            seconds = []
            for _ in range(times + 1):
                with torch.no_grad():
                    for gate, bias in zip(gates, biases, strict=True):
                        gate[: len(gate) * 3 // 4] = value
                        bias[: len(gate) * 3 // 4] = value / 2
                seconds += timed(step, 1)
            found[f"{value:g}"] = statistics.median(seconds[1:])
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--times", type=int, default=1, help="steps timed in each round")
    parser.add_argument("--compile", action="store_true", help="also through torch.compile, which takes minutes first")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    case = Case(options.width, options.size, options.batch)
    ways: dict[str, Any] = {"straightforward": lambda: straightforward(case), "ours": lambda: ours(case)}
    if options.compile:
        ways["torch.compile"] = lambda: ours(case, compiled=True)
    seconds, profiles = race(ways, options.rounds, options.times)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    data = pipeline(options.size, options.batch, 8, options.rounds)
    small = max(8, options.width // 2), max(32, options.size // 2), max(2, options.batch // 3)
    with torch.random.fork_rng():
        ranges = {name: dying(*small, name == "protected", options.times) for name in ("unprotected", "protected")}
    results = {
        "model": {"width": options.width, "size": options.size, "batch": options.batch},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio": medians["straightforward"] / medians["ours"],
        "medians": medians,
        "profile": profiles,
        "data_seconds": data["batch"],
        "data_ratio": medians["ours"] / data["batch"],
        "dying": {"width": small[0], "size": small[1], "batch": small[2], **ranges},
    }
    print(json.dumps(results, indent=2) if options.json else text(results))
    return results


def text(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    model, medians = results["model"], results["medians"]
    lines = [
        f"CSNet of width {model['width']}, {model['size']} × {model['size']}, batch {model['batch']}, "
        f"{results['threads']} threads",
        "",
        "| step | seconds: median (least–most) | straightforward ÷ it |",
        "|---|---|---|",
    ]
    for name, values in results["seconds"].items():
        span = f"{medians[name]:.3g} ({min(values):.3g}–{max(values):.3g})"
        lines.append(f"| {name} | {span} | {medians['straightforward'] / medians[name]:.2f} |")
    before, after = results["profile"]["straightforward"], results["profile"]["ours"]
    lines += ["", "| seconds of one step | straightforward | ours |", "|---|---|---|"]
    for kind in before:
        cells = (f"{p[kind]:.3f} ({p[kind] / sum(p.values()):.0%})" for p in (before, after))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        f"data: {1000 * results['data_seconds']:.1f} ms a batch; the step takes {results['data_ratio']:.1f} times that",
        "",
    ]
    at = results["dying"]
    lines += [
        f"seconds a step, width {at['width']}, {at['size']} × {at['size']}, batch {at['batch']}, gates on their way:",
        "",
        f"| three quarters of the gates at | {' | '.join(at['protected'])} |",
        "|---|" + "---|" * len(at["protected"]),
    ]
    for name in ("unprotected", "protected"):
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in at[name].values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
