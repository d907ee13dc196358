"""Copy task: what high learning rates break in a tiny transformer, and what qk-layernorm and the z penalty repair.

16 random tokens of 32 and the same again; the loss is that of the second half. 2 layers, width 32, 2 heads, AdamW with
independent decay 1e-4, batch 16, 300 steps, warm-up 30, cosine, clip 1. The two lowest learning rates of the grid are
merely too slow for 300 steps: sensitivities are over 3e-3 and above. Every batch is new, so the loss of a step is that
of unseen data.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F

from ..nets.causal import CausalTransformer
from ..optim.probes import StabilityProbes
from ..optim.remedies import independent_weight_decay, warmup_cosine, z_penalty
from ..optim.stability import LEARNING_RATES, StabilityReport, Trial, lr_sensitivity, stability_report
from ..study import Claim, Finding, Scale, draws

__all__ = ["run"]

VOCABULARY, HALF, BATCH = 32, 16, 16
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk-layernorm": {"qk_norm": True},
    "qk-layernorm, z penalty": {"qk_norm": True, "penalty": 1e-4},
}


def _train(
    rate: float, steps: int, seed: int, *, qk_norm: bool = False, penalty: float = 0.0
) -> tuple[list[float], dict]:
    model = CausalTransformer(
        VOCABULARY, width=32, depth=2, heads=2, context=2 * HALF, qk_norm=qk_norm, seed=seed
    )  # fmt: skip
    groups = independent_weight_decay([{"params": list(model.parameters()), "lr": rate}], 1e-4)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    scheduler = warmup_cosine(optimiser, steps, warmup=steps // 10)
    generator = torch.Generator().manual_seed(seed)
    losses = []

    def batch() -> torch.Tensor:
        half = torch.randint(VOCABULARY, (BATCH, HALF), generator=generator)
        return torch.cat([half, half], dim=1)

    with StabilityProbes(model, optimiser, every=steps // 10) as probes:
        for _ in range(steps):
            tokens = batch()
            logits = model(tokens[:, :-1])[:, HALF - 1 :]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, HALF:].flatten())
            optimiser.zero_grad()
            (loss + z_penalty(logits, penalty)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            scheduler.step()
            losses.append(loss.item())
    return losses, probes.summary() | {"over bound": _over_bound(model, batch()) if qk_norm else 0.0}


@torch.no_grad()
def _over_bound(model: CausalTransformer, tokens: torch.Tensor) -> float:
    """Largest |logit| over sqrt(d_h) max|gain_q| max|gain_k| of its block."""
    ratios = []
    for block in model.blocks:
        attention: Any = block.attention
        gains = attention.query_norm.weight.abs().max() * attention.key_norm.weight.abs().max()
        bound = (model.head_width**0.5 * gains).item()

        def note(_: object, __: object, logits: torch.Tensor, bound: float = bound) -> None:
            ratios.append(logits[logits.isfinite()].abs().max().item() / bound)

        attention.scores.register_forward_hook(note)
    model(tokens)
    return max(ratios)


def _sensitivity(report: StabilityReport, grid: tuple[float, ...]) -> float:
    return lr_sensitivity([trial.loss for trial in report.trials if trial.lr in grid], report.initial[0])


def run(scale: Scale, seed: int) -> Finding:
    """LR sensitivities in nats, attention logits, and losses at the highest learning rate."""
    small = scale == "smoke"
    steps, grid = (200, (3e-2, 3e-1)) if small else (300, LEARNING_RATES[2:])
    grids = {"plain": grid if small else LEARNING_RATES, "qk-layernorm": grid}
    grids |= {} if small else {"qk-layernorm, z penalty": grid}
    found = {
        draw: {
            name: stability_report(lambda rate, d=draw, o=RECIPES[name]: _train(rate, steps, d, **o), rates)
            for name, rates in grids.items()
        }
        for draw in draws(scale, seed)
    }

    def sensitivities(name: str) -> list[float]:
        return [_sensitivity(sweeps[name], grid) for sweeps in found.values()]

    def highest(name: str) -> list[Trial]:
        return [sweeps[name].trials[-1] for sweeps in found.values()]

    growth = [
        second.probes["max_attention_logit"] / first.probes["max_attention_logit"]
        for sweeps in found.values()
        for first, second in pairwise(sweeps["plain"].trials)
    ]
    over = [trial.probes["over bound"] for sweeps in found.values() for trial in sweeps["qk-layernorm"].trials]
    gains = [a - b for a, b in zip(sensitivities("plain"), sensitivities("qk-layernorm"), strict=True)]
    last = {name: fmean(trial.loss for trial in highest(name)) for name in grids}
    claims = [
        Claim.at_least("attention logits without qk-layernorm grow with the learning rate: least growth from one to "
                       "the next", min(growth), 1, "times"),
        Claim.at_most("attention logits with qk-layernorm over sqrt(d_h) times the gains, worst run",
                      max(over), 1.00001, ""),
        Claim.at_least("LR sensitivity without qk-layernorm above that with it, mean", fmean(gains), 0.3, "nats"),
        Claim.at_least("the same, worst draw", min(gains), 0, "nats"),
        Claim.at_least("loss at the highest learning rate without qk-layernorm, mean", last["plain"], 1, "nats"),
        Claim.at_most("the same with it, mean", last["qk-layernorm"], 0.1, "nats"),
    ]  # fmt: skip
    if not small:
        both = "qk-layernorm, z penalty"
        pairs = zip(highest(both), highest("qk-layernorm"), strict=True)
        shrunk = max(abs(a.probes["log_z"] / b.probes["log_z"]) for a, b in pairs)
        claims += [
            Claim.at_most(
                "LR sensitivity with qk-layernorm and z penalty, mean", fmean(sensitivities(both)), 0.1, "nats"
            ),
            Claim.at_most(
                "|log Z| at the highest learning rate, with z penalty over without, worst draw", shrunk, 0.5, ""
            ),
        ]
    runs = [
        {"draw": draw, "recipe": name, "lr": trial.lr, "loss": round(trial.loss, 4)}
        | {key: float(f"{trial.probes[key]:.4g}") for key in ("max_attention_logit", "attention_entropy", "log_z")}
        for draw, sweeps in found.items()
        for name, report in sweeps.items()
        for trial in report.trials
    ]
    table = [
        {"draw": draw} | {name: round(_sensitivity(report, grid), 4) for name, report in sweeps.items()}
        for draw, sweeps in found.items()
    ]
    return Finding(claims, {"sensitivity": table, "runs": runs})
