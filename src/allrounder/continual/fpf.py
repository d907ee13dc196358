"""Forgetting prioritised finetuning (FPF): repair forgetting by retraining only what forgets, on a small buffer.

A wrapper around any learner. After the stream (FPF), or k times during it (k-FPF), everything is frozen but the modules
that change most between tasks, and those are trained on stored examples:

    C(l) = mean over tasks t of (1/|theta_l|) || theta_l(t+1) - theta_l(t) ||_1          which modules forget
    L = CE(f(x), y) + lambda || f(x) - z ||^2 / outputs,  (x, y, z) from the buffer      how they are repaired

with z the logits when x was stored (lambda = 0: FPF-CE, otherwise FPF-KD). In the phases between, the learner is left
as it is; with plain finetuning inside there is no replay at all, and a step costs half of what replay costs.

The modules are those above the largest gap in C (`sensitive`), where there is a gap. Adaptive optimisers move every
parameter alike, and then C tells nothing: the norms and the last layer that was trained are retrained, which is what
the paper found to forget, and a warning says so and names them.

Use it where old examples may be stored but not replayed all the time. On easy data retraining all parameters on the
same buffer keeps even more: compare with `modules=[""]` (all) and with `GDumb`. More than one time (k > 1) buys
accuracy during the stream, not at its end.

Cost: `times x steps x batch_size` examples over the learner's own; the backward pass ends at the lowest retrained
module. Where that is the output layer alone, the features of the buffer are computed once. Storage: the buffer, and two
copies of the parameters while modules are being chosen.

Modules that are not retrained stay bit for bit what they are, running statistics included: they run in evaluation mode.
Batch norms that are retrained update theirs on the buffer.

Paper: Zhao, Zhou, Long, Jiang and Zhang, "Does Continual Learning Equally Forget All Parameters?", ICML 2023, arXiv
2304.04158. The score by which it chooses modules is not known here in detail; the rule is a function that can be
replaced, and gap and fall-back are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import at, evaluating
from ..nets.taps import tapped, watching
from .buffer import Buffer
from .learner import Batch, GradientLearner, Learner, TaskInfo, size_of

__all__ = ["FPF", "change", "sensitive", "trigger_steps"]

GAP = 2.0  # times: what counts as a gap between changes
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def _parts(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Modules that hold tensors of their own -> those that can change (parameters, running statistics)."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        own = {key: value for key, value in own.items() if value.is_floating_point()}
        if own:
            found[name] = own
    return found


def _below(name: str, top: str) -> bool:
    """Whether a module is another one or within it."""
    return top in ("", name) or name.startswith(f"{top}.")


def change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean absolute change of each floating tensor's numbers, between two state dicts.

    >>> change({"a.weight": torch.zeros(2)}, {"a.weight": torch.tensor([1.0, -3.0])})
    {'a.weight': 2.0}
    """
    return {
        name: (after[name] - old).abs().double().mean().item()
        for name, old in before.items()
        if old.is_floating_point()
    }


def _gaps(changes: Mapping[str, float]) -> tuple[list[str], list[float]]:
    """Modules that change, least first, and the factors from each to the next."""
    moved = sorted((name for name, value in changes.items() if value > 0), key=lambda name: changes[name])
    return moved, [changes[after] / changes[before] for before, after in pairwise(moved)]


def sensitive(changes: Mapping[str, float], *, gap: float = GAP) -> list[str]:
    """The modules above the largest gap: where the changes, in order, rise by the largest factor.

    Args:
        changes: of each module, per number.
        gap: least factor that tells modules apart; above 1.

    Returns:
        Names in the order given; none where no factor is as large. A module that does not change is never among them.

    >>> sensitive({"conv": 0.003, "norm": 0.02, "layer": 0.004, "head": 0.03})
    ['norm', 'head']
    >>> sensitive({"conv": 0.003, "layer": 0.004, "head": 0.006})
    []
    """
    moved, factors = _gaps(changes)
    if len(moved) < 2:
        return moved
    if max(factors) < gap:
        return []
    above = set(moved[factors.index(max(factors)) + 1 :])
    return [name for name in changes if name in above]


def trigger_steps(total: int, times: int) -> list[int]:
    """Steps after which k-FPF retrains: `floor(total i / k)` for i = 1..k.

    >>> trigger_steps(10, 3)
    [3, 6, 10]
    """
    if not 1 <= times <= total:
        raise InputError(f"times is between 1 and the {total} steps of the stream, got {times}")
    return [total * i // times for i in range(1, times + 1)]


class FPF(Learner):
    """Any learner, repaired after the stream or several times during it.

    Args:
        learner: trains on the stream; its `model` is retrained. A learner with a replay buffer lends it.
        modules: names of what is retrained, as in `named_modules()`, with all below them (`""` is everything). Default:
            chosen by the change between tasks, which needs boundaries.
        choose: changes of modules -> names of modules, each taken without those below it, where `modules` are not
            given. Default: `sensitive`, and where that finds no gap the norms and the last layer.
        buffer: examples stored, where the learner has no buffer of its own.
        times: k, how often; the last time is at the end of the stream.
        total: steps of the whole stream, needed for `times` > 1.
        steps: optimiser steps each time.
        batch_size: examples a step.
        lr: of SGD with momentum 0.9, cosine to zero over the steps.
        distil: lambda, weight of the stored logits, >= 0.
        seed: of the buffer and its draws.

    Raises:
        InputError: names that no module has, more times than steps, settings out of range.

    Warns:
        When classes that were met are missing in the buffer at the time of retraining, and when no module stood out.
    """

    kept: ClassVar[tuple[str, ...]] = (
        "seen", "gradients", "learner", "buffer", "generator", "done", "spent", "last", "changes", "tasks",
    )  # fmt: skip

    def __init__(
        self,
        learner: GradientLearner,
        *,
        modules: Sequence[str] | None = None,
        choose: Callable[[Mapping[str, float]], list[str]] = sensitive,
        buffer: int = 200,
        times: int = 1,
        total: int | None = None,
        steps: int = 100,
        batch_size: int = 32,
        lr: float = 0.05,
        distil: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(learner.outputs)
        if times > 1 and total is None:
            raise InputError(f"times={times} needs total, the steps of the whole stream")
        if steps < 1 or batch_size < 1 or not lr > 0 or distil < 0:
            raise InputError(
                "steps and batch_size are at least 1, lr above 0, distil at least 0, "
                f"got {steps}, {batch_size}, {lr:g} and {distil:g}"
            )
        self.learner, self.modules, self.choose = learner, None if modules is None else list(modules), choose
        self.times, self.steps, self.batch_size, self.lr, self.distil = times, steps, batch_size, lr, distil
        self.answers_early = learner.answers_early
        self.triggers = [] if times == 1 else trigger_steps(total or 0, times)[:-1]
        lent: Any = getattr(learner, "buffer", None)
        self.own_buffer = not isinstance(lent, Buffer) or distil > 0
        self.buffer: Buffer = Buffer(buffer, policy="balanced", seed=seed) if self.own_buffer else lent
        self.generator = torch.Generator().manual_seed(seed)
        self.needs = learner.needs | (set() if modules is not None else {"boundaries"})  # type: ignore[misc]
        self.labels = learner.labels & {"single"}  # type: ignore[misc]
        self.done = self.tasks = self.spent = 0
        self.last: dict[str, Tensor] = {}
        self.changes: dict[str, float] = {}
        if self.modules is not None:
            self._selected(self.modules)

    def identity(self) -> dict[str, Any]:
        own = {"modules": self.modules, "triggers": self.triggers, "choose": getattr(self.choose, "__qualname__", "")}
        return super().identity() | own | {"inner": self.learner.identity()}

    @property
    def least_batch(self) -> int:
        """As the learner's."""
        return self.learner.least_batch

    @property
    def model(self) -> nn.Module:
        return self.learner.model

    @property
    def device(self) -> torch.device:
        return self.learner.device

    def begin_task(self, info: TaskInfo) -> None:
        self.learner.begin_task(info)

    def observe(self, batch: Batch) -> dict[str, float]:
        self.note_classes(batch.targets)
        logits = None
        if batch.repeat == 0 and self.own_buffer and self.distil:
            with torch.no_grad(), evaluating(self.model):
                logits = self.model(batch.inputs)
        found = self.learner.observe(batch)
        if batch.repeat == 0 and self.own_buffer:
            self.buffer.add(inputs=batch.inputs, targets=batch.targets, logits=logits)
        self.done += 1
        if self.done in self.triggers:
            self.finetune()
        self._count()
        return found

    def end_task(self, info: TaskInfo) -> None:
        self.learner.end_task(info)
        if self.modules is not None:
            return
        now = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.last:
            for name, value in change(self.last, now).items():
                self.changes[name] = (self.changes.get(name, 0.0) * (self.tasks - 1) + value) / self.tasks
        self.last = now
        self.tasks += 1

    def end_stream(self) -> None:
        self.learner.end_stream()
        self.finetune()
        self._count()

    @property
    def module_changes(self) -> dict[str, float]:
        """C(l): mean absolute change per number of each module between tasks, running statistics included."""
        found = {}
        for module, parts in _parts(self.model).items():
            sizes = {f"{module}.{key}".lstrip("."): value.numel() for key, value in parts.items()}
            total = sum(self.changes.get(name, 0.0) * size for name, size in sizes.items())
            found[module] = total / max(1, sum(sizes.values()))
        return found

    def _count(self) -> None:
        self.gradients = self.learner.gradients + self.spent

    def _selected(self, names: Sequence[str]) -> list[str]:
        """The modules with tensors that these names stand for."""
        parts, found = _parts(self.model), []
        for name in names:
            below = [part for part in parts if _below(part, name)]
            if not below:
                raise InputError(f"no module matches {name!r}; modules are {', '.join(parts)}")
            found += [part for part in below if part not in found]
        return found

    def _chosen(self) -> list[str]:
        """The modules that the changes so far stand for."""
        changes = self.module_changes
        found = list(self.choose(changes))
        if odd := [name for name in found if name not in changes]:
            raise InputError(f"choose gave {odd[0]!r}; modules with parameters are {', '.join(changes)}")
        moved, factors = _gaps(changes)
        if found or self.choose is not sensitive or not moved or not len(self.buffer):
            return found
        ended: list[str] = []
        some = at(self.buffer.all()["inputs"], slice(0, 2))
        with torch.no_grad(), evaluating(self.model), watching(self.model, moved, lambda name, *_: ended.append(name)):
            self.model(some)
        layers = [name for name in ended if not any(_below(other, name) for other in moved if other != name)]
        norms = [name for name in moved if isinstance(self.model.get_submodule(name), NORMS)]
        usual = {*norms, *(layers[-1:] or moved[-1:])}
        found = [name for name in changes if name in usual]
        warnings.warn(
            f"no module stands out by its change between tasks (the largest step is {max(factors):.2g}, a gap {GAP:g} "
            f"times): FPF retrains the norms and the last layer, {', '.join(found)}; name others with modules=",
            stacklevel=3,
        )
        return found

    def finetune(self, modules: Sequence[str] | None = None) -> list[str]:
        """Retrain on the buffer now.

        Args:
            modules: what to retrain. Default: as the learner was told, or by the changes so far; before the second
                boundary there are none, and nothing is done.

        Returns:
            The modules that were retrained.
        """
        names = modules if modules is not None else self.modules
        if names is None and not self.changes:
            warnings.warn("FPF has seen no change between tasks yet: nothing is retrained", stacklevel=2)
            return []
        chosen = self._chosen() if names is None else self._selected(names)
        if not chosen:
            return []
        present = self.buffer.all()["targets"].unique().tolist() if len(self.buffer) else []
        if missing := sorted(set(self.seen.nonzero().flatten().tolist()) - set(present)):
            warnings.warn(f"the buffer has no example of the classes {missing}: FPF will unlearn them", stacklevel=2)
        if not present:
            return []
        self._retrain(chosen)
        return chosen

    def _retrain(self, chosen: list[str]) -> None:
        parts = _parts(self.model)
        own = {id(tensor) for name in chosen for tensor in parts[name].values()}
        flags = {p: p.requires_grad for p in self.model.parameters()}
        gradients = {p: p.grad for p in self.model.parameters()}
        trained = [p for p in self.model.parameters() if id(p) in own]
        try:
            for p in flags:
                p.requires_grad_(id(p) in own)
                p.grad = None
            with evaluating(self.model):
                for name in chosen:
                    self.model.get_submodule(name).training = True
                head = self._output_layer(chosen)
                self._descend(trained, head)
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
                p.grad = gradients[p]

    def _output_layer(self, chosen: list[str]) -> str | None:
        """The one retrained module, if what it gives is what the model gives: features can then be computed once."""
        if len(chosen) != 1 or not isinstance(self.model.get_submodule(chosen[0]), nn.Linear):
            return None
        some = at(self.buffer.all()["inputs"], slice(0, 2))
        with torch.no_grad(), tapped(self.model, chosen) as seen:
            out = self.model(some)
        return chosen[0] if chosen[0] in seen and torch.equal(seen[chosen[0]], out) else None

    def _descend(self, trained: list[nn.Parameter], head: str | None) -> None:
        stored = self.buffer.all()
        call: Callable[[Any], Tensor] = self.model
        if head is not None:
            parts = []
            with torch.no_grad(), tapped(self.model, [head], inputs=True, outputs=False) as seen:
                for rows in torch.arange(len(self.buffer)).split(256):
                    self.model(at(stored["inputs"], rows))
                    parts.append(seen[head])
            stored = stored | {"inputs": torch.cat(parts)}
            call = self.model.get_submodule(head)
        optimiser = torch.optim.SGD(trained, lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        count = len(self.buffer)
        size = min(self.batch_size, count)
        if size == 1 and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.model.modules()
        ):
            raise InputError("retraining a batch norm needs two stored examples at least; give a larger buffer")
        for _ in range(self.steps):
            rows = torch.randperm(count, generator=self.generator)[:size]
            logits, targets = call(at(stored["inputs"], rows)), stored["targets"][rows]
            loss = self.learner.criterion(logits, targets)
            if self.distil:
                loss = loss + self.distil * F.mse_loss(logits, stored["logits"][rows])
            if not torch.isfinite(loss):
                raise InputError(f"the loss is {loss.item()} in finetuning; lower its learning rate (lr={self.lr:g})")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            self.spent += size

    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        return self.learner.predict(inputs, task)

    def held(self) -> dict[str, int]:
        own = {"examples": self.buffer.bytes} if self.own_buffer else {}
        return self.learner.held() | own | {"last parameters": size_of(self.last)}
