"""Which widths steer which task: handwritten digits as two tasks on one slimmable encoder.

300 training images, tasks `digit` (10 classes) and `high` (digit > 4); an MLP 64-64-32 with a fixed interface of 32,
decoders with one hidden layer of 8, widths 1/4 to 1, no normalisation, Adam 3e-3, 350 steps on all images. Beside the
method: the same with no distillation, with the raw squared error (behind no normalisation, which `Sandwich` refuses,
and behind BatchNorm, which the paper's networks have), a slimmable encoder with whole decoders, a network that was
trained at full width alone, and a network of each width by itself. What is reachable is measured as the hypervolume
over both accuracies and the share of FLOPs saved, above chance.
"""

from __future__ import annotations

import itertools
from statistics import fmean

import torch
from sklearn.datasets import load_digits
from torch import nn

from ..multitask.controllable import Configuration, Controllable, hypervolume
from ..multitask.sandwich import Sandwich
from ..nets.multitask import MultiTaskModel, mlp
from ..nets.slimmable import WIDTHS, sub_network
from ..study import Claim, Finding, Scale, draws
from ..task import Examples, Suite, Task, accuracy
from ..train import fit

__all__ = ["run"]

STEPS, LR, TRAIN, HIDDEN = 350, 3e-3, 300, 8
LOOK = 200  # the step at which the size of the features is measured


class _EncoderOnly(Sandwich):
    """A slimmable network in the ordinary sense: decoders stay whole."""

    def narrower(self) -> list[Configuration]:
        return [_at(self.model, c.encoder, 1.0) for c in super().narrower()]


def _at(model: Controllable, encoder: float, decoders: float) -> Configuration:
    return Configuration(encoder, dict.fromkeys(model.tasks, decoders))


def _suite(seed: int) -> Suite:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    parts = slice(0, TRAIN), slice(TRAIN, 500), slice(500, None)
    digit = [Examples(x[part], y[part]) for part in parts]
    high = [Examples(x[part], (y[part] > 4).long()) for part in parts]
    return Suite([Task("digit", *digit, outputs=10), Task("high", *high, outputs=2)], name="digits")


def _model(seed: int, *, norms: bool = False) -> Controllable:
    encoder = mlp([64, 64, 32], seed=seed)
    if norms:
        first, activation, last = encoder
        encoder = nn.Sequential(first, nn.BatchNorm1d(64), activation, last, nn.BatchNorm1d(32))
    decoders = {"digit": mlp([32, HIDDEN, 10], seed=seed + 1), "high": mlp([32, HIDDEN, 2], seed=seed + 2)}
    return Controllable(encoder, decoders, torch.zeros(1, 64), multiple=1)


def _fit(model: nn.Module, suite: Suite, seed: int, update: Sandwich | None, progress: object = None) -> None:
    fit(
        model, suite, steps=STEPS, lr=LR, batch_size=TRAIN, seed=seed, sampler="all", update=update,
        optimiser=torch.optim.Adam, progress=progress,  # type: ignore[arg-type]
    )  # fmt: skip


@torch.no_grad()
def _points(model: nn.Module, suite: Suite, *configuration: Configuration) -> dict[str, float]:
    """Test accuracies in percent."""
    return {
        name: 100 * accuracy(model(task.test.inputs, name, *configuration), task.test.targets)  # type: ignore[attr-defined]
        for name, task in suite.items()
    }


def _alone(model: Controllable, configuration: Configuration) -> MultiTaskModel:
    """A sub-network as a network of its own."""
    heads = {k: sub_network(model.heads[k], b) for k, b in configuration.decoders.items()}
    return MultiTaskModel(sub_network(model.backbone, configuration.encoder), heads)


ARMS: dict[str, dict] = {
    "full width only": {},
    "encoder only": {},
    "no distillation": {"strength": 0.0},
    "normalised": {},
    "raw": {"distance": "mse"},
    "BatchNorm, no distillation": {"strength": 0.0},
    "BatchNorm, normalised": {},
    "BatchNorm, raw": {"distance": "mse"},
}


def _trained(arm: str, suite: Suite, seed: int) -> tuple[Controllable, float]:
    """The model, and the root mean square of its widest features at step 200."""
    model, sizes = _model(seed, norms=arm.startswith("BatchNorm")), {}
    kind = _EncoderOnly if arm == "encoder only" else Sandwich
    options = dict(ARMS[arm])
    distance = options.pop("distance", "normalised")
    update = None if arm == "full width only" else kind(model, seed=seed, **options)  # type: ignore[arg-type]
    if update is not None:
        update.distance = distance  # type: ignore[assignment]  # not in the constructor, which refuses what runs away

    @torch.no_grad()
    def look(done: int, steps: int) -> None:
        if done == LOOK:
            model.eval()
            sizes[done] = model.backbone(suite["digit"].train.inputs).square().mean().sqrt().item()  # type: ignore[attr-defined]
            model.train()

    _fit(model, suite, seed, update, look)
    return model, sizes[LOOK]


def _reach(model: Controllable, suite: Suite, decoders: tuple[float, ...] = WIDTHS) -> float:
    """Hypervolume of what all configurations reach: (digit, high, FLOPs saved), as shares, above chance."""
    full, points = model.flops(model.uniform(1.0)), []
    choices = itertools.product(WIDTHS, decoders, decoders) if len(decoders) > 1 else ((a, 1.0, 1.0) for a in WIDTHS)
    for a, digit, high in choices:
        configuration = Configuration(a, {"digit": digit, "high": high})
        found = _points(model, suite, configuration)
        points.append([found["digit"] / 100, found["high"] / 100, 1 - model.flops(configuration) / full])
    return hypervolume(torch.tensor(points), torch.tensor([0.1, 0.5, 0.0]))


def _others_unmoved(model: Controllable, suite: Suite) -> float:
    """Largest change of the logits of `high` when the width of `digit`'s decoder changes."""
    inputs = suite["high"].test.inputs  # type: ignore[attr-defined]
    with torch.no_grad():
        first, *rest = (
            model(inputs, "high", Configuration(0.5, {"digit": width, "high": 0.5})) for width in model.widths
        )
    return max((other - first).abs().max().item() for other in rest)


def _draw(seed: int, arms: list[str]) -> dict[str, dict]:
    """Arm -> figures."""
    suite, rows = _suite(seed), {}
    for arm in arms:
        model, size = _trained(arm, suite, seed)
        row: dict[str, float] = {}
        for encoder, decoders in itertools.product(WIDTHS, (0.25, 1.0)):
            found = _points(model, suite, _at(model, encoder, decoders))
            row |= {f"{task} {encoder:g}/{decoders:g}": value for task, value in found.items()}
        row |= {"size": size, "others": _others_unmoved(model, suite)}
        if arm == "encoder only":
            row["reach"] = _reach(model, suite, (1.0,))
        elif arm != "full width only":
            row["reach"] = _reach(model, suite)
        rows[arm] = row
    return rows


def _separate(seed: int) -> dict[str, float]:
    """Accuracies of networks that were each trained at one width of the encoder, with whole decoders."""
    suite, row = _suite(seed), {}
    for width in WIDTHS:
        model = _model(seed)
        network = _alone(model, _at(model, width, 1.0))
        _fit(network, suite, seed, None)
        row |= {f"{task} {width:g}/1": value for task, value in _points(network, suite).items()}
    return row


def run(scale: Scale, seed: int) -> Finding:
    """Accuracies in percent on 1297 test images."""
    small = scale == "smoke"
    arms = ["full width only", "no distillation", "normalised"] if small else list(ARMS)
    found = {draw: _draw(draw, arms) for draw in draws(scale, seed)}

    def figures(arm: str, name: str) -> list[float]:
        return [rows[arm][name] for rows in found.values()]

    def gap(first: tuple[str, str], second: tuple[str, str]) -> float:
        return fmean(figures(*first)) - fmean(figures(*second))

    bare, default = "no distillation", "normalised"
    sizes = [a / b for a, b in zip(figures(default, "size"), figures(bare, "size"), strict=True)]
    claims = [
        Claim.at_least("digit: its decoder whole above a quarter, mean",
                       gap((bare, "digit 1/1"), (bare, "digit 1/0.25")), 30),
        Claim.at_most("logits of the other task when one decoder changes, largest change",
                      max(value for arm in (bare, default) for value in figures(arm, "others")), 0, ""),
        Claim.at_most("digit of a network trained at full width alone, everything a quarter, mean",
                      fmean(figures("full width only", "digit 0.25/0.25")), 25, "%"),
        Claim.at_least("high, everything a quarter: above that network, mean",
                       gap((default, "high 0.25/0.25"), ("full width only", "high 0.25/0.25")), 20),
        Claim.at_least("digit, encoder a quarter: above that network, mean",
                       gap((default, "digit 0.25/1"), ("full width only", "digit 0.25/1")), 20),
        Claim.at_most("size of the features with distillation over without, step 200, worst", max(sizes), 10, "x"),
    ]  # fmt: skip
    if not small:
        claims += [
            Claim.at_least("digit: encoder whole above a quarter, mean",
                           gap((bare, "digit 1/1"), (bare, "digit 0.25/1")), 4),
            Claim.at_least("digit, encoder a quarter: distillation above none, mean",
                           gap((default, "digit 0.25/1"), (bare, "digit 0.25/1")), 0),
            Claim.at_least("hypervolume of what is reachable over a slimmable encoder's, mean",
                           fmean(figures(default, "reach")) / fmean(figures("encoder only", "reach")), 1, "x"),
        ]  # fmt: skip
    names = [f"{task} {a:g}/{b:g}" for task in ("digit", "high") for a in WIDTHS for b in (0.25, 1.0)]
    table = [
        {"arm": arm} | {name: round(fmean(figures(arm, name)), 1) for name in names}
        | {"size of features": round(fmean(figures(arm, "size")), 2)}
        | {"hypervolume": round(fmean(figures(arm, "reach")), 4) if "reach" in found[seed][arm] else None}
        for arm in arms
    ]  # fmt: skip
    tables: dict[str, list[dict]] = {"accuracy at encoder/decoders": table}
    if not small:
        alone = [_separate(draw) for draw in found]
        tables["networks of one width"] = [
            {"encoder": a}
            | {task: round(fmean(row[f"{task} {a:g}/1"] for row in alone), 1) for task in ("digit", "high")}
            for a in WIDTHS
        ]
    return Finding(claims, tables)
