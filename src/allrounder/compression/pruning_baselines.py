"""Magnitude and Wanda: what every pruning method is compared with.

    magnitude: score_ij = |w_ij|;  Wanda: score_ij = |w_ij| * ||X_j||_2, compared within each output row

Magnitude needs no text and no time. Wanda asks how much an input carries, costs two forward passes and one number an
input, and updates nothing. Both are strong at 50% and below; neither knows a domain, unless Wanda is given its text.

Papers: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, arXiv
1506.02626 (magnitude, here without retraining); Sun et al., "A Simple and Effective Pruning Approach for Large Language
Models", ICLR 2024, arXiv 2306.11695. Departure from Wanda's code: padding is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .pruning import Pruned, Structure, check, keep_mask, report
from .pruning_layers import Matrix, calibrate, matrices
from .pruning_statistics import Statistic
from .pruning_text import token_batches

__all__ = ["magnitude", "wanda"]


def magnitude(model: nn.Module, sparsity: float = 0.5, structure: Structure = "matrix") -> Pruned:
    """Zero the smallest weights of every linear layer inside the blocks, in place.

    Args:
        model: a causal language model.
        sparsity, structure: as for `keep_mask`.

    Raises:
        InputError: bad sparsity, structure or layers (see `matrices`).
    """
    start, found = time.perf_counter(), matrices(model)
    check(sparsity, structure, found)
    for matrix in found:
        matrix.weight.masked_fill_(~keep_mask(matrix.weight.abs(), sparsity, structure), 0)
    return report(model, found, "magnitude", structure, start)


def wanda(
    model: nn.Module,
    text: Iterable[Any],
    sparsity: float = 0.5,
    structure: Structure = "row",
    *,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Zero the weights with the smallest |weight| times norm of their input, in place, layer by layer.

    Args:
        model: a causal language model.
        text: batches of tokens (see `token_batches`). Paper: 128 rows of 2048 tokens of general text.
        sparsity, structure: as for `keep_mask`. Paper: within each row, or 2:4.
        folder: finished blocks are kept there, and the same call on a fresh model resumes after them.
        progress: called with (blocks done, blocks).

    Raises:
        InputError: bad sparsity, structure, text or layers (see `matrices`).
    """
    start, found = time.perf_counter(), matrices(model)
    check(sparsity, structure, found)

    def visit(group: list[Matrix], statistic: Statistic) -> dict[str, Tensor]:
        norm = statistic.second.sqrt()  # (in,), up to one factor
        for matrix in group:
            keep = keep_mask(matrix.weight.float().abs() * norm, sparsity, structure)
            matrix.weight.masked_fill_(~keep, 0)
        return {}

    settings = {"method": "wanda", "sparsity": sparsity, "structure": structure}
    batches = token_batches(model, text)
    _, dead = calibrate(
        model, batches, visit, diagonal=True, settings=settings, folder=None if folder is None else Path(folder),
        progress=progress,
    )  # fmt: skip
    return report(model, found, "Wanda", structure, start, dead)
