"""How examples get through a model: how it is called, a batch in parts, evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..task import to_device
from .multitask import MultiTaskModel

__all__ = ["at", "call_arguments", "evaluating", "limited", "wide"]


def wide(value: Tensor) -> Tensor:
    """At least float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def at(inputs: Any, index: Any) -> Any:
    """Some examples (or one) of a batch of inputs."""
    return {key: column[index] for key, column in inputs.items()} if isinstance(inputs, Mapping) else inputs[index]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module's own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call_arguments(model: nn.Module, inputs: Any, task: str | None) -> tuple[tuple, dict[str, Any]]:
    """How a model is called: `(inputs, task)` with a task; otherwise `(inputs)`, or `(**inputs)` for a mapping."""
    if task is not None:
        return (inputs, task), {}
    if isinstance(model, MultiTaskModel):
        raise InputError(f"the model has one head per task: give task=, one of {', '.join(model.heads)}")
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def limited(batches: Iterable[Any], examples: int, device: torch.device | str) -> Iterator[tuple[Any, Any, int]]:
    """(inputs, targets or None, examples so far) until `examples` were seen; the last batch is cut.

    Raises:
        InputError: when `examples` is not positive, or there are no batches.
    """
    if examples < 1:
        raise InputError(f"examples is how many to use, at least 1, got {examples}")
    seen = 0
    for batch in batches:
        parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        inputs, targets = parts[0], parts[1] if len(parts) > 1 else None
        rows = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
        if seen + rows > examples:
            rows = examples - seen
            inputs, targets = at(inputs, slice(rows)), None if targets is None else targets[:rows]
        seen += rows
        yield to_device(inputs, device), to_device(targets, device), seen
        if seen == examples:
            return
    if not seen:
        raise InputError("there are no batches: give a list or a Batches object with at least one example")
