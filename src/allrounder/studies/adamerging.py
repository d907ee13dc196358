"""AdaMerging on `digits`: layer-wise coefficients learned without labels against task arithmetic at 0.3.

As in the paper, the unlabelled inputs are those of the test split (transductive); the same on held-out
inputs (adapted on validation, reported on test) stands beside it. The paper's belief that entropy stands
for the supervised loss is measured as a rank correlation over random coefficients.
"""

from __future__ import annotations

import copy
from statistics import fmean

import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from ..merging.adamerging import adamerging, entropy
from ..merging.baselines import task_arithmetic
from ..merging.engine import Aligned, Linear, Merge
from ..study import Claim, Finding, Scale, draws
from ..task import Batches
from ..train import load_weights
from .substrate import points, specialists

__all__ = ["run"]

STEPS, LR, BATCH = 200, 1e-2, 32


def _correlation(seed: int, count: int = 30) -> float:
    """Spearman correlation of entropy and cross-entropy over random task-wise coefficients in [0, 1]."""
    suite, base, experts = specialists(seed)
    models = Aligned(base.backbone.state_dict(), experts)
    generator = torch.Generator().manual_seed(seed)
    model, pairs = copy.deepcopy(base), []
    for _ in range(count):
        values = torch.rand(len(experts), generator=generator).tolist()
        load_weights(model.backbone, Merge(models, Linear(values)))
        with torch.no_grad():
            outputs = {t: (model(suite[t].validation.inputs, t), suite[t].validation.targets) for t in suite}  # type: ignore[attr-defined]
        pairs.append(
            (
                fmean(entropy(logits).mean().item() for logits, _ in outputs.values()),
                fmean(F.cross_entropy(logits, targets).item() for logits, targets in outputs.values()),
            )
        )
    first, second = zip(*pairs, strict=True)
    return float(spearmanr(list(first), list(second)).statistic)  # type: ignore[attr-defined]


def _draw(seed: int) -> dict[str, float]:
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()

    def learn(split: str, **options: object) -> tuple[float, list[float]]:
        data = {task: Batches(suite[task].split(split), BATCH, seed=seed + i) for i, task in enumerate(suite)}
        merge = adamerging(base, start, experts, data, steps=STEPS, lr=LR, **options)  # type: ignore[arg-type]
        return points(base, merge, suite), merge.history  # type: ignore[attr-defined]

    layer, history = learn("test")
    return {
        "task arithmetic 0.3": points(base, task_arithmetic(start, experts), suite),
        "layer-wise": layer,
        "layer-wise, held out": learn("validation")[0],
        "task-wise": learn("test", per="model")[0],
        "layer-wise ++": learn("test", plus=True)[0],
        "entropy, first steps": fmean(history[:10]),
        "entropy, last steps": fmean(history[-10:]),
        "entropy and loss, rank correlation": _correlation(seed),
    }


def run(scale: Scale, seed: int) -> Finding:
    """Mean accuracies in percent over the tasks' test splits."""
    table = {draw: _draw(draw) for draw in draws(scale, seed)}

    def gains(first: str, second: str) -> list[float]:
        return [row[first] - row[second] for row in table.values()]

    over, fall = gains("layer-wise", "task arithmetic 0.3"), gains("entropy, first steps", "entropy, last steps")
    claims = [
        Claim.at_least("layer-wise above task arithmetic (0.3), mean", fmean(over), 2),
        Claim.at_least("layer-wise above task arithmetic (0.3), worst draw", min(over), -1),
        Claim.at_least("layer-wise above task-wise, mean", fmean(gains("layer-wise", "task-wise")), 5),
        Claim.at_least("entropy falls, worst draw", min(fall), 0, "nats"),
        Claim.at_least(
            "layer-wise on held-out inputs above task arithmetic (0.3), mean",
            fmean(gains("layer-wise, held out", "task arithmetic 0.3")), 2,
        ),
    ]  # fmt: skip
    rows = [{"draw": draw} | {name: round(value, 3) for name, value in row.items()} for draw, row in table.items()]
    return Finding(claims, {"accuracy": rows})
