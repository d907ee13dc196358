"""A quantised network that is true integers: packed bits, a step for every output channel, and a list of steps.

    network.save("small"); QuantizedNetwork.load("small")(images)

What is stored is `ceil(weights * bits / 8)` bytes a layer; for each output channel a step (float32), a zero point
(one byte) and a bias (float32) with BatchNorm inside; one step for each quantised value. A folder holds
`model.safetensors` and `quantized.json`, which describes the network: loading needs neither its class nor a pickle.

Running it computes in floating point what integer kernels would (weights are unpacked once and kept); the point is
size on disk, and the integers that `onnx_qdq.export_onnx` hands to a runtime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..saving import replacing
from .conv_graph import OPS, Graph, Node, evaluate

__all__ = ["QuantizedLayer", "QuantizedNetwork", "pack", "unpack"]

FORMAT = "allrounder quantized network 1"


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits, `bits` bits each, one after the other (lowest bit first): `ceil(n * bits / 8)` bytes.

    >>> pack(torch.tensor([1, 2, 3, 0]), 2)
    tensor([57], dtype=torch.uint8)
    """
    flat = integers.reshape(-1).to(torch.uint8)
    places = torch.arange(bits, device=flat.device, dtype=torch.uint8)
    stream = flat[:, None].bitwise_right_shift(places).bitwise_and_(1).view(-1)
    stream = torch.cat([stream, stream.new_zeros(-len(stream) % 8)]).view(-1, 8)
    return stream.bitwise_left_shift(torch.arange(8, device=flat.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of what `pack` gave, as uint8."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = packed[:, None].bitwise_right_shift(places).bitwise_and_(1).view(-1)[: count * bits].view(count, bits)
    return stream.bitwise_left_shift(places[:bits]).sum(1, dtype=torch.uint8)


class QuantizedLayer(nn.Module):
    """Integers `(out, ...)`, packed, with a step, a zero point and a bias for each output channel."""

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, bits: int, shape: list[int], bias: bool) -> None:
        super().__init__()
        self.bits, self.shape = bits, list(shape)
        self.register_buffer("packed", torch.zeros(-(-math.prod(shape) * bits // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(shape[0]))
        self.register_buffer("zero", torch.zeros(shape[0], dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self._unpacked: Tensor | None = None

    def integers(self) -> Tensor:
        """uint8, 0 to 2^bits - 1, in the shape of the weight."""
        return unpack(self.packed, self.bits, math.prod(self.shape)).view(self.shape)

    def weight(self) -> Tensor:
        """`(integer - zero) * step`."""
        if self._unpacked is None:
            shape = (-1, *[1] * (len(self.shape) - 1))
            whole = self.integers().to(self.scale.dtype) - self.zero.to(self.scale.dtype).view(shape)
            self._unpacked = whole * self.scale.view(shape)
        return self._unpacked

    def _apply(self, *args: Any, **keywords: Any) -> Any:
        self._unpacked = None
        return super()._apply(*args, **keywords)

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        self._unpacked = None
        super()._load_from_state_dict(*args, **keywords)


class _Held(nn.Module):
    """Tensors by name."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name takes no dots


class QuantizedNetwork(nn.Module):
    """`(N, C, H, W)` images, normalised as for the original, to logits `(N, classes)`.

    Made by `genie.quantize` and by `load`; the constructor takes a description and leaves all integers zero.

    Attributes:
        description: what `quantized.json` holds: `nodes`, `layers` (bits and shapes), `activations` (bits, signed),
            `image_shape`, and `account`, what was done to get here.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.description: dict[str, Any] = dict(description)
        self.nodes = tuple(
            Node(n["name"], n["op"], tuple(n["inputs"]), dict(n.get("options") or {})) for n in description["nodes"]
        )
        if unknown := [node.op for node in self.nodes if node.op not in OPS]:
            raise KeyError(f"the operation {unknown[0]!r} is not known")
        self.layers = nn.ModuleDict(
            {_key(name): QuantizedLayer(**made) for name, made in description["layers"].items()}
        )
        self.rest = nn.ModuleDict({_key(name): _Held(shapes) for name, shapes in description["tensors"].items()})
        self.steps = _Held({_key(name): [] for name in description["activations"]})

    def layer(self, name: str) -> QuantizedLayer:
        """A layer by its dotted name."""
        return self.layers[_key(name)]  # type: ignore[return-value]

    def step(self, value: str) -> Tensor:
        """The step of a quantised value, a scalar."""
        return getattr(self.steps, _key(value))

    @staticmethod
    def limits(bits: int, signed: bool) -> tuple[int, int]:
        """Smallest and largest integer of an activation."""
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    def forward(self, images: Tensor) -> Tensor:
        activations = self.description["activations"]

        def change(name: str, value: Tensor) -> Tensor:
            if name not in activations:
                return value
            low, high = self.limits(**activations[name])
            step = self.step(name)
            return (value / step).round_().clamp_(low, high).mul_(step)

        def call(node: Node, inputs: list[Tensor]) -> Tensor:
            if node.name in self.description["layers"]:
                layer = self.layer(node.name)
                return OPS[node.op](*inputs, weight=layer.weight(), bias=layer.bias, **node.options)
            held = dict(self.rest[_key(node.name)].named_buffers()) if node.name in self.description["tensors"] else {}
            return OPS[node.op](*inputs, **held, **node.options)

        return evaluate(self.nodes, {self.description["input"]: images}, {}, self.description["output"], change, call)

    @property
    def bytes(self) -> dict[str, int]:
        """What is stored: `weights` (packed integers), `channels` (steps, zero points, biases), `rest`."""
        weights = sum(layer.packed.numel() for layer in self.layers.values())  # type: ignore[union-attr]
        channels = sum(
            value.numel() * value.element_size()
            for layer in self.layers.values()
            for name, value in layer.named_buffers()
            if name != "packed"
        )
        total = sum(value.numel() * value.element_size() for value in self.state_dict().values())
        return {"weights": weights, "channels": channels, "rest": total - weights - channels}

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `quantized.json` into a new folder.

        Raises:
            InputError: when the folder is not empty or not writable.
        """
        folder = Path(folder)
        with replacing(folder) as work:
            self.write(work)
        return folder

    def write(self, folder: Path) -> None:
        """The two files, into a folder that exists."""
        from safetensors.torch import save

        values = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(values, metadata={"format": "pt"}))
        (folder / "quantized.json").write_text(json.dumps(self.description) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> QuantizedNetwork:
        """What `save` wrote, on the CPU, in evaluation mode.

        Raises:
            InputError: when a file is missing, damaged, or does not fit the other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder).expanduser()
        try:
            description = json.loads((folder / "quantized.json").read_text(encoding="utf-8"))
            if description.get("format") != FORMAT:
                raise ValueError(f"it says {description.get('format')!r}, not {FORMAT!r}")
            network = cls(description)
            network.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{str(folder)!r} is no folder of a quantised network, or it is damaged ({reason}); save it again"
            ) from error
        return network.eval()

    @classmethod
    def build(
        cls,
        graph: Graph,
        layers: Mapping[str, Mapping[str, Any]],
        activations: Mapping[str, Mapping[str, Any]],
        *,
        image_shape: tuple[int, ...],
        account: Mapping[str, Any],
    ) -> QuantizedNetwork:
        """From a folded graph and what was learned.

        Args:
            graph: steps, biases, and the tensors of what is no layer.
            layers: name -> `integers` `(out, ...)`, `scale` `(out,)`, `zero` `(out,)`, `bits`. Steps may be negative
                or zero (a BatchNorm's gain): the integers are then mirrored, so that the stored step is positive.
            activations: value -> `scale` (scalar), `bits`, `signed`.
            image_shape, account: for the description.
        """
        rest = {
            node.name: graph.tensors[node.name]
            for node in graph.nodes
            if node.name in graph.tensors and node.name not in layers
        }
        network = cls(
            {
                "format": FORMAT,
                "image_shape": list(image_shape),
                "input": graph.input,
                "output": graph.output,
                "nodes": [vars(node) | {"inputs": list(node.inputs)} for node in graph.nodes],
                "layers": {
                    name: {
                        "bits": made["bits"],
                        "shape": list(made["integers"].shape),
                        "bias": "bias" in graph.tensors[name],
                    }
                    for name, made in layers.items()
                },
                "activations": {name: {k: made[k] for k in ("bits", "signed")} for name, made in activations.items()},
                "tensors": {name: {role: list(v.shape) for role, v in held.items()} for name, held in rest.items()},
                "account": dict(account),
            }
        )
        state: dict[str, Tensor] = {}
        for name, made in layers.items():
            top, at = 2 ** made["bits"] - 1, f"layers.{_key(name)}."
            integers, zero, scale = made["integers"], made["zero"].view(-1), made["scale"].view(-1)
            shape = (-1, *[1] * (integers.ndim - 1))
            turned, dead = (scale < 0).view(shape), (scale == 0).view(shape)
            integers = torch.where(turned, top - integers, integers)
            zero = torch.where(turned.view(-1), top - zero, zero)
            integers = torch.where(dead, zero.view(shape).to(integers.dtype), integers)
            state[f"{at}packed"] = pack(integers, made["bits"])
            state[f"{at}scale"] = torch.where(scale == 0, 1, scale.abs()).float()
            state[f"{at}zero"] = zero.to(torch.uint8)
            if "bias" in graph.tensors[name]:
                state[f"{at}bias"] = graph.tensors[name]["bias"].float()
        state |= {f"steps.{_key(name)}": made["scale"].float() for name, made in activations.items()}
        state |= {f"rest.{_key(name)}.{role}": v.float() for name, held in rest.items() for role, v in held.items()}
        network.load_state_dict(state)
        device = next(iter(graph.tensors.values()))["weight"].device
        return network.to(device).eval()
