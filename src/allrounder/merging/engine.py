"""The engine behind every merge rule: K experts in, one model out, tensor by tensor, block by block.

A `Rule` says how one block of K task vectors becomes one block of the result; `Merge` is the weights
that come out, computed when they are read. Because `Merge` is a mapping like any other, a merge in
memory is `dict(merge)` and a merge of checkpoints that do not fit in memory is `save(merge, folder)`:
the same code, the same result.

A rule has one of three scopes, by what it overrides: *elementwise* (only `__call__`), *per tensor*
(`tensor_statistic`: a threshold, a norm, a solution), *global* (`statistic`: seen once, over all tensors).

Memory: one block (1 MiB in float32) per source for elementwise rules, whatever the size of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Weights, tied
from ..errors import InputError
from ..save import BLOCK, signature

__all__ = ["Aligned", "Block", "Linear", "Merge", "Rule"]


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
        """Task vectors, expert - base, at least in float32: `(K, n)`."""
        base = self.base.to(torch.promote_types(self.base.dtype, torch.float32))
        return torch.stack([expert.to(base.dtype) for expert in self.experts]).sub_(base)


class Rule:
    """How K task vectors become one. `__call__` gives the merged block, `(n,)`, in the working type."""

    whole = False  # give whole tensors, not blocks

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
    """

    coefficients: Any

    def __call__(self, block: Block) -> Tensor:
        values = self.coefficients
        if isinstance(values, Mapping):
            if block.name not in values:
                return block.base
            values = values[block.name]
        values = [float(value) for value in values]
        work = torch.promote_types(block.base.dtype, torch.float32)
        rest = 1.0 - sum(values)
        first, *others = block.experts
        if abs(rest) < 1e-9:
            out = first.to(work) * values[0]
            values = values[1:]
        else:
            out, others = block.base.to(work) * rest, block.experts
        for value, expert in zip(values, others, strict=True):
            out.add_(expert.to(work), alpha=value)
        return out


class Aligned:
    """A base and K experts that have the same tensors: names, shapes, second names, checked once.

    Args:
        base: the weights all experts were fine-tuned from; `None` for rules that do not need them.
        experts: name -> weights. Integer tensors may be missing from an expert; the base's are used.

    Raises:
        InputError: no experts, or tensors that are missing, extra or of another shape (named).
    """

    def __init__(self, base: Weights | None, experts: Mapping[str, Weights]) -> None:
        if not isinstance(experts, Mapping):
            raise InputError(f"experts are a mapping from names to weights, got {type(experts).__name__}")
        if not experts:
            raise InputError("a merge needs at least one expert, got none")
        self.experts = dict(experts)
        self.base = next(iter(self.experts.values())) if base is None else base
        self.tied = tied(self.base)
        self.names = [name for name in self.base if name not in self.tied]
        self.signatures = {name: signature(self.base, name) for name in self.names}
        for label, expert in self.experts.items():
            if expert is not self.base:
                self._check(label, expert)

    def _check(self, label: str, expert: Weights) -> None:
        second = tied(expert)
        found = {name: signature(expert, name) for name in expert if name not in second}

        def floats(signatures: dict[str, tuple]) -> set[str]:
            return {name for name, (dtype, _) in signatures.items() if dtype.is_floating_point}

        missing = sorted(floats(self.signatures) - set(found) - set(second))
        extra = sorted(floats(found) - set(self.signatures) - set(self.tied))
        if missing or extra:
            parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} besides"] * bool(extra)
            raise InputError(f"expert {label!r} is not of the base's architecture: it {' and '.join(parts)}")
        for name in self.float_names:
            shape = found[name][1] if name in found else signature(expert, name)[1]
            if shape != self.signatures[name][1]:
                have, want = tuple(shape), tuple(self.signatures[name][1])
                hint = " (another vocabulary?)" if have[1:] == want[1:] and "embed" in name else ""
                raise InputError(f"expert {label!r} has {name!r} of shape {have}, the base has {want}{hint}")

    @property
    def float_names(self) -> list[str]:
        return [name for name in self.names if self.signatures[name][0].is_floating_point]

    def flat(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """The base's tensor and the experts', flattened views where the source allows."""
        experts = [expert[name].detach().reshape(-1) for expert in self.experts.values()]
        return (experts[0] if self.base is next(iter(self.experts.values())) else self.base[name].detach().reshape(-1)), experts

    def blocks(self, name: str, *, size: int = BLOCK) -> Iterator[Block]:
        """The tensor's blocks, in order."""
        base, experts = self.flat(name)
        for start in range(0, base.numel(), size):
            stop = min(start + size, base.numel())
            yield Block(name, start, stop, base[start:stop], [expert[start:stop] for expert in experts])

    def deltas(self, name: str) -> Iterator[tuple[Block, Tensor]]:
        """Blocks of one tensor with their task vectors `(K, n)`, checked to be finite."""
        for block in self.blocks(name):
            deltas = block.deltas()
            if not torch.isfinite(deltas.sum()):
                self.explain(block)
            yield block, deltas

    def explain(self, block: Block) -> None:
        """Raise, naming the model and tensor, when the block holds NaN or infinite values."""
        for label, values in [("the base", block.base), *zip(self.experts, block.experts, strict=True)]:
            if not torch.isfinite(values).all():
                label = label if label == "the base" else f"expert {label!r}"
                raise InputError(f"{label} has NaN or infinite values in {block.name!r}; it cannot be merged")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


class Merge(Mapping[str, Tensor]):
    """The weights that a rule makes of a base and its experts, computed when read.

    Reading a name twice computes it twice: use `dict(merge)` to keep all in memory, or `save` to write
    them block by block. Integer tensors are the base's; tensors that are equal in all models are kept
    bit for bit; second names of tied tensors give the same tensor.
    """

    def __init__(self, models: Aligned, rule: Rule) -> None:
        self.models, self.rule = models, rule
        self.tied = models.tied
        self._lock = threading.Lock()
        self._statistic: tuple[Any] | None = None

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
        if not self.signature(name)[0].is_floating_point:
            flat = self.models.base[name].detach().reshape(-1)
            yield from flat.split(BLOCK)
            return
        statistic = self.statistic()
        special: Any = None
        size = max(1, self.signature(name)[1].numel()) if self.rule.whole else BLOCK
        for block in self.models.blocks(name, size=size):
            if all(expert is block.base or torch.equal(expert, block.base) for expert in block.experts):
                self._finite(block, block.base)
                yield from block.base.to(dtype).split(BLOCK)
                continue
            if special is None:
                special = (self.rule.tensor_statistic(self.models, name, statistic),)
            full = Block(name, block.start, block.stop, block.base, block.experts, statistic, special[0])
            merged = self.rule(full).to(dtype)
            self._finite(block, merged)
            yield from merged.split(BLOCK)

    def _finite(self, block: Block, values: Tensor) -> None:
        if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
            self.models.explain(block)
            raise InputError(f"merged values of {block.name!r} do not fit {values.dtype}; choose a wider dtype")

    def __getitem__(self, name: str) -> Tensor:
        name = self.tied.get(name, name)
        dtype, shape = self.models.signatures[name]
        out = torch.empty(shape, dtype=dtype, device=self.models.base[name].device)
        flat, at = out.view(-1), 0
        for block in self.blocks(name, dtype):
            flat[at : at + block.numel()] = block
            at += block.numel()
        return out

    def __iter__(self) -> Iterator[str]:
        yield from self.models.names
        yield from self.tied

    def __len__(self) -> int:
        return len(self.models.names) + len(self.tied)
