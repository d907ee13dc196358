"""MOS on handwritten digits: two classes after another on a frozen random network, against its parts and SimpleCIL.

The network is `h0 = relu(W_0 x)` (64 -> 128), two blocks `h + relu(W h) / 2` and a layer norm without parameters, all
random and frozen; adapters of rank 8 go into the blocks. What is compared: class means on the frozen features; one
adapter trained through all tasks, with and without alignment of the head; MOS; MOS without one of its parts; and MOS
that is told the right adapter (oracle). Variants that differ only in how they answer share their training.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..continual.driver import learn
from ..continual.mos import MOS
from ..continual.simple_cil import SimpleCIL
from ..continual.stream import Stream, split_by_class
from ..study import Claim, Finding, Scale, draws
from .continual_substrate import digits_task

__all__ = ["RandomBlocks", "run"]

BATCH, EPOCHS = 32, 12  # about 80 steps a task
PLACES = [("halves.0", "halves.0"), ("halves.1", "halves.1")]
SETTINGS = {
    "epochs": EPOCHS, "rank": 8, "lr": 0.05, "weight_decay": 0.0, "relation": 0.0, "dropout": 0.0, "ridge": 1e-2,
    "replay": 20, "align_epochs": 30, "align_lr": 0.05,
}  # fmt: skip
WHOLE, CLASS_MEANS = "MOS", "class means, no training (SimpleCIL)"
UNALIGNED, ORACLE = "MOS without alignment", "MOS, oracle adapter"


class Half(nn.Linear):
    """`relu(W h) / 2`."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__(width, width, bias=False, device="meta")
        self.weight = nn.Parameter(torch.randn(width, width, generator=generator) * (2 / width) ** 0.5)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).relu() / 2


class RandomBlocks(nn.Module):
    """A random network with two residual blocks, `(B, 64) -> (B, 128)`."""

    def __init__(self, seed: int, width: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.entry = nn.Parameter(torch.randn(width, 64, generator=generator) * (2 / 64) ** 0.5)
        self.halves = nn.ModuleList(Half(width, generator) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.entry).relu()
        for half in self.halves:
            h = h + half(h)
        return F.layer_norm(h, h.shape[-1:])


def _trained(stream: Stream, seed: int, **changed: Any) -> MOS:
    settings: dict[str, Any] = {**SETTINGS, **changed}
    learner = MOS(RandomBlocks(seed), stream.outputs, places=PLACES, seed=seed, **settings)
    learner.answers_early = False  # the answers are asked for below, in several ways
    learn(learner, stream, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    return learner


def _accuracy(scores: Tensor, targets: Tensor) -> float:
    return 100 * (scores.argmax(1) == targets).double().mean().item()


def _draw(seed: int, split: str = "test") -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies in percent, and figures of the retrieval."""
    task = digits_task(seed)
    stream = split_by_class(task, 2, seed=seed)
    inputs, targets = task.split(split).inputs, task.split(split).targets  # type: ignore[attr-defined]
    means = SimpleCIL(RandomBlocks(seed), 10)
    learn(means, stream, batch_size=BATCH, seed=seed)
    mos, unaligned = _trained(stream, seed), _trained(stream, seed, align_epochs=0)
    alone, alone_unaligned = _trained(stream, seed, merge=0.0), _trained(stream, seed, merge=0.0, align_epochs=0)
    right = mos.task_of[targets]
    found, other = mos.retrieve(inputs), unaligned.retrieve(inputs)
    once = mos.retrieve(inputs, rounds=1)
    ensemble = lambda some: some.logits.softmax(1) + (mos.tasks * some.cosines).softmax(1)  # noqa: E731
    before = [value.clone() for value in mos.stored.values()]
    again = torch.equal(mos.predict(inputs), mos.predict(inputs))
    kept = all(torch.equal(a, b) for a, b in zip(before, mos.stored.values(), strict=True))
    accuracies = {
        "one adapter for all tasks": _accuracy(alone_unaligned.logits(inputs, mos.tasks - 1), targets),
        "one adapter for all tasks, aligned": _accuracy(alone.logits(inputs, mos.tasks - 1), targets),
        CLASS_MEANS: _accuracy(means.predict(inputs), targets),
        WHOLE: _accuracy(mos.predict(inputs), targets),
        UNALIGNED: _accuracy(unaligned.predict(inputs), targets),
        "MOS without merging": _accuracy(alone.predict(inputs), targets),
        "MOS without refinement": _accuracy(ensemble(once), targets),
        "MOS without ensemble": _accuracy(found.logits, targets),
        "MOS, diagonal covariances": _accuracy(_trained(stream, seed, diagonal=True).predict(inputs), targets),
        ORACLE: _accuracy(mos.logits(inputs, right), targets),
    }
    share = lambda adapter: 100 * (adapter == right).double().mean().item()  # noqa: E731
    figures = {
        "right adapter by class means, %": share(found.first),
        "right adapter after refinement, %": share(found.adapter),
        "the same without alignment, %": share(other.adapter),
        "passes an example": found.passes / len(inputs),
        "evaluation changes nothing": float(again and kept),
    }
    return accuracies, figures


def run(scale: Scale, seed: int) -> Finding:
    """Accuracies in percent over the test split, all ten classes, after the last task."""
    table = {draw: _draw(draw) for draw in draws(scale, seed)}

    def gain(one: str, other: str) -> float:
        return fmean(accuracies[one] - accuracies[other] for accuracies, _ in table.values())

    by_means, refined = "right adapter by class means, %", "right adapter after refinement, %"
    more = fmean(figures[refined] - figures[by_means] for _, figures in table.values())
    unchanged = all(figures["evaluation changes nothing"] for _, figures in table.values())
    claims = [
        Claim.at_least("MOS above class means without training, mean", gain(WHOLE, CLASS_MEANS), 3),
        Claim.at_least("MOS above MOS without alignment, mean", gain(WHOLE, UNALIGNED), 20),
        Claim.at_least("refinement finds more right adapters, mean", more, 2),
        Claim.at_most("the oracle adapter above MOS, mean", gain(ORACLE, WHOLE), 2),
        Claim("evaluation changes neither adapters nor answers", "yes", "yes" if unchanged else "no", unchanged),
    ]
    tables = {
        "accuracy, %": [
            {"draw": draw} | {name: round(value, 1) for name, value in accuracies.items()}
            for draw, (accuracies, _) in table.items()
        ],
        "retrieval": [
            {"draw": draw} | {name: round(value, 2) for name, value in figures.items()}
            for draw, (_, figures) in table.items()
        ],
    }
    return Finding(claims, tables)
