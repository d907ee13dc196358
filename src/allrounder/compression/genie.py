"""A BatchNorm network with 2- to 8-bit weights and activations, without a single real image.

    small = quantize(model, weights=4, activations=4, image_shape=(3, 32, 32))
    small.save("small"); small(images)

Images are made from the BatchNorm statistics (`genie_data`), then blocks are fitted one after the other
(`genie_rounding`): a residual block at a time, a layer where there is no shortcut. The first and last layers keep 8
bits and the second layer's input too; the network's input is not quantised.

Use it for a pretrained convolutional network when its data cannot be had; with real images (a thousand, unlabelled)
give them as `images`: the same fit, usually a little better. Not for transformers, and not for networks without
BatchNorm unless there are images.

Cost: `ceil(count / batch) * steps` passes of the network for the images, `blocks * steps` passes of one block for the
fit. Only the features between two blocks are kept (input of both networks and the block's output); they move on block
by block, so time is linear in blocks where the reference code starts from the images for each. They are in memory up
to `cache_bytes`, and on disk above. On one CPU core ResNet-20 at 32 x 32 takes about 0.4 s a step of 128 images and
10 ms a step of a block; the paper's settings are for a GPU.

Paper: Jeon et al., "Genie: Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780. Departures from its code:
BatchNorm is folded; a layer outside residual blocks is fitted with its BatchNorm and activation; the result is stored
as integers. What else differs is said in `genie_data` and `genie_rounding`.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..state import load_state, save_state
from .conv_graph import Block, Graph, cut, evaluate, fold
from .genie_data import Synthesis, synthesize
from .genie_rounding import SMALLEST, ActivationScale, BlockStudent, Rounding, SoftWeight, fit_block
from .quantized import QuantizedNetwork
from .tracing import norms, trace

__all__ = ["digest", "quantize"]

EDGE_BITS = 8
CHUNK = 64  # images a forward pass when features move on; fixed, so that a run that is continued gives the same bits
Progress = Callable[[str, int, int], None]


def quantize(
    model: nn.Module,
    *,
    weights: int = 4,
    activations: int | None = 4,
    image_shape: Sequence[int] = (3, 224, 224),
    images: Tensor | None = None,
    method: Literal["genie", "adaround", "nearest"] = "genie",
    synthesis: Synthesis | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    cache_bytes: int = 2 << 30,
    progress: Progress | None = None,
) -> QuantizedNetwork:
    """Quantise a network.

    Args:
        model: `(N, *image_shape)` -> logits; any class that `tracing.trace` can follow. It is left as it was.
        weights: bits of weights, 2 to 8.
        activations: bits of activations, 2 to 8; `None` leaves them as they are.
        image_shape: channels, height, width of what the model takes. Paper: 3 x 224 x 224.
        images: real images `(M, *image_shape)`, normalised as for the model, in place of made ones.
        method: `genie`; `adaround`, which keeps the weights' first steps; `nearest`, which rounds and learns nothing.
        synthesis, rounding: settings; default: the paper's.
        seed: of everything random.
        folder: where the state is kept after each batch of images and each block, so that a run that was stopped goes
            on from there, with the result it would have had.
        cache_bytes: largest size of one set of features in memory; larger ones are on disk, in `folder` or the
            system's temporary folder. Default 2 GiB.
        progress: called with ("images" or "blocks", steps done, steps).

    Returns:
        The network as integers, on the model's device, in float32; `description["account"]` says how it was made, and
        the error that each block is left with.

    Raises:
        InputError: bits out of range, a model that cannot be traced or has no (trained) BatchNorm, images that do not
            fit it, a folder with another run's state.

    Warns:
        When output channels of a layer have only weights of zero.
    """
    for name, value in (("weights", weights), ("activations", activations)):
        if value is not None and not (isinstance(value, int) and 2 <= value <= 8):
            raise InputError(f"{name} takes 2 to 8 bits, got {value!r}")
    if method not in ("genie", "adaround", "nearest"):
        raise InputError(f"method is 'genie', 'adaround' or 'nearest', got {method!r}")
    how, rounding = synthesis or Synthesis(), rounding or Rounding()
    if method == "adaround":
        rounding = replace(rounding, lr_scale=0.0)
    elif method == "nearest":
        rounding = replace(rounding, steps=0)
    shape = tuple(image_shape if images is None else images.shape[1:])
    if images is not None and (images.ndim != 4 or len(images) < 2 or not torch.isfinite(images).all()):
        raise InputError(f"images are a finite tensor (M, C, H, W), M at least 2, got {tuple(images.shape)}")
    graph = trace(model, shape)
    if not graph.layers:
        raise InputError("the model has no convolution or linear layer: nothing to quantise")
    if images is None:
        norms(graph)
    plan = {"weights": weights, "activations": activations, "method": method, "seed": seed, "image_shape": list(shape)}
    plan |= {"rounding": asdict(rounding), "synthesis": asdict(how) if images is None else None}
    with tempfile.TemporaryDirectory(prefix="genie-") as scratch:
        if folder is not None:
            folder = Path(folder).expanduser()
            _claim(folder, plan | {"model": digest(graph), "images": None if images is None else _hash(images)})
        if images is None:
            images = synthesize(graph, shape, how, seed=seed, folder=folder, progress=progress)
        like = next(iter(graph.tensors.values()))["weight"]
        run = _Run(graph, plan, images.to(like.device, like.dtype), rounding, Path(folder or scratch), cache_bytes)
        return run.finish(folder is not None, progress)


def _hash(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest(graph: Graph) -> str:
    """64 hexadecimal digits that stand for a graph's steps and tensors."""
    steps = hashlib.sha256(repr(graph.nodes).encode()).hexdigest()
    return steps[:32] + _hash(*(tensor for held in graph.tensors.values() for tensor in held.values()))[:32]


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder this run's, or see that it is."""
    file = folder / "run.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            save_state({"plan": plan, "empty": torch.zeros(1)}, file)
            return
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be used for the state ({error.strerror}); give another") from error
    kept = load_state(file).get("plan", {})
    differ = [name for name in plan if kept.get(name) != plan[name]]
    if differ:
        raise InputError(
            f"{str(folder)!r} holds the state of a run with other {', '.join(differ)}; give another folder or empty it"
        )


class _Features:
    """Features of all images, channels last, in memory or in a mapped file that goes when it is done with."""

    def __init__(self, first: Tensor, count: int, file: Path, limit: int) -> None:
        self.image = first.ndim == 4
        shape = (count, *(first.permute(0, 2, 3, 1) if self.image else first).shape[1:])
        size = count * first[0].numel()
        self.file = file if size * first.element_size() > limit else None
        if self.file is None:
            self.held = torch.empty(shape, dtype=first.dtype, device=first.device)
        else:
            file.unlink(missing_ok=True)
            self.held = torch.from_file(str(file), shared=True, size=size, dtype=first.dtype).view(shape)
        self.device = first.device

    def put(self, at: int, values: Tensor) -> None:
        self.held[at : at + len(values)] = values.permute(0, 2, 3, 1) if self.image else values

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        index = index if isinstance(index, slice) else index.to(self.held.device)
        values = (self.held[index] if isinstance(index, slice) else self.held.index_select(0, index)).to(self.device)
        return values.permute(0, 3, 1, 2) if self.image else values

    def drop(self) -> None:
        if self.file is not None:
            self.held = torch.empty(0)
            self.file.unlink(missing_ok=True)


class _Run:
    """One quantisation: the plan of bits, and the walk over the blocks."""

    def __init__(
        self, graph: Graph, plan: dict[str, Any], images: Tensor, how: Rounding, folder: Path, cache_bytes: int
    ) -> None:
        self.raw, self.plan, self.how, self.folder, self.limit = graph, plan, how, folder, cache_bytes
        self.graph, self.gains = fold(graph)
        self.blocks, self.count = cut(self.graph), len(images)
        layers = self.graph.layers
        edges = {layers[0].name, layers[-1].name}
        self.weight_bits = {n.name: EDGE_BITS if n.name in edges else plan["weights"] for n in layers}
        self.activation_bits: dict[str, int] = {}
        for position, node in enumerate(layers):
            value = node.inputs[0]
            if plan["activations"] is None or value == self.graph.input:
                continue
            bits = EDGE_BITS if position == 1 or node.name in edges else plan["activations"]
            self.activation_bits[value] = max(bits, self.activation_bits.get(value, 0))
        self.made = 0
        self.full = self._store(images, lambda part: part)
        self.quantised = self.full
        self._report_dead()

    def _report_dead(self) -> None:
        for node in self.graph.layers:
            rows = self.raw.tensors[node.name]["weight"].flatten(1)
            dead = (rows.abs().amax(1) < SMALLEST).nonzero().view(-1).tolist()
            if dead:
                shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
                warnings.warn(f"layer {node.name!r}: the weights of output channels {shown} are all zero", stacklevel=5)

    @torch.no_grad()
    def _store(self, source: Any, function: Callable[[Tensor], Tensor]) -> _Features:
        """`function` of all features, chunk by chunk."""
        self.made += 1
        store = None
        for start in range(0, self.count, CHUNK):
            values = function(source[start : start + CHUNK])
            if store is None:
                store = _Features(values, self.count, self.folder / f".features-{self.made}", self.limit)
            store.put(start, values)
        assert store is not None
        return store

    def _pass(self, block: Block, x: Tensor) -> Tensor:
        return evaluate(block.nodes, {block.input: x}, self.graph.tensors, block.output)

    def _student(self, block: Block) -> BlockStudent:
        names = {node.name for node in block.nodes} | {block.input}
        layers = {
            node.name: SoftWeight(
                self.raw.tensors[node.name]["weight"], self.weight_bits[node.name], self.gains.get(node.name)
            )
            for node in block.nodes
            if node.name in self.weight_bits
        }
        readers = {name for node in block.nodes for name in node.inputs}
        activations = {
            name: ActivationScale(bits)
            for name, bits in self.activation_bits.items()
            if name in names and name in readers
        }
        return BlockStudent(block, self.graph, layers, activations)

    def _fit(self, index: int, block: Block, target: _Features, progress: Progress | None) -> dict[str, Any]:
        """Fit one block; what was learned, as plain tensors."""
        student, full, quantised = self._student(block), self.full, self.quantised
        with torch.no_grad():
            student.run(quantised[: self.how.batch], soft=True)
        total = len(self.blocks) * self.how.steps

        def tick(step: int) -> None:
            if progress is not None:
                progress("blocks", index * self.how.steps + step, total)

        fit_block(
            student, lambda at: (full[at], quantised[at], target[at]), self.count, self.how,
            torch.Generator().manual_seed(self.plan["seed"] * 1_000_003 + 500_009 + index), tick,
        )  # fmt: skip
        layers = {
            name: {
                "integers": layer.hard().to(torch.uint8),
                "zero": layer.zero.view(-1).to(torch.uint8),
                "scale": (layer.scale * layer.gain).view(-1).detach(),
                "bits": layer.bits,
            }
            for name, layer in student.layers.items()
        }
        activations = {
            name: {"scale": found.scale.detach(), "bits": found.bits, "signed": found.low < 0}
            for name, found in student.activations.items()
            if found.scale is not None
        }
        return {"layers": layers, "activations": activations}

    def _advance(self, block: Block, learned: dict[str, Any], target: _Features) -> float:
        """Move both sets of features past the block; the block's error that is left."""
        tensors = {node.name: dict(self.graph.tensors.get(node.name, {})) for node in block.nodes}
        for name, layer in learned["layers"].items():
            shape = (-1, *[1] * (layer["integers"].ndim - 1))
            zero, scale = layer["zero"].view(shape).to(layer["scale"].dtype), layer["scale"].view(shape)
            tensors[name]["weight"] = (layer["integers"].to(scale.dtype) - zero) * scale
        steps = {}
        for name, found in learned["activations"].items():
            steps[name] = ActivationScale(found["bits"])
            steps[name].set(found["scale"].detach(), found["signed"])

        def change(name: str, value: Tensor) -> Tensor:
            return steps[name](value) if name in steps else value

        def forward(x: Tensor) -> Tensor:
            return evaluate(block.nodes, {block.input: x}, tensors, block.output, change)

        moved = self._store(self.quantised, forward)
        error = 0.0
        for start in range(0, self.count, CHUNK):
            part = moved[start : start + CHUNK]
            squares = (part - target[start : start + CHUNK]).double().square().sum()
            error += squares.item() / (part[0].numel() // part.shape[1])
        if self.quantised is not self.full:
            self.quantised.drop()
        self.full.drop()
        self.full, self.quantised = target, moved
        return error / self.count

    def finish(self, keep: bool, progress: Progress | None) -> QuantizedNetwork:
        layers: dict[str, Any] = {}
        activations: dict[str, Any] = {}
        errors: list[dict[str, Any]] = []
        device = next(iter(self.graph.tensors.values()))["weight"].device
        for index, block in enumerate(self.blocks):
            target = self._store(self.full, partial(self._pass, block))
            file = self.folder / f"block-{index:04}.safetensors"
            if keep and file.is_file():
                learned = _to(load_state(file), device)
                if progress is not None and self.how.steps:
                    progress("blocks", (index + 1) * self.how.steps, len(self.blocks) * self.how.steps)
            else:
                learned = self._fit(index, block, target, progress)
                if keep:
                    save_state(learned, file)
            errors.append({"block": block.name, "error": self._advance(block, learned, target)})
            layers |= learned["layers"]
            activations |= learned["activations"]
        self.full.drop()
        self.quantised.drop()
        account = self.plan | {"images": self.count, "block_errors": errors}
        return QuantizedNetwork.build(
            self.graph, layers, activations, image_shape=tuple(self.plan["image_shape"]), account=account
        )


def _to(nest: Any, device: torch.device) -> Any:
    if isinstance(nest, Tensor):
        return nest.to(device)
    return {name: _to(value, device) for name, value in nest.items()} if isinstance(nest, dict) else nest
