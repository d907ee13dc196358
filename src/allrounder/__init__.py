"""allrounder: from specialists to one all-round model.

>>> import allrounder as ar
>>> merged = ar.merging.ties(base, experts, density=0.2)   # doctest: +SKIP
>>> ar.save(merged, "merged")                              # doctest: +SKIP

Rooms (`ar.merging`, `ar.data`, ...) and names are imported when first used, so that the command line
answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import compression, continual, data, losses, merging, multitask, nets, optim, report
    from .catalogue import cite, papers
    from .checkpoint import Checkpoint, Weights, open_weights
    from .errors import InputError
    from .saving import save
    from .scoring import normalised, score
    from .study import Claim, Finding, run_study
    from .task import Batches, Examples, Suite, Task
    from .train import fit, load_weights

_ROOMS = ("compression", "continual", "data", "losses", "merging", "multitask", "nets", "optim", "report")
_HOMES = {
    "Batches": "task", "Checkpoint": "checkpoint", "Claim": "study", "Examples": "task", "Finding": "study",
    "InputError": "errors", "Suite": "task", "Task": "task", "Weights": "checkpoint", "cite": "catalogue",
    "fit": "train", "load_weights": "train", "normalised": "scoring", "open_weights": "checkpoint",
    "papers": "catalogue", "run_study": "study", "save": "saving", "score": "scoring",
}  # fmt: skip

__version__ = "0.1.0"
__all__ = [
    "Batches", "Checkpoint", "Claim", "Examples", "Finding", "InputError", "Suite", "Task", "Weights", "cite",
    "compression", "continual", "data", "fit", "load_weights", "losses", "merging", "multitask", "nets",
    "normalised", "open_weights", "optim", "papers", "report", "run_study", "save", "score",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'allrounder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
