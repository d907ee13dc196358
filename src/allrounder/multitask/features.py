"""Recommendation rows as tensors: what fields a batch has, whether it keeps to that, and one vector for each field.

A batch is a dict of tensors with one row an impression: numbers, ids of categories, the id of the item that is shown
and, for each behaviour (click, cart, buy), the ids of the items the user met so, oldest first, padded with -1. Items of
histories and the shown item share one table of vectors. Its gradient is dense: for millions of items use a library with
sharded tables and give `TIM` the vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["FeatureSchema", "FieldEmbeddings"]


@dataclass(frozen=True)
class FeatureSchema:
    """The fields of a recommendation batch.

    Args:
        dense: name -> width of the numbers; bring them to a spread of about 1 first.
        categorical: name -> number of ids; ids run from 0.
        behaviours: name -> longest history. These fields are `(N, n)` with item ids and -1 for padding.
        items: number of items; 0 when rows have no item, and then no behaviours.
        target: the field with the shown item's id.

    Raises:
        InputError: for sizes below 1, names that repeat, behaviours without items, a schema without fields.

    >>> FeatureSchema(dense={"age": 1}, behaviours={"click": 50}, items=1000).fields
    ('age', 'click', 'item')
    """

    dense: Mapping[str, int] = field(default_factory=dict)
    categorical: Mapping[str, int] = field(default_factory=dict)
    behaviours: Mapping[str, int] = field(default_factory=dict)
    items: int = 0
    target: str = "item"

    def __post_init__(self) -> None:
        names = self.fields
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise InputError(f"field names must differ, got {', '.join(doubled)} more than once")
        for name, size in {**self.dense, **self.categorical, **self.behaviours}.items():
            if size < 1:
                raise InputError(f"field {name!r} has the size {size}; sizes are at least 1")
        if self.behaviours and self.items < 1:
            raise InputError(f"behaviours need items (how many there are), got items={self.items}")
        if not names:
            raise InputError("a schema needs at least one field, got none")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in the order of their vectors."""
        return (*self.dense, *self.categorical, *self.behaviours, *([self.target] if self.items else []))

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Raise InputError for a field that is missing, has a wrong shape or type, or ids out of range.

        Warns when a history ends with the shown item itself in more than 1% of the rows (and ten times more often than
        by chance among few items): then the history may hold the event that is to be predicted.
        """
        missing = [name for name in self.fields if name not in batch]
        if missing:
            raise InputError(f"the batch has no field {missing[0]!r}; the schema's fields are {', '.join(self.fields)}")
        rows = {name: len(batch[name]) if batch[name].ndim else 0 for name in self.fields}
        if len(set(rows.values())) > 1 or 0 in rows.values():
            raise InputError(f"all fields need the same number of rows, at least 1, got {rows}")
        for name, width in self.dense.items():
            value = batch[name]
            if value.shape[1:] not in ((width,), () if width == 1 else None) or not value.is_floating_point():
                shown = f"{tuple(value.shape)} of {value.dtype}"
                raise InputError(f"dense field {name!r} takes numbers of shape (N, {width}), got {shown}")
            if not torch.isfinite(value).all():
                raise InputError(f"dense field {name!r} has NaN or infinite values; fill them in first")
        for name, size in self.categorical.items():
            _check_ids(name, batch[name], 0, size, 1)
        for name, longest in self.behaviours.items():
            _check_ids(name, batch[name], -1, self.items, 2)
            if not 1 <= batch[name].shape[1] <= longest:
                given = batch[name].shape[1]
                raise InputError(f"histories of {name!r} are {given} long; the schema allows 1 to {longest}")
        if self.items:
            _check_ids(self.target, batch[self.target], 0, self.items, 1)
            self._warn_of_leaks(batch)

    def _warn_of_leaks(self, batch: Mapping[str, Tensor]) -> None:
        target = batch[self.target]
        if len(target) < 100:  # one row would be more than 1%
            return
        for name in self.behaviours:
            history = batch[name]
            place = torch.arange(history.shape[1], device=history.device).expand_as(history)
            last = history.gather(1, place.where(history >= 0, 0).amax(1, keepdim=True))[:, 0]
            share = (last == target).double().mean().item()
            if share > max(0.01, min(0.5, 10 / self.items)):
                warnings.warn(
                    f"the history of {name!r} ends with the shown item in {share:.0%} of the rows; leave out the event "
                    "that is to be predicted",
                    stacklevel=3,
                )


def _check_ids(name: str, ids: Tensor, low: int, end: int, ndim: int) -> None:
    if ids.ndim != ndim or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        shape = "(N,)" if ndim == 1 else "(N, n)"
        raise InputError(f"field {name!r} takes integer ids of shape {shape}, got {tuple(ids.shape)} of {ids.dtype}")
    wrong = (ids < low) | (ids >= end)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        allowed = f"0 to {end - 1}" + (", or -1 for padding" if low else "")
        raise InputError(f"field {name!r} has the id {ids[wrong][0].item()} in row {row}; its ids are {allowed}")


class FieldEmbeddings(nn.Module):
    """One vector of width `dim` for each field; numbers through a linear layer, ids through tables."""

    def __init__(self, schema: FeatureSchema, dim: int) -> None:
        super().__init__()
        self.schema = schema
        self.dense = nn.ModuleList(nn.Linear(width, dim) for width in schema.dense.values())
        self.categorical = nn.ModuleList(nn.Embedding(size, dim) for size in schema.categorical.values())
        self.items = nn.Embedding(schema.items, dim) if schema.items else None

    def plain(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Vectors `(N, dim)` of the dense and categorical fields."""
        numbers = [
            layer(batch[name].reshape(-1, width).to(next(layer.parameters()).dtype))
            for (name, width), layer in zip(self.schema.dense.items(), self.dense, strict=True)
        ]
        return numbers + [
            table(batch[name]) for name, table in zip(self.schema.categorical, self.categorical, strict=True)
        ]

    def item(self, ids: Tensor) -> Tensor:
        """Vectors of items; of padding, some vector that must be masked."""
        assert self.items is not None
        return self.items(ids.clamp_min(0))
