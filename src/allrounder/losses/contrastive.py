"""Contrastive losses: InfoNCE, its simple limit, and both over hard negatives; streaming, with a memory bank.

Anchors a_i and positives p_i are unit vectors, two views of the same thing; s_ij are similarities to negatives:

    contrastive_loss          -log( exp(a_i p_i / T) / (exp(a_i p_i / T) + sum_j exp(s_ij / T)) )     InfoNCE
    simple_contrastive_loss   -a_i p_i + mean_j s_ij                                                  T -> infinity
    hardest=alpha             of either: only the share alpha of each anchor's nearest negatives counts

A negative is pushed away in proportion to softmax(s_ij / T) (`relative_penalty`). A small T spends all of it on the
nearest negatives: features become uniform, and a class is torn apart, as the nearest negatives are often of the same
class. A large T does the opposite and tends to the simple loss. Measure both (`contrastive_meters`) over a few
temperatures and take a middle one, 0.2 to 0.5 to start with; with `hardest` (0.03 to 0.1) the temperature hardly
matters.

Negatives are the other positives of the batch, or those you give: a `MemoryBank`, a queue, positives gathered over
processes (without gathering, each process of a DDP run sees its own batch only). `ids` leave false negatives out.
SimCLR's NT-Xent with 2m - 2 negatives is `contrastive_loss(cat(a, p), cat(p, a), cat(a, p), ids=i, negative_ids=i)`
with i = (0..m-1, 0..m-1). Similarities are computed in float32 in blocks of negatives with a running logsumexp,
and again in the backward pass. Time O(m N d); memory O(m block + (m + N) d) and, with `hardest`, O(m alpha N). Second
derivatives are not available.

Paper: Wang and Liu, "Understanding the Behaviour of Contrastive Loss", CVPR 2021, arXiv 2012.09740. Departure: the
simple loss takes the mean over the negatives (the limit of InfoNCE), where the paper has a sum times a free lambda.
Momentum 0.5 of the bank is instance discrimination's (2018, arXiv 1805.01978).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .comp_sum import _reduced
from .contrastive_meters import _pairs, _unit, _wide
from .preference import Reduction

__all__ = ["ContrastiveLoss", "MemoryBank", "contrastive_loss", "simple_contrastive_loss"]

BLOCK = 8192


def contrastive_loss(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None = None, *,
    temperature: float = 0.3, hardest: float = 1.0, ids: Tensor | None = None, negative_ids: Tensor | None = None,
    block: int = BLOCK, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE, over all negatives or each anchor's hardest.

    Args:
        anchors: `(m, d)`, rows of unit length.
        positives: `(m, d)`, the other view of each anchor, rows of unit length.
        negatives: `(N, d)`, rows of unit length. Default: the positives of the other anchors.
        temperature: above 0. Paper: 0.3 is best or near it on four data sets.
        hardest: share of each anchor's negatives that count, above 0 to 1. Paper: .03 to .08. Ties stay in. The choice
            is not differentiated.
        ids: `(m,)` integers; negatives with the anchor's id are left out. Without `negatives`: what each pair shows,
            all different by default. With a bank: the anchors' places in it.
        negative_ids: `(N,)`. Default with `negatives`: 0 to N - 1.
        block: negatives that are compared at a time.
        reduction: `mean`, `sum` or `none`.

    Returns:
        The loss, in at least float32. For both directions take the mean with the views exchanged.

    Raises:
        InputError: rows that are not of unit length, other shapes, numbers out of range, an anchor without negatives,
            `hardest` so small that none is kept.

    >>> a = torch.eye(3)
    >>> round(contrastive_loss(a, a, temperature=1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is above 0, got {temperature:g}")
    positive, pool = _prepared(anchors, positives, negatives, hardest, ids, negative_ids, block)
    pushed = cast(Tensor, _Streamed.apply(anchors, pool.negatives, pool, temperature))
    return _reduced(F.softplus(pushed - positive / temperature), reduction)


def simple_contrastive_loss(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None = None, *,
    weight: float = 1.0, hardest: float = 1.0, ids: Tensor | None = None, negative_ids: Tensor | None = None,
    block: int = BLOCK, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """`-s_ii + weight * mean_j s_ij`: all negatives are pushed alike. Poor over all of them, good with `hardest`.

    Args:
        weight: price of a negative's mean similarity, at least 0. At 1 it is the limit of T times InfoNCE, up to
            the factor N / (N + 1).
        anchors, positives, negatives, hardest, ids, negative_ids, block, reduction: as for `contrastive_loss`.

    Raises:
        InputError: a negative weight; what `contrastive_loss` raises.

    >>> a = torch.eye(3)
    >>> simple_contrastive_loss(a, a).item()
    -1.0
    """
    if not 0 <= weight < math.inf:
        raise InputError(f"weight is at least 0, got {weight:g}")
    positive, pool = _prepared(anchors, positives, negatives, hardest, ids, negative_ids, block)
    pushed = cast(Tensor, _Streamed.apply(anchors, pool.negatives, pool, None))
    return _reduced(weight * pushed - positive, reduction)


class ContrastiveLoss(nn.Module):
    """The four losses as a module; it normalises what it is given.

    Args:
        temperature: above 0, or None for the simple loss.
        hardest: share of the negatives that count.

    Call it with `(anchors, positives, negatives=None, ids=None, negative_ids=None)`, see `contrastive_loss`.
    """

    def __init__(self, temperature: float | None = 0.3, hardest: float = 1.0) -> None:
        super().__init__()
        if temperature is not None and not 0 < temperature < math.inf:
            raise InputError(f"temperature is above 0, or None for the simple loss, got {temperature:g}")
        self.temperature, self.hardest = temperature, _share(hardest)

    def forward(
        self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None,
        ids: Tensor | None = None, negative_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        views = [F.normalize(x, dim=-1) if x is not None else None for x in (anchors, positives, negatives)]
        a, p, n = cast(tuple[Tensor, Tensor, Tensor | None], views)
        chosen: dict[str, Any] = {"hardest": self.hardest, "ids": ids, "negative_ids": negative_ids}
        if self.temperature is None:
            return simple_contrastive_loss(a, p, n, **chosen)
        return contrastive_loss(a, p, n, temperature=self.temperature, **chosen)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, hardest={self.hardest:g}"


class MemoryBank(nn.Module):
    """The last known feature of every training example, as negatives. `features` `(size, width)` is a buffer.

    Args:
        size: examples.
        width: of a feature.
        momentum: share of the old feature that stays at an update, 0 to below 1.
        seed: of the random unit vectors it begins with.
    """

    features: Tensor

    def __init__(self, size: int, width: int, *, momentum: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if size < 2 or width < 1:
            raise InputError(f"a bank has a size of at least 2 and a width of at least 1, got {size} and {width}")
        if not 0 <= momentum < 1:
            raise InputError(f"momentum is 0 to below 1, got {momentum:g}")
        self.momentum = momentum
        start = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("features", F.normalize(start, dim=1))

    @torch.no_grad()
    def update(self, ids: Tensor, features: Tensor) -> None:
        """Move the rows `ids` `(m,)` towards `features` `(m, width)`, back onto the sphere; after the backward pass.

        Raises:
            InputError: an id twice or outside the bank, rows that are not of unit length, other shapes.
        """
        if ids.ndim != 1 or features.shape != (len(ids), self.features.shape[1]):
            raise InputError(
                f"ids are (m,) and features (m, {self.features.shape[1]}), got {tuple(ids.shape)} and "
                f"{tuple(features.shape)}"
            )
        if not len(ids) or len(ids.unique()) < len(ids) or ids.min() < 0 or ids.max() >= len(self.features):
            raise InputError(f"ids are 0 to {len(self.features) - 1}, each once, at least one")
        _unit("features", features)
        mixed = self.momentum * self.features[ids] + (1 - self.momentum) * features.to(self.features)
        self.features[ids] = F.normalize(mixed, dim=1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` different rows, `(count, width)`, and their ids `(count,)`, for `negatives` and `negative_ids`."""
        if not 1 <= count <= len(self.features):
            raise InputError(f"count is 1 to {len(self.features)}, got {count}")
        ids = torch.randperm(len(self.features), generator=generator, device=generator.device)[:count]
        ids = ids.to(self.features.device)
        return self.features[ids], ids


class _Pool(NamedTuple):
    """Negatives, and which of them count for which anchor."""

    negatives: Tensor  # (N, d)
    ids: Tensor | None  # (m,)
    negative_ids: Tensor | None  # (N,)
    threshold: Tensor | None  # (m,): least similarity that counts
    block: int

    def blocks(self, anchors: Tensor) -> Any:
        """(slice, similarities `(m, block)` with `-inf` where a negative does not count), block after block."""
        wide = _wide(anchors)
        for start in range(0, len(self.negatives), self.block):
            part = slice(start, start + self.block)
            similarity = wide @ _wide(self.negatives[part]).T
            if self.ids is not None and self.negative_ids is not None:
                same = self.ids.unsqueeze(1) == self.negative_ids[part]
                similarity = similarity.masked_fill_(same, -torch.inf)
            if self.threshold is not None:
                similarity = similarity.masked_fill_(similarity < self.threshold.unsqueeze(1), -torch.inf)
            yield part, similarity


class _Streamed(torch.autograd.Function):
    """Over the negatives that count, logsumexp(s / temperature), or mean of s without a temperature; `(m,)`."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, negatives: Tensor, pool: _Pool, temperature: float | None) -> Tensor:
        with torch.autocast(anchors.device.type, enabled=False):
            total = _wide(anchors).new_full((len(anchors),), -torch.inf if temperature else 0.0)
            count = torch.zeros_like(total)
            for _, similarity in pool.blocks(anchors):
                if temperature:
                    total = torch.logaddexp(total, (similarity / temperature).logsumexp(1))
                else:
                    kept = similarity > -torch.inf
                    total, count = total + torch.where(kept, similarity, 0).sum(1), count + kept.sum(1)
        ctx.pool, ctx.temperature = pool._replace(negatives=negatives.detach()), temperature
        ctx.save_for_backward(anchors, negatives, total if temperature else count)
        return total if temperature else total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        anchors, negatives, scale = ctx.saved_tensors
        (gradient,) = gradients
        with torch.autocast(anchors.device.type, enabled=False):
            wide = _wide(anchors)
            to_anchors = torch.zeros_like(wide)
            to_negatives = torch.empty_like(negatives) if ctx.needs_input_grad[1] else None
            for part, similarity in ctx.pool.blocks(anchors):
                if ctx.temperature:
                    share = (similarity / ctx.temperature - scale.unsqueeze(1)).exp_() / ctx.temperature
                else:
                    share = (similarity > -torch.inf).to(wide) / scale.unsqueeze(1)
                share = share * gradient.unsqueeze(1)  # (m, block)
                to_anchors += share @ _wide(negatives[part])
                if to_negatives is not None:
                    to_negatives[part] = (share.T @ wide).to(negatives.dtype)
        return to_anchors.to(anchors.dtype) if ctx.needs_input_grad[0] else None, to_negatives, None, None


def _prepared(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None, hardest: float,
    ids: Tensor | None, negative_ids: Tensor | None, block: int,
) -> tuple[Tensor, _Pool]:  # fmt: skip
    """Similarity of each pair `(m,)`, and the negatives, after all checks."""
    _pairs(anchors, positives)
    _share(hardest)
    if block < 1:
        raise InputError(f"block is at least 1, got {block}")
    m = len(anchors)
    if negatives is None:
        if negative_ids is not None:
            raise InputError("negative_ids need negatives; without them `ids` speak of both")
        if m < 2:
            raise InputError("a batch of 1 has no negatives; use a larger batch or give negatives")
        negatives = positives
        ids = negative_ids = torch.arange(m, device=anchors.device) if ids is None else ids
    else:
        if negatives.ndim != 2 or negatives.shape[1] != anchors.shape[1] or not len(negatives):
            raise InputError(f"negatives are (N, {anchors.shape[1]}) with N >= 1, got {tuple(negatives.shape)}")
        _unit("negatives", negatives)
        if ids is not None and negative_ids is None:
            negative_ids = torch.arange(len(negatives), device=anchors.device)
        if negative_ids is not None and ids is None:
            raise InputError("negative_ids need the anchors' ids")
    for name, given, length in (("ids", ids, m), ("negative_ids", negative_ids, len(negatives))):
        if given is not None and (given.shape != (length,) or given.is_floating_point()):
            raise InputError(f"{name} are {length} integers, got {given.dtype} {tuple(given.shape)}")
    pool = _Pool(negatives, ids, negative_ids, None, block)
    with torch.autocast(anchors.device.type, enabled=False):
        counts = _counts(pool, m)
        if counts is not None and (counts == 0).any():
            raise InputError(f"anchor {int((counts == 0).nonzero()[0])} has no negatives: all have its id")
        if hardest < 1:
            pool = pool._replace(threshold=_threshold(anchors.detach(), pool, hardest, counts))
        positive = (_wide(anchors) * _wide(positives)).sum(1)
    return positive, pool


def _counts(pool: _Pool, anchors: int) -> Tensor | None:
    """Negatives of each anchor, `(m,)`; None where no id leaves one out."""
    if pool.ids is None or pool.negative_ids is None:
        return None
    known, times = pool.negative_ids.unique(return_counts=True)
    place = torch.searchsorted(known, pool.ids).clamp_max(len(known) - 1)
    return len(pool.negatives) - torch.where(known[place] == pool.ids, times[place], 0)


@torch.no_grad()
def _threshold(anchors: Tensor, pool: _Pool, hardest: float, counts: Tensor | None) -> Tensor:
    """The similarity of the last of each anchor's ceil(hardest * negatives) nearest, `(m,)`."""
    if counts is None:
        counts = torch.full((len(anchors),), len(pool.negatives), device=anchors.device)
    least = int(counts.min())
    if hardest * least < 1:
        raise InputError(f"hardest * negatives is below 1 ({hardest:g} * {least}): no negative is left; raise hardest")
    kept = (hardest * counts.double() - 1e-9).ceil().long()  # 0.1 * 30 must not become 4
    most = int(kept.max())
    top = _wide(anchors).new_full((len(anchors), 0), 0.0)
    for _, similarity in pool.blocks(anchors):
        both = torch.cat([top, similarity], 1)
        top = both.topk(min(most, both.shape[1]), dim=1).values
    return top.gather(1, kept.unsqueeze(1) - 1).squeeze(1)


def _share(hardest: float) -> float:
    if not 0 < hardest <= 1:
        raise InputError(f"hardest is a share above 0 and at most 1, got {hardest:g}")
    return hardest
