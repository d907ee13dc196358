"""Power-law rehearsal: old tasks come back with a probability that falls as a power of the time since they were seen.

An environment, not a learner: in phase t a learner sees `new` examples of task t and `rehearsed` examples of the tasks
before it, shared by lag d = t - j as

    power        w(d) = d^(-alpha) / sum_i i^(-alpha)         exponential  w(d) ~ exp(-alpha d)
    uniform      w(d) = 1 / (t - 1)                           recency      w(1) = 1

The power law has no scale: `w(d) / w(c d)` is the same for every d, and old tasks keep a share where an exponential has
forgotten them. In human environments the odds that something is needed again fall like this, with alpha near 1.

Use it to ask what a learner forgets when the world repeats itself, or as a schedule for rehearsal from stored data:
with alpha > 1 the work of `rehearsal_counts` per phase stays bounded as tasks grow in number. At few tasks and equal
budgets uniform rehearsal keeps more on average; the power law forgets by age, gracefully, and beats thin tails.

Cost: `new + rehearsed` examples a phase; drawing is O(1) an example; the examples are views of the tasks' data, and all
tasks' data must be there.

Paper: Gandhi, Shah, Marupudi and Varma, "Natural Mitigation of Catastrophic Interference: Continual Learning in
Power-Law Learning Environments", 2024, arXiv 2401.10393 (v1 and v2: "Catastrophic Interference is Mitigated in
Naturalistic Power-Law Learning Environments"). The shares are reconstructed from the law as stated; the paper's own
constants are not known here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..task import Examples
from .stream import Stream

__all__ = ["power_law", "rehearsal_counts", "rehearsal_shares"]

Law = Literal["power", "exponential", "uniform", "recency"]


def rehearsal_shares(lags: Tensor | Sequence[float], law: Law = "power", alpha: float = 1.0) -> Tensor:
    """The share of each earlier task in what is rehearsed.

    Args:
        lags: `(tasks,)` phases since each was last seen, at least 1.
        law: `power`, `exponential`, `uniform` or `recency` (only those with the least lag).
        alpha: exponent of the power law or rate of the exponential, >= 0. About 1 in human data.

    Returns:
        `(tasks,)` float64, sum 1.

    Raises:
        InputError: a negative alpha (old tasks more often than new ones), a lag below 1, an unknown law.

    >>> rehearsal_shares([1, 2, 4]) * 7
    tensor([4., 2., 1.], dtype=torch.float64)
    """
    lags = torch.as_tensor(lags, dtype=torch.float64)
    if law not in ("power", "exponential", "uniform", "recency"):
        raise InputError(f"law is 'power', 'exponential', 'uniform' or 'recency', got {law!r}")
    if not 0 <= alpha < float("inf"):
        raise InputError(f"alpha is how fast old tasks fade, at least 0, got {alpha:g}")
    if lags.numel() == 0 or not (lags >= 1).all():
        raise InputError("lags are phases since a task was last seen, at least one of them and each at least 1")
    if law == "recency":
        odds = (lags == lags.min()).double()
    elif law == "uniform":
        odds = torch.ones_like(lags)
    else:
        odds = -alpha * (lags.log() if law == "power" else lags)
        odds = (odds - odds.max()).exp()
    return odds / odds.sum()


def rehearsal_counts(tasks: int, new: int, alpha: float = 1.0) -> list[int]:
    """Examples of each task in phase `tasks`, `round(new (lag + 1)^(-alpha))`: the form whose total may grow.

    The total is `new` times a generalised harmonic number: bounded in `tasks` only for alpha > 1. Old tasks are rounded
    to nothing once `(lag + 1)^alpha > 2 new`.

    Returns:
        Counts of task 0, 1, ..., `tasks - 1`; the last is `new`.

    >>> rehearsal_counts(4, 100)
    [25, 33, 50, 100]
    """
    if tasks < 1 or new < 1 or alpha < 0:
        raise InputError(f"tasks and new are at least 1 and alpha at least 0, got {tasks}, {new} and {alpha:g}")
    return [round(new * (tasks - task) ** -alpha) for task in range(tasks)]


def power_law(
    stream: Stream,
    *,
    new: int,
    rehearsed: int,
    law: Law = "power",
    alpha: float = 1.0,
    clock: Literal["introduced", "last_seen"] = "introduced",
    order: Literal["interleaved", "blocked"] = "interleaved",
    seed: int = 0,
) -> Stream:
    """A stream in which earlier tasks come back.

    Args:
        stream: the tasks, each once; phase t introduces the t-th.
        new: examples of the new task in a phase, >= 1, drawn without repetition while the task has enough.
        rehearsed: examples of earlier tasks in every phase but the first, >= 0.
        law, alpha: how they are shared, as in `rehearsal_shares`.
        clock: lags since a task was introduced, or since it was last drawn: then a drawn task becomes fresh again, and
            drawing is one example after another.
        order: mix all examples of a phase, or show the new task's first. `blocked` reaches the learner as it is only
            when the driver keeps the order (`learn(..., shuffle=False)`).
        seed: of everything drawn.

    Returns:
        Phases named as the tasks they introduce; validation and test are the new task's. Boundaries
        are all that is offered: a phase holds several tasks. All phases but the first have `new + rehearsed` examples.

    Raises:
        InputError: a stream in which tasks come back already, multi-label tasks with labels of their own (a phase is
            scored on the labels that occur in it, so on those of other tasks too), or counts out of range.
    """
    if len(stream.tasks) != len(stream):
        raise InputError("power_law makes tasks come back; give a stream in which each comes once")
    if stream.multi_label and len({task.classes for task in stream.tasks}) > 1:
        raise InputError("power_law needs multi-label tasks to share their labels; these have labels of their own")
    if new < 1 or rehearsed < 0:
        raise InputError(f"new is at least 1 and rehearsed at least 0, got {new} and {rehearsed}")
    if clock not in ("introduced", "last_seen") or order not in ("interleaved", "blocked"):
        raise InputError(
            f"clock is 'introduced' or 'last_seen' and order 'interleaved' or 'blocked', got {clock!r} and {order!r}"
        )
    generator = torch.Generator().manual_seed(seed)
    phases, last_seen = [], torch.zeros(len(stream), dtype=torch.float64)
    for phase, experience in enumerate(stream):
        drawn = [(phase, _rows(len(experience.train), new, generator))]
        if phase and rehearsed:
            drawn += _old(stream, phase, rehearsed, law, alpha, last_seen if clock == "last_seen" else None, generator)
        for task, _ in drawn:
            last_seen[task] = phase
        parts = [stream[task].train[rows] for task, rows in drawn]
        targets = torch.cat([part[1] for part in parts])
        mix = (
            torch.randperm(len(targets), generator=generator) if order == "interleaved" else torch.arange(len(targets))
        )
        train = Examples(_cat([part[0] for part in parts], mix), targets[mix])
        classes = tuple(sorted({number for task in stream.tasks[: phase + 1] for number in task.classes}))
        phases.append(replace(experience, train=train, classes=classes, task=phase))
    title = f"{law} rehearsal" + (f", alpha {alpha:g}" if law in ("power", "exponential") else "")
    offers = stream.offers & {"boundaries"}
    return Stream(phases, outputs=stream.outputs, offers=offers, name=f"{stream.name}, {title}, {rehearsed} of {new}")


def _rows(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, each once more only when all were drawn."""
    if count > size:
        warnings.warn(f"a phase asks for {count} examples of a task that has {size}: some are repeated", stacklevel=4)
    rounds = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat(rounds)[:count] if rounds else torch.empty(0, dtype=torch.long)


def _old(
    stream: Stream, phase: int, count: int, law: Law, alpha: float, last_seen: Tensor | None, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    if last_seen is None:
        shares = rehearsal_shares(phase - torch.arange(phase), law, alpha)
        chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
    else:
        drawn = []
        for _ in range(count):
            shares = rehearsal_shares(phase - last_seen[:phase], law, alpha)
            task = int(torch.multinomial(shares, 1, generator=generator))
            last_seen[task] = phase - 1
            drawn.append(task)
        chosen = torch.tensor(drawn)
    counts = torch.bincount(chosen, minlength=phase).tolist()
    return [(task, _rows(len(stream[task].train), n, generator)) for task, n in enumerate(counts) if n]


def _cat(parts: list[Any], mix: Tensor) -> Any:
    if isinstance(parts[0], dict):
        return {key: torch.cat([part[key] for part in parts])[mix] for key in parts[0]}
    return torch.cat(parts)[mix]
