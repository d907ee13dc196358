"""Learning without stored examples: hold weights or answers near where they were. `EWC`, `SI`, `LwF`.

- `EWC`: `CE + (lambda/2) sum_i F_i (theta_i - theta*_i)^2`, F the diagonal Fisher information after each task
  (Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796), summed
  over tasks with one anchor, `F <- gamma F + F_t` (Schwarz et al., 2018).
- `SI`: `CE + c sum_i Omega_i (theta_i - theta*_i)^2`, Omega grows by `w_i / (Delta_i^2 + xi)` with `w_i` the running
  sum of `-g_i dtheta_i` over a task (Zenke et al., "Continual Learning Through Synaptic Intelligence", ICML 2017).
- `LwF`: `CE + alpha T^2 KL(softmax(z_old / T) || softmax(z / T))` on the classes known before the task (Li and Hoiem,
  "Learning without Forgetting", ECCV 2016, arXiv 1606.09282).

With one head over all classes and no task id at test, all three keep almost nothing of earlier classes: a known result
(see the study). They help where tasks share their outputs or the id is given.

Cost per step over finetuning: EWC one, SI three passes over the parameters; LwF one more forward pass. Storage: EWC
2 P, SI 4 P, LwF P numbers. EWC also pays one backward pass per example (per class too with `exact`) at a boundary.
Departures: penalties go into the gradient directly. Explicit steps diverge when `lr x strength x max F >= 2`; that is
said instead of returning chance. Squared gradients are those of single examples; code in circulation squares a batch's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import at, evaluating
from ..optim.information import fisher_information
from .learner import Batch, GradientLearner, TaskInfo, size_of

__all__ = ["EWC", "SI", "LwF"]


class _Anchored(GradientLearner):
    """Adds `strength x importance x (theta - anchor)` to the gradient."""

    needs: ClassVar[frozenset[str]] = frozenset({"boundaries"})
    kept: ClassVar[tuple[str, ...]] = (*GradientLearner.kept, "importance", "anchor")
    factor = 1.0

    def __init__(self, model: nn.Module, outputs: int, *, strength: float, **options: Any) -> None:
        super().__init__(model, outputs, **options)
        if not 0 <= strength < float("inf"):
            raise InputError(f"strength is the weight of the penalty, at least 0, got {strength:g}")
        self.strength = strength
        self.importance: list[Tensor] = []
        self.anchor: list[Tensor] = []

    def penalty(self) -> Tensor:
        """The penalty at the present weights."""
        if not self.anchor:
            return torch.zeros(())
        terms = zip(self.importance, self.parameters, self.anchor, strict=True)
        total = torch.stack([(f * (p.detach() - a).square()).sum() for f, p, a in terms]).sum()
        return 0.5 * self.factor * self.strength * total

    @torch.no_grad()
    def pull(self) -> None:
        """Add the penalty's gradient."""
        if self.anchor and self.strength:
            pull = torch._foreach_sub(list(self.parameters), self.anchor)
            torch._foreach_mul_(pull, self.importance)
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch._foreach_add_([p.grad for p in self.parameters], pull, alpha=self.factor * self.strength)  # type: ignore[arg-type]

    def backward(self, loss: Tensor, batch: Batch) -> None:
        loss.backward()
        self.pull()

    def _settle(self) -> None:
        self.anchor = [p.detach().clone() for p in self.parameters]
        if not isinstance(self.optimiser, torch.optim.SGD):
            return  # adaptive steps are bounded by themselves
        rate = self.lr * self.factor * self.strength * max(float(value.max()) for value in self.importance)
        if rate >= 2:
            raise InputError(
                f"{type(self).__name__} would diverge: lr x strength x largest importance is {rate:.3g}, it must be "
                f"below 2; lower the strength ({self.strength:g}) or the learning rate ({self.lr:g})"
            )

    def held(self) -> dict[str, int]:
        return {"importance": size_of(self.importance), "anchor": size_of(self.anchor)}


class _Restricted(nn.Module):
    """The outputs of some classes, or all; takes tokens as one mapping, as learners do, or as keywords."""

    def __init__(self, model: nn.Module, classes: list[int] | None) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, inputs: Any = None, **columns: Tensor) -> Tensor:
        outputs = self.model(columns or inputs)
        return outputs if self.classes is None else outputs[:, self.classes]


class EWC(_Anchored):
    """Elastic weight consolidation.

    Args:
        strength: lambda, >= 0.
        decay: gamma, what is left of the earlier information at each boundary, in [0, 1]; 1 is the plain sum.
        information: labels of the Fisher information: `exact` over all classes, `sampled`, or `given` (empirical).
        examples: most examples a task for it, drawn at random.
        options: as for `GradientLearner`.
    """

    labels: ClassVar[frozenset[str]] = frozenset({"single"})

    def __init__(
        self,
        model: nn.Module,
        outputs: int,
        *,
        strength: float = 10.0,
        decay: float = 1.0,
        information: Literal["exact", "sampled", "given"] = "sampled",
        examples: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(model, outputs, strength=strength, **options)
        if not 0 <= decay <= 1:
            raise InputError(f"decay is in [0, 1], got {decay:g}")
        self.decay, self.examples = decay, examples
        self.information: Literal["exact", "sampled", "given"] = information

    def _drawn(self, info: TaskInfo) -> Iterator[tuple[Any, Tensor]]:
        """At most `examples` of the task, drawn without order."""
        batches = list(info.batches)
        sizes = torch.tensor([len(batch) for batch in batches])
        total = int(sizes.sum())
        chosen = torch.randperm(total, generator=self.generator)[: self.examples].sort().values
        for batch, end in zip(batches, sizes.cumsum(0).tolist(), strict=True):
            rows = chosen[(chosen >= end - len(batch)) & (chosen < end)] - (end - len(batch))
            if len(rows):
                yield at(batch.inputs, rows), batch.targets[rows]

    def end_task(self, info: TaskInfo) -> None:
        pairs = self._drawn(info)
        seed = int(torch.randint(2**31, (), generator=self.generator))
        classes = sorted(info.classes or ()) if self.mask == "task" else None
        model = _Restricted(self.model, classes)
        if classes is not None:
            pairs = ((x, torch.searchsorted(torch.tensor(classes, device=y.device), y)) for x, y in pairs)
        found = fisher_information(model, pairs, labels=self.information, examples=self.examples, seed=seed)
        names = {id(p): name for name, p in model.named_parameters()}
        fresh = [found[names[id(p)]].to(p) for p in self.parameters]
        self.importance = (
            [self.decay * old + new for old, new in zip(self.importance, fresh, strict=True)]
            if self.importance
            else fresh
        )
        self._settle()


class SI(_Anchored):
    """Synaptic intelligence.

    Args:
        strength: c, >= 0. Paper: 0.1 for permuted MNIST.
        damping: xi, > 0. Paper: 0.1.
        options: as for `GradientLearner`.
    """

    kept: ClassVar[tuple[str, ...]] = (*_Anchored.kept, "path", "start")
    factor = 2.0

    def __init__(
        self, model: nn.Module, outputs: int, *, strength: float = 0.5, damping: float = 0.1, **options: Any
    ) -> None:
        super().__init__(model, outputs, strength=strength, **options)
        if not damping > 0:
            raise InputError(f"damping is above 0, got {damping:g}")
        self.damping = damping
        self.path = [torch.zeros_like(p) for p in self.parameters]
        self.start = [p.detach().clone() for p in self.parameters]
        self._before: tuple[list[Tensor], list[Tensor]] = ([], [])

    def backward(self, loss: Tensor, batch: Batch) -> None:
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self._before = (gradients, [p.detach().clone() for p in self.parameters])
        self.pull()

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        gradients, old = self._before
        moved = torch._foreach_sub(list(self.parameters), old)
        torch._foreach_addcmul_(self.path, gradients, moved, value=-1.0)

    @torch.no_grad()
    def end_task(self, info: TaskInfo) -> None:
        fresh = [
            path.clamp(min=0) / ((p - start).square() + self.damping)
            for path, p, start in zip(self.path, self.parameters, self.start, strict=True)
        ]
        self.importance = (
            [old + new for old, new in zip(self.importance, fresh, strict=True)] if self.importance else fresh
        )
        self.path = [torch.zeros_like(p) for p in self.parameters]
        self.start = [p.detach().clone() for p in self.parameters]
        self._settle()

    def held(self) -> dict[str, int]:
        return super().held() | {"path": size_of(self.path), "start": size_of(self.start)}


class LwF(GradientLearner):
    """Learning without forgetting: answers on known classes stay near those of the model before the task.

    Args:
        strength: alpha, >= 0. Paper: 1.
        temperature: T, > 0. Paper: 2.
        options: as for `GradientLearner`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundaries"})
    labels: ClassVar[frozenset[str]] = frozenset({"single"})
    kept: ClassVar[tuple[str, ...]] = (*GradientLearner.kept, "teacher", "known")

    def __init__(
        self, model: nn.Module, outputs: int, *, strength: float = 1.0, temperature: float = 2.0, **options: Any
    ) -> None:
        super().__init__(model, outputs, **options)
        if strength < 0 or not temperature > 0:
            raise InputError(f"strength is at least 0 and temperature above 0, got {strength:g} and {temperature:g}")
        self.strength, self.temperature = strength, temperature
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.known = torch.zeros(outputs, dtype=torch.bool)

    def begin_task(self, info: TaskInfo) -> None:
        super().begin_task(info)
        self.teacher.load_state_dict(self.model.state_dict())
        self.known = self.seen.clone()

    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch.inputs, batch.targets)
        loss = self.criterion(logits, batch.targets)
        if not self.known.any() or not self.strength:
            return loss
        with torch.no_grad(), evaluating(self.teacher):
            old = self.teacher(batch.inputs)
        known = self.known.to(logits.device)
        return loss + self.strength * self.temperature**2 * F.kl_div(
            F.log_softmax(logits[:, known] / self.temperature, 1),
            F.log_softmax(old[:, known] / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )

    def held(self) -> dict[str, int]:
        return {"teacher": size_of(self.teacher)}
