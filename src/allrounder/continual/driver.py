"""The driver: a stream through a learner, and the matrix of accuracies that comes out.

It checks what the learner needs before training, evaluates after each experience on every task, and writes the
learner's state at boundaries: a run that was interrupted goes on from the last boundary with the same result.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..state import load_state, save_state
from ..task import Batches, Examples, to_device
from .learner import Batch, Learner, TaskInfo, check
from .measures import average_accuracy, backward_transfer, forgetting, forward_transfer, plasticity
from .stream import Experience, Stream, average_precision

__all__ = ["Record", "evaluate", "learn"]


@dataclass
class Record:
    """What happened.

    Args:
        tasks: names of the tasks, the columns.
        experiences: names of the experiences, the rows.
        first: row in which each task was first learned.
        matrix: accuracy (multi-label: mean average precision) on each task's test split after each experience, 0 to 1.
        before: what chance gives: 1 / classes where the task's classes are known before it (shared outputs, or an id at
            test), 0 where they are new, the share of positives for multi-label.
        incremental: after each experience, accuracy over all test examples of the tasks seen so far.
        held: bytes stored besides the model after each experience, by what.
        gradients: examples whose gradient was computed, in all.
        seconds: of training, in all.
    """

    tasks: list[str]
    experiences: list[str]
    first: list[int]
    matrix: list[list[float]] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    incremental: list[float] = field(default_factory=list)
    held: list[dict[str, int]] = field(default_factory=list)
    gradients: int = 0
    seconds: float = 0.0

    @property
    def average(self) -> float:
        """Average accuracy after the last experience."""
        return average_accuracy(self.matrix)

    @property
    def summary(self) -> dict[str, float]:
        """The measures of `continual.measures`, the mean of `incremental`, bytes, gradients and seconds.

        A learner that answers only at the end (joint training) has no measure over time: those are left out.
        """
        over_time = {}
        if len(self.matrix) == len(self.experiences):
            over_time = {
                "incremental": sum(self.incremental) / len(self.incremental),
                "forgetting": forgetting(self.matrix, self.first),
                "backward_transfer": backward_transfer(self.matrix, self.first),
                "forward_transfer": forward_transfer(self.matrix, self.before, self.first),
                "plasticity": plasticity(self.matrix, self.first),
            }
        return {
            "average": self.average,
            **over_time,
            "bytes": sum(self.held[-1].values()),
            "gradients": self.gradients,
            "seconds": self.seconds,
        }


def _chance(stream: Stream) -> list[float]:
    if stream.multi_label:
        return [task.train.targets[:, list(task.classes)].double().mean().item() for task in stream.tasks]
    known = "task_id_predict" in stream.offers or len({task.classes for task in stream.tasks}) == 1
    return [1 / len(task.classes) if known else 0.0 for task in stream.tasks]


def _device(learner: Learner) -> torch.device | str:
    return getattr(learner, "device", "cpu")


@torch.no_grad()
def _answers(learner: Learner, examples: Examples, task: int | None, outputs: int, size: int) -> Tensor:
    """Logits `(N, outputs)` on the CPU, in order."""
    device = _device(learner)
    found = torch.cat(
        [learner.predict(to_device(inputs, device), task).float().cpu() for inputs, _ in Batches(examples, size)]
    )
    if found.shape != (len(examples), outputs):
        raise InputError(f"predict gave {tuple(found.shape)}; expected ({len(examples)}, {outputs})")
    if found.isnan().any():
        raise InputError("predict gave NaN: look for NaN in the inputs, or lower the learning rate")
    return found


def _score(logits: Tensor, experience: Experience, stream: Stream, targets: Tensor) -> float:
    """Accuracy of a task, or the mean average precision of its classes."""
    classes = list(experience.classes)
    if stream.multi_label:
        logits = logits.clamp(min=torch.finfo(logits.dtype).min)
        return average_precision(logits[:, classes], targets[:, classes])
    if "task_id_predict" in stream.offers:
        outside = torch.ones(stream.outputs, dtype=torch.bool)
        outside[classes] = False
        logits = logits.masked_fill(outside, float("-inf"))
    right = (logits.argmax(1) == targets) & logits.isfinite().any(1)
    return right.double().mean().item()


def _scores(learner: Learner, stream: Stream, split: str, size: int) -> list[tuple[float, int]]:
    """Score of each task's split and the number of examples; a split that tasks share is answered once for all."""
    found, before, logits = [], None, torch.empty(0)
    for experience in stream.tasks:
        examples: Examples = getattr(experience, split)
        task = experience.task if "task_id_predict" in stream.offers else None
        if before != (id(examples), task):
            logits, before = _answers(learner, examples, task, stream.outputs, size), (id(examples), task)
        found.append((_score(logits, experience, stream, examples.targets), len(examples)))
    return found


def evaluate(learner: Learner, stream: Stream, *, split: str = "test", batch_size: int = 256) -> dict[str, float]:
    """Score of every task of the stream: accuracy, or mean average precision where targets are multi-label."""
    with torch.random.fork_rng():
        scores = _scores(learner, stream, split, batch_size)
    return {task.name: score for task, (score, _) in zip(stream.tasks, scores, strict=True)}


@dataclass
class _Again:
    """The batches of one experience, in order, as often as asked."""

    experience: Experience
    size: int
    told: int | None
    device: torch.device | str

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in Batches(self.experience.train, self.size):
            yield Batch(to_device(inputs, self.device), targets.to(self.device), self.told, repeat=1)


def _fingerprint(experience: Experience) -> list[Any]:
    """What tells an experience from another of its name: classes, sizes, targets and some inputs."""
    train = experience.train
    inputs, _ = train[torch.arange(min(4, len(train)))]
    some = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    mark = 0
    for tensor in (train.targets, *some):
        mark = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), mark)
    return [experience.name, experience.task, list(experience.classes), len(train), mark]


def _stage(
    learner: Learner, stream: Stream, row: int, epochs: int, size: int, seed: int | None, tick: Callable
) -> None:
    """One experience: begin, its batches, end."""
    experience, device = stream[row], _device(learner)
    told = experience.task if "task_id_train" in stream.offers else None
    bounded = "boundaries" in stream.offers
    classes = experience.classes if "class_list" in stream.offers else None
    info = TaskInfo(told, classes, _Again(experience, size, told, device))
    if bounded:
        learner.begin_task(info)
    batches = Batches(experience.train, size, seed=seed)
    for epoch in range(epochs):
        for inputs, targets in batches:
            tick()
            if len(targets) < learner.least_batch:
                continue
            learner.observe(Batch(to_device(inputs, device), targets.to(device), told, repeat=epoch))
    if bounded:
        learner.end_task(info)


def learn(
    learner: Learner,
    stream: Stream,
    *,
    epochs: int | Sequence[int] = 1,
    batch_size: int = 32,
    seed: int = 0,
    split: str = "test",
    shuffle: bool = True,
    folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Record:
    """Show a stream to a learner.

    Args:
        learner: changed in place.
        stream: what it sees, in order.
        epochs: passes over each experience, one number or one for each; 1 is online learning.
        batch_size: examples a step. A last batch of one example is left out where the learner has batch norms, which
            cannot train on it.
        seed: order of the examples within an experience. Dropout follows torch's global generator, which is seeded
            inside a fork and so left as it was.
        shuffle: otherwise the examples of an experience come in the order they have.
        split: what accuracies are measured on; choose settings on `validation`.
        folder: keep the state of the last boundary there and continue from it.
        progress: called with (name of the experience, steps done, steps).

    Raises:
        InputError: when the learner cannot use the stream, a state in the folder is of another learner, stream or
            setting, or the loss is not finite.
    """
    check(learner, stream)
    rounds = [epochs] * len(stream) if isinstance(epochs, int) else list(epochs)
    if len(rounds) != len(stream) or min(rounds) < 1:
        raise InputError(f"epochs is at least 1, one number or {len(stream)} of them, got {epochs}")
    if batch_size < learner.least_batch:
        raise InputError(f"{type(learner).__name__} needs batches of {learner.least_batch} at least, got {batch_size}")
    if split not in ("train", "validation", "test"):
        raise InputError(f"a split is 'train', 'validation' or 'test', got {split!r}")
    identity = {
        **learner.identity(), "stream": stream.name, "experiences": [_fingerprint(item) for item in stream],
        "epochs": rounds, "batch_size": batch_size, "order seed": seed if shuffle else None, "split": split,
    }  # fmt: skip
    record = Record([task.name for task in stream.tasks], [], [stream.row_of(task.task) for task in stream.tasks])
    path = None if folder is None else Path(folder) / "learner.safetensors"
    if path is not None and path.exists():
        record = _resume(learner, path, identity)
    elif path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    record.before = _chance(stream)
    steps = [passes * -(-len(item.train) // batch_size) for passes, item in zip(rounds, stream)]
    done = sum(steps[: len(record.experiences)])
    for row in range(len(record.experiences), len(stream)):
        experience = stream[row]

        def tick(name: str = experience.name) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(name, done, sum(steps))

        start = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + row)
            _stage(learner, stream, row, rounds[row], batch_size, seed * 1009 + row if shuffle else None, tick)
            if row == len(stream) - 1:
                learner.end_stream()
            record.seconds += time.perf_counter() - start
            _note(record, learner, stream, row, split)
        if path is not None:
            save_state({"identity": identity, "record": asdict(record), "learner": learner.state_dict()}, path)
    return record


def _note(record: Record, learner: Learner, stream: Stream, row: int, split: str) -> None:
    record.experiences.append(stream[row].name)
    record.held.append(learner.held())
    record.gradients = learner.gradients
    if not learner.answers_early and row < len(stream) - 1:
        return
    found = _scores(learner, stream, split, 256)
    record.matrix.append([score for score, _ in found])
    known = [pair for pair, first in zip(found, record.first, strict=True) if first <= row]
    record.incremental.append(sum(score * count for score, count in known) / sum(count for _, count in known))


def _resume(learner: Learner, path: Path, identity: dict[str, Any]) -> Record:
    saved = load_state(path)
    if not isinstance(saved, dict) or saved.keys() != {"identity", "record", "learner"}:
        raise InputError(f"{str(path)!r} is not the state of a continual run; give another folder")
    for key, value in identity.items():
        if saved["identity"].get(key) != value:
            raise InputError(
                f"{str(path)!r} is a run with {key} {saved['identity'].get(key)!r}, this one has {value!r}; "
                "give another folder"
            )
    learner.load_state_dict(saved["learner"])
    return Record(**saved["record"])
