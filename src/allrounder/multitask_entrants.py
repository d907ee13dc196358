"""Ways of training one model on all tasks together that compete in `allrounder run`, beside merging.

All start from the base, keep the heads fixed, and see as many examples as all experts together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from .contest import Bench, Entrant, Outcome, one_model
from .data.mixture import shares, unmixed
from .multitask import SAMMTL, MTAdamW
from .nets.multitask import MultiTaskModel
from .optim import RULES, Aggregate
from .train import Update

__all__ = ["TOGETHER"]

TOGETHER: dict[str, Entrant] = {}


def _mt_adamw(bench: Bench, *, temperature: Annotated[float, Field(gt=0, le=100)] = 1.0) -> Outcome:
    ratios = shares({name: len(task.train) for name, task in bench.suite.items()}, temperature=temperature)  # type: ignore[arg-type]

    def how(model: MultiTaskModel) -> dict:
        return {"optimiser": partial(MTAdamW, shares=ratios), "sampler": unmixed(ratios, seed=bench.seed)}

    return one_model(bench, bench.joint(how), f"one task a step, drawn by size at temperature {temperature:g}")


TOGETHER["multitask/mt-adamw"] = Entrant(
    "Together: MT-AdamW, unmixed", "training", "uni-perceiver-v2", _mt_adamw, default=False
)


def _combined(bench: Bench, make: Callable[[MultiTaskModel, dict[str, Any]], Update], note: str = "") -> Outcome:
    common = {"tasks": list(bench.suite), "seed": bench.seed}
    outcome = bench.joint(lambda model: {"update": make(model, common), "sampler": "all"})
    return one_model(bench, outcome, f"every task in every step{note}")


def _by_rule(rule: str) -> Callable[[Bench], Outcome]:
    return lambda bench: _combined(bench, lambda model, common: Aggregate(model, rule, **common))


def _cagrad(bench: Bench, *, c: Annotated[float, Field(ge=0, lt=1)] = 0.4) -> Outcome:
    return _combined(bench, lambda model, common: Aggregate(model, "cagrad", c=c, **common), f", c {c:g}")


def _sam_mtl(
    bench: Bench,
    *,
    rule: Literal[tuple(RULES)] = "pcgrad",  # type: ignore[valid-type]
    radius: Annotated[float, Field(ge=0, le=100)] = 0.05,
    adaptive: bool = False,
) -> Outcome:
    def make(model: MultiTaskModel, common: dict[str, Any]) -> Update:
        return SAMMTL(model, rule, radius=radius, adaptive=adaptive, **common)

    return _combined(bench, make, f", {rule}, flat regions at radius {radius:g}")


TOGETHER["multitask/sam-mtl"] = Entrant("Together: SAM-MTL", "training", "sam-mtl", _sam_mtl, default=False)

TITLES = {
    "mean": "mean of losses", "sum": "sum of losses", "rlw": "random loss weights", "dwa": "dynamic weight average",
    "uncertainty": "uncertainty weighting", "gradnorm": "GradNorm", "mgda": "MGDA", "pcgrad": "PCGrad",
    "gradvac": "GradVac", "cagrad": "CAGrad", "imtl-g": "IMTL-G", "nash": "Nash-MTL", "aligned": "Aligned-MTL",
    "upgrad": "UPGrad", "graddrop": "GradDrop", "famo": "FAMO",
}  # fmt: skip

for _rule in RULES:
    TOGETHER[f"multitask/{_rule}"] = Entrant(
        f"Together: {TITLES[_rule]}", "training", "mtl-baselines", _cagrad if _rule == "cagrad" else _by_rule(_rule),
        default=False,
    )  # fmt: skip
