"""Self-Positioning on `digits`: unequal task vectors, and an embedding model with two tasks in conflict.

First, imbalance: one task vector is made 3 times as long and the others 0.6 times, which is what unequal
amounts of training data do to them; the learned mixture is compared with one searched-for factor for all.
Second, conflict: an encoder must place digits of one class together (retrieval) and digits with the same
amount of ink together (similarity), with four times as much training on the first; merging the two
single-task encoders is compared with training on both, in the same proportion and resampled to 1:1. All
learning is on train and validation, all figures are on test.
Retrieval is measured as mean average precision: the share of nearest neighbours with the right class, tried
first, is 97% for the base already and tells the models apart no longer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from statistics import fmean

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..checkpoint import Weights
from ..data.digits import digits
from ..merging.baselines import average, task_arithmetic, ties
from ..merging.engine import Merge
from ..merging.self_positioning import info_nce, self_positioning, slerp
from ..nets.multitask import Normalize, mlp
from ..study import Claim, Finding, Scale, draws
from ..task import Batches, Examples
from ..train import load_weights
from .substrate import points, specialists

__all__ = ["run"]

LONG, SHORT = 3.0, 0.6
GRID = (0.1, 0.2, 0.3, 0.4, 0.5)
STEPS, LR, BATCH, MU = 120, 5e-2, 16, 0.01
GROUPS, TEMPERATURE, EMBEDDING_LR = 8, 0.1, 1e-3
TRAINING = {"retrieval": 400, "similarity": 100}


def _imbalance(seed: int) -> dict[str, float]:
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    factors = {task: LONG if i == 0 else SHORT for i, task in enumerate(suite)}
    uneven: dict[str, Weights] = {t: dict(task_arithmetic(start, {t: experts[t]}, scale=factors[t])) for t in suite}
    probe = {task: Batches(suite[task].validation, BATCH, seed=seed + i) for i, task in enumerate(suite)}
    learned = self_positioning(base, start, uneven, probe, steps=STEPS, lr=LR, mu=MU, seed=seed)
    grid = [task_arithmetic(start, uneven, scale=scale) for scale in GRID]
    chosen = max(grid, key=lambda merge: points(base, merge, suite, "validation"))
    weights = learned.rule.weights  # type: ignore[attr-defined]
    return {
        "base": points(base, start, suite),
        "average": points(base, average(uneven), suite),
        "one factor, best on validation": points(base, chosen, suite),
        "one factor, best on test": max(points(base, merge, suite) for merge in grid),
        "TIES": points(base, ties(start, uneven), suite),
        "uniform SLERP": points(base, slerp(start, uneven), suite),
        "Self-Positioning": points(base, learned, suite),
        "weight of the long vector": weights[0],
        "its rank from below": sum(weight <= weights[0] for weight in weights),
        "scale": learned.rule.scale,  # type: ignore[attr-defined]
    }  # fmt: skip


class _Pairs:
    """Draws queries and documents `(GROUPS * 10, 64)`: in each group one pair of every label."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        places = [(labels == label).nonzero().flatten() for label in range(10)]
        self.counts = torch.tensor([len(of) for of in places])
        self.places = nn.utils.rnn.pad_sequence(places, batch_first=True)  # (10, most)

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = (torch.rand(2, GROUPS, 10, generator=generator) * self.counts).long()
        queries, documents = self.images[self.places[torch.arange(10), drawn].flatten(1)]
        return queries, documents


def _contrast(model: Callable, batch: tuple[Tensor, Tensor], *task: str) -> Tensor:
    queries, documents = (model(part, *task).unflatten(0, (GROUPS, 10)) for part in batch)
    return torch.stack([info_nce(q, d, TEMPERATURE) for q, d in zip(queries, documents, strict=True)]).mean()


def _train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], loss: Callable, steps: int) -> nn.Module:
    optimiser = torch.optim.AdamW(model.parameters(), lr=EMBEDDING_LR, weight_decay=0.0)
    for _ in range(steps):
        value = loss(model, next(batches))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return model


class _Encoder(nn.Module):
    """The same embedding for every task."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(mlp([64, 256, 256, 64], seed=seed), Normalize())

    def forward(self, images: Tensor, task: str = "") -> Tensor:
        return self.layers(images)


@torch.no_grad()
def _quality(encoder: _Encoder, weights: Weights, test: Examples) -> dict[str, float]:
    """In percent: mean average precision of classes; rank correlation of cosine with nearness of ink."""
    model = copy.deepcopy(encoder)
    load_weights(model, weights)
    images, labels = test.inputs, test.targets
    features = model(images)
    cosines = features @ features.T
    ranked = cosines.clone().fill_diagonal_(-2).argsort(1, descending=True)[:, :-1]
    right = (labels[ranked] == labels[:, None]).double()
    precision = right.cumsum(1) / torch.arange(1, right.shape[1] + 1)
    retrieval = ((precision * right).sum(1) / right.sum(1)).mean().item()
    ink = images.mean(1)  # type: ignore[union-attr]
    above = torch.ones_like(cosines).triu(1).bool()
    similarity = spearmanr(cosines[above].numpy(), -(ink[:, None] - ink).abs()[above].numpy()).statistic  # type: ignore[attr-defined]
    return {"retrieval": 100 * retrieval, "similarity": 100 * float(similarity)}


def _conflict(seed: int) -> list[dict[str, float | str]]:
    task = digits(seed=seed)["straight"]
    images, classes = task.train.inputs, task.train.targets  # type: ignore[attr-defined]
    ink = images.mean(1)
    deciles = torch.bucketize(ink, ink.quantile(torch.linspace(0.1, 0.9, 9)))
    pairs = {"retrieval": _Pairs(images, classes), "similarity": _Pairs(images, deciles)}
    generator = torch.Generator().manual_seed(seed)

    def batches(names: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield pairs[names[int(torch.randint(len(names), (), generator=generator))]](generator)

    def noisy() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            some = images[torch.randint(len(images), (GROUPS * 10,), generator=generator)]
            yield tuple(some + 0.2 * torch.randn(some.shape, generator=generator) for _ in range(2))  # type: ignore[misc]

    base = _train(_Encoder(seed), noisy(), lambda m, b: info_nce(m(b[0]), m(b[1]), TEMPERATURE), 300)
    start = base.state_dict()
    experts = {t: _train(copy.deepcopy(base), batches([t]), _contrast, n).state_dict() for t, n in TRAINING.items()}
    mixture = [task for task, count in TRAINING.items() for _ in range(count // 100)]
    total = sum(TRAINING.values())
    joint = _train(copy.deepcopy(base), batches(mixture), _contrast, total).state_dict()
    resampled = _train(copy.deepcopy(base), batches(list(TRAINING)), _contrast, total).state_dict()
    probe = {t: [draw(generator) for _ in range(20)] for t, draw in pairs.items()}
    learned: Merge = self_positioning(
        base, start, experts, probe, objective=_contrast, steps=STEPS, lr=LR, mu=MU, seed=seed
    )
    contestants = {
        "base": start, "joint training": joint, "joint training, resampled 1:1": resampled, "average": average(experts),
        "uniform SLERP": slerp(start, experts), "Self-Positioning": learned,
    }  # fmt: skip
    contestants |= {f"trained on {task} alone": weights for task, weights in experts.items()}
    rows = [{"draw": seed, "model": name} | _quality(base, w, task.test) for name, w in contestants.items()]  # type: ignore[arg-type]
    return [row | {"mean": (row["retrieval"] + row["similarity"]) / 2} for row in rows]  # type: ignore[operator]


def run(scale: Scale, seed: int) -> Finding:
    """Accuracies, shares and correlations in percent, on test."""
    chosen = draws(scale, seed)
    uneven = {draw: _imbalance(draw) for draw in chosen}
    conflict = [row for draw in chosen for row in _conflict(draw)]

    def gap(column: str, first: str, second: str) -> float:
        """Mean over draws of the difference between two models."""
        values = {(row["draw"], row["model"]): row[column] for row in conflict}
        return fmean(values[draw, first] - values[draw, second] for draw in chosen)  # type: ignore[operator, misc]

    def least(second: str) -> float:
        return min(row["Self-Positioning"] - row[second] for row in uneven.values())

    claims = [
        Claim.at_least(
            "imbalance: above one factor for all (chosen on validation), worst draw",
            least("one factor, best on validation"), 8,
        ),
        Claim.at_least("imbalance: above uniform SLERP, worst draw", least("uniform SLERP"), 0),
        Claim.at_most(
            "imbalance: rank of the long vector's weight from below, worst draw",
            max(row["its rank from below"] for row in uneven.values()), 2, "of 6",
        ),
        *(
            Claim.at_least(f"conflict: above {other}, mean of both tasks", gap("mean", "Self-Positioning", other), 0)
            for other in ("joint training", "joint training, resampled 1:1", "average", "uniform SLERP")
        ),
        *(
            Claim.at_least(
                f"conflict: {task} alone above joint training, on {task}",
                gap(task, f"trained on {task} alone", "joint training"), 0,
            )
            for task in TRAINING
        ),
    ]  # fmt: skip

    def rounded(row: dict) -> dict:
        return {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}

    rows = [{"draw": draw} | rounded(row) for draw, row in uneven.items()]
    return Finding(claims, {"imbalance": rows, "conflict": [rounded(row) for row in conflict]})
