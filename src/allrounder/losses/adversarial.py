"""Training that withstands small changes of the input: smooth adversarial comp-sum, PGD training, TRADES; one attack.

    D(x, y)_k = h(x)_y - h(x)_k                                                margins of the scores h
    loss(x, y) = comp_sum_tau(h(x) / rho, y) + nu max_{|x' - x| <= radius} | D(x', y) - D(x, y) |_2

The maximum is sought by projected gradient ascent (`attack`); both terms train the model through h(x) and h(x'). For
tau = 1 and nu >= 1 / rho the loss is at least the cross-entropy of h / rho at every x' in the ball. Use it when inputs
can be tampered with, and expect clean accuracy to fall; nu trades one for the other. The defaults are those of 8-bit
images divided by 255: for standardised inputs divide radius and step by the standard deviation and give the true box.

Report robustness with `robust_accuracy` at 20 steps or more and larger suites (AutoAttack) for publication: an attack
too weak, and not only a good model, makes accuracy high. Cost of a training step: steps + 2 forward and steps + 1
backward passes, about 11 times plain training at 10 steps.

During the attack the model is in evaluation mode (BatchNorm uses its running statistics and does not move them, no
dropout) and is put back module by module; no gradient reaches the parameters.

Paper: Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023, arXiv
2304.07288. No code was published; the attack's settings are those of TRADES (Zhang et al., 2019, arXiv 1901.08573), and
PGD training is Madry et al.'s (2018, arXiv 1706.06083). Departure: the norm is sqrt(sum of squares + 1e-12) less
1e-6, so that its gradient exists at x' = x and its value there is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .comp_sum import comp_sum, true_log_prob

__all__ = ["Perturbation", "adversarial_comp_sum", "attack", "margins", "pgd_loss", "robust_accuracy", "trades_loss"]

NUDGE = 1e-3  # standard deviation of the start: at x itself a distance has no gradient
EPSILON = 1e-12


@dataclass(frozen=True)
class Perturbation:
    """What an attacker may do, in the units of the inputs, and how it is sought.

    Args:
        radius: of the ball around each input, at least 0.
        step: length of one step, above 0 (of each coordinate for `linf`, of the whole step for `l2`).
        steps: gradient steps, at least 1. Paper of TRADES: 10 in training, 20 in evaluation.
        norm: `linf` (largest change of a coordinate) or `l2`.
        box: least and largest value of an input, or None.

    Raises:
        InputError: values out of range.
    """

    radius: float = 8 / 255
    step: float = 2 / 255
    steps: int = 10
    norm: Literal["linf", "l2"] = "linf"
    box: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.radius < float("inf") or not 0 < self.step < float("inf") or self.steps < 1:
            raise InputError(
                f"radius is at least 0, step above 0 and steps at least 1, got {self.radius:g}, {self.step:g} and "
                f"{self.steps}"
            )
        if self.norm not in ("linf", "l2"):
            raise InputError(f"norm is 'linf' or 'l2', got {self.norm!r}")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise InputError(f"box is (least, largest) input value, got {self.box}")


TRAINING = Perturbation()
EVALUATION = Perturbation(steps=20)
Scores = nn.Module | Callable[[Tensor], Tensor]
"""Inputs -> scores. A module is put in evaluation mode where that is said; any other callable sees to that itself."""
Objective = Callable[[Tensor], Tensor]
"""Outputs of the model -> what the attacker wants large, one value an example, `(batch,)`."""


def attack(
    model: Scores, inputs: Tensor, objective: Objective, within: Perturbation = TRAINING, *,
    start: Literal["nudge", "uniform"] = "uniform", generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Inputs within the ball and the box at which the objective is large, by projected gradient ascent.

    Args:
        model: called as `model(inputs)`, in evaluation mode while this runs.
        inputs: `(batch, ...)`, floating, inside the box.
        objective: see `Objective`.
        within: ball, box and steps.
        start: `uniform` in the ball (for `l2` a uniform direction and length), or `nudge`, normal noise of 0.001 of
            the inputs' unit.
        generator: of the start. Default: a new one of seed 0, the same start at each call.

    Returns:
        A new tensor like `inputs`, without a graph.

    Raises:
        InputError: inputs outside the box (were they standardised?), NaN or an empty batch, an objective of another
            shape than `(batch,)`.
    """
    _inside(inputs, within.box)
    if start not in ("nudge", "uniform"):
        raise InputError(f"start is 'nudge' or 'uniform', got {start!r}")
    origin = inputs.detach()
    if within.radius == 0:
        return origin.clone()
    generator = generator or torch.Generator().manual_seed(0)
    found = _projected(origin + _start(origin, within, start, generator), origin, within)
    with _evaluation(model):
        for _ in range(within.steps):
            found.requires_grad_()
            with torch.enable_grad():
                value = objective(model(found))
                if value.shape != inputs.shape[:1]:
                    raise InputError(f"objective gives one value an example ({len(inputs)},), got {tuple(value.shape)}")
                (slope,) = torch.autograd.grad(value.sum(), found)
            if not slope.isfinite().all():
                raise InputError("the gradient of the attack's objective is not finite; look at the model's outputs")
            found = _projected(found.detach() + within.step * _direction(slope, within.norm), origin, within)
    return found


def margins(logits: Tensor, target: Tensor) -> Tensor:
    """Score of the true class less each score, `(N, classes)`; 0 at the true class."""
    return logits.gather(1, target.unsqueeze(1)) - logits


def adversarial_comp_sum(
    model: Scores, inputs: Tensor, target: Tensor, within: Perturbation = TRAINING, *,
    tau: float = 1.0, rho: float = 1.0, nu: float = 1.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """The smooth adversarial comp-sum loss, mean over the batch (ADV-COMP-SUM at tau = 1).

    Args:
        model: called as `model(inputs)`, gives `(batch, classes)`. It trains in the mode it is in.
        inputs: `(batch, ...)`, floating, inside the box.
        target: `(batch,)` class indices.
        within: ball, box and steps of the attack.
        tau: of `comp_sum`, at least 0.
        rho: scale of the scores, above 0.
        nu: price of moved margins, at least 0; with 0 there is no attack and the loss is `comp_sum`.
        generator: see `attack`.

    Raises:
        InputError: numbers out of range; what `comp_sum` and `attack` raise.
    """
    if not rho > 0 or not 0 <= nu < float("inf"):
        raise InputError(f"rho is above 0 and nu at least 0, got {rho:g} and {nu:g}")
    if nu == 0:
        return comp_sum(model(inputs) / rho, target, tau)
    _inside(inputs, within.box)

    def moved(outputs: Tensor, still: Tensor) -> Tensor:
        change = margins(outputs, target) - still
        change = change if change.dtype == torch.float64 else change.float()  # 1e-12 is 0 in float16
        return (change.square().sum(1) + EPSILON).sqrt() - EPSILON**0.5

    clean = _evaluated(model, inputs)
    true_log_prob(clean, target)  # the checks, before an attack on a wrong target
    fixed = margins(clean, target)
    changed = attack(model, inputs, lambda outputs: moved(outputs, fixed), within, start="nudge", generator=generator)
    outputs = model(inputs)
    return comp_sum(outputs / rho, target, tau) + nu * moved(model(changed), margins(outputs, target)).mean()


def pgd_loss(
    model: Scores, inputs: Tensor, target: Tensor, within: Perturbation = TRAINING, *,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """PGD adversarial training: cross-entropy at the inputs that make it large. Arguments as above."""
    return F.cross_entropy(model(worst_inputs(model, inputs, target, within, generator)), target)


def trades_loss(
    model: Scores, inputs: Tensor, target: Tensor, within: Perturbation = TRAINING, *,
    beta: float = 6.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """TRADES: cross-entropy, plus beta times the largest KL(softmax h(x) | softmax h(x')) in the ball.

    Args:
        beta: at least 0. Paper: 6.
        model, inputs, target, within, generator: as for `adversarial_comp_sum`.
    """
    if not 0 <= beta < float("inf"):
        raise InputError(f"beta is at least 0, got {beta:g}")
    _inside(inputs, within.box)

    def divergence(outputs: Tensor, still: Tensor) -> Tensor:
        return F.kl_div(outputs.log_softmax(1), still.log_softmax(1), log_target=True, reduction="none").sum(1)

    clean = _evaluated(model, inputs)
    true_log_prob(clean, target)
    changed = attack(model, inputs, lambda out: divergence(out, clean), within, start="nudge", generator=generator)
    outputs = model(inputs)
    return F.cross_entropy(outputs, target) + beta * divergence(model(changed), outputs).mean()


def robust_accuracy(
    model: Scores, inputs: Tensor, target: Tensor, within: Perturbation = EVALUATION, *,
    generator: torch.Generator | None = None,
) -> float:  # fmt: skip
    """Share of inputs that are still right, in evaluation mode, after an attack on the cross-entropy; 0 to 1.

    An input that is wrong without any attack counts as wrong. With radius 0 it is the accuracy.
    """
    changed = worst_inputs(model, inputs, target, within, generator)
    right = [(_evaluated(model, x).argmax(1) == target) for x in (inputs, changed)]
    return (right[0] & right[1]).double().mean().item()


def worst_inputs(
    model: Scores, inputs: Tensor, target: Tensor, within: Perturbation, generator: torch.Generator | None
) -> Tensor:
    """Inputs at which the cross-entropy is large."""
    _inside(inputs, within.box)
    true_log_prob(_evaluated(model, inputs), target)
    loss = partial(F.cross_entropy, target=target, reduction="none")
    return attack(model, inputs, loss, within, generator=generator)


@contextmanager
def _evaluation(model: Scores) -> Iterator[None]:
    """A module in evaluation mode; afterwards each part is in the mode it had."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _evaluated(model: Scores, inputs: Tensor) -> Tensor:
    with _evaluation(model):
        return model(inputs)


def _inside(inputs: Tensor, box: tuple[float, float] | None) -> None:
    if not inputs.is_floating_point() or inputs.ndim < 2 or not inputs.numel():
        raise InputError(f"inputs are floating (batch, ...), got {inputs.dtype} {tuple(inputs.shape)}")
    low, high = inputs.detach().min().item(), inputs.detach().max().item()
    if low != low:
        raise InputError("inputs have NaN")
    if box is not None and not box[0] - 1e-6 <= low <= high <= box[1] + 1e-6:
        raise InputError(
            f"inputs are within the box {box}, got {low:.3g} to {high:.3g}; for standardised inputs give their own "
            "box, radius and step"
        )


def _norm(value: Tensor) -> Tensor:
    """l2 norm of each example, shaped for broadcasting, never 0."""
    return value.flatten(1).norm(dim=1).clamp_min(EPSILON).reshape(-1, *[1] * (value.ndim - 1))


def _direction(slope: Tensor, norm: str) -> Tensor:
    return slope.sign() if norm == "linf" else slope / _norm(slope)


def _start(origin: Tensor, within: Perturbation, start: str, generator: torch.Generator) -> Tensor:
    normal = start == "nudge" or within.norm == "l2"
    draw = torch.randn if normal else torch.rand
    noise = draw(origin.shape, generator=generator, device=generator.device, dtype=torch.float32).to(origin)
    if start == "nudge":
        return NUDGE * noise
    if not normal:
        return within.radius * (2 * noise - 1)
    length = torch.rand(len(origin), generator=generator, device=generator.device).to(origin)
    return within.radius * length.reshape(-1, *[1] * (origin.ndim - 1)) * noise / _norm(noise)


def _projected(value: Tensor, origin: Tensor, within: Perturbation) -> Tensor:
    """Into the ball, then into the box; the box holds the origin, so that the second keeps to the ball."""
    change = value - origin
    if within.norm == "linf":
        change = change.clamp(-within.radius, within.radius)
    else:
        change = change * (within.radius / _norm(change)).clamp_max(1)
    value = origin + change
    return value if within.box is None else value.clamp(*within.box)
