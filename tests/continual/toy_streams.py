"""Small streams and networks for the continual tests."""

import torch
from torch import nn

from allrounder.continual import permuted, split_by_class
from allrounder.task import Examples, Task


def blobs(classes=6, count=24, size=8, seed=0, spread=0.35):
    """A task of well separated Gaussian classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, size, generator=generator) * 1.5

    def part(n):
        targets = torch.arange(classes).repeat_interleave(n)
        inputs = centres[targets] + spread * torch.randn(len(targets), size, generator=generator)
        return Examples(inputs, targets)

    return Task("blobs", part(count), part(4), part(10), outputs=classes)


def by_class(**options):
    return split_by_class(blobs(**options), 2)


def by_order(count=3, **options):
    return permuted(blobs(**options), count, seed=1)


def net(size=8, outputs=6, *, norm=False, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(nn.Linear(size, 16), *middle, nn.ReLU(), nn.Linear(16, outputs))
