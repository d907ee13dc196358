"""A word model with the Z-loss: how well it ranks the next word, and what a step costs, against softmax.

WikiText-2 (the sample of the data folder: a tenth of its training text, 13 000 words), the next word from the eight
before it: embedding, two ReLU layers, and an output layer of width 128 to the whole vocabulary. The body is the same
everywhere and trained by Adam. Spherical losses have the factored output layer with its own SGD; log-softmax and
hierarchical softmax have Adam. Everything that is chosen is chosen by the top-5 accuracy on validation after a short
training with the first seed: alpha and beta from the grid of the paper's card, eps, and every output layer's learning
rate. All losses see the same batches. The table is of test words, one in twelve, those unknown to the vocabulary
included; seconds are CPU seconds of a training step with the body in it. The Z-loss has no probabilities, so there is
no perplexity to compare.

    python examples/z_loss_words.py --data FOLDER --json z_loss_words.json
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import product
from statistics import fmean, pstdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from allrounder.data.language import Corpus, corpus
from allrounder.errors import InputError
from allrounder.losses.factored import FactoredOutput
from allrounder.losses.hierarchical_softmax import HierarchicalSoftmax
from allrounder.losses.spherical import (
    OneHotSquaredError,
    SphericalLoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
)

CONTEXT, EMBEDDING, HIDDEN, WIDTH, BATCH = 8, 64, 256, 128, 128
BODY_LR = 1e-3
RANKS = (1, 5, 20)
Output = Callable[[int], nn.Module]
"""seed -> output layer: `layer(hidden, targets)` is the loss."""
Setting = tuple[str, Output, float]


class Body(nn.Module):
    """Contexts `(N, 8)` -> hidden vectors `(N, 128)`; the last entry is 1, for a bias of each word."""

    def __init__(self, words: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(words, EMBEDDING)
            self.layers = nn.Sequential(
                nn.Linear(CONTEXT * EMBEDDING, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH - 1), nn.ReLU()
            )
            nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        return F.pad(self.layers(self.embedding(words).flatten(1)), (0, 1), value=1.0)


class LogSoftmax(nn.Module):
    """The ordinary dense output layer."""

    def __init__(self, words: int, seed: int) -> None:
        super().__init__()
        bound = WIDTH**-0.5
        drawn = torch.empty(words, WIDTH).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(drawn)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, self.weight), targets)

    def log_prob(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight).log_softmax(1)


def train(text: Tensor, words: int, output: nn.Module, lr: float, steps: int, seed: int) -> tuple[Body, float]:
    """The trained body, and CPU seconds a step. `lr` is the output layer's."""
    body = Body(words, seed)
    groups: list[dict[str, Any]] = [{"params": list(body.parameters()), "lr": BODY_LR}]
    if isinstance(output, FactoredOutput):
        output.lr = lr
    else:
        groups.append({"params": list(output.parameters()), "lr": lr})
    optimiser = torch.optim.Adam(groups, fused=True)
    rows = text.unfold(0, CONTEXT + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(rows), generator=generator)
        chosen, order = rows[order[:BATCH]], order[BATCH:]
        optimiser.zero_grad()
        output(body(chosen[:, :-1]), chosen[:, -1]).backward()
        optimiser.step()
    return body, (time.process_time() - start) / steps


@torch.no_grad()
def accuracies(body: Body, output: Any, text: Tensor, every: int) -> dict[int, float]:
    """Percent of next words among the k ranked first, for each k."""
    hits: dict[int, float] = dict.fromkeys(RANKS, 0.0)
    rows = text.unfold(0, CONTEXT + 1, 1)[::every]
    for part in rows.split(2000):
        hidden = body(part[:, :-1])
        if isinstance(output, FactoredOutput):
            found = output.topk(hidden, max(RANKS))[1]
        else:
            found = output.log_prob(hidden).topk(max(RANKS), dim=1).indices
        right = found == part[:, -1:]
        for k in RANKS:
            hits[k] += 100 * right[:, :k].sum().item() / len(rows)
    return hits


def rounds(words: int, small: bool) -> dict[str, list[list[Setting]]]:
    """What is tried for each loss: rounds of (description, output layer, learning rate).

    The second round of the Z-loss has other learning rates for what won the first.
    """

    def factored(loss: SphericalLoss) -> Output:
        return lambda seed: FactoredOutput(WIDTH, words, loss, lr=0.0, std=0.01, seed=seed)

    root = math.sqrt(words - 1)
    grid = product((0.1, 1), (3, root / 2)) if small else product((0.05, 0.1, 0.5, 1, 5), (0, 3, 10, root / 2, root))
    first = [(f"alpha {a:g}, beta {b:.1f}", factored(ZLoss(a, b)), 1.0) for a, b in grid]
    again = [] if small else [[("", factored(ZLoss()), lr) for lr in (0.1, 0.3, 3.0)]]
    wide, adam = ((10.0,), (1e-3,)) if small else ((1.0, 10.0, 100.0), (1e-3, 3e-3))
    eps = (1e-2,) if small else (1e-4, 1e-3, 1e-2)
    return {
        "log-softmax": [[("", lambda seed: LogSoftmax(words, seed), lr) for lr in adam]],
        "hierarchical softmax": [[("", lambda seed: HierarchicalSoftmax(WIDTH, words, seed=seed), lr) for lr in adam]],
        "Z-loss": [first, *again],
        "spherical softmax": [
            [(f"eps {e:g}", factored(SphericalSoftmaxLoss(e)), lr) for e, lr in product(eps, wide)],
        ],
        "Taylor softmax": [[("", factored(TaylorSoftmaxLoss()), lr) for lr in wide]],
        "squared error": [[("", factored(OneHotSquaredError()), lr) for lr in ((0.1,) if small else (0.01, 0.1, 0.5))]],
    }


def choose(text: Corpus, tried: list[list[Setting]], steps: int, tick: Callable[[], None]) -> Setting:
    """The setting with the best top-5 accuracy on validation after `steps` steps; one that diverges is out."""
    best, winner = -1.0, tried[0][0]
    for number, attempts in enumerate(tried):
        for name, output, lr in attempts if number == 0 else [(winner[0], winner[1], lr) for *_, lr in attempts]:
            layer = output(0)
            try:
                body, _ = train(text.train, len(text.vocabulary), layer, lr, steps, 0)
                found = accuracies(body, layer, text.validation, 8)[5]
            except InputError:
                found = -1.0
            tick()
            if found > best:
                best, winner = found, (name, output, lr)
    return winner


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    text = corpus("wikitext2_sample", folder=chosen.data)
    words = len(text.vocabulary)
    short, steps, every = (60, 200, 48) if chosen.small else (200, 1000, 12)
    tried = rounds(words, chosen.small)
    table, seconds = [], {}
    with Progress() as bar:
        attempts = sum(len(each) for some in tried.values() for each in some)
        line = bar.add_task("trainings", total=attempts * short + len(tried) * len(chosen.seeds) * steps)
        for name, some in tried.items():
            setting, output, lr = choose(text, some, short, lambda: bar.advance(line, short))
            runs, times = [], []
            for seed in chosen.seeds:
                layer = output(seed)
                body, spent = train(text.train, words, layer, lr, steps, seed)
                runs.append(accuracies(body, layer, text.test, every))
                times.append(spent)
                bar.advance(line, steps)
            seconds[name] = fmean(times)
            row: dict[str, Any] = {"loss": name, "chosen": ", ".join(filter(None, (setting, f"lr {lr:g}")))}
            for k in RANKS:
                row |= {f"top-{k} %": fmean(run[k] for run in runs), f"+- {k}": pstdev(run[k] for run in runs)}
            table.append(row | {"ms a step": 1000 * seconds[name]})
    notes = [
        f"{words} words, {steps} steps of {BATCH}, seeds {chosen.seeds}; +- is the deviation over seeds.",
        f"A step takes {seconds['log-softmax'] / seconds['Z-loss']:.1f} times as long with log-softmax as with Z-loss.",
    ]
    finish(chosen, "The Z-loss as a word model on WikiText-2", {"next word, test": table}, notes)


if __name__ == "__main__":
    main()
