"""A quantised network as an ONNX file of QuantizeLinear and DequantizeLinear pairs, for onnxruntime and others.

    export_onnx(network, "small.onnx")

Weights stay integers in the file: 4-bit ones for up to 4 bits, bytes above, with a step and a zero point for each
output channel. Activations of fewer than 8 bits are clipped to their range and then quantised to bytes. Opset 21.
Which pairs become integer kernels is the runtime's choice; the predictions are those of the network here, up to ties in
rounding. Needs the extra `onnx`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .conv_graph import Node
from .quantized import QuantizedLayer, QuantizedNetwork

__all__ = ["export_onnx"]

OPSET, IR_VERSION = 21, 10


def _library() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise InputError("writing ONNX files needs onnx: pip install 'allrounder[onnx]'") from error
    return onnx


def _pads(node: Node, kernel: list[int]) -> list[int]:
    """Padding as ONNX has it: all begins, then all ends."""
    padding, dilation = node.options["padding"], node.options.get("dilation", [1, 1])
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation)]
        begins = [amount // 2 for amount in total]
        return [*begins, *(amount - begin for amount, begin in zip(total, begins))]
    both = [padding] * 2 if isinstance(padding, int) else list(padding)
    return both + both


def _two(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _Writer:
    """Nodes and constants of the file."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self.onnx, self.network = _library(), network
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any, kind: str, shape: list[int] | None = None) -> str:
        """A constant of an ONNX type; 4-bit values are packed two to a byte."""
        types = self.onnx.TensorProto
        flat = value.detach().cpu().reshape(-1) if isinstance(value, Tensor) else torch.tensor(value).reshape(-1)
        dims = shape if shape is not None else list(value.shape) if isinstance(value, Tensor) else [len(flat)]
        if kind == "UINT4":
            flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)]).to(torch.uint8)
            data = (flat[::2] | (flat[1::2] << 4)).numpy().tobytes()
        else:
            wide = {"FLOAT": torch.float32, "UINT8": torch.uint8, "INT8": torch.int8, "INT64": torch.int64}[kind]
            data = flat.to(wide).numpy().tobytes()
        made = self.onnx.TensorProto(name=name, data_type=getattr(types, kind), dims=dims, raw_data=data)
        self.constants.append(made)
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name=f"{output}:{op}", **attributes))
        return output

    def quantise(self, value: str, at: str) -> str:
        """The value through its quantiser."""
        settings = self.network.description["activations"][value]
        low, high = QuantizedNetwork.limits(**settings)
        step, kind = self.network.step(value), "INT8" if settings["signed"] else "UINT8"
        scale = self.constant(f"{value}.step", step, "FLOAT", [])
        zero = self.constant(f"{value}.zero", 0, kind, [])
        if settings["bits"] < 8:
            limits = {"low": low * step, "high": high * step}
            ends = [self.constant(f"{value}.{end}", limit, "FLOAT", []) for end, limit in limits.items()]
            at = self.add("Clip", [at, *ends], f"{value}.clipped")
        at = self.add("QuantizeLinear", [at, scale, zero], f"{value}.integers")
        return self.add("DequantizeLinear", [at, scale, zero], f"{value}.quantized")

    def layer(self, node: Node, inputs: list[str]) -> None:
        layer: QuantizedLayer = self.network.layer(node.name)
        kind = "UINT4" if layer.bits <= 4 else "UINT8"
        parts = [
            self.constant(f"{node.name}.integers", layer.integers(), kind),
            self.constant(f"{node.name}.scale", layer.scale, "FLOAT"),
            self.constant(f"{node.name}.zero", layer.zero, kind),
        ]
        read = [*inputs, self.add("DequantizeLinear", parts, f"{node.name}.weight", axis=0)]
        made = node.name if layer.bias is None else f"{node.name}.product"
        if node.op == "linear":
            self.add("Gemm", read, made, transB=1)
        else:
            kernel = layer.shape[2:]
            self.add(
                "Conv", read, made, kernel_shape=kernel, strides=_two(node.options["stride"]),
                pads=_pads(node, kernel), dilations=_two(node.options["dilation"]), group=node.options["groups"],
            )  # fmt: skip
        if layer.bias is not None:
            # A bias inside Conv would be rounded by onnxruntime to multiples of (weight step * activation step): at 4
            # bits that moves activations across roundings, and changed one prediction in six.
            shape = [layer.shape[0]] + ([] if node.op == "linear" else [1, 1])
            self.add("Add", [made, self.constant(f"{node.name}.bias", layer.bias, "FLOAT", shape)], node.name)

    def step(self, node: Node, inputs: list[str]) -> None:
        """One step of the network."""
        if node.name in self.network.description["layers"]:
            self.layer(node, inputs)
        elif node.op in SIMPLE:
            op, attributes = SIMPLE[node.op]
            self.add(op, inputs, node.name, **attributes)
        else:
            SPECIAL[node.op](self, node, inputs)

    def batch_norm(self, node: Node, inputs: list[str]) -> None:
        held = dict(self.network.rest[node.name.replace(".", "/")].named_buffers())
        read = [self.constant(f"{node.name}.{role}", held[role], "FLOAT") for role in ("weight", "bias", "mean", "var")]
        self.add("BatchNormalization", [*inputs, *read], node.name, epsilon=node.options["eps"])

    def hardtanh(self, node: Node, inputs: list[str]) -> None:
        ends = [self.constant(f"{node.name}.{key}", node.options[key], "FLOAT", []) for key in ("min_val", "max_val")]
        self.add("Clip", [*inputs, *ends], node.name)

    def silu(self, node: Node, inputs: list[str]) -> None:
        self.add("Mul", [*inputs, self.add("Sigmoid", inputs, f"{node.name}.sigmoid")], node.name)

    def clamp_min(self, node: Node, inputs: list[str]) -> None:
        self.add("Clip", [*inputs, self.constant(f"{node.name}.min", node.options["min"], "FLOAT", [])], node.name)

    def vector_norm(self, node: Node, inputs: list[str]) -> None:
        axes = self.constant(f"{node.name}.axes", node.options["dim"], "INT64")
        self.add("ReduceL2", [*inputs, axes], node.name, keepdims=1)

    def pool(self, node: Node, inputs: list[str]) -> None:
        o = node.options
        kernel = _two(o["kernel_size"])
        more: dict[str, Any] = {"dilations": _two(o["dilation"])} if node.op == "max_pool2d" else {}
        if node.op == "avg_pool2d":
            more["count_include_pad"] = int(o["count_include_pad"])
        self.add(
            "MaxPool" if node.op == "max_pool2d" else "AveragePool", inputs, node.name, kernel_shape=kernel,
            strides=_two(o["stride"]), pads=_pads(Node("", "", (), {"padding": o["padding"]}), kernel),
            ceil_mode=int(o["ceil_mode"]), **more,
        )  # fmt: skip

    def slice(self, node: Node, inputs: list[str]) -> None:
        o = node.options
        ends = {key: o[key] for key in ("start", "end", "dim", "step")}
        ends["end"] = 1 << 62 if o["end"] is None else o["end"]
        read = [self.constant(f"{node.name}.{key}", [value], "INT64") for key, value in ends.items()]
        self.add("Slice", [*inputs, *read], node.name)

    def pad(self, node: Node, inputs: list[str]) -> None:
        given = node.options["pad"]
        pairs = [(0, 0)] * (4 - len(given) // 2) + list(zip(given[-2::-2], given[::-2]))
        amounts = [first for first, _ in pairs] + [second for _, second in pairs]
        read = [self.constant(f"{node.name}.amounts", amounts, "INT64")]
        read.append(self.constant(f"{node.name}.value", node.options["value"], "FLOAT", []))
        self.add("Pad", [*inputs, *read], node.name)


SIMPLE: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hardswish": ("HardSwish", {}),
    "add": ("Add", {}),
    "mul": ("Mul", {}),
    "div": ("Div", {}),
    "global_pool": ("GlobalAveragePool", {}),
    "flatten": ("Flatten", {"axis": 1}),
}
SPECIAL: dict[str, Callable[[_Writer, Node, list[str]], Any]] = {
    "batch_norm": _Writer.batch_norm,
    "hardtanh": _Writer.hardtanh,
    "leaky_relu": lambda self, node, inputs: self.add(
        "LeakyRelu", inputs, node.name, alpha=float(node.options["negative_slope"])
    ),
    "silu": _Writer.silu,
    "clamp_min": _Writer.clamp_min,
    "vector_norm": _Writer.vector_norm,
    "max_pool2d": _Writer.pool,
    "avg_pool2d": _Writer.pool,
    "slice": _Writer.slice,
    "pad": _Writer.pad,
    "cat": lambda self, node, inputs: self.add("Concat", inputs, node.name, axis=node.options["dim"]),
}


def export_onnx(network: QuantizedNetwork, path: str | Path) -> Path:
    """Write the file.

    Args:
        network: from `genie.quantize` or `QuantizedNetwork.load`.
        path: a file that ends in `.onnx`; it is replaced. Input `images` `(N, C, H, W)`, output `logits`, any N.

    Raises:
        InputError: when `onnx` is not installed, or the file cannot be written.
    """
    writer, path = _Writer(network), Path(path).expanduser()
    onnx, described = writer.onnx, network.description
    if path.suffix != ".onnx":
        raise InputError(f"the file of an ONNX network ends in .onnx, got {path.name!r}")
    names = {described["input"]: "images"}
    for node in network.nodes:
        writer.step(node, [names[name] for name in node.inputs])
        quantised = node.name in described["activations"]
        names[node.name] = writer.quantise(node.name, node.name) if quantised else node.name
    writer.add("Identity", [names[described["output"]]], "logits")
    shape = ["images", *described["image_shape"]]
    with torch.no_grad():
        like = network(torch.zeros(1, *described["image_shape"], device=next(iter(network.buffers())).device))
    kinds = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        writer.nodes, "allrounder",
        [kinds("images", onnx.TensorProto.FLOAT, shape)],
        [kinds("logits", onnx.TensorProto.FLOAT, ["images", *like.shape[1:]])],
        writer.constants,
    )  # fmt: skip
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="allrounder")
    onnx.checker.check_model(model, full_check=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(model.SerializeToString())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {str(path)!r} ({error.strerror}); give another file") from error
    return path
