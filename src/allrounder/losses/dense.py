"""Losses and scores for maps: what dense multi-task vision predicts at every pixel.

`segmentation_loss`, `depth_loss`, `normal_loss` and `edge_loss` with the scores that go with them (`mean_iou`, `rmse`,
`angular_error`, `edge_f1`). Pixels without a label are left out; a batch without any labelled pixel has the loss 0 with
a gradient of 0, not NaN. Conventions of NYUD-v2 and PASCAL-Context as prepared by the InvPT line of work: label 255 is
unknown, depth 0 is unknown, the zero vector is an unknown normal, a positive edge pixel weighs 0.95 and another 0.05.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError

__all__ = [
    "angular_error", "depth_loss", "edge_f1", "edge_loss", "mean_iou", "normal_loss", "rmse", "segmentation_loss",
]  # fmt: skip

UNKNOWN = 255
POSITIVE = 0.95


def _same(prediction: Tensor, target: Tensor, channels: int) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != channels:
        raise InputError(
            f"prediction and target must both be (N, {channels}, H, W), got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}; resize targets without mixing pixels"
        )


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean over known pixels; 0 with a gradient where there is none."""
    return torch.where(known, values, 0).sum() / known.sum().clamp_min(1)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over labelled pixels.

    Args:
        logits: `(N, C, H, W)`.
        target: `(N, H, W)` class indices, 255 where unknown.

    Raises:
        InputError: other shapes, or a label that is neither a class nor 255.
    """
    if logits.ndim != 4 or target.shape != (len(logits), *logits.shape[2:]):
        raise InputError(
            f"logits (N, C, H, W) need targets (N, H, W), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    known = target != UNKNOWN
    if known.any() and not 0 <= int(target[known].min()) <= int(target[known].max()) < logits.shape[1]:
        raise InputError(f"labels must be 0 to {logits.shape[1] - 1} or {UNKNOWN}; were they resized with bilinear?")
    values = F.cross_entropy(logits, target.long(), ignore_index=UNKNOWN, reduction="none")
    return _mean(values, known)


def depth_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over pixels of known depth; both `(N, 1, H, W)`, depth 0 is unknown."""
    _same(prediction, target, 1)
    return _mean((prediction - target).abs(), target > 0)


def normal_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 distance of the unit vectors, mean over known pixels; both `(N, 3, H, W)`.

    The prediction is normalised here.

    Raises:
        InputError: a target that is neither of unit length nor zero.
    """
    _same(prediction, target, 3)
    known = _known_normals(target)
    return _mean((F.normalize(prediction, dim=1) - target).abs().sum(1), known)


def _known_normals(target: Tensor) -> Tensor:
    length = target.norm(dim=1)
    known = length > 0
    if ((length - 1).abs() > 1e-2)[known].any():
        raise InputError("normals must be of unit length, or zero where unknown; were they scaled to 0..255?")
    return known


def edge_loss(logits: Tensor, target: Tensor, *, positive: float = POSITIVE) -> Tensor:
    """Weighted binary cross-entropy; both `(N, 1, H, W)`, targets 0 or 1, 255 where unknown.

    Args:
        logits: before the sigmoid.
        target: 1 on an edge.
        positive: weight of an edge pixel, 0 to 1; any other weighs `1 - positive`.
    """
    _same(logits, target, 1)
    if not 0 <= positive <= 1:
        raise InputError(f"positive is a weight from 0 to 1, got {positive:g}")
    known = target != UNKNOWN
    if not ((target == 0) | (target == 1))[known].all():
        raise InputError(f"edge targets are 0, 1 or {UNKNOWN}; were they resized with bilinear?")
    weight = torch.where(target == 1, positive, 1 - positive)
    values = F.binary_cross_entropy_with_logits(logits, target.clamp(0, 1).to(logits), reduction="none")
    return _mean(weight * values, known)


def mean_iou(logits: Tensor, target: Tensor) -> float:
    """Intersection over union, mean over the classes that occur in the prediction or the target; 0 to 1."""
    classes, known = logits.shape[1], target != UNKNOWN
    pairs = torch.bincount(target[known].long() * classes + logits.argmax(1)[known], minlength=classes**2)
    counts = pairs.reshape(classes, classes).double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal()[union > 0] / union[union > 0]).mean().item()


def rmse(prediction: Tensor, target: Tensor) -> float:
    """Root of the mean squared error over pixels of known depth."""
    return math.sqrt(_mean((prediction - target).double() ** 2, target > 0).item())


def angular_error(prediction: Tensor, target: Tensor) -> float:
    """Mean angle between predicted and true normals in degrees."""
    cosine = (F.normalize(prediction, dim=1) * target).sum(1).clamp(-1, 1)
    return _mean(torch.rad2deg(cosine.double().acos()), _known_normals(target)).item()


def edge_f1(logits: Tensor, target: Tensor) -> float:
    """F1 score of the edge pixels at probability one half; 0 to 1. No boundary matching: one pixel off is wrong."""
    known, found, edge = target != UNKNOWN, logits > 0, target == 1
    right = (found & edge & known).sum().item()
    return 2 * right / max(1, ((found & known).sum() + (edge & known).sum()).item())
