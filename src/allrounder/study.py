"""Studies: what a paper says, what was measured, and whether it holds.

A study is a module in `allrounder.studies` with one function, `run(scale, seed) -> Finding`. It would
fail if the method were wrong or left out. A claim that does not hold is a result like any other.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from .errors import InputError

__all__ = ["Claim", "Finding", "Scale", "draws", "run_study", "versions"]

Scale = Literal["smoke", "laptop", "full"]


@dataclass(frozen=True)
class Claim:
    """One sentence that can be false.

    Args:
        text: the claim, in words.
        expected: the condition it must meet, for example `">= 10 points"`.
        measured: the figure, in the unit of `expected`.
        holds: whether `measured` meets `expected`.
    """

    text: str
    expected: str
    measured: float | str
    holds: bool

    @classmethod
    def at_least(cls, text: str, measured: float, bound: float, unit: str = "points") -> Claim:
        """`measured >= bound`."""
        return cls(text, f">= {bound:g} {unit}".rstrip(), round(measured, 4), bool(measured >= bound))

    @classmethod
    def at_most(cls, text: str, measured: float, bound: float, unit: str = "points") -> Claim:
        """`measured <= bound`."""
        return cls(text, f"<= {bound:g} {unit}".rstrip(), round(measured, 4), bool(measured <= bound))


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Args:
        claims: the claims that were put to the test.
        tables: name -> rows (dicts of one shape) with the figures behind the claims.
    """

    claims: Sequence[Claim]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)


def draws(scale: Scale, seed: int) -> list[int]:
    """Seeds of the independent repetitions inside one study: one for `smoke`, three otherwise.

    >>> draws("smoke", 1), draws("laptop", 1)
    ([1], [1, 1001, 2001])
    """
    return [seed + 1000 * i for i in range(1 if scale == "smoke" else 3)]


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("allrounder", "torch", "safetensors", "numpy", "scikit-learn", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run_study(slug: str, *, scale: Scale = "laptop", seed: int = 0) -> dict[str, Any]:
    """Run the study of one paper.

    Args:
        slug: a paper of the catalogue, for example `"tall-masks"`.
        scale: `smoke` (about 15 s on 2 cores), `laptop` (about 3 min) or `full` (a GPU).
        seed: the seed of everything random in it.

    Returns:
        A JSON-ready dict: `slug, scale, seed, seconds, claims, tables, versions`.

    Raises:
        InputError: for an unknown slug or scale, or a paper without a study.
    """
    from .catalogue import paper

    if scale not in get_args(Scale):
        raise InputError(f"a scale is one of {', '.join(get_args(Scale))}, got {scale!r}")
    entry = paper(slug)
    if not entry.study:
        raise InputError(f"the paper {slug!r} has no study of its own")
    start = time.perf_counter()
    finding = importlib.import_module(entry.study).run(scale, seed)
    return {
        "slug": slug,
        "scale": scale,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "claims": [asdict(claim) for claim in finding.claims],
        "tables": finding.tables,
        "versions": versions(),
    }
