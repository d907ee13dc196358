"""MULTI-LANE on pictures with several glyphs: six writing systems after another, each labels only its own letters.

A picture is 56 x 56 with up to four glyphs in a grid. A small transformers ViT is trained here on grids of other blocks of
Unicode (capitals, box drawing, Braille, Hebrew, Ogham, weather signs) and then frozen. Six tasks of five letters follow
(digits, Latin, Armenian, Georgian, Arabic, arrows); in training, letters of other systems are on the pictures but not in
the labels. Test glyphs are of fonts that no training glyph has. Compared are lanes of one shape beside the same frozen
ViT: a lane for each task, one lane for all (finetuned, with replay, or with all labels at once). No data is needed.

    python examples/multi_lane_glyphs.py --json multi_lane_glyphs.json
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from sklearn.metrics import f1_score
from torch import nn
from torch.nn import functional as F

from allrounder.continual import ER, Finetune, Learner, Stream, evaluate, learn
from allrounder.continual.lanes import LaneBackbone, LaneNet, vit_backbone
from allrounder.continual.measures import forgetting
from allrounder.continual.multi_label import glyph_grids, split_by_label
from allrounder.continual.multi_lane import MultiLane
from allrounder.data.scripts import blocks

WIDTH, LETTERS, BATCH = 96, 5, 64
SHAPE = {"selectors": 8, "prompts": 8, "depth": 2}
LR, BUFFER = 0.03, 200
LOUD = 0.8  # probability from which a letter counts as said, as in the paper


class Pretrained(nn.Module):
    """A ViT with two heads: what is on the picture (class token) and what is in each place (its four patches)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=4 * WIDTH,
            image_size=56, patch_size=14, num_channels=1,
        )  # fmt: skip
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.picture, self.place = nn.Linear(WIDTH, outputs), nn.Linear(WIDTH, outputs + 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.vit(images).last_hidden_state
        places = tokens[:, 1:].view(-1, 2, 2, 2, 2, WIDTH).mean((2, 4)).flatten(1, 2)  # (B, 4, d)
        return self.picture(tokens[:, 0]), self.place(places)


def pretrained(steps: int, tick: Callable[[], None]) -> nn.Module:
    """The ViT, after `steps` steps on grids of other blocks' glyphs."""
    tasks = list(blocks(seed=0, train=3000).values())
    starts = torch.tensor([0, *(task.outputs for task in tasks)]).cumsum(0)
    pictures = torch.cat([task.train.inputs[:, 0] for task in tasks])
    labels = torch.cat([task.train.targets + start for task, start in zip(tasks, starts, strict=False)])
    outputs, generator = int(starts[-1]), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pretrained(outputs)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            pick = torch.randint(len(pictures), (BATCH, 4), generator=generator)
            empty = torch.rand(BATCH, 4, generator=generator) < 0.25
            cells, letters = pictures[pick].masked_fill(empty[..., None, None], 0), labels[pick].masked_fill(empty, outputs)
            images = cells.view(BATCH, 2, 2, 28, 28).transpose(2, 3).reshape(BATCH, 1, 56, 56)
            there = torch.zeros(BATCH, outputs + 1).scatter_(1, letters, 1)[:, :-1]
            whole, places = model(images)
            loss = F.cross_entropy(places.flatten(0, 1), letters.flatten())
            loss = loss + 20 * F.binary_cross_entropy_with_logits(whole, there)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            tick()
    return model.vit.eval()


def f1(learner: Learner, stream: Stream) -> dict[str, float]:
    """Overall and per class, over all test pictures."""
    test = stream[0].test
    said = torch.cat([learner.predict(part) for part in test.inputs.split(256)]).sigmoid() > LOUD  # type: ignore[union-attr]
    names = {"micro": "overall F1, %", "macro": "F1 per class, %"}
    return {
        name: 100 * float(f1_score(test.targets.numpy(), said.numpy(), average=kind, zero_division=0))  # type: ignore[arg-type]
        for kind, name in names.items()
    }


def compare(
    backbone: LaneBackbone, streams: tuple[Stream, Stream], epochs: int, split: str, seed: int, tick: Callable
) -> dict[str, dict[str, Any]]:
    """Arm -> its figures. The second stream has one task with all labels."""
    stream, whole = streams

    def one_lane(kind: Any, **more: Any) -> Learner:
        net = LaneNet(backbone, stream.outputs, seed=seed, **SHAPE)
        return kind(net, stream.outputs, optimiser=lambda p: torch.optim.Adam(p, lr=LR), seed=seed, **more)

    arms = {
        "one lane, finetuned": one_lane(Finetune),
        f"one lane, ER with {BUFFER} pictures": one_lane(ER, buffer=BUFFER),
        "MULTI-LANE": MultiLane(backbone, stream.outputs, lr=LR, seed=seed, **SHAPE),
    }
    found = {}
    for name, learner in arms.items():
        record = learn(learner, stream, epochs=epochs, batch_size=BATCH, seed=seed, split=split, progress=tick)
        steps = [fmean(row[: index + 1]) for index, row in enumerate(record.matrix)]
        lost = forgetting(record.matrix, record.first)
        found[name] = {"steps": steps, "forgetting": lost, "held": record.held[-1], "seconds": record.seconds}
        found[name] |= f1(learner, stream)
    joint = one_lane(Finetune)
    rounds = round(epochs * sum(len(item.train) for item in stream) / len(whole[0].train))  # as many steps as the others
    record = learn(joint, whole, epochs=rounds, batch_size=BATCH, seed=seed, split=split, progress=tick)
    last = fmean(evaluate(joint, stream, split=split).values())
    found["one lane, all labels at once"] = {
        "steps": [None] * (len(stream) - 1) + [last], "forgetting": None, "held": {}, "seconds": record.seconds,
        **f1(joint, stream),
    }  # fmt: skip
    return found


def per_image(backbone: LaneBackbone, task_count: int, seed: int) -> list[dict[str, Any]]:
    """CPU time for one picture: T lanes in one batch, and T passes of the frozen ViT."""
    images, rows = torch.rand(64, 1, 56, 56, generator=torch.Generator().manual_seed(seed)), []

    def milliseconds(call: Callable[[], Any]) -> float:
        call()
        times = []
        for _ in range(7):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return 1000 * sorted(times)[3] / len(images)

    def whole() -> None:
        with torch.no_grad():
            backbone.module(images)

    for tasks in (1, 2, task_count):
        learner = MultiLane(backbone, tasks, seed=seed, **SHAPE)
        stream = split_by_label(glyph_task(tasks), 1)
        learn(learner, stream, batch_size=BATCH)
        lanes, passes = milliseconds(lambda learner=learner: learner.predict(images)), tasks * milliseconds(whole)
        rows.append({"tasks": tasks, "all lanes, ms": lanes, "a pass for each task, ms": passes, "ratio": lanes / passes})
    return rows


def main() -> None:
    os.environ.setdefault("ALLROUNDER_DATA", ".")  # the options ask for a folder; nothing is read from it
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
