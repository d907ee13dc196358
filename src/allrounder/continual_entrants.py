"""Ways of learning the tasks one after another that compete in `allrounder run`, beside merging.

All start from the base, keep the heads fixed, take the tasks in the suite's order, and see as many examples of each as
its expert. The number of the task is known in training and at test, as it is for every other entrant: the loss of an
example is taken over its own task's outputs. What comes out is one set of backbone weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .architecture_entrants import POOLED
from .contest import Bench, Count, Entrant, Outcome, Rate, stored_bytes
from .continual import AGEM, ER, EWC, FPF, SI, DERpp, Finetune, Learner, LwF, in_sequence, learn
from .nets.multitask import MultiTaskModel
from .task import Suite

__all__ = ["IN_SEQUENCE"]

IN_SEQUENCE: dict[str, Entrant] = {}
Strength = Annotated[float, Field(ge=0, le=1e6)]
Temperature = Annotated[float, Field(gt=0, le=100)]


class AllHeads(nn.Module):
    """The outputs of all tasks side by side: `(B, sum of outputs)`, in the suite's order."""

    def __init__(self, model: MultiTaskModel, suite: Suite) -> None:
        super().__init__()
        self.model, self.tasks = model, list(suite)

    def forward(self, inputs: Any) -> Tensor:
        features = self.model.backbone(inputs)
        return torch.cat([self.model.heads[task](features) for task in self.tasks], 1)


def _learned(bench: Bench, make: Callable[..., Learner], note: str = "") -> Outcome:
    """One stream through one learner; its backbone is the outcome."""
    model = copy.deepcopy(bench.model)
    for head in model.heads.values():
        head.requires_grad_(False)
    whole = AllHeads(model, bench.suite)
    unseen = [replace(task, test=task.validation) for task in bench.suite.values()]  # test is nobody's to look at
    stream = in_sequence(Suite(unseen, name=bench.suite.name), scenario="task")
    how = bench.tuning
    shown = [how.get("epochs") or how["steps"] * how["batch_size"] / len(item.train) for item in stream]
    common = {
        "lr": how["lr"],
        "optimiser": lambda parameters: torch.optim.AdamW(parameters, how["lr"], weight_decay=how["weight_decay"]),
        "mask": "task",
        "seed": bench.seed,
    }
    learner = make(whole, stream.outputs, **common)
    epochs = [max(1, round(passes)) for passes in shown]

    def progress(_: str, done: int, steps: int) -> None:
        if bench.progress is not None:
            bench.progress(done, steps)

    record = learn(learner, stream, epochs=epochs, batch_size=how["batch_size"], seed=bench.seed, progress=progress)
    weights = {name: value.detach().clone() for name, value in model.backbone.state_dict().items()}
    kept = sum(record.held[-1].values())
    counted = f"{record.gradients:,} example gradients, {kept / 1e6:.2f} MB kept while learning"
    met = [
        [value if first <= i else None for value, first in zip(row, record.first)]
        for i, row in enumerate(record.matrix)
    ]
    matrix = {"rows": record.experiences, "columns": record.tasks, "values": met}
    return Outcome(
        weights=weights, bytes=stored_bytes(bench.base), note=f"{note}, {counted}".lstrip(", "), matrix=matrix
    )


def _entrant(name: str, title: str, paper: str) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    def add(enter: Callable[..., Outcome]) -> Callable[..., Outcome]:
        titled = f"In sequence: {title}"
        IN_SEQUENCE[f"continual/{name}"] = Entrant(titled, "in sequence", paper, enter, default=False, suites=POOLED)
        return enter

    return add


@_entrant("finetune", "finetuning", "continual-baselines")
def _finetune(bench: Bench) -> Outcome:
    return _learned(bench, Finetune)


@_entrant("ewc", "EWC", "continual-baselines")
def _ewc(bench: Bench, *, strength: Strength = 10.0) -> Outcome:
    return _learned(bench, lambda *a, **k: EWC(*a, strength=strength, **k), f"strength {strength:g}")


@_entrant("si", "SI", "continual-baselines")
def _si(bench: Bench, *, strength: Strength = 0.5) -> Outcome:
    return _learned(bench, lambda *a, **k: SI(*a, strength=strength, **k), f"strength {strength:g}")


@_entrant("lwf", "LwF", "continual-baselines")
def _lwf(
    bench: Bench, *, strength: Strength = 1.0, temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
) -> Outcome:
    def make(*a: Any, **k: Any) -> Learner:
        return LwF(*a, strength=strength, temperature=temperature, **k)

    return _learned(bench, make, f"strength {strength:g}")


@_entrant("er", "ER", "continual-baselines")
def _er(bench: Bench, *, buffer: Count = 200) -> Outcome:
    return _learned(bench, lambda *a, **k: ER(*a, buffer=buffer, **k), f"{buffer} stored")


@_entrant("der", "DER++", "continual-baselines")
def _der(bench: Bench, *, buffer: Count = 200, alpha: Strength = 0.5, beta: Strength = 0.5) -> Outcome:
    def make(*a: Any, **k: Any) -> Learner:
        return DERpp(*a, buffer=buffer, alpha=alpha, beta=beta, **k)

    return _learned(bench, make, f"{buffer} stored")


@_entrant("a-gem", "A-GEM", "continual-baselines")
def _agem(bench: Bench, *, buffer: Count = 200) -> Outcome:
    return _learned(bench, lambda *a, **k: AGEM(*a, buffer=buffer, **k), f"{buffer} stored")


@_entrant("fpf", "FPF", "fpf")
def _fpf(bench: Bench, *, buffer: Count = 200, steps: Count = 100, lr: Rate = 0.01) -> Outcome:
    def make(*a: Any, **k: Any) -> Learner:
        return FPF(Finetune(*a, **k), buffer=buffer, steps=steps, lr=lr, seed=bench.seed)

    return _learned(bench, make, f"{buffer} stored, {steps} steps at the end")
