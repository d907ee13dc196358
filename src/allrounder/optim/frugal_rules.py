"""What FRUGAL does to lists of tensors: the rules with state, the rules without, and the checks of a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..errors import InputError

__all__ = ["batches", "check", "is_split", "stateful", "stateless"]

BUDGET = 1 << 22  # elements a batch of matrices holds: bounds the copies of chosen parts
CHUNK = 1 << 16  # elements whose signs are taken at once: their copy stays in the cache
CHOICES = {
    "role": ("auto", "split", "full"), "rule": ("adam", "lion", "sgdm"), "free": ("sign", "sgd", "none"),
}  # fmt: skip


def check(group: Mapping[str, Any]) -> None:
    """Raises InputError for an option of a parameter group that is out of range."""
    for name, known in CHOICES.items():
        if group[name] not in known:
            raise InputError(f"{name} is one of {', '.join(known)}, got {group[name]!r}")
    for name in ("lr", "eps", "weight_decay", "free_scale"):
        if not float(group[name]) >= 0:
            raise InputError(f"{name} is at least 0, got {group[name]}")
    if not group["scale"] > 0:
        raise InputError(f"scale is above 0, got {group['scale']}")
    if group["betas"] is not None and not all(0 <= beta < 1 for beta in group["betas"]):
        raise InputError(f"betas are in [0, 1), got {group['betas']}")


def is_split(group: Mapping[str, Any], p: Tensor) -> bool:
    """Whether FRUGAL splits a parameter of this group."""
    return group["role"] == "split" or (group["role"] == "auto" and p.ndim == 2)


def batches(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of parameters with at most `BUDGET` elements (or one larger parameter) each."""
    run: list[Tensor] = []
    size = 0
    for p in params:
        if run and size + p.numel() > BUDGET:
            yield run
            run, size = [], 0
        run.append(p)
        size += p.numel()
    if run:
        yield run


def stateful(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    scale: float,
) -> None:
    """Decoupled decay by lr * weight_decay, then the group's rule at lr * scale, in place.

    Args:
        group: lr, betas, eps, weight_decay, rule.
        params, grads: of one shape each; contiguous copies or whole tensors.
        states: where each keeps its moments; empty ones are started.
        scale: of the learning rate.
    """
    if not params:
        return
    names = {"adam": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgdm": ("momentum_buffer",)}[group["rule"]]
    for p, state in zip(params, states, strict=True):
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if group["rule"] == "adam" and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    rate, (beta1, beta2) = group["lr"] * scale, group["betas"]
    params, grads = list(params), list(grads)
    if group["rule"] == "adam":
        fused = params[0].device.type in ("cpu", "cuda")
        adamw(
            params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
            [s["step"] for s in states], foreach=not fused, fused=fused, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=rate, weight_decay=group["weight_decay"] / scale, eps=group["eps"], maximize=False,
        )  # fmt: skip
        return
    _decay(group, params)
    moments = [s[names[0]] for s in states]
    if group["rule"] == "lion":
        signs = torch._foreach_lerp(grads, moments, beta1)
        torch._foreach_sign_(signs)
        torch._foreach_add_(params, signs, alpha=-rate)
        torch._foreach_lerp_(moments, grads, 1 - beta2)
    else:
        torch._foreach_mul_(moments, beta1)
        torch._foreach_add_(moments, grads)
        torch._foreach_add_(params, moments, alpha=-rate)


def stateless(group: Mapping[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], spent: bool) -> None:
    """Decoupled decay, then the rule `free` at lr * scale * free_scale, in place.

    Args:
        group: lr, weight_decay, free, scale, free_scale.
        params, grads: of one shape each.
        spent: whether the gradients may be overwritten.
    """
    if not params:
        return
    _decay(group, list(params))
    rate = -group["lr"] * group["scale"] * group["free_scale"]
    if group["free"] == "sgd":
        torch._foreach_add_(list(params), list(grads), alpha=rate)
    elif group["free"] == "sign":
        for p, grad in zip(params, grads, strict=True):
            if spent:
                p.add_(grad.sign_(), alpha=rate)
            elif p.is_contiguous() and grad.is_contiguous() and p.numel() > CHUNK:
                for part, piece in zip(p.view(-1).split(CHUNK), grad.view(-1).split(CHUNK), strict=True):
                    part.add_(piece.sign(), alpha=rate)
            else:
                p.add_(grad.sign(), alpha=rate)


def _decay(group: Mapping[str, Any], params: list[Tensor]) -> None:
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
