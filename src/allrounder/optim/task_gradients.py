"""Gradients of several tasks: one row for each task, and which parameters tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Blocks", "Gradients", "Partition", "check_tasks", "gramian_of", "stacked", "task_gradients"]

Gradients = dict[str, list[Tensor | None]]
"""Task -> its gradient for each parameter, `None` where it does not reach it."""

Blocks = dict[int, Tensor]
"""Place of a parameter -> the gradients of all tasks `(K, *shape)`."""


def task_gradients(
    found: Mapping[str, Tensor], parameters: Sequence[Tensor], into: Mapping[str, Mapping[int, Tensor]] | None = None
) -> Gradients:
    """Each loss's gradient, `None` for frozen parameters too; the graphs are freed with the last.

    Args:
        found: task -> loss.
        parameters: whose gradients are wanted.
        into: task -> place -> memory to copy the gradient to, zeros where there is none.

    Raises:
        InputError: a loss without graph, or nothing to train.
    """
    tasks = list(found)
    for task, loss in found.items():
        if not loss.requires_grad:
            raise InputError(f"the loss of task {task!r} has no graph; is its head detached?")
    places = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
    live = [parameters[i] for i in places]
    if not live:
        raise InputError("every parameter of the model is frozen; set requires_grad on those to train")
    gradients: Gradients = {}
    for task in tasks:
        row = gradients[task] = [None] * len(parameters)
        made = torch.autograd.grad(found[task], live, retain_graph=task != tasks[-1], allow_unused=True)
        for i, gradient in zip(places, made, strict=True):
            row[i] = gradient
        if into is not None:
            _copy(row, into[task])
    return gradients


def _copy(row: list[Tensor | None], memory: Mapping[int, Tensor]) -> None:
    filled = [i for i in memory if row[i] is not None]
    for i in memory.keys() - set(filled):
        memory[i].zero_()
    if filled:
        torch._foreach_copy_([memory[i] for i in filled], [row[i] for i in filled])  # type: ignore[misc]
    for i in filled:
        row[i] = memory[i]


def stacked(gradients: Gradients, places: Iterable[int], known: Blocks | None = None) -> Blocks:
    """Gradients at some places, a row of zeros where a task has none. They are taken out of `gradients`, so that
    they are not held twice.

    Args:
        gradients: at least one task reaches each place.
        places: of parameters.
        known: blocks whose rows `gradients` were copied to.
    """
    blocks: Blocks = {}
    for i in places:
        if known is not None and i in known:
            blocks[i] = known[i]
        else:
            rows = [row[i] for row in gradients.values()]
            like = next(g for g in rows if g is not None)
            blocks[i] = torch.stack([torch.zeros_like(like) if g is None else g for g in rows])
        for row in gradients.values():
            row[i] = None
    return blocks


def gramian_of(blocks: Blocks, like: Tensor) -> Tensor:
    """`(K, K)` inner products over all blocks, in at least float32, one parameter at a time.

    Args:
        blocks: may be none.
        like: `(K,)`, on the device of the result.
    """
    dtype = torch.float32
    for block in blocks.values():
        dtype = torch.promote_types(dtype, block.dtype)
    gramian = torch.zeros(len(like), len(like), dtype=dtype, device=like.device)
    for block in blocks.values():
        rows = block.reshape(len(like), -1).to(dtype)
        gramian += (rows @ rows.T).to(gramian.device)
    return gramian


class Partition:
    """Which parameters tasks share, as far as steps have shown it."""

    def __init__(self, trained: Sequence[Tensor], shared: Iterable[Tensor] | None) -> None:
        known_ids = {id(parameter) for parameter in trained}
        self._given = None if shared is None else {id(parameter) for parameter in shared}
        if self._given is not None and not self._given <= known_ids:
            raise InputError("a parameter given as shared is not among those of the model")
        self._trained = trained
        self.reached: list[set[str]] = [set() for _ in trained]

    def state(self) -> list[list[str]]:
        """Tasks that reached each parameter so far, for a state dict."""
        return [sorted(tasks) for tasks in self.reached]

    def load(self, state: Sequence[Iterable[str]]) -> None:
        """What `state` gave.

        Raises:
            InputError: a state of another model.
        """
        if len(state) != len(self.reached):
            raise InputError(
                f"the state counts {len(state)} parameters and features and this update {len(self.reached)}; "
                "build both with the same model"
            )
        self.reached = [set(tasks) for tasks in state]

    def shared(self, gradients: Gradients) -> list[int]:
        """Places of the shared parameters that a task of this step reaches.

        Raises:
            InputError: a task that reaches none of them, a parameter given as own that two tasks reach.
        """
        for task, row in gradients.items():
            for i, gradient in enumerate(row):
                if gradient is not None:
                    self.reached[i].add(task)
        now = [i for i in range(len(self._trained)) if any(row[i] is not None for row in gradients.values())]
        if self._given is None:
            places = [i for i in now if len(self.reached[i]) > 1]
        else:
            places = [i for i in now if id(self._trained[i]) in self._given]
            for i in set(now) - set(places):
                if len(self.reached[i]) > 1:
                    raise InputError(
                        f"a parameter of shape {tuple(self._trained[i].shape)} is not given as shared, but the tasks "
                        f"{', '.join(sorted(self.reached[i]))} reach it"
                    )
        for task, row in gradients.items():
            if len(gradients) > 1 and not any(row[i] is not None for i in places):
                raise InputError(f"task {task!r} has no gradient on any shared parameter; is its head detached?")
        return places


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError for no tasks and for tasks named twice."""
    if not tasks or len(set(tasks)) != len(tasks):
        raise InputError(f"a step needs tasks with different names, got {list(tasks)}")
