"""Which part of the weights has optimiser state: the choices of FRUGAL, and the way into and out of each.

    block                     whole tensors: `blocks` says which ones
    columns, rows, randk      k columns, rows or single entries of each matrix: an index (k,)
    svd, orthogonal           r directions of each matrix: a semi-orthogonal basis (n, r)

A projection acts on the smaller side: G (m, n) with m >= n goes to G B (m, r), with m < n to B^T G (r, n). `svd` takes
the leading singular vectors of the gradient (GaLore), `orthogonal` random ones. Cost of a choice: nothing for blocks,
a permutation for an index (of all m n entries for `randk`), one SVD, O(m n min(m, n)), or one QR for a basis.

A choice depends on the seed, on how many choices were made before, and on the parameter's position, never on the
device or the process, so that all ranks agree; `svd` depends on the gradient alone.
"""

from __future__ import annotations

import random
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Order", "Subspace", "basis", "blocks", "count", "down", "index", "put_", "take", "up_"]

Subspace = Literal["block", "columns", "rows", "randk", "svd", "orthogonal"]
Order = Literal["random", "ascending", "descending", "mirror"]


def count(density: float, size: int, *, nearest: bool = False) -> int:
    """How many of `size` are meant: `int(density * size)`, or the nearest whole number, and at least one above 0.

    >>> count(0.25, 128), count(0.29, 100), count(0.1, 3), count(0.0, 3)
    (32, 29, 1, 0)
    """
    if density == 0 or size == 0:
        return 0
    # 0.29 * 100 is 28.999999999999996
    return max(1, round(density * size) if nearest else int(density * size + 1e-9))


def blocks(order: Order, size: int, density: float, turn: int, seed: int) -> list[int]:
    """Which of `size` tensors have state at the `turn`-th choice.

    Args:
        order: a `random` subset, a window that moves on from the first tensor (`ascending`) or from the last
            (`descending`), or from both ends towards the middle (`mirror`).
        size: number of tensors.
        density: share of them that is chosen, to the nearest whole number and at least one above 0.
        turn: 0, 1, ...
        seed: of `random`.

    Raises:
        InputError: for `mirror`, when the number of tensors or of chosen ones is odd.

    >>> blocks("descending", 8, 0.25, turn=1, seed=0), blocks("mirror", 8, 0.25, turn=1, seed=0)
    ([4, 5], [1, 6])
    """
    if order not in get_args(Order):
        raise InputError(f"order is one of {', '.join(get_args(Order))}, got {order!r}")
    active = count(density, size, nearest=True)
    if active in (0, size):
        return list(range(active))
    start = turn * active
    if order == "random":
        return sorted(random.Random(f"{seed}/{turn}").sample(range(size), active))
    if order == "mirror":
        if size % 2 or active % 2:
            raise InputError(
                f"order 'mirror' takes tensors in pairs from both ends, but there are {size} of which density "
                f"{density:g} makes {active} active; both must be even: change density or take another order"
            )
        lower = [(start // 2 + i) % (size // 2) for i in range(active // 2)]
        return sorted(lower + [size - 1 - i for i in lower])
    found = [(start + i) % size for i in range(active)]
    return sorted(found if order == "ascending" else [size - 1 - i for i in found])


def generator(seed: int, turn: int, position: int) -> torch.Generator:
    """The random numbers of one parameter at one choice, the same on every device and rank."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/{turn}/{position}").getrandbits(63))


def index(kind: Subspace, like: Tensor, density: float, numbers: torch.Generator) -> Tensor:
    """The chosen columns, rows or entries of a matrix, ascending, int64 `(k,)`."""
    size = {"columns": like.shape[-1], "rows": like.shape[0], "randk": like.numel()}[kind]
    chosen = torch.randperm(size, generator=numbers)[: count(density, size)]
    return chosen.sort().values.to(like.device)


def basis(kind: Subspace, gradient: Tensor, density: float, numbers: torch.Generator) -> Tensor:
    """Orthonormal directions of the smaller side, `(min(m, n), r)`, r = round(density * min(m, n))."""
    size = min(gradient.shape)
    rank = count(density, size, nearest=True)
    if kind == "orthogonal":
        found = torch.linalg.qr(torch.randn(size, rank, generator=numbers)).Q.to(gradient.device)
    else:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        left, _, right = torch.linalg.svd(gradient.to(wide), full_matrices=False)
        found = right[:rank].T if gradient.shape[0] >= gradient.shape[1] else left[:, :rank]
    return found.to(gradient.dtype).contiguous()


def take(kind: Subspace, whole: Tensor, chosen: Tensor) -> Tensor:
    """A compact copy of the chosen columns `(m, k)`, rows `(k, n)` or entries `(k,)`."""
    if kind == "randk":
        return whole.take(chosen)
    return whole.index_select(1 if kind == "columns" else 0, chosen)


def put_(kind: Subspace, whole: Tensor, chosen: Tensor, compact: Tensor) -> None:
    """Writes back what `take` took."""
    if kind == "randk":
        whole.put_(chosen, compact)
    else:
        whole.index_copy_(1 if kind == "columns" else 0, chosen, compact)


def down(whole: Tensor, directions: Tensor) -> Tensor:
    """`(m, n)` -> coordinates `(m, r)`, or `(r, n)` when m < n."""
    return whole @ directions if whole.shape[0] >= whole.shape[1] else directions.T @ whole


def up_(whole: Tensor, directions: Tensor, compact: Tensor, *, scale: float = 1.0) -> Tensor:
    """Adds `scale` times what the coordinates stand for to `(m, n)`, in place."""
    if whole.shape[0] >= whole.shape[1]:
        return whole.addmm_(compact, directions.T, alpha=scale)
    return whole.addmm_(directions, compact, alpha=scale)
