"""Merge rules that need no data: averaging, task arithmetic, TIES, DARE, Breadcrumbs.

With `tau_k = expert_k - base`, every sparse rule here is one row of a table:

| rule | sparsify | elect signs | combine |
|---|---|---|---|
| task arithmetic | - | no | sum |
| TIES | largest `density` of all entries of an expert | yes | mean (or sum) |
| DARE | drop at random, rescale by 1 / (1 - drop) | no (yes: DARE-TIES) | sum |
| Breadcrumbs | drop the smallest and the largest, tensor by tensor | no | sum |

and the result is `base + scale * combined`. Each function returns lazy weights (`Merge`): nothing is
computed before it is read, and `save` writes them block by block.

Cost: one read of K + 1 models for averaging, task arithmetic, DARE; two more for TIES and Breadcrumbs (an
exact radix select of the k-th magnitude); one more where votes are even, which in 16-bit checkpoints they
often are. Memory does not depend on the model.

Sources: model soups (Wortsman et al. 2022, arXiv 2203.05482); task arithmetic (Ilharco et al. 2023,
arXiv 2212.04089); TIES (Yadav et al. 2023, arXiv 2306.01708); DARE (Yu et al. 2024, arXiv 2311.03099);
Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795). Departures: TIES keeps the k largest entries,
k = round(density n), at least 1 (its reference code keeps k + 1, and everything when many entries are zero);
entries that tie with the last one kept are all kept, and magnitudes are compared in float32; an even vote on
all entries counts as +1; `density` is a share, never a percentage.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint import Weights
from ..errors import InputError
from .engine import PIECE, Aligned, Block, Linear, Merge, Rule
from .radix_select import kth_largest

__all__ = ["Ties", "analogy", "average", "breadcrumbs", "dare", "greedy_soup", "negate", "task_arithmetic", "ties"]

DRAWS = 1 << 16  # entries that one random stream decides on; a property of results, never to be changed


def average(experts: Mapping[str, Weights], *, weights: Sequence[float] | None = None) -> Merge:
    """Weighted average of the experts: a uniform soup by default.

    Args:
        experts: name -> weights.
        weights: K numbers, not negative, not all zero; divided by their sum. Default: equal.

    >>> merged = average({"a": {"w": torch.zeros(2)}, "b": {"w": torch.ones(2)}})
    >>> merged["w"]
    tensor([0.5000, 0.5000])
    """
    models = Aligned(None, experts)
    weights = [1.0] * len(experts) if weights is None else [_number("a weight", weight) for weight in weights]
    if len(weights) != len(experts):
        raise InputError(f"average needs one weight for each of {len(experts)} experts, got {len(weights)}")
    if min(weights) < 0 or sum(weights) <= 0:
        raise InputError(f"average needs weights that are not negative and not all zero, got {weights}")
    return Merge(models, Linear([weight / sum(weights) for weight in weights]))


def greedy_soup(experts: Mapping[str, Weights], score: Callable[[Weights], float]) -> tuple[Weights, list[str]]:
    """Average of those experts that do not lower the score, tried from the best down (model soups, recipe 1).

    Args:
        experts: name -> weights of runs on one task.
        score: weights -> validation score, higher is better; ties are accepted. Called 2 K - 1 times.

    Returns:
        The soup and the names in it, in the order they were taken.

    Raises:
        InputError: no experts, or a score that is NaN.
    """
    if not experts:
        raise InputError("a soup needs at least one expert, got none")

    def scored(weights: Weights, names: list[str]) -> float:
        value = float(score(weights))
        if math.isnan(value):
            raise InputError(f"the score of {' + '.join(names)} is NaN, which cannot be compared")
        return value

    alone = {name: scored(weights, [name]) for name, weights in experts.items()}
    order = sorted(alone, key=lambda name: -alone[name])
    chosen, best = order[:1], alone[order[0]]
    for name in order[1:]:
        trial = [*chosen, name]
        value = scored(average({taken: experts[taken] for taken in trial}), trial)
        if value >= best:
            chosen, best = trial, value
    return average({name: experts[name] for name in chosen}), chosen


def task_arithmetic(base: Weights, experts: Mapping[str, Weights], *, scale: float = 0.3) -> Merge:
    """`base + scale * sum_k tau_k`.

    Args:
        base: the weights all experts were fine-tuned from.
        experts: name -> weights.
        scale: one factor for all task vectors; 0.3 is the papers' default for 8 tasks, 1 / K is averaging.

    >>> task_arithmetic({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, scale=0.5)["w"]
    tensor([1.])
    """
    return Merge(Aligned(base, experts), Linear([_number("scale", scale)] * len(experts)))


def negate(base: Weights, expert: Weights, *, scale: float = 1.0) -> Merge:
    """`base - scale * tau`: forget what the expert learned.

    Args:
        base: the weights the expert was fine-tuned from.
        expert: the expert of the task to forget.
        scale: how far to go. Paper: the one with the largest drop on the task that leaves the accuracy on control
            data at 95% of the base's or more, chosen on validation.
    """
    return Merge(Aligned(base, {"negated": expert}), Linear([-_number("scale", scale)]))


def analogy(base: Weights, a: Weights, b: Weights, c: Weights, *, scale: float = 1.0) -> Merge:
    """`base + scale * (tau_c + tau_b - tau_a)`: an expert for D when A is to B as C is to D.

    Args:
        base: the weights the three experts were fine-tuned from.
        a, b, c: the experts.
        scale: factor of the combined task vector.
    """
    scale = _number("scale", scale)
    return Merge(Aligned(base, {"a": a, "b": b, "c": c}), Linear([-scale, scale, scale]))


class _Statistic:
    """What a sparse rule knows beyond a block: thresholds, and a sign for entries whose vote is even."""

    def __init__(self, models: Aligned, rule: Sparse, thresholds: Tensor | None = None) -> None:
        self.models, self.rule, self.thresholds = models, rule, thresholds
        self.of_tensor: dict[str, Tensor] = {}
        self._lock, self._majority = threading.Lock(), 0.0

    def magnitudes(self, name: str, ranks: Sequence[int]) -> Tensor:
        """`kth_largest` of one tensor, found once."""
        if name not in self.of_tensor:
            self.of_tensor[name] = kth_largest(self.models, [name], ranks)
        return self.of_tensor[name]

    def majority(self) -> float:
        """Sign of the sum of all elected signs (+1 when even), in one more pass, made only when needed."""
        with self._lock:
            if not self._majority:
                total = 0.0
                for name in self.models.float_names:
                    special = self.rule.tensor_statistic(self.models, name, self)
                    for block in self.models.blocks(name, size=PIECE, statistic=self, tensor_statistic=special):
                        total += self.rule.sparsify(block).sum(0).sign_().sum().item()
                self._majority = -1.0 if total < 0 else 1.0
            return self._majority


@dataclass(frozen=True)
class Sparse(Rule):
    """`base + scale * combine(elect(sparsify(tau)))`."""

    scale: float
    elect: bool = False
    combine: Literal["sum", "mean"] = "sum"

    def statistic(self, models: Aligned) -> _Statistic:
        return _Statistic(models, self)

    def sparsify(self, block: Block) -> Tensor:
        """Task vectors with what the rule drops set to zero: `(K, n)`, a new tensor."""
        return block.deltas()

    def survivors(self, block: Block) -> Tensor:
        """Sparse task vectors; with `elect`, entries against the elected sign are zero too: `(K, n)`, a new tensor."""
        kept = self.sparsify(block)
        if not self.elect:
            return kept
        signs = kept.sum(0).sign_()
        even = 1 - signs.abs()  # numbers and no conditions: several times faster
        if (even * kept.amax(0)).amax() > 0:
            signs.add_(even, alpha=block.statistic.majority())
        return kept.mul_(signs).relu_().mul_(signs)

    def __call__(self, block: Block) -> Tensor:
        kept = self.survivors(block)
        merged = kept.sum(0)
        if self.combine == "mean":
            merged.div_(kept.sign_().abs_().sum(0).clamp_(min=1))
        return merged.mul_(self.scale).add_(block.base)


def _trim(deltas: Tensor, least: Tensor) -> Tensor:
    """Set entries with a magnitude below their row's least to zero, in place: `(K, n)`, `(K,)`."""
    below = torch.nextafter(least, torch.tensor(-1.0)).tolist()
    for row, value in zip(deltas, below, strict=True):
        torch.hardshrink(row, value, out=row)
    return deltas


@dataclass(frozen=True)
class Ties(Sparse):
    density: float = 0.2
    threshold: Literal["global", "tensor"] = "global"

    def _rank(self, entries: int) -> list[int]:
        return [max(1, round(self.density * entries))]

    def statistic(self, models: Aligned) -> _Statistic:
        if self.threshold == "tensor":
            return _Statistic(models, self)
        entries = sum(models.signatures[name][1].numel() for name in models.float_names)
        return _Statistic(models, self, kth_largest(models, models.float_names, self._rank(entries)))

    def tensor_statistic(self, models: Aligned, name: str, statistic: _Statistic) -> Tensor:
        if statistic.thresholds is not None:
            return statistic.thresholds
        return statistic.magnitudes(name, self._rank(models.signatures[name][1].numel()))

    def sparsify(self, block: Block) -> Tensor:
        return _trim(block.deltas(), block.tensor_statistic[:, 0])


@dataclass(frozen=True)
class _Dare(Sparse):
    drop: float = 0.5
    seed: int = 0

    def sparsify(self, block: Block) -> Tensor:
        deltas, models = block.deltas(), block.statistic.models
        entries = models.signatures[block.name][1].numel()
        for row, label in zip(deltas, models.experts, strict=True):
            for start in range(block.start - block.start % DRAWS, block.stop, DRAWS):
                draw = self._draw(label, block.name, start, min(DRAWS, entries - start))
                first, last = max(start, block.start), min(start + DRAWS, block.stop)
                kept = draw[first - start : last - start] >= self.drop
                row[first - block.start : last - block.start].mul_(kept.to(row))
        return deltas.div_(1 - self.drop)

    def _draw(self, label: str, name: str, start: int, count: int) -> Tensor:
        text = f"{self.seed}/{start}/{label}/{name}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1
        return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class _Breadcrumbs(Sparse):
    density: float = 0.9
    top: float = 0.01

    def tensor_statistic(self, models: Aligned, name: str, statistic: _Statistic) -> Tensor:
        entries = models.signatures[name][1].numel()
        first = min(entries, round(self.top * entries) + 1)
        return statistic.magnitudes(name, [first, max(first, round((self.top + self.density) * entries))])

    def sparsify(self, block: Block) -> Tensor:
        deltas = block.deltas()
        largest, least = block.tensor_statistic.unbind(1)
        for row, value in zip(deltas, largest.tolist(), strict=True):
            row.sub_(torch.hardshrink(row, value))
        return _trim(deltas, least)


def _number(name: str, value: float) -> float:
    """A finite number."""
    if not math.isfinite(value):
        raise InputError(f"{name} is a finite number, got {value}")
    return float(value)


def _share(name: str, value: float, *, low: bool = False, high: bool = True) -> float:
    """A share between 0 and 1; the ends are allowed where `low`, `high` say so."""
    if not (0 < value < 1 or (low and value == 0) or (high and value == 1)):
        ends = f"{'[' if low else '('}0, 1{']' if high else ')'}"
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise InputError(f"{name} is a share in {ends}, got {value:g}{hint}")
    return float(value)


def _combiner(value: str) -> Literal["sum", "mean"]:
    if value not in ("sum", "mean"):
        raise InputError(f"combine is 'sum' or 'mean', got {value!r}")
    return value  # type: ignore[return-value]


def ties(
    base: Weights,
    experts: Mapping[str, Weights],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    combine: Literal["mean", "sum"] = "mean",
    threshold: Literal["global", "tensor"] = "global",
) -> Merge:
    """TIES: trim each task vector, elect a sign for each entry, merge the entries that agree.

    Args:
        base: the weights all experts were fine-tuned from.
        experts: name -> weights.
        density: share of entries kept in each expert, by magnitude, (0, 1]. Paper: 0.2.
        scale: factor of the merged task vector. Paper: near 1 with `mean`, 0.3 with `sum`.
        combine: `mean` over the experts that agree (paper), or their `sum`.
        threshold: one magnitude threshold an expert over all tensors (`global`, paper), or one for each `tensor`
            (what mergekit does).

    >>> experts = {"a": {"w": torch.tensor([3.0, -1.0])}, "b": {"w": torch.tensor([1.0, 2.0])}}
    >>> ties({"w": torch.zeros(2)}, experts, density=1.0)["w"]
    tensor([2., 2.])
    """
    if threshold not in ("global", "tensor"):
        raise InputError(f"threshold is 'global' or 'tensor', got {threshold!r}")
    rule = Ties(_number("scale", scale), True, _combiner(combine), _share("density", density), threshold)
    return Merge(Aligned(base, experts), rule)


def dare(
    base: Weights,
    experts: Mapping[str, Weights],
    *,
    drop: float = 0.5,
    scale: float = 0.3,
    elect: bool = False,
    combine: Literal["sum", "mean"] = "sum",
    seed: int = 0,
) -> Merge:
    """DARE: drop entries of each task vector at random, rescale the rest, then task arithmetic (or sign election).

    Args:
        base: the weights all experts were fine-tuned from.
        experts: name -> weights.
        drop: probability of dropping an entry, [0, 1). Paper: 0.1 to 0.9. The expectation is unchanged.
        scale: factor of the merged task vector.
        elect: elect signs as TIES does (DARE-TIES).
        combine: `sum`, or `mean` over the experts that have the entry.
        seed: an entry's fate depends on the seed, its expert's and its tensor's name and its place alone.
    """
    drop = _share("drop", drop, low=True, high=False)
    return Merge(
        Aligned(base, experts), _Dare(_number("scale", scale), bool(elect), _combiner(combine), drop, int(seed))
    )


def breadcrumbs(
    base: Weights, experts: Mapping[str, Weights], *, density: float = 0.9, top: float = 0.01, scale: float = 0.3
) -> Merge:
    """Breadcrumbs: drop the largest and the smallest entries of each task vector, tensor by tensor, then add.

    Args:
        base: the weights all experts were fine-tuned from.
        experts: name -> weights.
        density: share of a tensor's entries kept, (0, 1]; at least one entry. Papers: 0.85 to 0.9.
        top: share of the largest entries that are dropped, [0, 1); `density + top` is at most 1. Usual: 0.01.
            Entries that tie with one that is kept are kept.
        scale: factor of the merged task vector.
    """
    density, top = _share("density", density), _share("top", top, low=True, high=False)
    if density + top > 1 + 1e-9:
        raise InputError(f"density + top is at most 1, got {density:g} + {top:g}")
    return Merge(Aligned(base, experts), _Breadcrumbs(_number("scale", scale), density=density, top=top))
