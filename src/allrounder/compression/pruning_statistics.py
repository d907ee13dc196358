"""Second moments of what the linear layers of one block receive.

    H = (2 / n) X X^T over the n tokens of the calibration text, or its diagonal

Layers that are handed one and the same tensor (query, key, value) share one H. Only panels of its upper triangle are
summed up, which is half of the work, and a forward pass ends as soon as every layer has seen its input: nobody needs
what the last one gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from .pruning_layers import Matrix

__all__ = ["Gathering", "Statistic"]

PANEL = 128  # narrowest panel of the symmetric product


@dataclass
class Statistic:
    """Second moments of the inputs of a linear layer.

    Args:
        second: `(2 / n) X X^T`, `(in, in)` float32; with diagonal statistics its diagonal `(in,)`.
        tokens: n, padding not counted.
    """

    second: Tensor
    tokens: int = 0


class _Enough(Exception):  # noqa: N818
    pass


@dataclass
class Gathering:
    """Sums up the statistics of some layers: `with gathering.batch(mask): block(...)` for each batch, then `result()`.

    Args:
        found: the layers.
        diagonal: sum up squares only.
    """

    found: Sequence[Matrix]
    diagonal: bool
    _sums: dict[str, Statistic] = field(default_factory=dict)
    _leaders: dict[str, str] = field(default_factory=dict)
    _calls: list[str] = field(default_factory=list)
    _once: bool = False
    _mask: Tensor | None = None
    _latest: tuple[Tensor, str] | None = None

    @contextmanager
    def batch(self, mask: Tensor | None) -> Iterator[None]:
        """Watch one forward pass, which may be cut short; `mask` `(N, T)` is False where there is padding."""
        self._mask, self._calls = mask, []
        handles = [m.module.register_forward_pre_hook(self._hook(m.name), with_kwargs=True) for m in self.found]
        try:
            yield
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
            self._latest = None
        self._once = sorted(self._calls) == sorted(m.name for m in self.found)

    def _hook(self, name: str) -> Callable:
        def before(module: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
            self._add(name, args[0] if args else next(iter(keywords.values())))
            self._calls.append(name)
            if self._once and len(set(self._calls)) == len(self.found):
                raise _Enough

        return before

    def _add(self, name: str, given: Tensor) -> None:
        if name not in self._leaders:
            same = self._latest is not None and self._latest[0] is given
            self._leaders[name] = self._latest[1] if same and self._latest is not None else name
        if self._leaders[name] != name:
            return
        self._latest = given, name
        x = given.detach().reshape(-1, given.shape[-1]).float()  # (tokens, in)
        if self._mask is not None and len(x) == self._mask.numel():  # some models flatten the tokens of a batch
            x = x[self._mask.reshape(-1).to(x.device)]
        ins = x.shape[1]
        if name not in self._sums:
            self._sums[name] = Statistic(x.new_zeros(ins if self.diagonal else (ins, ins)))
        total = self._sums[name]
        total.tokens += len(x)
        if self.diagonal:
            total.second += x.square().sum(0)
            return
        width = max(PANEL, -(-ins // 8))
        for start in range(0, ins, width):
            total.second[start : start + width, start:].addmm_(x[:, start : start + width].T, x[:, start:])

    def result(self) -> list[tuple[list[Matrix], Statistic]]:
        """Layers that share an input, with its statistic.

        Raises:
            InputError: for inputs that are not finite, and layers that were never used.
        """
        groups: dict[str, list[Matrix]] = {}
        for matrix in self.found:
            if matrix.name not in self._leaders:
                raise InputError(f"{matrix.name!r} was never used on the calibration text; give more text")
            groups.setdefault(self._leaders[matrix.name], []).append(matrix)
        for name, total in self._sums.items():
            if not torch.isfinite(total.second).all():
                raise InputError(f"the inputs of {name!r} are not finite on the calibration text; check the model")
            total.second *= 2 / max(total.tokens, 1)
            if not self.diagonal:
                upper = total.second.triu_()
                upper += upper.triu(1).T
        return [(group, self._sums.pop(name)) for name, group in groups.items()]
