"""How much each weight matters for a domain: first and second order of the loss its removal costs, along a fine-tuning.

    g~ = g + amount * G g^2;  S += |g~ w + (g~ w)^2 / (2 N)|;  w -= lr * clip(g~)      for each batch

The second half of D-Pruner (see `d_pruner`, where the departures from the paper are listed); without G it is the
element-wise Taylor score of LLM-Pruner (Ma et al., 2023, arXiv 2305.11627), and G alone is `general_importance`.

A gradient is used and dropped inside the backward pass as soon as its tensor has it, as in LOMO (Lv et al., 2023, arXiv
2306.09782): one gradient is in memory, not a model of them. Every parameter is tuned, the linear layers inside the
blocks are scored, and the original weights are put back.

Cost: one forward and backward pass a batch and about ten sweeps over the weights; memory: the model, one gradient, and
on the CPU (or in files of `folder`) S in float32 and the original weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checkpoint import Weights
from ..errors import InputError
from .pruning_journal import Journal, digest
from .pruning_layers import Matrix, matrices
from .pruning_text import Batch, evaluating, next_token_loss, token_batches

__all__ = ["Scaling", "domain_importance", "regularised", "removal_error"]

Scaling = Literal["relative", "paper"]


def regularised(gradient: Tensor, general: Tensor, regulariser: float = 10.0) -> Tensor:
    """g + regulariser * (G / mean G) * g^2 / rms(g), in `gradient`'s shape and place.

    >>> regularised(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 3.0]), 2.0)
    tensor([2., 2.])
    """
    square = gradient.square()
    amount = regulariser / (general.mean(dtype=torch.float32).to(square.device) * square.mean().sqrt()).clamp_min(1e-30)
    return gradient.addcmul_(square.mul_(general), amount)


def removal_error(gradient: Tensor, weight: Tensor, examples: int, *, reference_cubic: bool = False) -> Tensor:
    """|g w + (g w)^2 / (2 N)|, what the loss is expected to change by when a weight is removed.

    >>> removal_error(torch.tensor([2.0]), torch.tensor([3.0]), 9)
    tensor([8.])
    """
    change = gradient * weight
    change.addcmul_(change, change, value=1 / (2 * examples))
    if reference_cubic:
        change += weight**3
    return change.abs_()


def domain_importance(
    model: nn.Module,
    text: Iterable[Any],
    general: Mapping[str, Tensor] | None = None,
    *,
    regulariser: float = 10.0,
    scaling: Scaling = "relative",
    lr: float = 0.03,
    epochs: int = 5,
    warmup: float = 0.1,
    clip: float = 1.0,
    loss_scale: float | None = None,
    reference_cubic: bool = False,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """S of every matrix, `(out, in)` float32 on the CPU by parameter name; the model is left as it was.

    Args:
        model: a causal language model.
        text: batches of tokens of the domain (see `token_batches`); N is the number of their rows.
        general: G, from `general_importance`. Without it this is the Taylor score of LLM-Pruner, weight by weight.
        regulariser, scaling, reference_cubic: as for `d_pruner`.
        lr: peak rate of the SGD on all parameters, rising linearly from 0 and falling to 0; 0 leaves them alone.
        epochs: times through the text.
        warmup: share of the steps in which lr rises. Paper: 0.1.
        clip: largest norm of the whole gradient. Paper: 1.
        loss_scale: the loss is multiplied by it before the backward pass and gradients are divided by it; only
            float16 needs it. Default: 1024 for float16, otherwise 1.
        folder: S is summed up in a file there, and finished epochs are kept.
        progress: called with (batches done, all of them).

    Raises:
        InputError: bad text or layers, numbers out of range, G of other names or shapes, a loss or gradient that is
            not finite.
    """
    found = matrices(model)
    batches = token_batches(model, text, "domain text")
    examples, steps = sum(len(batch["input_ids"]) for batch in batches), epochs * len(batches)
    if loss_scale is None:
        loss_scale = 1024.0 if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
    numbers = {"regulariser": regulariser, "lr": lr, "warmup": warmup, "clip": clip, "loss_scale": loss_scale}
    _check(found, general, scaling, epochs, numbers)
    settings = {
        "method": "domain importance", "general": general is not None, "regulariser": regulariser, "scaling": scaling,
        "lr": lr, "epochs": epochs, "warmup": warmup, "clip": clip, "cubic": reference_cubic,
    }  # fmt: skip
    journal = None
    if folder is not None:
        journal = Journal(folder, digest({m.name: m.weight for m in found}, batches, settings))
    warm = max(1, round(warmup * steps))
    with _working(model, lr > 0, journal) as named:
        tune = _Pass(model, named, {id(m.module.weight): m for m in found}, _zeros(found, journal), general, examples,
                     loss_scale, reference_cubic, regulariser)  # fmt: skip
        first = 0 if journal is None else tune.resume(journal)
        with tune.hooked():
            for step in range(first * len(batches), steps):
                rate = lr * min(step / warm, (steps - step) / max(1, steps - warm))
                if scaling == "paper":
                    tune.amount = 2 * regulariser * rate**2 / examples
                tune.step(batches[step % len(batches)], rate, clip, step)
                if journal is not None and (step + 1) % len(batches) == 0:
                    tune.store(journal, (step + 1) // len(batches), lr > 0)
                if progress is not None:
                    progress(step + 1, steps)
    return tune.scores


def _check(
    found: list[Matrix], general: Mapping[str, Tensor] | None, scaling: str, epochs: int, numbers: Mapping[str, float]
) -> None:
    if scaling not in get_args(Scaling):
        raise InputError(f"scaling is one of {', '.join(get_args(Scaling))}, got {scaling!r}")
    if epochs < 1:
        raise InputError(f"epochs is at least 1, got {epochs}")
    for name, value in numbers.items():
        if not 0 <= value < float("inf") or (value == 0 and name in ("clip", "loss_scale")):
            raise InputError(
                f"{name} is a number {'above' if name in ('clip', 'loss_scale') else 'from'} 0, got {value}"
            )
    if general is None:
        return
    for matrix in found:
        shape = tuple(matrix.weight.shape)
        if matrix.name not in general or tuple(general[matrix.name].shape) != shape:
            raise InputError(f"general importance has no {shape} scores for {matrix.name!r}; use general_importance")
        if not torch.isfinite(general[matrix.name]).all():
            raise InputError(f"the general importance of {matrix.name!r} is not finite; keep it in another dtype")


def _zeros(found: list[Matrix], journal: Journal | None) -> dict[str, Tensor]:
    """S by name, views of one row of zeros; in a file of the journal whose pages the kernel can write back and drop."""
    sizes = [m.weight.numel() for m in found]
    if journal is None:
        flat = torch.zeros(sum(sizes))
    else:
        path = str(journal.folder / "importance.bin")
        flat = torch.from_file(path, shared=True, size=sum(sizes), dtype=torch.float32).zero_()
    return {m.name: part.view(m.weight.shape) for m, part in zip(found, flat.split(sizes), strict=True)}


@contextmanager
def _working(model: nn.Module, moving: bool, journal: Journal | None) -> Iterator[dict[str, nn.Parameter]]:
    """All floating parameters, trainable and without gradients; afterwards everything is as it was."""
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    before = {name: (p.requires_grad, p.grad) for name, p in named.items()}
    original: Weights = {}
    if moving and journal is None:
        original = {name: p.detach().to("cpu", copy=True) for name, p in named.items()}
    elif moving and journal is not None:
        original = journal.write("original", {name: p.detach() for name, p in named.items()})
    try:
        for p in named.values():
            p.requires_grad_(True)
            p.grad = None
        with evaluating(model):
            yield named
    finally:
        with torch.no_grad():
            for name, p in named.items():
                if name in original:
                    p.copy_(original[name])
                p.requires_grad_(before[name][0])
                p.grad = before[name][1]


@dataclass
class _Pass:
    """Forward and backward passes that score and move each tensor when its gradient is there."""

    model: nn.Module
    named: dict[str, nn.Parameter]
    matrices: dict[int, Matrix]
    scores: dict[str, Tensor]
    general: Mapping[str, Tensor] | None
    examples: int
    loss_scale: float
    cubic: bool
    regulariser: float
    amount: float | None = None
    norm: float | None = None
    rate: float = 0.0
    clip: float = 1.0
    squares: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [p.register_post_accumulate_grad_hook(self._hook(name)) for name, p in self.named.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def arrived(p: Tensor) -> None:
            assert p.grad is not None
            gradient, p.grad = p.grad.float(), None
            if self.loss_scale != 1:
                gradient = gradient / self.loss_scale
            matrix = self.matrices.get(id(p))
            if matrix is not None:
                gradient = self._score(matrix, gradient.T if matrix.swapped else gradient)
                gradient = gradient.T if matrix.swapped else gradient
            square = gradient.square().sum()
            self.squares[name] = square
            if self.rate:
                largest = square.sqrt() if self.norm is None else square.sqrt().clamp_min(self.norm)
                step = (-self.rate * self.clip / largest.clamp_min(self.clip)).to(gradient.dtype)
                p.data.add_((gradient * step).to(p.dtype))  # .data: other tensors still wait for their backward pass

        return arrived

    def _score(self, matrix: Matrix, gradient: Tensor) -> Tensor:
        if self.general is not None and self.amount != 0:
            general = self.general[matrix.name].to(gradient.device)
            if self.amount is None:
                gradient = regularised(gradient, general, self.regulariser)
            else:
                gradient.addcmul_(gradient.square().mul_(general), torch.tensor(self.amount, device=gradient.device))
        change = removal_error(gradient, matrix.weight.float(), self.examples, reference_cubic=self.cubic)
        self.scores[matrix.name] += change.to(self.scores[matrix.name].device)
        return gradient

    def step(self, batch: Batch, rate: float, clip: float, number: int) -> None:
        self.rate, self.clip = rate, clip
        self.squares.clear()
        loss = next_token_loss(self.model, batch)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()} at batch {number}; check the text, or lower lr")
        (loss * self.loss_scale).backward()
        total = torch.stack([square.cpu() for square in self.squares.values()]).sum().sqrt().item()
        if not total < float("inf"):
            name = next((name for name, square in self.squares.items() if not torch.isfinite(square)), "the model")
            raise InputError(f"the gradient of {name!r} is not finite at batch {number}; lower lr or loss_scale, "
                             "or load the model in bfloat16 or float32")  # fmt: skip
        self.norm = total

    def store(self, journal: Journal, epoch: int, moved: bool) -> None:
        tensors = {f"score/{name}": score for name, score in self.scores.items()}
        tensors |= {f"weight/{name}": p.detach() for name, p in self.named.items()} if moved else {}
        journal.write(f"epoch-{epoch:03}", tensors)
        journal.note(epoch=epoch, norm=self.norm)
        journal.drop(f"epoch-{epoch - 1:03}")

    @torch.no_grad()
    def resume(self, journal: Journal) -> int:
        """Go back to the last finished epoch, and say how many are done."""
        epoch = journal.state.get("epoch", 0)
        if epoch:
            self.norm = journal.state["norm"]
            part = journal.read(f"epoch-{epoch:03}")
            for name, score in self.scores.items():
                score.copy_(part[f"score/{name}"])
            for name, p in self.named.items():
                if f"weight/{name}" in part:
                    p.copy_(part[f"weight/{name}"])
        return epoch
