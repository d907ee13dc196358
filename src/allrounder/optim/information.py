"""Diagonal Fisher information: how much a model's own predictions need each of its weights.

`F_i = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2`, from true gradients of single examples. Fisher merging weights
experts with it, elastic weight consolidation holds weights in place with it.

Cost: one forward pass per example and one backward pass per example and label (`exact`), or per example (`sampled`,
`given`); P numbers in all. Gradients of single examples are kept for as many rows as fit in 64 Mi numbers (4 Mi on a
CPU), at least one. Reference code in circulation that squares the gradient of a batch's sum computes another quantity:
the cross terms between examples and labels do not vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import at, call_arguments, evaluating, limited, wide
from ..nets.multitask import shared

__all__ = ["fisher_information"]

ENTRIES = (1 << 26, 1 << 22)  # numbers of single examples' gradients kept at a time: accelerator, CPU (its cache)


def _cotangents(log_p: Tensor, targets: Any, labels: str, generator: torch.Generator) -> Tensor:
    """Rows whose products with d log p, squared and summed, are one example's information: `(N, rows, ..., C)`."""
    classes = log_p.shape[-1]
    if labels == "exact":
        if log_p.ndim > 2:
            raise InputError(f"outputs {tuple(log_p.shape)} are sequences, with too many labels for labels='exact'; "
                             "take 'sampled' or 'given'")  # fmt: skip
        return torch.diag_embed(log_p.mul(0.5).exp())
    if labels == "sampled":
        flat = log_p.flatten(0, -2).exp().double().cpu()
        chosen = torch.multinomial(flat, 1, generator=generator).view(log_p.shape[:-1])
    elif not isinstance(targets, Tensor):
        raise InputError("labels='given' needs batches (inputs, targets); these have inputs alone")
    elif targets.shape != log_p.shape[:-1] or targets.is_floating_point():
        have, want = tuple(targets.shape), tuple(log_p.shape[:-1])
        raise InputError(f"labels='given' needs class numbers {want}, one for each prediction, got targets {have}")
    else:
        chosen = targets
    if chosen.min() < 0 or chosen.max() >= classes:
        raise InputError(f"targets run from {chosen.min()} to {chosen.max()}, the model has {classes} classes")
    return F.one_hot(chosen.to(log_p.device).long(), classes).to(log_p).unsqueeze(1)


class _Squares:
    """Sums of squared per-example gradients of the shared parameters."""

    def __init__(self, model: nn.Module, task: str | None) -> None:
        own = {id(value): name for name, value in shared(model).named_parameters() if value.is_floating_point()}
        named = {name: value for name, value in model.named_parameters() if id(value) in own}
        self.model, self.task = model, task
        self.own = {name: own[id(value)] for name, value in named.items()}
        self.parameters = {name: value.detach() for name, value in named.items()}
        if not self.parameters:
            raise InputError("the shared part of the model has no parameters")
        device = next(iter(self.parameters.values())).device.type
        self.rows = max(1, ENTRIES[device == "cpu"] // sum(value.numel() for value in self.parameters.values()))
        self.batched = True

    def log_p(self, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        arguments, keywords = call_arguments(self.model, inputs, self.task)
        outputs = functional_call(self.model, dict(parameters), arguments, keywords)
        logits = getattr(outputs, "logits", outputs)
        if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[-1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"Fisher information needs outputs (N, classes) or (N, T, classes) with two classes or more, got {got}"
            )
        return wide(logits).log_softmax(-1)

    def _one(self, parameters: Mapping[str, Tensor], example: Any) -> Tensor:
        return self.log_p(parameters, at(example, None))[0]

    def __call__(self, inputs: Any, cotangents: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name in the shared part -> sum over examples and rows, in pieces that are to be added up."""
        some = min(cotangents.shape[1], self.rows)
        size = max(1, self.rows // some)
        for start in range(0, len(cotangents), size):
            stop = slice(start, start + size)
            for rows in cotangents[stop].split(some, dim=1):
                for name, value in self._sum(at(inputs, stop), rows).items():
                    yield self.own[name], value

    def _sum(self, inputs: Any, cotangents: Tensor) -> dict[str, Tensor]:
        if self.batched:
            try:
                with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                    found = vmap(self._batched)(inputs, cotangents)
                return {name: value.sum(0) for name, value in found.items()}
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the model does something that cannot be batched over examples
                self.batched = False
        return self._looped(inputs, cotangents)

    def _batched(self, example: Any, rows: Tensor) -> dict[str, Tensor]:
        pull = vjp(lambda parameters: self._one(parameters, example), self.parameters)[1]
        gradients = vmap(pull)(rows)[0]
        return {name: wide(value).square().sum(0) for name, value in gradients.items()}

    def _looped(self, inputs: Any, cotangents: Tensor) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(wide(value)) for name, value in self.parameters.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        for i, rows in enumerate(cotangents):
            with torch.enable_grad():
                log_p = self._one(leaves, at(inputs, i))
            for row in rows:
                found = torch.autograd.grad(log_p, list(leaves.values()), row, retain_graph=True, allow_unused=True)
                for total, value in zip(sums.values(), found, strict=True):
                    if value is not None:
                        total += wide(value).square()
        return sums


def fisher_information(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    task: str | None = None,
    labels: Literal["exact", "sampled", "given"] = "exact",
    examples: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of one expert, from true gradients of single examples.

    Args:
        model: the expert; its outputs are logits `(N, C)`, or `(N, T, C)` of T predictions an example (language
            models: the label of an example is then its whole sequence), or have them in `.logits`. Called as
            `model(inputs, task)` with a task, otherwise as `model(inputs)` (`model(**inputs)` for a mapping).
            Left as it was; evaluation mode is used.
        batches: inputs, or tuples `(inputs, targets, ...)`.
        task: which head, for a `MultiTaskModel`.
        labels: the expectation over all C labels (`exact`, costs C backward passes), one label drawn from the
            model (`sampled`, unbiased), or the batch's own (`given`, the "empirical Fisher", which is not the
            Fisher information of a model that errs).
        examples: use at most this many. Paper: 256 to 4096.
        seed: of the drawn labels.
        progress: called with (examples done, examples) after each batch.

    Returns:
        Name in the shared part -> mean over examples, at least in float32, shaped as the parameter.

    Raises:
        InputError: no batches, outputs that are not `(N, C)` or `(N, T, C)` with C >= 2, sequences with `exact`,
            targets that are missing or out of range, information that is not finite.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> fisher_information(model, [torch.tensor([[2.0]])])["weight"].flatten()  # x^2 p (1 - p)
    tensor([1.0000, 1.0000])
    """
    if labels not in ("exact", "sampled", "given"):
        raise InputError(f"labels is 'exact', 'sampled' or 'given', got {labels!r}")
    generator = torch.Generator().manual_seed(seed)
    squares = _Squares(model, task)
    device = next(iter(squares.parameters.values())).device
    total = {squares.own[name]: torch.zeros_like(wide(value)) for name, value in squares.parameters.items()}
    seen = 0
    with evaluating(model):
        for inputs, targets, seen in limited(batches, examples, device):
            with torch.no_grad():
                log_p = squares.log_p(squares.parameters, inputs)
            for name, value in squares(inputs, _cotangents(log_p, targets, labels, generator)):
                total[name] += value
            if progress is not None:
                progress(seen, examples)
    for name, value in total.items():
        if not torch.isfinite(value).all():
            raise InputError(f"the information of {name!r} is not finite: check the expert's weights and the inputs")
    return {name: value.div_(seen) for name, value in total.items()}
