"""Bottleneck adapters beside the MLP of every block of a transformer, by hooks: no copied model, no changed weights.

    x_out = x + MLP(norm(x)) + scale * (W_up relu(W_down x + b_down) + b_up)

with x the stream of tokens that enters the second half of the block (after attention, before its norm). In blocks that
normalise last (BERT, MiniLM, DistilBERT) the adapter is added before that norm too: `norm(x + MLP(x) + adapter(x))`.
`W_up` and the biases begin at zero: a new adapter changes nothing, bit for bit.

One set of adapters is four tensors over all L blocks, so a mean or a merge of sets is one operation for each of them:
`down (L, r, d)`, `down_bias (L, r)`, `up (L, d, r)`, `up_bias (L, d)`. Several sets, stacked to `(S, L, ...)`, can
serve one batch: example i runs with set `which[i]`, as one batched matrix product over r in each block.

Use it to train a few numbers beside a frozen backbone, and to serve many tasks from one. Not for convolutions: the
adapter reads and writes tokens of one width.

Cost: `L (2 d r + d + r)` numbers a set (ViT-B/16, r = 16: 304,320), and `4 d r` operations a token and block, about
r / 6d of the block's own. A mixed batch gathers the adapters of each example: `2 d r` numbers for each.

Where the two ends of an adapter are in a block is known for transformers' ViT, CLIP, BERT, RoBERTa and DistilBERT, for
timm's ViT and for allrounder's `CausalTransformer`; otherwise give `places`.

Papers: Houlsby et al., ICML 2019, arXiv 1902.00751 (bottleneck adapters); Chen et al., "AdaptFormer", NeurIPS 2022,
arXiv 2205.13535 (beside the MLP, scaled by 0.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .prompts import Insertion

__all__ = ["adapter_places", "block_adapters", "insert_adapters"]

Places = Sequence[tuple[str, str]]

# within a block: what is added to, what is read, and a module that tells look-alikes apart
KINDS = (
    ("mlp", "layernorm_after", None),  # ViT
    ("mlp", "layer_norm2", None),  # CLIP, SigLIP
    ("mlp", "norm2", "ls2"),  # timm
    ("mlp", "mlp_norm", None),  # allrounder
    ("ffn", "ffn", "sa_layer_norm"),  # DistilBERT
    ("output.dense", "intermediate", "output.LayerNorm"),  # BERT, RoBERTa
)
SHAPES = {"down": 3, "down_bias": 2, "up": 3, "up_bias": 2}


def _has(module: nn.Module, path: str | None) -> bool:
    found: Any = module
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    return isinstance(found, nn.Module)


def adapter_places(model: nn.Module) -> list[tuple[str, str]]:
    """For each block the names of the module whose output an adapter is added to, and of the one whose input it reads.

    Raises:
        InputError: when no block of a known kind is found.

    >>> from .causal import CausalTransformer
    >>> adapter_places(CausalTransformer(10, width=8, depth=2, heads=2))
    [('blocks.0.mlp', 'blocks.0.mlp_norm'), ('blocks.1.mlp', 'blocks.1.mlp_norm')]
    """
    found = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for adds, reads, sign in KINDS:
            if _has(module, adds) and _has(module, reads) and _has(module, sign):
                found.append((prefix + adds, prefix + reads))
                break
    if not found:
        raise InputError(
            f"{type(model).__name__} has no token blocks with an MLP of their own that are known here "
            "(adapters are not for convolutions); give "
            "places=[(module whose output is added to, module whose input is read), ...]"
        )
    return found


def _modules(model: nn.Module, places: Places | None) -> list[tuple[nn.Module, nn.Module]]:
    places = adapter_places(model) if places is None else list(places)
    modules = dict(model.named_modules())
    for pair in places:
        if missing := [name for name in pair if name not in modules]:
            raise InputError(f"the model has no module {missing[0]!r}; see named_modules()")
    if len({adds for adds, _ in places}) != len(places) or not places:
        raise InputError("places name at least one block, and each block once")
    return [(modules[adds], modules[reads]) for adds, reads in places]


def _width(reads: nn.Module) -> int:
    """Size of a token that a module takes."""
    for part in reads.modules():
        if isinstance(part, nn.LayerNorm):
            return part.normalized_shape[-1]
        if isinstance(part, nn.Linear):
            return part.in_features
    raise InputError(f"the size of a token cannot be read off a {type(reads).__name__}; give width")


def block_adapters(
    model: nn.Module,
    rank: int = 16,
    *,
    places: Places | None = None,
    width: int | None = None,
    seed: int = 0,
) -> nn.ParameterDict:
    """A new set of adapters for a model, which does nothing yet; on the model's device, in float32 or wider.

    Args:
        model: a transformer.
        rank: r, size of the bottleneck, at least 1. Paper: 16.
        places: for each block (module whose output is added to, module whose input is read), as in `named_modules()`.
            Default: `adapter_places(model)`.
        width: d, size of a token. Default: what the blocks' norms or linear layers say.
        seed: of `down`, which is uniform within 1 / sqrt(d).

    Returns:
        Parameters `down (L, r, d)`, `down_bias (L, r)`, `up (L, d, r)`, `up_bias (L, d)`.

    Raises:
        InputError: a rank below 1, unknown names, blocks of unlike width.
    """
    if rank < 1:
        raise InputError(f"rank is at least 1, got {rank}")
    found = _modules(model, places)
    if width is None:
        widths = {_width(reads) for _, reads in found}
        if len(widths) > 1:
            raise InputError(f"the blocks have tokens of sizes {sorted(widths)}; give places of one width")
        (width,) = widths
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator, count = torch.Generator().manual_seed(seed), len(found)
    down = (torch.rand(count, rank, width, generator=generator, dtype=torch.float64) * 2 - 1) * width**-0.5
    start = {
        "down": down,
        "down_bias": torch.zeros(count, rank),
        "up": torch.zeros(count, width, rank),
        "up_bias": torch.zeros(count, width),
    }
    dtype = torch.promote_types(like.dtype, torch.float32)
    return nn.ParameterDict({name: nn.Parameter(value.to(like.device, dtype)) for name, value in start.items()})


def insert_adapters(
    model: nn.Module,
    adapters: Mapping[str, Tensor] | nn.ParameterDict,
    *,
    which: Tensor | None = None,
    places: Places | None = None,
    scale: float = 0.1,
    dropout: float = 0.0,
) -> Insertion:
    """Put adapters into a model for as long as the result is in place: until `remove()`, or the end of a `with` block.

    Args:
        model: a transformer; it is called as before. Gradients flow into the adapters, and through the model.
        adapters: what `block_adapters` gives, `(L, ...)`; or stacked sets `(S, L, ...)`, with `which`. Read at each
            call, so they may be trained meanwhile; cast to the stream's dtype where they enter.
        which: `(B,)` integers, the set of each example. Needed for stacked sets only.
        places: as for `block_adapters`.
        scale: factor of the adapter's output. Paper: 0.1.
        dropout: of the bottleneck, in [0, 1), from torch's global generator; whether the model trains makes no
            difference to it. Paper: 0.1 in training.

    Raises:
        InputError: adapters for another number of blocks or of other shapes, a set that is not there; when called: a
            stream of another width, or a batch of another size than `which`.

    >>> from .causal import CausalTransformer
    >>> model, tokens = CausalTransformer(10, width=8, depth=2, heads=2), torch.tensor([[1, 2, 3]])
    >>> before = model(tokens)
    >>> with insert_adapters(model, block_adapters(model, 4)):
    ...     print(torch.equal(model(tokens), before))
    True
    """
    found = _modules(model, places)
    _check(adapters, len(found), which)
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is within [0, 1), got {dropout:g}")
    streams: dict[int, Tensor] = {}

    def read(index: int) -> Callable:
        def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
            streams[index] = next(value for value in [*arguments, *keywords.values()] if isinstance(value, Tensor))

        return hook

    def add(index: int) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            return output + scale * _bottleneck(streams.pop(index), adapters, index, which, dropout)

        return hook

    handles = []
    for index, (adds, reads) in enumerate(found):
        handles.append(reads.register_forward_pre_hook(read(index), with_kwargs=True))
        handles.append(adds.register_forward_hook(add(index)))
    return Insertion(handles)


def _check(adapters: Mapping[str, Tensor] | nn.ParameterDict, blocks: int, which: Tensor | None) -> None:
    if odd := sorted(set(adapters.keys()) ^ set(SHAPES)):
        raise InputError(f"adapters are {', '.join(SHAPES)}; {odd[0]!r} is missing or one too many")
    stacked = which is not None
    for name, axes in SHAPES.items():
        if adapters[name].ndim != axes + stacked:
            form = "stacked sets (S, L, ...), to choose from with which" if stacked else "one set (L, ...)"
            raise InputError(f"adapters are {form}; {name!r} has the shape {tuple(adapters[name].shape)}")
        if adapters[name].shape[int(stacked)] != blocks:
            raise InputError(
                f"adapters for {adapters[name].shape[int(stacked)]} blocks do not fit a model with {blocks}"
            )
    if which is not None:
        sets = len(adapters["down"])
        if which.ndim != 1 or which.is_floating_point() or not len(which):
            raise InputError(f"which is (B,) integers, the set of each example, got {tuple(which.shape)} {which.dtype}")
        if not 0 <= int(which.min()) <= int(which.max()) < sets:
            odd = int(which.max()) if int(which.max()) >= sets else int(which.min())
            raise InputError(f"there are {sets} sets of adapters, 0 to {sets - 1}; got {odd}")


def _bottleneck(
    x: Tensor, adapters: Mapping[str, Tensor] | nn.ParameterDict, index: int, which: Tensor | None, dropout: float
) -> Tensor:
    """`(B, ..., d)` -> the same shape: what one block's adapter makes of the stream."""
    part = {name: adapters[name] for name in SHAPES}
    if x.shape[-1] != part["down"].shape[-1]:
        raise InputError(f"adapters for tokens of {part['down'].shape[-1]} do not fit a stream {tuple(x.shape)}")
    if which is None:
        part = {name: value[index].to(x) for name, value in part.items()}
        hidden = F.linear(x, part["down"], part["down_bias"]).relu()
        return F.linear(F.dropout(hidden, dropout), part["up"], part["up_bias"])
    if len(which) != len(x):
        raise InputError(f"which names sets for {len(which)} examples, the batch has {len(x)}")
    chosen = which.to(part["down"].device)
    part = {name: value[:, index][chosen].to(x) for name, value in part.items()}
    tokens = x.reshape(len(x), -1, x.shape[-1])  # (B, T, d)
    hidden = torch.baddbmm(part["down_bias"].unsqueeze(1), tokens, part["down"].mT).relu()  # (B, T, r)
    out = torch.baddbmm(part["up_bias"].unsqueeze(1), F.dropout(hidden, dropout), part["up"].mT)
    return out.view(x.shape)
