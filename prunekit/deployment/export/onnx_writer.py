"""Write a deployed graph as an ONNX model, in a fraction of the time of ``torch.onnx``; see the design page."""

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

from prunekit.deployment.export.axes import free_axes
from prunekit.deployment.graph import InferenceGraph, parse_pooling

OPSET = 20
INPUT, OUTPUT = "image", "output"


class UnsupportedOpError(Exception):
    """The graph has an operation that cannot be written here."""


def graph_to_onnx(graph: InferenceGraph, fixed_size: bool = False) -> onnx.ModelProto:
    """Convert a graph to an ONNX model with the input ``image`` (N, C, H, W) float32 and the output ``output``.

    With ``fixed_size``, height and width are those of the graph's example; otherwise dynamic, as the batch size is.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not 2 <= len(graph.shapes[inputs[0]]) <= 5:
        raise UnsupportedOpError("other inputs than one of 2 to 5 dimensions")
    if graph.output not in graph.shapes or graph.output in inputs:
        raise UnsupportedOpError("an output that is not a computed tensor")
    writer = _Writer(graph, fixed_size)
    in_shape, out_shape = graph.shapes[inputs[0]], graph.shapes[graph.output]
    in_size, out_size = in_shape[2:], out_shape[2:]
    if not fixed_size:
        in_size, out_size = list(free_axes(graph.example[0]).values())[1:], (None,) * len(out_size)
    image, output = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape[1:2], *size])
        for name, shape, size in ((INPUT, in_shape, in_size), (OUTPUT, out_shape, out_size))
    )
    body = helper.make_graph(writer.nodes, "model", [image], [output], list(writer.initializers.values()))
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


class _Writer:
    """Converts the nodes of a graph on construction."""

    def __init__(self, graph: InferenceGraph, fixed_size: bool):
        self.graph = graph
        self.fixed_size = fixed_size
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.names: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.names[node] = INPUT
            elif node.op != "output" and node in graph.shapes:
                self._write(node)
            # Sizes are written where they are read.
        for proto in self.nodes:
            for names in (proto.input, proto.output):
                for index, name in enumerate(names):
                    if name == self.names[graph.output]:
                        names[index] = OUTPUT

    def _write(self, node: fx.Node) -> None:
        write = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
        if node.op == "call_module":
            self._module(node)
        elif write is not None:
            write(self, node)
        elif self.graph.is_function(node, (F.relu, torch.relu)):
            self._add("Relu", [self.names[node.args[0]]], node)
        elif self.graph.is_add(node):
            self._add("Add", [self.names[side] for side in node.args], node)
        elif self.graph.is_cat(node):
            self._add("Concat", [self.names[part] for part in node.args[0]], node, axis=1)
        else:
            raise UnsupportedOpError(f"{node.target}")

    def _module(self, node: fx.Node) -> None:
        module = self.graph.module.get_submodule(node.target)
        inputs = [self.names[value] for value in node.args]
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            inputs += self._weight_and_bias(node, module)
            geometry = {"kernel_shape": module.kernel_size, "strides": module.stride, "dilations": module.dilation}
            self._add("Conv", inputs, node, pads=list(module.padding) * 2, group=module.groups, **geometry)
        elif type(module) is nn.PReLU:
            # With as many dimensions as the feature; otherwise OpenVINO converts the memory layout.
            shape = (1, -1, *[1] * (len(self.graph.shapes[node]) - 2))
            self._add("PRelu", [*inputs, self._initializer(f"{node.target}.slope", module.weight.view(shape))], node)
        elif type(module) is nn.BatchNorm2d and module.running_mean is not None and module.affine:
            tensors = (module.weight, module.bias, module.running_mean, module.running_var)
            inputs += [self._initializer(f"{node.target}.{i}", tensor) for i, tensor in enumerate(tensors)]
            self._add("BatchNormalization", inputs, node, epsilon=module.eps)
        elif type(module) is nn.Linear and len(self.graph.shapes[node]) == 2:
            self._add("Gemm", [*inputs, *self._weight_and_bias(node, module)], node, transB=1)
        elif type(module) is nn.AdaptiveAvgPool2d:
            self._global_pool(node)
        else:
            raise UnsupportedOpError(type(module).__name__)

    def _pool(self, node: fx.Node) -> None:
        pool = parse_pooling(node)
        if pool is None:
            raise UnsupportedOpError("pooling with padding")
        kind = "MaxPool" if node.target is F.max_pool2d else "AveragePool"
        options = {"kernel_shape": pool.kernel, "strides": pool.stride, "ceil_mode": int(pool.ceil_mode)}
        self._add(kind, [self.names[node.args[0]]], node, **options)

    def _global_pool(self, node: fx.Node) -> None:
        module = self.graph.module_of(node, nn.AdaptiveAvgPool2d)
        if (node.args[1] if module is None else module.output_size) not in (1, (1, 1)):
            raise UnsupportedOpError("adaptive pooling to more than 1×1")
        self._add("GlobalAveragePool", [self.names[node.args[0]]], node)

    def _interpolate(self, node: fx.Node) -> None:
        options = {"align_corners": None, "antialias": False, "mode": "nearest", **node.kwargs}
        if options["mode"] != "bilinear" or options["align_corners"] or options["antialias"] or len(node.args) > 1:
            raise UnsupportedOpError(f"{options['mode']} upsampling")
        source, size = self.names[node.args[0]], options.get("size")
        resize = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        if self.fixed_size:
            before, after = self.graph.shapes[node.args[0]][2:], self.graph.shapes[node][2:]
            factors = np.array([1, 1, *map(_factor, before, after)], np.float32)
            self._add("Resize", [source, "", self._constant(factors)], node, **resize)
            return
        if not isinstance(size, tuple | list):
            raise UnsupportedOpError("upsampling by a factor")
        batch_channels, height_width, shape = (f"{node.name}_{part}" for part in ("head", "sides", "shape"))
        self.nodes.append(helper.make_node("Shape", [source], [batch_channels], start=0, end=2))
        # From the size of the image: another reader of a feature would keep runtimes from fusing it.
        self.nodes.append(helper.make_node("Concat", [self._number(side) for side in size], [height_width], axis=0))
        self.nodes.append(helper.make_node("Concat", [batch_channels, height_width], [shape], axis=0))
        self._add("Resize", [source, "", "", shape], node, **resize)

    def _flatten(self, node: fx.Node) -> None:
        if (*node.args[1:], *node.kwargs.values()) != (1,):
            raise UnsupportedOpError("flatten of other dimensions than 1 to the last")
        self._add("Flatten", [self.names[node.args[0]]], node, axis=1)

    def _number(self, value: Any) -> str:
        """The name of an integer, as a tensor of shape (1,)."""
        if not isinstance(value, fx.Node):
            return self._constant(np.array([value]))
        if value not in self.names:
            if value.target is getattr and value.args[1] == "shape" and value.args[0] in self.names:
                self._add("Shape", [self.names[value.args[0]]], value)
            elif value.target is operator.getitem and isinstance(value.args[1], int):
                index = self._constant(np.array([value.args[1]]))
                self._add("Gather", [self._number(value.args[0]), index], value, axis=0)
            elif value.target in _ARITHMETIC:
                self._add(_ARITHMETIC[value.target], [self._number(part) for part in value.args], value)
            else:
                raise UnsupportedOpError(f"{getattr(value.target, '__name__', value.target)}")
        return self.names[value]

    def _add(self, kind: str, inputs: list[str], node: fx.Node, **attributes: Any) -> None:
        name = f"v_{node.name}"
        self.names[node] = name
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))

    def _weight_and_bias(self, node: fx.Node, module: nn.Conv2d | nn.Linear) -> list[str]:
        tensors = {"weight": module.weight, "bias": module.bias}
        return [self._initializer(f"{node.target}.{k}", value) for k, value in tensors.items() if value is not None]

    def _initializer(self, name: str, tensor: Tensor) -> str:
        self.initializers[name] = numpy_helper.from_array(tensor.detach().contiguous().numpy(), name)
        return name

    def _constant(self, value: np.ndarray) -> str:
        name = "c_" + "_".join(f"{number!r}" for number in value.tolist()) + ("f" if value.dtype == np.float32 else "")
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name


def _factor(before: int, after: int) -> np.float32:
    """The factor from a side to another, rounded up, since runtimes round the product down: 31/7 would give 30."""
    factor = np.float32(after / before)
    return factor if float(factor) * before >= after else np.nextafter(factor, np.float32(np.inf))


_ARITHMETIC = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}
_FUNCTIONS: dict[Any, Callable[[_Writer, fx.Node], None]] = {
    F.max_pool2d: _Writer._pool,
    F.avg_pool2d: _Writer._pool,
    F.adaptive_avg_pool2d: _Writer._global_pool,
    F.interpolate: _Writer._interpolate,
    torch.flatten: _Writer._flatten,
    "flatten": _Writer._flatten,
}
