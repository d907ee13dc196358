"""The merging methods that compete in `allrounder run`, and the table of all that do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from . import merging
from .architecture_entrants import ARCHITECTURES
from .checkpoint import Weights
from .contest import Bench, Count, Entrant, Outcome, Rate, Scale, Share, Steps, one_model, stored_bytes
from .continual_entrants import IN_SEQUENCE
from .multitask_entrants import TOGETHER
from .nets.multitask import MultiTaskModel
from .task import Batches
from .train import load_weights

__all__ = ["ENTRANTS"]

ENTRANTS: dict[str, Entrant] = {}


def _entrant(name: str, title: str, family: str, paper: str = "") -> Callable:
    def keep(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        ENTRANTS[name] = Entrant(title, family, paper, function)
        return function

    return keep


def _learned(bench: Bench, merge: merging.Merge) -> Outcome:
    outcome = one_model(bench, merge)
    rows = getattr(merge.rule, "coefficients", {})
    if isinstance(rows, dict):
        found = {name: [float(v) for v in row] for name, row in rows.items() if not isinstance(row, Tensor)}
        distinct = {tuple(row) for row in found.values()}
        outcome.coefficients = {"all tensors": list(*distinct)} if len(distinct) == 1 else found
    return outcome


@_entrant("base", "Base, zero-shot", "reference")
def _base(bench: Bench) -> Outcome:
    return Outcome(weights=bench.base, bytes=stored_bytes(bench.base))


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
    return one_model(bench, bench.joint(), "one model trained on all tasks' data in turn")


@_entrant("average", "Averaging", "data-free", "task-arithmetic-baselines")
def _average(bench: Bench) -> Outcome:
    return one_model(bench, merging.average(bench.experts))


@_entrant("task-arithmetic", "Task arithmetic", "data-free", "task-arithmetic-baselines")
def _task_arithmetic(bench: Bench, *, scale: Scale = 0.3) -> Outcome:
    return one_model(bench, merging.task_arithmetic(bench.base, bench.experts, scale=scale), f"scale {scale:g}")


def _search(bench: Bench, make: Callable[[float], Weights], scales: list[float]) -> Outcome:
    found = {scale: bench.validation(make(scale)) for scale in scales}
    best = max(found, key=lambda scale: found[scale])
    edge = ", at the edge of the grid" if best in (min(scales), max(scales)) else ""
    return one_model(bench, make(best), f"scale {best:g}, best of {len(scales)} on validation{edge}")


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
    return one_model(bench, merge, f"density {density:g}, {combine}, scale {scale:g}")


@_entrant("dare", "DARE", "data-free", "task-arithmetic-baselines")
def _dare(
    bench: Bench, *, drop: Annotated[float, Field(ge=0, lt=1)] = 0.5, scale: Scale = 0.3, elect: bool = False
) -> Outcome:
    merge = merging.dare(bench.base, bench.experts, drop=drop, scale=scale, elect=elect, seed=bench.seed)
    return one_model(bench, merge, f"drop {drop:g}, scale {scale:g}")


@_entrant("breadcrumbs", "Breadcrumbs", "data-free", "task-arithmetic-baselines")
def _breadcrumbs(
    bench: Bench, *, density: Share = 0.9, top: Annotated[float, Field(ge=0, lt=1)] = 0.01, scale: Scale = 0.3
) -> Outcome:
    merge = merging.breadcrumbs(bench.base, bench.experts, density=density, top=top, scale=scale)
    return one_model(bench, merge, f"density {density:g}, scale {scale:g}")


@_entrant("slerp", "Spherical average", "data-free", "self-positioning")
def _slerp(bench: Bench, *, scale: Scale = 1.0) -> Outcome:
    return one_model(bench, merging.slerp(bench.base, bench.experts, scale=scale), f"scale {scale:g}")


def _full_expert(bench: Bench, task: str) -> MultiTaskModel:
    model = copy.deepcopy(bench.model)
    load_weights(model.backbone, bench.experts[task])
    return model.eval()


def _batches(bench: Bench, task: str, size: int) -> Batches:
    """Training batches of one task, in the split's own size where it has one (texts, whose outputs are large)."""
    split = bench.suite[task].train
    return Batches(split, getattr(split, "batch_size", size), seed=bench.seed)


@_entrant("fisher", "Fisher merging", "unlabelled", "task-arithmetic-baselines")
def _fisher(bench: Bench, *, examples: Count = 64, labels: Literal["exact", "sampled", "given"] = "sampled") -> Outcome:
    information = {}
    for i, task in enumerate(bench.suite):
        batches = _batches(bench, task, 32)
        information[task] = merging.fisher_information(
            _full_expert(bench, task), batches, task=task, labels=labels, examples=examples, seed=bench.seed
        )
        if bench.progress:
            bench.progress(i + 1, len(bench.suite))
    return one_model(
        bench, merging.fisher(bench.base, bench.experts, information), f"{examples} examples a task, {labels} labels"
    )


@_entrant("regmean", "RegMean", "unlabelled", "task-arithmetic-baselines")
def _regmean(
    bench: Bench, *, examples: Count = 256, off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9
) -> Outcome:
    grams = {}
    for i, task in enumerate(bench.suite):
        batches = _batches(bench, task, 64)
        grams[task] = merging.gram_matrices(_full_expert(bench, task), batches, task=task, examples=examples)
        if bench.progress:
            bench.progress(i + 1, len(bench.suite))
    merge = merging.regmean(bench.experts, grams, off_diagonal=off_diagonal)
    return one_model(bench, merge, f"{examples} inputs a task, off-diagonal {off_diagonal:g}")


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
            bench.with_weights(bench.settled(archive.restore(task), [task]))
            loaded = task
        return bench._work(inputs, task)

    low, high = min(archive.thresholds.values()), max(archive.thresholds.values())
    running = {name: value for name, value in bench.base.items() if name.endswith(("running_mean", "running_var"))}
    size = archive.nbytes + len(bench.experts) * stored_bytes(running)  # settled for each task
    return Outcome(answer=answer, bytes=size, note=f"thresholds {low:g} to {high:g}, chosen on validation")


@_entrant("twin-merging", "Twin-Merging", "chooses per input", "twin-merging")
def _twin_merging(
    bench: Bench, *, rank_ratio: Share = 0.1, steps: Steps = 300, scale: Scale = 0.3, router_examples: Count = 400
) -> Outcome:
    shared_expert = bench.settled(merging.task_arithmetic(bench.base, bench.experts, scale=scale))
    twin = merging.TwinMerging(bench.model, bench.base, bench.experts, shared=shared_expert, rank_ratio=rank_ratio)
    twin.fit_router(
        {name: task.train for name, task in bench.suite.items()},
        {name: task.validation for name, task in bench.suite.items()},
        examples=router_examples, steps=steps, seed=bench.seed, progress=bench.progress,
    )  # fmt: skip
    return Outcome(answer=lambda inputs, task: twin(inputs, task), bytes=twin.nbytes, note=f"rank ratio {rank_ratio:g}")


ENTRANTS |= TOGETHER | ARCHITECTURES | IN_SEQUENCE
