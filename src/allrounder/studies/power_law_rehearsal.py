"""Laws of rehearsal at equal budgets: ten orders of the pixels of handwritten digits, one after another.

200 steps of 32 a phase, half of every phase but the first from earlier tasks, network 64-100-100-10, SGD at 0.05. What
is compared is how the rehearsed half is shared among earlier tasks; EWC, LwF and replay from a buffer stand beside it.
"""

from __future__ import annotations

import math
import warnings
from statistics import fmean
from typing import Any

from ..continual.baselines import ER, Finetune
from ..continual.power_law import power_law, rehearsal_shares
from ..continual.regularisers import EWC, LwF
from ..continual.stream import Stream, permuted
from ..study import Claim, Finding, Scale, draws
from .continual_substrate import digits_task, network, run_learner

__all__ = ["run"]

PHASE = 200 * 32
LAWS: dict[str, dict[str, Any]] = {
    "recency": {"law": "recency"},
    "exponential 1": {"law": "exponential", "alpha": 1.0},
    "power 2": {"law": "power", "alpha": 2.0},
    "power 1": {"law": "power", "alpha": 1.0},
    "power 0.5": {"law": "power", "alpha": 0.5},
    "uniform": {"law": "uniform"},
}
ALWAYS = ("recency", "exponential 1", "power 1", "uniform")


def _environments(base: Stream, seed: int, phase: int, names: list[str]) -> dict[str, Stream]:
    """All have the same total: the first phase is all new, later phases half."""
    found = {"none": power_law(base, new=phase, rehearsed=0, seed=seed)}
    for name in names:
        found[name] = power_law(base, new=phase // 2, rehearsed=phase - phase // 2, seed=seed, **LAWS[name])
    return found


def run(scale: Scale, seed: int) -> Finding:
    full = scale != "smoke"
    tasks, phase = (10, PHASE) if full else (6, PHASE // 2)
    names = [name for name in LAWS if full or name in ALWAYS]
    rows: dict[str, list[dict[str, float]]] = {}
    for draw in draws(scale, seed):
        base = permuted(digits_task(draw), tasks, seed=draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a phase repeats the 1,097 images on purpose
            worlds = _environments(base, draw, phase, names)
        learners: list[tuple[str, Any, Stream]] = [
            (name, Finetune(network(draw), 10, seed=draw), world) for name, world in worlds.items()
        ]
        if full:
            alone, together = worlds["none"], worlds["power 1"]
            learners += [
                ("none, EWC 10", EWC(network(draw), 10, strength=10.0, seed=draw), alone),
                ("none, LwF", LwF(network(draw), 10, seed=draw), alone),
                ("none, ER 200", ER(network(draw), 10, buffer=200, seed=draw), alone),
                ("power 1, LwF", LwF(network(draw), 10, seed=draw), together),
            ]
        for name, learner, world in learners:
            rows.setdefault(name, []).append(_measures(run_learner(learner, world, draw, epochs=1).matrix))
    return Finding(
        _claims(rows, full), {f"{tasks} orders of the pixels": _table(rows), "shares at lag": _shares(names)}
    )


def _measures(matrix: list[list[float]]) -> dict[str, float]:
    last = matrix[-1]
    early = [matrix[i][i] for i in range(len(last))]
    return {
        "all": fmean(last), "first": last[0], "last": last[-1], "worst": min(last),
        "forgetting": fmean(max(row[j] for row in matrix[j:-1]) - last[j] for j in range(len(last) - 1)),
        "new, early half": fmean(early[: len(early) // 2]), "new, late half": fmean(early[len(early) // 2 :]),
    }  # fmt: skip


def _claims(rows: dict[str, list[dict[str, float]]], full: bool) -> list[Claim]:
    def mean(name: str, what: str = "all") -> float:
        return 100 * fmean(row[what] for row in rows[name])

    shares = rehearsal_shares([1, 2, 4, 8])
    slope = math.log(float(shares[3] / shares[0])) / math.log(8)
    law = Claim("slope of shares against lag on log axes, alpha 1", "= -1", round(slope, 6), abs(slope + 1) < 1e-9)
    if not full:
        return [law, Claim.at_least("power 1 over no rehearsal", mean("power 1") - mean("none"), 3)]

    def later(name: str) -> float:
        return mean(name, "new, late half") - mean(name, "new, early half")

    rehearsed = [name for name in rows if name in LAWS]
    new = [mean(name, "last") for name in rehearsed]
    return [
        law,
        Claim.at_least("recency over no rehearsal, mean", mean("recency") - mean("none"), 10),
        Claim.at_least("exponential over recency, mean", mean("exponential 1") - mean("recency"), 10),
        Claim.at_least("power 1 over exponential, mean", mean("power 1") - mean("exponential 1"), 10),
        Claim.at_most("uniform over power 0.5, mean", mean("uniform") - mean("power 0.5"), 3),
        Claim.at_most("spread of the last task's accuracy over the laws, mean", max(new) - min(new), 4),
        Claim.at_least("power 1 over EWC without rehearsal, mean", mean("power 1") - mean("none, EWC 10"), 0),
        Claim.at_least("power 1 over LwF without rehearsal, mean", mean("power 1") - mean("none, LwF"), 0),
        Claim.at_least("power 1 over replay from a buffer of 200, mean", mean("power 1") - mean("none, ER 200"), 0),
        Claim.at_least("LwF in that world over the world alone, mean", mean("power 1, LwF") - mean("power 1"), 0),
        Claim.at_least(
            "forward facilitation: what tasks 6-10 gain over 1-5 when just learned, power 1 less none",
            later("power 1") - later("none"), 0,
        ),
    ]  # fmt: skip


def _table(rows: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    return [
        {"environment": name} | {key: round(100 * fmean(row[key] for row in found), 1) for key in found[0]}
        for name, found in rows.items()
    ]


def _shares(names: list[str]) -> list[dict[str, Any]]:
    lags = [1, 2, 3, 5, 9]
    table = []
    for name in names:
        shares = rehearsal_shares(list(range(1, 10)), **LAWS[name])
        table.append({"law": name} | {f"lag {lag}": round(float(shares[lag - 1]), 3) for lag in lags})
    return table
