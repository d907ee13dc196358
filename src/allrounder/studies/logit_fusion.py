"""Dynamic logit fusion: digits as a model of one token, and small causal transformers that write sequences.

Digits: classes are tokens. Large and small networks know upright digits and 40 turned ones, the expert is the
small one fine-tuned on turned digits (the card's proof, with 900 upright digits: the other 300 are validation).
Sequences: a mark, four digits, `=`, four digits of answer. The base models have learned to copy in 7 of 10
examples whatever the mark, and to do what it says (reverse, add one, sort) in 3; so they know the tasks and
prefer not to do them, as base language models do. Experts are the small model fine-tuned on one mark each.
Answers are decoded greedily, in percent of answers with all four digits right, on inputs that no model saw.
The regime was set from base, experts and fine-tuned large model, before any fusion was run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.digits import digits
from ..merging.baselines import task_arithmetic
from ..merging.logit_fusion import LogitFusion, fuse, fusion_scales
from ..nets.multitask import mlp
from ..study import Claim, Finding, Scale, draws
from ..train import load_weights

__all__ = ["run"]

Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]
FIXED = {"fixed 0.5": 0.5, "proxy tuning (1)": 1.0, "fixed 1.5": 1.5}
GRID = [0.5, 1.0, 1.5, 2.0]  # fixed scales tried on validation
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse": lambda x: x.flip(1),
    "add one": lambda x: (x + 1) % 10,
    "sort": lambda x: x.sort(1).values,
}
LENGTH, EQUALS, MARK = 4, 10, 11
VOCABULARY = MARK + len(TASKS)
COPIES = 0.7


def _train(model: nn.Module, batch: Batch, *, steps: int, lr: float, seed: int) -> nn.Module:
    """A trained copy; targets of -100 do not count."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        inputs, targets = batch(generator)
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def _temperature(logits: Tensor, targets: Tensor) -> float:
    """The one that fits held-out labels best."""
    tried = torch.logspace(-1, 1, 41)
    losses = torch.stack([F.cross_entropy(logits / t, targets) for t in tried])
    return tried[losses.argmin()].item()


def _at_bound(scales: Tensor) -> float:
    """Percent of the scales."""
    return 100 * (scales >= 2).double().mean().item()


def _one_step(seed: int) -> list[dict[str, Any]]:
    suite = digits(seed=seed).only(["straight", "turned"])
    data = {task: {split: suite[task].split(split)[:] for split in ("train", "validation", "test")} for task in suite}
    upright, turned = data["straight"]["train"], data["turned"]["train"]
    mixed = tuple(torch.cat([a, b[:40]]) for a, b in zip(upright, turned, strict=True))

    def of(part: tuple[Tensor, ...]) -> Batch:
        def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            places = torch.randint(len(part[0]), (128,), generator=generator)
            return part[0][places], part[1][places]

        return batch

    large = _train(mlp([64, 256, 256, 10], seed=seed), of(mixed), steps=300, lr=1e-3, seed=seed)
    base = _train(mlp([64, 12, 10], seed=seed), of(mixed), steps=600, lr=3e-3, seed=seed)
    expert = _train(base, of(turned), steps=300, lr=1e-3, seed=seed)
    models = {"large": large, "base": base, "expert": expert}
    held = tuple(torch.cat([data[t]["validation"][i] for t in data]) for i in range(2))
    with torch.no_grad():
        heat = {name: _temperature(model(held[0]), held[1]) for name, model in models.items()}
    rows = []
    for task, parts in data.items():
        inputs, targets = parts["test"]
        with torch.no_grad():
            big, small, tuned = (model(inputs) for model in models.values())
        calm = big / heat["large"], small / heat["base"], tuned / heat["expert"]
        found = {
            "large base": big,
            "small expert": tuned,
            "dynamic": fuse(big, small, tuned),
            "dynamic, calibrated": fuse(*calm),
        }
        found |= {name: fuse(big, small, tuned, scale=scale) for name, scale in FIXED.items()}
        found["proxy tuning, calibrated"] = fuse(*calm, scale=1.0)
        right = {name: 100 * (value.argmax(-1) == targets).double().mean().item() for name, value in found.items()}
        bound = {
            "at the bound": _at_bound(fusion_scales(big, small, tuned)),
            "at the bound, calibrated": _at_bound(fusion_scales(*calm)),
        }
        rows.append({"draw": seed, "digits": task} | right | bound)
    return rows


def _block(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({
        "before": nn.LayerNorm(width),
        "attend": nn.Linear(width, 3 * width),
        "mix": nn.Linear(width, width),
        "mlp": nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        ),
    })  # fmt: skip


class _Causal(nn.Module):
    """A minimal causal transformer: ids `(N, T)` to logits `(N, T, V)`."""

    def __init__(self, width: int, layers: int, heads: int, seed: int) -> None:
        super().__init__()
        self.heads = heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Embedding(2 * LENGTH + 2, width)
            self.blocks = nn.ModuleList(_block(width) for _ in range(layers))
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            parts = block["attend"](block["before"](x)).chunk(3, -1)  # type: ignore[index]
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block["mix"](attended)  # type: ignore[index]
            x = x + block["mlp"](x)  # type: ignore[index]
        return self.head(x)


def _prompts(task: str, count: int, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
    """Prompts `(count, 6)` and right answers `(count, 4)`; the sum of the digits modulo 8 gives the split."""
    residues = {"test": (0,), "validation": (1,), "train": tuple(range(2, 8))}[split]
    values = torch.randint(10, (16 * count, LENGTH), generator=generator)
    values = values[torch.isin(values.sum(1) % 8, torch.tensor(residues))][:count]
    mark = torch.full((count, 1), MARK + list(TASKS).index(task))
    return torch.cat([mark, values, torch.full((count, 1), EQUALS)], 1), TASKS[task](values)


def _examples(tasks: list[str], copies: float, size: int = 64) -> Batch:
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        each = -(-size // len(tasks))
        parts = [_prompts(task, each, generator, "train") for task in tasks]
        prompt, answer = (torch.cat(part) for part in zip(*parts, strict=True))
        copied = torch.rand(len(prompt), 1, generator=generator) < copies
        answer = torch.where(copied, prompt[:, 1:-1], answer)
        ids = torch.cat([prompt, answer], 1)
        targets = ids[:, 1:].clone()
        targets[:, : LENGTH + 1] = -100
        return ids[:, :-1], targets

    return batch


@torch.no_grad()
def _right(
    model: Callable[[Tensor], Tensor], fusion: LogitFusion | None, task: str, split: str, count: int = 500
) -> float:
    """Percent of greedy answers with every digit right."""
    ids, answer = _prompts(task, 300, torch.Generator().manual_seed(0), split)
    for _ in range(LENGTH):
        scores = model(ids)[:, -1]
        scores = scores if fusion is None else fusion(ids, scores)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return 100 * (ids[:, -LENGTH:] == answer).all(1).double().mean().item()


def _models(seed: int, steps: int) -> dict[str, nn.Module]:
    """Large and small base, and both fine-tuned on each task."""
    pretraining = _examples(list(TASKS), COPIES)
    models = {
        "large": _train(_Causal(64, 2, 4, seed), pretraining, steps=steps, lr=3e-3, seed=seed),
        "small": _train(_Causal(12, 1, 2, seed), pretraining, steps=steps, lr=5e-3, seed=seed),
    }
    for task in TASKS:
        alone = _examples([task], 0.0)
        models[f"large {task}"] = _train(models["large"], alone, steps=100, lr=1e-3, seed=seed)
        models[f"small {task}"] = _train(models["small"], alone, steps=60, lr=2e-3, seed=seed)
    return models


def _best(score: Callable[[float], float], scales: list[float]) -> float:
    return max(scales, key=score)


def _single_task(models: dict[str, nn.Module], task: str) -> dict[str, float]:
    large, small, expert = models["large"], models["small"], models[f"small {task}"]

    def fused(split: str = "test", **options: Any) -> float:
        return _right(large, LogitFusion(small, expert, **options), task, split)

    row = {
        "large base": _right(large, None, task, "test"),
        "large fine-tuned": _right(models[f"large {task}"], None, task, "test"),
        "small expert": _right(expert, None, task, "test"),
    }
    row |= {name: fused(scale=scale) for name, scale in FIXED.items()}
    row["fixed, best on validation"] = fused(scale=_best(lambda x: fused("validation", scale=x), GRID))
    dynamic = LogitFusion(small, expert)
    row["dynamic"] = _right(large, dynamic, task, "test")
    scales = torch.stack(dynamic.history)
    row["mean scale"] = scales.mean().item()
    row["at the bound"] = _at_bound(scales)
    return row


def _several_tasks(models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """All experts at once on each task: the mark in the prompt is all that tells the tasks apart."""
    large, small = models["large"], models["small"]
    experts = {task: models[f"small {task}"] for task in TASKS}
    start, trained = small.state_dict(), {task: expert.state_dict() for task, expert in experts.items()}

    def merged(scale: float) -> nn.Module:
        return load_weights(copy.deepcopy(small), task_arithmetic(start, trained, scale=scale))

    best = _best(
        lambda x: fmean(_right(merged(x), None, task, "validation") for task in TASKS), [0.2, 0.4, 0.6, 0.8, 1.0]
    )
    one = merged(best)
    contestants: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], LogitFusion] | None]] = {
        "large base": (large, None),
        "all experts, one active": (large, lambda: LogitFusion(small, experts)),
        "all experts, joint": (large, lambda: LogitFusion(small, experts, select="joint")),
        "all experts, fixed 1": (large, lambda: LogitFusion(small, experts, scale=1.0)),
        "all experts, fixed 1/3": (large, lambda: LogitFusion(small, experts, scale=1 / len(experts))),
        "merged expert alone": (one, None),
        "merged expert, proxy tuning (1)": (large, lambda: LogitFusion(small, one, scale=1.0)),
        "merged expert, dynamic": (large, lambda: LogitFusion(small, one)),
    }
    rows = []
    for name, (model, fusion) in contestants.items():
        row = {task: _right(model, fusion and fusion(), task, "test") for task in TASKS}
        rows.append({"model": name} | row | {"mean": fmean(row.values())})
    return rows


def run(scale: Scale, seed: int) -> Finding:
    """Accuracies, shares of answers and of steps in percent, on test."""
    digit_rows, single, several = [], [], []
    for draw in draws(scale, seed):
        digit_rows += _one_step(draw)
        models = _models(draw, 250 if scale == "smoke" else 900)
        single += [{"draw": draw, "task": task} | _single_task(models, task) for task in TASKS]
        several += [{"draw": draw} | row for row in _several_tasks(models)]

    def least(task: str, first: str, second: str) -> float:
        return min(row[first] - row[second] for row in digit_rows if row["digits"] == task)

    def mean(column: str) -> float:
        return fmean(row[column] for row in single)

    def joined(name: str) -> float:
        return fmean(row["mean"] for row in several if row["model"] == name)

    closed = 100 * (mean("dynamic") - mean("large base")) / (mean("large fine-tuned") - mean("large base"))
    ratio = 100 * mean("dynamic") / mean("large fine-tuned")
    above_proxy, above_base = least("turned", "dynamic", "proxy tuning (1)"), least("turned", "dynamic", "large base")
    upright, one = least("straight", "dynamic", "large base"), joined("all experts, one active")
    merged = joined("merged expert, dynamic") - joined("merged expert alone")
    dynamic = mean("dynamic")
    claims = [
        Claim.at_least("digits: dynamic above proxy tuning on turned ones, worst draw", above_proxy, 0),
        Claim.at_least("digits: dynamic above the large base on turned ones, worst draw", above_base, 8),
        Claim.at_least("digits: dynamic against the large base on upright ones, worst draw", upright, -4),
        Claim.at_least("sequences: dynamic above the large base, mean", dynamic - mean("large base"), 0),
        Claim.at_least("sequences: dynamic above the small expert, mean", dynamic - mean("small expert"), 0),
        Claim.at_least("several tasks: one active expert above the large base, mean", one - joined("large base"), 0),
        Claim.at_least("several tasks: dynamic with a merged expert above that expert, mean", merged, 0),
    ]
    if scale != "smoke":  # these need base models that are done learning
        claims += [
            Claim.at_least("sequences: dynamic above proxy tuning, mean", dynamic - mean("proxy tuning (1)"), 0),
            Claim.at_least("sequences: gap to fine-tuning the large model closed", closed, 50, "%"),
        ]
    summary = {"ratio": ratio, "gap_closed": closed} | {n: mean(n) for n in single[0] if n not in ("draw", "task")}

    def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()} for row in rows]

    tables = {"digits": digit_rows, "sequences": single, "sequences, means": [summary], "several tasks": several}
    return Finding(claims, {name: rounded(rows) for name, rows in tables.items()})
