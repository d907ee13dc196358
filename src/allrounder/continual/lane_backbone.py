"""What lanes need to know of a frozen transformer: its embedding, its class token and the parts of its pre-LN blocks.

`LaneBackbone` and `LaneBlock` describe a model by callables. `vit_backbone` describes a transformers ViT,
`torch_backbone` a model of `nn.TransformerEncoderLayer`; anything else that is pre-LN, attends over all tokens and has
a class token can be described by hand. Nothing is copied: the parts are the model's own modules, hooks and adapters
inside them included. A description is compared with its blocks once, on random tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import evaluating, wide
from ..nets.prompts import encoder_layers

__all__ = ["LaneBackbone", "LaneBlock", "frozen", "torch_backbone", "vit_backbone"]

Map = Callable[[Tensor], Tensor]
PROBE = 33  # tokens of the stream on which a description is compared with its block


@dataclass(frozen=True)
class LaneBlock:
    """One pre-LN block, `x + project(attention(query, key, value of norm1(x)))`, then `x + mlp(norm2(x))`.

    Args:
        norm1, query, key, value, project, norm2, mlp: its parts, `(..., d) -> (..., d)`. Heads lie side by side in d.
        heads: of its attention; scale `1 / sqrt(d / heads)`.
        whole: the block itself, `(B, N, d) -> (B, N, d)`; it moves the main stream.
    """

    norm1: Map
    query: Map
    key: Map
    value: Map
    project: Map
    norm2: Map
    mlp: Map
    heads: int
    whole: Map

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`(..., n, d)` and twice `(..., m, d)` -> `(..., n, d)`, without the output projection."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


@dataclass(frozen=True, eq=False)
class LaneBackbone:
    """A frozen transformer, as lanes use it. Copies share it.

    Args:
        module: all its parameters. It is in evaluation mode and without gradient while it is used.
        embed: inputs -> tokens `(B, N, d)` of the first block, positions added.
        cls: the CLS embedding without position, d entries in any shape; give the parameter itself.
        blocks: its blocks, at least one.
        norm: the norm after the last block.

    Raises:
        InputError: no blocks, heads that do not divide d, or a block that is not what its parts say: post-LN, windowed
            or biased attention, scaled residuals.
    """

    module: nn.Module
    embed: Callable[[Any], Tensor]
    cls: Tensor
    blocks: Sequence[LaneBlock]
    norm: Map

    def __post_init__(self) -> None:
        if not self.blocks:
            raise InputError("a backbone for lanes needs at least one block")
        tokens = torch.randn(1, PROBE, self.width, generator=torch.Generator().manual_seed(0))
        tokens = tokens.to(self.cls.device, self.cls.dtype)
        with torch.no_grad(), frozen(self.module):
            for index, block in enumerate(self.blocks):
                if self.width % block.heads:
                    raise InputError(
                        f"block {index} has {block.heads} heads, which do not divide the width {self.width}"
                    )
                normed = block.norm1(tokens)
                mixed = block.attention(block.query(normed), block.key(normed), block.value(normed))
                made = tokens + block.project(mixed)
                made = made + block.mlp(block.norm2(made))
                whole = block.whole(tokens)
                error = wide(made - whole).abs().max() / wide(whole - tokens).abs().max()
                if not error <= max(1e-3, 30 * torch.finfo(tokens.dtype).eps):
                    raise InputError(
                        f"block {index} is not a pre-LN block with attention over all tokens: its parts give another "
                        f"result than the block itself (off by {error:.2g}); lanes cannot run through windowed or "
                        "biased attention, post-LN blocks or scaled residuals"
                    )

    @property
    def width(self) -> int:
        return self.cls.numel()

    @property
    def device(self) -> torch.device:
        return self.cls.device

    @property
    def dtype(self) -> torch.dtype:
        """Of lanes: the model's own, at least float32."""
        return torch.promote_types(self.cls.dtype, torch.float32)

    def fingerprint(self) -> str:
        """Changes with any weight of the module."""
        found = 0
        for value in self.module.state_dict().values():
            found = zlib.crc32(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data, found)
        return f"{found:08x}"

    def __deepcopy__(self, memo: dict) -> LaneBackbone:
        return self


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for its parameters inside the block; afterwards all as it was."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(module):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def vit_backbone(model: nn.Module) -> LaneBackbone:
    """Of a transformers `ViTModel`, or a model with one at `vit`. Inputs: `pixel_values`, as a tensor or in a dict.

    Raises:
        InputError: for another architecture, and where there is no CLS embedding.
    """
    model = getattr(model, "vit", model)
    embeddings: Any = getattr(model, "embeddings", None)
    if not isinstance(getattr(embeddings, "cls_token", None), Tensor) or not hasattr(model, "layernorm"):
        raise InputError(
            f"{type(model).__name__} is not a ViTModel with a CLS embedding; describe it with LaneBackbone if it is a "
            "pre-LN transformer that has one"
        )

    def described(layer: Any) -> LaneBlock:
        attention = layer.attention
        return LaneBlock(
            layer.layernorm_before, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            layer.layernorm_after, layer.mlp, attention.num_attention_heads, layer,
        )  # fmt: skip

    try:
        blocks = [described(layer) for layer in encoder_layers(model)]
    except AttributeError as error:
        raise InputError(f"a layer of {type(model).__name__} is not that of a ViT ({error})") from error

    def embed(inputs: Any) -> Tensor:
        pixels = inputs["pixel_values"] if isinstance(inputs, Mapping) else inputs
        return embeddings(pixels.to(embeddings.cls_token.dtype))

    return LaneBackbone(model, embed, embeddings.cls_token, blocks, model.layernorm)  # type: ignore[arg-type]


def torch_backbone(
    module: nn.Module, layers: Sequence[nn.Module], *, embed: Callable[[Any], Tensor], cls: Tensor, norm: Map
) -> LaneBackbone:
    """Of `nn.TransformerEncoderLayer`s with `norm_first=True` and `batch_first=True`.

    Args:
        module: holds the layers and all else that `embed` and `norm` use.
        layers: the blocks.
        embed, cls, norm: as for `LaneBackbone`.
    """

    def part(attention: nn.MultiheadAttention, number: int, tokens: Tensor) -> Tensor:
        bias = attention.in_proj_bias
        own = None if bias is None else bias.chunk(3)[number]
        return F.linear(tokens, attention.in_proj_weight.chunk(3)[number], own)

    def mlp(layer: Any, tokens: Tensor) -> Tensor:
        return layer.linear2(layer.activation(layer.linear1(tokens)))

    blocks = []
    for layer in layers:
        if not isinstance(layer, nn.TransformerEncoderLayer) or not layer.self_attn.batch_first:
            raise InputError("layers must be nn.TransformerEncoderLayer with norm_first=True and batch_first=True")
        attention = layer.self_attn
        query, key, value = (partial(part, attention, number) for number in range(3))
        blocks.append(
            LaneBlock(
                layer.norm1, query, key, value, attention.out_proj, layer.norm2, partial(mlp, layer),
                attention.num_heads, layer,
            )
        )  # fmt: skip
    return LaneBackbone(module, embed, cls, blocks, norm)
