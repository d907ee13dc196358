"""The learner protocol: one class with few verbs, into which every continual method fits.

A learner sees batches (`observe`), is told about boundaries if the stream has them (`begin_task`, `end_task`,
`end_stream`), answers (`predict`, which changes nothing), and says what it stores besides its model (`held`). What it
needs of a stream is declared in `needs` and checked by `check` before training.

`GradientLearner` is the frame of those that train one network with an optimiser: most of them are a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import evaluating
from .buffer import Buffer
from .stream import Stream

__all__ = ["Batch", "GradientLearner", "Learner", "TaskInfo", "check", "least_batch", "portions", "size_of"]

REASONS = {
    "boundaries": "consolidates at boundaries; this stream has none: use TAME's detector, or call end_task yourself",
    "task_id_train": "needs the number of the task with every training batch; this stream hides it",
    "task_id_predict": "needs the number of the task to answer; this stream does not give it at test",
    "class_list": "needs to know a task's classes before it starts; this stream does not tell",
}


@dataclass
class Batch:
    """One step's examples.

    Args:
        inputs: tensor `(B, ...)` or a dict of such.
        targets: `(B,)` outputs of the stream, or `(B, outputs)` of 0 and 1.
        task: its number, where the stream tells.
        repeat: how many times the learner was shown these examples before.
    """

    inputs: Any
    targets: Tensor
    task: int | None = None
    repeat: int = 0

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class TaskInfo:
    """What a learner is told at a boundary.

    Args:
        task: the number of the task, where the stream tells.
        classes: its outputs, where the stream tells.
        batches: its training examples once more, in order, as `Batch`es.
    """

    task: int | None
    classes: tuple[int, ...] | None
    batches: Iterable[Batch]


def size_of(value: Any) -> int:
    """Bytes of the tensors in a nest of dicts, lists, tensors and buffers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Buffer):
        return value.bytes
    if isinstance(value, nn.Module):
        return sum(size_of(tensor) for tensor in value.state_dict().values())
    if isinstance(value, Mapping):
        return sum(size_of(item) for item in value.values())
    return sum(size_of(item) for item in value) if isinstance(value, (list, tuple)) else 0


def least_batch(model: nn.Module) -> int:
    """Examples that a batch must have in training: 2 for a model with batch norms, otherwise 1."""
    return 2 if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()) else 1


def portions(order: Tensor, size: int, model: nn.Module) -> list[Tensor]:
    """Stored examples in batches of `size`; a last one too small for the model's batch norms joins the one before it.

    Raises:
        InputError: fewer examples in all than the model can train on.
    """
    least, parts = least_batch(model), list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) < least:
        parts[-2:] = [torch.cat(parts[-2:])]
    if min(map(len, parts)) < least:
        raise InputError(
            f"the model has batch norms, which need {least} examples a batch, got {len(order)} in batches of {size}; "
            "store more examples or give larger batches"
        )
    return parts


class Learner(ABC):
    """What every continual method is.

    Attributes:
        needs: what the stream must offer, a subset of `stream.OFFERS`.
        labels: kinds of targets it can learn from: `single`, `multi`.
        answers_early: whether `predict` means something before the stream ends.
        outputs: size of the output space.
        seen: `(outputs,)` bool, classes met so far. Others are answered with `-inf`.
        gradients: examples whose gradient was computed, the unit of cost.
        kept: names of the attributes that make up its state.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    labels: ClassVar[frozenset[str]] = frozenset({"single"})
    kept: ClassVar[tuple[str, ...]] = ("seen", "gradients")
    answers_early: bool = True

    def __init__(self, outputs: int) -> None:
        if outputs < 1:
            raise InputError(f"a learner needs at least one output, got {outputs}")
        self.outputs, self.gradients = outputs, 0
        self.seen = torch.zeros(outputs, dtype=torch.bool)

    def begin_task(self, info: TaskInfo) -> None:  # noqa: B027
        """Before the first batch of an experience, where the stream has boundaries."""

    @abstractmethod
    def observe(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; returns figures for a log."""

    def end_task(self, info: TaskInfo) -> None:  # noqa: B027
        """After the last batch of an experience, where the stream has boundaries."""

    def end_stream(self) -> None:  # noqa: B027
        """After the last batch of all."""

    @abstractmethod
    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        """Logits `(B, outputs)`, `-inf` for classes not seen (or not of the task, if its number is given)."""

    def held(self) -> dict[str, int]:
        """Bytes stored besides one copy of the model, by what they are."""
        return {}

    @property
    def least_batch(self) -> int:
        """Examples that a batch must have."""
        return 1

    def enough(self, batch: Batch) -> None:
        """Whether a batch can be trained on.

        Raises:
            InputError: no example, or one where there are batch norms.
        """
        if not len(batch):
            raise InputError("a batch needs at least one example")
        if len(batch) < self.least_batch:
            raise InputError("the model has batch norms, which need two examples a batch, got 1; give larger batches")

    def identity(self) -> dict[str, Any]:
        """Class and settings, to tell one learner's checkpoint from another's; taken before training."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, (int, float, str, bool))}
        return {"learner": type(self).__name__, **plain}

    def note_classes(self, targets: Tensor) -> None:
        """Mark the classes of a batch as seen.

        Raises:
            InputError: for a target outside the outputs.
        """
        if targets.ndim == 2:
            self.seen |= targets.detach().cpu().bool().any(0)
            return
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < self.outputs:
            odd = int(targets.max()) if int(targets.max()) >= self.outputs else int(targets.min())
            raise InputError(f"a batch has the target {odd}; the learner has outputs 0 to {self.outputs - 1}")
        self.seen[targets.detach().cpu()] = True

    def masked(self, logits: Tensor) -> Tensor:
        """`-inf` for what was not seen.

        Raises:
            InputError: when nothing was seen yet.
        """
        if not self.seen.any():
            raise InputError("the learner has seen no class yet: train it before asking for predictions")
        return logits.masked_fill(~self.seen.to(logits.device), float("-inf"))

    def state_dict(self) -> dict[str, Any]:
        """All that `kept` names: tensors, plain values, and the states of modules, optimisers, buffers, generators."""
        found = {}
        for name in self.kept:
            value = getattr(self, name)
            if isinstance(value, torch.Generator):
                found[name] = value.get_state()
            else:
                found[name] = value.state_dict() if hasattr(value, "state_dict") else value
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            InputError: when a part is missing or one too many.
        """
        if odd := sorted(set(state) ^ set(self.kept)):
            raise InputError(f"the saved state does not fit {type(self).__name__}: {odd[0]!r} is in one of them only")
        device = getattr(self, "device", torch.device("cpu"))
        for name, value in state.items():
            own = getattr(self, name)
            if isinstance(own, torch.Generator):
                own.set_state(value)
            elif hasattr(own, "load_state_dict"):
                own.load_state_dict(value)
                if isinstance(own, Buffer):
                    own.to(device)
            elif isinstance(value, Tensor):
                setattr(self, name, value.clone() if own is None else value.clone().to(own.device))
            else:
                setattr(self, name, _copied(value, device))


def _copied(value: Any, device: Any) -> Any:
    """The same nest with copies of its tensors on the device."""
    if isinstance(value, Tensor):
        return value.clone().to(device)
    if type(value) is dict:
        return {key: _copied(item, device) for key, item in value.items()}
    return type(value)(_copied(item, device) for item in value) if type(value) in (list, tuple) else value


class GradientLearner(Learner):
    """One network, one optimiser, one step a batch; subclasses change the loss.

    Args:
        model: `inputs -> logits (B, outputs)`; trained in place.
        outputs: size of the output space.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        optimiser: parameters -> optimiser. Default: SGD with the settings above.
        parameters: what to train. Default: all of the model that require gradients.
        mask: take the loss over all outputs (`none`), or over those of the example's own task (`task`; needs
            `class_list`). With targets of 0 and 1 it is the present task's.
        seed: of everything random.
    """

    labels: ClassVar[frozenset[str]] = frozenset({"single", "multi"})
    kept: ClassVar[tuple[str, ...]] = (
        "seen",
        "gradients",
        "model",
        "optimiser",
        "generator",
        "task_classes",
        "together",
    )

    def __init__(
        self,
        model: nn.Module,
        outputs: int,
        *,
        lr: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        mask: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(outputs)
        if not 0 < lr < float("inf"):
            raise InputError(f"lr is a positive learning rate, got {lr:g}")
        if mask not in ("none", "task"):
            raise InputError(f"mask is 'none' or 'task', got {mask!r}")
        self.model, self.lr, self.mask, self.seed = model, lr, mask, seed
        self.parameters = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
        if not self.parameters:
            raise InputError("the model has no parameter that requires a gradient")
        self.optimiser = (
            torch.optim.SGD(self.parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
            if optimiser is None
            else optimiser(self.parameters)
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.task_classes: list[int] | None = None
        self.together = torch.zeros(outputs, outputs, dtype=torch.bool)  # whether two classes are of one task
        if mask == "task":
            self.needs = self.needs | {"class_list", "boundaries"}  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def least_batch(self) -> int:
        """2 for a model with batch norms."""
        return least_batch(self.model)

    def identity(self) -> dict[str, Any]:
        settings = {key: value for key, value in self.optimiser.defaults.items() if not isinstance(value, Tensor)}
        return super().identity() | {"optimiser": f"{type(self.optimiser).__name__} {settings}"}

    def begin_task(self, info: TaskInfo) -> None:
        self.task_classes = None if info.classes is None else list(info.classes)
        if self.task_classes:
            self.together[torch.tensor(self.task_classes).unsqueeze(1), torch.tensor(self.task_classes)] = True

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, or binary cross-entropy for targets of 0 and 1; over the task's outputs with `mask`."""
        if logits.shape[1] != self.outputs:
            raise InputError(f"the model gives {logits.shape[1]} outputs, the learner was made for {self.outputs}")
        masked = self.mask == "task" and self.task_classes is not None
        if targets.ndim == 2:
            logits, targets = (x[:, self.task_classes] if masked else x for x in (logits, targets))
            return F.binary_cross_entropy_with_logits(logits, targets.to(logits))
        if masked:
            logits = logits.masked_fill(~self.together[targets.cpu()].to(logits.device), float("-inf"))
        return F.cross_entropy(logits, targets)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """The model in training mode, with the gradient's cost counted."""
        self.gradients += len(targets) if targets is not None else 0
        return self.model(inputs)

    def loss(self, batch: Batch) -> Tensor:
        """What a step lowers."""
        return self.criterion(self.forward(batch.inputs, batch.targets), batch.targets)

    def observe(self, batch: Batch) -> dict[str, float]:
        self.note_classes(batch.targets)
        self.model.train()
        self.enough(batch)
        self.optimiser.zero_grad()
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()}; lower the learning rate (lr={self.lr:g})")
        self.backward(loss, batch)
        self.optimiser.step()
        self.after_step(batch)
        return {"loss": loss.item()}

    def backward(self, loss: Tensor, batch: Batch) -> None:
        """Leave the step's gradient in `.grad`."""
        loss.backward()

    def after_step(self, batch: Batch) -> None:
        """What follows the optimiser's step: storing, running sums."""

    @torch.no_grad()
    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        with evaluating(self.model):
            return self.masked(self.model(inputs))


def check(learner: Learner, stream: Stream) -> None:
    """Whether the learner can use the stream.

    Raises:
        InputError: what is missing, and what to do.
    """
    name = type(learner).__name__
    for need in sorted(learner.needs - stream.offers):
        raise InputError(f"{name} {REASONS[need]}")
    kind = "multi" if stream.multi_label else "single"
    if kind not in learner.labels:
        raise InputError(
            f"{name} learns from {' and '.join(sorted(learner.labels))}-label targets; these are {kind}-label"
        )
    if stream.multi_label and getattr(learner, "mask", "none") == "task" and hasattr(learner, "buffer"):
        raise InputError(f"{name} would rehearse nothing: mask='task' hides the labels of old tasks; use mask='none'")
    if learner.outputs != stream.outputs:
        raise InputError(f"{name} was made for {learner.outputs} outputs, the stream has {stream.outputs}")
