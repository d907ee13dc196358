"""Learned tokens inside a transformers encoder, by hooks: the model's code and weights stay as they are.

`insert_prompts` puts tokens into the sequence, once or anew before each of the first layers (deep prompts). After the
last layer the sequence has its old length again, so pooling (CLS, end of text, mean over a mask) needs no change.
`prefix_attention` gives one attention keys and values of its own (prefix prompts), which no token turns into queries.

- ViT: `at` 0, 1 or "end".
- CLIP vision: `at="end"`; the tokens come before the first layer norm.
- BERT: `at=1`, with a mask that is padded on the right.
- CLIP text: `at=1, replace=True, entry=model.embeddings.token_embedding`, so that every token has its position.

Tokens that are inserted come after the position embeddings and have none. With `replace`, the text itself holds
placeholders: any token, for example the start token again, as long as it is not the end of text.

Cost: the tokens' share of the sequence. Prompts may be float32 while the model is float16 or bfloat16: they are cast
where they enter, and their gradient comes back in float32.

Papers: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119 (deep prompts that replace the previous
layer's); Li and Liang, "Prefix-Tuning", ACL 2021, arXiv 2101.00190; Zhou et al., "Conditional Prompt Learning for
Vision-Language Models", CVPR 2022, arXiv 2203.05557 (`meta_net`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import InputError

__all__ = ["Insertion", "deep_prompts", "encoder_layers", "insert_prompts", "meta_net", "prefix_attention"]

LAYERS = ("encoder.layers", "encoder.layer", "layers", "transformer.layer", "layer")
PROJECTIONS = (("k_proj", "v_proj"), ("key", "value"))


def deep_prompts(
    count: int, width: int, depth: int = 1, *, deviation: float = 0.02, first: Tensor | None = None, seed: int = 0
) -> nn.ParameterList:
    """Tokens for the first `depth` layers: parameters `0`, `1`, ... of shape `(count, width)`, float32.

    Args:
        count, width, depth: tokens a layer, size of a token, layers; all at least 1.
        deviation: they begin as N(0, deviation^2). Default 0.02.
        first: `(count, width)`, what those of the first layer begin as (embeddings of words). Copied.
        seed: of the random beginning.

    >>> [tuple(tokens.shape) for tokens in deep_prompts(4, 8, 2)]
    [(4, 8), (4, 8)]
    """
    if min(count, width, depth) < 1:
        raise InputError(f"count, width and depth are at least 1, got {count}, {width} and {depth}")
    if first is not None and first.shape != (count, width):
        raise InputError(f"first has the shape {tuple(first.shape)}, expected {(count, width)}")
    generator = torch.Generator().manual_seed(seed)
    tokens = [deviation * torch.randn(count, width, generator=generator) for _ in range(depth)]
    if first is not None:
        tokens[0] = first.detach().to("cpu", torch.float32, copy=True)
    return nn.ParameterList(nn.Parameter(value) for value in tokens)


def meta_net(features: int, width: int, *, hidden: int | None = None, seed: int = 0) -> nn.Sequential:
    """What makes prompts depend on an example (CoCoOp): its features -> one token, added to each of its prompts.

    `W_2 relu(W_1 f + b_1) + b_2`. The second layer begins at zero, so that prompts begin as if it were not there (the
    paper's code begins it at random).

    Args:
        features: size of f.
        width: size of a token.
        hidden: between the layers. Default and paper: a sixteenth of `features`, at least 1.
        seed: of the first layer, uniform within `1 / sqrt(features)`.

    >>> meta_net(32, 8)(torch.ones(3, 32)).shape
    torch.Size([3, 8])
    """
    hidden = max(1, features // 16) if hidden is None else hidden
    if min(features, width, hidden) < 1:
        raise InputError(f"features, width and hidden are at least 1, got {features}, {width} and {hidden}")
    first, second = (nn.Linear(*sizes, device="meta") for sizes in ((features, hidden), (hidden, width)))
    net = nn.Sequential(first, nn.ReLU(), second).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * features**-0.5)
        for parameter in second.parameters():
            parameter.zero_()
    return net


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of layers of a transformers encoder (BERT, ViT, either tower of CLIP and the like).

    Raises:
        InputError: when there is none at the usual places.
    """
    for name in LAYERS:
        found: Any = model
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList) and len(found):
            return found
    raise InputError(
        f"{type(model).__name__} has no list of layers at {', '.join(LAYERS)}; give the encoder itself, "
        "for example clip.text_model"
    )


class Insertion:
    """Hooks that are in place until `remove()`, or until the end of a `with` block."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks out; the model is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Insertion:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def insert_prompts(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    at: int | Literal["end"] = 0,
    replace: bool = False,
    keep: bool = False,
    entry: nn.Module | None = None,
) -> Insertion:
    """Put tokens into the sequence of an encoder for as long as the result is in place.

    Args:
        model: a transformers encoder, with `embeddings` and a list of layers. An `attention_mask` `(B, T)` that it is
            called with is widened; pad on the right when `at` is above 0.
        prompts: for each of the first layers, tokens `(V, d)`, or `(B, V, d)` with tokens of its own for each example.
            The first are put in at `entry`; each of the others takes the place of what the previous layer made of its
            predecessors. Read at each call, so an `nn.ParameterList` may be trained meanwhile.
        at: position of the first token, from 0; or `end`.
        replace: take the place of tokens that are in the sequence already, instead of making it longer.
        keep: leave inserted tokens in the encoder's output (L2P reads them).
        entry: module whose output `(B, T, d)` they are put into. Default: `model.embeddings`.

    Raises:
        InputError: more prompts than layers, tokens of unlike shapes; when called: another width or batch, a position
            outside the sequence, a mask that is not `(B, T)`.
    """
    layers = encoder_layers(model)
    entry = getattr(model, "embeddings", None) if entry is None else entry
    if entry is None:
        raise InputError(
            f"{type(model).__name__} has no module 'embeddings'; give entry=, whose output is the sequence"
        )
    if not 1 <= len(prompts) <= len(layers):
        raise InputError(f"prompts for {len(prompts)} layers do not fit an encoder with {len(layers)}; lower the depth")
    shapes = {tuple(tokens.shape) for tokens in prompts}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) not in (2, 3) or 0 in shape:
        raise InputError(f"prompts are (V, d) or (B, V, d), of one shape in all layers, got {sorted(shapes)}")
    if at != "end" and (not isinstance(at, int) or at < 0):
        raise InputError(f"at is a position from 0 or 'end', got {at!r}")
    count = shape[-2]

    def span(length: int) -> tuple[int, int]:
        """First and last + 1 of the prompts' places in a sequence that holds them."""
        start = length - count if at == "end" else at
        if start < 0 or start + count > length:
            raise InputError(f"{count} prompts at {at} do not fit a sequence of {length} tokens")
        return start, start + count

    def put(states: Tensor, tokens: Tensor, holds: bool) -> Tensor:
        batch, length, width = states.shape
        start, stop = span(length if holds else length + count)
        if tokens.shape[-1] != width or (tokens.ndim == 3 and len(tokens) != batch):
            raise InputError(f"prompts {tuple(tokens.shape)} do not fit a batch of tokens {tuple(states.shape)}")
        tokens = tokens.to(states.dtype).expand(batch, count, width)
        return torch.cat([states[:, :start], tokens, states[:, stop if holds else start :]], 1)

    def enter(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return put(output, prompts[0], holds=replace)

    def renew(index: int) -> Callable:
        def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return _changed(arguments, keywords, "hidden_states", lambda states: put(states, prompts[index], True), 0)

        return hook

    def drop(module: nn.Module, arguments: tuple, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        start, stop = span(states.shape[1])
        states = torch.cat([states[:, :start], states[:, stop:]], 1)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def widen(mask: Any) -> Any:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise InputError("with prompts inserted, attention_mask must be (B, T) with 0 for padding")
        start, _ = span(mask.shape[1] + count)
        return torch.cat([mask[:, :start], mask.new_ones(len(mask), count), mask[:, start:]], 1)

    handles = [entry.register_forward_hook(enter)]
    handles += [
        layers[index].register_forward_pre_hook(renew(index), with_kwargs=True) for index in range(1, len(prompts))
    ]
    names = list(inspect.signature(model.forward).parameters)
    if not replace and "attention_mask" in names:
        place = names.index("attention_mask")

        def mask(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return _changed(arguments, keywords, "attention_mask", widen, place)

        handles.append(model.register_forward_pre_hook(mask, with_kwargs=True))
    if not replace and not keep:
        handles.append(layers[-1].register_forward_hook(drop))
    return Insertion(handles)


def _changed(
    arguments: tuple, keywords: dict[str, Any], name: str, change: Callable[[Any], Any], place: int
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with one of them changed, given by name or by place, if it was given."""
    if name in keywords:
        return arguments, keywords | {name: change(keywords[name])}
    if place < len(arguments):
        return (*arguments[:place], change(arguments[place]), *arguments[place + 1 :]), keywords
    return arguments, keywords


def prefix_attention(attention: nn.Module, keys: Tensor, values: Tensor) -> Insertion:
    """Let one self-attention see more keys and values: `softmax(q [P_k ; k]^T) [P_v ; v]`, in every head.

    Args:
        attention: a transformers self-attention, with `k_proj` and `v_proj`, or `key` and `value`; called with hidden
            states first and, where it has one, a mask of its own size.
        keys, values: `(K, d)` or `(B, K, d)`, the heads side by side in d as in what the projections give.

    The prefix is made of K positions that are put in front of the sequence and taken off again after the attention, so
    any attention kernel will do; their queries are computed in vain.

    Raises:
        InputError: an attention without such projections, prefixes of unlike shapes or of another width.
    """
    found = [
        pair for pair in PROJECTIONS if all(isinstance(getattr(attention, name, None), nn.Module) for name in pair)
    ]
    if not found:
        raise InputError(
            f"{type(attention).__name__} has no k_proj and v_proj, nor key and value; give a self-attention"
        )
    if keys.shape != values.shape or keys.ndim not in (2, 3) or 0 in keys.shape:
        raise InputError(f"keys and values are (K, d) or (B, K, d), got {tuple(keys.shape)} and {tuple(values.shape)}")
    count = keys.shape[-2]

    def pad(states: Tensor) -> Tensor:
        return F.pad(states, (0, 0, count, 0))

    def pad_mask(mask: Any) -> Any:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise InputError("an attention with a prefix takes a mask (B, heads or 1, T or 1, T), or none")
        rows = count if mask.shape[-2] > 1 else 0
        return F.pad(mask, (count, 0, rows, 0), value=mask.dtype == torch.bool)

    def before(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        arguments, keywords = _changed(arguments, keywords, "hidden_states", pad, 0)
        return _changed(arguments, keywords, "attention_mask", pad_mask, 1)

    def give(prefix: Tensor) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            batch, _, width = output.shape
            if prefix.shape[-1] != width or (prefix.ndim == 3 and len(prefix) != batch):
                raise InputError(f"a prefix {tuple(prefix.shape)} does not fit projections {tuple(output.shape)}")
            return torch.cat([prefix.to(output.dtype).expand(batch, count, width), output[:, count:]], 1)

        return hook

    def after(module: nn.Module, arguments: tuple, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output[:, count:]
        weights = [w[..., count:, :] if isinstance(w, Tensor) and w.ndim == 4 else w for w in output[1:]]
        return (output[0][:, count:], *weights)

    key, value = (getattr(attention, name) for name in found[0])
    return Insertion(
        [
            attention.register_forward_pre_hook(before, with_kwargs=True),
            key.register_forward_hook(give(keys)),
            value.register_forward_hook(give(values)),
            attention.register_forward_hook(after),
        ]
    )
