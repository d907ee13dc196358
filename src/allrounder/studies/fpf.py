"""FPF on handwritten digits, two classes after another: which modules forget, and what retraining them brings back.

A network 64-100-100-10 with batch norms, SGD at 0.03, batches of 32, six rounds a task, a buffer of 200, 100 steps of
retraining at 0.05. Controls: other modules, all modules, replay at every step, and training on the buffer alone
(GDumb): on data this easy all modules and GDumb keep more than the chosen ones, and no claim says otherwise.
"""

from __future__ import annotations

import warnings
from statistics import fmean
from typing import Any

import torch

from ..continual.baselines import ER, Finetune, GDumb
from ..continual.fpf import FPF
from ..continual.learner import Learner
from ..continual.stream import split_by_class
from ..study import Claim, Finding, Scale, draws
from .continual_substrate import digits_task, network, run_learner

__all__ = ["run"]

ROUNDS, RATE, BUFFER = 6, 0.03, 200
HEAD, NORMS, LAYERS = ["6"], ["1", "4"], {"layer 1": ["0"], "layer 2": ["3"]}


def _fpf(inner: Learner, seed: int, **options: Any) -> FPF:
    return FPF(inner, buffer=BUFFER, seed=seed, **options)  # type: ignore[arg-type]


def _learners(seed: int, steps: int, full: bool) -> dict[str, Learner]:
    def plain() -> Finetune:
        return Finetune(network(seed, norm=True), 10, lr=RATE, seed=seed)

    def replay() -> ER:
        return ER(network(seed, norm=True), 10, lr=RATE, buffer=BUFFER, seed=seed)

    found: dict[str, Learner] = {
        "SGD": plain(),
        "SGD + FPF, chosen": _fpf(plain(), seed),
        "SGD + FPF, layer 1": _fpf(plain(), seed, modules=LAYERS["layer 1"]),
        "ER": replay(),
    }
    if full:
        found |= {
            "SGD + FPF, head": _fpf(plain(), seed, modules=HEAD),
            "SGD + FPF, head and norms": _fpf(plain(), seed, modules=HEAD + NORMS),
            "SGD + FPF, norms": _fpf(plain(), seed, modules=NORMS),
            "SGD + FPF, layer 2": _fpf(plain(), seed, modules=LAYERS["layer 2"]),
            "SGD + FPF, all": _fpf(plain(), seed, modules=[""]),
            "SGD + FPF-KD, head": _fpf(plain(), seed, modules=HEAD, distil=0.1),
            "ER + FPF, head and norms": _fpf(replay(), seed, modules=HEAD + NORMS),
            "k-FPF, head and norms, 5": _fpf(plain(), seed, modules=HEAD + NORMS, times=5, total=steps),
            "k-FPF, all, 5": _fpf(plain(), seed, modules=[""], times=5, total=steps),
            "GDumb": GDumb(network(seed, norm=True), 10, lr=RATE, buffer=BUFFER, epochs=50, seed=seed),
        }
    return found


def run(scale: Scale, seed: int) -> Finding:
    full = scale != "smoke"
    found: dict[str, list[dict[str, float]]] = {}
    changes: list[dict[str, float]] = []
    modules: list[dict[str, float]] = []
    untouched, chosen = [], []
    for draw in draws(scale, seed):
        stream = split_by_class(digits_task(draw), 2, seed=draw)
        steps = sum(ROUNDS * -(-len(item.train) // 32) for item in stream)
        learners = _learners(draw, steps, full)
        for name, learner in learners.items():
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a class missing in the buffer would be a fault of the study
                found.setdefault(name, []).append(run_learner(learner, stream, draw, ROUNDS).summary)
        measured: Any = learners["SGD + FPF, chosen"]
        modules.append(measured.module_changes)
        changes.append({name: value for name, value in measured.changes.items() if "running" not in name})
        chosen.append(measured.choose(measured.module_changes))
        plain: Any = learners["SGD"]
        others = [name for name in plain.model.state_dict() if name.rpartition(".")[0] not in chosen[-1]]
        own, kept = measured.model.state_dict(), plain.model.state_dict()
        untouched.append(all(torch.equal(own[name], kept[name]) for name in others))

    def least(one: str, other: str) -> float:
        pairs = zip(found[one], found[other], strict=True)
        return 100 * min(a["average"] - b["average"] for a, b in pairs)

    ratios = [
        min(values["6.weight"], values["6.bias"]) / max(v for n, v in values.items() if not n.startswith("6."))
        for values in changes
    ]
    expected = {*HEAD, *NORMS}
    claims = [
        Claim.at_least(
            "change of the output layer's parameters over every other parameter's, worst draw", min(ratios), 3, "times"
        ),
        Claim(
            "head and batch norms are what is chosen",
            "yes",
            str(chosen),
            all(set(names) == expected for names in chosen),
        ),
        Claim("everything else is bit for bit what SGD left", "yes", str(untouched), all(untouched)),
        Claim.at_least("FPF over SGD, worst draw", least("SGD + FPF, chosen", "SGD"), 50),
    ]
    if full:
        both = least("ER + FPF, head and norms", "ER")
        mean = {name: 100 * fmean(row["average"] for row in rows) for name, rows in found.items()}
        early = {name: 100 * fmean(row["incremental"] for row in rows) for name, rows in found.items()}
        often, once = "k-FPF, head and norms, 5", "SGD + FPF, head and norms"
        claims += [
            Claim.at_least("ER + FPF over ER, worst draw", both, 0),
            Claim.at_least("FPF over k-FPF at the end, mean: more often brings nothing", mean[once] - mean[often], -3),
            Claim.at_least("k-FPF over FPF during the stream, mean", early[often] - early[once], 5),
            Claim.at_least(
                "FPF of the head over FPF of layer 1, worst draw", least("SGD + FPF, head", "SGD + FPF, layer 1"), 30
            ),
        ]
    table = [
        {
            "learner": name,
            "average %": round(100 * fmean(row["average"] for row in rows), 1),
            "during %": round(100 * fmean(row["incremental"] for row in rows), 1),
            "gradients": int(rows[0]["gradients"]),
        }
        for name, rows in found.items()
    ]
    dynamics = [
        {"module": name, "change a number": round(fmean(values[name] for values in modules), 5)} for name in modules[0]
    ]
    parameters = [
        {"parameter": name, "change a number": round(fmean(values[name] for values in changes), 5)}
        for name in changes[0]
    ]
    return Finding(
        claims,
        {"after five tasks": table, "change between tasks": dynamics, "change between tasks, parameters": parameters},
    )
