"""What rules that look at data need: statistics that fit the experts' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checkpoint import Weights
from ..errors import InputError
from ..saving import signature
from .engine import Aligned

__all__ = ["double", "matched"]


def double(value: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def matched(
    models: Aligned,
    given: Mapping[str, Weights],
    what: str,
    maker: str,
    expected: Callable[[torch.Size, str], tuple[int, ...] | None],
    *,
    suffix: str = "",
) -> dict[str, str]:
    """Name of each tensor that every expert has `what` for -> its name there (a second name, or with `suffix`).

    Raises:
        InputError: when an expert lacks it, or names or shapes are not those of the experts' weights.
    """
    missing = [label for label in models.experts if label not in given]
    if missing:
        raise InputError(f"{what} is missing for expert {missing[0]!r}; it is there for {', '.join(given) or 'none'}")
    first, names = given[next(iter(models.experts))], {}
    for source in first:
        name = source if source in models.signatures or not suffix else source.removesuffix(suffix)
        name = models.tied.get(name, name)
        if name not in models.float_names:
            raise InputError(f"{what} has {source!r}, which the experts' weights lack")
        names[name] = source
    if not names:
        raise InputError(f"{what} is empty; make it with {maker}")
    for label in models.experts:
        other = sorted(set(given[label]) ^ set(first))
        if other:
            raise InputError(f"{what} of expert {label!r} is of other tensors: {other[0]!r} is in one set only")
        for name, source in names.items():
            have, want = signature(given[label], source)[1], expected(models.signatures[name][1], source)
            if want is None or tuple(have) != tuple(want):
                fits = "none fits" if want is None else f"{tuple(want)} fits"
                raise InputError(f"{what} of expert {label!r} has {source!r} of shape {tuple(have)}; {fits} its weight")
    return names
