"""What the continual studies on digits stand on: one task of ten classes, small networks, and a run of one learner."""

from __future__ import annotations

from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import nn

from ..continual.driver import Record, learn
from ..continual.learner import Learner
from ..continual.stream import Stream
from ..task import Examples, Task

__all__ = ["EPOCHS", "digits_task", "network", "run_learner"]

EPOCHS, BATCH = 10, 32


@lru_cache(maxsize=8)
def digits_task(seed: int) -> Task:
    """Handwritten digits, 64 numbers in [0, 1] each: 1,247 for training, 50 for validation, 500 for test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    parts = [Examples(x[rows], y[rows]) for rows in order.split([1247, 50, 500])]
    return Task("digits", *parts, outputs=10)


def network(seed: int, *, norm: bool = False) -> nn.Sequential:
    """64-100-100-10 with ReLU, and batch norms after both hidden layers where asked."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for inside in (64, 100):
            layers += [nn.Linear(inside, 100), *([nn.BatchNorm1d(100)] if norm else []), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(100, 10))


def run_learner(learner: Learner, stream: Stream, seed: int, epochs: int = EPOCHS) -> Record:
    """One pass of the stream, `epochs` rounds over each experience in batches of 32."""
    return learn(learner, stream, epochs=epochs, batch_size=BATCH, seed=seed)
