"""Probabilities over many classes in two steps: which cluster, and which class within it.

    p(c) = p(cluster of c) p(c | cluster of c)       about sqrt(D) clusters of about sqrt(D) classes each

A training example costs O(sqrt(D) d), where a full softmax costs O(D d). Use it as the baseline of fast output layers,
and when true probabilities over very many classes are needed. Class number c is in cluster c // size: order the classes
by frequency or by meaning, for a poor order costs accuracy. `torch.nn.AdaptiveLogSoftmaxWithLoss` is the well-kept
relative for classes ordered by frequency: quicker where few classes make up most of the text, and less exact for rare
ones. Memory is that of the full layer.

Papers: Goodman, "Classes for fast maximum entropy training", 2001, arXiv cs/0108006; Morin & Bengio, "Hierarchical
Probabilistic Neural Network Language Model", AISTATS 2005.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .spherical import Reduction, reduced, target_columns

__all__ = ["HierarchicalSoftmax"]


class HierarchicalSoftmax(nn.Module):
    """Output layer and loss: `layer(hidden, targets)` is the negative log-likelihood in nats.

    Args:
        features: d, the width of `hidden` `(N, d)`.
        classes: D, at least 1. There are ceil(sqrt(D)) classes a cluster; the last cluster may have fewer.
        reduction: over rows: `mean`, `sum`, or `none` for a loss `(N,)`.
        sparse: give the weights within clusters sparse gradients, so that a step of `torch.optim.SGD` (without momentum
            and weight decay) touches only clusters of targets: needed for the cost above. Few other optimisers do.
        seed: of the initial weights, uniform within 1 / sqrt(d) as in `torch.nn.Linear`.

    Raises:
        InputError: sizes under 1, wrong shapes, targets `(N,)` that are not classes, an empty batch.

    >>> layer = HierarchicalSoftmax(8, 10)
    >>> layer.log_prob(torch.ones(1, 8)).exp().sum().allclose(torch.tensor(1.0))
    True
    """

    vacant: Tensor

    def __init__(
        self, features: int, classes: int, *, reduction: Reduction = "mean", sparse: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        if min(features, classes) < 1:
            raise InputError(f"features and classes are at least 1, got {features} and {classes}")
        if reduction not in ("none", "mean", "sum"):
            raise InputError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}")
        self.features, self.classes, self.sparse = features, classes, sparse
        self.reduction: Reduction = reduction
        self.size = math.isqrt(classes - 1) + 1  # of a cluster
        clusters = -(-classes // self.size)
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            bound = features**-0.5
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.cluster_weight, self.cluster_bias = drawn(clusters, features), nn.Parameter(torch.zeros(clusters))
        self.class_weight = drawn(clusters, self.size * features)
        self.class_bias = nn.Parameter(torch.zeros(clusters, self.size))
        vacant = torch.arange(clusters * self.size).view(clusters, self.size) >= classes
        self.register_buffer("vacant", vacant, persistent=False)  # places of the last cluster without a class

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        self._check(hidden)
        if targets.ndim != 1:
            raise InputError(f"targets are (N,), one a row; got {tuple(targets.shape)}")
        targets = target_columns(targets, len(hidden), self.classes)[:, 0]
        cluster = targets // self.size
        weight = F.embedding(cluster, self.class_weight, sparse=self.sparse).view(-1, self.size, self.features)
        within = (weight @ hidden[:, :, None])[:, :, 0] + F.embedding(cluster, self.class_bias, sparse=self.sparse)
        within = within.masked_fill(self.vacant[cluster], -math.inf)  # (N, size)
        loss = F.cross_entropy(self._cluster_scores(hidden), cluster, reduction="none")
        return reduced(loss + F.cross_entropy(within, targets % self.size, reduction="none"), self.reduction)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probabilities `(N, D)` of all classes; O(N D d)."""
        self._check(hidden)
        within = hidden @ self.class_weight.view(-1, self.features).T + self.class_bias.flatten()
        within = within.unflatten(1, self.class_bias.shape).masked_fill(self.vacant, -math.inf)
        within = within.log_softmax(2)  # (N, clusters, size)
        found = self._cluster_scores(hidden).log_softmax(1)[:, :, None] + within
        return found.flatten(1)[:, : self.classes]

    def extra_repr(self) -> str:
        return f"features={self.features}, classes={self.classes}, clusters of {self.size}"

    def _cluster_scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.cluster_weight, self.cluster_bias)

    def _check(self, hidden: Tensor) -> None:
        if hidden.ndim != 2 or hidden.shape[1] != self.features:
            raise InputError(f"hidden values are (N, {self.features}), got {tuple(hidden.shape)}; flatten other axes")
