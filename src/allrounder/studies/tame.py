"""TAME on handwritten digits with permuted pixels, a stream that does not tell where its tasks begin.

Against: one network trained on what comes, replay with as many stored examples (with a network of one expert's size,
and with one of all experts' and the selector's), and an expert a task with true task numbers in training and at test.
Tasks come once, or return (0, 1, 2, 1, 3); on a stream of one task no second expert may be made. On digits split into
pairs of classes the two ways to count an answer stand side by side. The detector also drives EWC, and is compared with
a fixed threshold and with Page and Hinkley's test. Settings are the paper's for MNIST where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from ..continual.baselines import ER, Finetune
from ..continual.change_detection import AtChanges, Detector, LossJump
from ..continual.driver import learn
from ..continual.learner import size_of
from ..continual.regularisers import EWC
from ..continual.stream import Stream, hide, permuted, revisit, split_by_class
from ..continual.tame import TAME, expert_accuracies
from ..data.digits import digits
from ..nets.multitask import mlp
from ..study import Claim, Finding, Scale, draws
from ..task import Examples, Task

__all__ = ["run"]

BATCH, WINDOW, STORED, WIDTH = 30, 35, 500, 100
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
SECRET = ("boundaries", "task_id_train", "class_list")


class _Fixed:
    """Alarm when a loss is above a fixed one after one that was below."""

    def __init__(self, limit: float = 1.0) -> None:
        self.limit, self.below = limit, False

    def update(self, loss: float) -> bool:
        alarm = self.below and loss > self.limit
        self.below = loss <= self.limit
        return alarm

    def reset(self) -> None:
        self.below = False

    def state_dict(self) -> dict[str, Any]:
        return {"below": self.below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.below = state["below"]


class _PageHinkley:
    """Alarm when the sum of (loss - mean - 0.05) has risen by 1 above its least; no alarm before 17 losses."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.count, self.mean, self.sum, self.least = 0, 0.0, 0.0, 0.0

    def update(self, loss: float) -> bool:
        self.count += 1
        self.mean += (loss - self.mean) / self.count
        self.sum += loss - self.mean - 0.05
        self.least = min(self.least, self.sum)
        return self.count > WINDOW // 2 and self.sum - self.least > 1

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def _task(seed: int) -> Task:
    """Digits with 1,200 for training: nothing is chosen here, so validation examples are training examples."""
    task = digits(seed=seed)["straight"]
    inputs, targets = (
        torch.cat([getattr(split, part) for split in (task.train, task.validation)]) for part in ("inputs", "targets")
    )
    return Task(task.name, Examples(inputs, targets), task.validation, task.test, outputs=task.outputs)


def _tame(seed: int, **options: Any) -> TAME:
    return TAME(
        lambda s: mlp([64, WIDTH, WIDTH, 10], seed=s), lambda n, s: mlp([64, WIDTH, n], seed=s), 10,
        buffer=STORED, detector=LossJump(math.log(10), window=WINDOW), batch_size=32, seed=seed, **options,
    )  # fmt: skip


def _steps(stream: Stream, epochs: int) -> list[int]:
    """The true task of every batch; the driver leaves out a last batch of one example."""
    counts = [(len(item.train) + BATCH - 2) // BATCH for item in stream]
    return [item.task for item, count in zip(stream, counts, strict=True) for _ in range(epochs * count)]


def _delays(alarms: Sequence[int], true: Sequence[int]) -> tuple[list[float], int]:
    """Batches from each change of task to the first alarm before the next, and alarms that found nothing."""
    changes = [i for i in range(1, len(true)) if true[i] != true[i - 1]]
    found: list[float] = []
    for change, end in zip(changes, [*changes, len(true)][1:], strict=True):
        found.append(min((alarm - change for alarm in alarms if change <= alarm < end), default=math.inf))
    return found, len(alarms) - sum(math.isfinite(delay) for delay in found)


def _experts(stream: Stream, epochs: int, seed: int, **options: Any) -> dict[str, float]:
    learner = _tame(seed, **options)
    record = learn(learner, hide(stream, *SECRET), epochs=epochs, batch_size=BATCH, seed=seed)
    true = _steps(stream, epochs)
    owners = learner.owners(true)
    counts = expert_accuracies(learner, stream, owners).values()
    delays, false = _delays([event.batch for event in learner.events[1:]], true)
    return {
        "accuracy": 100 * record.average,
        "strict": 100 * fmean(row["strict"] for row in counts),
        "within": 100 * fmean(row["within"] for row in counts),
        "experts": len(learner.experts),
        "experts off by": abs(len(learner.experts) - len(stream.tasks)),
        "worst delay": max(delays, default=0.0),
        "false alarms": false,
        "bytes of networks": size_of([one.content for one in learner.experts])
        + (0 if learner.selector is None else size_of(learner.selector.content)),
        "bytes held": sum(learner.held().values()),
    }


def _single(learner: Any, stream: Stream, epochs: int, seed: int) -> float:
    """Final average accuracy in percent."""
    return 100 * learn(learner, stream, epochs=epochs, batch_size=BATCH, seed=seed).average


def _told(stream: Stream, epochs: int, seed: int) -> float:
    """An expert a task, with true numbers in training and at test."""
    scores = []
    for number, task in enumerate(stream.tasks):
        alone = Stream([task], outputs=stream.outputs)
        net = mlp([64, WIDTH, WIDTH, 10], seed=seed + number)
        scores.append(_single(Finetune(net, 10, weight_decay=5e-4, **SGD), alone, epochs, seed))
    return fmean(scores)


def _draw(seed: int, tasks: int, epochs: int, full: bool) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    stream = permuted(_task(seed), tasks, seed=seed)
    blind = hide(stream, *SECRET)

    def net(width: int = WIDTH) -> Any:
        return mlp([64, width, width, 10], seed=seed)

    runs = _experts(stream, epochs, seed)
    rows = {"each task once": runs}
    rows["one task"] = _experts(Stream([stream[0]], outputs=10), 2 * epochs, seed)
    rows["pruned"] = _experts(
        stream, epochs, seed, sparsity=0.9, selector_sparsity=0.5, pruning_buffer=500, pruning_epochs=50 if full else 20
    )
    scores = {
        "TAME": runs["accuracy"],
        "finetuning": _single(Finetune(net(), 10, **SGD), blind, epochs, seed),
        "true tasks told": _told(stream, epochs, seed),
    }
    if full:
        rows["with a return"] = _experts(revisit(stream, [0, 1, 2, 1, 3]), epochs, seed)
        pairs = split_by_class(_task(seed), 2)
        rows["pairs of classes"] = _experts(pairs, 5 * epochs, seed)
        scores |= {
            "pairs: finetuning": _single(Finetune(net(), 10, **SGD), hide(pairs, *SECRET), 5 * epochs, seed),
            "replay": _single(ER(net(), 10, buffer=STORED, **SGD), blind, epochs, seed),
            "replay, as large": _single(ER(net(270), 10, buffer=STORED, **SGD), blind, epochs, seed),
            "EWC, true boundaries": _single(EWC(net(), 10, strength=5.0, **SGD), stream, epochs, seed),
            "EWC, detected": _single(
                AtChanges(EWC(net(), 10, strength=5.0, **SGD), LossJump(math.log(10), window=WINDOW)),
                blind, epochs, seed,
            ),
        }  # fmt: skip
    return scores, rows


def _detectors(seed: int, tasks: int, epochs: int) -> list[dict[str, Any]]:
    """Three detectors on one finetuned network's losses."""
    stream = permuted(_task(seed), tasks, seed=seed)
    kinds: dict[str, Detector] = {
        "loss jump": LossJump(math.log(10), window=WINDOW),
        "fixed threshold 1": _Fixed(),
        "Page-Hinkley": _PageHinkley(),
    }
    rows = []
    for name, detector in kinds.items():
        learner = AtChanges(Finetune(mlp([64, WIDTH, WIDTH, 10], seed=seed), 10, **SGD), detector)
        learn(learner, hide(stream, *SECRET), epochs=epochs, batch_size=BATCH, seed=seed)
        delays, false = _delays(learner.alarms, _steps(stream, epochs))
        prompt = sum(delay <= 3 for delay in delays)
        rows.append({"draw": seed, "detector": name, "found in 3 batches": f"{prompt} of {tasks - 1}", "false": false})
    return rows


def run(scale: Scale, seed: int) -> Finding:
    """Accuracies in percent after the stream, means over the tasks' test splits."""
    full = scale != "smoke"
    tasks, epochs = (5, 10) if full else (3, 5)
    table = {draw: _draw(draw, tasks, epochs, full) for draw in draws(scale, seed)}
    scores = {draw: found[0] for draw, found in table.items()}
    runs = {draw: found[1] for draw, found in table.items()}

    def gain(first: str, second: str) -> float:
        return fmean(row[first] - row[second] for row in scores.values())

    def all_of(kind: str, what: str) -> list[float]:
        return [row[kind][what] for row in runs.values()]

    once = "each task once"
    shrunk = [row["pruned"]["bytes of networks"] / row[once]["bytes of networks"] for row in runs.values()]
    lost = fmean(all_of(once, "accuracy")) - fmean(all_of("pruned", "accuracy"))
    claims = [
        Claim.at_most("experts against tasks, worst draw", max(all_of(once, "experts off by")), 1, "off"),
        Claim.at_most("change found, worst delay", max(all_of(once, "worst delay")), 3, "batches"),
        Claim.at_most("one task, experts too many", max(all_of("one task", "experts off by")), 0, "experts"),
        Claim.at_least("TAME above finetuning, mean", gain("TAME", "finetuning"), 20),
        Claim.at_most("TAME below true tasks told, mean", gain("true tasks told", "TAME"), 2),
        Claim.at_most("pruned: accuracy lost, mean", lost, 3),
        Claim.at_most("pruned: bytes of all networks, mean share", fmean(shrunk), 0.25, ""),
    ]
    tables: dict[str, list[dict[str, Any]]] = {
        "accuracy": [{"draw": draw} | {k: round(v, 2) for k, v in row.items()} for draw, row in scores.items()],
        "experts": [
            {"draw": draw, "stream": kind} | {k: round(v, 2) for k, v in row.items()}
            for draw, kinds in runs.items()
            for kind, row in kinds.items()
        ],
    }
    if full:
        claims += [
            Claim.at_least("TAME, mean", fmean(all_of(once, "accuracy")), 95, "percent"),
            Claim.at_least("TAME above replay, mean", gain("TAME", "replay"), 0),
            Claim.at_least("TAME above replay with a network as large, mean", gain("TAME", "replay, as large"), 0),
            Claim.at_most(
                "with a return: experts, worst draw", max(all_of("with a return", "experts off by")), 1, "off"
            ),
            Claim.at_least("with a return, mean", fmean(all_of("with a return", "accuracy")), 95, "percent"),
            Claim.at_least(
                "pairs of classes, strictly counted, above finetuning, mean",
                fmean(all_of("pairs of classes", "strict")) - fmean(r["pairs: finetuning"] for r in scores.values()),
                20,
            ),
            Claim.at_most(
                "EWC at detected changes against true boundaries, mean",
                abs(gain("EWC, detected", "EWC, true boundaries")), 5,
            ),
        ]  # fmt: skip
        tables["detectors"] = [row for draw in draws(scale, seed) for row in _detectors(draw, tasks, epochs)]
    return Finding(claims, tables)
