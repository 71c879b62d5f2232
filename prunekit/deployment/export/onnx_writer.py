"""A deployed graph as an ONNX model, operation by operation.

torch.onnx exports anything, but takes tens of seconds for a network of a hundred convolutions and writes what it likes;
here the graph is in hand, and its operations are few. What is not among them is left to torch.onnx.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from prunekit.deployment.graph import Graph, pooling

OPSET = 20
INPUT, OUTPUT = "image", "output"


class Unknown(Exception):
    """An operation that cannot be written here."""


def emit(graph: Graph, fixed: bool = False) -> onnx.ModelProto:
    """The graph as an ONNX model with the input ``image`` (N, C, H, W) float32 and the output ``output``.

    Args:
        fixed: for the example's height and width alone, with up-samplings by constant factors. Else both are free, and
            a runtime that is told the sides when it loads the file makes the same of it.

    Raises:
        Unknown: names an operation that cannot be written here.
    """
    inputs, outputs = _ends(graph, fixed)
    writer = _Writer(graph, fixed)
    body = helper.make_graph(writer.nodes, "model", inputs, outputs, list(writer.weights.values()))
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _ends(graph: Graph, fixed: bool) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The types of input and output: the batch free, and the sides where they are not fixed."""
    images = [node for node in graph.nodes if node.op == "placeholder"]
    if len(images) != 1:
        raise Unknown("more than one input")
    if graph.output is None or graph.output in images:
        raise Unknown("an output that is no tensor of its own")
    taken, made = graph.shapes[images[0]], graph.shapes[graph.output]
    sides = (taken[2:], made[2:]) if fixed else (("H", "W")[: len(taken) - 2], (None,) * (len(made) - 2))
    kinds = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape[1:2], *rest])
        for name, shape, rest in ((INPUT, taken, sides[0]), (OUTPUT, made, sides[1]))
    ]
    return kinds[:1], kinds[1:]


class _Writer:
    """The nodes of the graph, and the weights that they read."""

    def __init__(self, graph: Graph, fixed: bool):
        self.graph = graph
        self.fixed = fixed
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.names: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.names[node] = INPUT
            elif node.op != "output" and node in graph.shapes:
                self._write(node)
            # Sides are written where something asks for them.
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, held in enumerate(names):
                    if held == self.names[graph.output]:
                        names[index] = OUTPUT

    def _write(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._module(node)
            return
        for functions, write in _FUNCTIONS:
            if node.op in ("call_function", "call_method") and node.target in functions:
                write(self, node)
                return
        if self.graph.is_add(node):
            self._add("Add", [self.names[side] for side in node.args], node)
        elif self.graph.is_cat(node):
            self._add("Concat", [self.names[part] for part in node.args[0]], node, axis=1)
        else:
            raise Unknown(f"{node.target}")

    def _module(self, node: fx.Node) -> None:
        module = self.graph.module.get_submodule(node.target)
        inputs = [self.names[value] for value in node.args]
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            inputs.append(self._weight(f"{node.target}.weight", module.weight))
            if module.bias is not None:
                inputs.append(self._weight(f"{node.target}.bias", module.bias))
            pads = list(module.padding) * 2
            spread = {"kernel_shape": module.kernel_size, "strides": module.stride, "dilations": module.dilation}
            self._add("Conv", inputs, node, pads=pads, group=module.groups, **spread)
        elif type(module) is nn.PReLU:
            # Of as many dimensions as the feature: OpenVINO else turns the feature to planar memory and back.
            shape = (1, -1, *[1] * (len(self.graph.shapes[node]) - 2))
            inputs.append(self._weight(f"{node.target}.slope", module.weight.view(shape)))
            self._add("PRelu", inputs, node)
        elif type(module) is nn.BatchNorm2d and module.running_mean is not None and module.affine:
            held = (module.weight, module.bias, module.running_mean, module.running_var)
            inputs += [self._weight(f"{node.target}.{i}", tensor) for i, tensor in enumerate(held)]
            self._add("BatchNormalization", inputs, node, epsilon=module.eps)
        elif type(module) is nn.Linear and len(self.graph.shapes[node]) == 2:
            inputs.append(self._weight(f"{node.target}.weight", module.weight))
            if module.bias is not None:
                inputs.append(self._weight(f"{node.target}.bias", module.bias))
            self._add("Gemm", inputs, node, transB=1)
        elif type(module) is nn.AdaptiveAvgPool2d:
            self._global(node, module.output_size)
        else:
            raise Unknown(type(module).__name__)

    def _pool(self, node: fx.Node) -> None:
        pool = pooling(node)
        if pool is None:
            raise Unknown("a pooling that pads")
        kind = "MaxPool" if node.target is F.max_pool2d else "AveragePool"
        sides = {"kernel_shape": pool.kernel, "strides": pool.stride, "ceil_mode": int(pool.ceil)}
        self._add(kind, [self.names[node.args[0]]], node, **sides)

    def _interpolate(self, node: fx.Node) -> None:
        given = {"align_corners": None, "antialias": False, "mode": "nearest", **node.kwargs}
        if given["mode"] != "bilinear" or given["align_corners"] or given["antialias"] or len(node.args) > 1:
            raise Unknown(f"an up-sampling by {given['mode']}")
        source = self.names[node.args[0]]
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        if self.fixed:
            before, after = self.graph.shapes[node.args[0]][2:], self.graph.shapes[node][2:]
            factors = np.array([1, 1, after[0] / before[0], after[1] / before[1]], np.float32)
            self._add("Resize", [source, "", self._constant(factors)], node, **how)
            return
        size = given.get("size")
        if not isinstance(size, tuple | list):
            raise Unknown("an up-sampling by a factor")
        head, sides, shape = (f"{node.name}_{part}" for part in ("head", "sides", "shape"))
        self.nodes.append(helper.make_node("Shape", [source], [head], start=0, end=2))
        # From the image's sides, not from those of a value beside it: a second reader keeps runtimes from fusing.
        self.nodes.append(helper.make_node("Concat", [self._number(part) for part in size], [sides], axis=0))
        self.nodes.append(helper.make_node("Concat", [head, sides], [shape], axis=0))
        self._add("Resize", [source, "", "", shape], node, **how)

    def _size(self, node: fx.Node) -> None:
        """Sides as whole numbers, each a tensor of one."""
        if node.target is getattr and node.args[1] == "shape" and node.args[0] in self.names:
            self._add("Shape", [self.names[node.args[0]]], node)
        elif node.target is operator.getitem and isinstance(node.args[1], int):
            self._add("Gather", [self._number(node.args[0]), self._constant(np.array([node.args[1]]))], node, axis=0)
        elif node.target in _ARITHMETIC:
            self._add(_ARITHMETIC[node.target], [self._number(part) for part in node.args], node)
        else:
            raise Unknown(f"{getattr(node.target, '__name__', node.target)}")

    def _global(self, node: fx.Node, size: Any) -> None:
        if size not in (1, (1, 1)):
            raise Unknown("an adaptive pooling to more than one")
        self._add("GlobalAveragePool", [self.names[node.args[0]]], node)

    def _narrow(self, node: fx.Node) -> None:
        value, axis, start, length = node.args
        ends = [self._constant(np.array([n])) for n in (start, start + length, axis)]
        self._add("Slice", [self.names[value], *ends], node)

    def _flatten(self, node: fx.Node) -> None:
        if (*node.args[1:], *node.kwargs.values()) != (1,):
            raise Unknown("a flatten of other dimensions")
        self._add("Flatten", [self.names[node.args[0]]], node, axis=1)

    def _number(self, value: Any) -> str:
        if isinstance(value, fx.Node) and value not in self.names:
            self._size(value)
        return self.names[value] if isinstance(value, fx.Node) else self._constant(np.array([value]))

    def _add(self, kind: str, inputs: list[str], node: fx.Node, **attributes: Any) -> None:
        name = f"v_{node.name}"
        self.names[node] = name
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))

    def _weight(self, name: str, tensor: Tensor) -> str:
        self.weights[name] = numpy_helper.from_array(tensor.detach().contiguous().numpy(), name)
        return name

    def _constant(self, value: np.ndarray) -> str:
        name = "c_" + "_".join(f"{number:g}" for number in value.tolist()) + ("f" if value.dtype == np.float32 else "")
        self.weights[name] = numpy_helper.from_array(value, name)
        return name


_ARITHMETIC = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}
_FUNCTIONS: list[tuple[set[Any], Callable[[_Writer, fx.Node], None]]] = [
    ({F.max_pool2d, F.avg_pool2d}, _Writer._pool),
    ({F.interpolate}, _Writer._interpolate),
    ({F.relu, torch.relu}, lambda writer, node: writer._add("Relu", [writer.names[node.args[0]]], node)),
    ({F.adaptive_avg_pool2d}, lambda writer, node: writer._global(node, node.args[1])),
    ({torch.narrow}, _Writer._narrow),
    ({torch.flatten, "flatten"}, _Writer._flatten),
]
