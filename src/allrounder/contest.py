"""The contest of `allrounder run`: what a method may use, and what comes out of it.

Rules: a method learns on the train splits, chooses on validation, and never sees test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from .checkpoint import Weights, tied
from .nets.multitask import MultiTaskModel
from .saving import signature
from .scoring import mean, score
from .task import Batches, Suite
from .train import load_weights

__all__ = [
    "Bench", "Count", "Entrant", "Outcome", "Rate", "Scale", "Share", "Steps", "normed", "one_model", "settle",
    "stored_bytes",
]  # fmt: skip

Share = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[int, Field(ge=0, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Scale = Annotated[float, Field(ge=-10, le=10)]
Progress = Callable[[int, int], None] | None
SETTLING = (4, 64)  # batches, and training inputs of each task in one


def stored_bytes(weights: Weights) -> int:
    """Bytes of the distinct tensors."""
    second = tied(weights)
    signatures = [signature(weights, name) for name in weights if name not in second]
    return sum(dtype.itemsize * prod(shape) for dtype, shape in signatures)


def normed(model: nn.Module) -> bool:
    """Whether there is BatchNorm, and so running statistics."""
    return any(isinstance(part, _BatchNorm) for part in model.modules())


def settle(backbone: nn.Module, suite: Suite, seed: int) -> None:
    """Estimate BatchNorm's running statistics anew, in place, on training inputs of the tasks together.

    What a rule makes of the experts' statistics is not what enters the layers of the merged network: the average of
    variances lacks the variance between tasks and what merging takes away (Jordan et al., "REPAIR", 2022, arXiv
    2211.08403; Izmailov et al., SWA, 2018, arXiv 1803.05407), and `base + sum of differences` may be negative. Every
    batch holds inputs of all tasks alike; the mean over batches is kept. Nothing happens without BatchNorm.
    """
    if not normed(backbone):
        return
    batches, size = SETTLING
    each = [Batches(task.train, size, seed=seed + i) for i, task in enumerate(suite.values())]
    inputs = [torch.cat([part for part, _ in together]) for together in islice(zip(*each), batches)]  # type: ignore[misc]
    update_bn(inputs, backbone, next(backbone.parameters()).device)


@dataclass
class Bench:
    """What a method may use.

    Args:
        suite: the tasks.
        model: the base model with its heads, on the device to work on.
        base: the weights of its backbone.
        experts: task -> weights of that task's specialist.
        joint: trains a copy of the model on all tasks together; takes a function from that copy to further
            arguments of `fit` (`sampler`, `update`, `optimiser`, and `model` for a network made of the copy).
        seed: of everything random.
        tuning: how one specialist is fine-tuned: `lr`, `batch_size`, `weight_decay`, and `steps` or `epochs`.
        progress: called with (steps done, steps).
    """

    suite: Suite
    model: MultiTaskModel
    base: Weights
    experts: Mapping[str, Weights]
    joint: Callable[..., Weights]
    seed: int
    tuning: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = None

    def __post_init__(self) -> None:
        self._work = copy.deepcopy(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def with_weights(self, weights: Weights) -> MultiTaskModel:
        """A model with these backbone weights; the same object each time."""
        load_weights(self._work.backbone, weights)
        return self._work

    def settled(self, weights: Weights, tasks: list[str] | None = None) -> Weights:
        """The weights with running statistics of their own, `settle`d on these tasks; as they are without BatchNorm."""
        if not normed(self.model.backbone):
            return weights
        backbone = self.with_weights(weights).backbone
        settle(backbone, self.suite if tasks is None else self.suite.only(tasks), self.seed)
        return {name: value.detach().clone() for name, value in backbone.state_dict().items()}

    def validation(self, weights: Weights, tasks: list[str] | None = None) -> float:
        """Mean validation score over tasks."""
        suite = self.suite if tasks is None else self.suite.only(tasks)
        return mean(score(self.with_weights(self.settled(weights, tasks)), suite, split="validation"))

    def train_batches(self, size: int) -> dict[str, Batches]:
        """Shuffled training batches of each task."""
        return {
            name: Batches(task.train, size, seed=self.seed + i) for i, (name, task) in enumerate(self.suite.items())
        }


@dataclass
class Outcome:
    """What came out: weights for all tasks, or a way to answer each task.

    Args:
        weights: one set of backbone weights, when there is one.
        answer: `(inputs, task) -> outputs`, when there is not.
        bytes: what has to be stored to serve all tasks (heads not counted).
        note: a setting that was chosen, in words.
        coefficients: name -> K numbers, where they were learned.
        matrix: `rows`, `columns` and `values` of validation scores on each task after each, where tasks came in
            sequence.
    """

    weights: Weights | None = None
    answer: Callable[[Any, str], Tensor] | None = None
    bytes: int = 0
    note: str = ""
    coefficients: dict[str, list[float]] = field(default_factory=dict)
    matrix: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entrant:
    """One line of the contest.

    Args:
        title: as the report has it.
        family: what it needs or is: reference, training, in sequence, data-free, unlabelled, labelled, keeps every
            task, chooses per input.
        paper: its slug in the catalogue, if it has one.
        enter: `(bench, **options) -> Outcome`; the options are keyword-only, with types that pydantic can check.
        default: whether it competes when a recipe names no methods.
        suites: those it has a form for; empty for all.
        network: the one of `scripts` and `images` that it has a form for; empty for all.
    """

    title: str
    family: str
    paper: str
    enter: Callable[..., Outcome]
    default: bool = True
    suites: tuple[str, ...] = ()
    network: str = ""


def one_model(bench: Bench, weights: Weights, note: str = "") -> Outcome:
    """The outcome of a method that ends as one set of weights, settled."""
    if normed(bench.model.backbone):
        note = f"{note}; BatchNorm from {prod(SETTLING)} training inputs a task".removeprefix("; ")
    return Outcome(weights=bench.settled(weights), bytes=stored_bytes(bench.base), note=note)
