"""Heads that share experts among tasks: from features, one input for all tasks or one for each, to a logit a task.

    SharedBottom   h_t = B(x_t)
    MMoE           h_t = sum_e softmax(G_t x_t)_e E_e(x_t)
    CGC            h_t = sum_e softmax(G_t x_t)_e E_e(x_t)        E_e: the experts of task t and the shared ones
    PLE            CGC stacked; between two levels a shared gate over all experts makes the shared experts' next input

and `logit_t = tower_t(h_t)`. An expert is one linear layer with ReLU, a tower two linear layers with ReLU between.

Use `SharedBottom` for tasks that agree, `MMoE` when they partly disagree, `CGC` and `PLE` when they hurt each other in
an MMoE. With little data the extra weights may cost more than the conflict. Cost: the experts of all tasks and levels;
one common input goes through the shared experts once, a mapping once for each task.

Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts (2018, KDD). Tang et
al., Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized Recommendations (2020,
RecSys). Both are written for one common input. Where each task has its own, task t's gate here mixes what the shared
experts make of x_t, and the shared gate of the first PLE level works on the mean of the tasks' inputs, which for one
common input is that input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["CGC", "PLE", "MMoE", "SharedBottom"]


class _Head(nn.Module):
    """Checks the input, `_hidden` mixes, and each task's tower ends."""

    def __init__(self, in_features: int, tasks: Sequence[str], sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.in_features, self.tasks = in_features, tuple(tasks)
        if not self.tasks or isinstance(tasks, str):
            raise InputError(f"tasks is a list of at least one name, got {tasks!r}")
        doubled = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if doubled:
            raise InputError(f"task names must differ, got {', '.join(doubled)} more than once")
        for name, size in {"in_features": in_features, **sizes}.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")

    def _towers(self, hidden: int, tower: int, outputs: int | None) -> None:
        self.single = outputs is None
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, tower), nn.ReLU(), nn.Linear(tower, outputs or 1)) for _ in self.tasks
        )

    def _stacked(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            stacked = x[None]
        else:
            if set(x) != set(self.tasks):
                raise InputError(f"the head's inputs are for {', '.join(x)}; its tasks are {', '.join(self.tasks)}")
            shapes = {task: tuple(value.shape) for task, value in x.items()}
            if len(set(shapes.values())) > 1:
                raise InputError(f"the inputs of all tasks must have one shape, got {shapes}")
            stacked = torch.stack([x[task] for task in self.tasks])
        if stacked.ndim != 3 or stacked.shape[-1] != self.in_features or not stacked.shape[1]:
            shape = tuple(stacked.shape[1:])
            raise InputError(f"a head's input is (N, {self.in_features}) with N at least 1, got {shape}")
        return stacked  # (1 or T, N, in_features)

    def _hidden(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`x` of shape `(N, in_features)` for all tasks, or one such tensor a task.

        Returns:
            Task -> logits `(N,)`, or `(N, outputs)` where the head was made with `outputs`.
        """
        hidden = self._hidden(self._stacked(x)).expand(len(self.tasks), -1, -1)
        made = {t: tower(h) for t, tower, h in zip(self.tasks, self.towers, hidden, strict=True)}
        return {t: logits[..., 0] for t, logits in made.items()} if self.single else made


class _Experts(nn.Module):
    """`count` experts in one product: `(..., in)` -> `(..., count, hidden)`."""

    def __init__(self, in_features: int, hidden: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(in_features, count * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu().unflatten(-1, (self.count, -1))


def _mix(gate: Tensor, experts: Tensor) -> Tensor:
    return (gate.softmax(-1).unsqueeze(-1) * experts).sum(-2)


def _sizes(outputs: int | None, **sizes: int) -> dict[str, int]:
    return sizes if outputs is None else {**sizes, "outputs": outputs}


class SharedBottom(_Head):
    """One layer for all tasks, then a tower each.

    Args:
        in_features: width of the input.
        tasks: their names.
        hidden, tower: units of the bottom and of each tower.
        outputs: what each tower ends in. Default: one logit without a dimension of its own.
        seed: of the initial weights.

    Raises:
        InputError: for sizes below 1, names that repeat; and in a call for wrong shapes or tasks.

    >>> head = SharedBottom(4, ["click", "buy"])
    >>> {task: tuple(logits.shape) for task, logits in head(torch.zeros(3, 4)).items()}
    {'click': (3,), 'buy': (3,)}
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        hidden: int = 16,
        tower: int = 16,
        outputs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, tasks, _sizes(outputs, hidden=hidden, tower=tower))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.bottom = _Experts(in_features, hidden, 1)
            self._towers(hidden, tower, outputs)

    def _hidden(self, x: Tensor) -> Tensor:
        return self.bottom(x)[..., 0, :]


class MMoE(_Head):
    """Multi-gate mixture of experts: every task mixes the same experts by a gate of its own, for each row.

    Args:
        in_features, tasks, hidden, tower, outputs, seed: as for `SharedBottom`; `hidden` is for each expert.
        experts: how many.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        experts: int = 3,
        hidden: int = 16,
        tower: int = 16,
        outputs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, tasks, _sizes(outputs, experts=experts, hidden=hidden, tower=tower))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.experts = _Experts(in_features, hidden, experts)
            self.gates = nn.ModuleList(nn.Linear(in_features, experts, bias=False) for _ in self.tasks)
            self._towers(hidden, tower, outputs)

    def _hidden(self, x: Tensor) -> Tensor:
        inputs = x.expand(len(self.tasks), -1, -1)
        gates = torch.stack([gate(one) for gate, one in zip(self.gates, inputs, strict=True)])
        return _mix(gates, self.experts(x))  # (T, N, hidden)


class _Level(nn.Module):
    """One level of PLE: `(1 or T, N, in)` and the shared input `(N, in)`, if there is one yet, to the next two."""

    def __init__(self, in_features: int, tasks: int, hidden: int, own: int, shared: int, last: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(_Experts(in_features, hidden, own) for _ in range(tasks))
        self.shared = _Experts(in_features, hidden, shared)
        self.gates = nn.ModuleList(nn.Linear(in_features, own + shared, bias=False) for _ in range(tasks))
        self.shared_gate = None if last else nn.Linear(in_features, tasks * own + shared, bias=False)

    def forward(self, x: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tasks = len(self.own)
        shared = self.shared(x if common is None else common[None]).expand(tasks, -1, -1, -1)
        x = x.expand(tasks, -1, -1)
        own = torch.stack([experts(one) for experts, one in zip(self.own, x, strict=True)])  # (T, N, own, hidden)
        gates = torch.stack([gate(one) for gate, one in zip(self.gates, x, strict=True)])
        mixed = _mix(gates, torch.cat([own, shared], -2))
        if self.shared_gate is None:
            return mixed, None
        middle = x.mean(0) if common is None else common
        every = torch.cat([*own, self.shared(middle)], -2)  # (N, T * own + shared, hidden)
        return mixed, _mix(self.shared_gate(middle), every)


class PLE(_Head):
    """Progressive layered extraction: levels of task experts and shared experts; a task never reads another's experts.

    Args:
        in_features, tasks, hidden, tower, outputs, seed: as for `SharedBottom`; `hidden` is for each expert.
        own: experts of each task, in each level.
        shared: experts of all tasks, in each level.
        levels: 1 is `CGC`.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        own: int = 1,
        shared: int = 1,
        levels: int = 2,
        hidden: int = 16,
        tower: int = 16,
        outputs: int | None = None,
        seed: int = 0,
    ) -> None:
        sizes = {"own": own, "shared": shared, "levels": levels, "hidden": hidden, "tower": tower}
        super().__init__(in_features, tasks, _sizes(outputs, **sizes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.levels = nn.ModuleList(
                _Level(hidden if i else in_features, len(self.tasks), hidden, own, shared, i == levels - 1)
                for i in range(levels)
            )
            self._towers(hidden, tower, outputs)

    def _hidden(self, x: Tensor) -> Tensor:
        common: Tensor | None = None
        for level in self.levels:
            x, common = level(x, common)
        return x


class CGC(PLE):
    """Customised gate control: each task mixes its own experts and the shared ones; one level of `PLE`."""

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        own: int = 1,
        shared: int = 1,
        hidden: int = 16,
        tower: int = 16,
        outputs: int | None = None,
        seed: int = 0,
    ) -> None:
        sizes = {"own": own, "shared": shared, "hidden": hidden, "tower": tower, "outputs": outputs}
        super().__init__(in_features, tasks, levels=1, seed=seed, **sizes)
