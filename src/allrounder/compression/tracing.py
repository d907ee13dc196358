"""From a module to its graph, by `torch.export`: any class, with functional calls and in-place operations.

    graph = trace(model, (3, 224, 224))

Layers keep the dotted names of their modules. The graph is checked against the module on a random batch, so a
network that tracing would change is refused and not quantised wrongly.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .conv_graph import Graph, Node

__all__ = ["norms", "trace"]

SAME = {
    "alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy", "identity",
    "alpha_dropout", "_to_copy", "to",
}  # fmt: skip
SHAPED = {"view", "reshape", "_unsafe_view", "flatten", "squeeze"}
PLAIN = {"relu", "leaky_relu", "hardtanh", "sigmoid", "hardsigmoid", "hardswish", "silu"}
BROADCASTING = {"aten.div.Tensor", "aten.mul.Tensor", "aten.add.Tensor"}
POOL = ("kernel_size", "stride", "padding", "ceil_mode")


class _Tracer:
    """One pass over an exported program."""

    def __init__(self, program: Any, like: Tensor) -> None:
        self.program = program
        signature = program.graph_signature
        constants = program.state_dict | program.constants
        self.fixed: dict[str, Tensor] = {
            node: constants[name].detach()
            for names in (
                signature.inputs_to_parameters,
                signature.inputs_to_buffers,
                signature.inputs_to_lifted_tensor_constants,
            )
            for node, name in names.items()
            if name in constants
        }
        self.dtype = like.dtype
        self.handlers = {
            "conv2d": self._conv2d, "linear": self._linear, "batch_norm": self._batch_norm, "relu6": self._relu6,
            "add": self._sum, "mul": self._mul, "cat": self._cat, "pad": self._pad, "constant_pad_nd": self._pad,
            "slice": self._slice, "max_pool2d": self._max_pool2d, "avg_pool2d": self._avg_pool2d,
            "adaptive_avg_pool2d": self._adaptive_avg_pool2d, "mean": self._mean, "div": self._div,
            "clamp_min": self._clamp_min, "linalg_vector_norm": self._vector_norm, "expand_as": self._expand_as,
        }  # fmt: skip
        self.values: dict[str, str] = {}  # exported node -> value
        self.shapes: dict[str, list[Any]] = {}
        self.nodes: list[Node] = []
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def graph(self) -> Graph:
        given, output = [], None
        for node in self.program.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" and node.name not in self.fixed:
                given.append(node.name)
                self.values[node.name], self.shapes[node.name] = "input", list(value.shape)
            elif node.op == "call_function" and isinstance(value, Tensor):
                self._step(node)
            elif node.op == "call_function" and isinstance(value, (tuple, list)):
                raise self._refusal(node)
            elif node.op == "output":
                found = [item for item in node.args[0] if item is not None]
                if len(found) != 1 or found[0].name not in self.values:
                    raise InputError(f"the model gives {len(found)} tensors; give one whose output is the logits alone")
                output = self.values[found[0].name]
        if len(given) != 1 or output is None:
            raise InputError("the model must take one batch of images and give one tensor")
        needed, kept = {output}, []
        for node in reversed(self.nodes):
            if node.name in needed:
                needed |= set(node.inputs)
                kept.append(node)
        kept.reverse()
        tensors = {node.name: self.tensors[node.name] for node in kept if node.name in self.tensors}
        return Graph(tuple(kept), "input", output, tensors)

    def _step(self, node: Any) -> None:
        name = node.target._schema.name.removeprefix("aten::").removesuffix("_")
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args)) | dict(node.kwargs)
        args = {a.name: given.get(a.name, a.default_value) for a in node.target._schema.arguments}
        shape = list(node.meta["val"].shape)
        self.shapes[node.name] = shape
        if all(isinstance(item, torch.fx.Node) and item.name in self.fixed for item in node.all_input_nodes):
            raise self._refusal(node)
        handle = self.handlers.get(name)
        source = next(iter(node.all_input_nodes)).name
        if name in SAME or (name in SHAPED and shape == self.shapes.get(source)):
            self.values[node.name] = self.values[source]
        elif name in SHAPED and len(shape) == 2 and shape[0] == self.shapes[source][0]:
            self._node(node, "flatten", [source])
        elif name in PLAIN:
            self._node(node, name, [source], {k: v for k, v in args.items() if k != "self"})
        elif handle is not None and (done := handle(node, args)) is not False:
            if done is not None:
                self._node(node, *done)
        else:
            raise self._refusal(node)

    def _module(self, node: Any) -> tuple[str, str]:
        """Dotted name and class of the module that a step comes from."""
        stack = list((node.meta.get("nn_module_stack") or {"": ("", "model")}).values())
        path, kind = stack[-1]
        return path, str(getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]

    def _refusal(self, node: Any) -> InputError:
        path, kind = self._module(node)
        return InputError(
            f"{path or 'the model'!r} ({kind}) does {str(node.target).replace('aten.', '')}, which is not supported: "
            "convolutional networks with BatchNorm are (Conv2d, Linear, pooling, activations, sums)"
        )

    def _node(
        self, node: Any, op: str, inputs: Sequence[str], options: dict[str, Any] | None = None,
        tensors: dict[str, Tensor | None] | None = None,
    ) -> str:  # fmt: skip
        path, _ = self._module(node)
        base = path if tensors and path else node.name
        taken = {made.name for made in self.nodes} | {"input"}
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}#{count}"
        missing = [source for source in inputs if source not in self.values]
        if missing:
            raise self._refusal(node)
        self.nodes.append(Node(name, op, tuple(self.values[source] for source in inputs), options or {}))
        held = {role: value for role, value in (tensors or {}).items() if value is not None}
        for role, value in held.items():
            if not torch.isfinite(value).all():
                raise InputError(f"{name!r} has a {role} that is not finite; repair the checkpoint")
        if held:
            self.tensors[name] = {role: value.to(self.dtype).clone() for role, value in held.items()}
        self.values[node.name] = name
        return name

    def _tensor(self, item: Any) -> Tensor | None:
        return None if item is None else self.fixed.get(item.name)

    def _conv2d(self, node: Any, a: dict[str, Any]) -> Any:
        weight = self._tensor(a["weight"])
        if weight is None:
            return False
        options = {
            key: a[key] if isinstance(a[key], str) else list(a[key]) * (3 - len(a[key]))
            for key in ("stride", "padding", "dilation")
        }
        roles = {"weight": weight, "bias": self._tensor(a["bias"])}
        return "conv2d", [a["input"].name], options | {"groups": a["groups"]}, roles

    def _linear(self, node: Any, a: dict[str, Any]) -> Any:
        weight = self._tensor(a["weight"])
        if weight is None or len(self.shapes[node.name]) != 2:
            return False
        return "linear", [a["input"].name], {}, {"weight": weight, "bias": self._tensor(a["bias"])}

    def _batch_norm(self, node: Any, a: dict[str, Any]) -> Any:
        path, _ = self._module(node)
        mean, var = self._tensor(a["running_mean"]), self._tensor(a["running_var"])
        if a["training"] or mean is None or var is None:
            raise InputError(
                f"{path!r} keeps no running statistics (track_running_stats=False); Genie needs those of the training"
            )
        if (var < 0).any():
            raise InputError(f"{path!r} has a negative running variance; repair the checkpoint")
        weight, bias = self._tensor(a["weight"]), self._tensor(a["bias"])
        roles: dict[str, Tensor | None] = {
            "weight": torch.ones_like(mean) if weight is None else weight,
            "bias": torch.zeros_like(mean) if bias is None else bias,
            "mean": mean,
            "var": var,
        }
        return "batch_norm", [a["input"].name], {"eps": a["eps"]}, roles

    def _relu6(self, node: Any, a: dict[str, Any]) -> Any:
        return "hardtanh", [a["self"].name], {"min_val": 0.0, "max_val": 6.0}

    def _two(self, node: Any, a: dict[str, Any], op: str) -> Any:
        if not isinstance(a["other"], torch.fx.Node) or a["other"].name not in self.values or a.get("alpha", 1) != 1:
            return False
        return op, [a["self"].name, a["other"].name]

    def _sum(self, node: Any, a: dict[str, Any]) -> Any:
        return self._two(node, a, "add")

    def _mul(self, node: Any, a: dict[str, Any]) -> Any:
        return self._two(node, a, "mul")

    def _div(self, node: Any, a: dict[str, Any]) -> Any:
        return False if a.get("rounding_mode") else self._two(node, a, "div")

    def _clamp_min(self, node: Any, a: dict[str, Any]) -> Any:
        plain = isinstance(a["min"], (int, float))
        return plain and ("clamp_min", [a["self"].name], {"min": float(a["min"])})

    def _vector_norm(self, node: Any, a: dict[str, Any]) -> Any:
        if a["ord"] != 2 or not a["dim"] or not a["keepdim"]:
            return False
        rank = len(self.shapes[a["self"].name])
        return "vector_norm", [a["self"].name], {"dim": sorted(dim % rank for dim in a["dim"])}

    def _expand_as(self, node: Any, a: dict[str, Any]) -> Any:
        """Nothing to do where every reader broadcasts."""
        if any(str(user.target) not in BROADCASTING for user in node.users):
            return False
        self.values[node.name] = self.values[a["self"].name]
        return None

    def _cat(self, node: Any, a: dict[str, Any]) -> Any:
        return "cat", [item.name for item in a["tensors"]], {"dim": a["dim"] % len(self.shapes[node.name])}

    def _pad(self, node: Any, a: dict[str, Any]) -> Any:
        if a.get("mode", "constant") != "constant":
            return False
        return "pad", [a["self"].name], {"pad": list(a["pad"]), "value": float(a.get("value") or 0.0)}

    def _slice(self, node: Any, a: dict[str, Any]) -> Any:
        if self.shapes[node.name] == self.shapes[a["self"].name]:
            self.values[node.name] = self.values[a["self"].name]
            return None
        ends = {"start": a["start"] or 0, "end": a["end"], "step": a["step"]}
        if a["dim"] % len(self.shapes[node.name]) == 0:
            return False
        if not all(value is None or isinstance(value, int) for value in ends.values()):
            return False
        if ends["end"] is not None and ends["end"] > 1 << 40:
            ends["end"] = None
        return "slice", [a["self"].name], {"dim": a["dim"] % len(self.shapes[node.name])} | ends

    def _pool(self, node: Any, a: dict[str, Any], op: str, *more: str) -> Any:
        options = {key: a[key] for key in (*POOL, *more)}
        options = {k: list(v) * (3 - len(v)) if isinstance(v, (list, tuple)) and v else v for k, v in options.items()}
        options["stride"] = options["stride"] or options["kernel_size"]
        return op, [a["self"].name], options

    def _max_pool2d(self, node: Any, a: dict[str, Any]) -> Any:
        return self._pool(node, a, "max_pool2d", "dilation")

    def _avg_pool2d(self, node: Any, a: dict[str, Any]) -> Any:
        return False if a["divisor_override"] else self._pool(node, a, "avg_pool2d", "count_include_pad")

    def _adaptive_avg_pool2d(self, node: Any, a: dict[str, Any]) -> Any:
        size, given = list(a["output_size"]), self.shapes[a["self"].name][2:]
        if size == [1, 1]:
            return "global_pool", [a["self"].name]
        if any(have % want for have, want in zip(given, size)):
            return False
        kernel = [int(have // want) for have, want in zip(given, size)]
        options = {"kernel_size": kernel, "stride": kernel, "padding": [0, 0], "ceil_mode": False}
        return "avg_pool2d", [a["self"].name], options | {"count_include_pad": True}

    def _mean(self, node: Any, a: dict[str, Any]) -> Any:
        rank = len(self.shapes[a["self"].name])
        if rank != 4 or sorted(dim % rank for dim in a.get("dim") or []) != [2, 3]:
            return False
        self._node(node, "global_pool", [a["self"].name])
        return None if a["keepdim"] else ("flatten", [node.name])


def trace(model: nn.Module, image_shape: Sequence[int], *, batch: int = 2) -> Graph:
    """The graph of a module in evaluation mode; the module is left as it was.

    Args:
        model: takes `(N, *image_shape)`, gives `(N, classes)`; a transformers classifier is fine.
        image_shape: channels, height, width.
        batch: images in the example that is followed through the network; any N can be run afterwards.

    Returns:
        Its steps, with copies of its tensors on their device, in float32 (float64 stays).

    Raises:
        InputError: layers that are not supported (by name), control flow that depends on values, weights that are not
            finite, BatchNorm without running statistics.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(f"image_shape is (channels, height, width), got {tuple(image_shape)}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise InputError("the model has no parameters: nothing to quantise")
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *image_shape)
    images = torch.randn(shape, generator=generator, dtype=dtype).to(parameter.device, parameter.dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                expected = model(images)
                sizes = ({0: torch.export.Dim("images", min=1)},)
                program = torch.export.export(model, (images,), dynamic_shapes=sizes, strict=False)
            except Exception as error:  # a model may fail in any way, and its exporter in a hundred
                reason = str(error).strip().split("\n")[0][:200]
                raise InputError(
                    f"the model cannot be traced on images of shape {tuple(image_shape)}: {reason}; give the right "
                    "image_shape, and a model without control flow that depends on values"
                ) from error
            graph = _Tracer(program, torch.empty(0, dtype=dtype)).graph()
            expected = expected if isinstance(expected, Tensor) else expected["logits"]
            found = graph(images.to(dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode
    close = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 0.05
    if found.shape != expected.shape or (found - expected).abs().max() > close * (1 + expected.abs().max()):
        raise InputError("the traced network does not do what the model does; rewrite what is unusual in its forward")
    return graph


def norms(graph: Graph) -> list[Node]:
    """The BatchNorm steps of a graph.

    Raises:
        InputError: when there are none, or their running statistics were never updated.
    """
    found = [node for node in graph.nodes if node.op == "batch_norm"]
    if not found:
        raise InputError(
            "Genie makes images from BatchNorm running statistics; the model has 0 BatchNorm2d (folded?): give the "
            "unfolded model, or real images"
        )
    for node in found:
        held = graph.tensors[node.name]
        if not held["mean"].any() and (held["var"] == 1).all():
            raise InputError(
                f"the running statistics of {node.name!r} look untrained (mean 0, variance 1); run training data "
                "through the model in train mode first, or give real images"
            )
    return found
