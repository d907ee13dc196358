"""PromptSRC on a toy two-tower model: what the regularisers keep on classes that were never trained.

Frozen random encoders `enc(z) = tanh(A z)` of one matrix for both towers. A class is a code; its texts are the code,
its images the code plus noise (deviation 1.2) plus one shift that all images share. 20 classes, the first 10 with 4
shots each; prompts are a vector and a matrix for each tower (`e + p + e W`, `x + q + x U`) and begin at zero, which is
zero-shot. Logits scale 20, plain SGD, lr 0.2, batches of 4, 20 epochs, (mu, sigma) = (15, 1).

Its peers train other prompts with cross-entropy alone, all else the same: CoOp those of texts, CoCoOp those and a
meta-net (64-4-32) whose output of the image's features is added to every text, MaPLe those of texts and a matrix that
makes image prompts of them (`q = p K`, `U = W K`). A linear probe of the frozen image features knows base classes only.

The second world has a poor teacher (twice the shift, lr 0.05): there the regulariser is expected to hurt.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from ..continual.prompt_src import VARIANTS, PromptSRC
from ..continual.two_tower import TwoTower, base_to_novel, linear_probe, unit
from ..nets.prompts import meta_net
from ..study import Claim, Finding, Scale, draws
from ..task import Batches, Examples, accuracy

__all__ = ["ToyTowers", "run", "world"]

CLASSES, BASE, SHOTS, TESTS = 20, 10, 4, 100
WIDTH, FEATURES, NOISE, SCALE = 32, 64, 1.2, 20.0
BATCH, EPOCHS = 4, 20
ARMS = ("IVLP", "CE + GPA", "CE + SCL", "PromptSRC")
PEERS = ("CoOp", "CoCoOp", "MaPLe")


class ToyTowers(TwoTower):
    """Two encoders that share one frozen random matrix, and additive and linear prompts for each.

    Args:
        seed: of the matrix.
        dtype: of all its tensors.
        kind: which prompts: `IVLP`, those of both towers, or one of `PEERS`.
    """

    frozen: Tensor

    def __init__(self, seed: int, *, dtype: torch.dtype = torch.float32, kind: str = "IVLP") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(FEATURES, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
        self.register_buffer("frozen", matrix.to(dtype))
        shapes = {"p": (WIDTH,), "W": (WIDTH, WIDTH)}
        if kind == "IVLP":
            shapes |= {"q": (WIDTH,), "U": (WIDTH, WIDTH)}
        self.prompts = nn.ParameterDict({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})
        if kind == "MaPLe":
            coupling = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
            self.prompts["K"] = nn.Parameter(coupling.to(dtype))
        if kind == "CoCoOp":
            self.prompts["meta"] = meta_net(FEATURES, WIDTH, seed=seed).to(dtype)
        self.scale, self.kind, self.conditional = SCALE, kind, kind == "CoCoOp"

    def _encode(self, codes: Tensor) -> Tensor:
        return (codes @ self.frozen.T).tanh()

    def encode_image(self, inputs: Any, *, prompted: bool = True) -> Tensor:
        prompts: Any = self.prompts
        if not prompted or self.kind in ("CoOp", "CoCoOp"):
            return self._encode(inputs)
        if self.kind == "MaPLe":
            return self._encode(inputs + (prompts["p"] + inputs @ prompts["W"]) @ prompts["K"])
        return self._encode(inputs + prompts["q"] + inputs @ prompts["U"])

    def encode_text(self, texts: Sequence[Any], *, prompted: bool = True) -> Tensor:
        codes, prompts = torch.as_tensor(texts, dtype=self.frozen.dtype), self.prompts
        return self._encode(codes + prompts["p"] + codes @ prompts["W"] if prompted else codes)  # type: ignore[index]

    def text_for(self, texts: Sequence[Any], images: Tensor) -> Tensor:
        if not self.conditional:
            return self.encode_text(texts)
        codes, prompts = torch.as_tensor(texts, dtype=self.frozen.dtype), self.prompts
        shifts: Tensor = prompts["meta"](images)  # type: ignore[index, operator]
        return self._encode(codes + prompts["p"] + codes @ prompts["W"] + shifts.unsqueeze(1))  # type: ignore[index]


def world(seed: int, shift: float) -> tuple[Tensor, Examples, Examples, Examples]:
    """Codes of the classes `(20, d)`, training examples of the base classes, and test examples of both halves.

    Args:
        seed: of codes, shift and noise.
        shift: length of each coordinate of the shift, in deviations of the codes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    codes, common = normal(CLASSES, WIDTH), shift * normal(WIDTH)

    def images(classes: range, count: int) -> Examples:
        labels = torch.arange(len(classes)).repeat_interleave(count)
        own = codes[classes.start : classes.stop]
        return Examples(own[labels] + NOISE * normal(len(labels), WIDTH) + common, labels)

    base, novel = range(BASE), range(BASE, CLASSES)
    return codes, images(base, SHOTS), images(base, TESTS), images(novel, TESTS)


def _arms(seed: int, shift: float, lr: float, names: Sequence[str]) -> dict[str, dict[str, float]]:
    codes, train, base, novel = world(seed, shift)
    first, second = codes[:BASE].tolist(), codes[BASE:].tolist()
    plain = {"epochs": EPOCHS, "lr": lr, "momentum": 0.0, "weight_decay": 0.0}
    found = {}
    for name in ("zero-shot", *names):
        tower = ToyTowers(seed, kind=name if name in PEERS else "IVLP")  # prompts of zero: zero-shot
        if name != "zero-shot":
            teacher = tower.encode_text(first, prompted=False)
            settings = VARIANTS["IVLP" if name in PEERS else name]
            trainer = PromptSRC(tower, first, teacher=teacher, **plain, **settings)
            trainer.fit(Batches(train, BATCH, seed=seed))
        found[name] = base_to_novel(tower, (base, first), (novel, second))
    return found


def _probe(seed: int) -> float:
    """Accuracy of a linear probe on base classes."""
    _, train, base, _ = world(seed, 1.0)
    tower = ToyTowers(seed)
    features = unit(tower.encode_image(base.inputs, prompted=False))
    return accuracy(linear_probe(tower, train, BASE)(features), base.targets)


def _rows(worlds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for name in worlds[0]:
        row: dict[str, Any] = {"method": name}
        for figure in ("base", "novel", "harmonic mean"):
            values = [world[name][figure] for world in worlds]
            row |= {figure: round(fmean(values), 4), f"{figure}, deviation": round(pstdev(values), 4)}
        rows.append(row)
    return rows


def run(scale: Scale, seed: int) -> Finding:
    """Accuracies (0 to 1) over 100 test images a class; each draw is a mean over several worlds."""
    worlds = 2 if scale == "smoke" else 5
    seeds = [draw + 10_000 * i for draw in draws(scale, seed) for i in range(worlds)]
    good = [_arms(one, 1.0, 0.2, (*ARMS, *PEERS)) for one in seeds]

    def gap(found: list[dict[str, dict[str, float]]], first: str, second: str, figure: str) -> float:
        return fmean(world[first][figure] - world[second][figure] for world in found)

    claims = [
        Claim.at_least("SCL keeps novel classes: over CE alone", gap(good, "CE + SCL", "IVLP", "novel"), 0.08, ""),
        Claim.at_least("SCL learns the base classes: over CE alone", gap(good, "CE + SCL", "IVLP", "base"), -0.03, ""),
        Claim.at_least(
            "PromptSRC over CE alone, harmonic mean", gap(good, "PromptSRC", "IVLP", "harmonic mean"), 0.02, ""
        ),
        Claim.at_most(
            "CE alone forgets novel classes: over zero-shot", gap(good, "IVLP", "zero-shot", "novel"), -0.1, ""
        ),
        Claim.at_least("PromptSRC learns: base over zero-shot", gap(good, "PromptSRC", "zero-shot", "base"), 0.01, ""),
    ]
    probe = [_probe(one) for one in seeds]
    blank = dict.fromkeys(["novel", "novel, deviation", "harmonic mean", "harmonic mean, deviation"])
    linear = {"method": "linear probe", "base": round(fmean(probe), 4), "base, deviation": round(pstdev(probe), 4)}
    tables = {"accuracy": [*_rows(good), linear | blank]}
    if scale != "smoke":
        claims += [
            Claim.at_least(f"{one} over {other}, {figure}", gap(good, one, other, figure), 0, "")
            for one, other, figure in (
                ("PromptSRC", "CoOp", "harmonic mean"),
                ("PromptSRC", "CoCoOp", "harmonic mean"),
                ("CoCoOp", "CoOp", "novel"),
            )
        ]
        poor = [_arms(one, 2.0, 0.05, ("IVLP", "PromptSRC")) for one in seeds]
        claims.append(
            Claim.at_most(
                "with a poor teacher the regulariser hurts: over CE alone, harmonic mean",
                gap(poor, "PromptSRC", "IVLP", "harmonic mean"), 0, "",
            )
        )  # fmt: skip
        tables["accuracy with a poor teacher"] = _rows(poor)
    return Finding(claims, tables)
