"""Classification losses that look at the outputs only through three numbers a row: the spherical family.

    L = f(a, q, s),   a = o_c,   q = sum_k o_k^2,   s = sum_k o_k        outputs o of D classes, target class c

    Z-loss                  softplus(alpha (beta - z_c)) / alpha,  z_c = (a - s/D) / sqrt(q/D - (s/D)^2)
    spherical softmax       log(q + D eps) - log(a^2 + eps)
    Taylor softmax          log(D + s + q/2) - log(1 + a + a^2/2)
    one-hot squared error   q - 2 a + 1

With a dense output layer they cost what log-softmax costs. Their use is `FactoredOutput`, which takes the same loss
object and needs no pass over the classes. The Z-loss changes neither when all outputs of a row are shifted nor when
they are scaled; it ranks well, and it has no probabilities: no perplexity can be given. Classes are ranked by
`loss.score(outputs)`: the output itself for the Z-loss and the squared error, but o^2 for spherical and 1 + o + o^2/2
for Taylor softmax, whose targets may as well go far below zero. Take log-softmax
(`torch.nn.functional.cross_entropy`) when the classes are few or probabilities are needed. This is not the "z-loss" of
language model training, a penalty on the log normaliser of a softmax (`allrounder.optim.z_penalty`).

Alpha says how sharp the hinge of the Z-loss is, beta where it sits: z_c never exceeds sqrt(D - 1), and beyond that the
slope only flattens to one. Both are to be tuned for the score that counts, for example over alpha in 0.05, 0.1, 0.5, 1,
5 and beta in 0, 3, 10, sqrt(D - 1) / 2, sqrt(D - 1).

Papers: de Brebisson & Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
Family", 2016, arXiv 1604.08859, and "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family",
ICLR 2016, arXiv 1511.05042. Departures: outputs without any spread are refused rather than divided by a small number,
which would hand on a gradient of arbitrary size; dense Z-losses centre the outputs first, so that a large common offset
costs no digits; several targets a row count with equal shares.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = [
    "OneHotSquaredError", "SphericalLoss", "SphericalSoftmaxLoss", "TaylorSoftmaxLoss", "ZLoss",
    "one_hot_squared_error", "spherical_softmax_loss", "taylor_softmax_loss", "z_loss",
]  # fmt: skip

Reduction = Literal["none", "mean", "sum"]


class SphericalLoss(nn.Module):
    """A loss of the family; a subclass says what `family` is.

    `loss(logits, targets)` is the dense loss: logits `(N, D)` of any float type, integer targets `(N,)`, or `(N, K)`
    for the mean over K targets a row. Statistics are in float32 or better, the result in the type of the logits.

    Args:
        reduction: over rows: `mean`, `sum`, or `none` for a loss `(N,)`.

    Raises:
        InputError: other shapes, targets that are not classes, an empty batch, logits that are not finite.
    """

    shift_invariant: ClassVar[bool] = False

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise InputError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}")
        self.reduction: Reduction = reduction

    def family(self, target: Tensor, square: Tensor, total: Tensor, classes: int) -> Tensor:
        """The loss of each target.

        Args:
            target: outputs a of target classes, `(N,)` or `(N, K)`.
            square, total: q and s of each row, `(N,)` or `(N, 1)`.
            classes: D.
        """
        raise NotImplementedError

    def score(self, outputs: Tensor) -> Tensor:
        """What classes are ranked by, of the shape of `outputs`; the largest is the prediction."""
        return outputs

    def rows(self, target: Tensor, square: Tensor, total: Tensor, classes: int) -> Tensor:
        """The loss of each row `(N,)`, from `target` `(N, K)`, `square` and `total` `(N,)`."""
        if not torch.isfinite(square).all():
            raise InputError("outputs are NaN or so large that their squares overflow; lower the learning rate")
        return self.family(target, square[:, None], total[:, None], classes).mean(1)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim != 2 or not logits.is_floating_point():
            raise InputError(f"logits are floats (N, D), got {tuple(logits.shape)} {logits.dtype}; flatten other axes")
        columns = target_columns(targets, *logits.shape)
        outputs = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.shift_invariant:
            outputs = outputs - outputs.mean(1, keepdim=True)
        rows = self.rows(outputs.gather(1, columns), outputs.square().sum(1), outputs.sum(1), logits.shape[1])
        return reduced(rows, self.reduction).to(logits.dtype)

    def extra_repr(self) -> str:
        settings = {k: v for k, v in vars(self).items() if isinstance(v, (float, str)) and not k.startswith("_")}
        return ", ".join(f"{name}={value}" for name, value in settings.items())


class ZLoss(SphericalLoss):
    """`z_loss` as a module; the arguments are the same."""

    shift_invariant = True

    def __init__(self, alpha: float = 1.0, beta: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        if not (0 < alpha < math.inf and math.isfinite(beta)):
            raise InputError(f"the Z-loss needs a finite alpha above 0 and a finite beta, got {alpha:g} and {beta:g}")
        self.alpha, self.beta = float(alpha), float(beta)

    def family(self, target: Tensor, square: Tensor, total: Tensor, classes: int) -> Tensor:
        if classes < 2:
            raise InputError(f"the Z-loss compares classes and needs two or more, got {classes}")
        mean, power = total / classes, square / classes
        variance = power - mean.square()
        lost = ~(variance > 100 * torch.finfo(power.dtype).eps * power)
        if lost.any():
            raise InputError(
                f"all outputs of row {int(lost.flatten().nonzero()[0])} are equal up to rounding, which has no Z-loss; "
                "start from random weights, or use float64"
            )
        return F.softplus(self.beta - (target - mean) / variance.sqrt(), beta=self.alpha, threshold=40)


class SphericalSoftmaxLoss(SphericalLoss):
    """`spherical_softmax_loss` as a module; the arguments are the same."""

    def __init__(self, eps: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        if not 0 < eps < math.inf:
            raise InputError(f"spherical softmax needs a finite eps above 0, got {eps:g}")
        self.eps = float(eps)

    def family(self, target: Tensor, square: Tensor, total: Tensor, classes: int) -> Tensor:
        return (square + classes * self.eps).log() - (target.square() + self.eps).log()

    def score(self, outputs: Tensor) -> Tensor:
        return outputs.square()


class TaylorSoftmaxLoss(SphericalLoss):
    """`taylor_softmax_loss` as a module."""

    def family(self, target: Tensor, square: Tensor, total: Tensor, classes: int) -> Tensor:
        return (classes + total + square / 2).log() - (1 + target + target.square() / 2).log()

    def score(self, outputs: Tensor) -> Tensor:
        return 1 + outputs + outputs.square() / 2


class OneHotSquaredError(SphericalLoss):
    """`one_hot_squared_error` as a module."""

    def family(self, target: Tensor, square: Tensor, total: Tensor, classes: int) -> Tensor:
        return square - 2 * target + 1


def z_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 1.0, beta: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """How far the standardised output of the target stays below beta, softly.

    Args:
        logits: `(N, D)`, any float type, D at least 2.
        targets: `(N,)` integers in 0 to D - 1, or `(N, K)` for the mean over K targets a row.
        alpha: sharpness, above 0. At infinity `max(0, beta - z_c)`, towards 0 a slope of 1/2. Paper's example: 1.
        beta: where the hinge sits. Paper's example: 0.
        reduction: `mean`, `sum` (the paper's example) or `none`.

    Returns:
        A scalar, or `(N,)`; at least 0.

    Raises:
        InputError: settings out of range, one class, a row of equal outputs, and what `SphericalLoss` raises.

    >>> round(z_loss(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([3])).item(), 6)
    0.232235
    """
    return ZLoss(alpha, beta, reduction)(logits, targets)


def spherical_softmax_loss(
    logits: Tensor, targets: Tensor, *, eps: float = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """Minus the log of the target's share of the squared outputs.

    Args:
        logits, targets, reduction: as for `z_loss`.
        eps: added to each square; above 0, and to be tuned: training can fail by a poor one.

    >>> round(spherical_softmax_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([1]), eps=1.0).item(), 6)
    0.09531
    """
    return SphericalSoftmaxLoss(eps, reduction)(logits, targets)


def taylor_softmax_loss(logits: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Log-softmax with the second-order Taylor polynomial in place of the exponential; arguments as for `z_loss`.

    >>> round(taylor_softmax_loss(torch.zeros(1, 4), torch.tensor([2])).item(), 6)
    1.386294
    """
    return TaylorSoftmaxLoss(reduction)(logits, targets)


def one_hot_squared_error(logits: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Squared distance of the outputs from 1 at the target and 0 elsewhere; arguments as for `z_loss`.

    With K targets a row, from 1/K at each, up to a constant.

    >>> one_hot_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([0])).item()
    4.0
    """
    return OneHotSquaredError(reduction)(logits, targets)


def target_columns(targets: Tensor, rows: int, classes: int) -> Tensor:
    """Targets as `(N, K)` int64, checked."""
    if rows == 0 or targets.ndim not in (1, 2) or len(targets) != rows or targets.shape[-1] == 0:
        raise InputError(f"{rows} rows need targets ({rows},) or ({rows}, K), at least one; got {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise InputError(f"targets are class numbers, integers; got {targets.dtype}")
    low, high = (int(value) for value in targets.aminmax())
    if low < 0 or high >= classes:
        raise InputError(f"targets must be 0 to {classes - 1}, got {low} to {high}; leave other rows out")
    return targets.long().reshape(rows, -1)


def reduced(rows: Tensor, reduction: Reduction) -> Tensor:
    """The losses of rows `(N,)`, or their mean or sum."""
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
