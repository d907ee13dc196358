"""FRUGAL on a small language model of Shakespeare: perplexity against the bytes of optimiser state.

Characters of tinyshakespeare, a decoder-only transformer of 0.45 M parameters, batches of 16 x 64 characters, warm-up
and cosine. Embedding, norms and head keep Adam, the linear layers inside the blocks are split (`parameter_groups`). The
learning rate of each optimiser is the one of its grid with the best validation loss on the first seed; the test text is
read once for each seed, at the end.

    python examples/frugal_lm.py --data FOLDER --json frugal_lm.json
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch.nn import functional as F

from allrounder.data import corpus, windows
from allrounder.nets import CausalTransformer
from allrounder.optim import FRUGAL, parameter_groups, warmup_cosine

LENGTH, BATCH, GAP = 64, 16, 50
SHAPE = {"width": 96, "depth": 4, "heads": 4, "context": LENGTH}
GRID = (1e-3, 3e-3, 1e-2)
Make = Callable[[CausalTransformer, float], torch.optim.Optimizer]


def frugal(**settings: Any) -> Make:
    return lambda model, lr: FRUGAL(parameter_groups(model), lr=lr, update_gap=GAP, betas=(0.9, 0.95), **settings)


OPTIMISERS: dict[str, Make] = {
    "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    "FRUGAL, block .25": frugal(density=0.25),
    "FRUGAL, columns .25": frugal(density=0.25, subspace="columns"),
    "FRUGAL, density 0": frugal(density=0.0),
    "GaLore's rule (svd .25)": frugal(density=0.25, subspace="svd", free="none"),
    "BAdam's rule (block .25)": frugal(density=0.25, order="descending", free="none"),
    "Lion inside, columns .25": lambda model, lr: FRUGAL(
        parameter_groups(model), lr=lr / 5, update_gap=GAP, density=0.25, subspace="columns", rule="lion"
    ),
}


def loss_of(model: CausalTransformer, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out(model: CausalTransformer, text: torch.Tensor) -> float:
    """Mean loss over the text in stretches of the model's context."""
    rows = text[: (len(text) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    return fmean(loss_of(model, part).item() for part in rows.split(64) if len(part) == 64)


def state_bytes(optimiser: torch.optim.Optimizer) -> int:
    if isinstance(optimiser, FRUGAL):
        return optimiser.state_bytes()
    return sum(v.numel() * v.element_size() for s in optimiser.state.values() for v in s.values() if v.ndim)


def train(
    make: Make, lr: float, text: torch.Tensor, vocabulary: int, steps: int, seed: int
) -> tuple[CausalTransformer, int]:  # fmt: skip
    model = CausalTransformer(vocabulary, seed=seed, **SHAPE)
    optimiser = make(model, lr)
    schedule = warmup_cosine(optimiser, steps, warmup=steps // 10)
    for rows, _ in zip(windows(text, LENGTH, BATCH, seed=seed), range(steps), strict=False):
        optimiser.zero_grad()
        loss_of(model, rows).backward()
        optimiser.step()
        schedule.step()
    return model, state_bytes(optimiser)


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    text = corpus("tinyshakespeare", folder=chosen.data, level="char")
    steps, size = (40 if chosen.small else 300), len(text.vocabulary)
    rows = []
    with Progress() as bar:
        line = bar.add_task("training runs", total=len(OPTIMISERS) * (len(GRID) + len(chosen.seeds) - 1))
        for name, make in OPTIMISERS.items():
            tried = {}
            for lr in GRID:
                model, stored = train(make, lr, text.train, size, steps, chosen.seeds[0])
                tried[lr] = held_out(model, text.validation), model, stored
                bar.advance(line)
            lr = min(tried, key=lambda rate: tried[rate][0])
            models = [tried[lr][1]]
            for seed in chosen.seeds[1:]:
                models.append(train(make, lr, text.train, size, steps, seed)[0])
                bar.advance(line)
            tests = [math.exp(held_out(model, text.test)) for model in models]
            rows.append(
                {
                    "optimiser": name, "lr": lr, "test perplexity": fmean(tests),
                    "spread": stdev(tests) if len(tests) > 1 else None,
                    "validation perplexity, first seed": math.exp(tried[lr][0]), "state, kB": tried[lr][2] / 1000,
                }
            )  # fmt: skip
    finish(
        chosen, "FRUGAL on characters of Shakespeare", {"perplexity and state": rows},
        [f"{steps} steps of {BATCH} x {LENGTH} characters, choices every {GAP}; Lion at a fifth of the rate"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
