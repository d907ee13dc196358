"""Contrastive losses: exact properties, and what the temperature does to features of digits.

Digits of scikit-learn; a view adds noise of 0.15 and drops a quarter of the pixels; 64-128-16 network onto the sphere,
Adam 2e-3, batch 128, 350 steps without labels, negatives from the batch, the hardest tenth for the hard losses.
Uniformity, tolerance within classes and the accuracy of the nearest training digit are measured on 600 test digits,
without views. Nothing is chosen.
"""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ..losses.contrastive import contrastive_loss, simple_contrastive_loss
from ..losses.contrastive_meters import align_uniform_loss, penalty_entropy, relative_penalty, tolerance, uniformity
from ..nets.multitask import Normalize, mlp
from ..study import Claim, Finding, Scale, draws
from ..task import Batches, Examples

__all__ = ["run"]

STEPS, BATCH, LR = 350, 128, 2e-3
NOISE, DROPPED = 0.15, 0.25
HARDEST = 0.1
TEMPERATURES = (0.05, 0.1, 0.3, 1.0)
LOSSES = {
    **{f"contrastive, {t:g}": (t, 1.0) for t in TEMPERATURES},
    "simple": (None, 1.0), "hard, 0.1": (0.1, HARDEST), "hard, 1": (1.0, HARDEST), "hard simple": (None, HARDEST),
    "align and uniform": None,
}  # fmt: skip


def _splits(seed: int) -> tuple[Examples, Examples]:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return Examples(x[order[600:]], y[order[600:]]), Examples(x[order[:600]], y[order[:600]])


def _view(x: Tensor, generator: torch.Generator) -> Tensor:
    noisy = x + NOISE * torch.randn(x.shape, generator=generator)
    return noisy * (torch.rand(x.shape, generator=generator) >= DROPPED)


def _loss(name: str, anchors: Tensor, positives: Tensor) -> Tensor:
    if (options := LOSSES[name]) is None:
        return align_uniform_loss(anchors, positives)
    temperature, hardest = options
    if temperature is None:
        return simple_contrastive_loss(anchors, positives, hardest=hardest)
    return contrastive_loss(anchors, positives, temperature=temperature, hardest=hardest)


def _measured(name: str, steps: int, seed: int) -> dict[str, float]:
    """Uniformity, tolerance and 1-nearest-neighbour accuracy (percent) after training with this loss."""
    train, test = _splits(seed)
    net = nn.Sequential(mlp([64, 128, 16], seed=seed), Normalize())
    optimiser, generator = torch.optim.Adam(net.parameters(), lr=LR), torch.Generator().manual_seed(seed)
    for _, (x, _) in zip(range(steps), Batches(train, BATCH, seed=seed, endless=True), strict=False):
        assert isinstance(x, Tensor)
        optimiser.zero_grad()
        _loss(name, net(_view(x, generator)), net(_view(x, generator))).backward()
        optimiser.step()
    with torch.no_grad():
        known, found = net(train.inputs), net(test.inputs)
    nearest = train.targets[(found @ known.T).argmax(1)]
    return {
        "uniformity": uniformity(found).item(),
        "tolerance": tolerance(found, test.targets).conditional,
        "nearest neighbour": 100 * (nearest == test.targets).double().mean().item(),
    }


def _exact(generator: torch.Generator) -> list[Claim]:
    """Properties that hold to rounding."""

    def sphere(n: int, d: int) -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)

    # similarities as inner products with a basis: the gradient at the anchor is the gradient at the similarities
    anchor, basis = sphere(1, 33).requires_grad_(), torch.eye(33, dtype=torch.float64)
    (slope,) = torch.autograd.grad(contrastive_loss(anchor, basis[:1], basis[1:], temperature=0.2), anchor)
    pull, push = -slope[0, 0], slope[0, 1:]
    split = (push / pull - relative_penalty(anchor[0, 1:].detach(), 0.2)).abs().max().item()

    spread = 2 * torch.rand(32, generator=generator, dtype=torch.float64) - 1
    entropies = torch.stack([penalty_entropy(spread, t) for t in (0.07, 0.2, 1.0, 10.0, 100.0)])

    anchors, positives = sphere(33, 8), sphere(33, 8)
    similarity = anchors @ positives.T
    nearest = similarity.masked_fill(torch.eye(33, dtype=torch.bool), -torch.inf).amax(1)
    hinge = 1e-5 * contrastive_loss(anchors, positives, temperature=1e-5, reduction="none")
    cold = (hinge - (nearest - similarity.diagonal()).relu()).abs().max().item()
    simple = simple_contrastive_loss(anchors, positives)
    warm = contrastive_loss(anchors, positives, temperature=1e4) - math.log(33) - 32 / 33 * simple / 1e4
    return [
        Claim.at_most("The pull on the positive is the sum of the pushes", abs((push.sum() - pull).item()), 1e-12, ""),
        Claim.at_most("The relative penalty is how the push is split", split, 1e-12, ""),
        Claim.at_least("Entropy of the penalty rises with the temperature", entropies.diff().min().item(), 1e-6, ""),
        Claim.at_most("Towards temperature 0 it is the triplet loss without margin", cold, 1e-4, ""),
        Claim.at_most("At temperature 10000 it is the simple loss to first order", abs(warm.item()), 1e-7, ""),
    ]


def run(scale: Scale = "laptop", seed: int = 0) -> Finding:
    """Exact properties at all scales; at `smoke` two temperatures for one draw."""
    smoke, seeds = scale == "smoke", draws(scale, seed)
    names = ["contrastive, 0.1", "contrastive, 1"] if smoke else list(LOSSES)
    found = {name: [_measured(name, STEPS, s) for s in seeds] for name in names}

    def mean(name: str, meter: str) -> float:
        return fmean(row[meter] for row in found[name])

    def least_drop(meter: str, order: list[str]) -> float:
        values = [mean(name, meter) for name in order]
        return min(a - b for a, b in itertools.pairwise(values))

    rising = ["contrastive, 0.1", "contrastive, 1"]
    if not smoke:
        rising = [rising[0], "contrastive, 0.3", rising[1], "simple"]
    claims = [
        *_exact(torch.Generator().manual_seed(seed)),
        Claim.at_least(
            f"Uniformity falls from {rising[0]} to {rising[-1]}", least_drop("uniformity", rising), 0, ""
        ),
        Claim.at_least(
            f"Tolerance rises from {rising[0]} to {rising[-1]}", least_drop("tolerance", rising[::-1]), 0, ""
        ),
    ]  # fmt: skip
    if not smoke:
        uniform = {name: mean(name, "uniformity") for name in names}
        plain = abs(uniform["contrastive, 1"] - uniform["contrastive, 0.1"])
        hard = abs(uniform["hard, 1"] - uniform["hard, 0.1"])
        claims += [
            Claim.at_least(
                "Hard negatives make features at temperature 1 more uniform",
                uniform["hard, 1"] - uniform["contrastive, 1"], 0.3, "",
            ),
            Claim.at_most(
                "With hard negatives uniformity depends less on the temperature", hard / plain, 0.75, "times"
            ),
            Claim.at_least(
                "Hard negatives repair the simple loss",
                mean("hard simple", "nearest neighbour") - mean("simple", "nearest neighbour"), 5,
            ),
            Claim.at_least(
                "A middle temperature beats 1",
                mean("contrastive, 0.3", "nearest neighbour") - mean("contrastive, 1", "nearest neighbour"), 0,
            ),
        ]  # fmt: skip
    rows = [
        {"loss": name, **{meter: mean(name, meter) for meter in rows[0]},
         "lowest nearest neighbour": min(row["nearest neighbour"] for row in rows)}
        for name, rows in found.items()
    ]  # fmt: skip
    return Finding(claims, {"features of digits": rows})
