"""Pruning masks: scores in, zeros out, and what they are worth.

    drop the k = round(sparsity * n) lowest scores of each group;  group = matrix | row | column block | 4 in a row

`matrix` compares all weights of a matrix, `row` the inputs of one output (Wanda), `block` whole column blocks of width
in / 32 one by one (D-Pruner's iterative blocking), `2:4` keeps the two best of every four consecutive inputs of an
output. Counts are exact, ties go to the first: a matrix loses its share to within one weight a group.

All verbs of this family change the model they are given, in place: a copy would double the memory of a model that
hardly fits. Load it again, or `copy.deepcopy` it first, if the dense one is still needed.

Zeros do not make a dense matrix product faster. They save space when stored sparse (a bit a weight and the values that
are left), and time only as 2:4 on kernels made for it. `Pruned` says so with the figures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..saving import replacing
from .pruning_layers import Matrix, blocks_of, matrices

__all__ = ["Pruned", "Structure", "keep_mask", "prune_by"]

Structure = Literal["matrix", "row", "block", "2:4"]


@dataclass(frozen=True)
class Pruned:
    """What was pruned, and what that is good for; `print` it.

    Args:
        model: the model that was given, pruned.
        method: what chose the weights.
        structure: what was compared with what.
        rows: one dict a matrix: name, shape, `sparsity` (share of zeros), `dead inputs` (always zero in calibration).
        seconds: wall time.
        dense_bytes, sparse_bytes: what the pruned matrices take as they are, and as a bitmap and the values left.
    """

    model: nn.Module
    method: str
    structure: str
    rows: list[dict[str, Any]]
    seconds: float
    dense_bytes: int
    sparse_bytes: int

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of zeros of each matrix."""
        return {row["matrix"]: row["sparsity"] for row in self.rows}

    @property
    def overall(self) -> float:
        """Zeros in the pruned matrices as a share of all parameters of the model, embeddings and head included."""
        zeros = sum(row["sparsity"] * math.prod(row["shape"]) for row in self.rows)
        return zeros / sum(p.numel() for p in self.model.parameters())

    @property
    def covered(self) -> float:
        """Share of the parameters inside the blocks that are in linear layers; fused experts are not."""
        inside = sum(p.numel() for p in blocks_of(self.model)[1].parameters())
        return sum(math.prod(row["shape"]) for row in self.rows) / inside

    def __str__(self) -> str:
        shares = [row["sparsity"] for row in self.rows]
        dead = sum(row["dead inputs"] for row in self.rows)
        lines = [
            f"{self.method}, {self.structure}: {len(shares)} matrices, {100 * sum(shares) / len(shares):.1f}% zeros in "
            f"each on average ({100 * min(shares):.1f} to {100 * max(shares):.1f}), {100 * self.overall:.1f}% of all "
            f"parameters, {self.seconds:.1f} s",
            f"on disk: {self.dense_bytes / 1e6:,.1f} MB dense as saved, {self.sparse_bytes / 1e6:,.1f} MB as bitmap "
            "and values",
            "speed: 2:4 zeros are faster only on kernels made for them (torch.sparse.to_sparse_semi_structured)"
            if self.structure == "2:4"
            else "speed: the same; zeros without a pattern do not make dense products faster",
        ]
        if self.covered < 0.9:
            share = 100 * (1 - self.covered)
            lines.append(f"left alone: {share:.0f}% of the blocks' parameters are in no linear layer (fused experts?)")
        if dead:
            lines.append(f"dead inputs: {dead} columns were always zero in the calibration text")
        return "\n".join(lines)

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the model as an ordinary `from_pretrained` folder, whole or not at all, with `pruning.json` beside it.

        Args:
            folder: must not exist, or be empty.
            tokenizer: saved with it, so that the folder stands alone.

        Raises:
            InputError: for a model without `save_pretrained`, or a folder that cannot be made.
        """
        if not hasattr(self.model, "save_pretrained"):
            kind = type(self.model).__name__
            raise InputError(
                f"a {kind} has no save_pretrained; write its weights with allrounder.save(model.state_dict())"
            )
        with replacing(Path(folder)) as work:
            self.model.save_pretrained(work)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
            content = {
                "method": self.method, "structure": self.structure, "seconds": round(self.seconds, 1),
                "share_of_all_parameters": self.overall, "dense_bytes": self.dense_bytes,
                "sparse_bytes": self.sparse_bytes, "matrices": self.rows,
            }  # fmt: skip
            (work / "pruning.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return Path(folder)


def _smallest(rows: Tensor, count: int) -> Tensor:
    """True at the `count` smallest entries of each row of `(R, n)`; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    threshold = rows.kthvalue(count, dim=1, keepdim=True).values
    below, equal = rows < threshold, rows == threshold
    wanted = count - below.sum(1, keepdim=True)
    if (equal.sum(1, keepdim=True) != wanted).any():
        equal &= equal.cumsum(1) <= wanted
    return below | equal


def keep_mask(scores: Tensor, sparsity: float, structure: Structure = "matrix", *, blocks: int = 32) -> Tensor:
    """Which weights stay.

    Args:
        scores: `(out, in)`, finite, larger is more important.
        sparsity: share that goes, [0, 1); exactly 0.5 for `2:4`.
        structure: what is compared with what, as in the module's text.
        blocks: column blocks of `block`, each ceil(in / blocks) wide. Paper: 32.

    Returns:
        bool `(out, in)`.

    Raises:
        InputError: a sparsity out of range, an unknown structure, scores that are no matrix or not finite, inputs
            that do not divide into fours.

    >>> keep_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0], [9.0, 8.0, 7.0, 6.0]]), 0.5).int()
    tensor([[0, 0, 0, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    >>> keep_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0], [9.0, 8.0, 7.0, 6.0]]), 0.5, "row").int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0]], dtype=torch.int32)
    """
    check(sparsity, structure)
    if scores.ndim != 2 or not scores.numel():
        raise InputError(f"scores are a matrix (out, in), got {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise InputError("scores are not finite; look for NaN or overflow in the model and its calibration text")
    outs, ins = scores.shape
    if structure == "2:4":
        if ins % 4:
            raise InputError(f"2:4 needs inputs in fours, got a matrix {(outs, ins)}; take another structure")
        order = scores.reshape(outs, ins // 4, 4).argsort(dim=-1, stable=True)
        return torch.ones_like(order, dtype=torch.bool).scatter_(-1, order[..., :2], False).reshape(outs, ins)
    if structure == "row":
        return ~_smallest(scores, round(sparsity * ins))
    if blocks < 1:
        raise InputError(f"blocks is at least 1, got {blocks}")
    width = -(-ins // blocks) if structure == "block" else ins
    parts = [
        _smallest(part.reshape(1, -1), round(sparsity * part.numel())).view(part.shape)
        for part in scores.split(width, dim=1)
    ]
    return ~torch.cat(parts, dim=1)


def prune_by(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    sparsity: float = 0.5,
    structure: Structure = "matrix",
    *,
    method: str = "scores",
) -> Pruned:
    """Zero the weights with the lowest scores, in place.

    Args:
        model: a causal language model.
        scores: parameter name -> `(out, in)`, for every linear layer inside the blocks (see `matrices`).
        sparsity, structure: as for `keep_mask`.
        method: the name for the report.

    Raises:
        InputError: names or shapes that are not the model's; as for `keep_mask`. Nothing is changed then.
    """
    start = time.perf_counter()
    found = matrices(model)
    check(sparsity, structure, found)
    named = {matrix.name: matrix for matrix in found}
    if odd := sorted(named.keys() ^ scores.keys()):
        where = "lack" if odd[0] in named else "are for"
        raise InputError(f"the scores {where} {odd[0]!r}; give one (out, in) score matrix for each of matrices(model)")
    for name, matrix in named.items():
        if scores[name].shape != matrix.weight.shape:
            have, want = tuple(scores[name].shape), tuple(matrix.weight.shape)
            raise InputError(f"the scores of {name!r} are {have}, its weight is {want} as (out, in)")
        if not torch.isfinite(scores[name]).all():
            raise InputError(f"the scores of {name!r} are not finite")
    for name, matrix in named.items():
        keep = keep_mask(scores[name], sparsity, structure)
        matrix.weight.masked_fill_(~keep.to(matrix.weight.device), 0)
    return report(model, found, method, structure, start)


def check(sparsity: float, structure: str, found: Sequence[Matrix] = ()) -> None:
    """Refuse a sparsity or a structure that cannot be had, before anything is computed."""
    if structure not in get_args(Structure):
        raise InputError(f"structure is one of {', '.join(get_args(Structure))}, got {structure!r}")
    if not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise InputError(f"sparsity is a fraction of the weights, 0 <= sparsity < 1, got {sparsity}{hint}")
    if structure == "2:4":
        if sparsity != 0.5:
            raise InputError(f"2:4 is a sparsity of 0.5, got {sparsity}; leave it out or take another structure")
        if odd := [matrix for matrix in found if matrix.weight.shape[1] % 4]:
            name, shape = odd[0].name, tuple(odd[0].weight.shape)
            raise InputError(f"2:4 needs inputs in fours, {name!r} is {shape}; take another structure")


def report(
    model: nn.Module, found: Sequence[Matrix], method: str, structure: str, start: float,
    dead: Mapping[str, int] | None = None,
) -> Pruned:  # fmt: skip
    """Count the zeros that are there now; `start` is a time of `time.perf_counter`."""
    rows, dense, sparse = [], 0, 0
    for matrix in found:
        weight = matrix.weight
        left, numel = int(weight.count_nonzero()), weight.numel()
        rows.append(
            {
                "matrix": matrix.name, "shape": list(weight.shape), "sparsity": 1 - left / numel,
                "dead inputs": (dead or {}).get(matrix.name, 0),
            }
        )  # fmt: skip
        dense += numel * weight.element_size()
        sparse += -(-numel // 8) + left * weight.element_size()
    return Pruned(model, method, structure, rows, time.perf_counter() - start, dense, sparse)
