"""Lanes: small streams of tokens that run beside a frozen transformer, through the transformer's own blocks.

The main stream x is the frozen model, without gradient. A lane is a class token c and S selectors e. In each block
(pre-LN; its norms, projections and MLP serve both streams):

    xn = LN1(x)                                             # (N, d), all tokens of the image
    m  = softmax(LN1(e) xn^T / sqrt(d)) xn                  # (S, d), over tokens: S summaries of the image
    c <- c + W_o attention(W_q LN1(c); W_k, W_v [P ; LN1(c) ; m])    # P: K prefix prompts in the first blocks, per head
    e <- e + LN1(e)                                         # selectors never read the image
    c, e <- c + MLP(LN2(c)), e + MLP(LN2(e))
    x <- block(x)

A lane's feature is `LN(c) / |LN(c)|` after the last block. c begins as the model's CLS embedding without position.

Use them beside a model that is to stay as it is, where its class token should look for other things: what a lane trains
is S d + 2 P K d numbers. The model is described by a `LaneBackbone`.

Cost, for one image and T lanes: the main stream once, without its last block, and in each block for each lane
`4 S N d` for the summaries and about `(4 S + 24) d^2` operations for the rest; a block of the main stream takes
`24 N d^2 + 4 N^2 d`. Selectors have no batch axis: their way through the blocks is computed once a step while they
learn, and once in all afterwards (`LaneStack`). All lanes of a stack run in one batch.

Paper: De Min et al., "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning",
CoLLAs 2024, arXiv 2405.15633. The same numbers as its block computes, with less work: queries, output projection and
MLP of tokens whose results are dropped there are not computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import wide
from .lane_backbone import LaneBackbone, frozen

__all__ = ["Lane", "LaneNet", "LaneStack", "evolve", "summarise"]


class Lane(nn.Module):
    """What one task trains: selectors `(S, d)`, prefix `keys` and `values` `(P, K, d)`, `weight` `(C, d)` and `bias`.

    Args:
        backbone: what it runs beside.
        classes: outputs it scores, in the order of its rows.
        selectors: S, at least 1.
        prompts: K, at least 0.
        depth: P, the first blocks that have prompts; no more than there are.
        generator: of the beginning: orthonormal selectors, keys and values, rows N(0, 0.02^2), biases 0.
        like: begin with its selectors and prompts instead.
    """

    def __init__(
        self,
        backbone: LaneBackbone,
        classes: Sequence[int],
        *,
        selectors: int,
        prompts: int,
        depth: int,
        generator: torch.Generator,
        like: Lane | None = None,
    ) -> None:
        super().__init__()
        if not classes or len(set(classes)) != len(classes):
            raise InputError(f"a lane scores classes that differ, at least one, got {list(classes)}")
        if selectors < 1 or prompts < 0 or not 0 <= depth <= len(backbone.blocks):
            raise InputError(
                f"selectors are at least 1, prompts at least 0 and depth 0 to {len(backbone.blocks)}, got {selectors}, "
                f"{prompts} and {depth}"
            )
        self.classes, width = tuple(classes), backbone.width

        def put(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.detach().to(backbone.device, backbone.dtype, copy=True))

        def orthogonal(rows: int) -> Tensor:
            value = torch.empty(rows, width)
            return nn.init.orthogonal_(value, generator=generator) if rows else value

        if like is None:
            self.selectors = put(orthogonal(selectors))
            drawn = [orthogonal(prompts) for _ in range(2 * depth)]
            prefixes = torch.stack(drawn) if drawn else torch.empty(0, prompts, width)
            self.keys, self.values = (put(part) for part in prefixes.view(2, depth, prompts, width))
        else:
            self.selectors, self.keys, self.values = put(like.selectors), put(like.keys), put(like.values)
        self.weight = put(0.02 * torch.randn(len(classes), width, generator=generator))
        self.bias = put(torch.zeros(len(classes)))

    def features(self, backbone: LaneBackbone, inputs: Any) -> Tensor:
        """`(B, d)` of unit length; the gradient reaches the lane and nothing else."""
        with frozen(backbone.module):
            selecting = evolve(backbone, self.selectors)
            return _run(backbone, inputs, selecting[:, None], self.keys[:, None], self.values[:, None])[:, 0]

    def scores(self, backbone: LaneBackbone, inputs: Any) -> Tensor:
        """`(B, classes of the lane)`."""
        return F.linear(self.features(backbone, inputs), self.weight, self.bias)


def evolve(backbone: LaneBackbone, selectors: Tensor) -> Tensor:
    """What a lane's selectors `(S, d)` ask for in each block, `(blocks, S, d)`: the same for every image."""
    asked = []
    selectors = selectors.to(backbone.cls.dtype)
    for block in backbone.blocks:
        normed = block.norm1(selectors)
        asked.append(normed)
        selectors = selectors + normed
        selectors = selectors + block.mlp(block.norm2(selectors))
    return torch.stack(asked)


def summarise(selectors: Tensor, tokens: Tensor) -> Tensor:
    """Weighted means of an image's tokens: `softmax(e x^T / sqrt(d)) x`.

    Args:
        selectors: `(..., S, d)`, the same for all images.
        tokens: `(B, N, d)`.

    Returns:
        `(B, ..., S, d)`.

    >>> summarise(torch.zeros(1, 2), torch.tensor([[[1.0, 0.0], [3.0, 2.0]]]))
    tensor([[[2., 1.]]])
    """
    flat = selectors.reshape(-1, selectors.shape[-1])
    logits = flat @ tokens.transpose(1, 2) / tokens.shape[-1] ** 0.5  # (B, all S, N)
    shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(tokens.dtype)
    return (shares @ tokens).view(len(tokens), *selectors.shape)


def _run(backbone: LaneBackbone, inputs: Any, asked: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Features `(B, T, d)` of T lanes; `asked` `(blocks, T, S, d)`, prefixes `(P, T, K, d)`."""
    blocks, (_, lanes, count, width) = backbone.blocks, asked.shape
    keys, values = (part.to(backbone.cls.dtype) for part in (keys, values))
    with torch.no_grad():
        stream = backbone.embed(inputs)  # (B, N, d)
    if stream.ndim != 3 or stream.shape[-1] != width:
        raise InputError(f"the backbone embeds to {tuple(stream.shape)}, expected (B, N, {width})")
    if count > stream.shape[1]:
        raise InputError(f"{count} selectors cannot summarise {stream.shape[1]} tokens; lower selectors")
    batch = len(stream)
    cls = backbone.cls.detach().reshape(1, 1, width).expand(batch, lanes, width)
    for index, block in enumerate(blocks):
        with torch.no_grad():
            tokens = block.norm1(stream)
        own = block.norm1(cls).unsqueeze(2)  # (B, T, 1, d)
        context = torch.cat([own, summarise(asked[index], tokens)], 2)  # (B, T, 1 + S, d)
        key, value = block.key(context), block.value(context)
        if index < len(keys):
            key, value = (
                torch.cat([prefix[index].expand(batch, *prefix.shape[1:]), part], 2)
                for prefix, part in ((keys, key), (values, value))
            )
        cls = cls + block.project(block.attention(block.query(own), key, value).squeeze(2))
        cls = cls + block.mlp(block.norm2(cls))
        if index + 1 < len(blocks):
            with torch.no_grad():
                stream = block.whole(stream)
    return F.normalize(wide(backbone.norm(cls)), dim=-1)


class LaneStack:
    """Trained lanes of one shape side by side, ready to answer; a snapshot.

    Args:
        backbone: what they run beside.
        lanes: at least one; their classes must differ.
    """

    @torch.no_grad()
    def __init__(self, backbone: LaneBackbone, lanes: Sequence[Lane]) -> None:
        self.backbone = backbone
        with frozen(backbone.module):
            self.asked = torch.stack([evolve(backbone, lane.selectors) for lane in lanes], 1)  # (blocks, T, S, d)
        self.keys = torch.stack([lane.keys for lane in lanes], 1)  # (P, T, K, d)
        self.values = torch.stack([lane.values for lane in lanes], 1)
        self.weight = torch.cat([lane.weight for lane in lanes])  # (C, d)
        self.bias = torch.cat([lane.bias for lane in lanes])
        numbers = [number for lane in lanes for number in lane.classes]
        if len(set(numbers)) != len(numbers):
            raise InputError("two lanes score the same class; give lanes whose classes differ")
        self.classes = torch.tensor(numbers, device=self.bias.device)
        owner = torch.tensor([i for i, lane in enumerate(lanes) for _ in lane.classes], device=self.bias.device)
        self.owns = owner == torch.arange(len(lanes), device=self.bias.device).unsqueeze(1)  # (T, C)

    @torch.no_grad()
    def scores(self, inputs: Any) -> Tensor:
        """`(B, C)`, each class from its own lane, in the order of `classes`."""
        with frozen(self.backbone.module):
            features = _run(self.backbone, inputs, self.asked, self.keys, self.values)  # (B, T, d)
        found = F.linear(features, self.weight, self.bias)  # (B, T, C)
        return found.masked_fill(~self.owns, 0).sum(1)


class LaneNet(nn.Module):
    """One lane with a row for every output, as an ordinary module: what `MultiLane` is compared with.

    Args:
        backbone: not a submodule: parameters and state are the lane's alone.
        outputs: size of the output space.
        selectors, prompts, depth: as for `Lane`.
        seed: of the beginning.
    """

    def __init__(
        self,
        backbone: LaneBackbone,
        outputs: int,
        *,
        selectors: int = 20,
        prompts: int = 20,
        depth: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        generator = torch.Generator().manual_seed(seed)
        depth = min(depth, len(backbone.blocks))
        self.lane = Lane(
            backbone, range(outputs), selectors=selectors, prompts=prompts, depth=depth, generator=generator
        )

    def forward(self, inputs: Any) -> Tensor:
        """`(B, outputs)`."""
        return self.lane.scores(self.backbone, inputs)
