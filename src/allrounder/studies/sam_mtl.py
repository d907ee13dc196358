"""SAM-MTL over PCGrad where one of two tasks has noisy labels and few examples.

An input is two handwritten digits side by side (noise 0.1), task k is the digit of image k. 300 training pairs, two in
five labels of the second task drawn at random, 150 passes, which is enough to memorise them; the test is 3,000 clean
pairs of images that were not trained on. Plain perturbations, radii 0.05 and 0.1, decomposed and direct.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ..multitask.sam_mtl import SAMMTL, sharpness
from ..nets.multitask import MultiTaskModel, mlp
from ..optim.aggregation import Aggregate
from ..study import Claim, Finding, Scale, draws
from ..train import Losses, Update

__all__ = ["run"]

TASKS = ("clean", "noisy")
PAIRS, TEST_PAIRS, NOISE, WRONG = 300, 3000, 0.1, 0.4
EPOCHS, BATCH, LR = 150, 50, 1e-3
RADIUS = 0.1  # of the sharpness that is measured

UPDATES: dict[str, Callable[[nn.Module, int], Update]] = {
    "PCGrad": lambda model, seed: Aggregate(model, "pcgrad", seed=seed),
    "flat, radius 0.05": lambda model, seed: SAMMTL(model, "pcgrad", radius=0.05, seed=seed),
    "flat, radius 0.1": lambda model, seed: SAMMTL(model, "pcgrad", radius=0.1, seed=seed),
    "direct, radius 0.1": lambda model, seed: SAMMTL(model, "pcgrad", radius=0.1, variant="direct", seed=seed),
}
ALWAYS = ("PCGrad", "flat, radius 0.1")


def _pairs(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `(count, 128)` and both labels `(2, count)`."""
    chosen = torch.randint(len(images), (2, count), generator=generator)
    inputs = torch.cat([images[chosen[0]], images[chosen[1]]], 1)
    return inputs + NOISE * torch.randn(inputs.shape, generator=generator), labels[chosen]


def _data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    train, targets = _pairs(x[:1200], y[:1200], PAIRS, generator)
    wrong = torch.rand(PAIRS, generator=generator) < WRONG
    targets = targets.clone()
    targets[1, wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return train, targets, *_pairs(x[1200:], y[1200:], TEST_PAIRS, generator)


def _losses(model: MultiTaskModel, x: Tensor, y: Tensor) -> Losses:
    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        features = model.backbone(x)
        return {task: F.cross_entropy(model.heads[task](features), y[TASKS.index(task)]) for task in tasks}

    return losses


def _trained(make: Callable[[nn.Module, int], Update], epochs: int, seed: int) -> dict[str, float]:
    x, y, test, truth = _data(seed)
    trunk = nn.Sequential(mlp([128, 128, 128], seed=seed), nn.GELU())
    model = MultiTaskModel(trunk, {task: mlp([128, 10], seed=seed + i + 1) for i, task in enumerate(TASKS)})
    update, optimiser = make(model, seed), torch.optim.Adam(model.parameters(), lr=LR, foreach=True)
    generator, conflicts = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs):
        for chosen in torch.randperm(PAIRS, generator=generator).split(BATCH):
            update(_losses(model, x[chosen], y[:, chosen]), TASKS)
            optimiser.step()
            if epoch >= 0.8 * epochs:
                conflicts.append(update.last.conflicts)  # type: ignore[attr-defined]
    rises = sharpness(model, _losses(model, x, y), TASKS, radius=RADIUS)
    with torch.no_grad():
        right = {t: (model(test, t).argmax(1) == truth[i]).double().mean().item() for i, t in enumerate(TASKS)}
        kept = copy.deepcopy(_losses(model, x, y)(TASKS))
    return {
        "clean task, %": 100 * right["clean"],
        "noisy task, %": 100 * right["noisy"],
        "training loss": fmean(value.item() for value in kept.values()),
        "sharpness": fmean(rises.values()),
        "conflicts late": fmean(conflicts),
    }


def run(scale: Scale, seed: int) -> Finding:
    """Test accuracies in percent; sharpness is the rise of the training loss one radius of 0.1 uphill, in nats."""
    seeds = draws(scale, seed)
    names = [name for name in UPDATES if scale != "smoke" or name in ALWAYS]
    epochs = EPOCHS // 3 if scale == "smoke" else EPOCHS
    found = {name: [_trained(UPDATES[name], epochs, draw) for draw in seeds] for name in names}

    def gain(score: str, one: str, other: str) -> float:
        return fmean(a[score] - b[score] for a, b in zip(found[one], found[other], strict=True))

    ratio = max(a["sharpness"] / b["sharpness"] for a, b in zip(found[ALWAYS[1]], found["PCGrad"], strict=True))
    claims = [Claim.at_most("sharpness of flat (0.1) over PCGrad's, worst draw", ratio, 0.7, "")]
    if scale != "smoke":
        claims += [
            Claim.at_least("noisy task: flat (0.1) above PCGrad, mean", gain("noisy task, %", *reversed(ALWAYS)), 1.5),
            Claim.at_least("clean task: flat (0.1) against PCGrad, mean", gain("clean task, %", *reversed(ALWAYS)), 0),
            Claim.at_most(
                "pairs in conflict late in training, flat (0.1) minus PCGrad, mean",
                gain("conflicts late", *reversed(ALWAYS)), 0, "",
            ),
            Claim.at_least(
                "noisy task: decomposed above direct at 0.1, mean",
                gain("noisy task, %", "flat, radius 0.1", "direct, radius 0.1"), 0,
            ),
        ]  # fmt: skip
    rows = [
        {"update": name}
        | {key: round(fmean(row[key] for row in found[name]), 4) for key in found[name][0]}
        | {"noisy spread": round(stdev(r["noisy task, %"] for r in found[name]), 3) if len(seeds) > 1 else 0.0}
        for name in names
    ]
    return Finding(claims, {"test": rows})
