"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, repeat

import torch
from torch import Tensor, nn

from .errors import InputError
from .task import Batches, Suite, to_device

__all__ = ["Losses", "Update", "fit", "load_weights"]

Losses = Callable[[Sequence[str]], dict[str, Tensor]]
"""Task names -> their losses on this step's batches, each time from a new forward pass of the same batches."""

Update = Callable[[Losses, Sequence[str]], Mapping[str, Tensor]]
"""`(losses, tasks of this step) -> losses`: leaves the step's gradient in `.grad` of what is trained and returns
the losses at the weights as they were. One that has a method `stepped()` is told so after the optimiser's step, when it
may look at the losses again. The rules of `allrounder.optim` and `allrounder.multitask` are updates."""


def _sum(losses: Losses, tasks: Sequence[str]) -> Mapping[str, Tensor]:
    found = losses(tasks)
    torch.stack(list(found.values())).sum().backward()
    return found


def _sampled(sampler: str | Iterable[Sequence[str]], names: list[str]) -> Iterator[Sequence[str]]:
    if isinstance(sampler, str):
        if sampler not in ("turn", "all"):
            raise InputError(f"sampler is 'turn', 'all' or an iterable of lists of tasks, got {sampler!r}")
        return cycle([[name] for name in names]) if sampler == "turn" else repeat(names)
    return iter(sampler)


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
    optimiser: Callable[[list[dict]], torch.optim.Optimizer] | None = None,
    sampler: str | Iterable[Sequence[str]] = "turn",
    update: Update | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Train in place, by default with AdamW and one task a step in turn.

    Args:
        model: called as `model(inputs, task)`.
        suite: the tasks; their `train` splits and losses are used. One task: fine-tuning. Several:
            joint training, each task every `len(suite)` steps.
        steps: optimiser steps in all.
        lr: learning rate.
        batch_size: examples of each task in a step.
        weight_decay: decoupled, as in AdamW.
        schedule: `constant`, or `cosine` to zero.
        seed: order of the examples. Dropout, if the model has any, follows torch's global generator,
            which is seeded inside a fork and so left as it was.
        parameters: what to train. Default: all that require gradients.
        optimiser: parameter groups -> optimiser; `lr` and `weight_decay` are in the groups. Default: AdamW.
        sampler: the tasks of each step: `turn` for one after the other, `all` for every task in every step, or an
            iterable that yields a list of names for each step (`data.unmixed`).
        update: how the step's losses become one gradient. Default: the optimiser, if it is an update itself
            (`multitask.MTAdamW`), otherwise their sum. An update that is a module has its own parameters trained
            beside the model's, without weight decay.
        progress: called with (steps done, steps).

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: for an unknown schedule, sampler or task, or a loss that is not finite (with its task and step).
    """
    if schedule not in ("constant", "cosine"):
        raise InputError(f"schedule is 'constant' or 'cosine', got {schedule!r}")
    trained = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    device = next(model.parameters()).device
    groups: list[dict] = [{"params": trained, "lr": lr, "weight_decay": weight_decay}]
    if isinstance(update, nn.Module) and (own := list(update.to(device).parameters())):
        groups.append({"params": own, "lr": lr, "weight_decay": 0.0})
    optim = torch.optim.AdamW(groups, foreach=True) if optimiser is None else optimiser(groups)
    streams = {
        name: iter(Batches(task.train, batch_size, seed=seed + i, endless=True))
        for i, (name, task) in enumerate(suite.items())
    }
    sampled = _sampled(sampler, list(suite))
    combine = update if update is not None else optim if callable(optim) else _sum
    stepped = getattr(combine, "stepped", None)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            if schedule == "cosine":
                for group in optim.param_groups:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            tasks = next(sampled)
            batches = {name: to_device(next(streams[name]), device) for name in suite.only(list(tasks))}

            def losses(names: Sequence[str], batches: dict = batches) -> dict[str, Tensor]:
                return {name: suite[name].loss(model(batches[name][0], name), batches[name][1]) for name in names}

            optim.zero_grad()
            for name, loss in combine(losses, tasks).items():
                if not torch.isfinite(loss):
                    raise InputError(
                        f"the loss of task {name!r} is {loss.item()} at step {step}; lower the learning rate"
                    )
            optim.step()
            if stepped is not None:
                stepped()
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
