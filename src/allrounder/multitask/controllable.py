"""One trained network from which to cut a sub-network for any budget and any importance of the tasks.

A shared encoder and the decoder of each task all run at several widths. A configuration c = (a, b_1 .. b_K) is a width
of the encoder and one of each decoder. Each training step adds up, over the widest, the narrowest (of every part) and
some random c,

    sum_k L_k(c) + strength * mean_x || F_a(x) / |F_a(x)| - F_1(x) / |F_1(x)| ||^2

with F_a(x) the encoder's features at width a and those of the widest, F_1, without gradient (configuration-invariant
distillation: the widest encoder suffers least from the conflict of the tasks). Afterwards a budget in FLOPs and the
preferences r of the tasks choose c, and `export` cuts it out: nothing is trained again.

    b_k = width next to r_k / max_j r_j,    a = the widest with FLOPs(a, b) <= budget

Use it where one model serves devices or hours of different means, or users with different main tasks. For one fixed
budget train that network alone. The width of a decoder steers its task only where the narrow decoder is a real
bottleneck; the width of the encoder moves every task. Cost: with `random=1` three forward and backward passes a step,
two of them narrower; memory and storage of one network, plus BatchNorm's values for each width; `configure` looks FLOPs
up in a table that is counted once.

Efficient Controllable Multi-Task Architectures (2023, arXiv 2308.11744; ICCV 2023). Its code was never published;
distance, strength and widths are not stated in the text at hand and are this file's choice. Features are normalised,
since the raw squared error runs away: narrow features are a prefix of the wide ones' computation, pulling the narrow
ones up moves the wide ones too, and the gap never closes. `distance="mse"` is accepted only behind a normalisation,
which the paper's networks have. Once a budget is too small for the preferred decoders they narrow one notch at a time,
the least preferred first, and the encoder stays at its narrowest: all configurations of one preference then form a
chain, and a bigger budget never narrows anything (the widest encoder that fits each time would).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nets.multitask import MultiTaskModel
from ..nets.slimmable import WIDTHS, at_width, checked_widths, forward_flops, sub_network, to_slimmable
from ..nets.taps import tapped
from ..task import to_device

__all__ = ["Configuration", "Controllable", "Place", "hypervolume"]

Place = str | tuple[str, str]
"""A task, for its features, or a task and a module of the encoder."""


@dataclass(frozen=True)
class Configuration:
    """A sub-network: the width of the encoder and of the decoder of each task, shares of their channels."""

    encoder: float
    decoders: Mapping[str, float]


@dataclass
class _Pass:
    """What one forward pass of all tasks runs at, and the features it leaves, as `running` gives them."""

    model: Controllable
    configuration: Configuration
    stages: Sequence[str] = ()
    features: dict[Place, Tensor] = field(default_factory=dict)


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


class Controllable(MultiTaskModel):
    """`model(x, task)` at full width, `model(x, task, configuration)` at any; trained with `Sandwich`.

    Args:
        encoder: inputs -> features; what `nets.to_slimmable` takes. It is copied.
        decoders: task -> module from features to outputs, likewise. Its hidden layers are cut; one without hidden
            layers has one width.
        example: one input, `(1, ...)`: FLOPs are counted for it.
        widths: shares of the channels, with 1.0 among them. Paper: not stated.
        multiple: channels are rounded to multiples of it, and are at least as many.

    Attributes:
        sampled: `(1 + tasks, widths)` bool, encoder first: the widths that were trained. It is kept in the state dict.

    Raises:
        InputError: no tasks, an example that is not one input, widths or layers that cannot be slimmed.

    >>> model = Controllable(nn.Linear(4, 8), {"a": nn.Linear(8, 2)}, torch.zeros(1, 4))
    >>> model(torch.zeros(3, 4), "a").shape
    torch.Size([3, 2])
    """

    example: Tensor
    sampled: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoders: Mapping[str, nn.Module],
        example: Tensor,
        *,
        widths: Sequence[float] = WIDTHS,
        multiple: int = 8,
    ) -> None:
        if not decoders:
            raise InputError("a controllable model needs the decoder of at least one task")
        if example.ndim < 2 or len(example) != 1:
            raise InputError(f"the example is one input (1, ...), got {tuple(example.shape)}")
        rising = checked_widths(widths)
        parts = {name: to_slimmable(part, widths=widths, multiple=multiple) for name, part in decoders.items()}
        super().__init__(to_slimmable(encoder, widths=widths, multiple=multiple), parts)
        self.widths = rising
        self.register_buffer("example", example.clone(), persistent=False)
        self.register_buffer("sampled", torch.zeros(1 + len(parts), len(rising), dtype=torch.bool))
        self._flops: dict[str | None, dict[float, int]] = {}

    @property
    def tasks(self) -> list[str]:
        return list(self.heads)

    def uniform(self, width: float) -> Configuration:
        """The configuration with one width everywhere."""
        return Configuration(width, dict.fromkeys(self.tasks, width))

    def forward(self, inputs: object, task: str, configuration: Configuration | None = None) -> Tensor:
        """Outputs of one task; without a configuration that of `running`, and full width outside of it."""
        if task not in self.heads:
            raise InputError(f"the model has no decoder for task {task!r}; it has {', '.join(self.heads)}")
        now = _PASS.get()
        now = now if now is not None and now.model is self and configuration is None else None
        chosen = now.configuration if now is not None else self._checked(configuration or self.uniform(1.0))
        with at_width(chosen.encoder), tapped(self.backbone, () if now is None else now.stages) as seen:
            features = self.backbone(inputs)
        if now is not None:
            now.features |= {task: features, **{(task, stage): output for stage, output in seen.items()}}
        with at_width(chosen.decoders[task]):
            return self.heads[task](features)

    @contextmanager
    def running(self, configuration: Configuration, *, stages: Sequence[str] = ()) -> Iterator[dict[Place, Tensor]]:
        """`model(x, task)` inside runs at this configuration; gives the encoder's features of each task's last call.

        It holds in this thread (context) alone.

        Args:
            configuration: of this model.
            stages: modules of the encoder, as in `named_modules()`, whose outputs are given too, as (task, stage).
        """
        now = _Pass(self, self._checked(configuration), stages)
        token = _PASS.set(now)
        try:
            yield now.features
        finally:
            _PASS.reset(token)

    def flops(self, configuration: Configuration) -> int:
        """FLOPs (2 x MACs, as torch counts them) of the example through the encoder once and every decoder."""
        self._checked(configuration)
        table = self._table()
        return table[None][configuration.encoder] + sum(table[k][b] for k, b in configuration.decoders.items())

    def configure(self, *, budget: float | None = None, preference: Mapping[str, float] | None = None) -> Configuration:
        """The widest configuration of this preference within a budget.

        Args:
            budget: the most FLOPs (2 x MACs) for one example with all tasks. Default: no limit.
            preference: task -> importance, >= 0, in any unit. Default: all alike.

        Returns:
            A configuration. A preferred task has the wider decoder, scaling the preferences changes nothing, and with
            a bigger budget no width is smaller.

        Raises:
            InputError: other tasks, preferences that are negative, not finite or all zero, and a budget below the
                cheapest configuration, with its FLOPs.

        Warns:
            When a chosen width was never trained.
        """
        wanted = dict.fromkeys(self.tasks, 1.0) if preference is None else dict(preference)
        if set(wanted) != set(self.tasks):
            raise InputError(f"preference names the tasks {', '.join(self.tasks)}, got {', '.join(wanted)}")
        if not all(math.isfinite(r) and r >= 0 for r in wanted.values()) or not any(wanted.values()):
            raise InputError(f"preferences are finite, at least 0 and not all 0, got {wanted}")
        chosen = None
        for chosen in self._chain(wanted):
            if budget is None or self.flops(chosen) <= budget:
                self._warn(chosen)
                return chosen
        least = self.flops(cast(Configuration, chosen))
        raise InputError(
            f"the budget of {budget:,.0f} FLOPs (2 x MACs) is infeasible: the narrowest configuration takes {least:,}"
        )

    def export(
        self, configuration: Configuration, *, recalibrate: Mapping[str, Iterable[Any]] | None = None
    ) -> nn.ModuleDict:
        """The sub-network as ordinary torch modules with their own copies of the values, in evaluation mode.

        Args:
            configuration: from `configure`, or any.
            recalibrate: task -> batches (inputs, or a tuple that starts with them), from which the exported
                BatchNorms take new statistics: 10 to 50 batches.

        Returns:
            `nn.ModuleDict` of `encoder` and `decoders`; outputs are `net["decoders"][task](net["encoder"](x))`.

        Raises:
            InputError: an unknown width or task, no batches of a task.

        Warns:
            When a width was never trained.
        """
        self._warn(self._checked(configuration))
        decoders = {k: sub_network(self.heads[k], configuration.decoders[k]) for k in self.tasks}
        encoder = sub_network(self.backbone, configuration.encoder)
        network = nn.ModuleDict({"encoder": encoder, "decoders": nn.ModuleDict(decoders)}).eval()
        if recalibrate is not None:
            _recalibrate(network, recalibrate, self.example.device)
        return network

    def _checked(self, configuration: Configuration) -> Configuration:
        if set(configuration.decoders) != set(self.heads):
            given = ", ".join(configuration.decoders)
            raise InputError(f"a configuration has a decoder width for {', '.join(self.heads)}, got {given}")
        for width in (configuration.encoder, *configuration.decoders.values()):
            if width not in self.widths:
                raise InputError(f"the model has the widths {self.widths}, got {width:g}")
        return configuration

    def _warn(self, configuration: Configuration) -> None:
        chosen = {"the encoder": configuration.encoder}
        chosen |= {f"decoder {task!r}": configuration.decoders[task] for task in self.tasks}
        untrained = [
            f"width {width:g} of {part}"
            for trained, (part, width) in zip(self.sampled.tolist(), chosen.items(), strict=True)
            if not trained[self.widths.index(width)]
        ]
        if untrained:
            warnings.warn(f"{', '.join(untrained)} was never trained; train with Sandwich", stacklevel=3)

    def _table(self) -> dict[str | None, dict[float, int]]:
        """Part (None for the encoder) -> width -> FLOPs."""
        if not self._flops:
            encoder = sub_network(self.backbone, 1.0).eval()
            with torch.no_grad():
                features = encoder(self.example)
            parts: dict[str | None, tuple[nn.Module, Tensor]] = {None: (self.backbone, self.example)}
            parts |= {task: (head, features) for task, head in self.heads.items()}
            self._flops = {
                name: {width: forward_flops(part, width, inputs) for width in self.widths}
                for name, (part, inputs) in parts.items()
            }
        return self._flops

    def _chain(self, preference: Mapping[str, float]) -> Iterator[Configuration]:
        """All configurations of a preference, each one notch inside the one before."""
        top = max(preference.values())
        level = {task: self._next_to(r / top) for task, r in preference.items()}

        def at(encoder: int) -> Configuration:
            return Configuration(self.widths[encoder], {task: self.widths[level[task]] for task in self.tasks})

        yield from (at(encoder) for encoder in reversed(range(len(self.widths))))
        groups = [[k for k, r in preference.items() if r == value] for value in sorted(set(preference.values()))]
        while any(level.values()):
            for group in groups:  # equal preferences keep equal widths
                if level[group[0]]:
                    level |= {task: level[task] - 1 for task in group}
                    yield at(0)

    def _next_to(self, share: float) -> int:
        """Index of the nearest width, the wider of two."""
        return min(reversed(range(len(self.widths))), key=lambda i: abs(self.widths[i] - share))


def _recalibrate(network: nn.ModuleDict, batches: Mapping[str, Iterable[Any]], device: torch.device) -> None:
    """New running statistics: means over these batches."""
    encoder, decoders = network["encoder"], cast(nn.ModuleDict, network["decoders"])
    if set(batches) != set(decoders):
        raise InputError(f"recalibrate needs batches of {', '.join(decoders)}, got {', '.join(batches)}")
    norms = [layer for layer in network.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for task, stream in batches.items():
            empty = True
            for batch in stream:
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                decoders[task](encoder(to_device(inputs, device)))
                empty = False
            if empty:
                raise InputError(f"recalibrate got no batches of task {task!r}")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Volume of what lies below at least one point and above the reference: how much of the trade-off is reachable.

    Args:
        points: `(P, K)`, a row for each configuration, larger is better. Exact for any K, meant for 2 or 3: time grows
            as P to the power K - 1.
        reference: `(K,)`; points that do not exceed it everywhere add nothing.

    Raises:
        InputError: other shapes, or values that are not finite.

    >>> hypervolume(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.zeros(2))
    3.0
    """
    if points.ndim != 2 or reference.shape != points.shape[1:] or not len(reference):
        raise InputError(
            f"points are (P, K) and the reference (K,), got {tuple(points.shape)}, {tuple(reference.shape)}"
        )
    if not (points.isfinite().all() and reference.isfinite().all()):
        raise InputError("points and reference of a hypervolume must be finite")
    above = points.double().cpu() - reference.double().cpu()
    return _volume(above[(above > 0).all(1)])


def _volume(points: Tensor) -> float:
    """Slabs along the last axis; each has the volume of the points that reach it."""
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return points.max().item()
    total, below = 0.0, 0.0
    for height in points[:, -1].unique().tolist():
        total += (height - below) * _volume(points[points[:, -1] >= height, :-1])
        below = height
    return total
