"""Task arithmetic and the baselines of merging, on `digits`.

Claims (baselines of Ilharco et al. 2023 and its successors): merging lies between the base and the experts;
one searched-for scale beats plain averaging; too large a scale destroys; RegMean and Fisher use data well;
dropping entries at random costs little; subtracting a task vector forgets that task and little else.
TIES and Breadcrumbs are reported without a claim: nothing says that they must win here. The searched scale is
chosen on the validation split; every figure is of the test split, absolute and as a share of each task's expert.
"""

from __future__ import annotations

import copy
from statistics import fmean

from ..checkpoint import Weights
from ..merging.baselines import average, breadcrumbs, dare, negate, task_arithmetic, ties
from ..merging.fisher import fisher, fisher_information
from ..merging.regmean import gram_matrices, regmean
from ..nets.multitask import MultiTaskModel
from ..scoring import mean, normalised
from ..study import Claim, Finding, Scale, draws
from ..task import Batches
from ..train import fit, load_weights
from .substrate import evaluate, points, specialists

__all__ = ["run"]

Scores = dict[str, float]
TENTHS = [round(0.1 * i, 1) for i in range(1, 11)]


def _expert(base: MultiTaskModel, weights: Weights) -> MultiTaskModel:
    model = copy.deepcopy(base)
    load_weights(model.backbone, weights)
    return model.eval()


def _draw(seed: int) -> tuple[dict[str, Scores], dict[str, float]]:
    """Test scores of every method on every task, and the other figures of one draw."""
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    own = {task: _expert(base, weights) for task, weights in experts.items()}
    grams = {t: gram_matrices(own[t], Batches(suite[t].train, 64, seed=seed), task=t, examples=256) for t in suite}
    information = {
        task: fisher_information(own[task], Batches(suite[task].train, 64, seed=seed), task=task, examples=64)
        for task in suite
    }

    def rate(scale: float) -> float:
        return points(base, task_arithmetic(start, experts, scale=scale), suite, "validation")

    best = max(TENTHS, key=rate)
    joint = copy.deepcopy(base)
    fit(joint, suite, steps=120 * len(suite), lr=3e-4, seed=seed)
    weights = {
        "base": start,
        "averaging": average(experts),
        "task arithmetic 0.3": task_arithmetic(start, experts, scale=0.3),
        "task arithmetic 1.0": task_arithmetic(start, experts, scale=1.0),
        "task arithmetic, searched": task_arithmetic(start, experts, scale=best),
        "TIES 0.2 mean 1.0": ties(start, experts, density=0.2, scale=1.0),
        "TIES 0.2 sum 0.5": ties(start, experts, density=0.2, scale=0.5, combine="sum"),
        "DARE 0.5": dare(start, experts, drop=0.5, scale=0.3, seed=seed),
        "DARE 0.9": dare(start, experts, drop=0.9, scale=0.3, seed=seed),
        "Breadcrumbs": breadcrumbs(start, experts),
        "Fisher": fisher(start, experts, information),
        "RegMean": regmean(experts, grams),
        "joint training": joint.backbone.state_dict(),
    }  # fmt: skip
    scores = {name: evaluate(base, merged, suite) for name, merged in weights.items()}
    crossed = {task: evaluate(base, experts[task], suite) for task in suite}
    scores["experts"] = {task: crossed[task][task] for task in suite}
    target, *others = suite
    before, after = scores["base"], evaluate(base, negate(start, experts[target], scale=0.3), suite)
    figures = {
        "searched scale": best,
        "experts on others' tasks": 100 * fmean(crossed[a][b] for a in suite for b in suite if a != b),
        "target falls by": 100 * (before[target] - after[target]),
        "others fall by": 100 * fmean(before[task] - after[task] for task in others),
    }
    return scores, figures


def run(scale: Scale, seed: int) -> Finding:
    """Mean accuracies in percent over the tasks' test splits.

    The order of base, averaging, task arithmetic and experts is claimed of means over draws, as it is known from
    elsewhere; all else of the worst draw.
    """
    found = {draw: _draw(draw) for draw in draws(scale, seed)}
    means = {draw: {name: 100 * mean(row) for name, row in scores.items()} for draw, (scores, _) in found.items()}
    shares = {
        draw: {name: mean(normalised(row, scores["experts"])) for name, row in scores.items()}
        for draw, (scores, _) in found.items()
    }
    others = {draw: row for draw, (_, row) in found.items()}

    def least(first: str, second: str) -> float:
        return min(row[first] - row[second] for row in means.values())

    def average_gap(first: str, second: str) -> float:
        return fmean(row[first] - row[second] for row in means.values())

    target, control = ([row[f"{whose} by"] for row in others.values()] for whose in ("target falls", "others fall"))
    ta = "task arithmetic 0.3"
    claims = [
        Claim.at_least("averaging above the base, mean", average_gap("averaging", "base"), 4),
        Claim.at_least("task arithmetic (0.3) above averaging, mean", average_gap(ta, "averaging"), 4),
        Claim.at_least("experts above task arithmetic (0.3), mean", average_gap("experts", ta), 4),
        Claim.at_least("scale 0.3 above scale 1.0, worst draw", least(ta, "task arithmetic 1.0"), 15),
        Claim.at_least("RegMean above task arithmetic (0.3), worst draw", least("RegMean", ta), 10),
        Claim.at_least("Fisher above averaging, worst draw", least("Fisher", "averaging"), 1),
        Claim.at_most("DARE (0.5) below task arithmetic, worst draw", -least("DARE 0.5", ta), 2),
        Claim.at_most("DARE (0.9) below task arithmetic, worst draw", -least("DARE 0.9", ta), 5),
        Claim.at_least("negation lowers its target, worst draw", min(target), 20),
        Claim.at_most("negation lowers the others, worst draw", max(control), 3),
    ]

    def table(rows: dict[int, dict[str, float]]) -> list[dict[str, float]]:
        return [{"draw": draw} | {name: round(value, 2) for name, value in row.items()} for draw, row in rows.items()]

    tables = {"accuracy": table(means), "share of the experts": table(shares), "scale and negation": table(others)}
    return Finding(claims, tables)
