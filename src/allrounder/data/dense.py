"""A dense toy suite: small scenes with four maps each, rendered together.

A scene is a tilted ground with domes, pyramids and half-cylinders on it, seen from above without perspective. All maps
come from one height field, so they agree: `segmentation` (material of each object), `depth`, `normals` and `edges`
(where one object ends). The image has three channels. Channel 2 holds the shading under a light from a random
direction, which tells geometry. Channels 0 and 1 are paint: in scenes of style 0 the material is the paint in channel
0 and channel 1 is a decoy, in style 1 the other way round. A brighter ground in one of the two tells the style, so that
reading materials needs a choice that depends on the input.

Nothing is downloaded; 1,000 scenes of 16 x 16 take about 0.1 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..losses.dense import (
    angular_error,
    depth_loss,
    edge_f1,
    edge_loss,
    mean_iou,
    normal_loss,
    rmse,
    segmentation_loss,
)  # fmt: skip
from ..task import Examples, Suite, Task

__all__ = ["MATERIALS", "Scenes", "dense", "scenes"]

MATERIALS = 3
PAINT = (0.2, 0.5, 0.8)
GROUND = {True: 0.35, False: 0.05}  # of the channel that tells materials, and of the other
NOISE = 0.03
OBJECTS = 3


@dataclass(frozen=True)
class Scenes:
    """N scenes.

    Args:
        image: `(N, 3, S, S)`, 0 to 1 before noise.
        segmentation: `(N, S, S)` int64; 0 is the ground, 1 to 3 are materials.
        depth: `(N, 1, S, S)`, distance from the camera, above 0.
        normals: `(N, 3, S, S)`, unit vectors.
        edges: `(N, 1, S, S)`, 0 or 1.
        style: `(N,)` int64.
    """

    image: Tensor
    segmentation: Tensor
    depth: Tensor
    normals: Tensor
    edges: Tensor
    style: Tensor


def _heights(kind: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Heights of domes (0), pyramids (1) and half-cylinders (2) over a plane, below zero outside their outline."""
    box = torch.maximum(x.abs(), y.abs())
    dome = (radius**2 - x**2 - y**2).clamp_min(0).sqrt()
    dome = torch.where(x**2 + y**2 < radius**2, dome, -1)
    pyramid = torch.where(box < radius, radius - box, -1)
    cylinder = torch.where(box < radius, (radius**2 - y**2).clamp_min(0).sqrt(), -1)
    return torch.where(kind == 0, dome, torch.where(kind == 1, pyramid, cylinder))


def scenes(count: int, *, size: int = 16, seed: int = 0) -> Scenes:
    """Render scenes.

    Args:
        count: N >= 1.
        size: S >= 8, pixels a side.
        seed: of everything random.

    Raises:
        InputError: sizes out of range.
    """
    if count < 1 or size < 8:
        raise InputError(f"count is at least 1 and size at least 8, got {count} and {size}")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    slope = uniform(-0.3, 0.3, count, 2, 1, 1)
    ground = slope[:, 0] * grid_x + slope[:, 1] * grid_y  # (N, S, S)

    centre, angle = uniform(-0.7, 0.7, count, OBJECTS, 2, 1, 1), uniform(0, math.pi, count, OBJECTS, 1, 1)
    radius, kind = uniform(0.25, 0.5, count, OBJECTS, 1, 1), whole(3, count, OBJECTS, 1, 1)
    x, y = grid_x - centre[:, :, 0], grid_y - centre[:, :, 1]
    turned = _heights(kind, x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin(), radius)
    stacked = torch.cat([torch.zeros(count, 1, size, size), turned], 1)  # (N, 1 + objects, S, S)
    height, owner = stacked.max(1)
    z = ground + height

    gradient_y, gradient_x = torch.gradient(z, spacing=2 / size, dim=(1, 2))
    normals = F.normalize(torch.stack([-gradient_x, -gradient_y, torch.ones_like(z)], 1), dim=1)
    edges = torch.zeros(count, 1, size, size)
    edges[:, 0, :, :-1] += owner[:, :, 1:] != owner[:, :, :-1]
    edges[:, 0, :-1] += owner[:, 1:] != owner[:, :-1]

    light = F.normalize(torch.cat([uniform(-1, 1, count, 2), torch.ones(count, 1)], 1), dim=1)
    shading = (normals * light[:, :, None, None]).sum(1).clamp_min(0)
    style = whole(2, count)
    material, decoy = whole(MATERIALS, count, OBJECTS), whole(MATERIALS, count, OBJECTS)
    paint = torch.tensor(PAINT)

    def painted(which: Tensor, telling: bool) -> Tensor:
        palette = torch.cat([torch.full((count, 1), GROUND[telling]), paint[which]], 1)
        return palette.gather(1, owner.flatten(1)).reshape(count, size, size)

    telling, other = painted(material, True), painted(decoy, False)
    first = (style == 0)[:, None, None]
    image = torch.stack([torch.where(first, telling, other), torch.where(first, other, telling), shading], 1)
    image += NOISE * torch.randn(image.shape, generator=generator)
    labels = torch.cat([torch.zeros(count, 1, dtype=torch.long), material + 1], 1)
    segmentation = labels.gather(1, owner.flatten(1)).reshape(count, size, size)
    return Scenes(image, segmentation, 2 - z[:, None], normals, edges.clamp_max(1), style)


def dense(*, size: int = 16, train: int = 1500, validation: int = 300, test: int = 500, seed: int = 0) -> Suite:
    """The scenes as a suite of four tasks over the same images.

    Metrics, higher is better: mean IoU, minus RMSE, minus the mean angle in degrees, F1.

    Args:
        size: pixels a side.
        train, validation, test: scenes in each split.
        seed: of the scenes; splits are rendered with seeds of their own.
    """
    counts = {"train": train, "validation": validation, "test": test}
    rendered = {name: scenes(n, size=size, seed=3 * seed + i) for i, (name, n) in enumerate(counts.items())}

    def task(name: str, outputs: int, loss: Callable, metric: Callable) -> Task:
        splits = [Examples(rendered[part].image, getattr(rendered[part], name)) for part in counts]
        return Task(name, *splits, outputs=outputs, loss=loss, metric=metric)

    return Suite(
        [
            task("segmentation", MATERIALS + 1, segmentation_loss, mean_iou),
            task("depth", 1, depth_loss, lambda outputs, targets: -rmse(outputs, targets)),
            task("normals", 3, normal_loss, lambda outputs, targets: -angular_error(outputs, targets)),
            task("edges", 1, edge_loss, edge_f1),
        ],
        name="dense",
    )
