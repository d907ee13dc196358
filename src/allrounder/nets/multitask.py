"""One shared backbone and one head per task."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = ["MultiTaskModel", "Normalize", "class_head", "mlp", "shared"]


class MultiTaskModel(nn.Module):
    """`model(inputs, task)`: the head of that task on the features of the shared backbone.

    Args:
        backbone: inputs -> features `(N, d)`. Merging acts on its weights.
        heads: task name -> module from features to outputs. Heads that were fixed before fine-tuning
            (`class_head`) let experts be merged without touching them.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs: object, task: str) -> Tensor:
        if task not in self.heads:
            raise InputError(f"the model has no head for task {task!r}; it has {', '.join(self.heads)}")
        return self.heads[task](self.backbone(inputs))


def shared(model: nn.Module) -> nn.Module:
    """The part that experts share: the backbone of a `MultiTaskModel`, otherwise the model itself."""
    return model.backbone if isinstance(model, MultiTaskModel) else model


class Normalize(nn.Module):
    """Features on the unit sphere."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def _empty(fan_in: int, fan_out: int, **options: Any) -> nn.Linear:
    """A linear layer whose values are still to be set: it draws nothing from the global generator."""
    return nn.Linear(fan_in, fan_out, device="meta", **options).to_empty(device="cpu")


def class_head(directions: Tensor, *, temperature: float) -> nn.Linear:
    """A fixed linear head: cosine with each class's direction over a temperature, as CLIP's text heads.

    Args:
        directions: `(classes, d)`; normalised here.
        temperature: divides the cosine, > 0.

    Raises:
        InputError: directions that are not a matrix, a temperature that is not positive.

    >>> class_head(torch.tensor([[3.0, 4.0]]), temperature=0.5)(torch.tensor([0.6, 0.8])).item()
    2.0
    """
    if directions.ndim != 2:
        raise InputError(f"directions are (classes, d), got {tuple(directions.shape)}")
    if not temperature > 0:
        raise InputError(f"temperature is above 0, got {temperature:g}")
    classes, width = directions.shape
    head = _empty(width, classes, bias=False, dtype=directions.dtype)
    head.weight = nn.Parameter(F.normalize(directions, dim=-1) / temperature, requires_grad=False)
    return head


def mlp(widths: list[int], *, seed: int) -> nn.Sequential:
    """Linear layers with GELU between them, initialised from `seed`."""
    layers: list[nn.Module] = []
    generator = torch.Generator().manual_seed(seed)
    for fan_in, fan_out in pairwise(widths):
        linear = _empty(fan_in, fan_out)
        bound = fan_in**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])
