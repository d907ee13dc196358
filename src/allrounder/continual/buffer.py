"""A replay buffer: a fixed number of stored examples, chosen from all that came by, in whole batches.

- `reservoir`: a uniform sample of everything seen. Item n (from 0) goes to slot n while there is room, then to slot
  j = randint(0, n) if j is a slot (Vitter, 1985); each of n items is kept with probability size / n.
- `balanced`: the same share for every group (class), a uniform sample within each; groups with fewer examples leave
  their room to the others. While there is room every item enters; then an item of a group that never was the largest
  takes a slot of the largest group, and others replace one of their own with probability held / seen (Chrysakis and
  Moens, "Online Continual Learning from Imbalanced Data", ICML 2020).

Cost of adding B examples: O(B) draws and list operations, and copies of what enters.
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
        self._slots: dict[int, list[int]] = {}  # group -> where its examples are
        self._met: dict[int, int] = {}  # group -> how many of it came by
        self._largest: set[int] = set()  # groups that were the largest once

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
        draws = torch.rand(len(groups), generator=self.generator, dtype=torch.float64).tolist()
        taken = {}
        for row, (group, draw) in enumerate(zip(groups.tolist(), draws, strict=True)):
            own = self._slots.setdefault(group, [])
            self._met[group] = self._met.get(group, 0) + 1
            if self._filled < self.size:
                own.append(self._filled)
                taken[self._filled] = row
                self._filled += 1
                continue
            if group not in self._largest:
                most = max(len(slots) for slots in self._slots.values())
                self._largest |= {other for other, slots in self._slots.items() if len(slots) == most}
            if group in self._largest:
                index = int(draw * self._met[group])
                if index < len(own):
                    taken[own[index]] = row
            else:
                other = self._slots[max(self._slots, key=lambda name: len(self._slots[name]))]
                index = int(draw * len(other))
                other[index], other[-1] = other[-1], other[index]
                own.append(other.pop())
                taken[own[-1]] = row
        return torch.tensor(list(taken.values()), dtype=torch.long), torch.tensor(list(taken), dtype=torch.long)

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

    def to(self, device: torch.device | str) -> Buffer:
        """Move the stored examples."""
        self._columns = {name: column.to(device) for name, column in self._columns.items()}
        return self

    @property
    def bytes(self) -> int:
        """Of the stored examples."""
        return sum(column[: self._filled].numel() * column.element_size() for column in self._columns.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything, so that a buffer of the same size and policy goes on alike."""
        return {
            "size": self.size, "policy": self.policy, "seen": self.seen, "filled": self._filled,
            "columns": {name: column[: self._filled].clone() for name, column in self._columns.items()},
            "slots": {group: list(slots) for group, slots in self._slots.items()}, "met": dict(self._met),
            "largest": sorted(self._largest), "generator": self.generator.get_state(),
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
        self._slots = {group: list(slots) for group, slots in state["slots"].items()}
        self._met, self._largest = dict(state["met"]), set(state["largest"])
        self.generator.set_state(state["generator"])
