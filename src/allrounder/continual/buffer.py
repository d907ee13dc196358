"""A replay buffer: a fixed number of stored examples, chosen from all that came by, in whole batches.

- `reservoir`: a uniform sample of everything seen. Item n (from 0) goes to slot n while there is room, then to slot
  j = randint(0, n) if j is a slot (Vitter, 1985); each of n items is kept with probability size / n.
- `balanced`: the same share for every group (class), a uniform sample within each. Every item draws a random key, and
  of each group those with the largest keys stay; groups with fewer examples leave their room to the others.

Cost of adding B examples: O(B) for the reservoir; for `balanced` one sort of the stored keys, and only when an item
enters. Nothing is copied but what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Buffer"]


def _columns(given: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": column for key, column in value.items()}
        elif value is not None:
            found[name] = value
    return found


def _nested(columns: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in columns.items():
        outer, _, inner = name.partition(".")
        if inner:
            found.setdefault(outer, {})[inner] = value
        else:
            found[name] = value
    return found


class Buffer:
    """Stored examples, with any columns (inputs, targets, logits, task numbers).

    Args:
        size: examples it holds, at least 1.
        policy: `reservoir` or `balanced`.
        seed: of what is kept and what is drawn.

    >>> buffer = Buffer(2)
    >>> buffer.add(inputs=torch.zeros(3, 4), targets=torch.arange(3))
    >>> len(buffer), buffer.seen, sorted(buffer.sample(5))
    (2, 3, ['inputs', 'targets'])
    """

    def __init__(self, size: int, *, policy: str = "reservoir", seed: int = 0) -> None:
        if size < 1:
            raise InputError(f"a buffer holds at least one example, got size={size}")
        if policy not in ("reservoir", "balanced"):
            raise InputError(f"policy is 'reservoir' or 'balanced', got {policy!r}")
        self.size, self.policy, self.seen = size, policy, 0
        self.generator = torch.Generator().manual_seed(seed)
        self._columns: dict[str, Tensor] = {}
        self._filled = 0
        self._keys = torch.full((size,), -1.0, dtype=torch.float64)
        self._groups = torch.full((size,), -1, dtype=torch.long)

    def __len__(self) -> int:
        return self._filled

    def add(self, *, groups: Tensor | None = None, **columns: Any) -> None:
        """Offer a batch.

        Args:
            groups: `(B,)` integers, the classes to balance (policy `balanced`). Default: the column `targets`.
            columns: tensors `(B, ...)`, or dicts of such.

        Raises:
            InputError: columns of different lengths, or others than before.
        """
        flat = _columns(columns)
        lengths = {len(column) for column in flat.values()}
        if len(lengths) != 1:
            raise InputError(f"columns of a batch must have one length, got {sorted(lengths)}")
        (count,) = lengths
        if not self._columns:
            self._columns = {name: column.new_empty(self.size, *column.shape[1:]) for name, column in flat.items()}
        if flat.keys() != self._columns.keys():
            raise InputError(f"the buffer has the columns {', '.join(self._columns)}, got {', '.join(flat)}")
        if self.policy == "reservoir":
            rows, slots = self._reservoir(count)
        else:
            rows, slots = self._balanced(flat["targets"] if groups is None else groups)
        self.seen += count
        if not len(rows):
            return
        for name, column in flat.items():
            self._columns[name][slots] = column.detach()[rows].to(self._columns[name])

    def _reservoir(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows of the batch that are stored, and their slots."""
        number = torch.arange(self.seen, self.seen + count, dtype=torch.float64)
        slots = (torch.rand(count, generator=self.generator, dtype=torch.float64) * (number + 1)).long()
        fresh = number < self.size
        slots[fresh] = number[fresh].long()
        self._filled = min(self.size, self.seen + count)
        rows = (slots < self.size).nonzero().flatten()
        last = {slot: row for row, slot in zip(rows.tolist(), slots[rows].tolist())}  # a later item wins its slot
        return torch.tensor(list(last.values()), dtype=torch.long), torch.tensor(list(last), dtype=torch.long)

    def _balanced(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        groups = groups.detach().cpu().long()
        keys = torch.rand(len(groups), generator=self.generator, dtype=torch.float64)
        if self._filled == self.size:  # most items of a long stream are below what their group already holds
            known = self._groups.unique()
            least = torch.stack([self._keys[self._groups == group].min() for group in known])
            place = torch.searchsorted(known, groups).clamp(max=len(known) - 1)
            old = known[place] == groups
            counts = torch.bincount(torch.searchsorted(known, self._groups), minlength=len(known))
            full = counts[place] >= counts.max()
            candidates = (~(old & full & (keys < least[place]))).nonzero().flatten()
            if not len(candidates):
                return candidates, candidates
        else:
            candidates = torch.arange(len(groups))
        held = torch.arange(self._filled)
        all_keys = torch.cat([self._keys[held], keys[candidates]])
        all_groups = torch.cat([self._groups[held], groups[candidates]])
        kept = self._chosen(all_keys, all_groups)
        stays, enters = kept[: self._filled], kept[self._filled :].nonzero().flatten()
        free = torch.cat([(~stays).nonzero().flatten(), torch.arange(self._filled, self.size)])
        slots, rows = free[: len(enters)], candidates[enters]
        self._keys[slots], self._groups[slots] = keys[rows], groups[rows]
        self._filled = max(self._filled, int(slots.max()) + 1 if len(slots) else 0)
        return rows, slots

    def _chosen(self, keys: Tensor, groups: Tensor) -> Tensor:
        """Which items stay: the largest keys of each group, the room shared as evenly as the groups allow."""
        if len(keys) <= self.size:
            return torch.ones(len(keys), dtype=torch.bool)
        order = torch.argsort(keys, descending=True, stable=True)
        order = order[torch.argsort(groups[order], stable=True)]
        counts = torch.unique_consecutive(groups[order], return_counts=True)[1]
        rank = torch.arange(len(keys)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        level = torch.argsort(rank, stable=True)  # everyone's first item, everyone's second, ...
        kept = torch.zeros(len(keys), dtype=torch.bool)
        cut = rank[level][self.size]
        ties = level[rank[level] == cut]
        chosen = level[rank[level] < cut]
        room = self.size - len(chosen)
        best = ties[torch.argsort(keys[order[ties]], descending=True, stable=True)[:room]]
        kept[order[torch.cat([chosen, best])]] = True
        return kept

    def sample(self, count: int) -> dict[str, Any]:
        """`count` stored examples, without repetition while there are enough, otherwise with.

        Raises:
            InputError: when the buffer is empty.
        """
        if not self._filled:
            raise InputError("the replay buffer is empty: add examples before sampling")
        if count <= self._filled:
            keys = torch.rand(self._filled, generator=self.generator)
            rows = keys.topk(count).indices if count < self._filled else torch.argsort(keys)
        else:
            rows = torch.randint(self._filled, (count,), generator=self.generator)
        return _nested({name: column[rows] for name, column in self._columns.items()})

    def all(self) -> dict[str, Any]:
        """All stored examples."""
        return _nested({name: column[: self._filled] for name, column in self._columns.items()})

    @property
    def bytes(self) -> int:
        """Of the stored examples."""
        return sum(column[: self._filled].numel() * column.element_size() for column in self._columns.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything, so that a buffer of the same size and policy goes on alike."""
        return {
            "size": self.size, "policy": self.policy, "seen": self.seen, "filled": self._filled,
            "columns": {name: column[: self._filled].clone() for name, column in self._columns.items()},
            "keys": self._keys.clone(), "groups": self._groups.clone(), "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            InputError: when it is of another size or policy.
        """
        if (state["size"], state["policy"]) != (self.size, self.policy):
            had, have = (
                f"{policy} of {size}" for size, policy in ((state["size"], state["policy"]), (self.size, self.policy))
            )
            raise InputError(f"the saved buffer is a {had}, this one a {have}")
        self.seen, self._filled = state["seen"], state["filled"]
        self._columns = {}
        for name, column in state["columns"].items():
            self._columns[name] = column.new_empty(self.size, *column.shape[1:])
            self._columns[name][: self._filled] = column
        self._keys, self._groups = state["keys"].clone(), state["groups"].clone()
        self.generator.set_state(state["generator"])
