"""Ways of training one model on all tasks together that compete in `allrounder run`, beside merging.

All start from the base, keep the heads fixed, and see as many examples as all experts together.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from .contest import Bench, Entrant, Outcome, one_model
from .data.mixture import shares, unmixed
from .multitask import MTAdamW
from .nets.multitask import MultiTaskModel

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
