"""Where a stream changes without telling: an alarm from the losses, and any learner driven by it.

`LossJump` watches the loss of each batch before it is trained on. With Q the last `window` losses and a the smoothing,

    S = a loss + (1 - a) S            alarm when S > mean(Q) + deviations max(std(Q), floor)

Q starts with one entry, the loss of guessing. `AtChanges` gives a learner that needs boundaries those that a detector
finds. A detector is anything with `update(loss) -> bool`, `reset()`, `state_dict()` and `load_state_dict(state)`.

Use it where tasks come in stretches of many batches. A stretch shorter than half a window, a shuffled stream and a slow
drift give no alarm: the window follows. Where the loss is very low and steady, a hard batch gives a false alarm: raise
`floor`. A jump J is seen after the first n batches with `(1 - (1 - a)^n) J > deviations std`, mostly one.

Cost: one sum over the window a batch; `AtChanges` adds one forward pass without gradient and `memory` stored examples.

Paper: Zhu et al., "TAME: Task Agnostic Continual Learning using Multiple Experts", CVPR Workshops 2024,
arXiv 2210.03869. Departure: `grace`. The authors' networks end in a sigmoid, which holds the first losses at the loss
of guessing; logits start above it, and the rule alone would then fire at the first batch of every expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..nets.calling import at, evaluating
from .buffer import Buffer
from .learner import Batch, GradientLearner, Learner, TaskInfo

__all__ = ["AtChanges", "Detector", "LossJump"]


class Detector(Protocol):
    """What watches losses."""

    def update(self, loss: float) -> bool:
        """Take the next loss; True when the stream has changed before it."""
        ...

    def reset(self) -> None:
        """Begin anew, for a new task."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class LossJump:
    """Alarm when the smoothed loss leaves the band of the last losses.

    Args:
        start: the loss of guessing, with which the window begins: `log(classes)` for cross-entropy.
        window: losses that are remembered, at least 2. Paper: 35 for split MNIST, 100 for permuted MNIST and CIFAR.
        smoothing: a, share of the newest loss in S, in (0, 1]; 1 does not smooth. Paper: 0.2 (CIFAR-10: 0.1).
        deviations: width of the band. Paper: 3.
        floor: least standard deviation. Paper: 0.005.
        grace: no alarm before so many losses. Default: half the window. With 0, the first loss must not be above the
            loss of guessing (a last layer of zeros does that).

    >>> watch = LossJump(math.log(10), grace=0)
    >>> round(watch.threshold - math.log(10), 6), watch.update(2.3), watch.update(4.0)
    (0.015, False, True)
    """

    def __init__(
        self,
        start: float,
        *,
        window: int = 100,
        smoothing: float = 0.2,
        deviations: float = 3.0,
        floor: float = 0.005,
        grace: int | None = None,
    ) -> None:
        if not math.isfinite(start):
            raise InputError(f"start is the loss of guessing, a finite number, got {start}")
        if window < 2:
            raise InputError(f"a window needs at least 2 losses, got window={window}")
        if not 0 < smoothing <= 1:
            raise InputError(f"smoothing is the newest loss's share, in (0, 1], got {smoothing:g}")
        if not (deviations > 0 and floor > 0):
            raise InputError(f"deviations and floor are above 0, got {deviations:g} and {floor:g}")
        if grace is not None and grace < 0:
            raise InputError(f"grace is a number of losses, at least 0, got {grace}")
        self.start, self.window, self.smoothing = float(start), window, smoothing
        self.deviations, self.floor, self.grace = deviations, floor, window // 2 if grace is None else grace
        self.reset()

    def reset(self) -> None:
        """As it was made."""
        self.losses: list[float] = [self.start]
        self.smoothed: float | None = None
        self.count = 0

    @property
    def threshold(self) -> float:
        """Upper edge of the band."""
        middle = math.fsum(self.losses) / len(self.losses)
        spread = math.sqrt(math.fsum((loss - middle) ** 2 for loss in self.losses) / len(self.losses))
        return middle + self.deviations * max(spread, self.floor)

    def _next(self, loss: float) -> float:
        return loss if self.smoothed is None else self.smoothing * loss + (1 - self.smoothing) * self.smoothed

    def exceeds(self, loss: float) -> bool:
        """Whether S would be above the band with this loss, grace or not; changes nothing."""
        return not self._next(loss) <= self.threshold

    def update(self, loss: float) -> bool:
        """Take the next loss. One that raises the alarm is not remembered.

        Raises:
            InputError: a loss that is not finite, or a first loss above the band without grace.
        """
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss}; a detector needs finite losses: lower the learning rate")
        if self.count >= self.grace and self.exceeds(loss):
            if self.count == 0:
                classes = round(math.exp(min(self.start, 30)))
                guess = f"log({classes})={self.start:.2f}" if math.isclose(math.log(max(classes, 1)), self.start) else (
                    f"the loss of guessing, {self.start:.2f}"
                )  # fmt: skip
                raise InputError(
                    f"loss at start {loss:.3g} is above {guess}: the detector would fire at once; "
                    "give it a grace period or the network a last layer of zeros"
                )
            return True
        self.smoothed = self._next(loss)
        self.losses = [*self.losses, loss][-self.window :]
        self.count += 1
        return False

    def settings(self) -> dict[str, Any]:
        """How it was made."""
        names = ("start", "window", "smoothing", "deviations", "floor", "grace")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "smoothed": self.smoothed, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["losses"]) > self.window:
            raise InputError(f"the saved detector remembers {len(state['losses'])} losses, this one {self.window}")
        self.losses, self.smoothed, self.count = list(state["losses"]), state["smoothed"], state["count"]


class AtChanges(Learner):
    """A learner that needs boundaries, on a stream without: a detector says where they are.

    Args:
        inner: such a learner, for example `EWC`. It is told neither task numbers nor classes.
        detector: watches its loss; reset at every alarm.
        memory: examples of the present task that are kept, a uniform sample, to be gone through again at its end.

    Attributes:
        alarms: numbers of the batches (from 0) before which a new task was begun.

    Raises:
        InputError: an inner learner that needs more than boundaries, or a `LossJump` without grace.
    """

    kept: ClassVar[tuple[str, ...]] = (*Learner.kept, "inner", "detector", "memory", "alarms", "batches")

    def __init__(self, inner: GradientLearner, detector: Detector, *, memory: int = 500) -> None:
        super().__init__(inner.outputs)
        if more := sorted(inner.needs - {"boundaries"}):
            raise InputError(f"{type(inner).__name__} needs {', '.join(more)}, which a detector cannot find out")
        if isinstance(detector, LossJump) and not detector.grace:
            raise InputError(
                "a detector without grace would refuse the first loss after a change, which is above that of guessing: "
                "give LossJump(grace=...) of 1 or more"
            )
        self.inner, self.detector, self.size = inner, detector, memory
        self.labels = inner.labels  # type: ignore[misc]
        self.answers_early = inner.answers_early
        self.memory = Buffer(memory, seed=inner.seed)
        self.alarms: list[int] = []
        self.batches = 0

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def least_batch(self) -> int:
        """As the inner learner's."""
        return self.inner.least_batch

    def identity(self) -> dict[str, Any]:
        watch = self.detector.settings() if isinstance(self.detector, LossJump) else {}
        return {**super().identity(), "inner": self.inner.identity(), "detector": type(self.detector).__name__, **watch}

    def _info(self) -> TaskInfo:
        return TaskInfo(None, None, list(self._stored()))

    def _stored(self) -> Iterator[Batch]:
        if len(self.memory):
            stored = self.memory.all()
            for rows in torch.arange(len(self.memory)).split(64):
                yield Batch(at(stored["inputs"], rows), stored["targets"][rows], repeat=1)

    def observe(self, batch: Batch) -> dict[str, float]:
        if not self.batches:
            self.inner.begin_task(self._info())
        with torch.no_grad(), evaluating(self.inner.model):
            loss = self.inner.criterion(self.inner.model(batch.inputs), batch.targets).item()
        if alarm := self.detector.update(loss):
            self.inner.end_task(self._info())
            self.alarms = [*self.alarms, self.batches]
            self.memory = Buffer(self.size, seed=self.inner.seed + len(self.alarms))
            self.inner.begin_task(self._info())
            self.detector.reset()
            self.detector.update(loss)
        found = self.inner.observe(batch)
        self.memory.add(inputs=batch.inputs, targets=batch.targets)
        self.batches += 1
        self.seen, self.gradients = self.inner.seen, self.inner.gradients
        return {**found, "alarm": float(alarm)}

    def end_stream(self) -> None:
        self.inner.end_task(self._info())
        self.inner.end_stream()

    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        return self.inner.predict(inputs, task)

    def held(self) -> dict[str, int]:
        return {**self.inner.held(), "examples of the present task": self.memory.bytes}
