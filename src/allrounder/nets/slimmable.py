"""Slimmable networks: one set of weights that runs at several widths, and plain copies of it at any one of them.

    width a of a layer with n channels:  n_a = min(n, max(m, m * round(a n / m))),  m = 8
    y = W[:out_a, :in_a] x + b[:out_a]

`to_slimmable(net)` makes such a network of an ordinary one, `with at_width(0.5): net(x)` runs it, and
`sub_network(net, 0.5)` cuts that half out as ordinary torch modules. Narrow networks are prefixes of wide ones. Input
channels and the outputs of the last linear or convolutional layer keep their number, so that whatever reads the
network sees one interface. Width 1 is the original network exactly; keys of the state dict stay, but for BatchNorm.

- BatchNorm: one per width, statistics and gains ("switchable"): activations of other widths are distributed otherwise.
- GroupNorm keeps the channels of a group and drops whole groups; LayerNorm normalises over what is there.
- `nn.TransformerEncoderLayer`: the residual stream is cut as the layer before it cuts it, in whole heads, and the
  hidden layer of its MLP by the rule above. After a fixed stream only the hidden layer is cut.
- `nets.CausalTransformer`: heads and hidden layers are cut, the residual stream is not, so positions, embeddings and
  norms stay as they are. Its plain copies are ordinary `CausalTransformer`s, the only ones that need this library.

The width is a context variable, not a module attribute: threads and coroutines that share one network do not see each
other's widths, and it passes through forward methods that know nothing of it (`nn.Sequential`, hooks, a transformer's
blocks), which an argument would not. A new thread starts at width 1. Recomputation in the backward pass leaves the
context: give `torch.utils.checkpoint` the `context_fn=lambda: (nullcontext(), at_width(a))`.

Use it through `multitask.Controllable`, or alone for one network with several costs. Time falls by less than FLOPs do,
since narrow layers are bound by memory; a plain copy also saves the slicing. A network that was not trained at a width
is near chance there.

Slimmable Neural Networks (2019, arXiv 1812.08928), Universally Slimmable Networks (2019, arXiv 1903.05134).
Departures from their code: no attribute is set on modules to choose a width, the first layer and the interface never
shrink, grouped convolutions are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .causal import Attention, CausalTransformer
from .multitask import Normalize
from .slimmable_layers import (
    Channels,
    Slimmable,
    SlimmableBatchNorm,
    SlimmableConv2d,
    SlimmableEmbedding,
    SlimmableGroupNorm,
    SlimmableHeads,
    SlimmableLayerNorm,
    SlimmableLinear,
    SlimmableNormalize,
    SlimmableTransformerLayer,
    at_width,
    current_width,
)

__all__ = [
    "WIDTHS",
    "at_width",
    "checked_widths",
    "current_width",
    "forward_flops",
    "layers_of",
    "sub_network",
    "to_slimmable",
]

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def to_slimmable(module: nn.Module, *, widths: Sequence[float] = WIDTHS, multiple: int = 8) -> nn.Module:
    """A copy of a network that can run at several widths.

    Args:
        module: (nested) `nn.Sequential` of Linear, Conv2d, Embedding, BatchNorm, GroupNorm, LayerNorm, `Normalize`,
            TransformerEncoderLayer (`batch_first`) and modules without parameters; or a `CausalTransformer`.
        widths: shares of the channels, with 1.0 among them; BatchNorm has one set of values for each.
        multiple: channels are rounded to multiples of it, and are at least as many. Slimmable networks: 8.

    Returns:
        The slimmable network; `module` is left as it was.

    Raises:
        InputError: widths outside (0, 1] or without 1.0; grouped convolutions, other modules with parameters, layers
            that do not fit together, groups or heads that a width would split: each by name.

    >>> net = to_slimmable(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)))
    >>> sub_network(net, 0.25)[0]
    Linear(in_features=4, out_features=8, bias=True)
    """
    widths = checked_widths(widths)
    if multiple < 1:
        raise InputError(f"multiple is at least 1, got {multiple}")
    module = copy.deepcopy(module)
    if type(module) is CausalTransformer:
        return _slimmable_causal(module, multiple)
    leaves = list(layers_of(module))
    mixing = [leaf for _, leaf in leaves if isinstance(leaf, (nn.Linear, nn.Conv2d))]
    if not mixing:
        raise InputError("the network has no Linear or Conv2d whose outputs could be its interface of fixed width")
    converter = _Converter(widths, multiple, mixing[-1])
    for name, leaf in leaves:
        layer = converter(name or type(leaf).__name__, leaf).train(leaf.training)
        if not name:
            return layer
        module.set_submodule(name, layer)
    return module


@torch.enable_grad()
def sub_network(module: nn.Module, width: float) -> nn.Module:
    """The network at one width as ordinary modules with copies of the values they need.

    `Normalize` becomes an RMSNorm with the constant gain 1 / sqrt(d), which is the same function.
    """
    return copy.deepcopy(module, {id(layer): layer.plain(width) for layer in _slimmables(module)})  # instead of those


def forward_flops(module: nn.Module, width: float, inputs: Tensor) -> int:
    """FLOPs of one forward pass at a width, as torch counts them on the sub-network.

    FLOPs are 2 x MACs of matrix products, convolutions and attention; norms and activations are not counted.

    >>> forward_flops(to_slimmable(nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 2))), 0.5, torch.zeros(1, 4))
    192
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    network = sub_network(module, width).eval().requires_grad_()
    # with gradients and without fused attention, since the counter knows no fused kernels of the CPU
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(inputs)
    return counter.get_total_flops()


def checked_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """The widths in rising order.

    Raises:
        InputError: a width outside (0, 1], one given twice, or none that is 1.
    """
    found = tuple(sorted(float(width) for width in widths))
    if 1.0 not in found:
        raise InputError(f"widths must include 1.0, got {found}")
    if not all(0 < width <= 1 for width in found) or len(set(found)) != len(found):
        raise InputError(f"widths are above 0, at most 1 and all different, got {found}")
    return found


def _slimmable_causal(model: CausalTransformer, multiple: int) -> CausalTransformer:
    stream, inner = Channels(model.width), Channels(model.width, model.head_width)
    for block in model.blocks:
        attention, mlp = cast(Attention, block.attention), cast(nn.Sequential, block.mlp)
        for name in ("query", "key", "value"):
            setattr(attention, name, SlimmableLinear(getattr(attention, name), stream, inner))
        attention.out = SlimmableLinear(attention.out, inner, stream)
        attention.__class__ = SlimmableHeads
        hidden = Channels(cast(nn.Linear, mlp[0]).out_features, multiple)
        mlp[0] = SlimmableLinear(cast(nn.Linear, mlp[0]), stream, hidden)
        mlp[2] = SlimmableLinear(cast(nn.Linear, mlp[2]), hidden, stream)
    return model.train(model.training)


def _slimmables(module: nn.Module) -> Iterator[Slimmable]:
    """The outermost ones."""
    if isinstance(module, Slimmable):
        yield module
        return
    for child in module.children():
        yield from _slimmables(child)


def layers_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested `nn.Sequential`s with their names, in the order in which they run."""
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for key, child in module._modules.items():
        yield from layers_of(cast(nn.Module, child), f"{name}.{key}" if name else key)


class _Converter:
    """Follows the channels from layer to layer."""

    def __init__(self, widths: tuple[float, ...], multiple: int, last: nn.Linear | nn.Conv2d) -> None:
        self.widths, self.multiple, self.last = widths, multiple, last
        self.current: Channels | None = None
        self.images = False  # whether channels are dimension 1, so that flattening leaves a prefix a prefix
        self.like = last.weight

    def _inputs(self, name: str, count: int) -> Channels:
        if self.current is None:
            self.current = Channels(count)
        repeat, rest = divmod(count, self.current.full)
        if rest or not repeat:
            raise InputError(f"layer {name!r} takes {count} channels, the layers before it give {self.current.full}")
        if repeat > 1 and self.current.multiple is not None and not self.images:
            raise InputError(f"layer {name!r} reads flattened tokens, whose channels cannot be slimmed; pool them")
        return replace(self.current, repeat=repeat)

    def _outputs(self, layer: nn.Module, count: int) -> Channels:
        self.current = Channels(count, None if layer is self.last else self.multiple)
        return self.current

    def __call__(self, name: str, layer: nn.Module) -> nn.Module:
        kind = type(layer)
        if kind is nn.Linear:
            layer = cast(nn.Linear, layer)
            inputs = self._inputs(name, layer.in_features)
            self.images = False
            return SlimmableLinear(layer, inputs, self._outputs(layer, layer.out_features))
        if kind is nn.Conv2d:
            layer = cast(nn.Conv2d, layer)
            if layer.groups != 1:
                raise InputError(f"layer {name!r} is a convolution in {layer.groups} groups; slimming needs groups=1")
            inputs = self._inputs(name, layer.in_channels)
            self.images = True
            return SlimmableConv2d(layer, inputs, self._outputs(layer, layer.out_channels))
        if kind is nn.Embedding and _simple(cast(nn.Embedding, layer)):
            layer = cast(nn.Embedding, layer)
            return SlimmableEmbedding(layer, self._outputs(layer, layer.embedding_dim))
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            layer = cast(nn.BatchNorm2d, layer)
            return SlimmableBatchNorm(layer, self._inputs(name, layer.num_features), self.widths)
        if kind is nn.GroupNorm:
            layer = cast(nn.GroupNorm, layer)
            channels = self._inputs(name, layer.num_channels)
            self._divisible(name, channels, layer.num_channels // layer.num_groups, "group")
            return SlimmableGroupNorm(layer, channels)
        if kind is nn.LayerNorm and len(cast(nn.LayerNorm, layer).normalized_shape) == 1:
            layer = cast(nn.LayerNorm, layer)
            return SlimmableLayerNorm(layer, self._inputs(name, layer.normalized_shape[0]))
        if kind is Normalize and not self.images and self.current is not None:
            return SlimmableNormalize(self.current, self.like)
        if kind is nn.TransformerEncoderLayer:
            return self._transformer_layer(name, cast(nn.TransformerEncoderLayer, layer))
        if next(layer.parameters(), None) is None and next(layer.buffers(), None) is None and kind is not Normalize:
            return layer
        raise InputError(
            f"layer {name!r}, a {kind.__name__}, cannot be slimmed here; build the network as nn.Sequential of the "
            "layers that to_slimmable lists"
        )

    def _transformer_layer(self, name: str, layer: nn.TransformerEncoderLayer) -> nn.Module:
        attention = layer.self_attn
        if not attention.batch_first:
            raise InputError(f"layer {name!r} takes (T, N, d); make it with batch_first=True")
        stream = self._inputs(name, attention.embed_dim)
        if stream.repeat > 1:
            raise InputError(f"layer {name!r} has {attention.embed_dim} channels, the stream has {stream.full}")
        self._divisible(name, stream, attention.head_dim, "head")
        return SlimmableTransformerLayer(layer, stream, Channels(layer.linear1.out_features, self.multiple))

    def _divisible(self, name: str, channels: Channels, size: int, part: str) -> None:
        for width in self.widths:
            if channels.at(width) % size:
                raise InputError(
                    f"layer {name!r} has {size} channels a {part}, which width {width:g} would split with its "
                    f"{channels.at(width)} channels; give multiple={size} or other widths"
                )


def _simple(layer: nn.Embedding) -> bool:
    return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
