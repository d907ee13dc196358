"""TALL-masks: every expert kept in one merged model and one bit per weight and task; Consensus merging from those bits.

`theta_t ~ theta_0 + m_t tau_MT` with `tau_MT = sum_k tau_k` and `m_t = 1{ |tau_t| > threshold_t |tau_MT - tau_t| }`:
a mask keeps the entries in which the merged vector is nearer to the task's own than zero is (`threshold` 1), or not
much further (smaller thresholds keep more). An entry that no mask keeps is catastrophic, one that a single mask
keeps is selfish; Consensus merging drops both: `theta_0 + scale * 1{ sum_t m_t >= 2 } tau_MT`.

Use the archive when the task of each input is known and K models are too much to store: 2 P b + K P / 8 bytes
instead of K P b (20 float32 experts: an eighth). Use Consensus where one model must serve all and
the experts share directions; where each task lives in weights of its own, task arithmetic is better. One more or one
less expert changes the merged vector and so every mask: make the archive again.

Cost: nothing is computed before it is read. Saving an archive reads K + 1 models twice, block by block (TIES: four
times), in memory that does not depend on the model. Choosing thresholds reads them once per threshold, holds the
merged model, its masks at one threshold and one specialist, and scores K times per threshold. Giving a specialist
back reads two models and one mask, and writes one model.

Paper: Wang, Dimitriadis, Ortiz-Jimenez, Fleuret and Frossard, "Localizing Task Information for Improved Model
Merging and Compression", ICML 2024, arXiv 2405.07813. Departures: the archive holds `theta_0 + tau_MT` in place of
`tau_MT`, as many bytes, so that giving back chooses between two numbers and rounds nothing; the paper's size counts
one padding byte for a task, here it is one for each tensor and task; tensors in which no expert differs from the base
are stored once and without masks. The reference code cannot load the masks that it saves; a widely used copy of it
compares `|theta_0 - tau_t|` in place of `|tau_t|`, so that its masks are nearly all ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint import Weights
from ..errors import InputError
from ..saving import BLOCK
from .archive import Archive, Specialist, open_archive
from .baselines import Sparse, Ties, _share
from .engine import Aligned, Block, Merge, Rule

__all__ = ["Archive", "Consensus", "Specialist", "compress", "consensus", "open_archive"]

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


def _shared(vector: str, density: float, scale: float) -> Sparse:
    """The rule of the vector that all tasks share."""
    if vector not in ("sum", "ties"):
        raise InputError(f"vector is 'sum' or 'ties', got {vector!r}")
    return Sparse(scale) if vector == "sum" else Ties(scale, True, "sum", _share("density", density))


def _localise(rule: Sparse, thresholds: Sequence[float], block: Block) -> tuple[Tensor, Tensor]:
    """The shared vector, unscaled, `(n,)`, and the masks, `(K, n)` bool."""
    kept = rule.survivors(block)
    total = kept.sum(0)
    deltas = block.deltas() if rule.elect else kept
    limits = torch.tensor(thresholds, dtype=deltas.dtype, device=deltas.device).unsqueeze(1)
    return total, deltas.abs() > (total - deltas).abs_().mul_(limits)


def _numbers(what: str, value: float | Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """One threshold a task."""
    if isinstance(value, Mapping):
        other = sorted(set(value) ^ set(tasks))
        if other:
            raise InputError(f"{what} needs one number for each of {', '.join(tasks)}; {other[0]!r} is in one set only")
    values = {task: float(value[task] if isinstance(value, Mapping) else value) for task in tasks}
    for number in values.values():
        if not (number >= 0 and math.isfinite(number)):
            raise InputError(f"{what} is a number >= 0 (the paper's are 0.2 to 0.6), got {number:g}")
    return values


def _pack(bits: Tensor) -> Tensor:
    """Rows of bool `(K, n)` -> rows of bytes `(K, ceil(n / 8))`, lowest bit first."""
    import numpy

    return torch.from_numpy(numpy.packbits(bits.cpu().numpy(), axis=-1, bitorder="little"))


class _Moved(Merge):
    """The merged weights of those tensors in which some expert differs from the base."""

    def __init__(self, models: Aligned, rule: Sparse) -> None:
        super().__init__(models, rule)
        self.tied = {}
        self.names = {name: None for name in models.float_names if self._moved(name)}

    def _moved(self, name: str) -> bool:
        blocks = self.models.blocks(name)
        return any(not torch.equal(expert, block.base) for block in blocks for expert in block.experts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


class _Masks(Mapping[str, Tensor]):
    """Packed masks of all tasks, computed when read: for each block of a tensor, one row of bytes a task."""

    def __init__(self, merged: _Moved, thresholds: Sequence[float]) -> None:
        self.merged, self.thresholds = merged, list(thresholds)

    def signature(self, name: str) -> tuple[torch.dtype, torch.Size]:
        entries = self.merged.signature(name)[1].numel()
        return torch.uint8, torch.Size([len(self.thresholds) * math.ceil(entries / 8)])

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        models, rule, statistic = self.merged.models, self.merged.rule, self.merged.statistic()
        assert isinstance(rule, Sparse)
        special = rule.tensor_statistic(models, name, statistic)
        for block in models.blocks(name, size=BLOCK, statistic=statistic, tensor_statistic=special):
            yield _pack(_localise(rule, self.thresholds, block)[1]).view(-1)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.merged:
            raise KeyError(name)
        return torch.cat(list(self.blocks(name, torch.uint8)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.merged)

    def __len__(self) -> int:
        return len(self.merged)

    def __contains__(self, name: object) -> bool:
        return name in self.merged


def compress(
    base: Weights,
    experts: Mapping[str, Weights],
    *,
    threshold: float | Mapping[str, float] = 0.4,
    score: Callable[[Weights, str], float] | None = None,
    grid: Sequence[float] = GRID,
    vector: Literal["sum", "ties"] = "sum",
    density: float = 0.2,
    scale: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Archive:
    """An archive of all experts.

    Args:
        base: the weights all experts were fine-tuned from.
        experts: task -> weights.
        threshold: of the masks, for all tasks or for each; >= 0. 0 keeps every entry that the task changed, 1 is
            nearest to the expert entry by entry, larger ones keep less. Not used with `score`.
        score: (weights of a specialist, task) -> its score on validation, higher is better. With it each task takes the
            best threshold of `grid`; of equal ones, the first.
        grid: thresholds to try. Paper: 0.2, 0.3, 0.4, 0.5, 0.6.
        vector: what the tasks share: the `sum` of the task vectors, or their `ties` sum.
        density: of TIES, (0, 1]. Paper: 0.2.
        scale: factor of the shared vector in the merged weights; masks do not depend on it. Paper: 1.
        progress: called with (scores taken, scores in all).

    Returns:
        The archive. It computes from the experts what is read; `save` it to do without them.

    Warns:
        UserWarning: when a task's best threshold is the grid's smallest or largest.

    Raises:
        InputError: experts that do not fit the base or do not differ from it; a threshold that is negative or missing
            for a task; scores that are not finite.

    >>> experts = {"a": {"w": torch.tensor([2.0, 0.0, 4.0])}, "b": {"w": torch.tensor([1.0, -3.0, -2.0])}}
    >>> archive = compress({"w": torch.zeros(3)}, experts, threshold=1.0)
    >>> archive.restore("a")["w"], archive.restore("b")["w"]
    (tensor([3., 0., 2.]), tensor([ 0., -3.,  0.]))
    """
    models = Aligned(base, experts)
    merged: Weights = _Moved(models, _shared(vector, density, float(scale)))
    source = merged
    if not merged:
        raise InputError("no expert differs from the base, so there is nothing to compress; check the weights given")
    if score is None:
        chosen = _numbers("threshold", threshold, list(experts))
    else:
        merged = dict(source)
        chosen = _search(models.base, source, merged, list(experts), score, list(grid), progress)
    return Archive(models.base, merged, _Masks(source, list(chosen.values())), chosen)


def _search(
    base: Weights,
    source: _Moved,
    merged: Weights,
    tasks: list[str],
    score: Callable[[Weights, str], float],
    grid: list[float],
    progress: Callable[[int, int], None] | None,
) -> dict[str, float]:
    """The best threshold of each task; all tasks at one threshold before the next, to hold one set of masks."""
    if not grid:
        raise InputError("grid is the thresholds to try, at least one; got none")
    found: dict[str, dict[float, float]] = {task: {} for task in tasks}
    for i, threshold in enumerate(grid):
        thresholds = _numbers("threshold", threshold, tasks)
        trial = Archive(base, merged, dict(_Masks(source, list(thresholds.values()))), thresholds)
        for j, task in enumerate(tasks):
            value = float(score(dict(trial.restore(task)), task))
            if not math.isfinite(value):
                raise InputError(f"the score of task {task!r} at threshold {threshold:g} is {value}; it must be finite")
            found[task][threshold] = value
            if progress is not None:
                progress(i * len(tasks) + j + 1, len(grid) * len(tasks))
    best = {task: max(row, key=lambda threshold: row[threshold]) for task, row in found.items()}
    edge = [f"{task} {value:g}" for task, value in best.items() if value in (min(grid), max(grid)) and len(grid) > 2]
    if edge:
        warnings.warn(f"best threshold at the edge of the grid; try a wider one: {', '.join(edge)}", stacklevel=3)
    return best


@dataclass(frozen=True)
class Consensus(Rule):
    """`base + scale * 1{ sum_t m_t >= at_least } * tau_MT`; `at_least` 0 gives the plain merge, K + 1 the base."""

    shared: Sparse
    thresholds: Sequence[float]
    at_least: int
    scale: float

    def statistic(self, models: Aligned) -> Any:
        return self.shared.statistic(models)

    def tensor_statistic(self, models: Aligned, name: str, statistic: Any) -> Any:
        return self.shared.tensor_statistic(models, name, statistic)

    def __call__(self, block: Block) -> Tensor:
        total, masks = _localise(self.shared, self.thresholds, block)
        return total.mul_(masks.sum(0) >= self.at_least).mul_(self.scale).add_(block.base.to(total))


def consensus(
    base: Weights,
    experts: Mapping[str, Weights],
    *,
    threshold: float | Mapping[str, float] = 0.4,
    at_least: int = 2,
    scale: float = 0.3,
    vector: Literal["sum", "ties"] = "sum",
    density: float = 0.2,
) -> Merge:
    """Consensus merging: task arithmetic (or TIES) on the entries that several tasks' masks keep.

    Args:
        base: the weights all experts were fine-tuned from.
        experts: task -> weights.
        threshold: of the masks, for all tasks or for each (`archive.thresholds`); >= 0. Paper: each task's best.
        at_least: masks that must keep an entry, 0 to K. Paper: 2. 1 drops only entries that no mask keeps; 0 drops
            none, the plain merge.
        scale: factor of the merged vector. Paper: the best on validation of 0.1, 0.2, ..., 1.
        vector: `sum` (Consensus task arithmetic) or `ties` (Consensus TIES).
        density: of TIES, (0, 1]. Paper: 0.2.

    Raises:
        InputError: `at_least` above the number of experts, which would give the base; a bad threshold.

    >>> experts = {"a": {"w": torch.tensor([1.0, 1.0])}, "b": {"w": torch.tensor([1.0, 0.0])}}
    >>> consensus({"w": torch.zeros(2)}, experts, scale=0.5)["w"]
    tensor([1., 0.])
    """
    models = Aligned(base, experts)
    if at_least != int(at_least) or not 0 <= at_least <= len(experts):
        count = len(experts)
        raise InputError(f"at_least is how many of {count} masks must keep an entry, 0 to {count}, got {at_least}")
    thresholds = _numbers("threshold", threshold, list(experts))
    rule = Consensus(_shared(vector, density, 1.0), list(thresholds.values()), int(at_least), float(scale))
    return Merge(models, rule)
