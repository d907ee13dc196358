"""`digits`: six views of real handwritten digits as six tasks, with no download.

The 1,797 digits (8 x 8 grey) that ship with scikit-learn, seen straight, turned, mirrored, negated,
upside down, and transposed and shifted. Heads are fixed before fine-tuning, as CLIP's text heads are:
head k is `12 * normalise(W + 3 N_k / 8)` with shared class directions W and a task's own noise N_k, so
that the base does not already solve the tasks. The regime was chosen so that merge methods differ, and
before any of them was run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.multitask import MultiTaskModel, Normalize, class_head, mlp
from ..task import Examples, Suite, Task
from ..train import fit

__all__ = ["digits", "digits_base", "digits_expert", "digits_shape"]

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "straight": lambda x: x,
    "turned": lambda x: x.rot90(1, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "negated": lambda x: 1 - x,
    "upside-down": lambda x: x.rot90(2, (1, 2)),
    "transposed": lambda x: x.transpose(1, 2).roll((1, 1), (1, 2)),
}
WIDTH = 64


def digits(*, seed: int = 0) -> Suite:
    """The suite.

    Args:
        seed: which images are for training (900), validation (300) and test (the remaining 597).

    Returns:
        Six tasks with inputs `(N, 64)` float32 in [0, 1] and 10 classes.
    """
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32) / 16
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([900, 300, len(order) - 1200])
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def task(name: str, view: Callable[[Tensor], Tensor]) -> Task:
        flat = view(images).reshape(len(images), -1)
        splits = [Examples(flat[part].contiguous(), labels[part]) for part in parts]
        return Task(name, *splits, outputs=10, classes=names)

    return Suite([task(name, view) for name, view in VIEWS.items()], name="digits")


def digits_shape(suite: Suite, *, seed: int = 0, share: float = 1.0) -> MultiTaskModel:
    """The untrained model: a 64-256-256-64 GELU network with features on the unit sphere, and one head a task.

    `share` is what is left of the two widths of 256.
    """
    wide = max(1, round(256 * share))
    backbone = nn.Sequential(mlp([64, wide, wide, WIDTH], seed=seed), Normalize())
    return MultiTaskModel(backbone, {name: class_head(torch.ones(10, WIDTH), temperature=1 / 12) for name in suite})


def digits_base(suite: Suite, *, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> MultiTaskModel:
    """The base model with its fixed heads: pretrained on all views with the shared class directions alone.

    300 Adam steps, lr 1e-3, one view a step in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(10, WIDTH, generator=generator), dim=1)
    noise = {name: torch.randn(10, WIDTH, generator=generator) for name in VIEWS}
    backbone = digits_shape(suite, seed=seed).backbone
    plain = MultiTaskModel(backbone, {name: class_head(directions, temperature=1 / 12) for name in suite})
    fit(plain, suite, steps=300, lr=1e-3, seed=seed, progress=progress)
    heads = {name: class_head(directions + 3 * noise[name] / 8, temperature=1 / 12) for name in suite}
    return MultiTaskModel(backbone, heads)


def digits_expert(
    base: MultiTaskModel, suite: Suite, task: str, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> MultiTaskModel:
    """A specialist: 120 AdamW steps, lr 3e-4, batch 128, of the whole backbone on one task."""
    import copy

    if task not in suite:
        raise InputError(f"suite {suite.name!r} has no task {task!r}; it has {', '.join(suite)}")
    expert = copy.deepcopy(base)
    return fit(expert, suite.only([task]), steps=120, lr=3e-4, seed=seed, progress=progress)  # type: ignore[return-value]
