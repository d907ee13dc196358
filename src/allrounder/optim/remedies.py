"""Parts of a training recipe that make the learning rate matter less; each works in anybody's own loop.

    z penalty                 loss + c (log Z)^2,  log Z = logsumexp(logits); pulls the free shift of the logits to 0
    independent weight decay  theta <- theta - s_t eta u_t - s_t lambda theta, s_t in [0, 1] the schedule; torch's AdamW
                              multiplies lambda by eta too, so that a sweep over eta sweeps the decay as well
    warm-up and cosine        s_t = (t + 1) / warmup, then a cosine
    muParam (simple)          learning rate of each linear layer times (base fan-in) / fan-in
    qk-layernorm              `nets.CausalTransformer(qk_norm=True)`

Use qk-layernorm or the z penalty when attention or output logits run away at high learning rates, a longer warm-up
and independent weight decay to keep one learning rate good over a wider range. muParam moves the best learning rate
less from size to size; it does not widen the range at one size. All are free but for the z penalty, which reads the
logits once more.

Small-scale proxies for large-scale Transformer training instabilities (2023, arXiv 2309.14322). z-loss: PaLM (2022,
arXiv 2204.02311). Independent decay: Decoupled Weight Decay Regularization (2017, arXiv 1711.05101). muParam: Tensor
Programs V (2022, arXiv 2203.03466); "simple" keeps its learning rates alone, and leaves attention at 1 / sqrt(d_h) and
the output without a multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..errors import InputError

__all__ = ["independent_weight_decay", "mup_groups", "warmup_cosine", "z_penalty"]


def z_penalty(logits: Tensor, coefficient: float = 1e-4) -> Tensor:
    """`coefficient * mean((log Z)^2)`, to be added to the cross-entropy of the same logits.

    Args:
        logits: `(..., classes)` of the tokens that count; leave out padding before.
        coefficient: c >= 0; the paper's 1e-4.

    Returns:
        A scalar in at least float32. Its gradient is 2 c log Z softmax(logits) / tokens.

    Raises:
        InputError: no tokens or classes, logits that are not floating, a negative coefficient.

    >>> round(z_penalty(torch.zeros(2, 4), 1.0).item(), 4), round(math.log(4) ** 2, 4)
    (1.9218, 1.9218)
    """
    if not logits.ndim or not logits.numel() or not logits.is_floating_point():
        raise InputError(f"logits are floating (..., classes) and not empty, got {tuple(logits.shape)} {logits.dtype}")
    if not coefficient >= 0:
        raise InputError(f"coefficient is at least 0, got {coefficient}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return coefficient * wide.logsumexp(-1).square().mean()


def independent_weight_decay(groups: Iterable[Mapping[str, Any]], decay: float = 1e-4) -> list[dict[str, Any]]:
    """Parameter groups with which `torch.optim.AdamW` decays weights by `s_t * decay`, whatever the learning rate.

    AdamW multiplies weights by 1 - lr_t * weight_decay; with weight_decay = decay / lr of the group, its peak, and
    lr_t = s_t * lr, that is 1 - s_t * decay. Make the optimiser from the groups first and the scheduler after; a
    scheduler whose peak is not the group's `lr` (`OneCycleLR`) needs that peak as the group's `lr` here.

    Args:
        groups: each with `params` and its peak learning rate `lr` > 0. A group that says `weight_decay=0` keeps it.
        decay: lambda, the share of a weight lost in a step at the peak, 0 <= decay < 1; the paper's 1e-4.

    Returns:
        Copies of the groups with `weight_decay` set.

    Raises:
        InputError: a group without a positive `lr`, with another weight decay of its own, or a decay out of range.

    >>> independent_weight_decay([{"params": [], "lr": 0.01}], 1e-4)
    [{'params': [], 'lr': 0.01, 'weight_decay': 0.01}]
    """
    if not 0 <= decay < 1:
        raise InputError(f"decay is a share of the weight, 0 <= decay < 1, got {decay}")
    made = []
    for number, group in enumerate(groups):
        lr = group.get("lr") if isinstance(group, Mapping) else None
        if lr is None or not float(lr) > 0:
            raise InputError(f"group {number} needs its peak learning rate 'lr' above 0, got {lr}")
        if group.get("weight_decay"):
            raise InputError(f"group {number} has weight_decay={group['weight_decay']}; leave it out, or 0 for none")
        made.append({**group, "weight_decay": 0.0 if "weight_decay" in group else decay / float(lr)})
    return made


def warmup_cosine(optimiser: torch.optim.Optimizer, steps: int, *, warmup: int, final_lr: float = 1e-5) -> LambdaLR:
    """Linear warm-up to each group's learning rate, then a cosine down to `final_lr`.

    Args:
        optimiser: its groups' `lr` are the peaks.
        steps: of the run; call the scheduler's `step()` after each step of the optimiser.
        warmup: steps of warm-up, 0 <= warmup < steps; the paper takes 5 % of the run. Step t < warmup, counted from 0,
            is made with (t + 1) / warmup of the peak.
        final_lr: learning rate at the end of the run; a group whose peak is lower stays at its peak.

    Returns:
        torch's own `LambdaLR`.

    Raises:
        InputError: steps that do not fit, or a negative `final_lr`.
    """
    if not 0 <= warmup < steps:
        raise InputError(f"warmup is at least 0 and below steps, got warmup={warmup} and steps={steps}")
    if not final_lr >= 0:
        raise InputError(f"final_lr is at least 0, got {final_lr}")

    def schedule(peak: float) -> Any:
        floor = min(1.0, final_lr / peak) if peak else 0.0

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, (step - warmup) / (steps - warmup))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

        return scale

    return LambdaLR(optimiser, [schedule(float(group["lr"])) for group in optimiser.param_groups])


def mup_groups(model: nn.Module, base: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameter groups of muParam (simple) for Adam: `lr` was found on `base` and is carried over to `model`.

    Args:
        model: the wider model.
        base: the same architecture at the width where `lr` is known; only shapes are read, so it may be on `meta`.
        lr: learning rate of what does not scale: embeddings, biases, gains, linear layers that are no wider.

    Returns:
        Groups of those parameters of `model` that require gradients: a linear layer's weight has
        lr * (its fan-in in `base`) / (its fan-in). A weight that is tied to an embedding counts as the embedding.

    Raises:
        InputError: models whose linear layers have other names, or a learning rate that is not positive.
    """
    if not lr > 0:
        raise InputError(f"lr is above 0, got {lr}")
    layers, narrow = (
        {name: module for name, module in m.named_modules() if isinstance(module, nn.Linear)} for m in (model, base)
    )
    if layers.keys() != narrow.keys():
        name = sorted(layers.keys() ^ narrow.keys())[0]
        raise InputError(f"model and base are one architecture at two widths, but {name!r} is a layer of one alone")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    rates = {
        id(layer.weight): lr * narrow[name].in_features / layer.in_features
        for name, layer in layers.items()
        if id(layer.weight) not in embeddings
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(id(parameter), lr), []).append(parameter)
    return [{"params": members, "lr": rate} for rate, members in groups.items()]
