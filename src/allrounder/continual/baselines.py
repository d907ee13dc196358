"""What every continual method is compared with: no memory, all of it, and a buffer used in the usual ways.

- `Finetune`: train on what comes. The lower bound.
- `Joint`: store everything, train from the start on all of it at the end (or at every boundary). The upper bound.
- `ER`: the new batch and as many stored examples in one mean loss (Rolnick et al., 2019; Chaudhry et al., 2019).
- `DERpp`: `CE(B) + alpha MSE(f(x1), z1) + beta CE(f(x2), y2)` with two draws from the buffer and z the logits when an
  example was stored (Buzzega et al., "Dark Experience for General Continual Learning", NeurIPS 2020, arXiv 2004.07211).
- `AGEM`: the new gradient, projected so that it does not raise the loss of stored examples to first order
  (Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv 1812.00420).
- `GDumb`: keep a balanced sample and train from the start on nothing else (Prabhu et al., ECCV 2020): the control that
  tells whether it is only the buffer.

Cost per new example in forward and backward passes: 1, 1, 2, 3, 2; GDumb trains on its buffer at each boundary.
Examples enter the buffer the first time they are shown, however many passes follow.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import at
from .buffer import Buffer
from .learner import Batch, GradientLearner, TaskInfo, portions, size_of

__all__ = ["AGEM", "ER", "DERpp", "Finetune", "GDumb", "Joint"]


class Finetune(GradientLearner):
    """Train on what comes, and on nothing else."""


class Retrained(GradientLearner):
    """Trains a fresh copy of its model on stored examples.

    Args:
        epochs: passes over what is stored.
        batch_size: examples a step of that training.
        options: as for `GradientLearner`.
    """

    kept: ClassVar[tuple[str, ...]] = (*GradientLearner.kept, "initial", "blank")

    def __init__(
        self, model: nn.Module, outputs: int, *, epochs: int = 20, batch_size: int = 32, **options: Any
    ) -> None:
        super().__init__(model, outputs, **options)
        if epochs < 1 or batch_size < 1:
            raise InputError(f"epochs and batch_size are at least 1, got {epochs} and {batch_size}")
        self.epochs, self.batch_size = epochs, batch_size
        self.initial = copy.deepcopy(model.state_dict())
        self.blank = copy.deepcopy(self.optimiser.state_dict())

    def retrain(self, stored: dict[str, Any]) -> None:
        """Start again from the initial weights, on these inputs and targets."""
        self.model.load_state_dict(self.initial)
        self.optimiser.load_state_dict(copy.deepcopy(self.blank))
        self.model.train()
        count = len(stored["targets"])
        for _ in range(self.epochs):
            for rows in portions(torch.randperm(count, generator=self.generator), self.batch_size, self.model):
                self.optimiser.zero_grad()
                targets = stored["targets"][rows]
                loss = self.criterion(self.forward(at(stored["inputs"], rows), targets), targets)
                if not torch.isfinite(loss):
                    raise InputError(f"the loss is {loss.item()}; lower the learning rate (lr={self.lr:g})")
                loss.backward()
                self.optimiser.step()


class Joint(Retrained):
    """Training on the union of all tasks.

    Args:
        cumulative: train at every boundary on all that came so far (the matrix is then filled), not only at the end.
        options: as for `Retrained`.
    """

    kept: ClassVar[tuple[str, ...]] = (*Retrained.kept, "stored")

    def __init__(self, model: nn.Module, outputs: int, *, cumulative: bool = False, **options: Any) -> None:
        super().__init__(model, outputs, **options)
        self.cumulative = self.answers_early = cumulative
        self.stored: list[dict[str, Any]] = []
        if cumulative:
            self.needs = self.needs | {"boundaries"}  # type: ignore[misc]

    def observe(self, batch: Batch) -> dict[str, float]:
        self.note_classes(batch.targets)
        if batch.repeat == 0:
            self.stored.append({"inputs": batch.inputs, "targets": batch.targets})
        return {}

    def _union(self) -> dict[str, Any]:
        if isinstance(self.stored[0]["inputs"], dict):
            inputs: Any = {
                key: torch.cat([part["inputs"][key] for part in self.stored]) for key in self.stored[0]["inputs"]
            }
        else:
            inputs = torch.cat([part["inputs"] for part in self.stored])
        return {"inputs": inputs, "targets": torch.cat([part["targets"] for part in self.stored])}

    def end_task(self, info: TaskInfo) -> None:
        if self.cumulative:
            self.retrain(self._union())

    def end_stream(self) -> None:
        if not self.cumulative:
            self.retrain(self._union())

    def held(self) -> dict[str, int]:
        return {"examples": size_of(self.stored)}


class ER(GradientLearner):
    """Experience replay.

    Args:
        buffer: examples stored, a reservoir.
        options: as for `GradientLearner`.
    """

    kept: ClassVar[tuple[str, ...]] = (*GradientLearner.kept, "buffer")

    def __init__(self, model: nn.Module, outputs: int, *, buffer: int = 200, **options: Any) -> None:
        super().__init__(model, outputs, **options)
        self.buffer_size = buffer
        self.buffer = Buffer(buffer, seed=self.seed)

    def loss(self, batch: Batch) -> Tensor:
        if not len(self.buffer):
            return super().loss(batch)
        old = self.buffer.sample(len(batch))
        inputs, targets = (
            _both(batch.inputs, old["inputs"]),
            torch.cat([batch.targets, old["targets"].to(batch.targets)]),
        )
        return self.criterion(self.forward(inputs, targets), targets)

    def after_step(self, batch: Batch) -> None:
        if batch.repeat == 0:
            self.buffer.add(inputs=batch.inputs, targets=batch.targets)

    def held(self) -> dict[str, int]:
        return {"examples": self.buffer.bytes}


def _both(new: Any, old: Any) -> Any:
    if isinstance(new, dict):
        return {key: torch.cat([value, old[key].to(value)]) for key, value in new.items()}
    return torch.cat([new, old.to(new)])


class DERpp(ER):
    """Dark experience replay: stored logits are held, stored labels are learned.

    Args:
        alpha: weight of the logits, >= 0. Paper: 0.1 to 1 by data set.
        beta: weight of the labels, >= 0; 0 is DER.
        options: as for `ER`.
    """

    def __init__(
        self, model: nn.Module, outputs: int, *, alpha: float = 0.5, beta: float = 0.5, **options: Any
    ) -> None:
        super().__init__(model, outputs, **options)
        if alpha < 0 or beta < 0:
            raise InputError(f"alpha and beta are weights, at least 0, got {alpha:g} and {beta:g}")
        self.alpha, self.beta = alpha, beta
        self._logits: Tensor | None = None

    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch.inputs, batch.targets)
        self._logits = logits.detach()
        loss = self.criterion(logits, batch.targets)
        if not len(self.buffer):
            return loss
        if self.alpha:
            one = self.buffer.sample(len(batch))
            loss = loss + self.alpha * F.mse_loss(self.forward(one["inputs"], one["targets"]), one["logits"])
        if self.beta:
            two = self.buffer.sample(len(batch))
            loss = loss + self.beta * self.criterion(self.forward(two["inputs"], two["targets"]), two["targets"])
        return loss

    def after_step(self, batch: Batch) -> None:
        if batch.repeat == 0:
            self.buffer.add(inputs=batch.inputs, targets=batch.targets, logits=self._logits)


class AGEM(GradientLearner):
    """Averaged gradient episodic memory: `g <- g - (g.r / r.r) r` where the gradient r of stored examples disagrees.

    The memory is filled at the end of each task, with the same share for every task.

    Args:
        buffer: examples stored.
        options: as for `GradientLearner`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundaries"})
    kept: ClassVar[tuple[str, ...]] = (*GradientLearner.kept, "buffer", "tasks")

    def __init__(self, model: nn.Module, outputs: int, *, buffer: int = 200, **options: Any) -> None:
        super().__init__(model, outputs, **options)
        self.buffer_size, self.tasks = buffer, 0
        self.buffer = Buffer(buffer, policy="balanced", seed=self.seed)

    def backward(self, loss: Tensor, batch: Batch) -> None:
        if len(self.buffer):
            old = self.buffer.sample(len(batch))
            self.criterion(self.forward(old["inputs"], old["targets"]), old["targets"]).backward()
            memory = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
            self.optimiser.zero_grad()
        loss.backward()
        if len(self.buffer):
            pairs = [(p.grad, r) for p, r in zip(self.parameters, memory, strict=True) if p.grad is not None]
            dot = torch.stack([(g * r).sum() for g, r in pairs]).sum()
            if dot < 0:
                norm = torch.stack([r.square().sum() for r in memory]).sum()
                torch._foreach_add_([g for g, _ in pairs], torch._foreach_mul([r for _, r in pairs], -(dot / norm)))

    def end_task(self, info: TaskInfo) -> None:
        for batch in info.batches:
            number = torch.full((len(batch),), self.tasks)
            self.buffer.add(groups=number, inputs=batch.inputs, targets=batch.targets)
        self.tasks += 1

    def held(self) -> dict[str, int]:
        return {"examples": self.buffer.bytes, "gradient": size_of(self.parameters)}


class GDumb(Retrained):
    """Greedy sampler and dumb learner: a class-balanced sample, and training from the start on it at each boundary.

    Args:
        buffer: examples stored.
        options: as for `Retrained`.
    """

    labels: ClassVar[frozenset[str]] = frozenset({"single"})
    kept: ClassVar[tuple[str, ...]] = (*Retrained.kept, "buffer")

    def __init__(self, model: nn.Module, outputs: int, *, buffer: int = 200, **options: Any) -> None:
        super().__init__(model, outputs, **options)
        self.buffer_size = buffer
        self.buffer = Buffer(buffer, policy="balanced", seed=self.seed)

    def observe(self, batch: Batch) -> dict[str, float]:
        self.note_classes(batch.targets)
        if batch.repeat == 0:
            self.buffer.add(inputs=batch.inputs, targets=batch.targets)
        return {}

    def end_task(self, info: TaskInfo) -> None:
        self.retrain(self.buffer.all())

    def end_stream(self) -> None:
        self.retrain(self.buffer.all())

    def held(self) -> dict[str, int]:
        return {"examples": self.buffer.bytes}
