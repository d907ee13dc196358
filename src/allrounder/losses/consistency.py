"""What a small surrogate loss promises about errors: the consistency bounds of the comp-sum family as functions.

    R01(h) - R01* <= Gamma( R(h) - R* + M ) - M01

R01 is the error rate, R the mean `comp_sum` loss with tau, a star the best within the hypothesis set, M the
minimisability gap (how far the best of the set stays above the mean of each input's own best; 0 if the set holds all
functions), and Gamma the inverse of the transform T on [0, 1]:

    0 <= tau < 1    T(t) = 2^(1-tau) / (1-tau) (1 - A^(2-tau))        A = ((1+t)^(1/(2-tau)) + (1-t)^(1/(2-tau))) / 2
    tau = 1         T(t) = (1+t)/2 log(1+t) + (1-t)/2 log(1-t)
    1 < tau < 2     T(t) = (A^(2-tau) - 1) / ((tau-1) classes^(tau-1))
    tau >= 2        T(t) = t / ((tau-1) classes^(tau-1))

Use it to see what a loss is worth before training: up to tau = 1 the bound is free of the number of classes, above 1
it grows with it, while the gap M falls. It is a worst case over distributions and mostly far from what a trained
model shows. It holds for complete symmetric hypothesis sets (linear models with bias, networks), and speaks of the
true risks, not of a training sample. Cost: nothing; everything is in float64.

Paper: Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023, arXiv
2304.07288. Departures: Gamma is found by bisection, and is 1 where T is exceeded; A is computed from logarithms, as
its powers overflow near tau = 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from .comp_sum import NEAR, _family, _tau

__all__ = [
    "best_conditional_risk", "conditional_risk", "error_bound", "error_transform", "minimisability_gap",
    "simple_error_bound",
]  # fmt: skip

SLACK = 1e-9  # a gap below zero by this much is rounding
HALVINGS = 60


def error_transform(excess: Tensor | float, tau: float, classes: int) -> Tensor:
    """T: the least excess surrogate risk at which an excess error of `excess` is possible.

    Args:
        excess: excess error, 0 to 1, any shape.
        tau: of the loss, at least 0.
        classes: at least 2.

    Returns:
        float64 in the shape of `excess`; rises from T(0) = 0.

    Raises:
        InputError: an excess outside 0 to 1, a negative tau, fewer than two classes.

    >>> [round(error_transform(0.5, tau, classes=10).item(), 4) for tau in (0, 1, 1.5, 2)]
    [0.134, 0.1308, 0.0747, 0.05]
    """
    t = torch.as_tensor(excess, dtype=torch.float64)
    _tau(tau)
    _classes(classes)
    if not ((t >= 0) & (t <= 1)).all():
        raise InputError(f"excess is an error rate from 0 to 1, got {excess}")
    if tau >= 2:
        return t / ((tau - 1) * classes ** (tau - 1))
    if abs(1 - tau) < NEAR:
        return (torch.special.xlog1py(1 + t, t) + torch.special.xlog1py(1 - t, -t)) / 2
    power = 2 - tau
    large = torch.logaddexp(torch.log1p(t) / power, torch.log1p(-t) / power) - math.log(2)
    s = t.clamp_max(0.5)  # below a half cosh is used: the sum of two powers near 1 would lose every digit of t^2
    small = torch.log1p(-s * s) / (2 * power) + torch.log1p(2 * torch.sinh(torch.atanh(s) / (2 * power)) ** 2)
    log_mean = torch.where(t < 0.5, small, large) if power > 0.05 else large
    factor = 2 ** (1 - tau) if tau < 1 else classes ** (1 - tau)
    return (factor * torch.expm1(power * log_mean) / (tau - 1)).clamp_min(0)


def error_bound(gap: Tensor | float, tau: float, classes: int) -> Tensor:
    """Gamma: the largest excess error that an excess surrogate risk of `gap` allows.

    Args:
        gap: `R(h) - R* + M`, at least 0, any shape.
        tau: of the loss, at least 0.
        classes: at least 2.

    Returns:
        float64 in the shape of `gap`, 0 to 1.

    Raises:
        InputError: a gap that is negative or no number, a negative tau, fewer than two classes.

    >>> round(error_bound(0.1308120359, 1.0, classes=10).item(), 6)
    0.5
    """
    value = _gap(gap)
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        under = error_transform(middle, tau, classes) < value
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return torch.where(value > 0, high, 0)


def simple_error_bound(gap: Tensor | float, tau: float, classes: int) -> Tensor:
    """A bound in closed form that is never below `error_bound`; arguments and errors as there.

    `sqrt(2^tau (2 - tau) gap)` up to tau = 1, `sqrt(2 classes^(tau-1) gap)` up to 2, from there
    `(tau - 1) classes^(tau-1) gap`. It can exceed 1.
    """
    value = _gap(gap)
    _tau(tau)
    _classes(classes)
    if tau <= 1:
        return (2**tau * (2 - tau) * value).sqrt()
    if tau < 2:
        return (2 * classes ** (tau - 1) * value).sqrt()
    return (tau - 1) * classes ** (tau - 1) * value


def conditional_risk(logits: Tensor, probabilities: Tensor, tau: float) -> Tensor:
    """Mean loss over the labels of each input, `sum_y p(y | x) loss(h(x), y)`: the family for soft labels.

    Args:
        logits: `(..., classes)`, finite.
        probabilities: `(..., classes)`, rows of sum 1.
        tau: at least 0.

    Returns:
        `(...,)`, differentiable in the logits, at least in float32.

    Raises:
        InputError: other shapes, a negative tau, rows that are no distribution, logits that are not finite.
    """
    _tau(tau)
    _distribution(probabilities)
    if logits.shape != probabilities.shape:
        have = f"{tuple(logits.shape)} and {tuple(probabilities.shape)}"
        raise InputError(f"logits and probabilities have one shape (..., classes), got {have}")
    if not logits.isfinite().all():
        raise InputError("logits are finite, got NaN or infinity")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (probabilities.to(wide) * _family(-wide.log_softmax(-1), tau)).sum(-1)


def best_conditional_risk(probabilities: Tensor, tau: float) -> Tensor:
    """C*: the least that `conditional_risk` can be, over all scores; falls as tau grows.

    Args:
        probabilities: `(..., classes)`, rows of sum 1.
        tau: at least 0. At 1 it is the entropy, at 2 the least error rate.

    Returns:
        float64, `(...,)`.

    Raises:
        InputError: a negative tau, rows that are no distribution.

    >>> round(best_conditional_risk(torch.tensor([0.5, 0.3, 0.2]), 0.0).item(), 4)
    1.897
    """
    _tau(tau)
    _distribution(probabilities)
    p = probabilities.double()
    if tau >= 2:
        return (1 - p.amax(-1)) / (tau - 1)
    if abs(1 - tau) < NEAR:
        return torch.special.entr(p).sum(-1)
    return torch.expm1((2 - tau) * (p.log() / (2 - tau)).logsumexp(-1)) / (1 - tau)


def minimisability_gap(best_risk: float, probabilities: Tensor, tau: float, weights: Tensor | None = None) -> Tensor:
    """M: the best risk within the hypothesis set, less the mean over inputs of the best risk at each.

    Args:
        best_risk: R*, for example the risk of a model of the set that was trained to its end.
        probabilities: `(inputs, classes)`, the true distribution of labels at each input.
        tau: at least 0.
        weights: `(inputs,)`, how often each input occurs. Default: all alike.

    Returns:
        float64 scalar, at least 0.

    Raises:
        InputError: a best risk below what any function can reach; weights that are no shares.
    """
    least = best_conditional_risk(probabilities, tau)
    if weights is None:
        weights = torch.ones_like(least)
    if weights.shape != least.shape or not (weights >= 0).all() or not weights.sum() > 0:
        raise InputError(f"weights are at least 0 and {tuple(least.shape)}, got {tuple(weights.shape)}")
    gap = best_risk - (weights.double() * least).sum() / weights.double().sum()
    if not gap >= -1e-6:
        raise InputError(f"best_risk {best_risk:g} is {-gap.item():.3g} below what any function reaches: another tau?")
    return gap.clamp_min(0)


def _gap(gap: Tensor | float) -> Tensor:
    value = torch.as_tensor(gap, dtype=torch.float64)
    if not (value >= -SLACK).all():
        raise InputError(f"gap is an excess risk of at least 0, got {gap}; subtract the best risk, not another loss's")
    return value.clamp_min(0)


def _classes(classes: int) -> None:
    if classes < 2:
        raise InputError(f"classes is at least 2, got {classes}")


def _distribution(probabilities: Tensor) -> None:
    if probabilities.ndim < 1 or not probabilities.numel() or probabilities.shape[-1] < 2:
        raise InputError(f"probabilities are (..., classes) with two classes or more, got {tuple(probabilities.shape)}")
    if not ((probabilities >= 0).all() and ((probabilities.double().sum(-1) - 1).abs() < 1e-3).all()):
        raise InputError("probabilities are at least 0 with rows of sum 1; softmax logits first")
