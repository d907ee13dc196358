"""One shared backbone and one head per task."""

from __future__ import annotations

from collections.abc import Mapping

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


def class_head(directions: Tensor, *, temperature: float) -> nn.Linear:
    """A fixed linear head: cosine with each class's direction over a temperature, as CLIP's text heads.

    Args:
        directions: `(classes, d)`; normalised here.
        temperature: divides the cosine, > 0.
    """
    classes, width = directions.shape
    head = nn.Linear(width, classes, bias=False, device=directions.device, dtype=directions.dtype)
    head.weight = nn.Parameter(F.normalize(directions, dim=-1) / temperature, requires_grad=False)
    return head


def mlp(widths: list[int], *, seed: int) -> nn.Sequential:
    """Linear layers with GELU between them, initialised from `seed`."""
    layers: list[nn.Module] = []
    generator = torch.Generator().manual_seed(seed)
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(fan_in, fan_out)
        bound = fan_in**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])
