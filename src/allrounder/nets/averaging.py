"""Running averages of named tensors: weighted, prefix and exponential means in one extra copy.

After `add(x_1, w_1), ..., add(x_n, w_n)` the mean is `sum_i w_i x_i / sum_i w_i`; with a decay,
`sum_i decay^(n-i) w_i x_i / sum_i decay^(n-i) w_i`. Kept as a mean, not as a sum: `mean += (w / total) (x - mean)`.
So it can be read after any number of additions (a prefix), equal tensors stay exactly what they are, and weights as
small as 1e-300 do no harm.

Cost: one copy of the tensors in at least float32, one pass over them for each addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Averager"]


class Averager:
    """Mean of the tensors that were added, by name.

    Args:
        decay: what earlier additions count after each new one, (0, 1]. 1: the plain or weighted mean. Below 1: the
            exponential moving average without a bias towards its start (a first weight of `1 / (1 - decay)` gives the
            other kind, which starts at the first value).

    >>> average = Averager()
    >>> average.add({"a": torch.tensor([0.0])}, weight=1)
    >>> average.add({"a": torch.tensor([4.0])}, weight=3)
    >>> average.mean()
    {'a': tensor([3.])}
    """

    def __init__(self, *, decay: float = 1.0) -> None:
        if not 0 < decay <= 1:
            raise InputError(f"decay is within (0, 1], got {decay:g}")
        self.decay, self.total = decay, 0.0
        self._means: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Count these tensors in; they are copied.

        Args:
            tensors: floating tensors, with the names and shapes of the first call.
            weight: what they count, finite and >= 0. Only ratios matter.

        Raises:
            InputError: other names or shapes than before, tensors that are not floating, a weight below 0.
        """
        if not 0 <= weight < math.inf:
            raise InputError(f"weight is a finite number, at least 0, got {weight!r}")
        self._check(tensors)
        self.total *= self.decay
        if weight == 0:
            return
        self.total += weight
        share = weight / self.total
        for name, value in tensors.items():
            mean = self._means.get(name)
            if mean is None:
                self._means[name] = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
                self._dtypes[name] = value.dtype
            else:
                mean.lerp_(value.detach().to(mean), share)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise InputError("there is nothing to average: tensors is empty")
        if self._means and (odd := sorted(set(tensors) ^ set(self._means))):
            raise InputError(
                f"{odd[0]!r} is in one of the sets of tensors to average but not in all; give the same names"
            )
        for name, value in tensors.items():
            if not value.is_floating_point():
                raise InputError(f"{name!r} is {value.dtype}; only floating tensors have a mean, leave it out")
            known = self._means.get(name)
            if known is not None and known.shape != value.shape:
                have, want = tuple(value.shape), tuple(known.shape)
                raise InputError(f"{name!r} has the shape {have}, before it was {want}; average tensors of one shape")

    def mean(self) -> dict[str, Tensor]:
        """Copies of the means so far, in the dtype of the first tensors.

        Raises:
            InputError: when nothing with a weight above 0 was added.
        """
        if not self._means:
            raise InputError("nothing was added with a weight above 0, so there is no mean yet")
        return {name: mean.to(self._dtypes[name], copy=True) for name, mean in self._means.items()}

    def state_dict(self) -> dict[str, Any]:
        """Means, total weight and dtypes, for `save_state`."""
        means = {name: mean.clone() for name, mean in self._means.items()}
        dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in self._dtypes.items()}
        return {"decay": self.decay, "total": self.total, "means": means, "dtypes": dtypes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.decay, self.total = state["decay"], state["total"]
        self._means = {name: mean.clone() for name, mean in state["means"].items()}
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in state["dtypes"].items()}
