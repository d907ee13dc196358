"""AdaMerging: learn from unlabelled inputs how much of each expert goes into each layer.

`W_l = base_l + sum_k c_kl tau_kl`, with c moved by Adam so that the merged model's predictions become
certain: the loss is the entropy of its softmax outputs, summed over tasks. Labels are never read; the task
of each batch must be known, because it selects the head.

Use it when there are unlabelled inputs of every task and the merged model is already fair (entropy is a
usable stand-in only near a good start). Not for regression or single-class heads. The accuracy on the very
inputs used here is transductive: hold some out, or say so.

Cost: `steps` times one forward and backward pass per task, plus one merge and one contraction; K numbers
per tensor are learned.

Paper: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
arXiv 2310.02575. Departures from its code: merged once a step, not once per task; coefficients are paired
with tensors by name, not by position; one batch per task and step (give larger batches for its two).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint import Weights
from ..errors import InputError
from .baselines import Ties, _share
from .coefficients import MergedModel, endless, inputs_of, learn
from .engine import Aligned, Block, Merge

__all__ = ["adamerging", "entropy", "surviving"]


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits) over the last dimension, in nats.

    >>> round(entropy(torch.zeros(10)).item(), 6)
    2.302585
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@dataclass(frozen=True)
class _Survivor(Ties):
    """TIES stopped before the merge: expert number `index` with its surviving entries alone."""

    index: int = 0

    def __call__(self, block: Block) -> Tensor:
        return self.survivors(block)[self.index].add_(block.base)


def surviving(base: Weights, experts: Mapping[str, Weights], *, density: float = 0.2) -> dict[str, Merge]:
    """Each expert with only those entries of its task vector that TIES would merge (AdaMerging++).

    Args:
        base, experts: as for `ties`.
        density: share of entries kept before the election, (0, 1].
    """
    models = Aligned(base, experts)
    rule = Ties(1.0, True, "sum", _share("density", density), "global")
    statistic = Merge(models, rule).statistic()
    found = {}
    for index, name in enumerate(models.experts):
        found[name] = Merge(models, _Survivor(1.0, True, "sum", rule.density, "global", index))
        found[name]._statistic = (statistic,)
    return found


def adamerging(
    model: nn.Module,
    base: Weights,
    experts: Mapping[str, Weights],
    unlabelled: Mapping[str, Iterable[Any]],
    *,
    per: Literal["tensor", "model"] = "tensor",
    plus: bool = False,
    density: float = 0.2,
    steps: int = 500,
    lr: float = 1e-3,
    init: float = 0.3,
    clamp: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Merge:
    """Merge with coefficients learned by entropy minimisation.

    Args:
        model: called as `model(inputs, task)`; its shared part (a `MultiTaskModel`'s backbone, or all of it)
            has the names of `base`. It is left as it was.
        base: the weights all experts were fine-tuned from.
        experts: name -> weights.
        unlabelled: task -> batches that can be iterated repeatedly; a batch is inputs, or a tuple that
            starts with them (the rest is not read). Paper: 32 inputs per task and step.
        per: a coefficient for each expert and parameter `tensor` (layer-wise), or for each expert in the
            whole `model` (task-wise).
        plus: use what TIES leaves of each task vector (AdaMerging++), with `density`.
        steps, lr: of Adam. Paper: 500, 1e-3.
        init: every coefficient's start. Paper: 0.3.
        clamp: use coefficients within [0, 1] (paper); gradients stop at the bounds.
        progress: called with (steps done, steps).

    Returns:
        The merge, by the ordinary linear rule; `merge.rule.coefficients` maps names to K numbers.

    Raises:
        InputError: a task without batches or with fewer than two outputs, gradients that are zero at once.

    Warns:
        When predictions collapse: the entropy of a task's mean prediction falls below half of its start.
    """
    if per not in ("tensor", "model"):
        raise InputError(f"per is 'tensor' or 'model', got {per!r}")
    chosen = surviving(base, experts, density=density) if plus else experts
    merged = MergedModel(model, base, chosen, blocks=per)
    device = next(iter(merged.leaves.values())).device
    raw = torch.full((len(experts), merged.n_blocks), float(init), dtype=torch.float64, requires_grad=True)
    streams = endless(unlabelled, device)
    spread: dict[str, tuple[float, float]] = {}

    def coefficients() -> Tensor:
        return raw.clamp(0, 1) if clamp else raw * 1

    def losses(step: int) -> Iterator[Tensor]:
        for task, stream in streams.items():
            logits = merged(inputs_of(next(stream)), task)
            if logits.ndim < 2 or logits.shape[-1] < 2:
                shape = tuple(logits.shape)
                raise InputError(f"task {task!r} has outputs of shape {shape}: entropy needs two or more classes")
            with torch.no_grad():
                now = entropy(logits.softmax(-1).reshape(-1, logits.shape[-1]).mean(0).clamp_min(1e-30).log()).item()
            spread[task] = (spread.get(task, (now, now))[0], now)
            yield entropy(logits).mean()

    optimiser = torch.optim.Adam([raw], lr=lr)
    history = learn(merged, coefficients, [raw], losses, optimiser=optimiser, steps=steps, progress=progress)
    collapsed = [task for task, (first, last) in spread.items() if first > 0.1 * math.log(2) and last < first / 2]
    if collapsed:
        names = ", ".join(collapsed)
        warnings.warn(f"predictions of {names} collapse towards few classes; lower lr or steps", stacklevel=2)
    result = merged.merge(coefficients())
    result.history = history  # type: ignore[attr-defined]
    return result
