"""Training of a controllable model: the sandwich of its widest, narrowest and random configurations.

The equation, the paper and when to use it stand in `controllable.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.multitask import Normalize
from ..nets.slimmable import layers_of
from ..nets.slimmable_layers import SlimmableBatchNorm, SlimmableTransformerLayer
from ..train import Losses
from .controllable import Configuration, Controllable, Place

__all__ = ["Sandwich", "invariance"]

NORMS = (SlimmableBatchNorm, nn.LayerNorm, nn.GroupNorm, Normalize)


def invariance(features: Tensor, teacher: Tensor, *, distance: Literal["normalised", "mse"] = "normalised") -> Tensor:
    """Configuration-invariant distillation: how far features are from the teacher's, which get no gradient.

    Args:
        features, teacher: `(N, ...)` of one shape.
        distance: `normalised` for the squared distance of the unit vectors of each example, 0 to 4; `mse` for the
            mean squared difference.

    Raises:
        InputError: other shapes or an unknown distance.

    >>> invariance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    2.0
    """
    if features.shape != teacher.shape:
        raise InputError(f"features are {tuple(features.shape)}, the teacher's {tuple(teacher.shape)}")
    teacher = teacher.detach()
    if distance == "mse":
        return F.mse_loss(features, teacher)
    if distance != "normalised":
        raise InputError(f"distance is 'normalised' or 'mse', got {distance!r}")
    ours, theirs = F.normalize(features.flatten(1), dim=1), F.normalize(teacher.flatten(1), dim=1)
    return (ours - theirs).square().sum(1).mean()


class Sandwich:
    """The training update for `allrounder.fit(..., sampler="all", update=Sandwich(model))`.

    Each call takes the gradient at the widest, the narrowest and `random` configurations with independent widths.

    Args:
        model: what `losses` runs.
        random: random configurations a step, >= 0. With 0, widths in between stay untrained.
        strength: of the distillation, >= 0.
        distance: as in `invariance`. `mse` needs an encoder, and stages, that end in a normalisation.
        stages: modules of the encoder, as in `named_modules()`, whose outputs are compared too, each with `strength`:
            narrow ones with as many leading channels of the widest. Channels are the last dimension of `(N, T, C)`,
            the second otherwise. Paper: not stated. Default: none, the encoder's features alone.
        seed: of the random configurations.

    Raises:
        InputError: values out of range, stages that the encoder lacks, raw distances of features that nothing bounds.
    """

    def __init__(
        self,
        model: Controllable,
        *,
        random: int = 1,
        strength: float = 0.1,
        distance: Literal["normalised", "mse"] = "normalised",
        stages: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if random < 0 or not (math.isfinite(strength) and strength >= 0):
            raise InputError(f"random and strength are at least 0, got random={random}, strength={strength}")
        if distance not in ("normalised", "mse"):
            raise InputError(f"distance is 'normalised' or 'mse', got {distance!r}")
        there = dict(model.backbone.named_modules())
        if missing := [stage for stage in stages if not stage or stage not in there]:
            raise InputError(f"the encoder has no module {missing[0]!r}; stages are names in its named_modules()")
        if distance == "mse" and not all(_bounded(model.backbone, stage) for stage in ("", *stages)):
            raise InputError(
                "distance='mse' makes features without normalisation run away; end the encoder and every stage with a "
                "BatchNorm, LayerNorm or Normalize, or use 'normalised'"
            )
        self.model, self.random, self.strength, self.distance = model, random, strength, distance
        self.stages = tuple(stages)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, losses: Losses, tasks: Sequence[str]) -> Mapping[str, Tensor]:
        """Leaves the summed gradients in `.grad`; the losses are those of the widest configuration."""
        found, teacher = self._backward(losses, tasks, self.model.uniform(1.0), {})
        for configuration in self.narrower():
            self._backward(losses, tasks, configuration, teacher)
        return found

    def narrower(self) -> list[Configuration]:
        """What this step trains besides the widest: the narrowest configuration and the random ones."""
        widths, tasks = self.model.widths, self.model.tasks
        drawn = torch.randint(len(widths), (self.random, 1 + len(tasks)), generator=self.generator).tolist()
        return [
            self.model.uniform(widths[0]),
            *(Configuration(widths[a], {k: widths[b] for k, b in zip(tasks, rest)}) for a, *rest in drawn),
        ]

    def _backward(
        self,
        losses: Losses,
        tasks: Sequence[str],
        configuration: Configuration,
        teacher: Mapping[Place, Tensor],
    ) -> tuple[Mapping[str, Tensor], dict[Place, Tensor]]:
        """Losses and features of one configuration."""
        with self.model.running(configuration, stages=self.stages) as features:
            found = losses(tasks)
        missing = [task for task in tasks if task not in features]
        if missing:
            raise InputError(f"the losses of task {missing[0]!r} did not call the model that Sandwich was given")
        total = torch.stack(list(found.values())).sum()
        if self.strength:
            for place, wide in teacher.items():
                apart = invariance(features[place], _leading(wide, features[place]), distance=self.distance)  # type: ignore[arg-type]
                total = total + self.strength * apart
        total.backward()
        widths = (configuration.encoder, *(configuration.decoders[task] for task in self.model.heads))
        for row, (part, width) in enumerate(zip((None, *self.model.heads), widths, strict=True)):
            if part is None or part in tasks:
                self.model.sampled[row, self.model.widths.index(width)] = True
        return found, features


def _leading(wide: Tensor, narrow: Tensor) -> Tensor:
    """As many channels of the widest as the narrow features have."""
    channels = 2 if narrow.ndim == 3 else 1
    return wide.narrow(channels, 0, narrow.shape[channels])


def _bounded(encoder: nn.Module, stage: str = "") -> bool:
    """Whether nothing with weights comes after the last normalisation, up to a stage."""
    layers = list(layers_of(encoder))
    if stage:
        names = [name for name, _ in layers]
        layers = layers[: names.index(stage) + 1] if stage in names else []
    for _, layer in reversed(layers):
        if isinstance(layer, SlimmableTransformerLayer):
            return not layer.norm_first
        if isinstance(layer, NORMS):
            return True
        if next(layer.parameters(), None) is not None:
            return False
    return False
