"""Pruning scores against the passes they need: time of SparseGPT, Wanda and D-Pruner, and their peak memory.

    python benchmarks/pruning_scores.py [--json FILE] [--repeats 5]

A decoder of 3.1 M parameters in its blocks (width 256, 4 blocks, MLP 1024), one thread. General text: 128 rows of 256
tokens, 32 a column of the widest matrix (the paper's 128 x 2048 tokens are 24 for 11008); domain: 64 rows, once. What
SparseGPT, Wanda and general importance cannot do without are two forward passes through the blocks (one for the
statistics, one with what was pruned), what domain importance cannot do without is a forward and backward pass a batch
and epoch; D-Pruner needs both. The aim is at most 1.3 times as long.

Memory is private memory (RssAnon) of a whole process (width 512, 8 blocks, 25 M parameters) above one that only runs
the same passes. Bound: hidden states twice (before and after a block), one block's H, three matrices of the largest
in^2, and 16 MiB; all H at once would be eight times that. D-Pruner, with a folder so that G, S and the original weights
are files, must stay within 16 MiB of plain forward and backward passes, or of that bound where it is larger.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from typing import Any

from _measure import MIB, Report, Side, arguments, folder_of, peak_private, turns

SHAPE = {"width": 256, "depth": 4, "heads": 4, "context": 256}
LARGE = {"width": 512, "depth": 8, "heads": 8, "context": 256}
SMALL = {"width": 32, "depth": 2, "heads": 2, "context": 32}
VOCABULARY, ROWS, BATCH, EPOCHS = 500, 128, 4, 1
STATE: dict[str, Any] = {}


def prepare(shape: dict[str, int], rows: int) -> None:
    """The model, and text for both sides, in batches of 4 rows."""
    import torch

    from allrounder.nets import CausalTransformer

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    text = [torch.randint(VOCABULARY, (count, shape["context"]), generator=generator) for count in (rows, rows // 2)]
    STATE.update(
        model=CausalTransformer(VOCABULARY, **shape), general=text[0].split(BATCH), domain=text[1].split(BATCH)
    )


def forward_twice() -> None:
    """Two forward passes through the blocks."""
    import torch

    model = STATE["model"]
    with torch.no_grad():
        for _ in range(2):
            for tokens in STATE["general"]:
                model.features(model.embedding(tokens))


def forward_backward() -> None:
    """A forward and backward pass a batch and epoch."""
    from torch.nn import functional as F

    model = STATE["model"]
    for _ in range(EPOCHS):
        for tokens in STATE["domain"]:
            F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            model.zero_grad()


def score(verb: str, folder: str | None = None, copied: bool = True) -> None:
    """One verb on a copy of the model, or on the model itself."""
    import copy
    from pathlib import Path

    from allrounder.compression.d_pruner import d_pruner, general_importance
    from allrounder.compression.domain_importance import domain_importance
    from allrounder.compression.pruning_baselines import wanda
    from allrounder.compression.sparsegpt import sparsegpt

    model, general, domain = STATE["model"], STATE["general"], STATE["domain"]
    if copied:
        model = copy.deepcopy(model)
    place = None if folder is None else Path(folder)
    if verb == "SparseGPT":
        sparsegpt(model, general, folder=place)
    elif verb == "Wanda":
        wanda(model, general, folder=place)
    elif verb == "general importance":
        general_importance(model, general, folder=place)
    elif verb == "domain importance":
        domain_importance(model, domain, STATE["G"], epochs=EPOCHS, folder=place)
    else:
        d_pruner(model, general, domain, epochs=EPOCHS, folder=place)


def prepare_general() -> None:
    """G, as D-Pruner keeps it, for domain importance by itself."""
    import torch

    from allrounder.compression.d_pruner import general_importance

    STATE["G"] = general_importance(STATE["model"], STATE["general"], dtype=torch.bfloat16)


def memory_of(what: str, size: str) -> None:
    """What one process of the memory table does."""
    small = size == "small"
    prepare(SMALL if small else LARGE, 8 if small else 32)
    if what == "forward passes":
        forward_twice()
    elif what == "forward and backward passes":
        forward_backward()
    else:
        score(what, None if what == "Wanda" else str(folder_of("pruning") / "run"), copied=False)


def main() -> None:
    options = arguments(__doc__, repeats=5)
    shape, rows = (SMALL, 8) if options.small else (SHAPE, ROWS)
    report = Report("pruning scores against the passes they need")
    verbs = ("SparseGPT", "Wanda", "general importance", "domain importance", "D-Pruner")
    side = Side("allrounder")
    side(prepare, shape, rows)
    side(prepare_general)
    for warm in (forward_twice, forward_backward):
        side(warm)
    sides = {"two forward passes": lambda: side(forward_twice)[0]}
    sides["forward and backward passes"] = lambda: side(forward_backward)[0]
    for verb in verbs:
        sides[verb] = lambda verb=verb: side(score, verb)[0]
    found = turns(sides, repeats=options.repeats, note=lambda line: print(line, flush=True))
    side.close()
    for name, times in found.items():
        report.spread(name, times, "s")
    forward, back = found["two forward passes"], found["forward and backward passes"]
    needed = dict.fromkeys(verbs[:3], forward) | {"domain importance": back}
    needed["D-Pruner"] = [a + b for a, b in zip(forward, back, strict=True)]
    for verb, passes in needed.items():
        ratios = [a / b for a, b in zip(found[verb], passes, strict=True)]
        report.spread(f"{verb} / passes it needs", ratios, "x", target=1.3, at_most=True)

    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory goes back: peaks are of what is in use
    size, place = "small" if options.small else "large", folder_of("pruning") / "run"
    peaks: dict[str, float] = {}
    for what in ("forward passes", "forward and backward passes", "Wanda", "SparseGPT", "D-Pruner"):
        values = []
        for _ in range(min(3, options.repeats)):
            shutil.rmtree(place, ignore_errors=True)
            values.append(peak_private([sys.executable, __file__, "--memory", what, size]) / MIB)
        peaks[what] = statistics.median(values)
        print(f"{what:42s} {peaks[what]:8.1f} MiB", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    model = SMALL if options.small else LARGE
    width, tokens = model["width"], (8 if options.small else 32) * model["context"]
    hidden = 4 * width * tokens / MIB
    block = 4 * (3 + 16) * width**2 / MIB  # H of query/key/value, of out, and of the two layers of the MLP
    bound = 2 * hidden + block + 3 * 4 * 16 * width**2 / MIB + 16
    for verb in ("Wanda", "SparseGPT"):
        above = peaks[verb] - peaks["forward passes"]
        report.add(f"{verb}: memory above forward passes", above, "MiB", target=round(bound, 1), at_most=True)
    ground = max(peaks["forward and backward passes"], peaks["forward passes"] + bound)
    report.add("D-Pruner: memory above the larger of both", peaks["D-Pruner"] - ground, "MiB", target=16, at_most=True)
    report.add("H of all blocks at once would be", model["depth"] * block, "MiB")
    report.notes.append("'both': forward and backward passes with their gradients; forward passes and the bound above")
    report.finish(options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        memory_of(*sys.argv[2:4])
    else:
        main()
