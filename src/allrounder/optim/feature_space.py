"""Rules on gradients at the features that tasks share, instead of at the weights below them.

With z = backbone(x) `(N, ...)` read by the heads of all tasks, the rows are dL_k/dz: K backward passes through heads
alone, and one through the backbone, of what the rule makes of the rows. That is the gradient of `sum_k w_k L_k`, as in
the space of parameters, with weights from the Gramian of features. Since dL_k/dtheta = (dz/dtheta)' dL_k/dz,

    |sum_k w_k dL_k/dtheta| <= |dz/dtheta| |sum_k w_k dL_k/dz|

so that MGDA (`mgda`) minimises an upper bound of its objective (MGDA-UB), and ends in a Pareto stationary point where
dz/dtheta has full rank. Both spaces agree where it is orthonormal. Parameters above z that tasks share are rows too.

It is for tasks on one batch of inputs. Where each task has inputs of its own, z differs from task to task: rows of the
stacked features have no entry in common, their Gramian is diagonal, and a rule would see lengths but never a conflict.
That is refused, as it is another method under the same name.

Sener & Koltun, Multi-Task Learning as Multi-Objective Optimization (2018, arXiv 1810.04650). Departure: any rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..train import Losses

__all__ = ["Cut", "backbone_of", "cut_at"]


class Cut(NamedTuple):
    """A graph in two parts.

    Args:
        output: of the backbone, with the graph below it.
        features: the same values as a leaf, with the graph above it.
    """

    output: Tensor
    features: Tensor

    def down(self, combined: dict[int, Tensor], parameters: Sequence[Tensor]) -> None:
        """Put the backbone's gradients into `combined`, at 1 + their places, from that of the features at 0.

        Raises:
            InputError: a parameter below the features that a loss reaches around them.
        """
        live = [i for i, parameter in enumerate(parameters, 1) if parameter.requires_grad]
        if 0 not in combined or not self.output.requires_grad:
            return
        made = torch.autograd.grad(self.output, [parameters[i - 1] for i in live], combined[0], allow_unused=True)
        for i, gradient in zip(live, made, strict=True):
            if gradient is None:
                continue
            if i in combined:
                raise InputError(
                    f"losses reach the backbone's parameter of shape {tuple(gradient.shape)} around its output too; "
                    "use space='parameters'"
                )
            combined[i] = gradient


def backbone_of(model: Any, space: str, shared: Iterable[Tensor] | None) -> nn.Module | None:
    """The module whose output is the features, `None` for the space of parameters.

    Raises:
        InputError: an unknown space, no backbone, or shared parameters beside features.
    """
    if space not in ("parameters", "features"):
        raise InputError(f"space is 'parameters' or 'features', got {space!r}")
    if space == "parameters":
        return None
    if shared is not None:
        raise InputError("with space='features' tasks share the output of the backbone; leave out `shared`")
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise InputError(
            f"space='features' needs a model with a `backbone`, such as MultiTaskModel, got {type(model).__name__}"
        )
    return backbone


def cut_at(backbone: nn.Module, losses: Losses, tasks: Sequence[str]) -> tuple[Mapping[str, Tensor], Cut]:
    """Losses whose graph ends at the backbone's output.

    Raises:
        InputError: a backbone that ran more or less than once, or whose output is not a tensor.
    """
    cuts: list[Cut] = []

    def cut(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise InputError(f"space='features' needs a backbone that returns a tensor, got {type(output).__name__}")
        cuts.append(Cut(output, output.detach().requires_grad_()))
        return cuts[-1].features

    handle = backbone.register_forward_hook(cut)
    try:
        found = losses(tasks)
    finally:
        handle.remove()
    if len(cuts) != 1:
        raise InputError(
            f"space='features' is for heads that read one output of the backbone, which ran {len(cuts)} times for "
            f"{len(tasks)} tasks; run it once for all, or use space='parameters' for tasks with inputs of their own"
        )
    return found, cuts[0]
