"""Tasks and suites: what a model is asked to do, and the examples to train, choose and judge it with.

A `Task` is a name, three splits, a loss and a metric. A `Suite` is an ordered mapping from names to
tasks over one input space. A split is any map-style `torch.utils.data.Dataset` of `(input, target)`;
`Examples` is the one that holds tensors in memory and is indexed in whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from .errors import InputError

__all__ = ["Batches", "Examples", "Suite", "Task", "accuracy", "to_device"]

Inputs = Tensor | dict[str, Tensor]
TAKEN = nn.ModuleDict()  # whose attributes no task can have as its name


class Examples(Dataset):
    """Inputs and targets in memory.

    Args:
        inputs: tensor `(N, ...)`, or a dict of such tensors (tokenised text: `input_ids`,
            `attention_mask`), all with the same N.
        targets: tensor `(N, ...)`.

    Raises:
        InputError: when the lengths differ.
    """

    def __init__(self, inputs: Inputs, targets: Tensor) -> None:
        columns = inputs.values() if isinstance(inputs, Mapping) else [inputs]
        lengths = {len(column) for column in columns} | {len(targets)}
        if len(lengths) != 1:
            raise InputError(f"inputs and targets must have one length, got {sorted(lengths)}")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> tuple[Inputs, Tensor]:
        """One example for an int; a batch for a slice or an index tensor."""
        if isinstance(self.inputs, Mapping):
            return {key: column[index] for key, column in self.inputs.items()}, self.targets[index]
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Inputs, Tensor]:
        return self[torch.as_tensor(indices)]

    def take(self, count: int, *, seed: int = 0) -> Examples:
        """At most `count` examples, drawn without replacement with `seed`."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return Examples(*self[order[:count]])


def _collate(batch: Any) -> Any:
    return default_collate(batch) if isinstance(batch, list) else batch


class Batches:
    """Batches of a split, in order or shuffled; may be iterated again and again.

    Args:
        dataset: a split of a task.
        size: examples a batch; the last one may be smaller unless `endless`.
        seed: shuffle with this seed (another order each time round); `None` keeps the order.
        endless: go round for ever, dropping incomplete batches (unless the split is smaller than
            one batch).
    """

    def __init__(self, dataset: Dataset, size: int, *, seed: int | None = None, endless: bool = False) -> None:
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise InputError("a split with no examples gives no batches")
        if size < 1:
            raise InputError(f"a batch needs at least one example, got size={size}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        sampler = None if generator is None else RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
        drop = endless and len(dataset) >= size  # type: ignore[arg-type]
        self.endless = endless
        self.loader = DataLoader(dataset, size, sampler=sampler, collate_fn=_collate, drop_last=drop)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        yield from self.loader
        while self.endless:
            yield from self.loader


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The same nest of tuples, lists and dicts with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows of `outputs` `(N, C)` whose largest entry is at `targets` `(N,)`; 0 to 1.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    0.5
    """
    return (outputs.argmax(-1) == targets).double().mean().item()


@dataclass(frozen=True)
class Task:
    """One thing a model must do.

    Args:
        name: short; letters, digits, `_`, `-`, `/` (it becomes a module and file name).
        train, validation, test: disjoint splits. Validation is for choosing, test for reporting.
        outputs: number of outputs (classes).
        loss: `(outputs, targets) -> scalar`, mean over the batch. Default: cross-entropy.
        metric: `(all outputs, all targets) -> float`, higher is better, or a metric of torchmetrics. Default: accuracy.
        classes: names of the outputs, where they have names.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: Callable[[Tensor, Tensor], float] = accuracy
    classes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "_-/" for letter in self.name):
            raise InputError(f"a task's name takes letters, digits, '_', '-' and '/', got {self.name!r}")
        if hasattr(TAKEN, self.name):
            raise InputError(f"a task cannot be called {self.name!r}, which names a part of every module; rename it")
        if self.classes and len(self.classes) != self.outputs:
            raise InputError(f"task {self.name!r} names {len(self.classes)} classes for {self.outputs} outputs")

    def split(self, name: str) -> Dataset:
        """The split called `train`, `validation` or `test`."""
        if name not in ("train", "validation", "test"):
            raise InputError(f"a split is 'train', 'validation' or 'test', got {name!r}")
        return getattr(self, name)


class Suite(Mapping[str, Task]):
    """An ordered, read-only mapping from names to tasks that share one input space.

    >>> split = Examples(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    >>> suite = Suite([Task("a", split, split, split, outputs=2)], name="toy")
    >>> list(suite), suite["a"].outputs
    (['a'], 2)
    """

    def __init__(self, tasks: list[Task], *, name: str = "suite") -> None:
        names = [task.name for task in tasks]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise InputError(f"task names must differ, got {', '.join(doubled)} more than once")
        self.name = name
        self._tasks = {task.name: task for task in tasks}

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def only(self, names: list[str]) -> Suite:
        """The suite of these tasks, in this order."""
        missing = [name for name in names if name not in self]
        if missing:
            raise InputError(f"suite {self.name!r} has no task {missing[0]!r}; it has {', '.join(self)}")
        return Suite([self[name] for name in names], name=self.name)
