"""FRUGAL on handwritten digits: what the state-free step is worth, against Adam, GaLore and BAdam.

MLP 64-128-128-128-10 on scikit-learn's digits, batch 64, 400 steps, learning rate 3e-3 falling as a cosine, choices
every 50 steps. Split are the three hidden matrices; first and last layer and all biases keep Adam. Loss is that of the
last tenth of the steps, without weight decay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import fmean, stdev

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ..nets.multitask import mlp
from ..optim.frugal import FRUGAL
from ..study import Claim, Finding, Scale, draws

__all__ = ["run"]

WIDTHS, BATCH, STEPS, LR, GAP = [64, 128, 128, 128, 128, 10], 64, 400, 3e-3, 50


def _groups(model: nn.Sequential) -> list[dict]:
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    hidden = [layer.weight for layer in linear[1:-1]]
    inside = {id(weight) for weight in hidden}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [{"params": rest, "role": "full"}, {"params": hidden, "role": "split"}]


def _frugal(**options: object) -> Callable[[nn.Sequential], torch.optim.Optimizer]:
    return lambda model: FRUGAL(_groups(model), lr=LR, update_gap=GAP, **options)  # type: ignore[arg-type]


OPTIMISERS: dict[str, Callable[[nn.Sequential], torch.optim.Optimizer]] = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=LR),
    "columns .25": _frugal(subspace="columns", density=0.25),
    "columns .25, rest still": _frugal(subspace="columns", density=0.25, free="none"),
    "density 0, sign": _frugal(density=0.0),
    "density 0, rest still": _frugal(density=0.0, free="none"),
    "block, 1 of 3": _frugal(density=1 / 3),
    "columns .25, SGD": _frugal(subspace="columns", density=0.25, free="sgd"),
    "GaLore (svd .25, rest still)": _frugal(subspace="svd", density=0.25, free="none"),
    "BAdam (block, rest still)": _frugal(density=1 / 3, free="none", order="descending"),
}
SMOKE = ("Adam", "columns .25", "columns .25, rest still", "density 0, sign", "density 0, rest still")


def _trained(name: str, seed: int) -> dict[str, float]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    model = mlp(WIDTHS, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SGD at Adam's rate is what is shown
        optimiser = OPTIMISERS[name](model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        chosen = torch.randint(1200, (BATCH,), generator=generator)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        right = (model(x[1200:]).argmax(1) == y[1200:]).double().mean().item()
    state = (
        optimiser.state_numel()
        if isinstance(optimiser, FRUGAL)
        else sum(v.numel() for s in optimiser.state.values() for v in s.values() if v.ndim)
    )
    return {"loss": fmean(losses[-STEPS // 10 :]), "accuracy, %": 100 * right, "state, numbers": state}


def run(scale: Scale, seed: int) -> Finding:
    """Training loss, test accuracy, numbers of optimiser state."""
    seeds = draws(scale, seed)
    found = {name: [_trained(name, draw) for draw in seeds] for name in (SMOKE if scale == "smoke" else OPTIMISERS)}

    def mean(name: str, key: str = "loss") -> float:
        return fmean(row[key] for row in found[name])

    full = 2 * (64 * 128 + 10 * 128 + 4 * 128 + 10)
    formula = full + 2 * 3 * 128 * 32
    claims = [
        Claim.at_most("columns (.25): training loss over Adam's", mean("columns .25") / mean("Adam"), 1.6, "x"),
        Claim.at_most(
            "columns (.25): training loss over that without the state-free step",
            mean("columns .25") / mean("columns .25, rest still"), 0.5, "x",
        ),
        Claim.at_most("density 0: training loss over that without the step",
                      mean("density 0, sign") / mean("density 0, rest still"), 0.5, "x"),
        Claim.at_most("columns (.25): state against the formula, largest difference",
                      max(abs(row["state, numbers"] - formula) for row in found["columns .25"]), 0, "numbers"),
    ]  # fmt: skip
    if scale != "smoke":
        lost = mean("density 0, sign", "accuracy, %") - mean("Adam", "accuracy, %")
        claims.append(Claim.at_least("density 0: accuracy against Adam, mean", lost, -1))
        for name, peer in (
            ("columns .25", "GaLore (svd .25, rest still)"), ("block, 1 of 3", "BAdam (block, rest still)")
        ):  # fmt: skip
            claims.append(Claim.at_most(f"{name}: training loss over {peer}", mean(name) / mean(peer), 0.8, "x"))
    rows = [
        {"optimiser": name}
        | {key: round(mean(name, key), 4) for key in ("loss", "accuracy, %", "state, numbers")}
        | {"loss spread": round(stdev(row["loss"] for row in rows), 4) if len(rows) > 1 else 0.0}
        for name, rows in found.items()
    ]
    return Finding(claims, {"digits": rows})
