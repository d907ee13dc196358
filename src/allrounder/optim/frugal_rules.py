"""What FRUGAL does to lists of tensors: the rules with state, the rules without, and the checks of a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..errors import InputError

__all__ = ["batches", "check", "is_split", "stateful", "stateless"]

BUDGET = 1 << 22  # elements a batch of tensors holds: bounds the copies of chosen parts and of signs
FUSED = ("cpu", "cuda")  # devices with a fused Adam
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
    rate, (beta1, beta2) = float(group["lr"]) * scale, group["betas"]
    params, grads = list(params), list(grads)
    if group["rule"] == "adam":
        fits = [_fits_fused(p, grad, state) for p, grad, state in zip(params, grads, states, strict=True)]
        for fused in set(fits):
            some = [(p, g, s) for p, g, s, fit in zip(params, grads, states, fits, strict=True) if fit == fused]
            adamw(
                [p for p, _, _ in some], [g for _, g, _ in some], [s["exp_avg"] for *_, s in some],
                [s["exp_avg_sq"] for *_, s in some], [], [s["step"] for *_, s in some],
                foreach=not fused, fused=fused, amsgrad=False, beta1=beta1, beta2=beta2, lr=rate,
                weight_decay=group["weight_decay"] / scale, eps=group["eps"], maximize=False,
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
    params, grads = list(params), list(grads)
    _decay(group, params)
    rate = -float(group["lr"]) * group["scale"] * group["free_scale"]
    if group["free"] == "sgd":
        torch._foreach_add_(params, grads, alpha=rate)
    elif group["free"] == "sign":
        if spent:
            torch._foreach_sign_(grads)
            torch._foreach_add_(params, grads, alpha=rate)
        elif params[0].device.type == "cpu":
            # foreach is a loop here too, and its copies are new pages from the system each time: three times slower
            scratch = grads[0].new_empty(max(grad.numel() for grad in grads))
            for p, grad in zip(params, grads, strict=True):
                signs = scratch[: grad.numel()].view(grad.shape)
                p.add_(torch.sign(grad, out=signs), alpha=rate)
        else:
            done = 0
            for run in batches(params):
                torch._foreach_add_(run, torch._foreach_sign(grads[done : done + len(run)]), alpha=rate)
                done += len(run)


def _fits_fused(p: Tensor, grad: Tensor, state: Mapping[str, Any]) -> bool:
    """The fused Adam walks through memory: tensors laid out differently would be mixed up without an error."""
    return p.device.type in FUSED and p.stride() == grad.stride() == state["exp_avg"].stride()


def _decay(group: Mapping[str, Any], params: list[Tensor]) -> None:
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - float(group["lr"]) * group["weight_decay"])
