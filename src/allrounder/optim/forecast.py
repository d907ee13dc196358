"""What breaks next: two quantities of small runs, extrapolated in the number of parameters.

    log (largest attention logit)  =  a + b log N (+ c (log N)^2)     at one learning rate; trouble near 1e4
    log (RMS of the gradients)     =  a + b log N + c log eta         trouble near 10 eps of Adam

Attention logits that grow with size end in attention that looks at one token; gradients that shrink with size end in
updates that vanish, because Adam divides by sqrt(v) + eps. Use it with three sizes or more, which differ in depth and
width together as the target does; an extrapolation over more than about a factor of 30 in N is a guess. Free.

Small-scale proxies for large-scale Transformer training instabilities (2023, arXiv 2309.14322). Departure: with three
sizes the fit in log N is a line, because a quadratic through three points has nothing left to be wrong about; from
four sizes on it is the paper's quadratic. The limits are from secondary sources; they are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Forecast", "forecast_attention_logit", "forecast_gradient_rms"]


@dataclass(frozen=True)
class Forecast:
    """What a quantity would be at a size that was not run, and whether that is beyond its limit."""

    quantity: str
    parameters: int
    lr: float
    value: float
    limit: float
    flagged: bool


def _sizes(parameters: Sequence[float], values: Sequence[float], target: float, what: str) -> None:
    if len(parameters) != len(values):
        raise InputError(f"{what}: one value for each size, got {len(parameters)} sizes and {len(values)} values")
    if not all(math.isfinite(number) and number > 0 for number in (*parameters, *values, target)):
        raise InputError(f"{what}: sizes and values are finite and above 0; leave out runs that diverged")
    if (count := len(set(parameters))) < 3:
        raise InputError(f"{what}: a forecast needs three sizes or more, got {count}; run another size")


def _fit(columns: Tensor, values: Sequence[float]) -> Tensor:
    logs = torch.tensor(values, dtype=torch.float64).log()
    return torch.linalg.lstsq(columns, logs[:, None], driver="gelsd").solution[:, 0]


def forecast_attention_logit(
    parameters: Sequence[int], logits: Sequence[float], target: int, *, lr: float, limit: float = 1e4
) -> Forecast:
    """The largest attention logit at `target` parameters, from at least three smaller models at one learning rate.

    Args:
        parameters: N of each model, grown in depth and width as the target is.
        logits: the largest |attention logit| of each, > 0.
        target: N of the model that is not run.
        lr: the learning rate of all of them.
        limit: above it the run is flagged; training broke near 1e4 in the paper.

    Returns:
        The value of a least-squares fit of log logit: a quadratic in log N with four sizes or more, else a line.

    Raises:
        InputError: fewer than three sizes, or values that are not finite and positive.

    >>> found = forecast_attention_logit([10, 100, 1000], [1.0, 10.0, 100.0], 10**6, lr=0.01)
    >>> round(found.value), found.flagged
    (100000, True)
    """
    _sizes(parameters, logits, target, "attention logits")
    degree = 2 if len(set(parameters)) > 3 else 1
    logs = torch.tensor([*parameters, target], dtype=torch.float64).log()
    columns = (logs - logs[0])[:, None] ** torch.arange(degree + 1)
    value = math.exp(min(700.0, float(columns[-1] @ _fit(columns[:-1], logits))))
    return Forecast("max_attention_logit", target, lr, value, limit, value > limit)


def forecast_gradient_rms(
    parameters: Sequence[int], lrs: Sequence[float], values: Sequence[float], target: int, lr: float,
    *, eps: float = 1e-8,
) -> Forecast:  # fmt: skip
    """The gradients' RMS at `target` parameters and `lr`, from runs at three sizes or more.

    Args:
        parameters, lrs, values: N, learning rate and gradient RMS > 0 of each run.
        target, lr: the run that is not made.
        eps: Adam's. Gradients within 10 eps are flagged: the step shrinks, then vanishes. A smaller eps repairs it.

    Returns:
        The value of the plane log RMS = a + b log N + c log lr, fitted by least squares.

    Raises:
        InputError: fewer than three sizes, or numbers that are not finite and positive.

    >>> found = forecast_gradient_rms([10, 100, 1000], [0.1] * 3, [1e-4, 1e-5, 1e-6], 10**5, 0.1)
    >>> found.flagged, f"{found.value:.0e}"
    (True, '1e-08')
    """
    _sizes(parameters, values, target, "gradient RMS")
    if len(lrs) != len(values) or not all(math.isfinite(rate) and rate > 0 for rate in (*lrs, lr)):
        raise InputError("gradient RMS: one learning rate above 0 for each run, and one for the forecast")
    points = torch.tensor([*zip(parameters, lrs, strict=True), (target, lr)], dtype=torch.float64).log()
    columns = torch.cat([torch.ones(len(points), 1, dtype=torch.float64), points - points[:-1].mean(0)], dim=1)
    value = math.exp(float(columns[-1] @ _fit(columns[:-1], values)))
    return Forecast("gradient_rms", target, lr, value, 10 * eps, value <= 10 * eps)
