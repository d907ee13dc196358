"""Linear layers with several experts, chosen by what a token is and not by what it says.

A binary vector a describes the role of the tokens (image or text, input or target, causal or not, ...), and

    W(a) = sum_e g_e(a) W_e,    g(a) = softmax of the k largest of (G a + c)

so tasks and modalities that get in each other's way find their own weights. The mixture is of weights: an expert layer
costs one product of the ordinary size, whatever the number of experts, and for a known role it *is* an ordinary layer
(`merged`).

Use it in the feed-forward layers of an encoder that serves several modalities or tasks. Memory: E times the layer's
weights while training, nothing extra after `merge_experts`.

The conditional experts of Uni-Perceiver (2022, arXiv 2206.04674), used by Uni-Perceiver v2 (arXiv 2211.09808).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = ["AttributeLinear", "merge_experts"]


class AttributeLinear(nn.Module):
    """A linear layer whose weights depend on a binary description of its tokens.

    Args:
        fan_in, fan_out: widths.
        attributes: length of the description (8 in the paper).
        experts: E >= 1.
        top: experts that are mixed for one description, 1 to E; the rest get no gradient from it.
        seed: of the initial weights.

    Raises:
        InputError: sizes out of range.
    """

    def __init__(
        self, fan_in: int, fan_out: int, *, attributes: int = 8, experts: int = 4, top: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        if min(fan_in, fan_out, attributes, experts) < 1 or not 1 <= top <= experts:
            raise InputError(
                f"widths, attributes and experts are at least 1 and top is 1 to experts, got fan_in={fan_in}, "
                f"fan_out={fan_out}, attributes={attributes}, experts={experts}, top={top}"
            )
        self.top = top
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, fan: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) * fan**-0.5)

        self.weight = uniform(experts, fan_out, fan_in, fan=fan_in)
        self.bias = uniform(experts, fan_out, fan=fan_in)
        self.gate = uniform(experts, attributes, fan=attributes)
        self.gate_bias = nn.Parameter(torch.zeros(experts))

    def gates(self, attributes: Tensor) -> Tensor:
        """Shares of the experts `(E,)` for one description `(A,)`; they sum to one, `top` of them are not zero.

        Raises:
            InputError: a description of another length, or one that is not of zeros and ones.
        """
        if attributes.shape != self.gate.shape[1:]:
            raise InputError(f"attributes must have {self.gate.shape[1]} entries, got {tuple(attributes.shape)}")
        if not ((attributes == 0) | (attributes == 1)).all():
            raise InputError(f"attributes are zeros and ones, got {attributes.tolist()}")
        scores = self.gate @ attributes.to(self.gate) + self.gate_bias
        best = scores.topk(self.top)
        return torch.zeros_like(scores).index_put((best.indices,), best.values.softmax(0))

    def mixed(self, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Weight `(fan_out, fan_in)` and bias `(fan_out,)` for one description `(A,)`, with their gradients."""
        gates = self.gates(attributes)
        return torch.einsum("e,eoi->oi", gates, self.weight), gates @ self.bias

    def forward(self, x: Tensor, attributes: Tensor) -> Tensor:
        """`x` `(..., fan_in)` whose tokens all have one description `(A,)` -> `(..., fan_out)`."""
        return F.linear(x, *self.mixed(attributes))

    def merged(self, attributes: Tensor) -> nn.Linear:
        """The ordinary layer that this one is for tokens of one description."""
        _, fan_out, fan_in = self.weight.shape
        layer = nn.Linear(fan_in, fan_out, dtype=self.weight.dtype, device="meta").to_empty(device=self.weight.device)
        with torch.no_grad():
            for value, found in zip((layer.weight, layer.bias), self.mixed(attributes), strict=True):
                value.copy_(found)
        return layer


class _Fixed(nn.Module):
    """An ordinary layer that takes and ignores a description, so that callers need not change."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, attributes: Tensor | None = None) -> Tensor:
        return self.layer(x)


def merge_experts(model: nn.Module, attributes: Tensor | Sequence[int]) -> nn.Module:
    """A copy of a model in which every expert layer is the ordinary one for this description.

    Args:
        model: holds `AttributeLinear` layers.
        attributes: `(A,)`, the role of all tokens that the copy will see.

    Raises:
        InputError: a model without expert layers.
    """
    role = torch.as_tensor(attributes)
    merged = copy.deepcopy(model)
    if isinstance(merged, AttributeLinear):
        return _Fixed(merged.merged(role))
    found = [(name, part) for name, part in merged.named_modules() if isinstance(part, AttributeLinear)]
    if not found:
        raise InputError("the model has no AttributeLinear layer to merge")
    for name, part in found:
        parent, _, last = name.rpartition(".")
        setattr(merged.get_submodule(parent), last, _Fixed(part.merged(role.to(part.weight.device))))
    return merged
