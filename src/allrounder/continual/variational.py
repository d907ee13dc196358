"""Diagonal Gaussians over the parameters of a network: their divergence and distance, and sets that hold most of them.

A Gaussian over P parameters is one row `(2 P,)`, means then standard deviations, so that many are one matrix and a
weighted sum of any of them is one product. The region that holds most of one is a box (`Box`): of mass 1 - alpha as a
whole when each of its sides has `(1 - alpha)^(1 / P)`. With 1 - alpha for each side it has `(1 - alpha)^P`, which is
nothing for a network. The smallest region of a Gaussian is an ellipsoid; a box is easy to test and to draw from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import InputError
from ..nets.calling import wide

__all__ = ["Box", "Flat", "distances", "divergence", "half_width"]


def divergence(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, summed over the last dimension.

    `sum log(s0 / s) + (s^2 + (m - m0)^2) / (2 s0^2) - 1/2`

    >>> one, two = torch.ones(3), torch.full((3,), 2.0)
    >>> divergence(one, two, one, two).item()
    0.0
    """
    ratio = std / prior_std
    return (((mean - prior_mean) / prior_std).square().add(ratio.square()).sub(1).mul(0.5) - ratio.log()).sum(-1)


def distances(row: Tensor, rows: Tensor) -> Tensor:
    """2-Wasserstein distance of one Gaussian to others, a parameter: `sqrt((||dm||^2 + ||ds||^2) / P)`.

    Args:
        row: `(2 P,)`.
        rows: `(E, 2 P)`.

    Returns:
        `(E,)`; the root mean square over parameters, which is comparable for networks of any size.
    """
    return (rows - row).square().sum(1).div(row.numel() // 2).sqrt()


def half_width(alpha: float, parameters: int = 1) -> float:
    """Half of a box's side in standard deviations.

    Args:
        alpha: what is left outside, in (0, 1).
        parameters: sides of a box that holds 1 - alpha as a whole; 1 for a single parameter's interval.

    >>> round(half_width(0.1), 3), round(half_width(0.01), 3)
    (1.645, 2.576)
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is the mass outside the region, in (0, 1), got {alpha:g}")
    outside = -torch.expm1(torch.log1p(torch.tensor(-alpha, dtype=torch.float64)) / parameters)
    return float(-torch.special.ndtri(outside / 2))


@dataclass(frozen=True)
class Box:
    """The parameters within `width` standard deviations of the mean.

    Args:
        mean, std: `(P,)`.
        width: half of a side, in standard deviations.
    """

    mean: Tensor
    std: Tensor
    width: float

    def __contains__(self, parameters: Tensor) -> bool:
        return bool(((parameters - self.mean).abs() <= self.width * self.std).all())

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """From the Gaussian within the box, every parameter for itself; `(count, P)`."""
        low = torch.special.ndtr(torch.tensor(-self.width, dtype=torch.float64))
        uniform = torch.rand(count, len(self.mean), generator=generator, dtype=torch.float64)
        normal = torch.special.ndtri(low + (1 - 2 * low) * uniform)
        return self.mean + self.std * normal.clamp(-self.width, self.width).to(self.mean)


class Flat:
    """The parameters of a network that are learned, as one vector in at least float32.

    Args:
        model: its parameters that require gradients count; the others and its buffers stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        self.dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        if not self.shapes:
            raise InputError("the model has no parameter that requires a gradient")
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def vector(self) -> Tensor:
        """The model's own, `(P,)`."""
        return torch.cat([wide(p.detach()).flatten() for p in self.model.parameters() if p.requires_grad])

    def named(self, vector: Tensor) -> Mapping[str, Tensor]:
        """A vector `(P,)` by name, in the dtypes of the model; views where it has them."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape).to(self.dtypes[name])
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def __call__(self, vector: Tensor, inputs: object) -> Tensor:
        """The model's output with these parameters; differentiable, the model is not changed."""
        return functional_call(self.model, dict(self.named(vector)), (inputs,))
