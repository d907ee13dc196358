"""How much the learning rate matters to small language models of Shakespeare, and which part of the recipe helps.

Characters of tinyshakespeare, decoder-only transformers of three sizes, 200 steps of 8 x 64 characters (never the same
stretch twice on purpose, a tenth of the text in all), learning rates 3e-3 to 3e-1. The full recipe has qk-layernorm,
z penalty 1e-4, independent weight decay 1e-4, a tenth of warm-up, eps 1e-8; each other recipe has one of them changed.
The full recipe and the one without qk-layernorm are swept at all three sizes, and their attention logits are forecast
for a fourth size, which is then run at one learning rate. The loss is that of training on new text: validation and test
are not touched, as nothing is chosen.

    python examples/stability_lm.py --data FOLDER --json stability_lm.json     # also draws stability_lm_*.svg
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from statistics import fmean, pstdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch.nn import functional as F

from allrounder.data.language import corpus, windows
from allrounder.nets.causal import CausalTransformer
from allrounder.optim.forecast import forecast_attention_logit
from allrounder.optim.probes import StabilityProbes
from allrounder.optim.remedies import independent_weight_decay, warmup_cosine, z_penalty
from allrounder.optim.stability import StabilityReport, diverged, stability_report

LENGTH, BATCH = 64, 8
SIZES = ((16, 1), (24, 2), (40, 3))  # width, depth; heads of 8
LARGER, AT = (64, 4), 1e-1
FULL: dict[str, Any] = {"qk_norm": True, "penalty": 1e-4, "independent": True, "warmup": 0.1, "eps": 1e-8}
RECIPES: dict[str, dict[str, Any]] = {
    "full": FULL,
    "no qk-layernorm": FULL | {"qk_norm": False},
    "no z penalty": FULL | {"penalty": 0.0},
    "coupled decay 0.1": FULL | {"independent": False},
    "no warm-up": FULL | {"warmup": 0.0},
    "warm-up 0.4": FULL | {"warmup": 0.4},
    "eps 1e-15": FULL | {"eps": 1e-15},
}
SWEPT = ("full", "no qk-layernorm")


def build(shape: tuple[int, int], vocabulary: int, qk_norm: bool, seed: int) -> CausalTransformer:
    width, depth = shape
    return CausalTransformer(
        vocabulary, width=width, depth=depth, heads=width // 8, context=LENGTH, qk_norm=qk_norm, seed=seed
    )


def recipe(
    text: torch.Tensor, vocabulary: int, shape: tuple[int, int], steps: int, seed: int, chosen: dict[str, Any]
) -> Callable:
    """`train(lr) -> (losses, probes)`, all that `stability_report` asks for."""

    def train(lr: float) -> tuple[list[float], dict[str, float]]:
        model = build(shape, vocabulary, chosen["qk_norm"], seed)
        groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": lr}]
        groups = (
            independent_weight_decay(groups, 1e-4) if chosen["independent"] else [groups[0] | {"weight_decay": 0.1}]
        )
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=chosen["eps"], fused=True)
        scheduler = warmup_cosine(optimiser, steps, warmup=int(chosen["warmup"] * steps))
        losses: list[float] = []
        with StabilityProbes(model, optimiser, every=max(1, steps // 10)) as probes:
            for batch, _ in zip(windows(text, LENGTH, BATCH, seed=seed), range(steps), strict=False):
                logits = model(batch[:, :-1]).flatten(0, 1)
                loss = F.cross_entropy(logits, batch[:, 1:].flatten())
                losses.append(loss.item())
                if diverged(losses, patience=steps // 4):
                    break
                optimiser.zero_grad()
                (loss + z_penalty(logits, chosen["penalty"])).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                scheduler.step()
        return losses, probes.summary()

    return train


def row(name: str, size: int, reports: list[StabilityReport]) -> dict[str, Any]:
    """One recipe at one size: means over seeds; a run that diverged counts as the initial loss."""
    runs = [[trial for trial in report.trials if trial.parameters == size] for report in reports]
    values = [report.sensitivity[size] for report in reports]
    losses = {
        f"loss at {trial.lr:g}": fmean(
            trials[i].loss if isfinite(trials[i].loss) else report.initial[size]
            for trials, report in zip(runs, reports, strict=True)
        )
        for i, trial in enumerate(runs[0])
    }
    highest = max(trials[-1].probes["max_attention_logit"] for trials in runs)
    return {"recipe": name, "N": size, "S": fmean(values), "S deviation": pstdev(values)} | losses | {"logit": highest}


def checked_forecast(name: str, seed: int, report: StabilityReport, train: Callable, size: int) -> dict[str, Any]:
    """The largest attention logit of a larger model, forecast from the sweep and then measured."""
    smaller = [trial for trial in report.trials if trial.lr == AT]
    logits = [trial.probes["max_attention_logit"] for trial in smaller]
    guess = forecast_attention_logit([trial.parameters for trial in smaller], logits, size, lr=AT).value
    measured = train(AT)[1]["max_attention_logit"]
    known = {f"N={trial.parameters}": logit for trial, logit in zip(smaller, logits, strict=True)}
    return {"recipe": name, "seed": seed} | known | {f"forecast N={size}": guess, "measured": measured}


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    text = corpus("tinyshakespeare", folder=chosen.data, level="char")
    vocabulary = len(text.vocabulary)
    steps = 80 if chosen.small else 200
    sizes = SIZES[:2] if chosen.small else SIZES
    rates = (1e-2, 1e-1, 3e-1) if chosen.small else (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    shapes = {name: sizes if name in SWEPT else sizes[1:2] for name in RECIPES}
    count = {
        shape: sum(p.numel() for p in build(shape, vocabulary, True, 0).parameters()) for shape in (*SIZES, LARGER)
    }
    found: dict[str, list[StabilityReport]] = {name: [] for name in RECIPES}
    forecasts = []
    with Progress() as bar:
        runs = len(rates) * sum(map(len, shapes.values())) + (0 if chosen.small else len(SWEPT))
        line = bar.add_task("training runs", total=len(chosen.seeds) * runs)
        for seed in chosen.seeds:
            for name, switches in RECIPES.items():
                made = {
                    shape: recipe(text.train, vocabulary, shape, steps, seed, switches) for shape in (*SIZES, LARGER)
                }
                report = stability_report(
                    {count[shape]: made[shape] for shape in shapes[name]},
                    rates,
                    progress=lambda *_: bar.advance(line),
                )
                found[name].append(report)
                if name in SWEPT and not chosen.small:
                    forecasts.append(checked_forecast(name, seed, report, made[LARGER], count[LARGER]))
                    bar.advance(line)
    table = [row(name, count[shape], reports) for name, reports in found.items() for shape in shapes[name]]
    tables = {"LR sensitivity S": table} | ({f"largest attention logit at lr {AT:g}": forecasts} if forecasts else {})
    notes = [
        f"{name}: {flag}" for name in SWEPT for flag in sorted({f for report in found[name] for f in report.flags})
    ]
    notes.append(
        "logit: the largest attention logit over seeds at the highest learning rate; losses: means over seeds."
    )
    if chosen.json is not None:
        for name in SWEPT:
            found[name][0].plot(chosen.json.with_name(f"{chosen.json.stem}_{name.replace(' ', '_')}.svg"))
    finish(chosen, "LR sensitivity of character models of Shakespeare", tables, notes)


if __name__ == "__main__":
    main()
