"""Task mixtures: how often each task is drawn.

`shares` turns sizes into sampling ratios, `s_k ~ min(n_k, cap)^(1/T)`: T = 1 in proportion to the sizes, larger T
flatter, T -> inf all equal. `unmixed` draws one task for each step (Uni-Perceiver v2, 2022, arXiv 2211.09808): the
whole batch, and every process, works on that task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from ..errors import InputError

__all__ = ["checked_shares", "shares", "unmixed"]


def shares(sizes: Mapping[str, float], *, temperature: float = 1.0, cap: float | None = None) -> dict[str, float]:
    """Sampling ratios that sum to one.

    Args:
        sizes: task -> examples, > 0.
        temperature: T > 0; `math.inf` for equal ratios.
        cap: the largest size that counts.

    Raises:
        InputError: no task, a size or temperature that is not positive.

    >>> shares({"a": 900, "b": 100}, temperature=2)
    {'a': 0.75, 'b': 0.25}
    """
    if not sizes or not all(0 < size < math.inf for size in sizes.values()):
        raise InputError(f"sizes must be positive and finite for at least one task, got {dict(sizes)}")
    if not temperature > 0:
        raise InputError(f"temperature is above 0, got {temperature:g}")
    if cap is not None and not cap > 0:
        raise InputError(f"cap is above 0, got {cap:g}")
    largest = max(sizes.values()) if cap is None else min(cap, max(sizes.values()))
    raw = {task: (min(size, largest) / largest) ** (1 / temperature) for task, size in sizes.items()}
    total = math.fsum(raw.values())
    return {task: value / total for task, value in raw.items()}


def checked_shares(given: Mapping[str, float]) -> dict[str, float]:
    """The same ratios as floats.

    Raises:
        InputError: a ratio that is not positive (with its task), or a sum that is not one.
    """
    for task, ratio in given.items():
        if not ratio > 0:
            raise InputError(f"task {task!r} has sampling ratio {ratio:g}: remove it or set a ratio above 0")
    if not math.isclose(math.fsum(given.values()), 1, rel_tol=1e-6):
        raise InputError(f"sampling ratios must sum to 1, got {math.fsum(given.values()):g}")
    return {task: float(ratio) for task, ratio in given.items()}


def unmixed(ratios: Mapping[str, float], *, seed: int = 0) -> Iterator[list[str]]:
    """One task for each step, drawn with these ratios; endless, and the same on every process with one seed.

    Args:
        ratios: task -> sampling ratio, > 0, summing to one.
        seed: of the draws.

    Raises:
        InputError: as `checked_shares`.

    >>> draws = unmixed({"a": 0.5, "b": 0.5}, seed=1)
    >>> len(next(draws))
    1
    """
    names, weights = list(ratios), torch.tensor(list(checked_shares(ratios).values()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Iterator[list[str]]:
        while True:
            yield from ([names[i]] for i in torch.multinomial(weights, 1024, True, generator=generator).tolist())

    return draw()
