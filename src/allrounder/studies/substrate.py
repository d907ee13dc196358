"""What the merging studies stand on: the `digits` suite, its base model and its six specialists."""

from __future__ import annotations

import copy
from functools import lru_cache

from ..checkpoint import Weights
from ..data.digits import digits, digits_base, digits_expert
from ..nets.multitask import MultiTaskModel
from ..scoring import mean, score
from ..task import Suite
from ..train import load_weights

__all__ = ["evaluate", "points", "specialists"]


@lru_cache(maxsize=4)
def specialists(seed: int) -> tuple[Suite, MultiTaskModel, dict[str, Weights]]:
    """The suite, the base model with its fixed heads, and the weights of one expert per task (about 2.5 s)."""
    suite = digits(seed=seed)
    base = digits_base(suite, seed=seed)
    experts: dict[str, Weights] = {
        task: digits_expert(base, suite, task, seed=seed).backbone.state_dict() for task in suite
    }
    return suite, base, experts


def evaluate(base: MultiTaskModel, weights: Weights, suite: Suite, split: str = "test") -> dict[str, float]:
    """Accuracy of each task when the base's backbone has these weights; the base is left as it was."""
    model = copy.deepcopy(base)
    load_weights(model.backbone, weights)
    return score(model, suite, split=split)


def points(base: MultiTaskModel, weights: Weights, suite: Suite, split: str = "test") -> float:
    """Mean accuracy over tasks in percent."""
    return 100 * mean(evaluate(base, weights, suite, split))
