"""A small decoder-only transformer whose every part can be read: the sequence model of the studies.

    x = E[tokens] (+ positions);  x += attention(LN(x));  x += MLP(LN(x))  for each block;  logits = W LN(x)
    z_h = q_h . k_h / sqrt(d_h) over the past,  attention = softmax(z) v

Pre-LN blocks, GELU MLP, no biases and an untied head by default. With `qk_norm`, q_h and k_h go through a LayerNorm
over the head's dimension (a learned gain, no bias) before the positions are applied, and then
|z_h| <= sqrt(d_h) * max|gain_q| * max|gain_k|.

Use it where attention has to be looked at or changed: length generalisation, in-context learning, circuits,
stability. Attention runs fused; as soon as somebody hooks `attention.scores` (the logits z, future -inf) or
`attention.pattern` (the probabilities) of a block, that block computes them one after the other, with the same
result. For serving or long contexts take a model of `transformers` instead: there is no key-value cache here.

Values are drawn from `seed`: matrices normal with variance 1 / fan_in, embeddings with variance 1 (a tied embedding
has variance 1 / width and is scaled by sqrt(width) at the input), gains 1, biases 0.
Rotary positions: RoFormer (2021, arXiv 2104.09864). Sinusoidal: Attention Is All You Need (2017, arXiv 1706.03762).
qk-layernorm: Scaling Vision Transformers to 22 Billion Parameters (2023, arXiv 2302.05442).
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = ["Attention", "AttentionScores", "CausalTransformer", "Positions"]

Positions = Literal["rotary", "learned", "sinusoidal", "none"]
EPS = 1e-6  # of every LayerNorm: small, so that the logits are blind to the scale of W_q and W_k under qk_norm
Rotation = tuple[Tensor, Tensor]


class AttentionScores(nn.Module):
    """`(q, k)`, both `(N, heads, T, d_h)` -> attention logits `(N, heads, T, T)`, -inf where a key is in the future."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return logits.masked_fill(future, -torch.inf)


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        width: of the stream; `heads` divides it.
        heads: each has `width / heads` dimensions, side by side in the input of `out`.
        qk_norm: LayerNorm of queries and keys over the head's dimension.
        bias: of the four linear layers.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=bias) for _ in range(4))
        size = width // heads
        self.query_norm = nn.LayerNorm(size, eps=EPS, bias=False) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(size, eps=EPS, bias=False) if qk_norm else nn.Identity()
        self.scores = AttentionScores()
        self.pattern = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # (N, heads, T, d_h)
        q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        if _watched(self.scores) or _watched(self.pattern):
            mixed = self.pattern(self.scores(q, k)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool, bias: bool, mlp_ratio: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPS, bias=bias)
        self.attention = Attention(width, heads, qk_norm=qk_norm, bias=bias)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS, bias=bias)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width, bias=bias), nn.GELU(), nn.Linear(mlp_ratio * width, width, bias=bias)
        )

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class CausalTransformer(nn.Module):
    """`model(tokens)`: `(N, T)` int64 -> logits of the next token `(N, T, vocabulary)`.

    `model.blocks[i].attention` has `scores`, `pattern` and `out` to hook. `model.features(x)` takes a stream
    `(N, T, width)` that does not come from tokens (numbers, images) through the blocks.

    Args:
        vocabulary: number of tokens.
        width: of the residual stream; a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads a block.
        context: the most positions that are taken, T <= context.
        positions: `rotary` (needs an even `width / heads`), `learned`, `sinusoidal` (added to the embeddings), or
            `none` (the causal mask alone tells positions apart).
        qk_norm: LayerNorm of queries and keys over the head's dimension.
        bias: biases in linear layers and LayerNorms (never in the head and in `qk_norm`).
        tied: the head is the embedding.
        mlp_ratio: hidden width of the MLP over `width`.
        seed: of the initial values; torch's global generator is not touched.

    Raises:
        InputError: sizes that do not fit; when called: tokens of another shape or type, outside the vocabulary, or
            more of them than `context`.

    >>> CausalTransformer(10, width=8, depth=1, heads=2)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        context: int = 256,
        positions: Positions = "rotary",
        qk_norm: bool = False,
        bias: bool = False,
        tied: bool = False,
        mlp_ratio: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "width": width, "depth": depth, "heads": heads, "context": context,
                 "mlp_ratio": mlp_ratio}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} is at least 1, got {size}")
        if width % heads:
            raise InputError(f"width is a multiple of heads, got width {width} and {heads} heads")
        if positions not in get_args(Positions):
            raise InputError(f"positions is one of {', '.join(get_args(Positions))}, got {positions!r}")
        if positions == "rotary" and (width // heads) % 2:
            raise InputError(f"rotary positions need an even width / heads, got {width} / {heads} = {width // heads}")
        if positions == "sinusoidal" and width % 2:
            raise InputError(f"sinusoidal positions need an even width, got {width}")
        self.vocabulary, self.width, self.context, self.positions = vocabulary, width, context, positions
        self.head_width = width // heads
        with torch.device("meta"):  # the default initialisation would draw from torch's global generator
            self.embedding = nn.Embedding(vocabulary, width)
            self.position_embedding = nn.Embedding(context, width) if positions == "learned" else None
            self.blocks = nn.ModuleList(Block(width, heads, qk_norm, bias, mlp_ratio) for _ in range(depth))
            self.norm = nn.LayerNorm(width, eps=EPS, bias=bias)
            self.head = nn.Linear(width, vocabulary, bias=False)
        self.to_empty(device="cpu")
        if tied:
            self.head.weight = self.embedding.weight
        self.scale = width**0.5 if tied else 1.0
        self._draw(seed, tied)

    @torch.no_grad()
    def _draw(self, seed: int, tied: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                shared = tied and module is self.embedding
                nn.init.normal_(module.weight, std=self.width**-0.5 if shared else 1.0, generator=generator)
            elif isinstance(module, nn.Linear) and not (tied and module is self.head):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, *, start: int = 0) -> Tensor:
        """Logits `(N, T, vocabulary)`; the first token stands at position `start`, `start + T <= context`."""
        self._check(tokens)
        return self.head(self.features(self.embedding(tokens) * self.scale, start=start))

    def features(self, x: Tensor, *, start: int = 0) -> Tensor:
        """A stream `(N, T, width)` -> what the head reads, `(N, T, width)`; positions are added here."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise InputError(f"a stream is (N, T, {self.width}), got {tuple(x.shape)}")
        end = start + x.shape[1]
        if start < 0 or end > self.context:
            raise InputError(
                f"the model has positions 0 to {self.context - 1}, got {start} to {end - 1}; raise context or cut them"
            )
        rotation = None
        if self.positions == "rotary":
            rotation = _angles(start, end, self.head_width, x)
        elif self.positions == "sinusoidal":
            cosine, sine = _angles(start, end, self.width, x)
            x = x + torch.cat([sine, cosine], dim=-1)
        elif self.position_embedding is not None:
            x = x + cast(Tensor, self.position_embedding.weight)[start:end]
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or not tokens.numel():
            raise InputError(f"tokens are (N, T) int64 and not empty, got {tuple(tokens.shape)} {tokens.dtype}")
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise InputError(
                f"tokens are 0 to {self.vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}; "
                "make the vocabulary larger or check the tokeniser"
            )


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _angles(start: int, end: int, size: int, like: Tensor) -> Rotation:
    """Cosine and sine of position * 10000^(-2i / size), `(T, size / 2)`, in at least float32 before the cast."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = 10000.0 ** -(torch.arange(0, size, 2, device=like.device, dtype=dtype) / size)
    angles = torch.arange(start, end, device=like.device, dtype=dtype)[:, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the pairs (i, i + d_h / 2) of `(N, heads, T, d_h)` by each position's angles."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
