"""Preference losses as logic: exact values, all 256 structures, the order of losses, and a toy that has to be ranked.

The toy is the smallest model with preferences: 20 answers ranked by number, a softmax over 20 logits, 300 SGD steps of
16 random pairs, the better rank winning. Every loss is compiled from logic; `ccpo` and the new one are typed as text.
"""

from __future__ import annotations

from itertools import chain, combinations, product
from statistics import fmean

import torch

from ..losses.preference_lattice import lattice
from ..losses.preference_logic import STRUCTURES, LogicLoss, Structure, compile_loss, decompile, weighted_model_count
from ..losses.preference_text import worlds
from ..study import Claim, Finding, Scale, draws

__all__ = ["run"]

ANSWERS, STEPS, PAIRS, LR = 20, 300, 16, 1.0

# rho and -log sigmoid(rho) at p_w = 0.6, p_l = 0.3, worked out by enumeration apart from this library
EXPECTED = {
    "unlikelihood": (-0.322773, 0.867501), "cunl": (0.336472, 0.538997), "ce": (0.405465, 0.510826),
    "cpo": (0.693147, 0.405465), "orpo": (1.252763, 0.251314), "ccpo": (1.609438, 0.182322),
    "uncpo": (1.992430, 0.127833),
}  # fmt: skip
RATIOS = {
    "ce": "p_w / (1 - p_w)", "unlikelihood": "p_w * (1 - p_l) / (1 - p_w * (1 - p_l))", "cpo": "p_w / p_l",
    "orpo": "p_w * (1 - p_l) / (p_l * (1 - p_w))", "uncpo": "(1 - p_l * (1 - p_w)) / (p_l * (1 - p_w))",
    "ccpo": "p_w / (p_l * (1 - p_w))", "cunl": "p_w * (1 - p_l) / p_l", "dpo": "p_w * r_l / (p_l * r_w)",
}  # fmt: skip
ORDER = {
    ("unlikelihood", "cunl"), ("unlikelihood", "ce"), ("cunl", "cpo"), ("cunl", "orpo"), ("cpo", "ccpo"),
    ("orpo", "ccpo"), ("ce", "ccpo"), ("ccpo", "uncpo"),
}  # fmt: skip
TRAINED = {
    "CPO": "cpo", "ORPO": "orpo", "unlikelihood": "unlikelihood", "CE": "ce",
    "cCPO, from text": Structure("L >> W", given="W | L"),
    "new, from text": Structure("L >> W", given="~(W & L)"),
}  # fmt: skip


def _ranked(loss: LogicLoss, seed: int) -> tuple[float, float]:
    """Share of neighbouring answers in the right order after training, and the probability of the best answer."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(ANSWERS, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=LR)
    for _ in range(STEPS):
        one = torch.randint(ANSWERS, (PAIRS,), generator=generator)
        other = (one + torch.randint(1, ANSWERS, (PAIRS,), generator=generator)) % ANSWERS
        log_p = logits.log_softmax(0)
        optimiser.zero_grad()
        loss(log_p[torch.minimum(one, other)], log_p[torch.maximum(one, other)]).backward()
        optimiser.step()
    return (logits[:-1] > logits[1:]).double().mean().item(), logits.softmax(0)[0].item()


def _text(some: frozenset) -> str:
    rows = (" * ".join(p if true else f"(1 - {p})" for p, true in zip(("p_w", "p_l"), world)) for world in sorted(some))
    return " + ".join(rows) or "0"


def _round_trips() -> tuple[int, int]:
    """Pairs (top, bottom) that come back from ratio to logic, and those that compile."""
    sets = [frozenset(some) for some in chain.from_iterable(combinations(worlds(2), size) for size in range(5))]
    same = usable = 0
    for top, bottom in product(sets, sets):
        found = decompile(_text(top), _text(bottom))
        same += (found.top, found.bottom) == (top, bottom)
        usable += bool(top and bottom and compile_loss(found))
    return same, usable


def run(scale: Scale, seed: int) -> Finding:
    """Exact claims once, the toy for each draw."""
    generator = torch.Generator().manual_seed(seed)
    card = [torch.tensor([p], dtype=torch.float64).log() for p in (0.6, 0.3)]
    losses = {name: compile_loss(name, reduction="none") for name in STRUCTURES}
    values = [
        {"loss": name, "rho": losses[name].rho(*card).item(), "value": losses[name](*card).item(),
         "expected rho": rho, "expected value": value}
        for name, (rho, value) in EXPECTED.items()
    ]  # fmt: skip
    off = max(
        abs(row[key] - row[f"expected {key}"])
        for row in values
        for key in ("rho", "value")  # type: ignore[operator]
    )
    p = torch.rand(4, 2000, generator=generator, dtype=torch.float64) * 0.998 + 0.001
    logs = list(p.log())
    count_gap = max(
        (compile_loss(formula, reduction="none")(*logs[:2])
         + weighted_model_count(formula, {"W": p[0], "L": p[1]}).log()).abs().max().item()
        for formula in ("W", "W & ~L", "L >> W", "W | L")
    )  # fmt: skip
    dpo_gap = (losses["dpo"].rho(*logs) - (logs[0] - logs[1] - logs[2] + logs[3])).abs().max().item()
    wrong_way = max((losses[b](*logs[:2]) - losses[a](*logs[:2])).max().item() for a, b in lattice())
    same, usable = _round_trips()
    read = sum(
        (found.top, found.bottom) == (STRUCTURES[name].top, STRUCTURES[name].bottom)
        for name, found in ((name, decompile(ratio)) for name, ratio in RATIOS.items())
    )
    logits = torch.linspace(-1, 1, ANSWERS, dtype=torch.float64).requires_grad_()
    log_p = logits.log_softmax(0)
    (slope,) = torch.autograd.grad(losses["cpo"](log_p[3:4], log_p[8:9]).sum(), logits)
    miss = 1 - torch.sigmoid(logits[3] - logits[8]).item()
    slope_gap = max(abs(slope[3].item() + miss), abs(slope[8].item() - miss))
    slope[[3, 8]] = 0

    toy = [
        {"draw": draw, "loss": name, "right order": order, "p(best)": best}
        for draw in draws(scale, seed)
        for name, structure in TRAINED.items()
        for order, best in [_ranked(compile_loss(structure), draw)]
    ]

    def column(name: str, key: str) -> list[float]:
        return [float(row[key]) for row in toy if row["loss"] == name]

    ratio = [a / b for a, b in zip(column("CPO", "p(best)"), column("CE", "p(best)"))]
    claims = [
        Claim.at_most("largest error of 14 values at p_w = 0.6, p_l = 0.3", off, 1e-6, ""),
        Claim.at_most("loss and -log of the weighted model count, largest gap", count_gap, 1e-9, ""),
        Claim.at_most("DPO by 16 rows and its closed form, largest gap of rho", dpo_gap, 1e-9, ""),
        Claim.at_least("structures that come back from their ratio, of 256", same, 256, ""),
        Claim("structures with a winning and a losing world", "225", usable, usable == 225),
        Claim.at_least("known losses read off their ratio, of 8", read, 8, ""),
        Claim.at_least("edges of the lattice that are the 8 expected", len(ORDER & set(lattice())), 8, ""),
        Claim.at_most("edges of the lattice beyond the expected", len(set(lattice()) - ORDER), 0, ""),
        Claim.at_most("a loss above another one is lower by, at most, over 2000 models", wrong_way, 1e-9, ""),
        Claim.at_most("gradient of CPO at the two logits, error", slope_gap, 1e-12, ""),
        Claim.at_most("gradient of CPO at the other logits", slope.abs().max().item(), 0, ""),
        Claim.at_least("CPO: neighbours in order, worst draw", min(column("CPO", "right order")), 1, "share"),
        Claim.at_least("ORPO: neighbours in order, worst draw", min(column("ORPO", "right order")), 1, "share"),
        Claim.at_least("p(best) of CPO over CE, worst draw", min(ratio), 2, "times"),
        Claim.at_most("CE: neighbours in order, mean", fmean(column("CE", "right order")), 0.95, "share"),
        Claim.at_least(
            "cCPO from text: neighbours in order, mean, against the better of CPO and ORPO",
            fmean(column("cCPO, from text", "right order"))
            - max(fmean(column(name, "right order")) for name in ("CPO", "ORPO")), -0.05, "share",
        ),
    ]  # fmt: skip
    rounded = [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in values]
    order = [{"above": above, "below": below} for above, below in lattice()]
    shown = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in toy]
    return Finding(claims, {"values": rounded, "order": order, "toy": shown})
