"""What the smooth adversarial loss is compared with beyond TRADES: MART, and weights that are attacked too (AWP).

    MART   -log q_y - log(1 - max_{k != y} q_k) + strength (1 - p_y) KL(p | q),   p = softmax h(x), q = softmax h(x')
    AWP    min_w max_v loss(w + v),  |v_l| <= radius |w_l| for each weight matrix l: one step along its gradient

x' is sought by `attack` on the cross-entropy. MART spends more on examples that are wrong without an attack; AWP
flattens the loss around the weights and goes on top of any loss here:

    with adversarial_weights(model, lambda: trades_loss(model, x, y)) as loss:
        loss.backward()          # the gradient at w + v; the weights are w again after the block

Papers: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020 (MART);
Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, arXiv 2004.05884.
Departures: logarithms come from log-softmax (the reference adds 1e-12 to probabilities); the direction of AWP is this
batch's own, at the weights as they are (the reference keeps a second model for it, updated by an optimiser).
Cost: MART as PGD training; AWP two evaluations of the loss, attacks included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..optim.perturb import frozen_batchnorm, perturbed
from .adversarial import TRAINING, Perturbation, Scores, worst_inputs

__all__ = ["adversarial_weights", "mart_loss"]


def mart_loss(
    model: Scores, inputs: Tensor, target: Tensor, within: Perturbation = TRAINING, *,
    strength: float = 5.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """MART: boosted cross-entropy at the attacked inputs, plus a consistency that grows with the natural error.

    Args:
        strength: at least 0. Paper: 5.
        model, inputs, target, within, generator: as for `adversarial_comp_sum`.
    """
    if not 0 <= strength < float("inf"):
        raise InputError(f"strength is at least 0, got {strength:g}")
    changed = worst_inputs(model, inputs, target, within, generator)
    p, q = (model(x).log_softmax(1) for x in (inputs, changed))
    index = target.unsqueeze(1)
    true, natural = q.gather(1, index).squeeze(1), p.gather(1, index).squeeze(1)
    rival = q.scatter(1, index, -float("inf")).amax(1)
    margin = torch.log1p(-rival.exp().clamp_max(1 - torch.finfo(q.dtype).eps))
    divergence = (p.exp() * (p - q)).sum(1)
    return (-true - margin + strength * divergence * (1 - natural.exp())).mean()


@contextmanager
def adversarial_weights(model: nn.Module, loss: Callable[[], Tensor], *, radius: float = 5e-3) -> Iterator[Tensor]:
    """The loss at the weights that make it large, each matrix within `radius` times its own length.

    Inside, the weights are moved: call `backward` there. After it they are the same bits as before. BatchNorm's running
    statistics move once, with the second evaluation.

    Args:
        model: its parameters of two dimensions or more that require gradients are moved.
        loss: evaluates the loss on the batch; called twice.
        radius: gamma, at least 0; 0 is the loss itself. Paper: 5e-3 (on TRADES) to 1e-2 (on PGD training).

    Raises:
        InputError: a radius out of range, a gradient that is not finite.
    """
    if not 0 <= radius < float("inf"):
        raise InputError(f"radius is at least 0, got {radius:g}")
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    if radius == 0 or not matrices:
        yield loss()
        return
    with frozen_batchnorm(model):
        slopes = torch.autograd.grad(loss(), matrices, allow_unused=True)
    if any(slope is not None and not slope.isfinite().all() for slope in slopes):
        raise InputError("the gradient that moves the weights is not finite; lower the learning rate")
    steps = [
        None if slope is None else slope * (radius * weight.detach().norm() / slope.norm().clamp_min(1e-12))
        for weight, slope in zip(matrices, slopes, strict=True)
    ]
    with perturbed(matrices, steps):
        yield loss()
