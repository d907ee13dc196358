"""Rules that combine gradients, where one task is a hundred times as steep as the other.

`L_k = c_k / 2 |A_k (w - a_k)|^2` in the plane with curvatures (100, 1), minima at (-1, 0) and (1, 0) and a slant, so
that the two tasks disagree everywhere but on the Pareto set. From five starts a draw each rule walks 400 normalised,
shrinking steps. A point is Pareto stationary when some convex combination of the gradients vanishes; it counts as
reached when the shortest is below 1e-3. (A first version measured unit gradients, by which MGDA, which follows short
gradients, ends far away; that figure stands in the table.)
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.aggregation import Aggregate
from ..study import Claim, Finding, Scale, draws
from ..train import Losses

__all__ = ["run"]

CURVATURES = (100.0, 1.0)
CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
SLANTS = torch.tensor([[[1.0, 0.3], [0.0, 0.6]], [[0.7, -0.3], [0.0, 1.0]]])
TASKS = ("steep", "flat")
STEPS, LENGTH = 400, 0.1
REACH, REACHED = ("mgda", "imtl-g", "nash"), 1e-3
RULES = ("sum", *REACH, "pcgrad", "cagrad", "aligned", "upgrad", "uncertainty", "gradnorm")


def _losses(w: Tensor) -> Losses:
    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        places = [TASKS.index(task) for task in tasks]
        return {
            TASKS[k]: CURVATURES[k] / 2 * (SLANTS[k] @ (w - CENTRES[k])).square().sum() for k in places
        }  # fmt: skip

    return losses


def _shortest(a: Tensor, b: Tensor) -> float:
    """Length of the shortest convex combination."""
    t = ((b - a) @ b / (b - a).square().sum().clamp_min(1e-12)).clamp(0, 1)
    return (t * a + (1 - t) * b).norm().item()


def _stationary(w: Tensor) -> tuple[float, float]:
    """Shortest convex combination of the unit gradients and of the gradients, 0 on the Pareto set."""
    found = _losses(w)(TASKS)
    rows = torch.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in found.values()])
    lengths = rows.norm(dim=1)
    if (lengths < 1e-6).any():
        return 0.0, 0.0
    return _shortest(*(rows / lengths[:, None])), _shortest(*rows)


def _end(rule: str, start: Tensor) -> tuple[float, float]:
    """How far from Pareto stationary a walk ends."""
    w = nn.Parameter(start.clone())
    options: dict[str, Any] = {"max_norm": 0.0} if rule == "nash" else {}
    update = Aggregate([w], rule, tasks=TASKS, **options)
    learned = torch.optim.Adam(update.parameters(), lr=0.02) if list(update.parameters()) else None
    for step in range(STEPS):
        update(_losses(w), TASKS)
        if learned is not None:
            learned.step()
        with torch.no_grad():
            length = LENGTH * (1 - step / STEPS)
            w -= length * w.grad / w.grad.norm().clamp_min(1e-9)  # type: ignore[operator, union-attr]
    return _stationary(w)


def run(scale: Scale, seed: int) -> Finding:
    """Ends of the walks, over all starts."""
    starts = [
        4 * torch.rand(2, generator=torch.Generator().manual_seed(5 * draw + i)) - 2
        for draw in draws(scale, seed)
        for i in range(3 if scale == "smoke" else 5)
    ]
    ends = {
        rule: [_end(rule, start) for start in starts] for rule in RULES if scale != "smoke" or rule in ("sum", *REACH)
    }
    worst = {rule: max(raw for _, raw in pairs) for rule, pairs in ends.items()}
    claims = [Claim.at_least("sum: worst end, shortest combination of the gradients", worst["sum"], REACHED, "")]
    claims += [
        Claim.at_most(f"{rule}: worst end, shortest combination of the gradients", worst[rule], REACHED, "")
        for rule in REACH
    ]
    rows = [
        {"rule": rule, "mean": round(fmean(raw for _, raw in pairs), 5), "worst": round(worst[rule], 5)}
        | {"worst, unit gradients": round(max(unit for unit, _ in pairs), 5)}
        for rule, pairs in ends.items()
    ]
    return Finding(claims, {"distance from Pareto stationary": rows})
