"""SimpleCIL: the mean feature of each class, and the nearest by cosine. No training at all.

`W_c = mean of phi(x) over class c`, `predict argmax_c cos(phi(x), W_c)`, with a frozen backbone phi. It belongs into
every table of class-incremental learning: with a good backbone it beats many trained methods.

Order of tasks and size of batches make no difference: sums and counts are kept (float64). Cost: one forward pass per
example; storage C x d numbers. Needs no ids and no boundaries.

Paper: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
All You Need", IJCV 2024, arXiv 2303.07338.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import evaluating
from .learner import Batch, Learner, size_of

__all__ = ["SimpleCIL"]


class SimpleCIL(Learner):
    """Nearest class mean.

    Args:
        backbone: `inputs -> features (B, d)`; never changed.
        outputs: size of the output space.
    """

    kept: ClassVar[tuple[str, ...]] = ("seen", "gradients", "sums", "counts")

    def __init__(self, backbone: nn.Module, outputs: int) -> None:
        super().__init__(outputs)
        self.backbone = backbone
        self.sums: Tensor | None = None
        self.counts = torch.zeros(outputs, dtype=torch.float64)

    @property
    def device(self) -> torch.device | str:
        first = next(self.backbone.parameters(), None)
        return "cpu" if first is None else first.device

    @torch.no_grad()
    def features(self, inputs: Any) -> Tensor:
        """`(B, d)`."""
        with evaluating(self.backbone):
            found = self.backbone(inputs)
        if found.ndim != 2:
            raise InputError(f"the backbone must give features (B, d), got {tuple(found.shape)}")
        return found

    def observe(self, batch: Batch) -> dict[str, float]:
        self.note_classes(batch.targets)
        if batch.repeat == 0:
            features = self.features(batch.inputs).cpu().double()
            if self.sums is None:
                self.sums = torch.zeros(self.outputs, features.shape[1], dtype=torch.float64)
            self.sums.index_add_(0, batch.targets.cpu(), features)
            self.counts += torch.bincount(batch.targets.cpu(), minlength=self.outputs)
        return {}

    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        features = self.features(inputs)
        if self.sums is None:
            return self.masked(features.new_zeros(len(features), self.outputs))
        means = (self.sums / self.counts.clamp(min=1).unsqueeze(1)).to(features)
        return self.masked(F.normalize(features, dim=1) @ F.normalize(means, dim=1).T)

    def held(self) -> dict[str, int]:
        return {"class means": size_of(self.sums) + size_of(self.counts)}
