"""The engine behind every merge rule: K experts in, one model out, tensor by tensor, block by block.

A `Rule` says how one block of K task vectors becomes one block of the result; `Merge` is the weights
that come out, computed when they are read. Because `Merge` is a mapping like any other, a merge in
memory is `dict(merge)` and a merge of checkpoints that do not fit in memory is `save(merge, folder)`:
the same code, the same result.

A rule has one of three scopes, by what it overrides: *elementwise* (only `__call__`), *per tensor*
(`tensor_statistic`: a threshold, a norm, a solution), *global* (`statistic`: seen once, over all tensors).

Memory: one block (256 KiB in float32) per source for elementwise rules, whatever the size of the model.
Arithmetic is in float32 at least; float64 models are merged in float64.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Weights, tied
from ..errors import InputError
from ..saving import BLOCK, signature

__all__ = ["Aligned", "Block", "Linear", "Merge", "Rule", "working"]

PIECE = 1 << 16  # entries that a rule is given at a time: what it makes of them stays in a core's cache


def working(dtype: torch.dtype) -> torch.dtype:
    """The type that values of this type are merged in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Block:
    """A stretch of one tensor, flattened, in all models.

    Args:
        name: the tensor's name.
        start, stop: where the stretch lies in the flattened tensor.
        base: `(n,)`, the base's values (the first expert's, when the merge has no base).
        experts: K tensors `(n,)`.
        statistic: what the rule's `statistic` gave.
        tensor_statistic: what the rule's `tensor_statistic` gave for this tensor.
    """

    name: str
    start: int
    stop: int
    base: Tensor
    experts: list[Tensor]
    statistic: Any = None
    tensor_statistic: Any = None

    def deltas(self) -> Tensor:
        """Task vectors, expert - base, at least in float32: `(K, n)`, a new tensor."""
        base = self.base.to(working(self.base.dtype))
        deltas = base.new_empty(len(self.experts), len(base))
        for row, expert in zip(deltas, self.experts, strict=True):
            torch.sub(expert.to(base.dtype), base, out=row)
        return deltas


class Rule:
    """How K task vectors become one. `__call__` gives the merged block, `(n,)`, in the working type.

    Sources may not be changed. NaN and infinite values of a source must show in the result, where
    `Merge` finds them, unless a statistic has looked for them before.
    """

    whole = False  # give whole tensors, not blocks
    pieces = 1  # how many times `PIECE` entries a block has; 2 where no stack of K blocks is made

    def statistic(self, models: Aligned) -> Any:
        """Something that needs a pass over all tensors, computed once."""
        return None

    def tensor_statistic(self, models: Aligned, name: str, statistic: Any) -> Any:
        """Something that needs a pass over one tensor."""
        return None

    def __call__(self, block: Block) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how to merge a block")


@dataclass(frozen=True)
class Linear(Rule):
    """`base + sum_k c_k (expert_k - base)`, folded into one pass: `(1 - sum c) base + sum_k c_k expert_k`.

    Args:
        coefficients: K numbers for all tensors, or a mapping from names to K numbers (tensors that
            it lacks keep the base's values).

    Raises:
        InputError: when a block is merged and there are not K numbers.
    """

    coefficients: Any
    pieces = 2

    def __call__(self, block: Block) -> Tensor:
        values = self.coefficients
        if isinstance(values, Mapping):
            if block.name not in values:
                return block.base
            values = values[block.name]
        values = [float(value) for value in values]
        if len(values) != len(block.experts):
            raise InputError(f"{block.name!r} has {len(values)} coefficients for {len(block.experts)} experts")
        work = working(block.base.dtype)
        rest = 1.0 - math.fsum(values)
        if abs(rest) < 1e-12:
            out, terms = block.experts[0].to(work) * values[0], list(zip(values, block.experts, strict=True))[1:]
        else:
            out, terms = block.base.to(work) * rest, zip(values, block.experts, strict=True)
        for value, expert in terms:
            out.add_(expert.to(work), alpha=value)
        return out


class Aligned:
    """A base and K experts that have the same tensors: names, shapes, second names, checked once.

    Args:
        base: the weights all experts were fine-tuned from; `None` for rules that do not need them.
        experts: name -> weights. Integer tensors may be missing from an expert; the base's are used.
            Tensors on another device than the base's are moved to it while they are read.

    Raises:
        InputError: no experts; tensors that are missing, extra or of another shape (named); names that
            are one tensor in the base and two in an expert; complex or quantised weights.
    """

    def __init__(self, base: Weights | None, experts: Mapping[str, Weights]) -> None:
        if not isinstance(experts, Mapping):
            raise InputError(f"experts are a mapping from names to weights, got {type(experts).__name__}")
        if not experts:
            raise InputError("a merge needs at least one expert, got none")
        self.experts = dict(experts)
        self._baseless = base is None
        self.base: Weights = next(iter(self.experts.values())) if base is None else base
        self.tied = tied(self.base)
        self.names = [name for name in self.base if name not in self.tied]
        self.signatures = {name: signature(self.base, name) for name in self.names}
        self.float_names = [name for name in self.names if self.signatures[name][0].is_floating_point]
        for name in self.names:
            _refuse(name, self.signatures)
        for label, expert in self.experts.items():
            if expert is not self.base:
                self._check(label, expert)

    def _check(self, label: str, expert: Weights) -> None:
        second = tied(expert)
        found = {name: signature(expert, name) for name in expert}
        floats = {name for name, (dtype, _) in found.items() if dtype.is_floating_point}
        known = {second.get(name, name) for name in found if name in self.signatures or name in self.tied}
        missing = sorted(name for name in self.float_names if name not in found)
        extra = sorted(name for name in floats if second.get(name, name) not in known)
        if missing or extra:
            parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} besides"] * bool(extra)
            raise InputError(f"expert {label!r} is not of the base's architecture: it {' and '.join(parts)}")
        for name in self.float_names:
            have, want = tuple(found[name][1]), tuple(self.signatures[name][1])
            if have != want:
                hint = " (another vocabulary?)" if have[1:] == want[1:] and "embed" in name else ""
                raise InputError(f"expert {label!r} has {name!r} of shape {have}, the base has {want}{hint}")
        for name, first in self.tied.items():
            apart = name in found and second.get(name, name) != second.get(first, first)
            if apart and not torch.equal(expert[name], expert[first]):
                raise InputError(
                    f"{name!r} and {first!r} are one tensor in the base and two in expert {label!r}: untie the base"
                )

    def flat(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """The base's tensor and the experts', flattened views where the source allows."""
        experts = [expert[name].detach().reshape(-1) for expert in self.experts.values()]
        base = experts[0] if self._baseless else self.base[name].detach().reshape(-1)
        return base, [expert.to(base.device) for expert in experts]

    def blocks(
        self, name: str, *, size: int | None = None, statistic: Any = None, tensor_statistic: Any = None
    ) -> Iterator[Block]:
        """The tensor's blocks of `size` entries (default 2^18), in order, with what the rule found out before."""
        return _cut(name, *self.flat(name), size or BLOCK, statistic, tensor_statistic)

    def deltas(self, name: str) -> Iterator[tuple[Block, Tensor]]:
        """Blocks of one tensor with their task vectors `(K, n)`, checked to be finite."""
        for block in self.blocks(name, size=PIECE):
            deltas = block.deltas()
            if not math.isfinite(deltas.sum().item()):
                self.explain(block)
            yield block, deltas

    def explain(self, block: Block) -> None:
        """Raise, naming the model and tensor, when the block holds NaN or infinite values."""
        sources = [(f"expert {label!r}", values) for label, values in zip(self.experts, block.experts, strict=True)]
        for label, values in sources if self._baseless else [("the base", block.base), *sources]:
            if not _all_finite(values):
                raise InputError(f"{label} has NaN or infinite values in {block.name!r}; it cannot be merged")


def _cut(name: str, base: Tensor, experts: list[Tensor], size: int, statistic: Any, special: Any) -> Iterator[Block]:
    for start in range(0, len(base), size):
        stop = min(start + size, len(base))
        rows = [expert[start:stop] for expert in experts]
        yield Block(name, start, stop, base[start:stop], rows, statistic, special)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype and 1 in (one.dtype.itemsize, other.dtype.itemsize):  # float8 and others do not compare
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def _all_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values.float() if values.dtype.itemsize == 1 else values).all())


def _refuse(name: str, signatures: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
    """Raise for types whose numbers do not stand for themselves."""
    dtype = signatures[name][0]
    if dtype.is_complex:
        raise InputError(f"{name!r} is complex; only real weights can be merged")
    packed = not dtype.is_floating_point and dtype != torch.bool and name.endswith("weight")
    scaled = dtype.itemsize == 1 and any(f"{name}_{scale}" in signatures for scale in ("scale", "scale_inv"))
    if packed or scaled:
        raise InputError(f"{name!r} is quantised ({dtype}); merge the weights it was made from")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


class Merge(Mapping[str, Tensor]):
    """The weights that a rule makes of a base and its experts, computed when read.

    Reading a name twice computes it twice: use `dict(merge)` to keep all in memory, or `save` to write
    them block by block. Integer tensors are the base's; tensors that are equal in all models are kept
    bit for bit; second names of tied tensors give the same tensor.

    Warns:
        When running statistics of normalisation layers are among the tensors: those of a merged model are
        no rule's of the experts', and must be estimated again on unlabelled inputs.
    """

    def __init__(self, models: Aligned, rule: Rule) -> None:
        self.models, self.rule = models, rule
        self.tied = models.tied
        self._lock = threading.Lock()
        self._statistic: tuple[Any] | None = None
        running = next((name for name in models.float_names if name.endswith("running_var")), None)
        if running is not None:
            message = f"{running!r} is a running statistic: estimate it again on unlabelled inputs after the merge"
            warnings.warn(message, stacklevel=3)

    def statistic(self) -> Any:
        """The rule's global statistic, computed at the first call."""
        with self._lock:
            if self._statistic is None:
                self._statistic = (self.rule.statistic(self.models),)
            return self._statistic[0]

    def signature(self, name: str) -> tuple[torch.dtype, torch.Size]:
        return self.models.signatures[self.tied.get(name, name)]

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The merged tensor, flattened, block by block.

        Raises:
            InputError: when a source has NaN or infinite values, or a value does not fit `dtype`.
        """
        name = self.tied.get(name, name)
        if not self.models.signatures[name][0].is_floating_point:
            yield from self.models.base[name].detach().reshape(-1).split(BLOCK)
            return
        base, experts = self.models.flat(name)
        same = all(expert is base or _equal(expert, base) for expert in experts)  # ends at the first difference
        statistic = None if same else self.statistic()
        special = None if same else self.rule.tensor_statistic(self.models, name, statistic)
        size = max(1, len(base)) if self.rule.whole else self.rule.pieces * PIECE
        for block in _cut(name, base, experts, size, statistic, special):
            merged = (block.base if same else self.rule(block)).to(dtype)
            if not math.isfinite(merged.sum(dtype=torch.float32).item()) and not _all_finite(merged):
                self.models.explain(block)
                raise InputError(f"merged values of {name!r} do not fit {dtype}; choose a wider dtype")
            yield merged

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.signature(name)
        flat, at = torch.empty(0), 0
        for block in self.blocks(name, dtype):
            flat = flat if at else torch.empty(shape.numel(), dtype=dtype, device=block.device)
            flat[at : at + len(block)] = block
            at += len(block)
        return flat.view(shape) if at else torch.empty_like(self.models.base[self.tied.get(name, name)])

    def __contains__(self, name: object) -> bool:
        return name in self.models.signatures or name in self.tied

    def __iter__(self) -> Iterator[str]:
        yield from self.models.names
        yield from self.tied

    def __len__(self) -> int:
        return len(self.models.names) + len(self.tied)
