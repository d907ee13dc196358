"""TaskExpert on the dense toy suite: does the gate have to see the image, and does the memory help?

One small convolutional backbone with four taps; segmentation, depth, normals and edges are trained together, the losses
weighted 1, 1, 10 and 50 as the card of the paper has them for real data. Which paint channel tells the material depends
on the style of the scene. Compared: TaskExpert, the same with a static gate, without memory, and a shared decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from ..data.dense import Scenes, scenes
from ..losses.dense import (
    angular_error,
    depth_loss,
    edge_f1,
    edge_loss,
    mean_iou,
    normal_loss,
    rmse,
    segmentation_loss,
)
from ..multitask.dense_heads import DensePredictor, SharedDecoder
from ..multitask.task_expert import TaskExpert
from ..study import Claim, Finding, Scale, draws

__all__ = ["run"]

TASKS = {"segmentation": 4, "depth": 1, "normals": 3, "edges": 1}
WEIGHTS = {"segmentation": 1.0, "depth": 1.0, "normals": 10.0, "edges": 50.0}
LOSSES = {"segmentation": segmentation_loss, "depth": depth_loss, "normals": normal_loss, "edges": edge_loss}
CHANNELS = (3, 16, 16, 24, 24)
WIDTH, EXPERTS, BATCH, LR = 16, 3, 16, 3e-3
STEPS = {"smoke": 120, "laptop": 600, "full": 6000}
TRAIN, TEST = 1500, 500
MIOU, F1 = "segmentation, mIoU %", "edges, F1 %"


class _Backbone(nn.Module):
    """Four convolutions, all maps at half the resolution of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2 if a == 3 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.GELU())
            for a, b in pairwise(CHANNELS)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        found = []
        for block in self.blocks:
            images = block(images)
            found.append(images)
        return found


def _decoders(seed: int) -> dict[str, Callable[[], nn.Module]]:
    def expert(**options: object) -> Callable[[], nn.Module]:
        settings = {"width": WIDTH, "experts": EXPERTS, "upsample": 2, "seed": seed} | options
        return lambda: TaskExpert(TASKS, CHANNELS[1:], **settings)  # type: ignore[arg-type]

    return {
        "TaskExpert": expert(),
        "static gate": expert(dynamic=False),
        "no memory": expert(memory=False),
        "shared decoder": lambda: SharedDecoder(TASKS, CHANNELS[1:], width=WIDTH, upsample=2, seed=seed),
    }


def _train(make: Callable[[], nn.Module], data: Scenes, steps: int, seed: int) -> DensePredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DensePredictor(_Backbone(), make()).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data.image), (BATCH,), generator=generator)
        made = model(data.image[chosen])
        loss = torch.stack([WEIGHTS[t] * LOSSES[t](made[t], getattr(data, t)[chosen]) for t in TASKS]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _scores(model: DensePredictor, test: Scenes) -> dict[str, float]:
    made = model(test.image)
    row = {
        MIOU: 100 * mean_iou(made["segmentation"], test.segmentation),
        "depth, RMSE": rmse(made["depth"], test.depth),
        "normals, degrees": angular_error(made["normals"], test.normals),
        F1: 100 * edge_f1(made["edges"], test.edges),
        "gate moves with style": 0.0,
    }
    decoder = model.decoder
    if isinstance(decoder, TaskExpert):
        shares = decoder.routing(model.backbone(test.image))["segmentation"]  # (taps, N, experts + 1)
        by_style = [shares[:, test.style == style].mean(1) for style in (0, 1)]
        row["gate moves with style"] = (by_style[0] - by_style[1]).abs().max().item()
    return row


def run(scale: Scale, seed: int) -> Finding:
    """Scores on test scenes; every variant sees the same batches and starts from the same backbone."""
    seeds = draws(scale, seed)
    variants = [name for name in _decoders(0) if scale != "smoke" or name in ("TaskExpert", "shared decoder")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for draw in seeds:
        train, test = scenes(TRAIN, seed=2 * draw), scenes(TEST, seed=2 * draw + 1)
        for name in variants:
            found[name].append(_scores(_train(_decoders(draw)[name], train, STEPS[scale], draw), test))

    def gain(score: str, other: str) -> float:
        return fmean(a[score] - b[score] for a, b in zip(found["TaskExpert"], found[other], strict=True))

    moves = min(row["gate moves with style"] for row in found["TaskExpert"])
    if scale == "smoke":
        claims = [
            Claim.at_least("the segmentation gate tells the styles apart", moves, 0.02, ""),
            Claim.at_least("segmentation is learned", found["TaskExpert"][0][MIOU], 30, "% mIoU"),
        ]
    else:
        claims = [
            Claim.at_least("the segmentation gate tells the styles apart, least over draws", moves, 0.1, ""),
            Claim.at_least("dynamic above static gate on segmentation, mean", gain(MIOU, "static gate"), 2),
            Claim.at_least("memory above none on edges, mean", gain(F1, "no memory"), 1),
            Claim.at_least("above a shared decoder on segmentation, mean", gain(MIOU, "shared decoder"), 2),
        ]
    rows = []
    for name in variants:
        means = {key: round(fmean(row[key] for row in found[name]), 3) for key in found[name][0]}
        if not isinstance(_decoders(0)[name](), TaskExpert):
            means["gate moves with style"] = None  # type: ignore[assignment]
        spread = stdev(row[MIOU] for row in found[name]) if len(seeds) > 1 else 0.0
        rows.append({"decoder": name} | means | {"mIoU spread": round(spread, 3)})
    return Finding(claims, {"test": rows})
