"""Fisher merging: average the experts entry by entry, each weighted by how much its own predictions need that entry.

`theta_i = sum_k w_k F_ki theta_ki / sum_k w_k F_ki`, where `F_k` is the diagonal of expert k's Fisher
information, `F_i = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2`. It is the mode of the product of K
Gaussians around the experts, with those diagonals as precisions.

Use it when some examples of each task are at hand and the experts are classifiers. It moves little away
from averaging when the experts' information is alike; RegMean usually gains more from the same examples.

Cost: one read of 2 K models in blocks, and one more of the K information sets before it (norms and checks). The
information comes from `fisher_information` (`allrounder.optim.information`).

Paper: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832.
Departures: information is divided by its root mean square, where the paper's code divides by the L2 norm
(they differ by one factor for all experts); the floor comes after that division and holds for every expert,
so it means the same for every model size, and entries that no expert needs become the plain average
instead of the first expert's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Weights
from ..errors import InputError
from ..optim.information import fisher_information
from ..saving import BLOCK
from .engine import Aligned, Block, Merge, Rule, working
from .evidence import double, matched

__all__ = ["Fisher", "fisher", "fisher_information"]


@dataclass(frozen=True)
class Fisher(Rule):
    """`sum_k w_k f_k theta_k / sum_k w_k f_k` with `f = max(F / rms(F), floor)`; elementwise.

    Tensors without information (running statistics) take the mean weighted by `weights`.
    """

    information: Sequence[Mapping[str, Tensor]]
    weights: Sequence[float]
    floor: float
    normalise: bool
    labels: Sequence[str]
    names: Mapping[str, str]

    def statistic(self, models: Aligned) -> list[float]:
        """What each expert's information is multiplied by."""
        return [self._factor(*pair) for pair in zip(self.labels, self.information, strict=True)]

    def _factor(self, label: str, information: Mapping[str, Tensor]) -> float:
        total, count = 0.0, 0
        for name in self.names.values():
            for block in information[name].detach().reshape(-1).split(BLOCK):
                if not (torch.isfinite(block).all() and (block >= 0).all()):
                    raise InputError(f"the information of expert {label!r} in {name!r} has negative or infinite values")
                total += double(block).square().sum().item()
                count += block.numel()
        if total == 0:
            raise InputError(f"the information of expert {label!r} is zero everywhere: check its examples and head")
        return (count / total) ** 0.5 if self.normalise else 1.0

    def __call__(self, block: Block) -> Tensor:
        # averages the differences from the first expert: experts that agree are then kept bit for bit
        first, *others = [expert.to(working(block.base.dtype)) for expert in block.experts]
        source = self.names.get(block.name)
        below = self._share(0, source, block, first)
        above = torch.zeros_like(first)
        for k, expert in enumerate(others, 1):
            share = self._share(k, source, block, first)
            above.addcmul_(share, expert - first)
            below += share
        return above.div_(below).add_(first)

    def _share(self, k: int, source: str | None, block: Block, like: Tensor) -> Tensor:
        if source is None:
            return torch.full_like(like, self.weights[k])
        own = self.information[k][source].detach().reshape(-1)[block.start : block.stop]
        return own.to(like, copy=True).mul_(block.statistic[k]).clamp_(min=self.floor).mul_(self.weights[k])


def fisher(
    base: Weights | None,
    experts: Mapping[str, Weights],
    information: Mapping[str, Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    normalise: bool = True,
) -> Merge:
    """Average of the experts weighted, entry by entry, with their Fisher information.

    Args:
        base: only its integer tensors are used; may be `None`.
        experts: name -> weights.
        information: expert -> name -> information, not negative, shaped as the tensor
            (`fisher_information`); may lie on disk (`Checkpoint`).
        weights: K numbers, not negative, not all zero. Default: equal.
        floor: least information of an entry, > 0, after normalisation (1 is then the expert's root mean
            square). Paper: 1e-6, before it.
        normalise: divide each expert's information by its root mean square, so that no expert wins because
            its loss is on a larger scale.

    Raises:
        InputError: information that is missing for an expert, of another shape, negative or zero everywhere.

    >>> experts = {"a": {"w": torch.tensor([0.0, 0.0])}, "b": {"w": torch.tensor([1.0, 1.0])}}
    >>> information = {"a": {"w": torch.tensor([1.0, 3.0])}, "b": {"w": torch.tensor([3.0, 1.0])}}
    >>> fisher(None, experts, information)["w"]
    tensor([0.7500, 0.2500])
    """
    models = Aligned(base, experts)
    weights = [1.0] * len(experts) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(experts) or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise InputError(f"fisher needs {len(experts)} weights, not negative and not all zero, got {weights}")
    if not floor > 0:
        raise InputError(f"floor is the least information of an entry, above 0, got {floor:g}")
    names = matched(models, information, "information", "fisher_information", lambda shape, _: shape)
    rows = [information[label] for label in experts]
    return Merge(models, Fisher(rows, weights, float(floor), bool(normalise), list(experts), names))
