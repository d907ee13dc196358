"""Step sizes and roundings learned together, block by block (Genie-M).

Weights w of an output channel, b bits, step s, zero point z, base integers B = floor(w / s) frozen at the start:

    soft weight = s (clip(B + h(v) + z, 0, 2^b - 1) - z),   h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)

Because B is a constant and no function of s, moving s does not change which of two integers each v chooses between:
this is the paper's point, and lets s learn with v where AdaRound keeps it (here `lr_scale=0`). After training h becomes
1 where v >= 0 and 0 elsewhere. Activations have one learned step a each (LSQ); in training each of their elements, and
of the block's input, keeps its full-precision value with probability 1/2 (QDrop). A block minimises

    mean over images and places of sum over channels (y_q - y)^2  +  weight * sum (1 - |2 h(v) - 1|^beta)

Cost of a step: one forward and backward pass of the block on a batch. BatchNorm is folded into the weight that the
block runs with; the gradients of v, s and a are written out, and QDrop draws bits, not uniform numbers.

Paper: Jeon et al., CVPR 2023, arXiv 2212.04780; AdaRound arXiv 2004.10568, LSQ 1902.08153, QDrop 2203.05740.
Departures from its code: the range of a channel includes 0, so that the zero point is one of the 2^b integers; the
batch is what `batch` says whatever the number of images; one QDrop mask for a value, not one for each of its readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .conv_graph import Block, Graph, evaluate

__all__ = ["ActivationScale", "BlockStudent", "Rounding", "SoftWeight", "fit_block", "init_scale"]

SMALLEST = 1e-10  # below this a step is that of a dead channel
BETAS, WARMUP = (20.0, 2.0), 0.2


@dataclass(frozen=True)
class Rounding:
    """How a block is fitted.

    Args:
        steps: Adam steps a block. Paper: 20000. 0 is round-to-nearest with the same starting steps.
        batch: images a step. Paper: 32.
        lr_bits: of the roundings v, constant. Paper: 1e-3.
        lr_scale: of the weights' steps, cosine to 0. Paper: 1e-4; 0 is AdaRound.
        lr_activation: of the activations' steps, cosine to 0. Paper: 4e-5.
        weight: of the term that makes roundings choose, off in the first 20% of the steps. Paper: 1.
    """

    steps: int = 20_000
    batch: int = 32
    lr_bits: float = 1e-3
    lr_scale: float = 1e-4
    lr_activation: float = 4e-5
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1:
            raise InputError(f"rounding: steps is 0 or more and batch 1 or more, got {self.steps} and {self.batch}")
        for name in ("lr_bits", "lr_scale", "lr_activation", "weight"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"rounding: {name} must be 0 or more, got {getattr(self, name)}")


def init_scale(rows: Tensor, bits: int, *, symmetric: bool = False, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Steps and zero points by search over 100 ranges, for the least mean |x - Q(x)|^2.4.

    Args:
        rows: `(channels, elements)`.
        bits: 2 to 8.
        symmetric: for activations: integers around 0 (`signed`) or from 0 up.

    Returns:
        Steps `(channels,)`, at least 1e-10, and zero points `(channels,)`, whole numbers of the same dtype.
    """
    top = 2**bits - 1
    if symmetric:
        high = rows.abs().amax(1)
        low = -high if signed else torch.zeros_like(high)
    else:
        high, low = rows.amax(1).clamp_min(0), rows.amin(1).clamp_max(0)
    best = torch.full_like(high, math.inf)
    scale, zero = torch.ones_like(high), torch.zeros_like(high)
    for percent in range(100, 0, -1):
        step = ((high - low) * (percent / 100) / top).clamp_min(SMALLEST)
        at = (-low * (percent / 100) / step).round()
        error = (rows / step[:, None]).round_().add_(at[:, None]).clamp_(0, top).sub_(at[:, None]).mul_(step[:, None])
        score = error.sub_(rows).abs_().pow_(2.4).mean(1)
        better = score < best
        best, scale, zero = score.where(better, best), step.where(better, scale), at.where(better, zero)
    return scale, zero


class SoftWeight:
    """The weights of one layer as B + h(v), with the gradients of v and s.

    Args:
        weight: `(out, ...)`, as in the network.
        bits: 2 to 8.
        gain: `(out,)`, the factor of the folded BatchNorm; `None` is 1.
    """

    def __init__(self, weight: Tensor, bits: int, gain: Tensor | None = None) -> None:
        shape = (-1, *[1] * (weight.ndim - 1))
        scale, zero = init_scale(weight.flatten(1), bits)
        self.top, self.bits = 2**bits - 1, bits
        self.scale, self.zero = scale.view(shape).clone(), zero.view(shape)
        self.gain = torch.ones_like(scale).view(shape) if gain is None else gain.view(shape)
        ratio = weight / self.scale
        self.base = ratio.floor()
        self.logits = -torch.log(1.2 / (ratio - self.base + 0.1) - 1)
        self.base_zero = self.base + self.zero
        self.leaf = torch.empty(0)
        for learned in (self.scale, self.logits):
            learned.grad = torch.zeros_like(learned)

    def soft(self) -> Tensor:
        """The weight to run with, times the gain; its `.grad` is what `pull` reads."""
        self._sigmoid = self.logits.sigmoid()
        stretched = (self._sigmoid * 1.2).sub_(0.1)
        self._h = stretched.clamp(0, 1)
        level = self._h + self.base_zero
        clipped = level.clamp(0, self.top)
        self._free, self._inside = _same(stretched, self._h), _same(level, clipped)
        self._integers = clipped.sub_(self.zero)
        self.leaf = (self._integers * (self.scale * self.gain)).requires_grad_()
        return self.leaf

    def pull(self, beta: float | None, weight: float) -> None:
        """Put the gradients of `logits` and `scale` in place, from `leaf.grad` and the rounding term."""
        assert self.leaf.grad is not None
        assert self.logits.grad is not None
        assert self.scale.grad is not None
        grad = self.leaf.grad * self.gain
        torch.sum(grad * self._integers, tuple(range(1, grad.ndim)), keepdim=True, out=self.scale.grad)
        grad.mul_(self.scale).mul_(self._inside)
        if beta is not None:
            side = self._h * 2 - 1
            grad.sub_(side.abs().pow_(beta - 1).mul_(side.sign_()), alpha=2 * beta * weight)
        slope = (1 - self._sigmoid).mul_(self._sigmoid).mul_(1.2).mul_(self._free)
        torch.mul(grad, slope, out=self.logits.grad)

    def hard(self) -> Tensor:
        """The integers, 0 to 2^b - 1, as floats."""
        return (self.base_zero + (self.logits >= 0)).clamp_(0, self.top)

    def hardened(self) -> Tensor:
        """The rounded weight, times the gain."""
        return (self.hard() - self.zero) * (self.scale * self.gain)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """1 where equal and 0 elsewhere, in the dtype of a: several times faster on a CPU than through booleans."""
    return torch.eq(a, b, out=torch.empty_like(a))


def _flat(x: Tensor) -> Tensor:
    """A vector, in the order of the channels-last layout where x has that."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).reshape(-1)


class _Quantise(torch.autograd.Function):
    """LSQ, and QDrop where there is a mask: its ones keep their value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, mask: Tensor | None, low: int, high: int) -> Tensor:  # type: ignore[override]
        ratio = x / scale
        out = ratio.clamp(low, high)
        inside = torch.eq(out, ratio, out=ratio)  # in place from here on: what limits a step is memory
        out.round_().mul_(scale)
        if mask is not None:
            out.lerp_(x, mask)
            torch.maximum(inside, mask, out=inside)
        ctx.save_for_backward(x, scale, inside, out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        x, scale, inside, out = ctx.saved_tensors
        d_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.addcmul(out, x, inside, value=-1)  # q - x inside, the bound outside, 0 if kept
            d_scale = (torch.dot(_flat(slope), _flat(d_out)) / scale).view_as(scale)
        return (inside.mul_(d_out) if ctx.needs_input_grad[0] else None), d_scale, None, None, None


class _Bits:
    """Random masks of zeros and ones, 64 from every number drawn."""

    def __init__(self, random: torch.Generator, like: Tensor) -> None:
        self.random = random
        self.table = torch.arange(256)[:, None].bitwise_right_shift(torch.arange(8)).bitwise_and_(1).to(like)

    def __call__(self, like: Tensor) -> Tensor:
        drawn = torch.empty(-(-like.numel() // 64), dtype=torch.int64, device=like.device)
        drawn.random_(-(2**63), None, generator=self.random)  # type: ignore[call-overload]
        flat = self.table.index_select(0, drawn.view(torch.uint8).int()).view(-1)[: like.numel()]
        if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
            n, c, h, w = like.shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(like.shape)


class ActivationScale:
    """One learned step for a value; signed or not is decided by the first batch it sees."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.scale: Tensor | None = None
        self.low = self.high = 0

    def start(self, x: Tensor) -> None:
        """Set the step from a batch."""
        signed = bool(x.min() < 0)
        self.set(init_scale(x.reshape(1, -1), self.bits, symmetric=True, signed=signed)[0].view(()).clone(), signed)

    def set(self, scale: Tensor, signed: bool) -> None:
        self.scale = scale.requires_grad_()
        self.low, self.high = (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if signed else (0, 2**self.bits - 1)

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _Quantise.apply(x, self.scale, mask, self.low, self.high)  # type: ignore[return-value]


class BlockStudent:
    """A block with quantised weights and activations.

    Args:
        block: its steps.
        graph: the folded graph, for biases and what else has tensors.
        layers: layer name -> its weight.
        activations: value name -> its step, for the values that this block quantises.
    """

    def __init__(
        self, block: Block, graph: Graph, layers: Mapping[str, SoftWeight], activations: Mapping[str, ActivationScale]
    ) -> None:
        self.block, self.layers, self.activations = block, dict(layers), dict(activations)
        self.tensors = {node.name: dict(graph.tensors.get(node.name, {})) for node in block.nodes}

    def run(self, x: Tensor, *, soft: bool, bits: _Bits | None = None) -> Tensor:
        """The block's output; with `bits`, each quantised element is kept as it was half of the time."""
        for name, layer in self.layers.items():
            self.tensors[name]["weight"] = layer.soft() if soft else layer.hardened()

        def change(name: str, value: Tensor) -> Tensor:
            quantiser = self.activations.get(name)
            if quantiser is None:
                return value
            if quantiser.scale is None:
                quantiser.start(value)
            return quantiser(value, None if bits is None else bits(value))

        block = self.block
        return evaluate(block.nodes, {block.input: x}, self.tensors, block.output, change)


def _temperature(step: int, steps: int) -> float | None:
    """The exponent of the rounding term after this many steps, `None` before the term counts."""
    start = WARMUP * steps
    if step < start:
        return None
    return BETAS[1] + (BETAS[0] - BETAS[1]) * max(0.0, 1 - (step - start) / max(steps - start, 1e-9))


def fit_block(
    student: BlockStudent,
    take: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    images: int,
    how: Rounding,
    random: torch.Generator,
    tick: Callable[[int], None] | None = None,
) -> None:
    """Learn a block's roundings and steps, in place.

    Args:
        student: the block; its activations have their first steps.
        take: indices `(n,)` -> input of the full-precision block, input from the quantised blocks before it, output of
            the full-precision block.
        images: how many there are.
        how: see `Rounding`.
        random: order of the images, on the CPU; masks come from one on the device, seeded by it.
        tick: called with the steps done.

    Raises:
        InputError: a loss that is not finite.
    """
    layers = list(student.layers.values())
    scales = [found.scale for found in student.activations.values() if found.scale is not None]
    like = layers[0].scale
    mask_seed = int(torch.randint(1 << 62, (), generator=random))
    bits = _Bits(torch.Generator(like.device).manual_seed(mask_seed), like)
    groups: list[dict[str, Any]] = [
        {"params": [layer.logits for layer in layers], "lr": how.lr_bits, "peak": how.lr_bits, "cosine": False},
        {"params": [layer.scale for layer in layers], "lr": how.lr_scale, "peak": how.lr_scale, "cosine": True},
        {"params": scales, "lr": how.lr_activation, "peak": how.lr_activation, "cosine": True},
    ]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
    size, order, at = min(how.batch, images), torch.empty(0, dtype=torch.int64), images
    for step in range(how.steps):
        if at + size > images:
            order, at = torch.randperm(images, generator=random), 0
        full, quantised, target = take(order[at : at + size])
        at += size
        out = student.run(torch.lerp(quantised, full, bits(full)), soft=True, bits=bits)
        error, places = out.detach() - target, out.numel() // out.shape[1]
        if step % 100 == 0 and not math.isfinite(loss := error.square().sum().item() / places):
            raise InputError(f"block {student.block.name!r}: the loss is {loss} at step {step}; lower the rates")
        for scale in scales:
            scale.grad = None
        out.backward(error.mul_(2 / places))  # of the loss, in the layout of the features
        beta = _temperature(step + 1, how.steps)
        for layer in layers:
            layer.pull(beta, how.weight)
        for group in optimiser.param_groups:
            if group["cosine"]:
                group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / how.steps))
        optimiser.step()
        if tick is not None:
            tick(step + 1)
    with torch.no_grad():
        for scale in (*scales, *(layer.scale for layer in layers)):
            scale.clamp_(min=SMALLEST)
