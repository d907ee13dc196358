"""Exact k-th largest magnitudes of task vectors, streamed: what TIES and Breadcrumbs cut at.

Non-negative floats order as their bits. One pass over the models counts the upper 16 bits of every magnitude;
the bin that holds the wanted rank is then known, and a second pass counts the lower 16 bits of the entries in
it. Two reads of K + 1 models, 2^15 + 2^16 counters per task vector, nothing else in memory; no sorting, no
sampling. Magnitudes are compared in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .engine import Aligned, working

__all__ = ["kth_largest"]


def kth_largest(models: Aligned, names: Sequence[str], ranks: Sequence[int]) -> Tensor:
    """Exact magnitudes of the entries with the given ranks (1 = largest) in each task vector: `(K, R)` float32.

    Args:
        models: base and experts.
        names: the tensors that are ranked together.
        ranks: R numbers from 1 to the entries of these tensors.

    Raises:
        InputError: NaN or infinite values, with their model and tensor.
    """
    wanted = torch.tensor(ranks).expand(len(models.experts), -1).contiguous()
    highs = torch.zeros(len(wanted), 1 << 15, dtype=torch.int64)
    for k, bits in _magnitudes(models, names):
        highs[k] += torch.bincount(bits.bitwise_right_shift_(16), minlength=1 << 15).cpu()
    if highs[:, 0x7F80:].any():  # the exponent of NaN and infinity
        for name in names:
            for block in models.blocks(name):
                models.explain(block)
    high, wanted = _bin_of(highs, wanted)
    lows = torch.zeros(*wanted.shape, 1 << 16, dtype=torch.int64)
    for k, bits in _magnitudes(models, names):
        for counts, half in zip(lows[k], high[k].tolist(), strict=True):
            found = _low_halves(bits, half).cpu()
            counts.index_add_(0, found, torch.ones_like(found, dtype=torch.int64))
    low = _bin_of(lows, wanted.unsqueeze(-1))[0].squeeze(-1)
    return ((high << 16) | low).to(torch.int32).view(torch.float32)


def _magnitudes(models: Aligned, names: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
    """Magnitudes of one task vector at a time, in blocks, as bits of float32; the next one takes its memory."""
    spare = torch.empty(0)
    for name in names:
        for block in models.blocks(name):
            base = block.base.to(working(block.base.dtype))
            if len(spare) < len(base) or spare.device != base.device or spare.dtype != base.dtype:
                spare = torch.empty_like(base)
            for k, expert in enumerate(block.experts):
                size = torch.sub(expert.to(base.dtype), base, out=spare[: len(base)]).abs_()
                yield k, size.float().view(torch.int32)


def _low_halves(bits: Tensor, high: int) -> Tensor:
    """The lower 16 bits of those entries whose upper bits are `high`."""
    if bits.device.type != "cpu":
        return bits[(bits >> 16) == high] & 0xFFFF
    array = bits.numpy()  # which selects several times faster than a tensor does
    return torch.from_numpy(array[(array >> 16) == high] & 0xFFFF)


def _bin_of(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the entry of each rank (1 = largest), and its rank in there: `(..., bins)`, `(..., R)`."""
    from_top = counts.flip(-1).cumsum(-1)
    place = torch.searchsorted(from_top, ranks)
    above = torch.cat([torch.zeros_like(from_top[..., :1]), from_top], -1).gather(-1, place)
    return counts.shape[-1] - 1 - place, ranks - above
