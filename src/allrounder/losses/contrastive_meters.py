"""What contrastive training did to an embedding: how the push is spread, how uniform features lie, how tolerant.

    relative_penalty   softmax(s_ij / T): the gradient of InfoNCE at each negative, by that at the positive
    uniformity         -log mean exp(-t |x - y|^2), t = 2: high when features spread over the whole sphere
    tolerance          mean similarity of features of one class: high when a class stays together
    align_uniform_loss mean |a_i - p_i|^2 - weight * uniformity: what InfoNCE does, said in two terms

Read uniformity and tolerance together over a few temperatures: one rises as the other falls, and the best features
lie between. They speak of features, not of a probe's accuracy, and are comparable only on the same examples. All take
rows of unit length. Cost: O(n^2 d) for uniformity, O(n d) for tolerance.

Paper: Wang and Liu, "Understanding the Behaviour of Contrastive Loss", CVPR 2021, arXiv 2012.09740. Alignment and
uniformity: Wang and Isola, 2020, arXiv 2005.10242. Departure: `tolerance` gives the mean over all pairs, as the paper
defines it, and over pairs of one class, which alone can reach the paper's figures; a feature is not paired with itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Tolerance", "align_uniform_loss", "penalty_entropy", "relative_penalty", "tolerance", "uniformity"]

UNIT = 1e-2  # how far a norm may be from 1; bfloat16 rounds by 4e-3


def relative_penalty(similarities: Tensor, temperature: float) -> Tensor:
    """How InfoNCE spreads its push over the negatives: the gradient at each, by that at the positive.

    Args:
        similarities: `(..., N)` to negatives; `-inf` where one is left out.
        temperature: above 0.

    Returns:
        `softmax(similarities / temperature)`, rows of sum 1.
    """
    if not temperature > 0:
        raise InputError(f"temperature is above 0, got {temperature:g}")
    if similarities.ndim < 1 or not similarities.numel() or similarities.isnan().any():
        raise InputError(f"similarities are (..., N) with N >= 1 and no NaN, got {tuple(similarities.shape)}")
    wide = similarities if similarities.dtype == torch.float64 else similarities.float()
    return (wide / temperature).softmax(-1)


def penalty_entropy(similarities: Tensor, temperature: float) -> Tensor:
    """Entropy of `relative_penalty` in nats, `(...,)`: 0 is one negative alone, log N all alike. Rises with T."""
    return torch.special.entr(relative_penalty(similarities, temperature)).sum(-1)


def align_uniform_loss(anchors: Tensor, positives: Tensor, *, weight: float = 1.0, t: float = 2.0) -> Tensor:
    """Mean squared distance of the pairs, plus `weight` times minus the mean `uniformity` of both views.

    Args:
        anchors, positives: `(m, d)`, rows of unit length, m at least 2.
        weight: at least 0. Paper: 1.
        t: sharpness of the uniformity. Paper: 2.
    """
    _pairs(anchors, positives)
    if not 0 <= weight < math.inf:
        raise InputError(f"weight is at least 0, got {weight:g}")
    alignment = (_wide(anchors) - _wide(positives)).square().sum(1).mean()
    return alignment - weight * (uniformity(anchors, t) + uniformity(positives, t)) / 2


def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """`-log mean exp(-t |x - y|^2)` over distinct pairs: 0 for one point, about 2t at most. Differentiable.

    Args:
        features: `(n, d)`, rows of unit length, n at least 2. Cost O(n^2 d): a few thousand rows do.
        t: above 0. Paper: 2.
    """
    if not 0 < t < math.inf:
        raise InputError(f"t is above 0, got {t:g}")
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"features are (n, d) with n >= 2, got {tuple(features.shape)}")
    _unit("features", features)
    wide = _wide(features)
    parts = []
    for start in range(0, len(wide), 1024):
        exponent = 2 * t * (wide[start : start + 1024] @ wide.T - 1)  # |x - y|^2 = 2 - 2 x y
        rows = torch.arange(len(exponent), device=wide.device)
        own = torch.zeros_like(exponent, dtype=torch.bool)
        own[rows, start + rows] = True
        parts.append(exponent.masked_fill(own, -torch.inf).logsumexp(1))
    return math.log(len(wide) * (len(wide) - 1)) - torch.cat(parts).logsumexp(0)


class Tolerance(NamedTuple):
    """Mean of `x y 1(same class)` over all distinct pairs, and mean similarity over pairs of one class."""

    all_pairs: float
    conditional: float


@torch.no_grad()
def tolerance(features: Tensor, labels: Tensor) -> Tolerance:
    """How close features of one class are. `all_pairs` cannot exceed the share of pairs of one class.

    Args:
        features: `(n, d)`, rows of unit length.
        labels: `(n,)` integers.

    Raises:
        InputError: other shapes, rows that are not of unit length, no class with two examples.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.numel():
        raise InputError(f"features are (n, d) and labels (n,), got {tuple(features.shape)} and {tuple(labels.shape)}")
    _unit("features", features)
    wide = features.double()
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    pairs = (counts * (counts - 1)).sum().item()
    if not pairs:
        raise InputError("labels have no class with two examples; tolerance is a mean over pairs of one class")
    sums = wide.new_zeros(len(counts), wide.shape[1]).index_add_(0, place, wide)
    total = (sums.square().sum() - wide.square().sum()).item()
    return Tolerance(total / (len(wide) * (len(wide) - 1)), total / pairs)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _pairs(anchors: Tensor, positives: Tensor) -> None:
    if anchors.ndim != 2 or positives.shape != anchors.shape or not anchors.numel():
        have = f"{tuple(anchors.shape)} and {tuple(positives.shape)}"
        raise InputError(f"anchors and positives are both (m, d) with m >= 1, got {have}")
    _unit("anchors", anchors)
    _unit("positives", positives)


def _unit(name: str, value: Tensor) -> None:
    length = _wide(value.detach()).norm(dim=1)
    if not ((length - 1).abs() < UNIT).all():
        raise InputError(
            f"{name} are rows of unit length, got lengths from {length.min():.3g} to {length.max():.3g}; use "
            "torch.nn.functional.normalize(x, dim=1)"
        )
