"""Calibration images without data: images whose statistics inside the network are those of its BatchNorms (Genie-D).

With m_l, s_l the mean and standard deviation per channel, over a batch and all places, of what enters BatchNorm l:

    loss = sum_l (|m_l - mean_l|^2 + |s_l - std_l|^2) / C_l + sum over images and channels (m^2 + (s - 1)^2) / N

where the second term holds every image near mean 0 and deviation 1 (or `mean` and `std`, for networks whose inputs are
not normalised). A small generator and its latents are learned
together, anew for every batch. While they are, strided convolutions look at their input moved at random by up to one
pixel (swing convolution), which keeps checkerboards out of the images. `kind="pixels"` learns the pixels themselves,
without a generator or swing, as ZeroQ does: the baseline.

Cost: `ceil(count / batch) * steps` forward and backward passes of the network, with gradients of images alone; the
larger part of Genie's time. Statistics and BatchNorm are one fused step here, with the gradient written out: on a CPU
`torch.std_mean` with its backward costs more than the convolution before it.

Paper: Jeon et al., "Genie: Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780. Departures from its code:
`count` need not be a multiple of the batch (the last batch is cut, not dropped); images of any size divisible by 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..state import load_state, save_state
from .conv_graph import OPS, Graph, Node, evaluate
from .tracing import norms

__all__ = ["Generator", "Synthesis", "bn_loss", "swing", "synthesize"]

EPS = 1e-6  # of the stored deviations
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Synthesis:
    """How images are made.

    Args:
        count: images. Paper: 1024.
        batch: images made together, whose statistics are matched. Paper: 128.
        steps: Adam steps a batch. Paper: 4000.
        kind: `generator` (Genie-D) or `pixels` (ZeroQ).
        lr_latent: of the latents, or of the pixels. Divided by ten when the loss has not fallen for 100 steps, down to
            1e-4. Paper: 0.1.
        lr_generator: times 0.95 every 100 steps. Paper: 0.01.
        mean, std: of the network's inputs, one number or one a channel. Paper: 0 and 1, images that are normalised.
    """

    count: int = 1024
    batch: int = 128
    steps: int = 4000
    kind: Literal["generator", "pixels"] = "generator"
    lr_latent: float = 0.1
    lr_generator: float = 0.01
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        for name in ("count", "batch", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"synthesis: {name} must be at least 1, got {getattr(self, name)}")
        if self.batch < 2:
            raise InputError("synthesis: the batch must hold at least 2 images, or there are no statistics to match")
        if self.kind not in ("generator", "pixels"):
            raise InputError(f"synthesis: kind is 'generator' or 'pixels', got {self.kind!r}")
        for name in ("lr_latent", "lr_generator"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"synthesis: {name} must be positive, got {getattr(self, name)}")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            given = getattr(self, name)
            numbers = [float(number) for number in ([given] if isinstance(given, (int, float)) else given)]
            if not numbers or not all(math.isfinite(number) and number > least for number in numbers):
                above = " above 0" * (least == 0)
                raise InputError(f"synthesis: {name} is a finite number{above}, or one a channel, got {given}")
            object.__setattr__(self, name, numbers[0] if len(numbers) == 1 else tuple(numbers))


class Generator(nn.Module):
    """256 latents to images of mean 0 and variance 1 over the batch: a linear layer and two 3 x 3 convolutions.

    Args:
        image_shape: channels, height, width; the sides divisible by 4.
        random: draws the initial weights.
    """

    LATENTS = 256

    def __init__(self, image_shape: Sequence[int], random: torch.Generator) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % 4 or width % 4:
            raise InputError(f"images are made with sides divisible by 4, got {height} x {width}")
        self.small = (128, height // 4, width // 4)
        empty = nn.utils.skip_init  # without the default initialisation, which draws from torch's global generator
        self.linear = empty(nn.Linear, self.LATENTS, math.prod(self.small))
        self.conv1, self.conv2 = empty(nn.Conv2d, 128, 64, 3, padding=1), empty(nn.Conv2d, 64, channels, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(128), nn.BatchNorm2d(64)
        self.last = nn.BatchNorm2d(channels, affine=False)
        for layer in (self.linear, self.conv1, self.conv2):
            weight: Any = layer.weight
            bound = weight[0].numel() ** -0.5
            for values in (weight, layer.bias):
                nn.init.uniform_(values, -bound, bound, generator=random)  # type: ignore[arg-type]

    def forward(self, latents: Tensor) -> Tensor:
        """`(N, 256)` -> `(N, C, H, W)`; statistics are those of the batch."""
        x = self.linear(latents).view(-1, *self.small).contiguous(memory_format=torch.channels_last)
        x = F.interpolate(self.norm1(x), scale_factor=2.0)
        x = F.interpolate(F.leaky_relu(self.norm2(self.conv1(x)), 0.2), scale_factor=2.0)
        return self.last(torch.tanh(self.conv2(x)))


def swing(x: Tensor, down: int, right: int, *, jitter: int = 1) -> Tensor:
    """An image batch moved by (down - jitter, right - jitter) pixels, with reflection at the edges.

    Args:
        x: `(N, C, H, W)`; H and W above `jitter`.
        down, right: 0 to 2 jitter; `jitter` leaves the images where they are.
    """
    padded = F.pad(x, [jitter] * 4, mode="reflect")
    return padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]


class _Measured(torch.autograd.Function):
    """`x * gain + shift` together with the mean and deviation of x per channel, in as few passes as there are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        count = x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / count
        centred = x - mean.view(1, -1, 1, 1)  # (N, C, H, W)
        std = (centred.square().sum((0, 2, 3)) / (count - 1)).sqrt()
        ctx.save_for_backward(centred, std, gain)
        ctx.count = count
        out = torch.addcmul((shift + mean * gain).view(1, -1, 1, 1), centred, gain.view(1, -1, 1, 1))
        return out, mean, std

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_mean: Tensor, d_std: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        centred, std, gain = ctx.saved_tensors
        slope = d_std / ((ctx.count - 1) * std.clamp_min(1e-12))
        d_x = torch.addcmul((d_mean / ctx.count).view(1, -1, 1, 1), centred, slope.view(1, -1, 1, 1))
        return d_x.addcmul_(d_out, gain.view(1, -1, 1, 1)), None, None


class _Teacher:
    """The loss of images, with what stays the same between steps worked out once."""

    def __init__(self, graph: Graph, how: Synthesis | None = None) -> None:
        found, how = norms(graph), how or Synthesis()
        last = max(graph.nodes.index(node) for node in found)
        self.graph, self.nodes = graph, graph.nodes[: last + 1]  # what comes after the last BatchNorm has no say
        self.norms: dict[str, tuple[Tensor, ...]] = {}
        for node in found:
            held = graph.tensors[node.name]
            gain = held["weight"] / (held["var"] + node.options["eps"]).sqrt()
            self.norms[node.name] = (
                gain, held["bias"] - held["mean"] * gain, held["mean"], (held["var"] + EPS).sqrt(),
            )  # fmt: skip
        like = next(iter(self.norms.values()))[0]
        self.mean, self.std = (torch.as_tensor(value).to(like).view(1, -1, 1, 1) for value in (how.mean, how.std))

    def place(self, made: Tensor) -> Tensor:
        """Images of mean 0 and deviation 1 where the network's inputs lie."""
        return torch.addcmul(self.mean, made, self.std)

    def __call__(self, images: Tensor, jitter: int = 0, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The BatchNorm term and the image term."""
        losses: list[Tensor] = []

        def call(node: Node, inputs: list[Tensor]) -> Tensor:
            x = inputs[0]
            if node.name in self.norms:
                gain, shift, mean, std = self.norms[node.name]
                out, m, s = _Measured.apply(x, gain, shift)  # type: ignore[misc]
                losses.append((m - mean).square().mean() + (s - std).square().mean())
                return out
            if jitter and node.op == "conv2d" and max(node.options["stride"]) > 1 and min(x.shape[2:]) > jitter:
                down, right = torch.randint(2 * jitter + 1, (2,), generator=random).tolist()
                inputs = [swing(x, down, right, jitter=jitter)]
            return OPS[node.op](*inputs, **self.graph.tensors.get(node.name, {}), **node.options)

        evaluate(self.nodes, {self.graph.input: images}, {}, self.nodes[-1].name, call=call)
        std, mean = torch.std_mean(images, (2, 3))
        mean, std = (mean - self.mean[..., 0, 0]) / self.std[..., 0, 0], std / self.std[..., 0, 0]
        own = (mean.square() + (std - 1).square()).sum() / len(images)
        return torch.stack(losses).sum(), own


def bn_loss(graph: Graph, images: Tensor) -> float:
    """How far the statistics of a batch inside the network are from those its BatchNorms stored, >= 0.

    Args:
        graph: from `trace`.
        images: `(N, C, H, W)`, N of two or more, normalised as for the network.

    Returns:
        The sum over BatchNorms of the mean over channels of squared differences of means and of deviations.
    """
    with torch.no_grad():
        return _Teacher(graph)(images)[0].item()


def _batch(
    teacher: _Teacher, shape: Sequence[int], how: Synthesis, seed: int, like: Tensor, tick: Callable[[int], None]
) -> tuple[Tensor, float]:
    """One batch of images `(N, C, H, W)` and its last loss."""
    random = torch.Generator().manual_seed(seed)
    groups: list[tuple[torch.optim.Optimizer, Any]] = []
    pixels = how.kind == "pixels"
    size = shape if pixels else (Generator.LATENTS,)
    latents = torch.randn((how.batch, *size), generator=random, dtype=like.dtype).to(like.device)
    if pixels:
        latents = latents.contiguous(memory_format=torch.channels_last)
    latents.requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=how.lr_latent)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=100, factor=0.1, min_lr=1e-4)
    generator = None
    if not pixels:
        generator = Generator(shape, random).to(like.device, like.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        second = torch.optim.Adam(generator.parameters(), lr=how.lr_generator, fused=True)
        groups.append((second, torch.optim.lr_scheduler.ExponentialLR(second, 0.95)))
    images, value = latents, math.nan
    for step in range(how.steps):
        images = teacher.place(latents if generator is None else generator(latents))
        loss = sum(teacher(images, jitter=0 if pixels else 1, random=random))
        for each in (optimiser, *(second for second, _ in groups)):
            each.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
        value = loss.item()  # type: ignore[union-attr]
        if not math.isfinite(value):
            raise InputError(f"the loss of the images is {value} at step {step}; lower lr_latent or lr_generator")
        plateau.step(value)
        for second, decay in groups:
            second.step()
            if (step + 1) % 100 == 0:
                decay.step()
        tick(step + 1)
    return images.detach(), value


def synthesize(
    graph: Graph,
    image_shape: Sequence[int],
    how: Synthesis | None = None,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Images that a network's BatchNorms take for its training data.

    Args:
        graph: from `trace`.
        image_shape: channels, height, width.
        how: see `Synthesis`; default: the paper's values.
        seed: of latents, generators and swings. Batch i depends on `seed` and i alone.
        folder: where finished batches are kept; those found there are not made again.
        progress: called with ("images", steps done, steps).

    Returns:
        `(count, C, H, W)`, contiguous, on the network's device, in its dtype.

    Raises:
        InputError: no BatchNorm, running statistics that were never updated, sides not divisible by 4, a mean or std
            for another number of channels, a loss that is not finite.
    """
    how = how or Synthesis()
    teacher = _Teacher(graph, how)
    for name, values in (("mean", teacher.mean), ("std", teacher.std)):
        if values.numel() not in (1, image_shape[0]):
            raise InputError(f"synthesis: {name} has {values.numel()} numbers for images of {image_shape[0]} channels")
    like = next(iter(teacher.norms.values()))[0]
    how = replace(how, batch=max(2, min(how.batch, how.count)))
    batches = math.ceil(how.count / how.batch)
    made: list[Tensor] = []
    for index in range(batches):

        def tick(step: int, before: int = index * how.steps) -> None:
            if progress is not None:
                progress("images", before + step, batches * how.steps)

        file = None if folder is None else Path(folder) / f"images-{index:04}.safetensors"
        if file is not None and file.is_file():
            made.append(load_state(file)["images"].to(like.device))
            tick(how.steps)
            continue
        images, value = _batch(teacher, image_shape, how, seed * 1_000_003 + index, like, tick)
        images = images.contiguous(memory_format=torch.contiguous_format)
        if file is not None:
            save_state({"images": images, "loss": value}, file)
        made.append(images)
    return torch.cat(made)[: how.count]
