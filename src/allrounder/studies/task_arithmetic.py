"""Task arithmetic and the baselines of merging, on `digits`.

Claims (baselines of Ilharco et al. 2023 and its successors): merging lies between the base and the experts;
one searched-for scale beats plain averaging; too large a scale destroys; RegMean and Fisher use data well;
dropping entries at random costs little; subtracting a task vector forgets that task and little else.
TIES is reported without a claim: nothing says that it must win here.
"""

from __future__ import annotations

import copy
from statistics import fmean

from ..merging.baselines import average, breadcrumbs, dare, negate, task_arithmetic, ties
from ..merging.fisher import fisher, fisher_information
from ..merging.regmean import gram_matrices, regmean
from ..nets.multitask import MultiTaskModel
from ..score import mean, score
from ..study import Claim, Finding, Scale, draws
from ..task import Batches
from ..train import load_weights
from .substrate import evaluate, points, specialists

__all__ = ["run"]


def _expert(base: MultiTaskModel, weights: dict) -> MultiTaskModel:
    model = copy.deepcopy(base)
    load_weights(model.backbone, weights)
    return model.eval()


def _draw(seed: int) -> dict[str, float]:
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    own = {task: _expert(base, weights) for task, weights in experts.items()}
    grams = {t: gram_matrices(own[t], Batches(suite[t].train, 64, seed=seed), task=t, examples=256) for t in suite}
    information = {
        t: fisher_information(own[t], Batches(suite[t].train, 64, seed=seed), task=t, examples=64, seed=seed) for t in suite
    }
    merges = {
        "base": start,
        "averaging": average(experts),
        "task arithmetic 0.3": task_arithmetic(start, experts, scale=0.3),
        "task arithmetic 1.0": task_arithmetic(start, experts, scale=1.0),
        "TIES 0.2 mean 1.0": ties(start, experts, density=0.2, scale=1.0),
        "TIES 0.2 sum 0.5": ties(start, experts, density=0.2, scale=0.5, combine="sum"),
        "DARE 0.5": dare(start, experts, drop=0.5, scale=0.3, seed=seed),
        "DARE 0.9": dare(start, experts, drop=0.9, scale=0.3, seed=seed),
        "Breadcrumbs": breadcrumbs(start, experts),
        "Fisher": fisher(start, experts, information),
        "RegMean": regmean(experts, grams),
    }
    row = {name: points(base, weights, suite) for name, weights in merges.items()}
    row["experts"] = 100 * mean({task: score(own[task], suite.only([task]))[task] for task in suite})
    target, *others = suite
    before, after = evaluate(base, start, suite), evaluate(base, negate(start, experts[target], scale=0.3), suite)
    row["negation: target falls by"] = 100 * (before[target] - after[target])
    row["negation: others fall by"] = 100 * fmean(before[task] - after[task] for task in others)
    return row


def run(scale: Scale, seed: int) -> Finding:
    """Mean accuracies in percent over the tasks' test splits; claims on each draw, by its worst draw."""
    table = {draw: _draw(draw) for draw in draws(scale, seed)}

    def least(first: str, second: str) -> float:
        return min(row[first] - row[second] for row in table.values())

    claims = [
        Claim.at_least("averaging above the base", least("averaging", "base"), 4),
        Claim.at_least("task arithmetic (0.3) above averaging", least("task arithmetic 0.3", "averaging"), 4),
        Claim.at_least("experts above task arithmetic (0.3)", least("experts", "task arithmetic 0.3"), 4),
        Claim.at_least("scale 0.3 above scale 1.0", least("task arithmetic 0.3", "task arithmetic 1.0"), 15),
        Claim.at_least("RegMean above task arithmetic (0.3)", least("RegMean", "task arithmetic 0.3"), 10),
        Claim.at_least("Fisher above averaging", least("Fisher", "averaging"), 1),
        Claim.at_most("DARE (0.5) from task arithmetic", -least("DARE 0.5", "task arithmetic 0.3"), 2),
        Claim.at_most("DARE (0.9) from task arithmetic", -least("DARE 0.9", "task arithmetic 0.3"), 5),
        Claim.at_least("negation lowers its target", min(row["negation: target falls by"] for row in table.values()), 20),
        Claim.at_most("negation lowers the others", max(row["negation: others fall by"] for row in table.values()), 3),
    ]
    rows = [{"draw": draw} | {name: round(value, 2) for name, value in row.items()} for draw, row in table.items()]
    return Finding(claims, {"accuracy": rows})
