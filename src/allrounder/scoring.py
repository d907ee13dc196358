"""The one scorer: a task x model table, and what it means against the specialists."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .errors import InputError
from .task import Batches, Suite, to_device

__all__ = ["mean", "normalised", "score"]


@torch.no_grad()
def score(
    model: nn.Module | Callable, suite: Suite, *, split: str = "test", batch_size: int | None = None
) -> dict[str, float]:
    """Each task's metric on a whole split.

    A metric with `update`, `compute` and `reset` (those of torchmetrics) is given batch by batch, any other all outputs
    at once.

    Args:
        model: called as `model(inputs, task)`; put into evaluation mode when it is a module.
        suite: the tasks.
        split: `test`, `validation` or `train`.
        batch_size: examples at a time. Default: the split's own `batch_size`, or 64.

    Returns:
        Task name -> metric (for accuracy: 0 to 1).
    """
    device: torch.device | str = "cpu"
    if isinstance(model, nn.Module):
        model.eval()
        first = next(model.parameters(), None)
        device = "cpu" if first is None else first.device
    scores = {}
    for name, task in suite.items():
        data, metric = task.split(split), task.metric
        gathered = hasattr(metric, "update")
        if gathered:
            metric = copy.deepcopy(metric)
            metric.reset()  # type: ignore[attr-defined]
        outputs, targets = [], []
        for inputs, target in Batches(data, batch_size or getattr(data, "batch_size", 64)):
            output = model(to_device(inputs, device), name)
            if gathered:
                if hasattr(metric, "to"):
                    metric = metric.to(output.device)
                metric.update(output, to_device(target, output.device))  # type: ignore[attr-defined]
            else:
                outputs.append(output.float().cpu())
                targets.append(target)
        found = metric.compute() if gathered else metric(torch.cat(outputs), torch.cat(targets))  # type: ignore[attr-defined]
        scores[name] = float(found)
    return scores


def normalised(scores: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float]:
    """Each task's score as a percentage of its own expert's, on the same split.

    Raises:
        InputError: when an expert's score is not positive (a metric that can be 0 has no such ratio).

    >>> normalised({"a": 0.45}, {"a": 0.9})
    {'a': 50.0}
    """
    for name in scores:
        if experts[name] <= 0:
            raise InputError(f"the expert of {name!r} scores {experts[name]:g}: normalised scores need a positive one")
    return {name: 100.0 * value / experts[name] for name, value in scores.items()}


def mean(scores: Mapping[str, float]) -> float:
    """Plain mean over tasks (of normalised scores: the mean of ratios, never the ratio of means)."""
    return sum(scores.values()) / len(scores)
