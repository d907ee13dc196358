"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from .errors import InputError
from .task import Batches, Suite, to_device

__all__ = ["fit", "load_weights"]


def fit(
    model: nn.Module,
    suite: Suite,
    *,
    steps: int,
    lr: float,
    batch_size: int = 128,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    seed: int = 0,
    parameters: Iterable[nn.Parameter] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Train in place with AdamW, one task a step in turn.

    Args:
        model: called as `model(inputs, task)`.
        suite: the tasks; their `train` splits and losses are used. One task: fine-tuning. Several:
            joint training, each task every `len(suite)` steps.
        steps: optimiser steps in all.
        lr: learning rate.
        batch_size: examples a step.
        weight_decay: decoupled, as in AdamW.
        schedule: `constant`, or `cosine` to zero.
        seed: order of the examples. Dropout, if the model has any, follows torch's global generator,
            which is seeded inside a fork and so left as it was.
        parameters: what to train. Default: all that require gradients.
        progress: called with (steps done, steps).

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: for an unknown schedule, or a loss that is not finite (with its task and step).
    """
    if schedule not in ("constant", "cosine"):
        raise InputError(f"schedule is 'constant' or 'cosine', got {schedule!r}")
    trained = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, foreach=True)
    streams = {
        name: iter(Batches(task.train, batch_size, seed=seed + i, endless=True))
        for i, (name, task) in enumerate(suite.items())
    }
    names = list(suite)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            if schedule == "cosine":
                for group in optimiser.param_groups:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            name = names[step % len(names)]
            inputs, targets = to_device(next(streams[name]), device)
            loss = suite[name].loss(model(inputs, name), targets)
            if not torch.isfinite(loss):
                raise InputError(f"the loss of task {name!r} is {loss.item()} at step {step}; lower the learning rate")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if progress is not None:
                progress(step + 1, steps)
    return model.eval()


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy weights into a module; names of tied tensors and integer buffers may be missing.

    Raises:
        InputError: when a floating tensor of the module is missing, or a shape differs.
    """
    own = model.state_dict(keep_vars=True)
    by_storage = {value.data_ptr(): name for name, value in own.items() if name in weights}
    with torch.no_grad():
        for name, value in own.items():
            if name in weights:
                given = weights[name]
                if given.shape != value.shape:
                    have, want = tuple(given.shape), tuple(value.shape)
                    raise InputError(f"{name!r} has the shape {have} in the weights and {want} in the model")
                value.copy_(given)
            elif value.is_floating_point() and value.data_ptr() not in by_storage:
                raise InputError(f"the weights lack {name!r}, which the model has")
    return model
