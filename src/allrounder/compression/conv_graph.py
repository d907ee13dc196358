"""A convolutional network as a list of steps: what tracing gives, and what is run, cut, quantised, saved and exported.

Each `Node` names the value it makes, the operation, the values it reads, and its settings; `Graph` adds the tensors.
Everything but the tensors is plain data that goes through JSON, so a network can be rebuilt without its class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LAYERS", "OPS", "Block", "Graph", "Node", "cut", "evaluate", "fold"]


def _batch_norm(x: Tensor, *, mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _slice(x: Tensor, *, dim: int, start: int, end: int | None, step: int) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, end, step),)]


OPS: dict[str, Callable[..., Tensor]] = {
    "conv2d": F.conv2d,
    "linear": F.linear,
    "batch_norm": _batch_norm,
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "clamp_min": torch.clamp_min,
    "vector_norm": lambda x, *, dim: torch.linalg.vector_norm(x, dim=dim, keepdim=True),
    "max_pool2d": F.max_pool2d,
    "avg_pool2d": F.avg_pool2d,
    "global_pool": lambda x: x.mean((2, 3), keepdim=True),
    "flatten": lambda x: x.flatten(1),
    "slice": _slice,
    "pad": F.pad,
    "cat": lambda *values, dim: torch.cat(values, dim),
}
"""Operation -> function of (inputs, tensors by role and settings as keywords)."""

LAYERS = ("conv2d", "linear")
FRESH = {"conv2d", "linear", "batch_norm", "add"}  # make a new tensor that autograd does not keep
POINTWISE = {"batch_norm", "relu", "hardtanh", "leaky_relu", "sigmoid", "hardsigmoid", "hardswish", "silu"}


@dataclass(frozen=True)
class Node:
    """One step.

    Args:
        name: of the value it makes; for layers the dotted name of the module.
        op: a key of `OPS`.
        inputs: names of the values it reads.
        options: its settings.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Steps in an order in which they can be taken, from `input` to `output`; node name -> role -> tensor."""

    nodes: tuple[Node, ...]
    input: str
    output: str
    tensors: dict[str, dict[str, Tensor]]

    @property
    def layers(self) -> list[Node]:
        """Convolutions and linear layers, in order."""
        return [node for node in self.nodes if node.op in LAYERS]

    def __call__(self, x: Tensor) -> Tensor:
        return evaluate(self.nodes, {self.input: x}, self.tensors, self.output)


@dataclass(frozen=True)
class Block:
    """Consecutive steps that read one value from outside and give one."""

    nodes: tuple[Node, ...]
    input: str
    output: str

    @property
    def name(self) -> str:
        """The common part of its layers' names, or the first of them."""
        names = [node.name for node in self.nodes if node.op in LAYERS] or [self.nodes[0].name]
        parts = [name.split(".") for name in names]
        common = takewhile(lambda level: len(set(level)) == 1, zip(*parts))
        return ".".join(level[0] for level in common) or names[0]


def evaluate(
    nodes: Sequence[Node],
    values: Mapping[str, Tensor],
    tensors: Mapping[str, Mapping[str, Tensor]],
    output: str,
    change: Callable[[str, Tensor], Tensor] | None = None,
    call: Callable[[Node, list[Tensor]], Tensor] | None = None,
) -> Tensor:
    """Take the steps.

    Args:
        nodes: the steps.
        values: what they read from outside.
        tensors: node name -> role -> tensor.
        output: the value to give.
        change: `(name, value) -> value`, applied to every value, those from outside first.
        call: takes a step in place of the usual function.

    Returns:
        The value `output`. Values are let go after their last use.
    """
    change = change or (lambda _, value: value)
    left = Counter(name for node in nodes for name in node.inputs) + Counter([output])
    held = {name: change(name, value) for name, value in values.items()}
    fresh: set[str] = set()
    for node in nodes:
        inputs = [held[name] for name in node.inputs]
        if call is not None:
            made = call(node, inputs)
        elif node.op == "relu" and node.inputs[0] in fresh and left[node.inputs[0]] == 1:
            made = torch.relu_(inputs[0])
        else:
            made = OPS[node.op](*inputs, **tensors.get(node.name, {}), **node.options)
        held[node.name] = change(node.name, made)
        if node.op in FRESH and held[node.name] is made:
            fresh.add(node.name)
        for name in node.inputs:
            left[name] -= 1
            if not left[name]:
                del held[name]
    return held[output]


def fold(graph: Graph) -> tuple[Graph, dict[str, Tensor]]:
    """BatchNorm taken into the layers before it.

    Returns:
        The graph without those BatchNorms whose input is a layer that nothing else reads, and layer name -> gain
        `(out,)`: the factor on that output channel's weights. `graph.tensors` keeps the weights as they were.
    """
    users = Counter(name for node in graph.nodes for name in node.inputs) + Counter([graph.output])
    by_name = {node.name: node for node in graph.nodes}
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    tensors = {name: dict(value) for name, value in graph.tensors.items()}
    gains: dict[str, Tensor] = {}
    for node in graph.nodes:
        source = by_name.get(node.inputs[0])
        if node.op == "batch_norm" and source is not None and source.op in LAYERS and users[source.name] == 1:
            norm, layer = tensors.pop(node.name), tensors[source.name]
            gain = norm["weight"] / (norm["var"] + node.options["eps"]).sqrt()
            shift = norm["bias"] - norm["mean"] * gain
            layer["bias"] = shift if "bias" not in layer else shift + gain * layer["bias"]
            layer["weight"] = layer["weight"] * gain.view(-1, *[1] * (layer["weight"].ndim - 1))
            gains[source.name], renamed[node.name] = gain, source.name
            continue
        nodes.append(replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs)))
    return Graph(tuple(nodes), graph.input, renamed.get(graph.output, graph.output), tensors), gains


def cut(graph: Graph) -> list[Block]:
    """The smallest blocks: a residual block is one, and so is a layer that no shortcut goes round.

    Activations and BatchNorm belong to the block before them, everything else without weights (pooling) to the next.
    """
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs} | {graph.output: len(graph.nodes)}
    pieces: list[list[Node]] = [[]]
    live = {graph.input}
    for i, node in enumerate(graph.nodes):
        pieces[-1].append(node)
        live = {name for name in live | {node.name} if last[name] > i}
        if len(live) == 1:
            pieces.append([])
    groups: list[list[Node]] = []
    waiting: list[Node] = []
    for piece in filter(None, pieces):
        if any(node.op in LAYERS for node in piece):
            groups.append(waiting + piece)
            waiting = []
        elif groups and not waiting and all(node.op in POINTWISE for node in piece):
            groups[-1].extend(piece)
        else:
            waiting = waiting + piece
    if waiting:
        groups[-1:] = [(groups[-1] if groups else []) + waiting]
    blocks, start = [], graph.input
    for group in groups:
        blocks.append(Block(tuple(group), start, group[-1].name))
        start = group[-1].name
    return blocks
