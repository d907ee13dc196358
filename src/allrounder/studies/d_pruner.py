"""D-Pruner on two Markov languages in one small model: who keeps which language at 50%.

Second-order chains over 32 symbols, transitions from Dirichlet(0.1): the general language on symbols 0 to 19, the
domain's on 14 to 31. One language model (the last two symbols, 2 x 24 embedding, two hidden layers of 96, no biases)
learns both. Its three matrices are pruned to 50%, calibrated on 1000 predictions of each language; perplexities are of
fresh text. Scores are taken at the trained weights (lr = 0); D-Pruner as the paper has it, with tuning, stands beside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compression.d_pruner import d_pruner, general_importance
from ..compression.domain_importance import domain_importance
from ..compression.pruning import prune_by
from ..compression.pruning_baselines import magnitude, wanda
from ..compression.pruning_text import next_token_loss, perplexity
from ..compression.sparsegpt import sparsegpt
from ..study import Claim, Finding, Scale, draws

__all__ = ["run"]

SYMBOLS, ROW, WIDTH, EMBEDDING = 32, 21, 96, 24
LANGUAGES = {"general": range(20), "domain": range(14, 32)}
KAPPA = 10.0


class _Model(nn.Module):
    """Predicts the next symbol from the last two."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (2 * EMBEDDING, WIDTH, WIDTH, SYMBOLS)
        linear = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
        self.embedding = nn.Embedding(SYMBOLS, EMBEDDING)
        self.blocks = nn.ModuleList([nn.Sequential(nn.GELU() if i else nn.Identity(), m) for i, m in enumerate(linear)])
        nn.init.normal_(self.embedding.weight, std=1.0, generator=generator)
        for layer in linear:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        now = self.embedding(tokens)  # (N, T, embedding)
        x = torch.cat([F.pad(now, (0, 0, 1, 0))[:, :-1], now], dim=-1)
        for block in self.blocks:
            x = block(x)
        return x


def _chain(symbols: range, generator: torch.Generator) -> Tensor:
    """P(next | two symbols), `(32, 32, 32)`, on these symbols alone."""
    count = len(symbols)
    gamma = torch._standard_gamma(torch.full((count, count, count), 0.1), generator=generator).clamp_min(1e-30)
    chain = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS)
    part = slice(symbols.start, symbols.stop)
    chain[part, part, part] = gamma / gamma.sum(-1, keepdim=True)
    return chain


def _text(chain: Tensor, symbols: range, rows: int, generator: torch.Generator) -> Tensor:
    """`(rows, 21)` symbols: 20 predictions a row, each row from a random start and 10 steps that are dropped."""
    tokens = torch.randint(symbols.start, symbols.stop, (rows, 2), generator=generator)
    for _ in range(ROW + 8):
        after = torch.multinomial(chain[tokens[:, -2], tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, after], dim=1)
    return tokens[:, -ROW:]


def _trained(text: Tensor, generator: torch.Generator) -> _Model:
    model = _Model(generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 4 * (len(text) // 10))
    for _ in range(4):
        for rows in text[torch.randperm(len(text), generator=generator)].split(10):
            optimiser.zero_grad()
            next_token_loss(model, {"input_ids": rows}).backward()
            optimiser.step()
            schedule.step()
    return model


def _draw(seed: int, scale: Scale) -> tuple[dict[str, dict[str, float]], float]:
    """Arm -> perplexities, and how much of the paper's mask differs from the domain's alone, in percent."""
    generator = torch.Generator().manual_seed(seed)
    text: dict[str, dict[str, Tensor]] = {}
    for name, symbols in LANGUAGES.items():
        chain = _chain(symbols, generator)
        sizes = {"train": 1000, "calibration": 50, "test": 250}
        text[name] = {part: _text(chain, symbols, rows, generator) for part, rows in sizes.items()}
    model = _trained(torch.cat([text[name]["train"] for name in text]), generator)
    general = [text["general"]["calibration"]]
    domain = list(text["domain"]["calibration"].split(1))
    both = [*general, text["domain"]["calibration"]]

    g = general_importance(copy.deepcopy(model), general)
    still = {"lr": 0.0, "epochs": 1}
    taylor = domain_importance(model, domain, **still)  # type: ignore[arg-type]
    dual = {k: domain_importance(model, domain, g, regulariser=k, **still) for k in (1.0, KAPPA)}  # type: ignore[arg-type]
    added = {name: g[name] / g[name].mean() + taylor[name] / taylor[name].mean() for name in g}
    arms: dict[str, Callable[[nn.Module], object]] = {
        "dense": lambda net: net,
        "magnitude": magnitude,
        "Wanda, general": lambda net: wanda(net, general),
        "Wanda, both": lambda net: wanda(net, both),
        "SparseGPT, general": lambda net: sparsegpt(net, general),
        "SparseGPT, both": lambda net: sparsegpt(net, both),
        "general only (G)": lambda net: prune_by(net, g),
        "domain only (Taylor)": lambda net: prune_by(net, taylor),
        "dual, 1": lambda net: prune_by(net, dual[1.0]),
        "dual, 10": lambda net: prune_by(net, dual[KAPPA]),
        "G/mean + S/mean": lambda net: prune_by(net, added),
    }
    changed = 0.0
    if scale != "smoke":
        arms["D-Pruner, tuned"] = lambda net: d_pruner(net, general, domain, regulariser=KAPPA)
        alone, paper = copy.deepcopy(model), copy.deepcopy(model)
        prune_by(alone, domain_importance(model, domain, epochs=1))
        prune_by(paper, domain_importance(model, domain, g, regulariser=0.1, scaling="paper", epochs=1))
        differ = [(a == 0) != (b == 0) for a, b in zip(alone.parameters(), paper.parameters(), strict=True)]
        changed = 100 * sum(int(d.sum()) for d in differ) / sum(p.numel() for p in model.blocks.parameters())
    found = {}
    for name, prune in arms.items():
        net = copy.deepcopy(model)
        prune(net)
        found[name] = {language: perplexity(net, [text[language]["test"]]) for language in LANGUAGES}
    return found, changed


def run(scale: Scale, seed: int) -> Finding:
    """Perplexities of both languages on fresh text."""
    found = [_draw(draw, scale) for draw in draws(scale, seed)]
    tables = [table for table, _ in found]

    def over(arm: str, other: str, language: str) -> float:
        return fmean(table[arm][language] / table[other][language] for table in tables)

    dual, alone = "dual, 10", "domain only (Taylor)"
    first, second = over(dual, alone, "general"), over(dual, alone, "domain")
    bound = 0.95 if scale == "smoke" else 0.9
    claims = [
        Claim.at_least("domain only: general perplexity over general only's",
                       over(alone, "general only (G)", "general"), 1.5, "x"),
        Claim.at_most("dual (10): general perplexity over domain only's", first, bound, "x"),
        Claim.at_least("general only: domain perplexity over dual's (10)",
                       over("general only (G)", dual, "domain"), 1, "x"),
        Claim.at_most("SparseGPT: general perplexity over that of its scores without compensation",
                      over("SparseGPT, general", "general only (G)", "general"), 1, "x"),
    ]  # fmt: skip
    if scale != "smoke":  # one draw is too noisy for these margins
        changed = max(share for _, share in found)
        claims.append(Claim.at_most("dual (10): domain perplexity over domain only's", second, 1.02, "x"))
        claims.append(Claim.at_most("lambda = 0.1 as written: mask that differs from domain only's", changed, 1, "%"))
    rows = []
    for arm in tables[0]:
        mean = {language: fmean(table[arm][language] for table in tables) for language in LANGUAGES}
        total = fmean(sum(table[arm][k] / table["dense"][k] for k in LANGUAGES) for table in tables)
        rows.append(
            {"arm": arm} | {k: round(v, 3) for k, v in mean.items()} | {"ratios to dense, sum": round(total, 3)}
        )
    return Finding(claims, {"perplexity at 50%": rows})
