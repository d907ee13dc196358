"""TAME: learn from a stream whose tasks change without notice, with an expert network for each, found by its loss.

A jump of the active expert's loss (`LossJump`) means that the task has changed. Then the first earlier expert whose own
band holds the new loss is recalled, and if there is none a new one is made. Only the active expert is trained. A small
uniform sample of the stream, with the number of the expert that was active, trains a selector, which answers at test:

    e* = argmax g(x),    y = argmax f_e*(x)

With `sparsity`, an expert that is left loses its smallest weights, trains on for a while on `pruning_buffer` of its
examples, and is stored packed: growth in bytes is a fraction of a network a task.

Use it where tasks come in stretches of many batches and inputs tell them apart (the selector must see which task an
input is from). Not for slow drift, shuffled data or stretches of a few batches (one expert then learns all), nor where
the same inputs have other labels in another task. Experts learn nothing from each other.

Cost: a step is one forward pass without gradient more than finetuning; the other experts are asked only at an alarm. At
test the selector and one expert. Storage: E networks (pruned: `1 - sparsity` of them and the places), M examples.

Paper: Zhu et al., "TAME: Task Agnostic Continual Learning using Multiple Experts", CVPR Workshops 2024,
arXiv 2210.03869. Departures from its code: a detector's grace period (see there); one smoothed loss an expert, from the
time it was active (the code's also runs while another is active, so that a recalled expert would raise the alarm at
once); the buffer is balanced over pairs of (expert, label), which the learner knows (the code uses true global classes,
and with them the task); pruning happens, and removes; momentum is forgotten when an expert is left; no schedule of the
learning rate (without tasks there are no epochs): give `optimiser` for another.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import at, evaluating
from ..task import Batches, to_device
from .buffer import Buffer
from .change_detection import LossJump
from .learner import Batch, Learner, least_batch, size_of
from .sparse_weights import Network, prune_globally, train_on, unpack
from .stream import Stream

__all__ = ["TAME", "Switch", "expert_accuracies"]


class Switch(NamedTuple):
    """Another expert becomes active before batch number `batch` (from 0)."""

    batch: int
    source: int | None
    target: int
    new: bool


class _Expert(Network):
    """A network, the detector that knows its losses, and its optimiser while it is trained."""

    def __init__(self, make: Callable[[], nn.Module], what: str, detector: LossJump) -> None:
        super().__init__(make, what)
        self.detector = copy.deepcopy(detector)
        self.detector.reset()
        self.optimiser: torch.optim.Optimizer | None = None


class TAME(Learner):
    """Task-agnostic experts.

    Args:
        expert: seed -> a new network, `inputs -> logits (B, outputs)`.
        selector: (number of experts, seed) -> a new network, `inputs -> logits (B, experts)`.
        outputs: size of the output space; labels may be shared by tasks or each task's own.
        buffer: examples stored for the selector. Paper: 5000.
        detector: how changes are found; copied for each expert. Default: `LossJump(log(outputs))`.
        lr, momentum, weight_decay: of SGD. Paper: 0.1, 0.9, 5e-4.
        optimiser: parameters -> optimiser of an expert, instead of that.
        selector_epochs, selector_lr: passes over the buffer. Paper: 100 to 200; 0.1 (1e-4 for a pretrained network).
        batch_size: of training on stored examples. Paper: 128.
        sparsity: share of an expert's weights removed when it is left, in [0, 1). Paper's code: 0.98.
        selector_sparsity: the same for the selector. Paper's code: 0.5.
        pruning_buffer: examples of the active expert's time kept for what follows pruning. Paper: 500.
        pruning_epochs: passes over them. Paper: 200.
        seed: of everything random.

    Attributes:
        events: every `Switch`, the first expert among them.
        active: number of the expert that is being trained.

    >>> learner = TAME(lambda seed: nn.Linear(4, 2), lambda experts, seed: nn.Linear(4, experts), 2)
    >>> _ = learner.observe(Batch(torch.zeros(3, 4), torch.tensor([0, 1, 1])))
    >>> len(learner.experts), learner.predict(torch.zeros(5, 4)).shape
    (1, torch.Size([5, 2]))
    """

    answers_early = False
    kept: ClassVar[tuple[str, ...]] = (
        *Learner.kept, "buffer", "recent", "generator", "batches", "active", "events", "experts",
        "selector", "selector_knows",
    )  # fmt: skip

    def __init__(
        self,
        expert: Callable[[int], nn.Module],
        selector: Callable[[int, int], nn.Module],
        outputs: int,
        *,
        buffer: int = 5000,
        detector: LossJump | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        selector_epochs: int = 100,
        selector_lr: float = 0.1,
        batch_size: int = 128,
        sparsity: float = 0.0,
        selector_sparsity: float = 0.0,
        pruning_buffer: int = 500,
        pruning_epochs: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__(outputs)
        if not (0 <= sparsity < 1 and 0 <= selector_sparsity < 1):
            raise InputError(f"sparsities are shares in [0, 1), got {sparsity:g} and {selector_sparsity:g}")
        if not (0 < lr < math.inf and 0 < selector_lr < math.inf):
            raise InputError(f"lr and selector_lr are positive learning rates, got {lr:g} and {selector_lr:g}")
        if min(selector_epochs, batch_size, pruning_buffer) < 1 or pruning_epochs < 0:
            raise InputError("selector_epochs, batch_size and pruning_buffer are at least 1, pruning_epochs at least 0")
        if buffer < outputs:
            raise InputError(f"a buffer of {buffer} cannot hold one example of each of {outputs} classes; enlarge it")
        self.make_expert, self.make_selector, self.make_optimiser = expert, selector, optimiser
        self.buffer_size, self.lr, self.momentum, self.weight_decay = buffer, lr, momentum, weight_decay
        self.selector_epochs, self.selector_lr, self.batch_size = selector_epochs, selector_lr, batch_size
        self.sparsity, self.selector_sparsity, self.seed = sparsity, selector_sparsity, seed
        self.pruning_buffer, self.pruning_epochs = pruning_buffer, pruning_epochs
        self.detector = LossJump(math.log(outputs)) if detector is None else detector
        self.buffer = Buffer(buffer, policy="balanced", seed=seed)
        self.recent = Buffer(pruning_buffer, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = self.active = self.selector_knows = 0
        self.events: list[Switch] = []
        self.experts: list[_Expert] = []
        self.selector: Network | None = None
        self.experts.append(self._new(0))

    @property
    def device(self) -> torch.device:
        return self.experts[0].device

    @property
    def least_batch(self) -> int:
        """2 for experts with batch norms."""
        return least_batch(self.network(self.active))

    def identity(self) -> dict[str, Any]:
        shapes = {name: list(tensor.shape) for name, tensor in unpack(self.experts[0].content).items()}
        return {**super().identity(), "detector": self.detector.settings(), "expert's shapes": shapes}

    def _new(self, number: int) -> _Expert:
        one = _Expert(partial(self.make_expert, self.seed + number), f"expert {number}", self.detector)
        if any(one.module is known.module for known in self.experts):
            raise InputError("expert gave the same network twice; it must make a new one at each call")
        return one

    def network(self, number: int) -> nn.Module:
        """An expert's network: itself, or an unpacked copy where it is stored packed."""
        return self.experts[number].view()

    def _logits(self, module: nn.Module, inputs: Any) -> Tensor:
        with torch.no_grad(), evaluating(module):
            logits = module(inputs)
        if logits.ndim != 2 or logits.shape[1] != self.outputs:
            raise InputError(f"an expert gives {tuple(logits.shape)}; expected (B, {self.outputs})")
        return logits

    def _loss(self, number: int, batch: Batch) -> float:
        return F.cross_entropy(self._logits(self.network(number), batch.inputs).float(), batch.targets).item()

    def observe(self, batch: Batch) -> dict[str, float]:
        self.enough(batch)
        self.note_classes(batch.targets)
        if not self.events:
            self.events = [Switch(self.batches, None, 0, True)]
        loss = self._loss(self.active, batch)
        if self.experts[self.active].detector.update(loss):
            loss = self._change(batch)
        self._step(self.experts[self.active], batch)
        if batch.repeat == 0:
            known_as = torch.full_like(batch.targets, self.active)
            pairs = known_as * self.outputs + batch.targets
            self.buffer.add(groups=pairs, inputs=batch.inputs, targets=batch.targets, experts=known_as)
        if self.sparsity:
            self.recent.add(inputs=batch.inputs, targets=batch.targets)
        self.batches += 1
        return {"loss": loss, "expert": float(self.active), "experts": float(len(self.experts))}

    def _change(self, batch: Batch) -> float:
        """Recall an expert or make one; returns its loss on the batch."""
        left = self.active
        losses = ((number, self._loss(number, batch)) for number in range(len(self.experts)) if number != left)
        found = next((pair for pair in losses if not self.experts[pair[0]].detector.exceeds(pair[1])), None)
        self._leave(left)
        if found is None:
            self.experts.append(self._new(len(self.experts)))
        self.active, loss = found or (len(self.experts) - 1, self._loss(len(self.experts) - 1, batch))
        self.events = [*self.events, Switch(self.batches, left, self.active, found is None)]
        self.experts[self.active].detector.update(loss)
        return loss

    def _trainer(self, module: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in module.parameters() if p.requires_grad]
        if self.make_optimiser is not None:
            return self.make_optimiser(parameters)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def _step(self, one: _Expert, batch: Batch) -> None:
        module = one.open()
        one.optimiser = self._trainer(module) if one.optimiser is None else one.optimiser
        module.train()
        one.optimiser.zero_grad()
        loss = F.cross_entropy(module(batch.inputs), batch.targets)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()}; lower the learning rate (lr={self.lr:g})")
        loss.backward()
        one.optimiser.step()
        self.gradients += len(batch)

    def _leave(self, number: int) -> None:
        one = self.experts[number]
        one.optimiser = None
        if self.sparsity and one.module is not None and len(self.recent):
            stored = self.recent.all()
            self._prune(one.module, stored["inputs"], stored["targets"], self.sparsity, self.lr)
            one.close()
            self.recent = Buffer(self.pruning_buffer, seed=self.seed + len(self.events))

    def _prune(self, module: nn.Module, inputs: Any, targets: Tensor, sparsity: float, lr: float) -> None:
        self.gradients += train_on(
            module, inputs, targets, epochs=self.pruning_epochs, batch_size=self.batch_size, lr=lr,
            weight_decay=1e-4, generator=self.generator, masks=prune_globally(module, sparsity),
        )  # fmt: skip

    def end_stream(self) -> None:
        self._leave(self.active)
        self.train_selector()

    def train_selector(self) -> None:
        """Train a selector on what is stored; done at the end of the stream, and on request at any time.

        Raises:
            InputError: when nothing was observed, or the selector's network has another number of outputs.
        """
        if not len(self.buffer):
            raise InputError("the buffer is empty: let the learner observe before its selector is trained")
        count, stored = len(self.experts), self.buffer.all()
        if count == 1:
            return
        selector = self._blank_selector(count)
        module = selector.open()
        with torch.no_grad(), evaluating(module):
            width = module(at(stored["inputs"], slice(1))).shape[1]
        if width != count:
            raise InputError(f"the selector gives {width} outputs for {count} experts; build it for the number given")
        self.gradients += train_on(
            module, stored["inputs"], stored["experts"], epochs=self.selector_epochs, batch_size=self.batch_size,
            lr=self.selector_lr, weight_decay=self.weight_decay, generator=self.generator,
        )  # fmt: skip
        if self.selector_sparsity:
            self._prune(module, stored["inputs"], stored["experts"], self.selector_sparsity, self.selector_lr)
            selector.close()
        self.selector, self.selector_knows = selector, count

    def _blank_selector(self, count: int) -> Network:
        return Network(lambda: self.make_selector(count, self.seed).to(self.device), "the selector")

    @torch.no_grad()
    def choose(self, inputs: Any) -> Tensor:
        """The expert for each input, `(B,)`.

        Raises:
            InputError: when there are several experts and the selector does not know them.
        """
        count = len(self.experts)
        if count == 1:
            rows = len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)
            return torch.zeros(rows, dtype=torch.long, device=self.device)
        if self.selector is None or self.selector_knows != count:
            raise InputError(
                f"the selector is not trained: there are {count} experts and it knows {self.selector_knows}; "
                "end the stream or call train_selector()"
            )
        with evaluating(module := self.selector.view()):
            return module(inputs).argmax(1)

    @torch.no_grad()
    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        chosen = self.choose(inputs)
        logits: Tensor | None = None
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().flatten()
            found = self._logits(self.network(number), at(inputs, rows))
            logits = found.new_empty(len(chosen), self.outputs) if logits is None else logits
            logits[rows] = found
        if logits is None:
            raise InputError("there is nothing to predict: give at least one input")
        return self.masked(logits)

    def owners(self, tasks: Sequence[int]) -> list[int]:
        """The task each expert was trained on for most batches; for judging, the learner does not know it.

        Args:
            tasks: true task of every batch that was observed.
        """
        if len(tasks) != self.batches:
            raise InputError(f"{self.batches} batches were observed, got the tasks of {len(tasks)}")
        counts = [Counter() for _ in self.experts]
        for event, end in zip(self.events, [*(event.batch for event in self.events[1:]), self.batches], strict=True):
            counts[event.target].update(tasks[event.batch : end])
        return [count.most_common(1)[0][0] if count else -1 for count in counts]

    def held(self) -> dict[str, int]:
        experts = [size_of(one.content) for one in self.experts]
        return {
            "experts": sum(experts) - max(experts),
            "selector": 0 if self.selector is None else size_of(self.selector.content),
            "examples": self.buffer.bytes,
            "examples for pruning": self.recent.bytes,
        }

    def state_dict(self) -> dict[str, Any]:
        experts = [
            {
                "network": one.state(), "detector": one.detector.state_dict(),
                "optimiser": None if one.optimiser is None else one.optimiser.state_dict(),
            }
            for one in self.experts
        ]  # fmt: skip
        own = {"experts": experts, "selector": None if self.selector is None else self.selector.state()}
        return {**super().state_dict(), **own, "events": [tuple(event) for event in self.events]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if odd := sorted(set(state) ^ set(self.kept)):
            raise InputError(f"the saved state does not fit TAME: {odd[0]!r} is in one of them only")
        experts = [self._new(number) for number in range(len(state["experts"]))]
        for one, saved in zip(experts, state["experts"], strict=True):
            one.load(saved["network"])
            one.detector.load_state_dict(saved["detector"])
            if saved["optimiser"] is not None:
                one.optimiser = self._trainer(one.open())
                one.optimiser.load_state_dict(saved["optimiser"])
        selector = None
        if state["selector"] is not None:
            selector = self._blank_selector(state["selector_knows"])
            selector.load(state["selector"])
        own = {"experts": experts, "selector": selector, "events": [Switch(*event) for event in state["events"]]}
        super().load_state_dict({**state, **own})  # which sets these three as they are


@torch.no_grad()
def expert_accuracies(
    learner: TAME, stream: Stream, owners: Sequence[int], *, split: str = "test"
) -> dict[str, dict[str, float]]:
    """Two ways to count an answer as right, and how often the selector finds an expert of the task.

    Args:
        learner: with its selector trained.
        stream: its tasks.
        owners: the task of each expert (`learner.owners`).
        split: what is measured.

    Returns:
        Task -> `within`: the label is right within the answering expert's task, even if that is the wrong task (the
        paper's code counts this); `strict`: the label is right and, where tasks share labels, so is the task;
        `selected`: the expert is one of the task's. 0 to 1.
    """
    classes = {task.task: list(task.classes) for task in stream.tasks}
    shared = len({task.classes for task in stream.tasks}) == 1
    place = torch.full((len(learner.experts), stream.outputs), -1)
    for number, owner in enumerate(owners):
        if owner in classes:
            place[number, classes[owner]] = torch.arange(len(classes[owner]))
    found = {}
    for task in stream.tasks:
        true_place = torch.full((stream.outputs,), -2)
        true_place[classes[task.task]] = torch.arange(len(classes[task.task]))
        rows = []
        for inputs, targets in Batches(getattr(task, split), 256):
            moved = to_device(inputs, learner.device)
            chosen, answer = learner.choose(moved).cpu(), learner.predict(moved).argmax(1).cpu()
            selected = torch.tensor(list(owners))[chosen] == task.task
            within = place[chosen, answer] == true_place[targets]
            strict = (answer == targets) & (selected if shared else torch.ones_like(selected))
            rows.append(torch.stack([within, strict, selected], 1).double())
        found[task.name] = dict(zip(("within", "strict", "selected"), torch.cat(rows).mean(0).tolist(), strict=True))
    return found
