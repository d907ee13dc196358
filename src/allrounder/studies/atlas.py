"""aTLAS on `digits`: one coefficient per tensor and vector against one per vector, learned on labels.

Three parts: task addition from labelled validation inputs; few-shot adaptation to a task from the other
tasks' vectors against random directions of equal norm; and a task whose true shift is a block-mixture of
known vectors, which only block-wise coefficients can express.
"""

from __future__ import annotations

import copy
from statistics import fmean

import torch
from torch import Tensor

from ..merging.atlas import atlas
from ..merging.engine import Aligned, Linear, Merge
from ..study import Claim, Finding, Scale, draws
from ..task import Batches, Examples
from ..train import load_weights
from .substrate import evaluate, points, specialists

__all__ = ["run"]


def _random_directions(base: dict[str, Tensor], experts: dict, seed: int) -> dict[str, dict[str, Tensor]]:
    """For each expert, noise with the norm of its task vector in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, expert in experts.items():
        found[name] = {}
        for key, value in base.items():
            noise = torch.randn(value.shape, generator=generator)
            found[name][key] = value + noise * ((expert[key] - value).norm() / noise.norm())
    return found


def _few_shot(seed: int, shots: int = 2) -> tuple[float, float, float]:
    """Accuracy in percent on each task from the others' vectors, from random directions, and of the base."""
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    found: tuple[list[float], list[float], list[float]] = ([], [], [])
    for task in suite:
        train = suite[task].train
        places = torch.cat([(train.targets == c).nonzero().flatten()[:shots] for c in range(10)])  # type: ignore[attr-defined]
        data = {task: [train[places]]}
        pool = {name: weights for name, weights in experts.items() if name != task}
        for kept, vectors in zip(found, (pool, _random_directions(start, pool, seed)), strict=False):
            merge = atlas(base, start, vectors, data, steps=100, lr=1e-1)
            kept.append(100 * evaluate(base, merge, suite.only([task]))[task])
        found[2].append(100 * evaluate(base, start, suite.only([task]))[task])
    return fmean(found[0]), fmean(found[1]), fmean(found[2])


def _mixture(seed: int) -> tuple[float, float]:
    """Agreement in percent with a model whose shift is a block-mixture of the vectors: block-wise, isotropic."""
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    generator = torch.Generator().manual_seed(seed)
    models = Aligned(start, experts)
    mixed = {name: torch.randn(len(experts), generator=generator).tolist() for name in models.float_names}
    teacher = copy.deepcopy(base)
    load_weights(teacher.backbone, Merge(models, Linear(mixed)))
    task = next(iter(suite))
    with torch.no_grad():
        labelled = {
            split: Examples(part.inputs, teacher(part.inputs, task).argmax(-1))  # type: ignore[attr-defined]
            for split, part in (("train", suite[task].train), ("test", suite[task].test))
        }
    student, agreement = copy.deepcopy(base), []
    for per in ("tensor", "model"):
        data = {task: Batches(labelled["train"], 128, seed=seed)}
        load_weights(student.backbone, atlas(base, start, experts, data, steps=600, lr=5e-2, weight_decay=0.0, per=per))
        with torch.no_grad():
            answer = student(labelled["test"].inputs, task).argmax(-1)
        agreement.append(100 * (answer == labelled["test"].targets).double().mean().item())
    return agreement[0], agreement[1]


def _draw(seed: int) -> dict[str, float]:
    suite, base, experts = specialists(seed)
    start = base.backbone.state_dict()
    data = {task: Batches(suite[task].validation, 32, seed=seed + i) for i, task in enumerate(suite)}
    row = {"base": points(base, start, suite)}
    for name, per in (("block-wise", "tensor"), ("isotropic", "model")):
        row[name] = points(base, atlas(base, start, experts, data, steps=200, lr=1e-2, per=per), suite)
    row["few-shot, task vectors"], row["few-shot, random directions"], row["few-shot, base"] = _few_shot(seed)
    row["mixture, block-wise"], row["mixture, isotropic"] = _mixture(seed)
    return row


def run(scale: Scale, seed: int) -> Finding:
    """Mean accuracies in percent on test; coefficients are learned on validation or train."""
    table = {draw: _draw(draw) for draw in draws(scale, seed)}

    def gains(first: str, second: str) -> list[float]:
        return [row[first] - row[second] for row in table.values()]

    mixed, isotropic = ([row[f"mixture, {per}"] for row in table.values()] for per in ("block-wise", "isotropic"))
    claims = [
        Claim.at_least("block-wise above isotropic, worst draw", min(gains("block-wise", "isotropic")), 7),
        Claim.at_least("block-wise above the base, worst draw", min(gains("block-wise", "base")), 30),
        Claim.at_least(
            "few-shot: others' vectors above random directions, mean",
            fmean(gains("few-shot, task vectors", "few-shot, random directions")), 0,
        ),
        Claim.at_least("block-mixture recovered block-wise, worst draw", min(mixed), 97, "% agreement"),
        Claim.at_most("block-mixture recovered isotropically, best draw", max(isotropic), 97, "% agreement"),
    ]  # fmt: skip
    rows = [{"draw": draw} | {name: round(value, 2) for name, value in row.items()} for draw, row in table.items()]
    return Finding(claims, {"accuracy": rows})
