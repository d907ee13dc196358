"""Distillation losses: what a small model is asked to copy from a large one, as plain functions.

On logits `(N, C)`, student z, teacher t, temperature T, p = softmax(. / T):

    soft_label_loss   T^2 / N sum KL(p_t || p_z)            relative sizes of the classes; blind to a common shift
    binary_kl         T^2 / N sum KL(Bern(s(t/T)) || Bern(s(z/T)))    each logit by itself, s the sigmoid
    binary_kl_norm    T^2 / N sum log cosh((z - t) / 2T)    the same, with a pace that depends on the gap alone
    dkd               alpha TCKD + beta NCKD                 the true class and the rest weighed apart
    dist              1 - Pearson correlation, over classes and over examples

On states of transformers, padding left out of every mean:

    hidden_mse        MSE(H_S W, H_T)
    attention_mse     MSE of attention scores, head by head
    attention_kl      KL(softmax of the teacher's scores || the student's)
    relation_kl       attention_kl of V V^T / sqrt(d_head), the value relation of MiniLM

The teacher comes first in every KL and gets no gradient. Losses that sum over classes (`binary_kl`,
`binary_kl_norm`) grow with C: their safe weight times learning rate shrinks with it. Cost: that of the tensors, and
one wait for the GPU for the checks. Everything is computed in at least float32.

Papers: Hinton et al., 2015, arXiv 1503.02531 (soft labels); TinyBERT, 2020, arXiv 1909.10351 (hidden and attention
MSE); MiniLM, 2020, arXiv 2002.10957 (relations); DKD, 2022, arXiv 2203.08679; DIST, 2022, arXiv 2205.10536; Yang et
al., 2025, arXiv 2411.08937 (`binary_kl`, `binary_kl_norm`). Departures: `binary_kl_norm` is written in its closed form,
`binary_kl` with log-sigmoids where the authors clamp probabilities at 1e-8; attention losses skip padded positions,
which TinyBERT sets to zero and counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError

__all__ = [
    "attention_kl", "attention_mse", "binary_kl", "binary_kl_norm", "dist", "dkd", "hidden_mse", "relation_kl",
    "soft_label_loss",
]  # fmt: skip

HIDDEN = -1e4  # a score whose softmax weight is exactly 0, and whose differences are finite


def soft_label_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(softmax(t / T) || softmax(z / T))`, mean over the batch.

    Args:
        student, teacher: logits `(N, C)`.
        temperature: > 0. Default 1 (BERT students); image papers use 4.

    Returns:
        A scalar >= 0. Its gradient for z is `T (p_z - p_t) / N`.

    Raises:
        InputError: other shapes, an empty batch, NaN or infinite logits, probabilities instead of teacher logits.

    >>> z = torch.tensor([[1.0, 2.0]])
    >>> soft_label_loss(z, z + 3).abs().item() < 1e-6
    True
    """
    z, t = _logits(student, teacher, temperature)
    log_z, log_t = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_z, log_t, reduction="batchmean", log_target=True)


def binary_kl(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """`T^2 / N` times the sum over examples and classes of the KL between Bernoulli variables.

    Args:
        student, teacher: logits `(N, C)`.
        temperature: > 0. Paper: 2.

    Returns:
        A scalar >= 0. Its gradient `T (sigmoid(z / T) - sigmoid(t / T)) / N` vanishes where both are saturated.

    Raises:
        InputError: as for `soft_label_loss`.
    """
    z, t = _logits(student, teacher, temperature)
    z, t = z / temperature, t / temperature
    on = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(z))
    off = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-z))
    return temperature**2 / len(z) * (on + off).sum()


def binary_kl_norm(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """`T^2 / N sum log cosh((z - t) / 2T)`: a smooth absolute error of logits.

    It is `T^2 / N sum KL(Bern(1/2) || Bern(sigmoid((z - t) / T)))`. Near 0 it is `(z - t)^2 / 8N`, far away
    `T |z - t| / 2N - T^2 log 2 / N`.

    Args:
        student, teacher: logits `(N, C)`.
        temperature: > 0. Paper: 2.

    Returns:
        A scalar >= 0, zero only for equal logits. Its gradient is `T / 2N tanh((z - t) / 2T)`.

    Raises:
        InputError: as for `soft_label_loss`.

    >>> gap = torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[-2.0, -1.0, 0.0]])
    >>> round(binary_kl_norm(*gap).item(), 3), abs(round(soft_label_loss(*gap).item(), 3))
    (5.205, 0.0)
    """
    z, t = _logits(student, teacher, temperature)
    x = ((z - t) / (2 * temperature)).abs()
    near = 0.5 * torch.log1p(torch.sinh(x.clamp_max(1)) ** 2)  # without the cancellation of the other near 0
    far = x + F.softplus(-2 * x) - math.log(2)
    return temperature**2 / len(z) * torch.where(x < 1, near, far).sum()


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Decoupled distillation: `T^2 (alpha KL(true class or not) + beta KL(among the others))`, mean over the batch.

    Args:
        student, teacher: logits `(N, C)`, C >= 2.
        target: `(N,)` class indices.
        alpha, beta: weights >= 0. Paper: 1 and 8 on CIFAR-100, 1 and 0.5 on ImageNet; a large beta with a
            teacher that is sure of every example diverges. With `alpha = 1` and `beta` the teacher's probability of
            the other classes, it is `soft_label_loss`.
        temperature: > 0. Paper: 4.

    Raises:
        InputError: as for `soft_label_loss`; targets that are no classes, one class.
    """
    z, t = _logits(student, teacher, temperature)
    if z.shape[1] < 2:
        raise InputError("dkd needs two or more classes, got one")
    check_targets(target, len(z), z.shape[1])
    log_z, log_t = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    true = F.one_hot(target, z.shape[1]).bool()

    def binary(log_p: Tensor) -> Tensor:  # (N, 2): log-probabilities of the true class and of all others
        return torch.stack([log_p[true], log_p.masked_fill(true, -torch.inf).logsumexp(-1)], -1)

    whole = F.kl_div(binary(log_z), binary(log_t), reduction="batchmean", log_target=True)
    rest_z, rest_t = (x[~true].reshape(len(z), -1).log_softmax(-1) for x in (z / temperature, t / temperature))
    rest = F.kl_div(rest_z, rest_t, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * whole + beta * rest)


def dist(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """`T^2 (beta (1 - corr over classes) + gamma (1 - corr over examples))` of the softmax outputs.

    Args:
        student, teacher: logits `(N, C)`; with one example the second part is 0.
        beta, gamma: weights of the relation between classes and of that within a class. Paper: 1 and 1 at T = 1; its
            CIFAR-100 runs use T = 4.
        temperature: > 0.

    Returns:
        A scalar from 0 to `2 T^2 (beta + gamma)`.

    Raises:
        InputError: as for `soft_label_loss`.
    """
    z, t = _logits(student, teacher, temperature)
    p, q = (z / temperature).softmax(-1), (t / temperature).softmax(-1)
    between = 1 - _correlation(p, q).mean()
    within = 1 - _correlation(p.T, q.T).mean() if len(p) > 1 else p.sum() * 0
    return temperature**2 * (beta * between + gamma * within)


def hidden_mse(
    student: Tensor, teacher: Tensor, projection: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error of hidden states.

    Args:
        student: `(N, T, d_S)` or `(N, d_S)`.
        teacher: the same with d_T.
        projection: `(d_S, d_T)`, trained with the student. May be left out when the widths agree.
        mask: `(N, T)`, non-zero where a token is no padding.

    Raises:
        InputError: widths that do not fit, other shapes, nothing that counts.
    """
    if projection is not None:
        if projection.shape != (student.shape[-1], teacher.shape[-1]):
            raise InputError(
                f"the projection takes widths {student.shape[-1]} to {teacher.shape[-1]}, got {tuple(projection.shape)}"
            )
        student = student @ projection.to(student.dtype)
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"hidden states have widths {student.shape[-1]} and {teacher.shape[-1]}; give a projection between them"
        )
    s, t = _pair(student, teacher, "hidden states")
    error = (s - t).square()  # (N, T, d_T)
    if mask is None:
        return error.mean()
    if mask.shape != error.shape[:-1]:
        raise InputError(f"the mask is {tuple(error.shape[:-1])}, got {tuple(mask.shape)}")
    return _masked_mean(error.mean(-1), mask != 0)


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of attention scores (before the softmax) over heads and pairs of real tokens.

    Args:
        student, teacher: `(N, heads, T, T)`, queries before keys.
        mask: `(N, T)`, non-zero where a token is no padding.

    Raises:
        InputError: other numbers of heads or tokens.
    """
    s, t, real = _scores(student, teacher, mask)
    return _masked_mean((s - t).square().mean(1), real[:, :, None] & real[:, None, :])


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL of the teacher's attention distributions to the student's, mean over heads and real queries.

    Args:
        student, teacher: scores before the softmax, `(N, heads, T, T)`.
        mask: `(N, T)`, non-zero where a token is no padding.

    Raises:
        InputError: other numbers of heads or tokens.
    """
    s, t, real = _scores(student, teacher, mask)
    keys = ~real[:, None, None, :]
    log_s, log_t = (x.masked_fill(keys, HIDDEN).log_softmax(-1) for x in (s, t))
    return _masked_mean((log_t.exp() * (log_t - log_s)).sum(-1).mean(1), real)


def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention_kl` of the relations `X X^T / sqrt(d_head)`; the widths of the heads may differ, their number not.

    Args:
        student, teacher: values of each head, `(N, heads, T, d_head)`.
        mask: `(N, T)`, non-zero where a token is no padding.

    Raises:
        InputError: other numbers of heads or tokens.
    """
    if student.ndim != 4 or teacher.ndim != 4:
        raise InputError(f"values are (N, heads, T, d_head), got {tuple(student.shape)} and {tuple(teacher.shape)}")
    s, t = ((x @ x.transpose(-1, -2)) / x.shape[-1] ** 0.5 for x in (_floats(student), _floats(teacher)))
    return attention_kl(s, t, mask)


def check_targets(target: Tensor, count: int, classes: int) -> None:
    """Whether these are `count` indices of `classes` classes."""
    if target.shape != (count,) or target.is_floating_point():
        raise InputError(f"targets are {count} class indices, got {tuple(target.shape)} {target.dtype}")
    if bool((target < 0).any() | (target >= classes).any()):
        raise InputError(f"targets are from 0 to {classes - 1}, got {target.min().item()} to {target.max().item()}")


def _floats(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both in at least float32, the teacher's without gradient, when they are logits of one shape."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"the temperature is finite and above 0, got {temperature:g}")
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or not student.numel():
        raise InputError(
            f"logits are (N, C) with N and C above 0, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"teacher has {teacher.shape[1]} logits, student head {student.shape[1]}; use a teacher of the same classes"
        )
    z, t = _floats(student), _floats(teacher.detach())
    sums = (t >= 0).all() & ((t.sum(-1) - 1).abs() < 1e-3).all() & (t.shape[1] > 1)
    bad, sums = torch.stack([~(z.isfinite().all() & t.isfinite().all()), sums]).tolist()
    if bad:
        raise InputError("logits of student and teacher are finite, got NaN or infinity; lower the learning rate")
    if sums:
        raise InputError("expected logits of the teacher; got rows summing to 1: leave its softmax out")
    return z, t


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation of each row, 0 where a row is constant."""
    return F.cosine_similarity(x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True), dim=-1, eps=1e-8)


def _pair(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or not student.numel():
        raise InputError(
            f"{what} have one shape and are not empty, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return _floats(student), _floats(teacher.detach())


def _scores(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if student.ndim != 4 or teacher.ndim != 4:
        raise InputError(f"scores are (N, heads, T, T), got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"teacher has {teacher.shape[1]} attention heads, student {student.shape[1]}; give the student as many, "
            "or choose a loss without attention"
        )
    s, t = _pair(student, teacher, "attention scores")
    n, length = s.shape[0], s.shape[-1]
    if mask is None:
        return s, t, torch.ones(n, length, dtype=torch.bool, device=s.device)
    if mask.shape != (n, length):
        raise InputError(f"the mask is {(n, length)}, got {tuple(mask.shape)}")
    return s, t, mask != 0


def _masked_mean(values: Tensor, real: Tensor) -> Tensor:
    return (values * real).sum() / real.sum().clamp_min(1)
