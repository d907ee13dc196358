"""D-Pruner: prune a language model so that what is left still speaks well and keeps one domain.

    1. general:  G_ij = w_ij^2 / [H^-1]_jj                      layer by layer on general text, H = (2 / n) X X^T
    2. domain:   g~ = g + amount * G g^2                        g: gradient of the next-token loss on the domain's text
    3. both:     S_ij += |g~ w + (g~ w)^2 / (2 N)|              over batches, while a working copy is tuned by SGD
    4. mask:     the original weights with the smallest S of each matrix become zero

Use it to cut a general model for one field (clinics, law, code) when both kinds of text are at hand. SparseGPT
calibrated on general and domain text together costs a fraction of the time, and is the competitor to beat. Step 1 alone
(`general_importance`) and steps 2 and 3 without it (`domain_importance`, then LLM-Pruner's element-wise Taylor score)
can be had by themselves and go to `prune_by`.

Cost: two forward passes over the general text and out * in^2 a matrix, as in SparseGPT; then one forward and backward
pass a batch and epoch, gradients used and dropped tensor by tensor as they come. Memory: the model, one block's
statistics and one gradient, and beside it (CPU, or files in `folder` that the kernel can drop) G (2 bytes a weight), S
(4) and the original weights. S stays float32: a sum of many batches stops growing in bfloat16.

Paper: Zhang et al., "Pruning as a Domain-specific LLM Extractor", Findings of NAACL 2024, arXiv 2405.06275. Departures:
- The paper's amount is 2 lambda lr^2 / N with lambda = 0.1 (`scaling="paper"`). That is some 1e-7: it changes nothing.
  The released code took gradients before the fp16 loss scale (2^16) was divided out, so its strength hangs on that
  scale. Here amount = regulariser / (mean(G) rms(g)) a matrix, without a unit; gradients are always unscaled.
- G is the paper's equation on the original weights. The code takes SparseGPT's U_jj^2 for [H^-1]_jj, on weights that
  are compensated already.
- The correction is positive whatever the sign of g, as in the code: the chain rule has one more factor g.
- R = w^3, which the code adds inside | |, is off (`reference_cubic=True`).
- One backward pass a batch: gradients are clipped by the norm of the batch before, or this tensor's own if larger. The
  first batch moves nothing (the warm-up starts at zero). Padding is neither learned nor counted.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .domain_importance import Scaling, domain_importance
from .pruning import Pruned, Structure, check, prune_by
from .pruning_layers import Matrix, blocks_of, calibrate, matrices
from .pruning_statistics import Statistic
from .pruning_text import shared, token_batches
from .sparsegpt import inverse_factor, sweep

__all__ = ["d_pruner", "general_importance"]

Progress = Callable[[int, int], None]


def d_pruner(
    model: nn.Module,
    general: Iterable[Any],
    domain: Iterable[Any],
    sparsity: float = 0.5,
    structure: Structure = "matrix",
    *,
    regulariser: float = 10.0,
    scaling: Scaling = "relative",
    lr: float = 0.03,
    epochs: int = 5,
    damp: float = 0.01,
    reference_cubic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Prune every linear layer inside the blocks by general and domain importance, in place.

    Args:
        model: a causal language model.
        general: batches of tokens (see `token_batches`). Paper: 128 rows of 2048 tokens of open text.
        domain: batches of tokens, gone through `epochs` times. Paper: 1000 examples with their answers, 8 a batch.
        sparsity, structure: as for `keep_mask`. Paper: 0.52 a matrix, about half of all parameters.
        regulariser: how much general importance weighs; 0 is the domain alone.
        scaling: `relative`, or `paper`, where `regulariser` is lambda (0.1 there).
        lr, epochs: of the SGD on the working copy. Paper: 0.03, 5.
        damp: as for `sparsegpt`.
        reference_cubic: add w^3 to the removal error, as the released code does.
        dtype: in which G is kept.
        folder: G, S and the original weights live there; the same call on a fresh model resumes after the last
            finished block or epoch. Remove it when done.
        progress: called with (blocks and batches done, all of them).

    Raises:
        InputError: bad sparsity, structure, text or layers (see `matrices`), losses or gradients that are not finite.
            The model has its own weights then.

    Warns:
        When general and domain text share 10% of their rows or more.
    """
    start, found = time.perf_counter(), matrices(model)
    check(sparsity, structure, found)
    first, second = token_batches(model, general, "general text"), token_batches(model, domain, "domain text")
    if (same := shared(first, second)) >= 0.1:
        warnings.warn(f"general and domain sets share {100 * same:.0f}% of rows; S is then of one text", stacklevel=2)
    place = None if folder is None else Path(folder)
    blocks = len(blocks_of(model)[1])

    def general_done(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total + epochs * len(second))

    def domain_done(done: int, total: int) -> None:
        if progress is not None:
            progress(blocks + done, blocks + total)

    scores, dead = _general(
        model, first, sparsity, structure, damp, dtype, None if place is None else place / "general", general_done
    )
    both = domain_importance(
        model, second, scores, regulariser=regulariser, scaling=scaling, lr=lr, epochs=epochs,
        reference_cubic=reference_cubic, folder=None if place is None else place / "domain", progress=domain_done,
    )  # fmt: skip
    pruned = prune_by(model, both, sparsity, structure, method="D-Pruner")
    rows = [row | {"dead inputs": dead[row["matrix"]]} for row in pruned.rows]
    return replace(pruned, rows=rows, seconds=time.perf_counter() - start)


def general_importance(
    model: nn.Module,
    text: Iterable[Any],
    sparsity: float = 0.5,
    structure: Structure = "matrix",
    *,
    damp: float = 0.01,
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """G of every matrix, `(out, in)` on the CPU by parameter name; the model is left as it was.

    Each block is pruned by SparseGPT at `sparsity` before its outputs go to the next, and put back.

    Args:
        model, text, sparsity, structure, damp, folder, progress: as for `sparsegpt`.
        dtype: of the result.
    """
    check(sparsity, structure, matrices(model))
    place = None if folder is None else Path(folder)
    return _general(model, token_batches(model, text), sparsity, structure, damp, dtype, place, progress)[0]


def _general(
    model: nn.Module, batches: list[dict[str, Tensor]], sparsity: float, structure: Structure, damp: float,
    dtype: torch.dtype, folder: Path | None, progress: Progress | None,
) -> tuple[dict[str, Tensor], dict[str, int]]:  # fmt: skip
    def visit(group: list[Matrix], statistic: Statistic) -> dict[str, Tensor]:
        factor, dead = inverse_factor(statistic.second, damp=damp, name=group[0].name)
        inverse = factor.square().sum(0)  # the diagonal of H^-1 = U^T U, (in,)
        kept = {}
        for matrix in group:
            weight = matrix.weight
            kept[matrix.name] = (weight.float().square() / inverse).masked_fill_(dead, 0).to("cpu", dtype)
            weight.copy_(sweep(weight, factor, dead, sparsity, structure))
        return kept

    settings = {"method": "general importance", "sparsity": sparsity, "structure": structure, "damp": damp,
                "dtype": str(dtype)}  # fmt: skip
    return calibrate(model, batches, visit, put_back=True, settings=settings, folder=folder, progress=progress)
