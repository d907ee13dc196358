"""Twin-Merging on `digits`: the shared expert plus low-rank parts that a router mixes per input, heads given.

Claims of the paper: mixing per input beats every static merge by far and comes near the experts at a fraction of
their storage; more rank is better; what counts is that the router is right (a permuted router is worse than no
exclusive parts at all). And the method's own reason to compress against the shared expert instead of the base.
Hard routing to whole experts, its real competitor, and what happens without a task are reported.
"""

from __future__ import annotations

import copy
from statistics import fmean

import torch
from torch import Tensor

from ..checkpoint import Weights
from ..merging.baselines import average, dare, task_arithmetic, ties
from ..merging.twin_merging import TwinMerging
from ..nets.multitask import MultiTaskModel
from ..scoring import mean, score
from ..study import Claim, Finding, Scale, draws
from ..task import Suite
from ..train import fit
from .substrate import points, specialists

__all__ = ["run"]

RANK = 4
ROUTER = {"examples": 400, "steps": 300}
SHARED = "shared expert alone (task arithmetic)"


def _twin(seed: int, rank: int, shared: Weights, like: TwinMerging | None = None) -> TwinMerging:
    """A twin; with the router of `like`, whose shared expert must be the same, or its own."""
    suite, base, experts = specialists(seed)
    twin = TwinMerging(base, base.backbone.state_dict(), experts, shared=shared, rank=rank)
    if like is not None:
        twin.router = like.router
        return twin
    train, validation = ({name: task.split(split) for name, task in suite.items()} for split in ("train", "validation"))
    twin.fit_router(train, validation, seed=seed, **ROUTER)  # type: ignore[arg-type]
    return twin


def _oracle(twin: TwinMerging, task: str) -> Tensor:
    return torch.eye(len(twin.tasks))[twin.tasks.index(task)]


def _accuracy(suite: Suite, answer: object) -> float:
    """Mean accuracy on test in percent."""
    return 100 * mean(score(answer, suite))  # type: ignore[arg-type]


def _own(base: MultiTaskModel, experts: dict[str, Weights], suite: Suite) -> dict[str, float]:
    return {task: points(base, experts[task], suite.only([task])) for task in suite}


def _draw(seed: int) -> dict[str, float]:
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    shared = dict(task_arithmetic(start, experts, scale=0.3))
    twin = _twin(seed, RANK, shared)
    one, full = _twin(seed, 1, shared, twin), _twin(seed, 256, shared, twin)
    on_base = _twin(seed, RANK, start)
    even = torch.full((len(suite),), 1 / len(suite))
    own = _own(base, experts, suite)
    joint = fit(copy.deepcopy(base), suite, steps=120 * len(suite), lr=3e-4, seed=seed)
    routes = {task: twin.route(suite[task].test.inputs) for task in suite}  # type: ignore[attr-defined]

    def hard(inputs: Tensor, task: str) -> Tensor:
        mixture = torch.nn.functional.one_hot(twin.route(inputs).argmax(1), len(suite)).float()
        return full(inputs, task, mixture=mixture)

    reached = score(twin, suite)
    whole = sum(value.nbytes for expert in experts.values() for value in expert.values())
    return {
        "base": points(base, start, suite),
        "averaging": points(base, average(experts), suite),
        "TIES": points(base, ties(start, experts), suite),
        "DARE": points(base, dare(start, experts, seed=seed), suite),
        SHARED: points(base, shared, suite),
        "static mixture, rank 4": _accuracy(suite, lambda x, task: twin(x, task, mixture=even)),
        "Twin, rank 1": _accuracy(suite, one),
        "Twin, rank 4": 100 * mean(reached),
        "Twin, full rank": _accuracy(suite, full),
        "Twin, rank 4, parts on the base": _accuracy(suite, on_base),
        "Twin, rank 4, router permuted": _accuracy(suite, lambda x, t: twin(x, t, mixture=twin.route(x).roll(1, 1))),
        "Twin, rank 4, true task": _accuracy(suite, lambda x, t: twin(x, t, mixture=_oracle(twin, t))),
        "Twin, rank 4, no task given": _accuracy(suite, lambda x, _: twin(x)),
        "hard routing to whole experts": _accuracy(suite, hard),
        "joint training": _accuracy(suite, joint),
        "experts": fmean(own.values()),
        "rank 4, percent of experts": fmean(100 * 100 * reached[task] / own[task] for task in suite),
        "router accuracy": fmean(100 * (routes[t].argmax(1) == k).double().mean().item() for k, t in enumerate(suite)),
        "bytes, percent of experts": 100 * twin.nbytes / whole,
    }  # fmt: skip


def run(scale: Scale, seed: int) -> Finding:
    """Mean accuracies in percent over the tasks' test splits; claims by the worst draw."""
    table = {draw: _draw(draw) for draw in draws(scale, seed)}

    def least(second: str, first: str = "Twin, rank 4") -> float:
        """Smallest difference between two models over draws."""
        return min(row[first] - row[second] for row in table.values())

    kept = min(row["rank 4, percent of experts"] for row in table.values())
    stored = max(row["bytes, percent of experts"] for row in table.values())
    merges = min(least(name) for name in ("averaging", "TIES", "DARE", SHARED))
    claims = [
        Claim.at_least("rank 4 above the static mixture of the same parts", least("static mixture, rank 4"), 10),
        Claim.at_least("rank 4 above the shared expert alone", least(SHARED), 14),
        Claim.at_least("rank 4 above averaging, TIES, DARE and task arithmetic", merges, 10),
        Claim.at_least("rank 4 above rank 1", least("Twin, rank 1"), -1),
        Claim.at_least("full rank above rank 4", least("Twin, rank 4", "Twin, full rank"), -1),
        Claim.at_least(
            "shared expert alone above a permuted router", least("Twin, rank 4, router permuted", SHARED), 0
        ),
        Claim.at_least(
            "parts on the shared expert above parts on the base", least("Twin, rank 4, parts on the base"), 0
        ),
        Claim.at_least("rank 4 keeps of the experts' accuracy", kept, 90, "%"),
        Claim.at_most("rank 4 stores of the experts' bytes", stored, 50, "%"),
    ]
    rows = [{"draw": draw} | {name: round(value, 2) for name, value in row.items()} for draw, row in table.items()]
    return Finding(claims, {"accuracy": rows})
