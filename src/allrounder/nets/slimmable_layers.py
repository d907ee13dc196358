"""The layers of slimmable networks: each reads the width of its context and uses that prefix of its values.

What they are for and how a network is made of them stands in `slimmable.py`. Names in the state dict are those of the
torch layer each is made of, whose parameters it takes over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .causal import Attention
from .multitask import Normalize

__all__ = [
    "Channels", "Slimmable", "SlimmableBatchNorm", "SlimmableConv2d", "SlimmableEmbedding", "SlimmableGroupNorm",
    "SlimmableHeads", "SlimmableLayerNorm", "SlimmableLinear", "SlimmableNormalize", "SlimmableTransformerLayer",
    "at_width", "current_width",
]  # fmt: skip

_WIDTH: ContextVar[float] = ContextVar("width", default=1.0)


@contextmanager
def at_width(width: float) -> Iterator[None]:
    """Slimmable networks called inside run at this share of their channels, (0, 1].

    >>> with at_width(0.5):
    ...     current_width()
    0.5
    """
    if not 0 < width <= 1:
        raise InputError(f"a width is above 0 and at most 1, got {width:g}")
    token = _WIDTH.set(float(width))
    try:
        yield
    finally:
        _WIDTH.reset(token)


def current_width() -> float:
    """The width of this context; 1 outside every `at_width`."""
    return _WIDTH.get()


@dataclass(frozen=True)
class Channels:
    """Channels that flow between two layers; with `multiple` None never slimmed, each `repeat` values (flattened)."""

    full: int
    multiple: int | None = None
    repeat: int = 1

    def at(self, width: float) -> int:
        """How many values are there at a width."""
        if self.multiple is None or width == 1:
            return self.full * self.repeat
        rounded = int(width * self.full / self.multiple + 0.5) * self.multiple
        return min(self.full, max(self.multiple, rounded)) * self.repeat


class Slimmable(nn.Module):
    """A layer that runs at the context's width and can be cut out at any."""

    def plain(self, width: float) -> nn.Module:
        """An ordinary module with copies of the values used at this width."""
        raise NotImplementedError


def _prefix(value: Tensor | None, *sizes: int) -> Tensor | None:
    """The leading entries along the leading dimensions; the tensor itself where that is all of it."""
    if value is None or tuple(value.shape[: len(sizes)]) == sizes:
        return value
    return value[tuple(slice(size) for size in sizes)]


def _filled(layer: nn.Module, source: nn.Module, **values: Tensor | None) -> nn.Module:
    """`layer`, made without values, with copies of these."""
    for name, value in values.items():
        if value is not None:
            copied = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(copied, requires_grad=value.requires_grad))
    return layer.train(source.training)


class SlimmableLinear(nn.Linear, Slimmable):
    def __init__(self, layer: nn.Linear, inputs: Channels, outputs: Channels) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.inputs, self.outputs = inputs, outputs

    def _values(self, width: float) -> tuple[Tensor, Tensor | None]:
        rows = self.outputs.at(width)
        return cast(Tensor, _prefix(self.weight, rows, self.inputs.at(width))), _prefix(self.bias, rows)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._values(current_width()))

    def plain(self, width: float) -> nn.Module:
        weight, bias = self._values(width)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        return _filled(layer, self, weight=weight, bias=bias)


class SlimmableConv2d(nn.Conv2d, Slimmable):
    def __init__(self, layer: nn.Conv2d, inputs: Channels, outputs: Channels) -> None:
        super().__init__(layer.in_channels, layer.out_channels, bias=False, device="meta", **_geometry(layer))
        self.weight, self.bias = layer.weight, layer.bias
        self.inputs, self.outputs = inputs, outputs

    def _values(self, width: float) -> tuple[Tensor, Tensor | None]:
        rows = self.outputs.at(width)
        return cast(Tensor, _prefix(self.weight, rows, self.inputs.at(width))), _prefix(self.bias, rows)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self._values(current_width()))

    def plain(self, width: float) -> nn.Module:
        weight, bias = self._values(width)
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", **_geometry(self))
        return _filled(layer, self, weight=weight, bias=bias)


def _geometry(layer: nn.Conv2d) -> dict:
    return {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}


class SlimmableEmbedding(nn.Embedding, Slimmable):
    def __init__(self, layer: nn.Embedding, outputs: Channels) -> None:
        super().__init__(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        self.weight, self.outputs = layer.weight, outputs

    def _values(self, width: float) -> Tensor:
        return cast(Tensor, _prefix(self.weight, self.num_embeddings, self.outputs.at(width)))

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self._values(current_width()), self.padding_idx)

    def plain(self, width: float) -> nn.Module:
        weight = self._values(width)
        layer = nn.Embedding(self.num_embeddings, weight.shape[1], self.padding_idx, device="meta")
        return _filled(layer, self, weight=weight)


class SlimmableBatchNorm(Slimmable):
    """One BatchNorm for each width, all begun from the prefix of the original's values."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, channels: Channels, widths: tuple[float, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.norms = nn.ModuleList(_cut(norm, channels.at(width)) if width < 1 else norm for width in widths)

    def _norm(self, width: float) -> nn.Module:
        if width not in self.widths:
            raise InputError(f"a BatchNorm has values for the widths {self.widths}, not for {width:g}")
        return self.norms[self.widths.index(width)]

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(current_width())(x)

    def plain(self, width: float) -> nn.Module:
        return copy.deepcopy(self._norm(width))


def _cut(norm: nn.BatchNorm1d | nn.BatchNorm2d, count: int) -> nn.Module:
    cut = copy.deepcopy(norm)
    cut.num_features = count
    for name, value in norm.named_parameters():
        setattr(cut, name, nn.Parameter(value.detach()[:count].clone(), requires_grad=value.requires_grad))
    for name, value in norm.named_buffers():
        if value.ndim:
            setattr(cut, name, value[:count].clone())
    return cut


class SlimmableGroupNorm(nn.GroupNorm, Slimmable):
    def __init__(self, layer: nn.GroupNorm, channels: Channels) -> None:
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, affine=False)
        self.weight, self.bias, self.channels = layer.weight, layer.bias, channels
        self.size = layer.num_channels // layer.num_groups  # channels of a group, whatever the width

    def forward(self, input: Tensor) -> Tensor:
        count = self.channels.at(current_width())
        weight, bias = _prefix(self.weight, count), _prefix(self.bias, count)
        return F.group_norm(input, count // self.size, weight, bias, self.eps)

    def plain(self, width: float) -> nn.Module:
        count = self.channels.at(width)
        affine = cast("Tensor | None", self.weight) is not None
        layer = nn.GroupNorm(count // self.size, count, self.eps, affine, device="meta")
        return _filled(layer, self, weight=_prefix(self.weight, count), bias=_prefix(self.bias, count))


class SlimmableLayerNorm(nn.LayerNorm, Slimmable):
    def __init__(self, layer: nn.LayerNorm, channels: Channels) -> None:
        super().__init__(layer.normalized_shape, layer.eps, elementwise_affine=False)  # type: ignore[arg-type]
        self.weight, self.bias, self.channels = layer.weight, layer.bias, channels

    def forward(self, input: Tensor) -> Tensor:
        count = self.channels.at(current_width())
        return F.layer_norm(input, (count,), _prefix(self.weight, count), _prefix(self.bias, count), self.eps)

    def plain(self, width: float) -> nn.Module:
        count = self.channels.at(width)
        weight, bias = _prefix(self.weight, count), _prefix(self.bias, count)
        layer = nn.LayerNorm(count, self.eps, weight is not None, bias is not None, device="meta")
        return _filled(layer, self, weight=weight, bias=bias)


class SlimmableNormalize(Normalize, Slimmable):
    like: Tensor

    def __init__(self, channels: Channels, like: Tensor) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)  # knows the device and the dtype

    def plain(self, width: float) -> nn.Module:
        count = self.channels.at(width)
        gain = self.like.new_full((count,), count**-0.5)
        layer = _filled(nn.RMSNorm(count, eps=1e-24, device="meta"), self, weight=gain)
        return layer.requires_grad_(False)


class SlimmableAttention(Slimmable):
    """Self-attention on `(N, T, d)`; the first heads of all."""

    def __init__(self, layer: nn.MultiheadAttention, stream: Channels) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = layer.in_proj_weight, layer.in_proj_bias
        self.out_proj = SlimmableLinear(layer.out_proj, stream, stream)
        self.stream, self.head_size, self.dropout = stream, layer.head_dim, layer.dropout

    def _values(self, width: float) -> tuple[Tensor, Tensor | None]:
        """Rows of q, k and v lie below each other, heads side by side within them."""
        full, count = self.stream.full, self.stream.at(width)
        if count == full:
            return self.in_proj_weight, self.in_proj_bias
        weight = self.in_proj_weight.view(3, full, full)[:, :count, :count].reshape(3 * count, count)
        bias = None if self.in_proj_bias is None else self.in_proj_bias.view(3, full)[:, :count].reshape(-1)
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        width, x = current_width(), x.transpose(0, 1)
        count = self.stream.at(width)
        mixed, _ = F.multi_head_attention_forward(
            x, x, x, count, count // self.head_size, *self._values(width), None, None, False,
            self.dropout, *self.out_proj._values(width), training=self.training, need_weights=False,
        )  # type: ignore[arg-type]  # fmt: skip
        return mixed.transpose(0, 1)

    def plain(self, width: float) -> nn.Module:
        count, (weight, bias) = self.stream.at(width), self._values(width)
        layer = nn.MultiheadAttention(
            count, count // self.head_size, self.dropout, bias=bias is not None, batch_first=True, device="meta"
        )
        # the class of its own `out_proj` only keeps dynamic quantisation away
        _filled(layer.out_proj, self, **dict(self.out_proj.plain(width).named_parameters()))
        return _filled(layer, self, in_proj_weight=weight, in_proj_bias=bias)


class SlimmableTransformerLayer(Slimmable):
    def __init__(self, layer: nn.TransformerEncoderLayer, stream: Channels, hidden: Channels) -> None:
        super().__init__()
        self.self_attn = SlimmableAttention(layer.self_attn, stream)
        self.linear1 = SlimmableLinear(layer.linear1, stream, hidden)
        self.linear2 = SlimmableLinear(layer.linear2, hidden, stream)
        self.norm1, self.norm2 = (SlimmableLayerNorm(norm, stream) for norm in (layer.norm1, layer.norm2))
        self.dropout, self.dropout1, self.dropout2 = layer.dropout, layer.dropout1, layer.dropout2
        self.activation, self.norm_first = layer.activation, layer.norm_first

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.dropout1(self.self_attn(self.norm1(x)))
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self.dropout1(self.self_attn(x)))
        return self.norm2(x + self._feed(x))

    def plain(self, width: float) -> nn.Module:
        count, attention = self.self_attn.stream.at(width), self.self_attn
        layer = nn.TransformerEncoderLayer(
            count, count // attention.head_size, self.linear1.outputs.at(width), self.dropout.p, self.activation,
            batch_first=True, norm_first=self.norm_first, bias=attention.in_proj_bias is not None, device="meta",
        )  # fmt: skip
        for name in ("self_attn", "linear1", "linear2", "norm1", "norm2"):
            setattr(layer, name, getattr(self, name).plain(width))
        return layer.train(self.training)


class SlimmableHeads(Attention, Slimmable):
    """The attention of a `CausalTransformer` with its first heads."""

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self._heads(current_width())

    def _heads(self, width: float) -> int:
        inner = cast(SlimmableLinear, self.query).outputs
        return inner.at(width) // cast(int, inner.multiple)

    def plain(self, width: float) -> nn.Module:
        layers = {id(layer): layer.plain(width) for layer in self.children() if isinstance(layer, Slimmable)}
        plain = copy.deepcopy(self, layers)
        plain.__class__ = Attention  # type: ignore[assignment]
        plain.__dict__["heads"] = self._heads(width)
        return plain
