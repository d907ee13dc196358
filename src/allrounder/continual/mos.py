"""MOS: classes in steps on a frozen transformer, one small adapter a step, and no stored examples.

While a task is learned, its adapter A_b (bottlenecks beside the MLPs, `nets.block_adapters`) and one linear head h over
all classes are trained, the loss over the task's classes only:

    f = phi(x; A_b),  L = CE(h(f), y) + relation * R
    R = mean_i CE(row i of M M^T / 0.8, i),  M = [means of earlier classes ; f]
    after every step, from the second task on:   A_b <- (1 - merge) A_b + merge * mean_{k<b} A_k

Then a copy of A_b is frozen, each class's features are described by a Gaussian, and the head alone is trained on
samples of all classes so far (alignment). To answer, each example looks for its adapter: the nearest class mean under
the first adapter names a task, that task's adapter and the head name a class and so a task again, until the task stays
(at most 4 rounds). The answer is `softmax(h(phi(x; A_b))) + softmax(tasks * cosine)`, the cosine to the class means
under the first adapter.

Use it with a good pretrained transformer when classes come in groups with boundaries and examples may not be kept. Look
at `SimpleCIL` first (no training), and at what each part gives: on small data the alignment does nearly all of it.

Cost: training, one forward and backward pass of an example through a frozen model. Inference: one pass for all and one
for each (example, adapter) pair that is looked at and was not yet; about 2 passes an example, where computing every
adapter's features takes tasks + 1. Fewer there cannot be, as each of these answers decides something; they share the
first of L blocks, without its adapter, which is computed anew. Storage: an adapter a task (ViT-B: 1.2 MB) and d^2
numbers a class (d = 768: 2.4 MB; `diagonal`: 6 kB). One Cholesky factor for each class, when it is learned.

Paper: Sun et al., "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning", AAAI 2025, arXiv
2412.09441. R and the alignment are in its code only (both from SLCA, Zhang et al., ICCV 2023, arXiv 2303.05118).
Departures from that code: it merges 12 times in every forward pass besides, in evaluation into the stored adapters too,
which become their predecessors within some tens of test batches; here a merge follows an optimiser step and nothing
else, and stored adapters never change. So published figures belong to a different variant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.block_adapters import adapter_places, block_adapters, insert_adapters
from ..nets.calling import at, evaluating
from .gaussian_stats import GaussianStats
from .learner import Batch, Learner, TaskInfo, size_of

__all__ = ["MOS", "Retrieval"]

TEMPERATURE = 0.8  # of R
MOMENTUM = 0.9


@dataclass(frozen=True)
class Retrieval:
    """What was found for a batch.

    Args:
        adapter: `(B,)` number of the adapter that was settled on.
        first: `(B,)` the one that the class means pointed to.
        logits: `(B, outputs)` of the head with `adapter`; `-inf` for classes that were not learned.
        cosines: `(B, outputs)` with the class means under adapter 0; `-inf` as above.
        passes: examples that went through the backbone, in all.
    """

    adapter: Tensor
    first: Tensor
    logits: Tensor
    cosines: Tensor
    passes: int


class MOS(Learner):
    """Model surgery: adapters that are merged while they are learned, and found again by the examples themselves.

    Args:
        backbone: `inputs -> features (B, d)`, a transformer or a module around one. Its parameters are frozen
            (`requires_grad` off), its own dropout too.
        outputs: size of the output space.
        epochs: passes over each task that will be made; the learning rate falls to zero over them (cosine).
        features: d. Default: the size of the blocks' tokens.
        rank: of the bottlenecks. Paper: 16.
        places: where adapters go; default `nets.adapter_places(backbone)`.
        lr: of SGD for the adapter. Paper: 0.01 to 0.05 by data set. The head has a tenth of it.
        weight_decay: Paper: 5e-4 or 5e-3.
        merge: share of the mean of earlier adapters that enters after each step, [0, 1). Paper: 0.1.
        relation: weight of R, >= 0. Code: 0.1.
        align_epochs: rounds of alignment; 0 for none. Code: 30.
        align_lr: of SGD there. Code: 0.005.
        replay: samples of each class in a round, and samples in a step. Code: 5 batches.
        ridge, diagonal: of the classes' Gaussians, see `GaussianStats`.
        dropout: of the bottlenecks in training. Paper: 0.1.
        seed: of everything random but dropout, which follows torch's global generator.

    Attributes:
        tasks: how many were finished.
        task_of: `(outputs,)` the task of each class, -1 for those not learned.
        stored: the adapters of finished tasks, `(tasks, blocks, ...)`.

    Raises:
        InputError: settings out of range, a backbone without token blocks (convolutions), with `places` that it lacks
            or features of another size; a class with a single example, more passes than `epochs`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundaries", "class_list"})
    kept: ClassVar[tuple[str, ...]] = (
        "seen", "gradients", "tasks", "task_of", "adapter", "head", "optimiser", "stored", "stats", "prototypes",
        "task_classes", "generator",
    )  # fmt: skip

    def __init__(
        self,
        backbone: nn.Module,
        outputs: int,
        *,
        epochs: int,
        features: int | None = None,
        rank: int = 16,
        places: Sequence[tuple[str, str]] | None = None,
        lr: float = 0.03,
        weight_decay: float = 5e-4,
        merge: float = 0.1,
        relation: float = 0.1,
        align_epochs: int = 30,
        align_lr: float = 0.005,
        replay: int = 240,
        ridge: float = 1e-4,
        diagonal: bool = False,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(outputs)
        if not 0 <= merge < 1:
            raise InputError(f"merge is a share within [0, 1), got {merge:g}")
        if min(lr, align_lr) <= 0 or min(weight_decay, relation) < 0:
            raise InputError("learning rates are above 0, weight_decay and relation at least 0")
        if epochs < 1 or replay < 1 or align_epochs < 0:
            raise InputError(
                f"epochs and replay are at least 1, align_epochs 0, got {epochs}, {replay}, {align_epochs}"
            )
        self.places = adapter_places(backbone) if places is None else list(places)
        self.backbone = backbone.requires_grad_(False)
        self.adapter = block_adapters(backbone, rank, places=self.places, seed=seed)
        self.epochs, self.lr, self.weight_decay, self.merge, self.relation = epochs, lr, weight_decay, merge, relation
        self.align_epochs, self.align_lr, self.replay = align_epochs, align_lr, replay
        self.rank, self.ridge, self.diagonal, self.dropout, self.seed = rank, ridge, diagonal, dropout, seed
        self.generator = torch.Generator().manual_seed(seed)
        down = self.adapter["down"]
        width = features or down.shape[-1]
        self.head = nn.Linear(width, outputs, device="meta", dtype=down.dtype).to_empty(device=down.device)
        with torch.no_grad():
            for value in self.head.parameters():
                drawn = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
                value.copy_((2 * drawn - 1) * width**-0.5)
        self.optimiser = self._optimiser([(self.adapter.parameters(), lr), (self.head.parameters(), lr / 10)])
        self.stats = GaussianStats(ridge=ridge, diagonal=diagonal)
        self.prototypes = down.new_zeros(outputs, width).detach()
        self.stored = {name: value.detach().new_empty(0, *value.shape) for name, value in self.adapter.items()}
        self.task_of = torch.full((outputs,), -1)
        self.tasks = 0
        self.task_classes: list[int] | None = None
        self._goal: list[Tensor] = []

    def _optimiser(self, groups: Iterable[tuple[Iterable[nn.Parameter], float]]) -> torch.optim.Optimizer:
        rows: list[dict[str, Any]] = [{"params": list(values), "lr": lr, "start": lr} for values, lr in groups]
        return torch.optim.SGD(rows, lr=1.0, momentum=MOMENTUM, weight_decay=self.weight_decay)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    # training

    def begin_task(self, info: TaskInfo) -> None:
        if info.classes is None:
            raise InputError("MOS needs the classes of a task when it begins; this stream does not tell")
        counts = torch.zeros(self.outputs, dtype=torch.long)
        for batch in info.batches:
            self._check(batch.targets, info.classes)
            counts += torch.bincount(batch.targets.cpu(), minlength=self.outputs)
        for label in info.classes:
            if counts[label] < 2:
                raise InputError(f"class {label} has {int(counts[label])} examples; a covariance needs at least 2")
        if again := [label for label in info.classes if self.task_of[label] >= 0]:
            warnings.warn(
                f"class {again[0]} comes again: after this task its mean, covariance and adapter are this task's",
                stacklevel=2,
            )
        self.task_classes = list(info.classes)
        self.optimiser.state.clear()
        self._aim()

    def _aim(self) -> None:
        """The mean of the stored adapters, towards which the present one is merged."""
        self._goal = [value.mean(0) for value in self.stored.values()] if self.tasks else []

    def _check(self, targets: Tensor, classes: Iterable[int]) -> None:
        self.note_classes(targets)
        if odd := sorted(set(targets.tolist()) - set(classes)):
            raise InputError(f"a batch has the target {odd[0]}, which is not among the classes of the task")

    def observe(self, batch: Batch) -> dict[str, float]:
        if self.task_classes is None:
            raise InputError("MOS learns within tasks: call begin_task first")
        if batch.repeat >= self.epochs:
            raise InputError(f"MOS was told of {self.epochs} passes over a task, this is pass {batch.repeat + 1}")
        self._check(batch.targets, self.task_classes)
        self.gradients += len(batch)
        _cool(self.optimiser, batch.repeat / self.epochs)
        features = self._through(batch.inputs, self.adapter, dropout=self.dropout)
        outside = torch.ones(self.outputs, dtype=torch.bool, device=features.device)
        outside[self.task_classes] = False
        loss = F.cross_entropy(self.head(features).masked_fill(outside, float("-inf")), batch.targets)
        if self.relation:
            loss = loss + self.relation * self._relation(features)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()}; lower the learning rate (lr={self.lr:g}) or check the inputs")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.merge_step()
        return {"loss": loss.item()}

    def _relation(self, features: Tensor) -> Tensor:
        """R: each earlier class mean and each feature shall be most like itself."""
        known = [mean for label, mean in self.stats.means.items() if label not in (self.task_classes or ())]
        rows = torch.cat([torch.stack(known), features]) if known else features
        return F.cross_entropy(rows @ rows.T / TEMPERATURE, torch.arange(len(rows), device=rows.device))

    @torch.no_grad()
    def merge_step(self) -> None:
        """Move the present adapter towards the mean of the earlier ones; called after every optimiser step."""
        if self._goal and self.merge:
            torch._foreach_lerp_(list(self.adapter.values()), self._goal, self.merge)

    @torch.no_grad()
    def end_task(self, info: TaskInfo) -> None:
        if self.task_classes is None:
            raise InputError("there is no task to end: call begin_task first")
        classes, self.task_classes = self.task_classes, None
        self.stored = {
            name: torch.cat([earlier, self.adapter[name].detach().unsqueeze(0)])
            for name, earlier in self.stored.items()
        }
        self.tasks += 1
        own, first, targets = [], [], []
        for batch in info.batches:
            own.append(self.features(batch.inputs, self.tasks - 1))
            first.append(self.features(batch.inputs, 0) if self.tasks > 1 else own[-1])
            targets.append(batch.targets)
        last, base, labels = torch.cat(own), torch.cat(first), torch.cat(targets)
        for label in classes:
            self.stats.add(label, last[labels == label])
            self.prototypes[label] = base[labels == label].mean(0)
        self.task_of[classes] = self.tasks - 1
        if self.tasks > 1:
            self._align()

    @torch.enable_grad()
    def _align(self) -> None:
        """Train the head on samples of every class so far."""
        known, classes = self.task_of >= 0, sorted(self.stats.means)
        optimiser = self._optimiser([(self.head.parameters(), self.align_lr)])
        outside = (~known).to(self.device)
        for epoch in range(self.align_epochs):
            _cool(optimiser, epoch / self.align_epochs)
            features, labels = self.stats.sample(classes, self.replay, self.generator)
            order = torch.randperm(len(labels), generator=self.generator).to(labels.device)
            for rows in order.split(self.replay):
                logits = self.head(features[rows]).masked_fill(outside, float("-inf"))
                optimiser.zero_grad()
                F.cross_entropy(logits, labels[rows]).backward()
                optimiser.step()
        self.optimiser.zero_grad()

    # answers

    def _through(
        self,
        inputs: Any,
        adapters: Mapping[str, Tensor] | nn.ParameterDict,
        which: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        with (
            evaluating(self.backbone),
            insert_adapters(self.backbone, adapters, which=which, places=self.places, dropout=dropout),
        ):
            features = self.backbone(inputs)
        if features.ndim != 2 or features.shape[1] != self.head.in_features:
            raise InputError(
                f"the backbone gives features {tuple(features.shape)}, expected (B, {self.head.in_features}): "
                "give features="
            )
        return features.to(self.head.weight.dtype)

    @torch.no_grad()
    def features(self, inputs: Any, adapter: int | Tensor) -> Tensor:
        """`(B, d)` with the adapter of a finished task, or with one for each example `(B,)`."""
        if not self.tasks:
            raise InputError("MOS has finished no task yet: it has no adapters to answer with")
        chosen = torch.as_tensor(adapter)
        low, high = int(chosen.min()), int(chosen.max())
        if not 0 <= low <= high < self.tasks:
            odd = high if high >= self.tasks else low
            raise InputError(f"there are adapters 0 to {self.tasks - 1}, one for each finished task; got {odd}")
        if low == high:
            return self._through(inputs, {name: value[low] for name, value in self.stored.items()})
        return self._through(inputs, self.stored, which=chosen.to(self.device))

    @torch.no_grad()
    def logits(self, inputs: Any, adapter: int | Tensor) -> Tensor:
        """`(B, outputs)` of the head with these adapters, `-inf` for classes that were not learned."""
        return self._known(self.head(self.features(inputs, adapter)))

    def _known(self, values: Tensor) -> Tensor:
        return values.masked_fill((self.task_of < 0).to(values.device), float("-inf"))

    @torch.no_grad()
    def retrieve(self, inputs: Any, rounds: int = 4) -> Retrieval:
        """Find the adapter of each example.

        Args:
            inputs: a batch.
            rounds: how often the head may name a task, at least 1; 1 stays with what the class means say. Paper: 4.

        Nothing is computed twice: a pair of example and adapter that was looked at is remembered.
        """
        if rounds < 1:
            raise InputError(f"rounds is at least 1, got {rounds}: the head answers once with the adapter of the means")
        start = self.features(inputs, 0)
        cosines = self._known(F.normalize(start, dim=1) @ F.normalize(self.prototypes, dim=1).T)
        task_of = self.task_of.to(start.device)
        adapter = task_of[cosines.argmax(1)]
        first, passes = adapter.clone(), len(adapter)
        looked = [(torch.zeros_like(adapter), self._known(self.head(start)))]
        logits = torch.empty_like(cosines)
        active = torch.arange(len(adapter), device=adapter.device)
        for turn in range(rounds):
            todo = torch.ones_like(active, dtype=torch.bool)
            for used, answers in looked:
                hit = used[active] == adapter[active]
                logits[active[hit]] = answers[active[hit]]
                todo &= ~hit
            if todo.any():
                rows = active[todo]
                logits[rows] = self.logits(at(inputs, rows), adapter[rows])
                passes += len(rows)
            looked.append((adapter.clone(), logits.clone()))
            named = task_of[logits[active].argmax(1)]
            moving = named != adapter[active]
            active, named = active[moving], named[moving]
            if turn + 1 == rounds or not len(active):
                break
            adapter[active] = named
        return Retrieval(adapter, first, logits, cosines, passes)

    @torch.no_grad()
    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        """Sums of two probabilities `(B, outputs)`, `-inf` for classes that were not learned."""
        found = self.retrieve(inputs)
        return self._known(found.logits.softmax(1) + (self.tasks * found.cosines).softmax(1))

    # state

    def held(self) -> dict[str, int]:
        return {
            "adapters": size_of(self.stored), "class means and covariances": self.stats.bytes,
            "prototypes": size_of(self.prototypes),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for part in ("adapter", "head"):
            for name, value in getattr(self, part).state_dict().items():
                given = state.get(part, {}).get(name)
                if given is not None and given.shape != value.shape:
                    raise InputError(
                        f"the saved {part} has {name!r} of {tuple(given.shape)}, this learner of {tuple(value.shape)}: "
                        "it was made with other settings"
                    )
        super().load_state_dict(state)
        self.stored = {name: value.to(self.device) for name, value in self.stored.items()}
        self.prototypes = self.prototypes.to(self.device)
        for kept in (self.stats.means, self.stats.factors):
            kept.update({label: value.to(self.device) for label, value in kept.items()})
        self._aim()


def _cool(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Cosine: learning rates after this share of the work."""
    for group in optimiser.param_groups:
        group["lr"] = group["start"] * 0.5 * (1 + math.cos(math.pi * share))
