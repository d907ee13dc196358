"""Comp-sum losses: one family of classification losses from sum-exponential over cross-entropy to MAE, by one number.

With s the softmax probability of the true class and tau >= 0:

    loss = (s^(tau - 1) - 1) / (1 - tau),    and -log s at tau = 1

    tau = 0            1 / s - 1           sum-exponential: hard examples count without bound
    tau = 1            -log s              cross-entropy
    1 < tau < 2        (1 - s^q) / q       generalised cross-entropy (GCE) with q = tau - 1
    tau = 2            1 - s               mean absolute error (MAE), up to a factor 2

The gradient is cross-entropy's times s^(tau - 1). So tau > 1 turns away from examples the model finds unlikely: use
1.3 to 1.8 when labels are wrong, and expect a slow start with many classes (MAE may not leave chance). With clean
labels stay near 1. tau < 1 is for theory and comparison: one confident mistake can drown a batch, and float32
overflows where -log s > 88 / (1 - tau); clip the gradient. `allrounder.losses.error_bound` says what a small loss
promises about errors. Cost: that of cross-entropy, O(classes) an example, and one wait for the GPU for the checks.

Paper: Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023, arXiv
2304.07288. GCE and its truncation: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural
Networks with Noisy Labels", 2018, arXiv 1805.07836. Departures: none in the family; the truncated loss keeps the part
that is one loss (a constant below the threshold) and leaves the alternating pruning of examples out.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .preference import Reduction

__all__ = ["CompSumLoss", "comp_sum", "truncated_gce"]

NEAR = 1e-6  # a tau this close to 1 is cross-entropy
SLOW = 1.9  # from this tau on, training may stay at chance
WARM_UP = 200


def comp_sum(logits: Tensor, target: Tensor, tau: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """The comp-sum loss of each example, or its mean or sum.

    Args:
        logits: `(N, classes)`, floating; a class may be masked with `-inf`.
        target: `(N,)` class indices. For soft labels see `allrounder.losses.conditional_risk`.
        tau: at least 0. Paper: 1 is best on clean labels.
        reduction: `mean`, `sum` or `none`.

    Returns:
        The loss in the dtype of the logits, but at least in float32 (it is computed there too).

    Raises:
        InputError: a negative tau, other shapes, an empty batch, a target that is no class, logits with NaN or +inf.

    >>> logits, target = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0])
    >>> [round(comp_sum(logits, target, tau).item(), 4) for tau in (0, 1, 1.5, 2)]
    [0.5032, 0.4076, 0.3688, 0.3348]
    """
    _tau(tau)
    return _reduced(_family(-true_log_prob(logits, target), tau), reduction)


def truncated_gce(
    logits: Tensor, target: Tensor, q: float = 0.7, threshold: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    """GCE that is constant for examples whose true class has a probability below `threshold`: they do not count.

    Train with `comp_sum(..., tau=1 + q)` first: an untrained model is below the threshold everywhere, and the
    gradient is zero.

    Args:
        logits, target, reduction: as for `comp_sum`.
        q: above 0 to 1. Paper: 0.7.
        threshold: probability from 0 to below 1. Paper: 0.5.

    Returns:
        `(1 - max(s, threshold)^q) / q`.

    Raises:
        InputError: q or a threshold out of range; what `comp_sum` raises.
    """
    if not 0 < q <= 1:
        raise InputError(f"q is above 0 and at most 1, got {q:g}; it is tau - 1")
    if not 0 <= threshold < 1:
        raise InputError(f"threshold is a probability from 0 to below 1, got {threshold:g}")
    log_s = true_log_prob(logits, target)
    kept = log_s.exp() > threshold
    # the constant carries a gradient of 0, so that a batch below the threshold can still be stepped on
    floor = _family(-torch.tensor(threshold, dtype=torch.float64).log(), 1 + q).to(log_s)
    return _reduced(torch.where(kept, _family(-log_s, 1 + q), floor), reduction)


class CompSumLoss(nn.Module):
    """`comp_sum` as a module.

    Args:
        tau: at least 0.
        reduction: `mean`, `sum` or `none`.

    Warns:
        Once, at call 200 in training mode, when tau >= 1.9 and the true class has no more than 1.1 times the
        probability of chance: the gradient has vanished. Start with a smaller tau.
    """

    def __init__(self, tau: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.tau = _tau(tau)
        self.reduction: Reduction = reduction
        self._calls = 0

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self._calls += self.training
        if self.training and self._calls == WARM_UP and self.tau >= SLOW:
            classes = logits.shape[-1]
            found = true_log_prob(logits.detach(), target).exp().mean().item()
            if found < 1.1 / classes:
                warnings.warn(
                    f"after {WARM_UP} calls the true class has the mean probability {found:.3g}, chance is "
                    f"{1 / classes:.3g}: tau={self.tau:g} gives hardly any gradient; start with a smaller tau",
                    stacklevel=2,
                )
        return comp_sum(logits, target, self.tau, self.reduction)

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, reduction={self.reduction!r}"


def true_log_prob(logits: Tensor, target: Tensor) -> Tensor:
    """log s, `(N,)`, in at least float32, after the checks that `comp_sum` promises."""
    if target.is_floating_point():
        raise InputError("target is class indices, got floats; for soft labels use allrounder.losses.conditional_risk")
    if logits.ndim != 2 or target.shape != logits.shape[:1] or not logits.numel():
        raise InputError(
            f"logits are (N, classes) and target (N,) with N >= 1, got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if not logits.is_floating_point():
        raise InputError(f"logits are floating, got {logits.dtype}")
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
    low, high, bad = torch.stack([target.min(), target.max(), log_p.isnan().any().to(target.dtype)]).tolist()
    if low < 0 or high >= logits.shape[1]:
        raise InputError(f"target is 0 to {logits.shape[1] - 1}, got {low} to {high}; leave out ignored examples")
    if bad:
        raise InputError("logits have NaN or +inf; training diverged, or the inputs have NaN")
    return log_p.gather(1, target.long().unsqueeze(1)).squeeze(1)


def _family(loss: Tensor, tau: float) -> Tensor:
    """Cross-entropy -> the member tau of the family; exact where cross-entropy is small."""
    return loss if abs(1 - tau) < NEAR else torch.expm1((1 - tau) * loss) / (1 - tau)


def _tau(tau: float) -> float:
    if not 0 <= tau < float("inf"):
        raise InputError(f"tau is at least 0 (0 sum-exponential, 1 cross-entropy, 2 MAE), got {tau:g}")
    return tau


def _reduced(value: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    return value if reduction == "none" else cast(Tensor, getattr(value, reduction)())
