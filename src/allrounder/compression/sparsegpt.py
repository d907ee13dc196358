"""SparseGPT: prune each matrix so that the weights that stay make up for those that go.

    H = (2 / n) X X^T + damping,  Hinv = U^T U with U upper triangular
    score_ij = w_ij^2 / U_jj^2;  column by column: error_j = (w_j - kept_j) / U_jj,  w_k -= error_j U_jk for k > j

Removing weight (i, j) adds `w_ij^2 / (2 Hinv_jj)` to `dw H dw^T / 2` if the whole row may compensate. Columns before j
are settled already, so U_jj^2 = [(H_{j:,j:})^-1]_11 <= Hinv_jj stands in its place. Masks are chosen a block of 128
columns at a time, from the weights as they are by then.

Use it when a general model is pruned to 50% or 2:4 without training; the strongest of the classical baselines here.
Magnitude needs no text, Wanda no inverse; for a domain see `d_pruner`, or calibrate on both texts.

Cost: two forward passes over the text, tokens * in^2 for H (upper half), in^3 + out * in^2 a matrix; memory: the model,
hidden states, one block's H, and three matrices of the largest in^2.

Paper: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
arXiv 2301.00774. Departures from its code: U is had by one Cholesky factorisation of H in reversed order and one
triangular inverse, not by two factorisations and an inverse; layers with one input share H and U; columns are updated
from the errors when their turn comes, not all at once; padding is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .pruning import Pruned, Structure, check, keep_mask, report
from .pruning_layers import Matrix, calibrate, matrices
from .pruning_statistics import Statistic
from .pruning_text import token_batches

__all__ = ["inverse_factor", "sparsegpt", "sweep"]

COLUMNS = 128


def sparsegpt(
    model: nn.Module,
    text: Iterable[Any],
    sparsity: float = 0.5,
    structure: Structure = "matrix",
    *,
    damp: float = 0.01,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Prune every linear layer inside the blocks, in place, layer by layer.

    Args:
        model: a causal language model.
        text: batches of tokens (see `token_batches`). Paper: 128 rows of 2048 tokens of general text.
        sparsity, structure: as for `keep_mask`, within each block of 128 columns; `block` takes blocks of in / 32.
        damp: added to the diagonal of H, as a share of its mean. Paper: 0.01.
        folder: finished blocks are kept there, and the same call on a fresh model resumes after them.
        progress: called with (blocks done, blocks).

    Raises:
        InputError: bad sparsity, structure, text or layers (see `matrices`), an H that cannot be factorised.
    """
    start, found = time.perf_counter(), matrices(model)
    check(sparsity, structure, found)

    def visit(group: list[Matrix], statistic: Statistic) -> dict[str, Tensor]:
        factor, dead = inverse_factor(statistic.second, damp=damp, name=group[0].name)
        for matrix in group:
            matrix.weight.copy_(sweep(matrix.weight, factor, dead, sparsity, structure))
        return {}

    settings = {"method": "sparsegpt", "sparsity": sparsity, "structure": structure, "damp": damp}
    batches = token_batches(model, text)
    _, dead = calibrate(
        model, batches, visit, settings=settings, folder=None if folder is None else Path(folder), progress=progress
    )
    return report(model, found, "SparseGPT", structure, start, dead)


def inverse_factor(second: Tensor, *, damp: float = 0.01, name: str = "the layer") -> tuple[Tensor, Tensor]:
    """U, upper triangular with `U^T U = (H + damping)^-1`, and which inputs are dead. `second` is overwritten.

    Args:
        second: H, `(in, in)` float32.
        damp: share of the mean diagonal, >= 0. Dead inputs (a zero on the diagonal) get a one there.
        name: of the layer, for errors.

    Raises:
        InputError: a negative damp; when H is not positive definite even so.

    >>> factor, _ = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damp=0.0)
    >>> (3 * factor.T @ factor).round(decimals=4)
    tensor([[ 2., -1.],
            [-1.,  2.]])
    """
    if damp < 0:
        raise InputError(f"damp is at least 0, got {damp}")
    diagonal = second.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean().item()
    diagonal[dead] = 1.0
    diagonal += damp * mean
    lower, failed = torch.linalg.cholesky_ex(second.flip(0, 1))
    if failed.item() or not torch.isfinite(lower).all():
        raise InputError(f"H of {name!r} is not positive definite with damp={damp}; give more text or raise damp")
    root = lower.flip(0, 1)  # H = root root^T, root upper triangular
    del lower
    second.zero_().diagonal().fill_(1)  # its memory is the right-hand side
    return torch.linalg.solve_triangular(root, second, upper=True), dead


def sweep(
    weight: Tensor, factor: Tensor, dead: Tensor, sparsity: float, structure: Structure = "matrix",
    *, columns: int = COLUMNS,
) -> Tensor:  # fmt: skip
    """The pruned and compensated weight.

    Args:
        weight: `(out, in)`, not changed.
        factor, dead: from `inverse_factor`.
        sparsity, structure: as for `keep_mask`, within each block of `columns` columns.

    Returns:
        `(out, in)`, in the factor's type.
    """
    ins = weight.shape[1]
    if structure == "block":
        columns, structure = -(-ins // 32), "matrix"
    rows = weight.T.to(
        factor.dtype, copy=True, memory_format=torch.contiguous_format
    )  # (in, out): columns lie together
    rows[dead] = 0
    for start in range(0, ins, columns):
        stop = min(start + columns, ins)
        part, local = rows[start:stop], factor[start:stop, start:stop]  # (c, out), (c, c)
        errors = torch.zeros_like(part)
        scale = local.diagonal()[:, None]
        keep = torch.ones_like(part, dtype=torch.bool)
        if structure != "2:4":
            keep = keep_mask((part / scale).square_().T, sparsity, structure).T
        for j in range(stop - start):
            if structure == "2:4" and j % 4 == 0:
                four = part[j : j + 4] - local[:j, j : j + 4].T @ errors[:j]
                keep[j : j + 4] = keep_mask((four / scale[j : j + 4]).square_().T, sparsity, structure).T
            now = part[j] - local[:j, j] @ errors[:j]
            part[j] = now * keep[j]
            errors[j] = (now - part[j]) / scale[j]
        if stop < ins:
            rows[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return rows.T
