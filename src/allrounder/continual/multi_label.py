"""Multi-label streams: examples that show several things, tasks that label only their own.

- `split_by_label` makes a class-incremental stream of one multi-label task: in training, labels of other tasks are
  hidden (0, whether the thing is there or not); validation and test carry all true labels, and a task is scored on its
  own columns over all images, by mean average precision.
- `glyph_grids` is such a task without download: grids of letters from several writing systems.
- `MultiLabelLwF` is learning without forgetting for such targets, to compare with.

The hidden labels are what makes these streams hard: a learner that takes 0 for "absent" is taught that old classes are
not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.scripts import scripts
from ..errors import InputError
from ..nets.calling import evaluating
from ..task import Examples, Task
from .learner import Batch, TaskInfo
from .regularisers import LwF
from .stream import OFFERS, Experience, Stream, average_precision

__all__ = ["MultiLabelLwF", "glyph_grids", "split_by_label"]

CELL = 28


def split_by_label(
    task: Task,
    groups: int | Sequence[Sequence[int]],
    *,
    images: str = "labelled",
    seed: int | None = None,
    names: Sequence[str] | None = None,
) -> Stream:
    """A multi-label task with C labels as a class-incremental stream: a group of labels after another.

    Args:
        task: targets `(N, C)` of 0 and 1 in all splits.
        groups: how many labels each experience has (the last may have fewer), or the groups themselves.
        images: which training images a task has. `labelled`: those with at least one of its labels, so that an image
            may come again with another task (the field's way). `divided`: each image belongs to one task, by chance.
        seed: order of the labels where `groups` is a number (`None` for 0, 1, 2, ...), and of the division.
        names: of the experiences.

    Raises:
        InputError: targets of another kind, a label in two groups or outside the task's, a group without an example.

    >>> targets = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0]])
    >>> split = Examples(torch.zeros(3, 2), targets)
    >>> stream = split_by_label(Task("toy", split, split, split, outputs=3), [[0, 1], [2]])
    >>> stream[1].train.targets.tolist()
    [[0, 0, 1]]
    """
    if images not in ("labelled", "divided"):
        raise InputError(f"images is 'labelled' or 'divided', got {images!r}")
    splits = {name: _multi_hot(task, name) for name in ("train", "validation", "test")}
    generator = torch.Generator().manual_seed(seed or 0)
    if isinstance(groups, int):
        if groups < 1:
            raise InputError(f"an experience needs at least one label, got groups={groups}")
        order = torch.arange(task.outputs) if seed is None else torch.randperm(task.outputs, generator=generator)
        groups = [part.tolist() for part in order.split(groups)]
    if not groups:
        raise InputError("groups is empty: give how many labels each experience has, or the groups")
    flat = [number for group in groups for number in group]
    if len(set(flat)) != len(flat):
        doubled = next(number for number in flat if flat.count(number) > 1)
        raise InputError(f"label {doubled} is in two groups; which task would score it?")
    if odd := [number for number in flat if not 0 <= number < task.outputs]:
        raise InputError(f"label {odd[0]} is in a group; task {task.name!r} has the labels 0 to {task.outputs - 1}")
    train, experiences = splits["train"], []
    shares = torch.randperm(len(train), generator=generator).tensor_split(len(groups))
    for index, group in enumerate(groups):
        mine = torch.zeros(task.outputs, dtype=torch.bool)
        mine[list(group)] = True
        labelled = train.targets[:, mine].bool().any(1)
        rows = labelled.nonzero().flatten() if images == "labelled" else shares[index].sort().values
        if not len(rows) or not labelled[rows].any():
            raise InputError(f"no training example has one of the labels {sorted(group)}; leave the group out")
        inputs, targets = train[rows]
        shown = Examples(inputs, targets.masked_fill(~mine, 0))
        name = names[index] if names else f"{task.name}-{index}"
        experiences.append(
            Experience(name, shown, splits["validation"], splits["test"], task=index, classes=tuple(sorted(group)))
        )
    return Stream(
        experiences, outputs=task.outputs, offers=OFFERS - {"task_id_predict"}, name=f"{task.name} split by label"
    )


def _multi_hot(task: Task, split: str) -> Examples:
    examples = task.split(split)
    if not isinstance(examples, Examples):
        raise InputError(f"task {task.name!r} needs Examples (tensors in memory) to be split")
    targets = examples.targets
    if targets.ndim != 2 or targets.shape[1] != task.outputs or not ((targets == 0) | (targets == 1)).all():
        raise InputError(
            f"task {task.name!r} needs {split} targets (N, {task.outputs}) of 0 and 1, got {tuple(targets.shape)}; for "
            "one class an example use split_by_class"
        )
    return examples


def _grids(
    pools: Sequence[Examples], letters: Sequence[int], count: int, side: int, blank: float, generator: torch.Generator
) -> Examples:
    """`count` pictures of side x side cells, each empty or with one glyph; all letters equally likely."""
    cells, total = count * side * side, sum(letters)
    label = torch.randint(total, (cells,), generator=generator)
    filled = torch.rand(cells, generator=generator) >= blank
    filled.view(count, -1)[:, 0] |= ~filled.view(count, -1).any(1)  # no empty picture
    pictures = torch.zeros(cells, CELL, CELL)
    start = 0
    for pool, number in zip(pools, letters, strict=True):
        for letter in range(number):
            places = ((label == start + letter) & filled).nonzero().flatten()
            drawn = (pool.targets == letter).nonzero().flatten()
            pick = torch.randint(len(drawn), (len(places),), generator=generator)
            pictures[places] = pool.inputs[drawn[pick], 0]  # type: ignore[index]
        start += number
    targets = torch.zeros(count, total)
    image = torch.arange(cells) // (side * side)
    targets[image[filled], label[filled]] = 1
    images = pictures.view(count, side, side, CELL, CELL).transpose(2, 3).reshape(count, 1, side * CELL, side * CELL)
    return Examples(images, targets)


def glyph_grids(
    *,
    seed: int = 0,
    train: int = 2000,
    validation: int = 400,
    test: int = 1000,
    systems: Sequence[str] = ("digits", "latin", "armenian", "georgian", "arabic", "arrows"),
    letters: int = 5,
    side: int = 2,
    blank: float = 0.25,
    glyphs: int = 1200,
) -> Task:
    """Pictures with several glyphs, and which letters are on them. Test glyphs are from fonts held out of training.

    Args:
        seed: of glyphs and grids.
        train, validation, test: pictures.
        systems: writing systems of `data.scripts`; their labels follow each other, so that
            `split_by_label(task, letters)` has a task for each. Latin, Greek and Cyrillic share drawings (a, o): take
            one of them.
        letters: the first so many letters of each.
        side: glyphs in a row and in a column; a picture is `28 side` pixels wide. A place is empty with probability
            `blank`, but never all of them.
        glyphs: drawings made of each writing system for a split; pictures share them.

    Returns:
        A task with inputs `(N, 1, 28 side, 28 side)` in [0, 1], targets `(N, systems x letters)` of 0 and 1 (float),
        binary cross-entropy as its loss and mean average precision as its metric.

    Raises:
        InputError: for an unknown system or one twice, and for settings outside their range.

    >>> task = glyph_grids(train=8, validation=4, test=4, systems=["digits", "latin"], glyphs=60)
    >>> task.train.inputs.shape, task.train.targets.shape, task.classes[3:7]
    (torch.Size([8, 1, 56, 56]), torch.Size([8, 10]), ('3', '4', 'a', 'b'))
    """
    if letters < 1 or side < 1 or not 0 <= blank < 1 or min(train, validation, test) < 1:
        raise InputError(
            f"letters, side and the splits are at least 1 and blank is in [0, 1), got {letters}, {side}, {train}, "
            f"{validation}, {test} and {blank:g}"
        )
    if not systems or len(set(systems)) != len(systems):
        raise InputError(f"systems must differ, at least one, got {list(systems)}")
    suite = scripts(seed=seed, train=glyphs, validation=glyphs, test=glyphs).only(list(systems))
    for name, task in suite.items():
        if letters > task.outputs or glyphs < task.outputs:
            raise InputError(f"{name!r} has {task.outputs} letters: at most so many letters, at least so many glyphs")
    names = [name for task in suite.values() for name in task.classes[:letters]]
    generator = torch.Generator().manual_seed(10_007 * seed + 1)
    splits = [
        _grids(
            [task.split(split) for task in suite.values()],  # type: ignore[misc]
            [letters] * len(suite), count, side, blank, generator,
        )
        for split, count in (("train", train), ("validation", validation), ("test", test))
    ]  # fmt: skip
    return Task(
        "glyph-grids", *splits, outputs=len(names), classes=tuple(names),
        loss=F.binary_cross_entropy_with_logits, metric=average_precision,
    )  # fmt: skip


class MultiLabelLwF(LwF):
    """Learning without forgetting for multi-label targets: on classes known before the task, the target is what the
    model before the task answers, instead of the hidden labels' 0.

    `BCE(z_new, y) + strength BCE(z_known, sigmoid(z_old))`, each a mean over its classes. No temperature: answers are
    probabilities of single classes.

    Args:
        model: `inputs -> logits (B, outputs)`.
        outputs: size of the output space.
        strength: of the second term, >= 0.
        options: as for `GradientLearner`, but for `mask`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundaries", "class_list"})
    labels: ClassVar[frozenset[str]] = frozenset({"multi"})

    def begin_task(self, info: TaskInfo) -> None:
        super().begin_task(info)
        self.known[self.task_classes or []] = False  # of a task that comes again the labels are shown

    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch.inputs, batch.targets)
        known = self.known.to(logits.device)
        loss = F.binary_cross_entropy_with_logits(logits[:, ~known], batch.targets[:, ~known].to(logits))
        if not known.any() or not self.strength:
            return loss
        with torch.no_grad(), evaluating(self.teacher):
            old = self.teacher(batch.inputs)[:, known].sigmoid()
        return loss + self.strength * F.binary_cross_entropy_with_logits(logits[:, known], old)
