"""The methods that compete in `allrounder run`, each as a function of what a method may use.

Rules of the contest: a method learns on the train splits, chooses on validation, and never sees test.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from . import merging
from .checkpoint import Weights, tied
from .nets.multitask import MultiTaskModel
from .saving import signature
from .scoring import mean, score
from .task import Batches, Suite
from .train import load_weights

__all__ = ["ENTRANTS", "Bench", "Entrant", "Outcome", "stored_bytes"]

Share = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[int, Field(ge=0, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Scale = Annotated[float, Field(ge=-10, le=10)]
Progress = Callable[[int, int], None] | None


def stored_bytes(weights: Weights) -> int:
    """Bytes of the distinct tensors."""
    second = tied(weights)
    signatures = [signature(weights, name) for name in weights if name not in second]
    return sum(dtype.itemsize * prod(shape) for dtype, shape in signatures)


@dataclass
class Bench:
    """What a method may use.

    Args:
        suite: the tasks.
        model: the base model with its heads, on the device to work on.
        base: the weights of its backbone.
        experts: task -> weights of that task's specialist.
        joint: trains a copy of the model on all tasks together; takes a function from that copy to further
            arguments of `fit` (`sampler`, `update`, `optimiser`).
        seed: of everything random.
        progress: called with (steps done, steps).
    """

    suite: Suite
    model: MultiTaskModel
    base: Weights
    experts: Mapping[str, Weights]
    joint: Callable[..., Weights]
    seed: int
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

    def validation(self, weights: Weights, tasks: list[str] | None = None) -> float:
        """Mean validation score over tasks."""
        suite = self.suite if tasks is None else self.suite.only(tasks)
        return mean(score(self.with_weights(weights), suite, split="validation"))

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
    """

    weights: Weights | None = None
    answer: Callable[[Any, str], Tensor] | None = None
    bytes: int = 0
    note: str = ""
    coefficients: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entrant:
    """One line of the contest."""

    title: str
    family: str
    paper: str
    enter: Callable[..., Outcome]


ENTRANTS: dict[str, Entrant] = {}


def _entrant(name: str, title: str, family: str, paper: str = "") -> Callable:
    def keep(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        ENTRANTS[name] = Entrant(title, family, paper, function)
        return function

    return keep


def _one(bench: Bench, weights: Weights, note: str = "") -> Outcome:
    return Outcome(weights=weights, bytes=stored_bytes(bench.base), note=note)


def _learned(bench: Bench, merge: merging.Merge) -> Outcome:
    outcome = _one(bench, merge)
    rows = getattr(merge.rule, "coefficients", {})
    if isinstance(rows, dict):
        found = {name: [float(v) for v in row] for name, row in rows.items() if not isinstance(row, Tensor)}
        distinct = {tuple(row) for row in found.values()}
        outcome.coefficients = {"all tensors": list(*distinct)} if len(distinct) == 1 else found
    return outcome


@_entrant("base", "Base, zero-shot", "reference")
def _base(bench: Bench) -> Outcome:
    return _one(bench, bench.base)


@_entrant("experts", "Each task's own expert", "reference")
def _experts(bench: Bench) -> Outcome:
    loaded = ""

    def answer(inputs: Any, task: str) -> Tensor:
        nonlocal loaded
        if task != loaded:
            bench.with_weights(bench.experts[task])
            loaded = task
        return bench._work(inputs, task)

    return Outcome(answer=answer, bytes=sum(stored_bytes(expert) for expert in bench.experts.values()))


@_entrant("joint", "Joint training on all tasks", "training")
def _joint(bench: Bench) -> Outcome:
    return _one(bench, bench.joint(), "one model trained on all tasks' data in turn")


@_entrant("average", "Averaging", "data-free", "task-arithmetic-baselines")
def _average(bench: Bench) -> Outcome:
    return _one(bench, merging.average(bench.experts))


@_entrant("task-arithmetic", "Task arithmetic", "data-free", "task-arithmetic-baselines")
def _task_arithmetic(bench: Bench, *, scale: Scale = 0.3) -> Outcome:
    return _one(bench, merging.task_arithmetic(bench.base, bench.experts, scale=scale), f"scale {scale:g}")


def _search(bench: Bench, make: Callable[[float], Weights], scales: list[float]) -> Outcome:
    found = {scale: bench.validation(make(scale)) for scale in scales}
    best = max(found, key=lambda scale: found[scale])
    edge = ", at the edge of the grid" if best in (min(scales), max(scales)) else ""
    return _one(bench, make(best), f"scale {best:g}, best of {len(scales)} on validation{edge}")


Grid = Annotated[list[Scale], Field(min_length=1, max_length=100)]
TENTHS = [round(0.1 * i, 1) for i in range(1, 11)]


@_entrant("task-arithmetic-search", "Task arithmetic, searched", "labelled", "task-arithmetic-baselines")
def _task_arithmetic_search(bench: Bench, *, scales: Grid = TENTHS) -> Outcome:
    return _search(bench, lambda scale: merging.task_arithmetic(bench.base, bench.experts, scale=scale), scales)


@_entrant("ties", "TIES", "data-free", "task-arithmetic-baselines")
def _ties(
    bench: Bench,
    *,
    density: Share = 0.2,
    scale: Scale = 1.0,
    combine: Literal["mean", "sum"] = "mean",
    threshold: Literal["global", "tensor"] = "global",
) -> Outcome:
    merge = merging.ties(bench.base, bench.experts, density=density, scale=scale, combine=combine, threshold=threshold)
    return _one(bench, merge, f"density {density:g}, {combine}, scale {scale:g}")


@_entrant("dare", "DARE", "data-free", "task-arithmetic-baselines")
def _dare(
    bench: Bench, *, drop: Annotated[float, Field(ge=0, lt=1)] = 0.5, scale: Scale = 0.3, elect: bool = False
) -> Outcome:
    merge = merging.dare(bench.base, bench.experts, drop=drop, scale=scale, elect=elect, seed=bench.seed)
    return _one(bench, merge, f"drop {drop:g}, scale {scale:g}")


@_entrant("breadcrumbs", "Breadcrumbs", "data-free", "task-arithmetic-baselines")
def _breadcrumbs(
    bench: Bench, *, density: Share = 0.9, top: Annotated[float, Field(ge=0, lt=1)] = 0.01, scale: Scale = 0.3
) -> Outcome:
    merge = merging.breadcrumbs(bench.base, bench.experts, density=density, top=top, scale=scale)
    return _one(bench, merge, f"density {density:g}, scale {scale:g}")


@_entrant("slerp", "Spherical average", "data-free", "self-positioning")
def _slerp(bench: Bench, *, scale: Scale = 1.0) -> Outcome:
    return _one(bench, merging.slerp(bench.base, bench.experts, scale=scale), f"scale {scale:g}")


def _full_expert(bench: Bench, task: str) -> MultiTaskModel:
    model = copy.deepcopy(bench.model)
    load_weights(model.backbone, bench.experts[task])
    return model.eval()


@_entrant("fisher", "Fisher merging", "unlabelled", "task-arithmetic-baselines")
def _fisher(bench: Bench, *, examples: Count = 64, labels: Literal["exact", "sampled", "given"] = "sampled") -> Outcome:
    information = {}
    for i, task in enumerate(bench.suite):
        batches = Batches(bench.suite[task].train, 32, seed=bench.seed)
        information[task] = merging.fisher_information(
            _full_expert(bench, task), batches, task=task, labels=labels, examples=examples, seed=bench.seed
        )
        if bench.progress:
            bench.progress(i + 1, len(bench.suite))
    return _one(
        bench, merging.fisher(bench.base, bench.experts, information), f"{examples} examples a task, {labels} labels"
    )


@_entrant("regmean", "RegMean", "unlabelled", "task-arithmetic-baselines")
def _regmean(
    bench: Bench, *, examples: Count = 256, off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9
) -> Outcome:
    grams = {}
    for i, task in enumerate(bench.suite):
        batches = Batches(bench.suite[task].train, 64, seed=bench.seed)
        grams[task] = merging.gram_matrices(_full_expert(bench, task), batches, task=task, examples=examples)
        if bench.progress:
            bench.progress(i + 1, len(bench.suite))
    merge = merging.regmean(bench.experts, grams, off_diagonal=off_diagonal)
    return _one(bench, merge, f"{examples} inputs a task, off-diagonal {off_diagonal:g}")


def _adamerging(bench: Bench, steps: int, lr: float, batch_size: int, **options: Any) -> Outcome:
    return _learned(
        bench,
        merging.adamerging(
            bench.model, bench.base, bench.experts, bench.train_batches(batch_size),
            steps=steps, lr=lr, progress=bench.progress, **options,
        ),
    )  # fmt: skip


@_entrant("adamerging", "AdaMerging, layer-wise", "unlabelled", "adamerging")
def _adamerging_layer(bench: Bench, *, steps: Steps = 200, lr: Rate = 1e-2, batch_size: Count = 32) -> Outcome:
    return _adamerging(bench, steps, lr, batch_size)


@_entrant("adamerging-task", "AdaMerging, task-wise", "unlabelled", "adamerging")
def _adamerging_task(bench: Bench, *, steps: Steps = 200, lr: Rate = 1e-2, batch_size: Count = 32) -> Outcome:
    return _adamerging(bench, steps, lr, batch_size, per="model")


@_entrant("adamerging-plus", "AdaMerging++, layer-wise", "unlabelled", "adamerging")
def _adamerging_plus(
    bench: Bench, *, steps: Steps = 200, lr: Rate = 1e-2, batch_size: Count = 32, density: Share = 0.2
) -> Outcome:
    return _adamerging(bench, steps, lr, batch_size, plus=True, density=density)


@_entrant("atlas", "aTLAS", "labelled", "atlas")
def _atlas(bench: Bench, *, steps: Steps = 200, lr: Rate = 1e-2, batch_size: Count = 32) -> Outcome:
    losses = {name: task.loss for name, task in bench.suite.items()}
    merge = merging.atlas(
        bench.model, bench.base, bench.experts, bench.train_batches(batch_size),
        loss=losses, steps=steps, lr=lr, seed=bench.seed, progress=bench.progress,
    )  # fmt: skip
    return _learned(bench, merge)


@_entrant("self-positioning", "Self-Positioning", "labelled", "self-positioning")
def _self_positioning(
    bench: Bench,
    *,
    steps: Steps = 120,
    lr: Rate = 5e-2,
    batch_size: Count = 16,
    mu: Annotated[float, Field(ge=0)] = 0.01,
) -> Outcome:
    losses = {name: task.loss for name, task in bench.suite.items()}
    merge = merging.self_positioning(
        bench.model, bench.base, bench.experts, bench.train_batches(batch_size),
        loss=losses, steps=steps, lr=lr, mu=mu, seed=bench.seed, progress=bench.progress,
    )  # fmt: skip
    return _learned(bench, merge)


@_entrant("consensus", "Consensus task arithmetic", "labelled", "tall-masks")
def _consensus(bench: Bench, *, threshold: Share = 0.4, at_least: Count = 2, scales: Grid = TENTHS) -> Outcome:
    def make(scale: float) -> Weights:
        needed = min(at_least, len(bench.experts))
        return merging.consensus(bench.base, bench.experts, threshold=threshold, at_least=needed, scale=scale)

    return _search(bench, make, scales)


@_entrant("tall-masks", "TALL-masks", "keeps every task", "tall-masks")
def _tall_masks(bench: Bench) -> Outcome:
    def rate(weights: Weights, task: str) -> float:
        return bench.validation(weights, [task])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a best threshold at the grid's edge: the note shows it
        archive = merging.tall_masks.compress(bench.base, bench.experts, score=rate)
    loaded = ""

    def answer(inputs: Any, task: str) -> Tensor:
        nonlocal loaded
        if task != loaded:
            bench.with_weights(archive.restore(task))
            loaded = task
        return bench._work(inputs, task)

    low, high = min(archive.thresholds.values()), max(archive.thresholds.values())
    return Outcome(answer=answer, bytes=archive.nbytes, note=f"thresholds {low:g} to {high:g}, chosen on validation")


@_entrant("twin-merging", "Twin-Merging", "chooses per input", "twin-merging")
def _twin_merging(
    bench: Bench, *, rank_ratio: Share = 0.1, steps: Steps = 300, scale: Scale = 0.3, router_examples: Count = 400
) -> Outcome:
    shared_expert = merging.task_arithmetic(bench.base, bench.experts, scale=scale)
    twin = merging.TwinMerging(bench.model, bench.base, bench.experts, shared=shared_expert, rank_ratio=rank_ratio)
    twin.fit_router(
        {name: task.train for name, task in bench.suite.items()},
        {name: task.validation for name, task in bench.suite.items()},
        examples=router_examples, steps=steps, seed=bench.seed, progress=bench.progress,
    )  # fmt: skip
    return Outcome(answer=lambda inputs, task: twin(inputs, task), bytes=twin.nbytes, note=f"rank ratio {rank_ratio:g}")
