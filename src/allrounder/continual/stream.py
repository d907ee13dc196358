"""Streams: tasks that come one after another, and what a learner is told about them.

A `Stream` is a sequence of `Experience`s over one input and one output space. What it offers says what a learner may
rely on; a learner that needs more is refused before training:

- `boundaries`: the learner is told when a task begins and ends, and may go through its data again;
- `task_id_train`, `task_id_predict`: the number of the task comes with every batch, in training or at test;
- `class_list`: the learner is told which outputs the task has before it sees an example.

Scenarios (van de Ven and Tolias, 2019): *class-incremental* (new outputs, no id at test), *domain-incremental* (the
same outputs, other inputs), *task-incremental* (the id is given at test). `hide` takes offers away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..task import Examples, Suite, Task

__all__ = ["OFFERS", "Experience", "Stream", "average_precision", "hide", "in_sequence", "permuted", "revisit",
           "split_by_class"]  # fmt: skip

OFFERS = frozenset({"boundaries", "task_id_train", "task_id_predict", "class_list"})


@dataclass(frozen=True)
class Experience:
    """What comes between two boundaries.

    Args:
        name: of the task.
        train, validation, test: its examples; targets are outputs of the stream, `(N,)`, or `(N, outputs)` of 0 and 1.
        task: number of the task; later visits of a task have the same number.
        classes: outputs that occur in it.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    task: int
    classes: tuple[int, ...]


class Stream(Sequence[Experience]):
    """Experiences in their order.

    Args:
        experiences: at least one.
        outputs: size of the output space.
        offers: what learners may rely on; a subset of `OFFERS`.
        name: for reports.

    Attributes:
        tasks: the first experience of each task, in order of first appearance.
        multi_label: whether targets are `(N, outputs)` of 0 and 1.

    Raises:
        InputError: no experiences, an empty split, unknown offers, a target outside the outputs or the task's classes,
            a task that appears again with other classes, or experiences of both label kinds.
    """

    def __init__(
        self, experiences: Iterable[Experience], *, outputs: int, offers: Iterable[str] = OFFERS, name: str = "stream"
    ) -> None:
        self._experiences = _aligned(tuple(experiences))
        self.outputs, self.offers, self.name = outputs, frozenset(offers), name
        if not self._experiences:
            raise InputError("a stream needs at least one experience")
        if unknown := sorted(self.offers - OFFERS):
            raise InputError(f"a stream can offer {', '.join(sorted(OFFERS))}, got {unknown[0]!r}")
        self.multi_label = self._experiences[0].train.targets.ndim == 2
        first: dict[int, Experience] = {}
        for experience in self._experiences:
            self._check(experience)
            known = first.setdefault(experience.task, experience)
            if known.classes != experience.classes:
                raise InputError(
                    f"task {experience.task} came with the classes {list(known.classes)} and comes again as "
                    f"{experience.name!r} with {list(experience.classes)}; give it another number"
                )
        self.tasks = tuple(first.values())

    def _check(self, experience: Experience) -> None:
        for split in ("train", "validation", "test"):
            targets = getattr(experience, split).targets
            if len(targets) == 0:
                raise InputError(f"experience {experience.name!r} has no {split} examples")
            if (targets.ndim == 2) != self.multi_label:
                raise InputError(
                    f"experience {experience.name!r} has targets of {targets.ndim} axes, the first has not"
                )
            if self.multi_label and targets.shape[1] != self.outputs:
                raise InputError(
                    f"experience {experience.name!r} has {targets.shape[1]} labels for {self.outputs} outputs"
                )
            if not self.multi_label and not set(targets.unique().tolist()) <= set(experience.classes):
                odd = sorted(set(targets.unique().tolist()) - set(experience.classes))
                raise InputError(f"experience {experience.name!r} has the target {odd[0]}, which is not in its classes")
        if odd := [number for number in experience.classes if not 0 <= number < self.outputs]:
            raise InputError(
                f"experience {experience.name!r} has class {odd[0]}; outputs run from 0 to {self.outputs - 1}"
            )

    def __len__(self) -> int:
        return len(self._experiences)

    def __getitem__(self, index: int) -> Experience:  # type: ignore[override]
        return self._experiences[index]

    def row_of(self, task: int) -> int:
        """Index of the first experience of a task."""
        return next(i for i, experience in enumerate(self._experiences) if experience.task == task)


def _aligned(experiences: tuple[Experience, ...]) -> tuple[Experience, ...]:
    """The same, with columns `(N, T, ...)` padded to one T, so that examples of different tasks fit into one batch.

    A split that several experiences share is padded once and stays shared; one that is long enough stays what it is.
    """
    splits = ("train", "validation", "test")
    parts = [getattr(item, split) for item in experiences for split in splits]
    if not parts or not isinstance(parts[0].inputs, Mapping):
        return experiences
    longest = {
        key: max(part.inputs[key].shape[1] for part in parts)
        for key, column in parts[0].inputs.items()
        if column.ndim >= 2
    }

    made: dict[int, Examples] = {}

    def padded(part: Examples) -> Examples:
        columns: dict[str, Tensor] = part.inputs  # type: ignore[assignment]
        if all(columns[key].shape[1] == length for key, length in longest.items()):
            return part
        if id(part) not in made:
            inputs = {
                key: F.pad(column, (0, 0) * (column.ndim - 2) + (0, longest[key] - column.shape[1]))
                if key in longest
                else column
                for key, column in columns.items()
            }
            made[id(part)] = Examples(inputs, part.targets)
        return made[id(part)]

    return tuple(replace(item, **{split: padded(getattr(item, split)) for split in splits}) for item in experiences)


def _part(examples: Examples, rows: Tensor, targets: Tensor | None = None) -> Examples:
    inputs, own = examples[rows]
    return Examples(inputs, own if targets is None else targets)


def _labels(task: Task) -> dict[str, Tensor]:
    found = {}
    for split in ("train", "validation", "test"):
        examples = task.split(split)
        if not isinstance(examples, Examples):
            raise InputError(f"task {task.name!r} needs Examples (tensors in memory) to be split")
        found[split] = examples.targets
    return found


def split_by_class(
    task: Task, groups: int | Sequence[Sequence[int]], *, seed: int | None = None, names: Sequence[str] | None = None
) -> Stream:
    """A task with C classes as a class-incremental stream: a group of classes after another.

    Args:
        task: single-label.
        groups: how many classes each experience has (the last may have fewer), or the groups themselves.
        seed: order of the classes where `groups` is a number; `None` for 0, 1, 2, ...
        names: of the experiences.

    Raises:
        InputError: a class in two groups or in none of the task's.
    """
    labels = _labels(task)
    if isinstance(groups, int):
        if groups < 1:
            raise InputError(f"an experience has at least one class, got groups={groups}")
        order = torch.arange(task.outputs)
        if seed is not None:
            order = torch.randperm(task.outputs, generator=torch.Generator().manual_seed(seed))
        groups = [part.tolist() for part in order.split(groups)]
    flat = [number for group in groups for number in group]
    if len(set(flat)) != len(flat):
        doubled = next(number for number in flat if flat.count(number) > 1)
        raise InputError(f"class {doubled} is in two groups; a class-incremental stream shows each class once")
    experiences = []
    for index, group in enumerate(groups):
        rows = {
            split: torch.isin(targets, torch.tensor(group)).nonzero().flatten() for split, targets in labels.items()
        }
        parts = {split: _part(task.split(split), chosen) for split, chosen in rows.items()}  # type: ignore[arg-type]
        name = names[index] if names else f"{task.name}-{index}"
        experiences.append(Experience(name, **parts, task=index, classes=tuple(sorted(group))))
    offers = OFFERS - {"task_id_predict"}
    return Stream(experiences, outputs=task.outputs, offers=offers, name=f"{task.name} split by class")


def permuted(task: Task, count: int, *, seed: int = 0) -> Stream:
    """A task as a domain-incremental stream: the same classes, the inputs' entries in another order each time.

    Args:
        task: with tensor inputs, all entries of which are permuted together. The first experience is the task itself.
        count: experiences.
        seed: of the permutations.
    """
    if count < 1:
        raise InputError(f"a stream needs at least one experience, got count={count}")
    labels, generator = _labels(task), torch.Generator().manual_seed(seed)
    classes = tuple(range(task.outputs))
    if labels["train"].ndim == 1:
        classes = tuple(sorted({int(number) for number in labels["train"].unique()}))
    if not isinstance(task.train.inputs, Tensor):  # type: ignore[attr-defined]
        raise InputError(f"task {task.name!r} has inputs of several columns; entries of one tensor can be permuted")
    experiences = []
    for index in range(count):
        parts = {}
        for split in labels:
            inputs = task.split(split).inputs  # type: ignore[attr-defined]
            if index == 0:
                order = torch.arange(inputs[0].numel())
            elif split == "train":
                order = torch.randperm(inputs[0].numel(), generator=generator)
            parts[split] = Examples(inputs.flatten(1)[:, order].view_as(inputs), labels[split])
        experiences.append(Experience(f"{task.name}-order-{index}", **parts, task=index, classes=classes))
    offers = OFFERS - {"task_id_predict"}
    return Stream(experiences, outputs=task.outputs, offers=offers, name=f"{task.name}, {count} permutations")


def in_sequence(suite: Suite, *, scenario: str = "class", order: Sequence[str] | None = None) -> Stream:
    """The tasks of a suite one after another.

    Args:
        suite: tasks over one input space.
        scenario: `class`: every task has outputs of its own and the id is not given at test; `task`: the same, and the
            id is given; `domain`: the tasks share outputs, of which there must be equally many.
        order: names of tasks. Default: the suite's.
    """
    if scenario not in ("class", "task", "domain"):
        raise InputError(f"scenario is 'class', 'task' or 'domain', got {scenario!r}")
    tasks = list((suite if order is None else suite.only(list(order))).values())
    if scenario == "domain" and len({task.outputs for task in tasks}) > 1:
        raise InputError("tasks that share their outputs must have equally many; use scenario='class'")
    experiences, start = [], 0
    for index, task in enumerate(tasks):
        parts = {
            split: Examples(task.split(split).inputs, targets + start)  # type: ignore[attr-defined]
            for split, targets in _labels(task).items()
        }
        experiences.append(
            Experience(task.name, **parts, task=index, classes=tuple(range(start, start + task.outputs)))
        )
        start += 0 if scenario == "domain" else task.outputs
    outputs = tasks[0].outputs if scenario == "domain" else start
    offers = OFFERS if scenario == "task" else OFFERS - {"task_id_predict"}
    return Stream(experiences, outputs=outputs, offers=offers, name=f"{suite.name}, {scenario}-incremental")


def revisit(stream: Stream, order: Sequence[int]) -> Stream:
    """Tasks of a stream in another order, with returns: `revisit(stream, [0, 1, 0, 2])`."""
    if odd := [index for index in order if not 0 <= index < len(stream.tasks)]:
        raise InputError(f"the stream has the tasks 0 to {len(stream.tasks) - 1}, got {odd[0]}")
    return Stream(
        [stream.tasks[index] for index in order],
        outputs=stream.outputs,
        offers=stream.offers,
        name=f"{stream.name}, revisited",
    )


def hide(stream: Stream, *offers: str) -> Stream:
    """The same stream, which does not offer these: `hide(stream, "boundaries", "task_id_train", "class_list")`."""
    if unknown := sorted(set(offers) - OFFERS):
        raise InputError(f"a stream can hide {', '.join(sorted(OFFERS))}, got {unknown[0]!r}")
    return Stream(stream, outputs=stream.outputs, offers=stream.offers - set(offers), name=stream.name)


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over classes of the average precision, `nan` for a class without positives left out; 0 to 1.

    Args:
        scores: `(N, C)`, higher for more likely.
        targets: `(N, C)` of 0 and 1.

    Returns:
        `nan` when no class has a positive.
    """
    from sklearn.metrics import average_precision_score

    usable = [c for c in range(targets.shape[1]) if targets[:, c].any()]
    if not usable:
        return float("nan")
    found = [average_precision_score(targets[:, c].numpy(), scores[:, c].float().numpy()) for c in usable]
    return float(fmean(found))
