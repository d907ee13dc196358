"""Text for pruning: batches of tokens, the loss of the next token, and perplexity.

A batch is `(N, T)` int64 tokens, or a mapping with `input_ids`, and `attention_mask` and `labels` where there are any
(a tokenizer's output). Without labels every token that the mask lets through is predicted from those before it; padding
is neither predicted nor counted in statistics. Works for causal models of transformers and for any module
`tokens -> logits (N, T, vocabulary)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = ["next_token_loss", "perplexity", "shared", "token_batches"]

IGNORED = -100
Batch = dict[str, Tensor]


def token_batches(model: nn.Module, batches: Iterable[Any], what: str = "text") -> list[Batch]:
    """Checked batches, each a dict with `input_ids` and what else it came with.

    Raises:
        InputError: no batches, a batch that is not `(N, T)` integers with T >= 2, tokens outside the vocabulary,
            masks or labels of another shape.
    """
    if isinstance(batches, (Tensor, Mapping, str)):
        raise InputError(f"the {what} is an iterable of batches, got one {type(batches).__name__}; put it in a list")
    size: int | None = getattr(getattr(model, "config", None), "vocab_size", None) or getattr(model, "vocabulary", None)
    found: list[Batch] = []
    for number, batch in enumerate(batches):
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        tokens = given.get("input_ids")
        if (
            not isinstance(tokens, Tensor)
            or tokens.ndim != 2
            or tokens.is_floating_point()
            or tokens.dtype == torch.bool
        ):
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise InputError(f"batch {number} of the {what} is not (N, T) integer tokens: got {shape}")
        if not len(tokens) or tokens.shape[1] < 2:
            raise InputError(
                f"batch {number} of the {what} is {tuple(tokens.shape)}: it needs a row of two tokens or more"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (size is not None and high >= size):
            raise InputError(f"batch {number} of the {what} has tokens {low} to {high}, the model has {size} of them; "
                             "check the tokenizer")  # fmt: skip
        kept = {"input_ids": tokens.long()}
        for key in ("attention_mask", "labels"):
            if given.get(key) is not None:
                if given[key].shape != tokens.shape:
                    have = tuple(given[key].shape)
                    raise InputError(f"batch {number} of the {what}: {key} is {have}, input_ids {tuple(tokens.shape)}")
                kept[key] = given[key]
        found.append(kept)
    if not found:
        raise InputError(f"the {what} has no batches; an iterator that was used up gives none, so give a list")
    return found


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `(N, T, vocabulary)`; caches of keys and values are off."""
    device = next(model.parameters()).device
    tokens = batch["input_ids"].to(device)
    config = getattr(model, "config", None)
    if config is None:  # no mask: padding on the right is never seen by what comes before it
        found = model(tokens)
    else:
        more: dict[str, Any] = {"use_cache": False} if hasattr(config, "use_cache") else {}
        if "attention_mask" in batch:
            more["attention_mask"] = batch["attention_mask"].to(device)
        found = model(tokens, **more)
    return getattr(found, "logits", found)


def labels(batch: Batch) -> Tensor:
    """What is predicted, `(N, T)`, -100 where nothing is."""
    if "labels" in batch:
        return batch["labels"]
    tokens = batch["input_ids"]
    return tokens.masked_fill(batch["attention_mask"] == 0, IGNORED) if "attention_mask" in batch else tokens


def next_token_loss(model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each token given those before it, in nats and float32.

    Raises:
        InputError: when the batch has nothing to predict.
    """
    target = labels(batch)[:, 1:].flatten()
    if not (target != IGNORED).any():
        raise InputError("a batch has no token to predict: all of its labels are masked")
    found = logits(model, batch)[:, :-1].flatten(0, 1)
    return F.cross_entropy(found.float(), target.to(found.device), ignore_index=IGNORED, reduction=reduction)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module is in its own mode again after it."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Any]) -> float:
    """exp of the mean loss a predicted token, over all batches; the model is put in evaluation mode for it."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in token_batches(model, batches):
            total += next_token_loss(model, batch, reduction="sum").item()
            count += int((labels(batch)[:, 1:] != IGNORED).sum())
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def shared(first: Iterable[Batch], second: Iterable[Batch]) -> float:
    """Share of the rows of `second` that are rows of `first` as well, 0 to 1."""
    known = {bytes(row.cpu().numpy()) for batch in first for row in batch["input_ids"]}
    rows = [bytes(row.cpu().numpy()) in known for batch in second for row in batch["input_ids"]]
    return sum(rows) / len(rows)
