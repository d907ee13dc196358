"""What dense multi-task decoders share: a head per task, a backbone in front, and the plain decoder to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = ["DenseHead", "DensePredictor", "SharedDecoder", "aligned", "check_decoder", "conv_block", "tokens_to_map"]


Norm = Callable[[int], nn.Module]
"""Channels -> a normalisation of maps. BatchNorm wants all tasks to see the same images; where each task has inputs of
its own, statistics of its batches in training are not the running ones of all tasks, and GroupNorm is the choice."""


def conv_block(fan_in: int, fan_out: int, *, groups: int = 1, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """3 x 3 convolution of the same size, normalisation, GELU."""
    conv = nn.Conv2d(fan_in, fan_out, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, norm(fan_out), nn.GELU())


class DenseHead(nn.Module):
    """A map of features to a map of outputs: enlarge, 3 x 3 block, 1 x 1 convolution."""

    def __init__(self, width: int, outputs: int, *, upsample: int = 1, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.upsample, self.block = upsample, conv_block(width, width, norm=norm)
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """`(N, D, h, w)` -> `(N, outputs, *size)`."""
        if self.upsample > 1:
            features = F.interpolate(features, scale_factor=self.upsample, mode="bilinear")
        made = self.out(self.block(features))
        return made if made.shape[2:] == tuple(size) else F.interpolate(made, size=tuple(size), mode="bilinear")


def tokens_to_map(tokens: Tensor, grid: tuple[int, int], *, prefix: int = 0) -> Tensor:
    """Patch tokens of a transformer as a map.

    Args:
        tokens: `(N, prefix + h * w, C)`, row by row.
        grid: (h, w).
        prefix: class, register or task tokens before the patches; they are dropped.

    Returns:
        `(N, C, h, w)`.

    Raises:
        InputError: another number of tokens.

    >>> tokens_to_map(torch.zeros(2, 1 + 6, 5), (2, 3), prefix=1).shape
    torch.Size([2, 5, 2, 3])
    """
    height, width = grid
    if tokens.ndim != 3 or tokens.shape[1] - prefix != height * width:
        raise InputError(
            f"tokens (N, tokens, C) are {tuple(tokens.shape)}, expected {height * width} after {prefix} in front"
        )
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)


def aligned(features: Sequence[Tensor], channels: Sequence[int]) -> list[Tensor]:
    """The maps of all taps at the size of the largest.

    Raises:
        InputError: another number of taps or of channels, or maps that are not finite.
    """
    found = [tuple(part.shape) for part in features]
    if any(len(shape) != 4 for shape in found) or [shape[1] for shape in found] != list(channels):
        raise InputError(f"features must be maps (N, C, h, w) with C = {', '.join(map(str, channels))}, got {found}")
    if len(features[0]) == 0:
        raise InputError("features of an empty batch give no maps")
    size = max((shape[2:] for shape in found), key=lambda s: s[0] * s[1])
    return [F.interpolate(part, size=size, mode="bilinear") if part.shape[2:] != size else part for part in features]


def check_decoder(tasks: Mapping[str, int], channels: Sequence[int], width: int) -> None:
    """Raises InputError for a decoder without tasks, taps or width."""
    if not tasks or not channels or min(*tasks.values(), *channels, width) < 1:
        raise InputError(
            f"a decoder needs tasks with outputs, taps with channels and a width, got {dict(tasks)}, {list(channels)}, "
            f"{width}"
        )


class SharedDecoder(nn.Module):
    """The baseline: every tap projected, summed, one shared block, one head per task.

    Args:
        tasks: name -> output channels.
        channels: of each tap of the backbone.
        width: D.
        upsample: enlarges the features before the heads.
        norm: channels -> normalisation, BatchNorm by default.
        seed: of the initial weights.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        channels: Sequence[int],
        *,
        width: int = 64,
        upsample: int = 1,
        norm: Norm = nn.BatchNorm2d,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_decoder(tasks, channels, width)
        self.channels = tuple(channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.ModuleList(nn.Conv2d(given, width, 1) for given in channels)
            self.block = conv_block(width, width, norm=norm)
            self.heads = nn.ModuleDict(
                {task: DenseHead(width, n, upsample=upsample, norm=norm) for task, n in tasks.items()}
            )

    def forward(
        self, features: Sequence[Tensor], *, size: Sequence[int], tasks: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Maps of the taps -> task -> `(N, outputs, *size)`."""
        maps = aligned(features, self.channels)
        shared = self.block(torch.stack([project(part) for project, part in zip(self.project, maps)]).sum(0))
        return {task: self.heads[task](shared, size) for task in (tasks or self.heads)}


class DensePredictor(nn.Module):
    """A backbone and a decoder: `model(images)` gives every task's map, `model(images, task)` one.

    Args:
        backbone: images `(N, 3, H, W)` -> a list of maps, or an object with `feature_maps` (a transformers
            `AutoBackbone`).
        decoder: `TaskExpert` or `SharedDecoder`.
    """

    def __init__(self, backbone: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, images: Tensor, task: str | None = None) -> Any:
        found = self.backbone(images)
        maps = list(getattr(found, "feature_maps", found))
        made = self.decoder(maps, size=images.shape[2:], tasks=None if task is None else [task])
        return made if task is None else made[task]
