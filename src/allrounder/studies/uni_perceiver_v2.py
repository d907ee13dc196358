"""MT-AdamW where tasks differ in frequency and in the scale of their losses.

Three quadratics on a plane, `c_k / 2 ||w - a_k||^2` with the a_k on an equilateral triangle around 0, curvatures
(100, 1, 1) and one task a step in the ratios (0.7, 0.2, 0.1): the balanced point, where the unit gradients sum to zero,
is 0. Then one encoder of handwritten digits under the likelihood of Uni-Perceiver v2, trained on classification
(ratio 0.8, loss times 100) and on matching the upper half of an image with its lower half (ratio 0.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean, stdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.mixture import unmixed
from ..multitask.likelihood import TargetLikelihood, retrieval_loss
from ..multitask.mt_adamw import MTAdamW
from ..nets.multitask import mlp
from ..study import Claim, Finding, Scale, draws
from ..task import Examples, Suite, Task
from ..train import fit

__all__ = ["run"]

CURVATURES = {"steep": 100.0, "second": 1.0, "third": 1.0}
RATIOS = {"steep": 0.7, "second": 0.2, "third": 0.1}
DIGIT_RATIOS = {"digit": 0.8, "halves": 0.2}
LOSS_SCALE = 100.0
STEPS, LR = 8000, 3e-3
DIGIT_STEPS, DIGIT_LR, BATCH = 1500, 1e-3, 64


class _NormalisedAdamW(torch.optim.AdamW):
    """The ablation without 1 / s_k: gradient normalisation alone."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        reached = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(reached, float(torch.nn.utils.get_total_norm(reached)))
        super().step()


OPTIMISERS: dict[str, Callable[[dict[str, float]], Callable]] = {
    "AdamW": lambda ratios: torch.optim.AdamW,
    "normalised AdamW": lambda ratios: _NormalisedAdamW,
    "MT-AdamW": lambda ratios: partial(MTAdamW, shares=ratios),
}


class _Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor, task: str) -> Tensor:
        return self.w


def _distance(name: str, seed: int) -> float:
    """Distance from the balanced point, mean over the last fifth of the steps."""
    angles = {task: 2 * math.pi * i / 3 for i, task in enumerate(CURVATURES)}
    centres = {task: torch.tensor([math.cos(angle), math.sin(angle)]) for task, angle in angles.items()}
    point, drawn, path = _Point(), unmixed(RATIOS, seed=seed), []
    optimiser = OPTIMISERS[name](RATIOS)([{"params": [point.w], "lr": LR, "weight_decay": 0.0}])
    for step in range(STEPS):
        task = next(drawn)[0]
        optimiser.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        with torch.no_grad():
            point.w.grad = CURVATURES[task] * (point.w - centres[task])
        optimiser.step(task=task) if isinstance(optimiser, MTAdamW) else optimiser.step()
        if step >= 0.8 * STEPS:
            path.append(point.w.detach().norm().item())
    return fmean(path)


def _digits(seed: int) -> tuple[Suite, Examples]:
    """Both tasks, and the test images."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    parts = (slice(0, 1000), slice(1000, 1200), slice(1200, None))
    digit = [Examples(x[part], y[part]) for part in parts]
    halves = [Examples(_halves(x[part]), torch.zeros(len(x[part]))) for part in parts]
    tasks = [
        Task("digit", *digit, outputs=10, loss=lambda scores, y: LOSS_SCALE * F.cross_entropy(scores, y)),
        Task("halves", *halves, outputs=1, loss=retrieval_loss),
    ]
    return Suite(tasks, name="digits"), digit[2]


def _halves(x: Tensor) -> dict[str, Tensor]:
    upper, lower = x.clone(), x.clone()
    upper[:, 32:], lower[:, :32] = 0, 0
    return {"input": upper, "target": lower}


class _OneEncoder(nn.Module):
    """Images `(N, 64)` and class names as one-hot rows `(C, 10)` through one trunk."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.image, self.name = mlp([64, 64], seed=seed), mlp([10, 64], seed=seed + 1)
        self.trunk = mlp([64, 64, 32], seed=seed + 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.trunk(F.gelu(self.image(inputs) if inputs.shape[1] == 64 else self.name(inputs)))


@torch.no_grad()
def _accuracies(model: nn.Module, test: Examples) -> dict[str, float]:
    """Percent: right class, and right lower half among 100."""
    inputs = torch.as_tensor(test.inputs)
    right = (model(inputs, "digit").argmax(1) == test.targets).float().mean().item()
    matched = [
        (model(_halves(part), "halves").argmax(1) == torch.arange(100)).float().mean().item()
        for part in inputs.split(100)
        if len(part) == 100
    ]
    return {"digit": 100 * right, "halves": 100 * fmean(matched)}


def _trained(name: str, seed: int) -> dict[str, float]:
    suite, test = _digits(seed)
    model = TargetLikelihood(_OneEncoder(seed), {"digit": torch.eye(10), "halves": None}, temperature=0.1)
    fit(
        model, suite, steps=DIGIT_STEPS, lr=DIGIT_LR, batch_size=BATCH, schedule="cosine", seed=seed,
        optimiser=OPTIMISERS[name](DIGIT_RATIOS), sampler=unmixed(DIGIT_RATIOS, seed=seed),
    )  # fmt: skip
    return _accuracies(model, test)


def run(scale: Scale, seed: int) -> Finding:
    """Distances on the plane; accuracies in percent on the test split."""
    seeds = draws(scale, seed)
    distances = {name: [_distance(name, draw) for draw in seeds] for name in OPTIMISERS}
    digits = {name: [_trained(name, draw) for draw in seeds] for name in OPTIMISERS}

    def lost(task: str, name: str) -> float:
        return fmean(ours[task] - theirs[task] for ours, theirs in zip(digits["MT-AdamW"], digits[name], strict=True))

    claims = [
        Claim.at_most("quadratics: MT-AdamW, worst distance", max(distances["MT-AdamW"]), 0.15, ""),
        Claim.at_least("quadratics: AdamW stays with the steep task, least distance", min(distances["AdamW"]), 0.9, ""),
        Claim.at_least(
            "quadratics: normalisation alone stays with the frequent task, least distance",
            min(distances["normalised AdamW"]), 0.9, "",
        ),
        Claim.at_least("digits: rare, lightly weighted task, MT-AdamW above AdamW, mean", lost("halves", "AdamW"), 5),
        Claim.at_least("digits: frequent task, MT-AdamW against AdamW, mean", lost("digit", "AdamW"), -2),
    ]  # fmt: skip
    rows = [
        {
            "optimiser": name,
            "distance": round(fmean(distances[name]), 4),
            "spread": round(stdev(distances[name]), 4) if len(seeds) > 1 else 0.0,
            "digit, %": round(fmean(row["digit"] for row in digits[name]), 2),
            "halves, %": round(fmean(row["halves"] for row in digits[name]), 2),
        }
        for name in OPTIMISERS
    ]
    return Finding(claims, {"optimisers": rows})
