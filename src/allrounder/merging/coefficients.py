"""The differentiable merged model: `W_l = base_l + sum_k c_kl tau_kl`, with gradients for the coefficients c.

The merge itself stays outside autograd. Merged values are written into leaf parameters once a step; every
loss runs backward into them; then one contraction gives `dL/dc_kl = <dL/dW_l, tau_kl>`. That is exactly
the gradient of autograd through the merge, for K P multiply-adds a step instead of K P per loss, and no
graph holds the task vectors. Coefficients are float64 on the CPU: there are few, and a merge with 0.3 is
then the same merge, bit for bit, as task arithmetic with 0.3.

Memory: the model, its gradients, and K task vectors (in `storage` precision; low-rank adapters stay
factors). Time per step: forward and backward of the losses, one merge, one contraction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint import Weights
from ..errors import InputError
from ..nets.multitask import shared
from ..task import to_device
from .engine import Aligned, Block, Linear, Merge, Rule

__all__ = ["MergedModel", "Partitioned", "endless", "inputs_of", "learn"]


class _Dense:
    """K task vectors of one tensor, stacked; one coefficient each."""

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas  # (K, n)

    def merge(self, base: Tensor, values: Tensor, out: Tensor) -> None:
        torch.addmv(base, self.deltas.T, values.squeeze(-1).to(self.deltas), out=out)

    def contract(self, grad: Tensor) -> Tensor:
        return (self.deltas @ grad.to(self.deltas)).float().unsqueeze(-1)  # (K, 1)


class _Mixed(_Dense):
    """The same in a storage type narrower than the model's: added row by row."""

    def merge(self, base: Tensor, values: Tensor, out: Tensor) -> None:
        out.copy_(base)
        for value, delta in zip(values.squeeze(-1).tolist(), self.deltas, strict=True):
            out.add_(delta, alpha=value)


class _Parted(_Dense):
    """One coefficient for each of P random parts of the tensor."""

    def __init__(self, deltas: Tensor, part: Tensor, parts: int) -> None:
        super().__init__(deltas)
        self.part, self.parts = part, parts  # (n,) in 0..P-1

    def merge(self, base: Tensor, values: Tensor, out: Tensor) -> None:
        out.copy_(base)
        for value, delta in zip(values.to(base), self.deltas, strict=True):
            out.addcmul_(value[self.part.long()], delta.to(base))

    def contract(self, grad: Tensor) -> Tensor:
        sums = torch.zeros(len(self.deltas), self.parts, device=grad.device)
        return sums.index_add_(1, self.part.long(), (self.deltas.to(grad) * grad).float())


class _LowRank:
    """K task vectors `scale_k B_k A_k`, never made dense: `<G, B A> = trace(A G^T B)`."""

    def __init__(self, factors: list[tuple[Tensor, Tensor, float]], shape: torch.Size) -> None:
        self.factors, self.shape = factors, shape

    def merge(self, base: Tensor, values: Tensor, out: Tensor) -> None:
        out.copy_(base)
        matrix = out.view(self.shape)
        for value, (a, b, scale) in zip(values.squeeze(-1).tolist(), self.factors, strict=True):
            matrix.addmm_(b.to(matrix), a.to(matrix), alpha=value * scale)

    def contract(self, grad: Tensor) -> Tensor:
        matrix = grad.view(self.shape)
        values = [scale * ((b.to(matrix).T @ matrix) * a.to(matrix)).sum() for a, b, scale in self.factors]
        return torch.stack(values).float().unsqueeze(-1)


def _part_of(name: str, entries: int, parts: int, seed: int) -> Tensor:
    """Which part each entry of a tensor belongs to: parts of equal size (within one), shuffled."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return torch.randperm(entries, generator=generator).remainder(parts).to(torch.int16)


@dataclass(frozen=True)
class Partitioned(Rule):
    """Linear, with P coefficients per expert and tensor: `coefficients[name]` is `(K, P)`."""

    coefficients: Mapping[str, Tensor]
    seed: int
    whole = True

    def __call__(self, block: Block) -> Tensor:
        if block.name not in self.coefficients:
            return block.base
        values = self.coefficients[block.name]
        part = _part_of(block.name, block.stop, values.shape[1], self.seed).long().to(block.base.device)
        merged = block.base.to(torch.promote_types(block.base.dtype, torch.float32), copy=True)
        for value, delta in zip(values.to(merged), block.deltas(), strict=True):
            merged.addcmul_(value[part], delta)
        return merged


class MergedModel(nn.Module):
    """A copy of `model` whose shared weights are a linear merge with coefficients that can be learned.

    Args:
        model: called as `merged(...)` is; a `MultiTaskModel`, whose backbone is merged, or any module.
        base, experts: weights named as the shared part's state dict names them.
        blocks: `tensor`, one coefficient for each parameter tensor; `model`, one for all; or a mapping from
            tensor names to block numbers 0..n-1.
        parts: split each tensor into this many random parts with a coefficient each (aTLAS x P).
        seed: of the random parts.
        storage: type in which task vectors are kept; default float32.

    Everything but the merged leaves is frozen, and the model is in evaluation mode. Floating buffers (running
    statistics) take the mean of the experts'.

    Raises:
        InputError: experts that do not fit the base, or weights that lack a parameter of the shared part.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Weights,
        experts: Mapping[str, Weights],
        *,
        blocks: Literal["tensor", "model"] | Mapping[str, int] = "tensor",
        parts: int = 1,
        seed: int = 0,
        storage: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.models = Aligned(base, experts)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.parts, self.seed = parts, seed
        own = dict(shared(self.model).named_parameters())
        known = {self.models.tied.get(name, name): value for name, value in own.items() if name in base}
        missing = [name for name in own if name not in base]
        if missing or not known:
            raise InputError(f"the base's weights lack {(missing or ['all'])[0]!r}, which the model has")
        self.leaves = {name: value for name, value in known.items() if value.is_floating_point()}
        if blocks == "tensor":
            self.block_of = {name: i for i, name in enumerate(self.leaves)}
        elif blocks == "model":
            self.block_of = dict.fromkeys(self.leaves, 0)
        elif isinstance(blocks, Mapping):
            unknown = [name for name in self.leaves if name not in blocks]
            if unknown:
                raise InputError(f"blocks give no number for {unknown[0]!r}")
            self.block_of = {name: int(blocks[name]) for name in self.leaves}
        else:
            raise InputError(f"blocks are 'tensor', 'model' or a mapping, got {blocks!r}")
        self.n_blocks = max(self.block_of.values()) + 1
        self.bases: dict[str, Tensor] = {}
        self.vectors: dict[str, Any] = {}
        for name, leaf in self.leaves.items():
            leaf.requires_grad_(True)
            self.bases[name] = base[name].detach().reshape(-1).to(leaf, copy=True)
            vector = self._vector(name, leaf, storage)
            if vector is not None:
                self.vectors[name] = vector
        self._buffers_to_mean()

    def _vector(self, name: str, leaf: Tensor, storage: torch.dtype) -> Any:
        factors = [getattr(expert, "low_rank", lambda _: None)(name) for expert in self.models.experts.values()]
        if self.parts == 1 and all(factor is not None for factor in factors):
            return _LowRank([(a.to(leaf.device), b.to(leaf.device), scale) for a, b, scale in factors], leaf.shape)  # type: ignore[misc]
        stacked = torch.empty(len(self.models.experts), leaf.numel(), dtype=storage, device=leaf.device)
        for block, deltas in self.models.deltas(name):
            stacked[:, block.start : block.stop] = deltas
        if not stacked.any():
            return None
        if self.parts > 1:
            return _Parted(stacked, _part_of(name, leaf.numel(), self.parts, self.seed).to(leaf.device), self.parts)
        return _Dense(stacked) if stacked.dtype == leaf.dtype else _Mixed(stacked)

    @torch.no_grad()
    def _buffers_to_mean(self) -> None:
        for name, buffer in shared(self.model).named_buffers():
            if buffer.is_floating_point() and name in self.models.base:
                values = [expert[name].to(buffer) for expert in self.models.experts.values()]
                buffer.copy_(torch.stack(values).mean(0))

    @torch.no_grad()
    def set(self, coefficients: Tensor) -> None:
        """Merge with `(K, n_blocks)` coefficients, `(K, n_blocks, P)` with parts."""
        device = next(iter(self.leaves.values())).device
        values = coefficients.detach().reshape(len(self.models.experts), self.n_blocks, self.parts).float().to(device)
        for name, leaf in self.leaves.items():
            if name in self.vectors:
                self.vectors[name].merge(self.bases[name], values[:, self.block_of[name]], leaf.data.view(-1))
            else:
                leaf.data.view(-1).copy_(self.bases[name])

    @torch.no_grad()
    def contract(self) -> Tensor:
        """`dL/dc` for the gradients that stand in the leaves, which are cleared; shape as `set` takes it."""
        shape = (len(self.models.experts), self.n_blocks, self.parts)
        total = torch.zeros(shape, device=next(iter(self.leaves.values())).device)
        for name, leaf in self.leaves.items():
            if leaf.grad is not None and name in self.vectors:
                total[:, self.block_of[name]] += self.vectors[name].contract(leaf.grad.reshape(-1))
            leaf.grad = None
        total = total.cpu().double()
        return total if self.parts > 1 else total.squeeze(-1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def merge(self, coefficients: Tensor) -> Merge:
        """The ordinary weights with these coefficients. Floating buffers get the experts' mean."""
        count = len(self.models.experts)
        values = coefficients.detach().double().cpu().reshape(count, self.n_blocks, self.parts)
        rows = {name: values[:, self.block_of[name]] for name in self.leaves}
        for name in self.models.float_names:
            rows.setdefault(name, torch.full((count, self.parts), 1 / count, dtype=torch.float64))
        if self.parts > 1:
            return Merge(self.models, Partitioned(rows, self.seed))
        return Merge(self.models, Linear({name: row.squeeze(-1).tolist() for name, row in rows.items()}))


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch that may have targets beside them."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def endless(data: Mapping[str, Iterable[Any]], device: torch.device | str) -> dict[str, Iterator[Any]]:
    """For each task an iterator over its batches that starts again at the end.

    Raises:
        InputError: when there is no task, or a task has no batches.
    """
    if not isinstance(data, Mapping) or not data:
        raise InputError("data are a mapping from tasks to batches: every batch needs to belong to a task")

    def again(name: str, batches: Iterable[Any]) -> Iterator[Any]:
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield to_device(batch, device)
            if empty:
                raise InputError(f"task {name!r} has no batches left; give a list or a Batches object, not an iterator")

    return {name: again(name, batches) for name, batches in data.items()}


def learn(
    merged: MergedModel,
    coefficients: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    losses: Callable[[int], Iterable[Tensor]],
    *,
    optimiser: torch.optim.Optimizer,
    steps: int,
    penalty: Callable[[], Tensor] | None = None,
    clip: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Learn what the coefficients are made of: one merge, the losses' backward passes, one contraction a step.

    Args:
        merged: the model.
        coefficients: gives the coefficients as a function of `parameters`, within autograd.
        parameters: the leaves that the optimiser moves.
        losses: step -> the step's losses, made one by one (each is run backward before the next is made).
        optimiser: over `parameters`.
        steps: how many.
        penalty: an additional loss on `parameters` themselves.
        clip: largest norm of the gradient of `parameters`.
        progress: called with (steps done, steps).

    Returns:
        The sum of the losses at each step.

    Raises:
        InputError: when a loss is not finite, or the very first gradient is exactly zero.
    """
    history = []
    for step in range(steps):
        optimiser.zero_grad()
        values = coefficients()
        merged.set(values)
        total = 0.0
        for loss in losses(step):
            loss.backward()
            total += loss.item()
        if total != total or total in (float("inf"), float("-inf")):
            raise InputError(f"the loss is {total} at step {step}; lower the learning rate or check the inputs")
        gradient = merged.contract()
        if step == 0 and merged.vectors and not gradient.any():
            raise InputError("the loss does not depend on the coefficients: its first gradient is exactly zero")
        if values.requires_grad:
            values.backward(gradient.reshape(values.shape).to(values))
        if penalty is not None:
            penalty().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        history.append(total)
        if progress is not None:
            progress(step + 1, steps)
    return history
