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

Cost: one read of K + 1 models for averaging, task arithmetic, DARE; one more for Breadcrumbs; two more
for TIES (an exact radix select of the k-th magnitude), in memory that does not depend on the model.

Sources: model soups (Wortsman et al. 2022, arXiv 2203.05482); task arithmetic (Ilharco et al. 2023,
arXiv 2212.04089); TIES (Yadav et al. 2023, arXiv 2306.01708); DARE (Yu et al. 2024, arXiv 2311.03099);
Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795). Departures: TIES keeps the k largest entries
(its reference code keeps k + 1, and everything when many entries are zero); entries that tie with the
k-th are all kept; `density` is a share, never a percentage.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint import Weights
from ..errors import InputError
from .engine import Aligned, Block, Linear, Merge, Rule

__all__ = ["Ties", "analogy", "average", "breadcrumbs", "dare", "greedy_soup", "negate", "task_arithmetic", "ties"]


def average(experts: Mapping[str, Weights], *, weights: Sequence[float] | None = None) -> Merge:
    """Weighted average of the experts: a uniform soup by default.

    Args:
        experts: name -> weights.
        weights: K numbers, not negative, not all zero; divided by their sum. Default: equal.

    >>> merged = average({"a": {"w": torch.zeros(2)}, "b": {"w": torch.ones(2)}})
    >>> merged["w"]
    tensor([0.5000, 0.5000])
    """
    weights = [1.0] * len(experts) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(experts):
        raise InputError(f"average needs one weight for each of {len(experts)} experts, got {len(weights)}")
    if weights and (min(weights) < 0 or sum(weights) <= 0):
        raise InputError(f"average needs weights that are not negative and not all zero, got {weights}")
    return Merge(Aligned(None, experts), Linear([weight / sum(weights) for weight in weights]))


def greedy_soup(
    experts: Mapping[str, Weights], score: Callable[[Weights], float]
) -> tuple[Weights, list[str]]:
    """Average of those experts that do not lower the score, tried from the best down (model soups, recipe 1).

    Args:
        experts: name -> weights of runs on one task.
        score: weights -> validation score, higher is better; ties are accepted.

    Returns:
        The soup and the names in it, in the order they were taken.
    """
    alone = {name: score(weights) for name, weights in experts.items()}
    order = sorted(alone, key=lambda name: -alone[name])
    chosen, best = order[:1], alone[order[0]]
    for name in order[1:]:
        trial = score(average({taken: experts[taken] for taken in [*chosen, name]}))
        if trial >= best:
            chosen, best = [*chosen, name], trial
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
    return Merge(Aligned(base, experts), Linear([float(scale)] * len(experts)))


def negate(base: Weights, expert: Weights, *, scale: float = 1.0) -> Merge:
    """`base - scale * tau`: forget what the expert learned."""
    return Merge(Aligned(base, {"negated": expert}), Linear([-float(scale)]))


def analogy(base: Weights, a: Weights, b: Weights, c: Weights, *, scale: float = 1.0) -> Merge:
    """`base + scale * (tau_c + tau_b - tau_a)`: an expert for D when A is to B as C is to D."""
    models = Aligned(base, {"a": a, "b": b, "c": c})
    return Merge(models, Linear([-float(scale), float(scale), float(scale)]))


def _kth_largest(blocks: Callable[[], Iterator[Tensor]], ranks: Sequence[int]) -> Tensor:
    """Exact magnitudes at the given ranks (1 = largest) of each row of a stream of `(K, n)` blocks.

    Non-negative floats order as their bits: two passes with a histogram of 16 bits each.
    Rank 0 gives infinity. Returns `(K, len(ranks))`.
    """
    high = torch.zeros(0)
    for block in blocks():
        bits = block.abs().float().view(torch.int32) >> 16
        if not high.numel():
            high = torch.zeros(len(block), 1 << 15, dtype=torch.int64)
        for row, counts in zip(bits, high, strict=True):
            counts += torch.bincount(row, minlength=1 << 15).cpu()
    from_top = high.flip(1).cumsum(1)
    wanted = torch.tensor(ranks).expand(len(high), -1)
    bins = (1 << 15) - 1 - torch.searchsorted(from_top, wanted.contiguous())
    above = from_top.gather(1, (1 << 15) - 1 - bins.clamp(min=0)) - high.gather(1, bins.clamp(min=0))
    low = torch.zeros(*wanted.shape, 1 << 16, dtype=torch.int64)
    for block in blocks():
        bits = block.abs().float().view(torch.int32)
        for k, row in enumerate(bits):
            top = row >> 16
            for r in range(len(ranks)):
                low[k, r] += torch.bincount(row[top == bins[k, r]] & 0xFFFF, minlength=1 << 16).cpu()
    rest = (wanted - above).unsqueeze(-1)
    tail = (1 << 16) - 1 - torch.searchsorted(low.flip(2).cumsum(2), rest).squeeze(-1)
    values = ((bins << 16) | tail).to(torch.int32).view(torch.float32)
    return torch.where(wanted == 0, torch.inf, values)


class _Statistic:
    """What TIES needs beyond a block: thresholds, and the fallback sign for sums that are exactly zero."""

    def __init__(self, models: Aligned, rule: Sparse, thresholds: Tensor | None) -> None:
        self.models, self.rule, self.thresholds = models, rule, thresholds
        self._lock, self._majority = threading.Lock(), 0.0

    def majority(self) -> float:
        """Sign of the sum of all elected signs (+1 when even), in one more pass, made only when needed."""
        with self._lock:
            if not self._majority:
                total = 0.0
                for name in self.models.float_names:
                    special = self.rule.tensor_statistic(self.models, name, self)
                    for block, deltas in self.models.deltas(name):
                        total += self.rule.sparsify(block, deltas, self, special).sum(0).sign().sum().item()
                self._majority = -1.0 if total < 0 else 1.0
            return self._majority


@dataclass(frozen=True)
class Sparse(Rule):
    """`base + scale * combine(elect(sparsify(tau)))`."""

    scale: float
    elect: bool = False
    combine: Literal["sum", "mean"] = "sum"

    def sparsify(self, block: Block, deltas: Tensor, statistic: _Statistic, special: Tensor | None) -> Tensor:
        return deltas

    def statistic(self, models: Aligned) -> _Statistic:
        return _Statistic(models, self, None)

    def survivors(self, block: Block) -> Tensor:
        """Sparse task vectors, those that disagree with the elected sign set to zero: `(K, n)`."""
        statistic: _Statistic = block.statistic
        deltas = block.deltas()
        if not torch.isfinite(deltas.sum()):
            statistic.models.explain(block)
        kept = self.sparsify(block, deltas, statistic, block.tensor_statistic)
        if not self.elect:
            return kept
        total = kept.sum(0)
        undecided = (total == 0) & (kept != 0).any(0)
        if undecided.any():
            total[undecided] = statistic.majority()
        return kept.mul_(kept * total > 0)

    def __call__(self, block: Block) -> Tensor:
        kept = self.survivors(block)
        merged = kept.sum(0)
        if self.combine == "mean":
            merged /= (kept != 0).sum(0).clamp_(min=1)
        return merged.mul_(self.scale).add_(block.base)


@dataclass(frozen=True)
class Ties(Sparse):
    density: float = 0.2
    threshold: Literal["global", "tensor"] = "global"

    def statistic(self, models: Aligned) -> _Statistic:
        if self.threshold == "tensor":
            return _Statistic(models, self, None)
        entries = sum(models.signatures[name][1].numel() for name in models.float_names)

        def blocks() -> Iterator[Tensor]:
            return (deltas for name in models.float_names for _, deltas in models.deltas(name))

        return _Statistic(models, self, _kth_largest(blocks, [max(1, round(self.density * entries))]))

    def tensor_statistic(self, models: Aligned, name: str, statistic: _Statistic) -> Tensor | None:
        if self.threshold == "global":
            return statistic.thresholds
        rank = max(1, round(self.density * models.signatures[name][1].numel()))
        return _kth_largest(lambda: (deltas for _, deltas in models.deltas(name)), [rank])

    def sparsify(self, block: Block, deltas: Tensor, statistic: _Statistic, special: Tensor | None) -> Tensor:
        return deltas.mul_(deltas.abs() >= special.to(deltas.device))  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Dare(Sparse):
    drop: float = 0.5
    seed: int = 0

    def sparsify(self, block: Block, deltas: Tensor, statistic: _Statistic, special: Tensor | None) -> Tensor:
        label = f"{self.seed}/{block.name}/{block.start}".encode()
        seed = int.from_bytes(hashlib.blake2b(label, digest_size=8).digest()) >> 1
        draw = torch.rand(deltas.shape, generator=torch.Generator().manual_seed(seed))
        return deltas.mul_((draw >= self.drop).to(deltas)).div_(1 - self.drop)


@dataclass(frozen=True)
class _Breadcrumbs(Sparse):
    density: float = 0.9
    top: float = 0.01

    def tensor_statistic(self, models: Aligned, name: str, statistic: _Statistic) -> Tensor:
        entries = models.signatures[name][1].numel()
        ranks = [round(self.top * entries), max(1, round((self.top + self.density) * entries))]
        return _kth_largest(lambda: (deltas for _, deltas in models.deltas(name)), ranks)

    def sparsify(self, block: Block, deltas: Tensor, statistic: _Statistic, special: Tensor | None) -> Tensor:
        largest, smallest = special.to(deltas.device).unbind(1)  # type: ignore[union-attr]
        size = deltas.abs()
        return deltas.mul_((size < largest[:, None]) & (size >= smallest[:, None]))


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
            (what mergekit does; one pass less).

    >>> experts = {"a": {"w": torch.tensor([3.0, -1.0])}, "b": {"w": torch.tensor([1.0, 2.0])}}
    >>> ties({"w": torch.zeros(2)}, experts, density=1.0)["w"]
    tensor([2., 2.])
    """
    if threshold not in ("global", "tensor"):
        raise InputError(f"threshold is 'global' or 'tensor', got {threshold!r}")
    rule = Ties(float(scale), True, _combiner(combine), _share("density", density), threshold)
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
        seed: every entry's fate depends on the seed, its tensor's name and its place alone.
    """
    rule = _Dare(float(scale), bool(elect), _combiner(combine), _share("drop", drop, low=True, high=False), int(seed))
    return Merge(Aligned(base, experts), rule)


def breadcrumbs(
    base: Weights, experts: Mapping[str, Weights], *, density: float = 0.9, top: float = 0.01, scale: float = 0.3
) -> Merge:
    """Breadcrumbs: drop the largest and the smallest entries of each task vector, tensor by tensor, then add.

    Args:
        base: the weights all experts were fine-tuned from.
        experts: name -> weights.
        density: share of entries kept, (0, 1].
        top: share of the largest entries that are dropped, [0, 1); `density + top` is at most 1.
        scale: factor of the merged task vector.
    """
    density, top = _share("density", density), _share("top", top, low=True, high=False)
    if density + top > 1 + 1e-9:
        raise InputError(f"density + top is at most 1, got {density:g} + {top:g}")
    return Merge(Aligned(base, experts), _Breadcrumbs(float(scale), density=density, top=top))
