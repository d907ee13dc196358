"""What rules that look at data need: examples on their way through an expert, and statistics that fit its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Weights
from ..errors import InputError
from ..nets.multitask import MultiTaskModel
from ..saving import signature
from ..task import to_device
from .engine import Aligned, working

__all__ = ["at", "call_arguments", "double", "evaluating", "limited", "matched", "wide"]


def wide(value: Tensor) -> Tensor:
    """At least float32."""
    return value.to(working(value.dtype))


def double(value: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def at(inputs: Any, index: Any) -> Any:
    """Some examples (or one) of a batch of inputs."""
    return {key: column[index] for key, column in inputs.items()} if isinstance(inputs, Mapping) else inputs[index]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
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


def matched(
    models: Aligned,
    given: Mapping[str, Weights],
    what: str,
    maker: str,
    expected: Callable[[torch.Size, str], tuple[int, ...] | None],
    *,
    suffix: str = "",
) -> dict[str, str]:
    """Name of each tensor that every expert has `what` for -> its name there (a second name, or with `suffix`).

    Raises:
        InputError: when an expert lacks it, or names or shapes are not those of the experts' weights.
    """
    missing = [label for label in models.experts if label not in given]
    if missing:
        raise InputError(f"{what} is missing for expert {missing[0]!r}; it is there for {', '.join(given) or 'none'}")
    first, names = given[next(iter(models.experts))], {}
    for source in first:
        name = source if source in models.signatures or not suffix else source.removesuffix(suffix)
        name = models.tied.get(name, name)
        if name not in models.float_names:
            raise InputError(f"{what} has {source!r}, which the experts' weights lack")
        names[name] = source
    if not names:
        raise InputError(f"{what} is empty; make it with {maker}")
    for label in models.experts:
        other = sorted(set(given[label]) ^ set(first))
        if other:
            raise InputError(f"{what} of expert {label!r} is of other tensors: {other[0]!r} is in one set only")
        for name, source in names.items():
            have, want = signature(given[label], source)[1], expected(models.signatures[name][1], source)
            if want is None or tuple(have) != tuple(want):
                fits = "none fits" if want is None else f"{tuple(want)} fits"
                raise InputError(f"{what} of expert {label!r} has {source!r} of shape {tuple(have)}; {fits} its weight")
    return names
