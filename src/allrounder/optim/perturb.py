"""Looks at a loss around the weights and leaves no trace: weights, BatchNorm statistics and random draws as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["RandomState", "frozen_batchnorm", "perturbed", "random_state", "replayed", "same_state"]

RandomState = list[Tensor]


@contextmanager
def perturbed(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    *,
    scale: float = 1.0,
    kept: Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Parameters plus `scale` times directions inside; the saved copies, and so the same bits, after it.

    Args:
        parameters: changed in place.
        directions: one for each, `None` for no change.
        scale: of all directions.
        kept: copies of all parameters, where a caller has them; otherwise those that move are copied.
    """
    places = [i for i, direction in enumerate(directions) if direction is not None]
    if len(directions) != len(parameters):
        raise ValueError(f"one direction for each of {len(parameters)} parameters, got {len(directions)}")
    moved = [parameters[i] for i in places]
    saved = [parameters[i].detach().clone() if kept is None else kept[i] for i in places]
    try:
        with torch.no_grad():
            if moved:
                torch._foreach_add_(moved, [directions[i] for i in places], alpha=scale)  # type: ignore[arg-type]
        yield
    finally:
        with torch.no_grad():
            if moved:
                torch._foreach_copy_(moved, saved)


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """Forward passes inside use batch statistics as they did, and do not move the running ones."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [
        (norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms
    ]
    training = [norm for norm in norms if norm.training]
    try:
        for norm in training:
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        yield
    finally:
        for norm, (tracked, mean, var, count) in zip(norms, before, strict=True):
            norm.track_running_stats = tracked
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count


def random_state() -> RandomState:
    """States of torch's default generators, on the CPU and on every GPU."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def same_state(one: RandomState, other: RandomState) -> bool:
    """Whether nothing was drawn in between."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _set(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


@contextmanager
def replayed(state: RandomState, *, keep: bool = False) -> Iterator[None]:
    """Draws inside start from `state`; afterwards all is as before, or with `keep` as the draws left it."""
    now = random_state()
    _set(state)
    try:
        yield
    finally:
        if not keep:
            _set(now)
