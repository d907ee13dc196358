"""MULTI-LANE on synthetic scenes with several labels: what a lane for each task keeps that one lane for all loses.

A scene is 16 tokens of width 32. Each of six classes has a fixed code; a scene shows each class with probability 0.3,
its code and noise (deviation 0.5) on one or two tokens; the rest is noise of deviation 1. The frozen model has two
random blocks of four heads. Three tasks of two classes, 400 scenes each; labels of other classes are hidden, that is 0.

All arms train lanes of one shape (S = K = 4) with Adam at 0.05, batches of 50, 20 rounds a task; the rate was chosen on
validation scenes. `joint` sees all 1,200 scenes with all their labels. Scores are mean average precision over 600 test
scenes; a class by chance has 0.3.

The cost is counted in floating-point operations, at the size of ViT-B/16: ten lanes with S = K = 20 for one image.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from ..continual.baselines import ER, Finetune
from ..continual.driver import Record, evaluate, learn
from ..continual.lane_backbone import LaneBackbone, torch_backbone
from ..continual.lanes import Lane, LaneNet, LaneStack
from ..continual.learner import Batch, Learner, TaskInfo
from ..continual.multi_label import MultiLabelLwF, split_by_label
from ..continual.multi_lane import MultiLane
from ..continual.stream import Stream, average_precision
from ..study import Claim, Finding, Scale, draws
from ..task import Examples, Task

__all__ = ["frozen_blocks", "run", "scenes"]

CLASSES, SHARE, TOKENS, WIDTH, HEADS, JITTER = 6, 0.3, 16, 32, 4, 0.5
TRAIN, VALIDATION, TEST = 1200, 300, 600
EPOCHS, BATCH, LR = 20, 50, 0.05
SHAPE: dict[str, Any] = {"selectors": 4, "prompts": 4}
VIT_B = {"width": 768, "heads": 12, "blocks": 12, "tokens": 196}


def scenes(seed: int) -> Task:
    """Tokens `(N, 16, 32)` and targets `(N, 6)` of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(CLASSES, WIDTH, generator=generator)

    def part(count: int) -> Examples:
        tokens = torch.randn(count, TOKENS, WIDTH, generator=generator)
        targets = (torch.rand(count, CLASSES, generator=generator) < SHARE).float()
        twice = torch.rand(count, CLASSES, generator=generator) < 0.5
        places = torch.rand(count, TOKENS, generator=generator).argsort(1)  # no two classes on one token
        for number, code in enumerate(codes):
            for turn, wanted in enumerate((targets[:, number].bool(), targets[:, number].bool() & twice[:, number])):
                rows = wanted.nonzero().flatten()
                noise = JITTER * torch.randn(len(rows), WIDTH, generator=generator)
                tokens[rows, places[rows, 2 * number + turn]] = code + noise
        return Examples(tokens, targets)

    return Task("scenes", part(TRAIN), part(VALIDATION), part(TEST), outputs=CLASSES, metric=average_precision)


def frozen_blocks(seed: int, *, width: int, heads: int, blocks: int, tokens: int) -> LaneBackbone:
    """A random pre-LN transformer with a class token and positions. Blocks beyond the second share their weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = [
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(min(blocks, 2))
        ]
        module = nn.ModuleDict({"layers": nn.ModuleList(made), "norm": nn.LayerNorm(width)})
        cls, positions = nn.Parameter(torch.randn(width)), 0.1 * torch.randn(tokens + 1, width)
    layers = [made[index % len(made)] for index in range(blocks)]

    def embed(given: Tensor) -> Tensor:
        return torch.cat([cls.expand(len(given), 1, -1), given], 1) + positions

    return torch_backbone(module, layers, embed=embed, cls=cls, norm=module["norm"])


def _operations() -> dict[str, float]:
    """Floating-point operations for one image, in passes of the frozen model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    backbone = frozen_blocks(0, **VIT_B)
    generator = torch.Generator().manual_seed(0)
    lanes = [Lane(backbone, [number], selectors=20, prompts=20, depth=5, generator=generator) for number in range(10)]
    image, stacks = torch.randn(1, VIT_B["tokens"], VIT_B["width"], generator=generator), {}
    for count in (1, 10):
        stacks[f"{count} lanes in one batch" if count > 1 else "1 lane"] = LaneStack(backbone, lanes[:count]).scores

    def whole(tokens: Tensor) -> None:
        stream = backbone.embed(tokens)
        for block in backbone.blocks:
            stream = block.whole(stream)

    fast, counted = torch.backends.mha.get_fastpath_enabled(), {}
    backbone.module.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # fused kernels are not counted
        for name, call in {"frozen model": whole, **stacks}.items():
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                call(image)
            counted[name] = float(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counted


def _isolation(backbone: LaneBackbone, stream: Stream, seed: int) -> float:
    """Largest change of an old logit while later tasks train, with weight decay; each task asked by its number."""
    learner = MultiLane(
        backbone, CLASSES, seed=seed, **SHAPE,
        optimiser=lambda parameters: torch.optim.Adam(parameters, lr=LR, weight_decay=1e-2),
    )  # fmt: skip
    images, answers, change = stream[0].test.inputs, {}, 0.0
    for item in stream:
        info = TaskInfo(item.task, item.classes, [])
        learner.begin_task(info)
        for rows in torch.arange(200).split(BATCH):
            learner.observe(Batch(*item.train[rows], item.task))
        learner.end_task(info)
        answers[item.task] = learner.predict(images, item.task)[:, list(item.classes)]
        for task, known in answers.items():
            now = learner.predict(images, task)[:, list(stream.tasks[task].classes)]
            change = max(change, float((now - known).abs().max()))
    return change


def _arms(seed: int, epochs: int) -> tuple[dict[str, dict[str, Any]], float, float]:
    """Arm -> its figures; the largest change of an old task's score and of an old logit under MULTI-LANE."""
    task, backbone = scenes(seed), frozen_blocks(seed, width=WIDTH, heads=HEADS, blocks=2, tokens=TOKENS)
    stream = split_by_label(task, 2, images="divided", seed=seed, names=["first", "second", "third"])
    whole = split_by_label(task, CLASSES, images="divided", seed=seed)

    def one_lane(kind: Any, **options: Any) -> Learner:
        net = LaneNet(backbone, CLASSES, seed=seed, **SHAPE)
        return kind(
            net, CLASSES, optimiser=lambda parameters: torch.optim.Adam(parameters, lr=LR), seed=seed, **options
        )

    arms = {
        "one lane": one_lane(Finetune),
        "one lane, own classes": one_lane(Finetune, mask="task"),
        "one lane, LwF": one_lane(MultiLabelLwF),
        "one lane, ER with 100 scenes": one_lane(ER, buffer=100),
        "MULTI-LANE": MultiLane(backbone, CLASSES, lr=LR, seed=seed, **SHAPE),
    }
    found, records = {}, {}
    for name, learner in arms.items():
        record = records[name] = learn(learner, stream, epochs=epochs, batch_size=BATCH, seed=seed)
        found[name] = _figures(record.matrix[-1], record)
    joint = one_lane(Finetune)
    learn(joint, whole, epochs=epochs, batch_size=BATCH, seed=seed)
    found["joint, all labels"] = _figures(list(evaluate(joint, stream).values()), None)
    matrix = records["MULTI-LANE"].matrix
    moved = max(abs(matrix[-1][column] - matrix[column][column]) for column in range(len(stream)))
    return found, moved, _isolation(backbone, stream, seed)


def _figures(scores: list[float], record: Record | None) -> dict[str, Any]:
    return {
        "all": fmean(scores),
        "old": fmean(scores[:-1]),
        "new": scores[-1],
        "forgetting": None if record is None else record.summary["forgetting"],
        "kB held": 0.0 if record is None else sum(record.held[-1].values()) / 1000,
    }


def run(scale: Scale, seed: int) -> Finding:
    """`smoke`: one draw and three rounds, and only claims that do not need a trained joint model."""
    epochs = 3 if scale == "smoke" else EPOCHS
    results = [_arms(draw, epochs) for draw in draws(scale, seed)]
    found = [result[0] for result in results]

    def value(arm: str, figure: str) -> float:
        return fmean(one[arm][figure] for one in found)

    counted = _operations()
    passes = counted["10 lanes in one batch"] / counted["frozen model"]
    claims = [
        Claim.at_most(
            "an old logit changes while later tasks train, weight decay 0.01", max(r[2] for r in results), 0, ""
        ),
        Claim.at_most("MULTI-LANE: an old task's score changes", max(r[1] for r in results), 0, ""),
        Claim.at_least("old classes: MULTI-LANE over chance", value("MULTI-LANE", "old") - SHARE, 0.1, ""),
        Claim.at_most("10 lanes at the size of ViT-B/16, in frozen passes", passes, 2.1, ""),
    ]
    if scale != "smoke":
        gap = value("joint, all labels", "all") - value("MULTI-LANE", "all")
        claims += [
            Claim.at_most("one lane: old classes fall to about their share", value("one lane", "old"), 0.45, ""),
            Claim.at_least(
                "old classes: MULTI-LANE over one lane", value("MULTI-LANE", "old") - value("one lane", "old"), 0.2, ""
            ),
            Claim.at_most("joint over MULTI-LANE", gap, 0.05, ""),
            Claim.at_least(
                "MULTI-LANE over LwF", value("MULTI-LANE", "all") - value("one lane, LwF", "all"), 0, ""
            ),
        ]  # fmt: skip
    tables = {"mean average precision": _table(found), "operations": _cost(counted)}
    return Finding(claims, tables)


def _table(found: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for arm in found[0]:
        row: dict[str, Any] = {"arm": arm}
        for figure in found[0][arm]:
            values = [one[arm][figure] for one in found]
            row[figure] = None if values[0] is None else round(fmean(values), 4)
        scores = [one[arm]["all"] for one in found]
        rows.append(row | {"spread of all": round(stdev(scores), 4) if len(scores) > 1 else None})
    return rows


def _cost(counted: dict[str, float]) -> list[dict[str, Any]]:
    whole = counted["frozen model"]
    rows = [
        {"what": name, "GFLOP an image": round(value / 1e9, 2), "frozen passes": round(value / whole, 3)}
        for name, value in counted.items()
    ]
    naive = {"what": "10 frozen passes, one for each task's prompts"}
    return [*rows, naive | {"GFLOP an image": round(whole / 1e8, 2), "frozen passes": 10.0}]
