"""Preference losses as plain functions of the log probabilities of a winning and a losing answer.

    log_p_w, log_p_l: log probability of the winner and of the loser under the model that is trained
    log_r_w, log_r_l: the same under the frozen reference (detached here: no gradient flows into it)
    D = log_p_w - log_p_l,  R = log_r_w - log_r_l

    dpo           -log sigmoid(beta (D - R))              cpo           -log sigmoid(beta D) + NLL(w)
    dpo_hinge     max(0, 1 - beta (D - R))                orpo          NLL(w) - beta log sigmoid(logit p_w - logit p_l)
    dpo_robust    dpo, unbiased under flipped labels      simpo         -log sigmoid(beta D - gamma)
    ipo           (D - R - 1 / (2 beta))^2                rrhf          max(0, -D) + NLL(w)
    dpop          dpo, with beta penalty max(0, log_r_w - log_p_w) subtracted inside
    slic          max(0, margin - D) + nll NLL(w)         unlikelihood  -log p_w - log(1 - p_l)
    ccpo, cunl, uncpo    -log sigmoid(beta log(t / b)) of p_w / (p_l (1 - p_w)), p_w (1 - p_l) / p_l,
                         (1 - p_l (1 - p_w)) / (p_l (1 - p_w))
    ce            NLL(w) = -log p_w: likelihood of the winner alone

Every function takes tensors of one shape (usually `(pairs,)`), any float dtype and device, and gives one value a pair
before the `reduction`. `lengths`, the token counts `(winner, loser)`, turns log probabilities of whole answers into
means per token wherever the loss uses means (in `cpo` the NLL alone); without it they are used as they are.

Use `sequence_log_probs` for the log probabilities. For losses with 1 - p (orpo, unlikelihood, ccpo, cunl, uncpo) give
`lengths`: the probability of a whole answer underflows, 1 - p is 1, and the loss says less than it should. New losses
come from `allrounder.losses.compile_loss`. The reference must share the policy's tokeniser, and winner and loser must
differ: neither can be seen in these numbers. Cost: nothing beside the model's forward pass; a few
synchronisations with the GPU for the checks.

The list follows Richardson, Srikumar and Sabharwal, "Understanding the Logic of Direct Preference Alignment through
Logic", ICML 2025, arXiv 2412.17696. Values agree with trl 1.16. Departures: trl's ORPO takes the NLL over prompt and
answer, here it is the answer's; trl averages the NLL over the tokens of a batch, here over pairs of means per token.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = [
    "LOSSES", "PreferenceLoss", "Reduction", "SequenceLogProbs", "ccpo", "ce", "cpo", "cunl", "dpo", "dpo_hinge",
    "dpo_robust", "dpop", "ipo", "log1mexp", "orpo", "rrhf", "sequence_log_probs", "simpo", "slic", "uncpo",
    "unlikelihood",
]  # fmt: skip

Reduction = Literal["mean", "sum", "none"]
Lengths = tuple[Tensor, Tensor] | None

CEILING = -1e-6  # log p above this is put here, so that log(1 - p) is finite
NOTHING = -17.0  # below this p, 1 - p is 1 in float32
NAMES = ("log_p_w", "log_p_l", "log_r_w", "log_r_l")


class SequenceLogProbs(NamedTuple):
    """Log probability of each answer, and how many tokens it is the sum of; both `(batch,)`."""

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Log probability per token."""
        return self.total / self.tokens


def sequence_log_probs(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> SequenceLogProbs:
    """Log probability of each answer, from the logits of a causal model.

    Args:
        logits: `(batch, T, vocabulary)`; the logits at position t speak of the token at t + 1.
        labels: `(batch, T)`, the tokens at their own positions (not shifted), with -100 on prompt and padding.
        mask: `(batch, T)`, true or 1 on the answer's tokens, for labels that have no -100.

    Returns:
        `total` and `tokens`, in at least float32, since bfloat16 rounds a sum of -500 to a multiple of 2.

    Raises:
        InputError: for other shapes, labels outside the vocabulary, an answer without tokens, logits that are not
            finite.

    >>> found = sequence_log_probs(torch.zeros(1, 4, 10), torch.tensor([[-100, -100, 3, 5]]))
    >>> round(found.total.item(), 4), found.tokens.item()
    (-4.6052, 2)
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or not labels.numel():
        raise InputError(
            f"logits are (batch, T, vocabulary) and labels (batch, T), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if mask is not None and mask.shape != labels.shape:
        raise InputError(f"mask has the shape of labels {tuple(labels.shape)}, got {tuple(mask.shape)}")
    targets = labels[:, 1:]
    answer = targets != -100
    if mask is not None:
        answer = answer & mask[:, 1:].bool()
    tokens = answer.sum(1)
    if (tokens == 0).any():
        row = int((tokens == 0).nonzero()[0])
        raise InputError(f"answer {row} has no tokens: all its labels are -100 or masked (or only the first is not)")
    picked = targets[answer]
    if picked.min() < 0 or picked.max() >= logits.shape[-1]:
        raise InputError(
            f"labels are 0 to {logits.shape[-1] - 1} or -100, got {int(picked.min())} to {int(picked.max())}"
        )
    log_p = -F.cross_entropy(_wide(logits[:, :-1][answer]), picked, reduction="none")  # (answer tokens,)
    rows = answer.nonzero()[:, 0]
    total = log_p.new_zeros(len(labels)).index_add(0, rows, log_p)
    if not torch.isfinite(total).all():
        raise InputError(f"the log probability of answer {int((~torch.isfinite(total)).nonzero()[0])} is not finite")
    return SequenceLogProbs(total, tokens)


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p < 0, exact at both ends, with finite gradients.

    >>> log1mexp(torch.tensor([-1e-4, -40.0], dtype=torch.float64))
    tensor([-9.2104e+00, -4.2484e-18], dtype=torch.float64)
    """
    near = log_p > -math.log(2)
    inside = torch.log(-torch.expm1(log_p))
    # near 0 this branch would have an infinite gradient, and 0 times that is no number
    outside = torch.log1p(-torch.exp(torch.where(near, -1.0, log_p)))
    return torch.where(near, inside, outside)


def ce(log_p_w: Tensor, log_p_l: Tensor, *, lengths: Lengths = None, reduction: Reduction = "mean") -> Tensor:
    """Likelihood of the winner alone (SFT); the loser is not read."""
    win, _ = _ready(lengths, log_p_w, log_p_l)
    return _reduced(-win, log_p_w, reduction)


def unlikelihood(log_p_w: Tensor, log_p_l: Tensor, *, lengths: Lengths = None, reduction: Reduction = "mean") -> Tensor:
    """Winner likely, loser unlikely, apart from one another (CEUnl)."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    return _reduced(-win - _log_not(lose), log_p_w, reduction)


def dpo(
    log_p_w: Tensor, log_p_l: Tensor, log_r_w: Tensor, log_r_l: Tensor, *,
    beta: float = 0.1, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """Direct Preference Optimization (2023). With `lengths` it is what trl calls `sigmoid_norm`.

    >>> p = torch.tensor([-10.0])
    >>> round(dpo(p, p - 2, p, p, beta=1.0).item(), 4)
    0.1269
    """
    return _reduced(F.softplus(-_positive("beta", beta) * _gain(lengths, log_p_w, log_p_l, log_r_w, log_r_l)),
                    log_p_w, reduction)  # fmt: skip


def dpo_hinge(
    log_p_w: Tensor, log_p_l: Tensor, log_r_w: Tensor, log_r_l: Tensor, *,
    beta: float = 0.1, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """trl's `hinge`: beta scales the difference, whereas in `slic` the margin is moved."""
    return _reduced((1 - _positive("beta", beta) * _gain(lengths, log_p_w, log_p_l, log_r_w, log_r_l)).relu(),
                    log_p_w, reduction)  # fmt: skip


def dpo_robust(
    log_p_w: Tensor, log_p_l: Tensor, log_r_w: Tensor, log_r_l: Tensor, *,
    beta: float = 0.1, label_smoothing: float = 0.1, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """DPO whose mean is right when a share `label_smoothing`, in [0, 0.5), of the pairs is the wrong way round."""
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing is in [0, 0.5), got {label_smoothing}")
    z = _positive("beta", beta) * _gain(lengths, log_p_w, log_p_l, log_r_w, log_r_l)
    value = ((1 - label_smoothing) * F.softplus(-z) - label_smoothing * F.softplus(z)) / (1 - 2 * label_smoothing)
    return _reduced(value, log_p_w, reduction)


def ipo(
    log_p_w: Tensor, log_p_l: Tensor, log_r_w: Tensor, log_r_l: Tensor, *,
    beta: float = 0.1, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """Squared distance to the margin 1 / (2 beta). In practice with `lengths`, so that one beta fits all lengths."""
    gain = _gain(lengths, log_p_w, log_p_l, log_r_w, log_r_l)
    return _reduced((gain - 1 / (2 * _positive("beta", beta))) ** 2, log_p_w, reduction)


def dpop(
    log_p_w: Tensor, log_p_l: Tensor, log_r_w: Tensor, log_r_l: Tensor, *,
    beta: float = 0.1, penalty: float = 50.0, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """DPO that also pays, `penalty` times, for a winner less likely than under the reference (2024, 2402.13228)."""
    if penalty < 0:
        raise InputError(f"penalty is 0 or more, got {penalty}")
    win, lose, r_win, r_lose = _ready(lengths, log_p_w, log_p_l, log_r_w, log_r_l)
    inside = (win - lose) - (r_win - r_lose) - penalty * (r_win - win).relu()
    return _reduced(F.softplus(-_positive("beta", beta) * inside), log_p_w, reduction)


def slic(
    log_p_w: Tensor, log_p_l: Tensor, *,
    margin: float = 1.0, nll: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """A margin between the log probabilities, plus `nll` times the winner's negative log likelihood."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    return _reduced((_positive("margin", margin) - (win - lose)).relu() - nll * win, log_p_w, reduction)


def rrhf(
    log_p_w: Tensor, log_p_l: Tensor, *, nll: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean"
) -> Tensor:
    """Right order of the (with `lengths`: mean) log probabilities, plus `nll` times the winner's NLL."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    return _reduced((lose - win).relu() - nll * win, log_p_w, reduction)


def cpo(
    log_p_w: Tensor, log_p_l: Tensor, *,
    beta: float = 0.1, nll: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """DPO without a reference, plus `nll` times the winner's NLL; `lengths` makes the NLL alone a mean per token."""
    win, lose = _ready(None, log_p_w, log_p_l)
    mean_win = win if lengths is None else _ready(lengths, log_p_w, log_p_l)[0]
    return _reduced(F.softplus(-_positive("beta", beta) * (win - lose)) - nll * mean_win, log_p_w, reduction)


def orpo(
    log_p_w: Tensor, log_p_l: Tensor, *,
    beta: float = 0.1, nll: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """`nll` times the winner's NLL plus `beta` times the odds ratio term; wants `lengths`, since it has 1 - p."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    log_odds = (win - lose) - (_log_not(win) - _log_not(lose))
    return _reduced(_positive("beta", beta) * F.softplus(-log_odds) - nll * win, log_p_w, reduction)


def simpo(
    log_p_w: Tensor, log_p_l: Tensor, *,
    beta: float = 2.0, gamma: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """Mean log probabilities (give `lengths`) with a margin; in practice beta 2 to 2.5, gamma 0.5 to 1.6."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    return _reduced(F.softplus(gamma - _positive("beta", beta) * (win - lose)), log_p_w, reduction)


def ccpo(
    log_p_w: Tensor, log_p_l: Tensor, *, beta: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean"
) -> Tensor:
    """If the loser is valid so is the winner, among worlds where one of them is: p_w / (p_l (1 - p_w))."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    return _reduced(F.softplus(-_positive("beta", beta) * (win - lose - _log_not(win))), log_p_w, reduction)


def cunl(
    log_p_w: Tensor, log_p_l: Tensor, *, beta: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean"
) -> Tensor:
    """Winner valid and loser not, among worlds where one of them is: p_w (1 - p_l) / p_l."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    return _reduced(F.softplus(-_positive("beta", beta) * (win - lose + _log_not(lose))), log_p_w, reduction)


def uncpo(
    log_p_w: Tensor, log_p_l: Tensor, *, beta: float = 1.0, lengths: Lengths = None, reduction: Reduction = "mean"
) -> Tensor:
    """If the loser is valid so is the winner, among all worlds: (1 - p_l (1 - p_w)) / (p_l (1 - p_w))."""
    win, lose = _ready(lengths, log_p_w, log_p_l)
    wrong = lose + _log_not(win)  # log of the one world that is against it
    return _reduced(
        F.softplus(-_positive("beta", beta) * (log1mexp(wrong.clamp(max=CEILING)) - wrong)), log_p_w, reduction
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (ce, unlikelihood, dpo, dpo_hinge, dpo_robust, ipo, dpop, slic, rrhf, cpo, orpo, simpo, ccpo, cunl,
                     uncpo)
}  # fmt: skip


class PreferenceLoss(nn.Module):
    """One of the closed forms by name, called alike whether it reads a reference or not.

    Args:
        name: a key of `LOSSES`.
        options: the function's keywords (`beta`, `reduction`, ...).

    Raises:
        InputError: for an unknown name or option, or when called without the reference that it needs.

    >>> loss = PreferenceLoss("simpo", beta=2.5)
    >>> loss(torch.tensor([-20.0]), torch.tensor([-30.0]), lengths=(torch.tensor([10]), torch.tensor([10])))
    tensor(0.2014)
    """

    def __init__(self, name: str, **options: float | str) -> None:
        super().__init__()
        if name not in LOSSES:
            raise InputError(f"a preference loss is one of {', '.join(LOSSES)}, got {name!r}")
        known = inspect.signature(LOSSES[name]).parameters
        allowed = [key for key in known if key not in (*NAMES, "lengths")]
        if unknown := [key for key in options if key not in allowed]:
            raise InputError(f"{name} takes {', '.join(allowed)}, got {unknown[0]!r}")
        self.name, self.options = name, options
        self.needs_reference = "log_r_w" in known

    def forward(
        self,
        log_p_w: Tensor,
        log_p_l: Tensor,
        log_r_w: Tensor | None = None,
        log_r_l: Tensor | None = None,
        *,
        lengths: Lengths = None,
    ) -> Tensor:
        given = (log_p_w, log_p_l, log_r_w, log_r_l) if self.needs_reference else (log_p_w, log_p_l)
        if any(value is None for value in given):
            raise InputError(f"{self.name} needs log_r_w and log_r_l of a frozen reference model")
        return LOSSES[self.name](*given, lengths=lengths, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.name), *(f"{key}={value!r}" for key, value in self.options.items())])


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _ready(lengths: Lengths, *values: Tensor) -> list[Tensor]:
    """Checked, in at least float32, per token when lengths are given, reference detached; in the order of NAMES."""
    first = values[0]
    for name, value in zip(NAMES, values):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(f"{name} is a float tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.shape != first.shape or not value.numel():
            raise InputError(
                f"log probabilities have one shape and at least one pair, got {tuple(first.shape)} for log_p_w and "
                f"{tuple(value.shape)} for {name}"
            )
    wide = [_wide(value if i < 2 else value.detach()) for i, value in enumerate(values)]
    if not torch.isfinite(torch.stack([value.detach().sum() for value in wide])).all():
        name = next((name for name, value in zip(NAMES, wide) if not torch.isfinite(value).all()), None)
        if name is not None:
            raise InputError(f"{name} has values that are not finite: an empty answer, or training that diverged")
    if lengths is None:
        return wide
    for side, count in zip(("winner", "loser"), lengths, strict=True):
        if count.shape != first.shape or (count < 1).any():
            raise InputError(
                f"lengths of the {side} are token counts of at least 1 in the shape {tuple(first.shape)}, got "
                f"{tuple(count.shape)}" + (f" with {count.min().item()}" if count.numel() else "")
            )
    return [value / lengths[i % 2] for i, value in enumerate(wide)]


def _gain(lengths: Lengths, *values: Tensor) -> Tensor:
    """(log_p_w - log_p_l) - (log_r_w - log_r_l)."""
    win, lose, r_win, r_lose = _ready(lengths, *values)
    return (win - lose) - (r_win - r_lose)


def _log_not(log_p: Tensor) -> Tensor:
    """log(1 - p), with a word about p that is not below one and about p that is nothing."""
    seen = log_p.detach()
    high, low = torch.stack([(seen > CEILING).sum(), (seen < NOTHING).sum()]).tolist()
    if high:
        warnings.warn(
            f"{high} of {seen.numel()} probabilities are 1 or more and were put just below: are the log probabilities "
            "sums over the answer's tokens, in float32?", stacklevel=3,
        )  # fmt: skip
    if low > seen.numel() / 2:
        warnings.warn(
            "1 - p is 1 for most answers: use length-normalised log probabilities (give lengths) for losses with 1 - p",
            stacklevel=3,
        )
    return log1mexp(log_p.clamp(max=CEILING))


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise InputError(f"{name} is above 0, got {value}")
    return value


def _reduced(value: Tensor, like: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    value = value.to(like.dtype)
    return value if reduction == "none" else cast(Tensor, getattr(value, reduction)())
