"""TALL-masks on `digits`: every specialist from one merged vector and one bit per weight and task.

Thresholds are chosen on validation and everything is reported on test, beside masks of the same densities (random;
largest task vector entries), the merged vector without masks, and two rivals without a claim: EMR-merging, which is
worse here, and task vectors cut to the archive's bytes by SVD, which are better. Consensus merging is searched and
reported without a claim too: on `digits` it does not help task arithmetic. Where it must and must not help is put to
the test in closed form: linear regression, shared weights and private ones, inputs of variance v on the others' own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint import Weights
from ..merging.baselines import task_arithmetic, ties
from ..merging.tall_masks import GRID, Archive, compress, consensus
from ..nets.multitask import MultiTaskModel
from ..scoring import mean, normalised
from ..study import Claim, Finding, Scale, draws
from ..task import Suite
from .substrate import evaluate, points, specialists

__all__ = ["run"]

SCALES = [round(0.1 * i, 1) for i in range(1, 11)]
Chosen = Mapping[str, Weights]


def _own(base: MultiTaskModel, suite: Suite, chosen: Chosen) -> dict[str, float]:
    """Each task's accuracy on test with its own weights."""
    return {task: evaluate(base, chosen[task], suite.only([task]))[task] for task in suite}


def _same_density(archive: Archive, base: Weights, experts: Chosen, order: Callable[[Tensor], Tensor]) -> Chosen:
    """Masks of the archive's densities that keep the entries of the task vector which `order` puts highest."""
    found: dict[str, Weights] = {}
    for task, density in archive.densities().items():
        ranks = {name: order(experts[task][name] - base[name]) for name in archive.masks}
        every = torch.cat([rank.flatten() for rank in ranks.values()])
        limit = every.sort(descending=True).values[round(density * len(every)) - 1]
        found[task] = dict(base) | {n: torch.where(r >= limit, archive.merged[n], base[n]) for n, r in ranks.items()}
    return found


def _emr(base: Weights, experts: Chosen) -> Chosen:
    """EMR-merging: per entry the elected sign and its largest magnitude; per task a mask and one factor."""
    found: dict[str, dict[str, Tensor]] = {task: dict(base) for task in experts}
    above, below = dict.fromkeys(experts, 0.0), dict.fromkeys(experts, 0.0)
    for name in base:
        deltas = torch.stack([expert[name] - base[name] for expert in experts.values()])
        elected = deltas * deltas.sum(0).sign()
        unified = elected.amax(0).clamp(min=0) * deltas.sum(0).sign()
        for task, delta, agrees in zip(experts, deltas, elected > 0, strict=True):
            found[task][name] = unified * agrees
            above[task] += delta.abs().sum().item()
            below[task] += (unified * agrees).abs().sum().item()
    return {t: {n: base[n] + v * (above[t] / below[t]) for n, v in row.items()} for t, row in found.items()}


def _svd(base: Weights, experts: Chosen, bytes_a_task: float) -> Chosen:
    """Task vectors cut to one share of every matrix's ranks, so that a task takes these bytes; biases whole."""
    matrices = {name: sum(base[name].shape) for name in base if base[name].ndim == 2}
    rest = 4 * sum(value.numel() for value in base.values() if value.ndim != 2)
    full = sum(4 * size * min(base[name].shape) for name, size in matrices.items())
    share = (bytes_a_task - rest) / full
    found: dict[str, Weights] = {}
    for task, expert in experts.items():
        cut = dict(expert)
        for name in matrices:
            u, s, v = torch.linalg.svd(expert[name] - base[name], full_matrices=False)
            rank = max(1, int(share * len(s)))
            cut[name] = base[name] + (u[:, :rank] * s[:rank]) @ v[:rank]
        found[task] = cut
    return found


def _search(base: MultiTaskModel, suite: Suite, make: Callable[[float], Weights]) -> float:
    """Points on test at the scale that is best on validation."""
    found = {scale: points(base, make(scale), suite, "validation") for scale in SCALES}
    return points(base, make(max(found, key=lambda scale: found[scale])), suite)


def _draw(seed: int) -> tuple[dict[str, float], dict[str, float]]:
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    individual = _own(base, suite, experts)

    def rate(weights: Weights, task: str) -> float:
        return evaluate(base, weights, suite.only([task]), "validation")[task]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # thresholds at the edge of the grid stand in the table
        archive = compress(start, experts, score=rate)
        trimmed = compress(start, experts, score=rate, vector="ties")
    generator = torch.Generator().manual_seed(seed)
    arms: dict[str, Chosen] = {"experts": experts, "TALL-masks": {task: archive.restore(task) for task in suite}}
    arms["TALL-masks on TIES"] = {task: trimmed.restore(task) for task in suite}
    for threshold in (*GRID, 1.0):
        fixed = compress(start, experts, threshold=threshold)
        arms[f"threshold {threshold:g}"] = {task: fixed.restore(task) for task in suite}
    arms["random masks"] = _same_density(archive, start, experts, lambda v: torch.rand(v.shape, generator=generator))
    arms["largest entries"] = _same_density(archive, start, experts, Tensor.abs)
    arms["EMR-merging"] = _emr(start, experts)
    size = sum(value.numel() * 4 for value in start.values())
    arms["SVD at equal bytes"] = _svd(start, experts, (archive.nbytes - size) / len(experts))
    row: dict[str, float] = {}
    for name, chosen in arms.items():
        scores = _own(base, suite, chosen)
        row |= {name: 100 * mean(scores), f"{name}, normalised": mean(normalised(scores, individual))}
    row["merged without masks"] = points(base, task_arithmetic(start, experts, scale=1.0), suite)
    searches: dict[str, Callable[[float], Weights]] = {
        "task arithmetic": lambda scale: task_arithmetic(start, experts, scale=scale),
        "Consensus task arithmetic": lambda scale: consensus(start, experts, threshold=archive.thresholds, scale=scale),
        "TIES": lambda scale: ties(start, experts, combine="sum", scale=scale),
        "Consensus TIES": lambda scale: consensus(
            start, experts, threshold=trimmed.thresholds, vector="ties", scale=scale
        ),
    }
    row |= {f"{name}, searched": _search(base, suite, make) for name, make in searches.items()}
    row["bytes, of the experts'"] = archive.nbytes / (size * len(experts))
    row["bytes besides the account"] = abs(
        archive.nbytes - 2 * size - len(experts) * sum(-(-value.numel() // 8) for value in start.values())
    )
    counts = compress(start, experts, threshold=0.4).counts()
    masks = {f"threshold, {task}": value for task, value in archive.thresholds.items()}
    masks |= {f"density, {task}": value for task, value in archive.densities().items()}
    masks |= {f"kept by {n} masks (0.4)": count / sum(counts) for n, count in enumerate(counts)}
    return row, masks


def _regression(seed: int, v: float) -> dict[str, float]:
    """Exact mean risk of four linear regression tasks: variance 1 on own weights, v on the others' private ones."""
    draw = torch.Generator().manual_seed(seed)
    shared, private = torch.randn(6, generator=draw), F.normalize(torch.randn(4, 5, generator=draw), dim=1)
    own = torch.eye(4).repeat_interleave(5, dim=1)  # (tasks, private weights)
    targets = torch.cat([shared.expand(4, -1), own * private.flatten()], dim=1)
    variance = torch.cat([torch.ones(4, 6), torch.where(own.bool(), 1.0, v)], dim=1)
    base, experts = {"w": torch.zeros(targets.shape[1])}, {str(t): {"w": row} for t, row in enumerate(targets)}
    merges = {
        "task arithmetic": task_arithmetic(base, experts, scale=0.25),
        "Consensus": consensus(base, experts, threshold=0.3, scale=0.25),
    }
    return {name: (variance * (merge["w"] - targets).square()).sum(1).mean().item() for name, merge in merges.items()}


def run(scale: Scale, seed: int) -> Finding:
    """Mean accuracies in percent over the tasks' test splits; normalised ones are shares of the experts' own."""
    chosen = draws(scale, seed)
    table = {draw: _draw(draw) for draw in chosen}
    rows = [row for row, _ in table.values()]
    risks = {v: [_regression(draw, v) for draw in chosen] for v in (4.0, 1.0)}

    def least(first: str, second: str) -> float:
        return min(row[first] - row[second] for row in rows)

    tall = "TALL-masks"
    share, besides = (
        max(row[name] for row in rows) for name in ("bytes, of the experts'", "bytes besides the account")
    )
    expected = {4.0: {"task arithmetic": 1.3125, "Consensus": 1.0}, 1.0: {"task arithmetic": 0.75, "Consensus": 1.0}}
    farthest = max(abs(risk[name] - expected[v][name]) for v in risks for risk in risks[v] for name in risk)
    gains = {v: [risk["task arithmetic"] - risk["Consensus"] for risk in risks[v]] for v in risks}
    claims = [
        Claim.at_least("normalised accuracy, worst draw", min(row[f"{tall}, normalised"] for row in rows), 97, "%"),
        Claim.at_least("above random masks of equal density, worst draw", least(tall, "random masks"), 15),
        Claim.at_least("above the largest entries at equal density, worst draw", least(tall, "largest entries"), 0),
        Claim.at_least("above the merged vector without masks, worst draw", least(tall, "merged without masks"), 30),
        Claim.at_most("bytes of the archive, of the six experts'", share, 0.37, ""),
        Claim.at_most("bytes besides 2 P b + K P / 8", besides, 0, ""),
        Claim.at_most("regression: farthest risk from its closed form", farthest, 1e-5, ""),
        Claim.at_least("regression, v = 4: risk that Consensus takes off task arithmetic's", min(gains[4.0]), 0.3, ""),
        Claim.at_most(
            "regression, v = 1: the same, where private weights are worth keeping", max(gains[1.0]), -0.2, ""
        ),
    ]

    def rounded(row: Mapping[str, float], digits: int) -> dict[str, float]:
        return {name: round(value, digits) for name, value in row.items()}

    return Finding(
        claims,
        {
            "accuracy": [{"draw": draw} | rounded(row, 2) for draw, (row, _) in table.items()],
            "masks": [{"draw": draw} | rounded(masks, 3) for draw, (_, masks) in table.items()],
            "regression": [{"v": v} | rounded(risk, 4) for v, found in risks.items() for risk in found],
        },
    )
