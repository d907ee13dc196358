"""Self-Positioning: find the mixture of task vectors, and how far to go, that suits a small probe set best.

The task vectors are folded from the left by spherical interpolation,
`slerp(L, R) = [sin((1 - b) alpha) L + sin(b alpha) R] / sin(alpha)`, with alpha the angle between L and R,
`b = a_R / (a_L + a_R)`, and a_L the mean weight of what L holds; the result is `base + scale * folded`.
The K weights a and the scale are learned by gradient on a loss over the probe plus `mu * scale`, which
keeps the step short. Everything else is frozen.

Use it when experts were trained on unequal amounts of data (their vectors differ in length) or pull in
different directions, and a few labelled batches of every task are at hand: for embedding models with
`info_nce`, but the loss is yours. The fold depends on the order of the experts; with more than about ten
the order decides more than the weights do.

The folded vector lies in the span of the task vectors, so its K coefficients follow from their K x K Gram
matrix alone. Cost: one pass over K + 1 models for that matrix; then per step one forward and backward pass
per task, one merge and one contraction; K + 1 learned numbers.

Paper: Li et al., "Improving General Text Embedding Model: Tackling Task Conflict and Data Imbalance through
Model Merging", 2024, arXiv 2410.15035. No code was published. Own choices: all weights and the scale start
at 1; weights are a softplus, so they stay positive; the scale is projected to be at least 0. Where the
paper's formula is printed with the ratio outside the sine it is read as the angle inside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import Weights
from ..errors import InputError
from .coefficients import MergedModel, endless, learn
from .engine import Aligned, Linear, Merge
from .evidence import double

__all__ = ["Spherical", "fold", "gram", "info_nce", "self_positioning", "slerp"]

FLAT = 1e-6  # sines below this are taken for zero
MANY = 10

Loss = Callable[[Any, Any], Tensor]
Objective = Callable[[nn.Module, Any, str], Tensor]


@dataclass(frozen=True)
class Spherical(Linear):
    """The linear rule that a fold comes down to.

    Args:
        coefficients: as for `Linear`.
        weights: the experts' weights a.
        scale: factor of the folded vector.
        order: the experts, in the order in which they were folded.
    """

    weights: tuple[float, ...] = ()
    scale: float = 1.0
    order: tuple[str, ...] = ()


def gram(models: Aligned, names: Iterable[str] | None = None) -> Tensor:
    """Inner products of the task vectors, `(K, K)` float64, in one pass over the models.

    Args:
        models: base and experts.
        names: tensors that count. Default: all floating ones.
    """
    total = torch.zeros(len(models.experts), len(models.experts), dtype=torch.float64)
    for name in models.float_names if names is None else names:
        for _, deltas in models.deltas(name):
            total += (double(deltas) @ double(deltas).T).cpu()
    return total


def fold(weights: Tensor, products: Tensor, *, names: Sequence[str] | None = None) -> Tensor:
    """Coefficients of the vectors in their spherical fold from the left; differentiable in `weights`.

    Args:
        weights: `(K,)`, positive.
        products: the vectors' inner products, `(K, K)`.
        names: what messages call the vectors.

    Raises:
        InputError: a vector of length zero, or two that point in opposite directions.

    >>> fold(torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    tensor([0.7071, 0.7071])
    """
    names = names or [f"number {k + 1}" for k in range(len(products))]
    for name, square in zip(names, products.diagonal().tolist(), strict=True):
        if square <= 0:
            raise InputError(f"the task vector of {name!r} is zero: the expert equals the base; leave it out")
    folded = torch.ones_like(weights[:1])  # coefficients of the vectors folded so far
    for n in range(1, len(products)):
        length = (folded @ products[:n, :n] @ folded).sqrt() * products[n, n].sqrt()
        cosine = (folded @ products[:n, n] / length).clamp(-1, 1)
        share = weights[n] / (weights[:n].mean() + weights[n])
        if (1 - cosine.detach() ** 2).clamp_min(0).sqrt() < FLAT:
            if cosine < 0:
                raise InputError(f"the task vector of {names[n]!r} is opposite to those before it: no arc joins them")
            left, right = 1 - share, share
        else:
            angle = torch.acos(cosine)
            left, right = torch.sin((1 - share) * angle) / angle.sin(), torch.sin(share * angle) / angle.sin()
        folded = torch.cat([folded * left, right.reshape(1)])
    return folded


def slerp(
    base: Weights, experts: Mapping[str, Weights], weights: Sequence[float] | None = None, scale: float = 1.0
) -> Merge:
    """Spherical interpolation of task vectors, folded over the experts in their order.

    Args:
        base: the weights all experts were fine-tuned from.
        experts: name -> weights.
        weights: K positive numbers; only their ratios count. Default: equal.
        scale: factor of the folded vector.

    Returns:
        The merge by the linear rule; `merge.rule.coefficients` holds its K numbers. The models are read once
        at the call.

    Raises:
        InputError: weights that are not positive, an expert equal to the base, opposite task vectors.

    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    >>> slerp({"w": torch.zeros(2)}, experts)["w"]
    tensor([0.7071, 1.4142])
    """
    models = Aligned(base, experts)
    weights = [1.0] * len(experts) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(experts) or not all(0 < weight < float("inf") for weight in weights):
        raise InputError(f"slerp needs {len(experts)} positive weights, got {weights}")
    values = scale * fold(torch.tensor(weights, dtype=torch.float64), gram(models), names=list(experts))
    return Merge(models, Spherical(values.tolist(), tuple(weights), float(scale), tuple(experts)))


def info_nce(queries: Tensor, documents: Tensor, temperature: float = 0.05) -> Tensor:
    """Mean over queries of `-log softmax_j(cos(q_i, d_j) / temperature)` at the query's own document.

    Args:
        queries: `(N, d)`.
        documents: `(M, d)`, M >= N; row i belongs to query i, all other rows are negatives (those of the batch,
            and further ones after row N).
        temperature: > 0; usual values are 0.01 to 0.05.

    >>> round(info_nce(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)  # log(1 + exp(-1))
    0.3133
    """
    have = f"{tuple(queries.shape)} and {tuple(documents.shape)}"
    if {queries.ndim, documents.ndim} != {2} or queries.shape[1] != documents.shape[1] or len(documents) < len(queries):
        raise InputError(f"info_nce needs queries (N, d) and documents (M, d) with M >= N, got {have}")
    if not temperature > 0:
        raise InputError(f"temperature is above 0, got {temperature:g}")
    cosines = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(queries), device=queries.device))


class _Learned:
    """K raw weights and the scale, float64 leaves; called for the coefficients `(K, 1)`."""

    def __init__(self, products: Tensor, names: Sequence[str]) -> None:
        self.products, self.names = products, names
        start = torch.expm1(torch.ones(len(products), dtype=torch.float64)).log()  # softplus of it is 1
        self.raw = start.requires_grad_()
        self.scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def weights(self) -> Tensor:
        return F.softplus(self.raw)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(min=0.0)
        return self.scale * fold(self.weights(), self.products, names=self.names).unsqueeze(1)


def self_positioning(
    model: nn.Module,
    base: Weights,
    experts: Mapping[str, Weights],
    probe: Mapping[str, Iterable[Any]],
    *,
    loss: Loss | Mapping[str, Loss] = F.cross_entropy,
    objective: Objective | None = None,
    steps: int = 120,
    lr: float = 5e-2,
    mu: float = 0.01,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Merge:
    """Learn the weights and the scale of a spherical merge on a probe set.

    Args:
        model: called as `model(inputs, task)`; a `MultiTaskModel`, whose backbone is merged, or any module. Left
            as it was.
        base: the weights all experts were fine-tuned from (for checkpoints of one sequence of trainings: what
            the sequence began with).
        experts: name -> weights. Their order is the order of the fold.
        probe: task -> batches that can be iterated repeatedly. Every step takes one batch of every task, and each
            task counts the same, whatever the size of its batches or its share of the data.
        loss: `(outputs, targets) -> scalar`, for all tasks or for each.
        objective: `(model, batch, task) -> scalar` in place of `loss`, for batches that are not
            `(inputs, targets)`; for an embedding model for example
            `lambda model, batch, task: info_nce(model(batch[0], task), model(batch[1], task))`.
        steps, lr: of Adam. Not published; 120 and 5e-2 are this library's.
        mu: price of a unit of the scale, on the scale of the loss, >= 0. Paper: up to 0.05.
        seed: of whatever a stochastic loss draws from torch's global generator, which is left as it was.
        progress: called with (steps done, steps).

    Returns:
        The merge by the linear rule; `merge.rule.weights`, `.scale` and `.order` are what was learned,
        `merge.history` the loss at each step. With `steps=0` it is `slerp(base, experts)`.

    Raises:
        InputError: an empty probe, an expert equal to the base, opposite task vectors, a negative mu; see `learn`.

    Warns:
        With more than ten experts, whose order decides more than their weights.
    """
    if not mu >= 0:
        raise InputError(f"mu is the price of the scale, at least 0, got {mu:g}")
    if steps < 0:
        raise InputError(f"steps is at least 0, got {steps}")
    merged = MergedModel(model, base, experts, blocks="model")
    if len(experts) > MANY:
        message = f"{len(experts)} experts: the order of so long a fold decides more than the weights do"
        warnings.warn(message, stacklevel=2)
    device = next(iter(merged.leaves.values())).device
    streams = endless(probe, device)
    learned = _Learned(gram(merged.models, merged.leaves), list(experts))

    def losses(_: int) -> Iterator[Tensor]:
        for task, stream in streams.items():
            batch = next(stream)
            if objective is not None:
                value = objective(merged, batch, task)
            else:
                inputs, targets = batch
                value = (loss[task] if isinstance(loss, Mapping) else loss)(merged(inputs, task), targets)
            yield value / len(streams)

    parameters = [learned.raw, learned.scale]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        history = learn(
            merged, learned, parameters, losses, optimiser=torch.optim.Adam(parameters, lr=lr), steps=steps,
            penalty=lambda: mu * learned.scale, progress=progress,
        )  # fmt: skip
    with torch.no_grad():
        merge = merged.merge(learned())
        rule = Spherical(
            merge.rule.coefficients,  # type: ignore[attr-defined]
            tuple(learned.weights().tolist()), learned.scale.item(), tuple(experts),
        )  # fmt: skip
    merge = Merge(merged.models, rule)
    merge.history = history  # type: ignore[attr-defined]
    return merge
