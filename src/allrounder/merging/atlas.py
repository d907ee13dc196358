"""aTLAS: one learned, signed number for each parameter tensor of each task vector.

`W_j = base_j + sum_i lambda_ij tau_ij`, every lambda starting at 0, trained with any loss on few or many
examples. The same algebra adds tasks (`atlas`), adapts to a new task from the vectors of others (`atlas`
with a pool that lacks the target's), forgets one (`atlas_negation`) and adapts to unlabelled test inputs
(`atlas_test_time`). With PEFT adapters as experts the task vectors stay low-rank factors.

Use it when labelled examples exist but too few to fine-tune, or memory for fine-tuning does not. Not when
full fine-tuning on the target is affordable: that is better.

Cost per step: forward and backward of the losses, one merge, one contraction (2 n P multiply-adds for n
dense vectors). Memory: the model, its gradients, n vectors.

Paper: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", NeurIPS
2024, arXiv 2407.02880. Departures from its code, which are repairs: the gradient is clipped at its true
norm (theirs is clipped while multiplied by the loss scaler); random parts cover tensors of any rank and
differ between tensors; trusted examples of the test-time loss are the k most confident of each predicted
class (theirs end up being all); one pass selects the vectors of a budget for all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import Weights
from ..errors import InputError
from ..task import Examples, to_device
from .coefficients import MergedModel, endless, learn
from .engine import Merge

__all__ = ["Linearised", "atlas", "atlas_negation", "atlas_test_time", "block_sensitivity", "trusted"]

Loss = Callable[[Tensor, Tensor], Tensor]


class Linearised(nn.Module):
    """`f(x; base) + J (W - base)`: the first-order model around the base, affine in the coefficients.

    Args:
        merged: the merged model whose leaves are W.
    """

    def __init__(self, merged: MergedModel) -> None:
        super().__init__()
        self.merged = merged

    def forward(self, *args: Any) -> Tensor:
        merged = self.merged
        names = {id(value): name for name, value in merged.model.named_parameters()}
        points = {names[id(leaf)]: merged.bases[name].view_as(leaf) for name, leaf in merged.leaves.items()}
        steps = {names[id(leaf)]: leaf - merged.bases[name].view_as(leaf) for name, leaf in merged.leaves.items()}

        def at(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(merged.model, weights, args, tie_weights=True)

        value, change = torch.func.jvp(at, (points,), (steps,))  # type: ignore[misc]
        return value + change


def block_sensitivity(merged: MergedModel, losses: Iterable[Tensor]) -> Tensor:
    """`|<dL/dW_j, tau_ij>|` at the base, for all vectors and blocks from one backward pass per loss: `(n, blocks)`."""
    merged.set(torch.zeros(len(merged.models.experts), merged.n_blocks, merged.parts))
    for loss in losses:
        loss.backward()
    gradient = merged.contract().reshape(-1, merged.n_blocks, merged.parts)
    return gradient.abs().sum(-1)


class _Coefficients:
    """The learned tensor, the blocks it may use, and the best state seen on validation."""

    def __init__(self, merged: MergedModel) -> None:
        shape = (len(merged.models.experts), merged.n_blocks, merged.parts)
        self.merged = merged
        self.raw = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.allowed = torch.ones(shape[:2], dtype=torch.float64)
        self.best: tuple[float, Tensor] | None = None

    def __call__(self) -> Tensor:
        return self.raw * self.allowed.unsqueeze(-1)

    def keep(self, value: float) -> None:
        if self.best is None or value > self.best[0]:
            self.best = (value, self().detach().clone())

    def result(self, history: list[float]) -> Merge:
        merge = self.merged.merge(self() if self.best is None else self.best[1])
        merge.history = history  # type: ignore[attr-defined]
        return merge


def _cosine(optimiser: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def atlas(
    model: nn.Module,
    base: Weights,
    experts: Mapping[str, Weights],
    data: Mapping[str, Iterable[Any]],
    *,
    loss: Loss | Mapping[str, Loss] = F.cross_entropy,
    steps: int = 300,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    per: str = "tensor",
    parts: int = 1,
    budget: int | None = None,
    penalty: float = 0.0,
    linear: bool = False,
    validate: Callable[[nn.Module], float] | None = None,
    every: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Merge:
    """Learn the coefficients on labelled batches: task addition, or few-shot adaptation to a new task.

    Args:
        model: called as `model(inputs, task)`; left as it was.
        base: the weights all experts were fine-tuned from.
        experts: name -> weights (adapters too). For few-shot adaptation leave the target's own out.
        data: task -> batches `(inputs, targets)` that can be iterated repeatedly. The losses of one batch
            of each task are averaged at each step.
        loss: `(outputs, targets) -> scalar`, for all tasks or for each.
        steps, lr, weight_decay, clip: of AdamW with a cosine schedule. Paper: lr 1e-3 for addition with large
            batches, 1e-1 for few-shot; weight decay 0.1; gradient norm clipped at 1.
        per: a coefficient for each `tensor` (paper), or one for each vector in the whole `model` (isotropic).
        parts: random parts of each tensor, each with its own coefficient (aTLAS x K).
        budget: use at most this many vectors in each block, those with the largest first gradient.
        penalty: weight of `0.5 * mean_j sum_i |lambda_ij|^2`.
        linear: train the first-order model (for vectors from linearised fine-tuning).
        validate: merged model -> validation score; the best coefficients seen are kept.
        every: steps between validations.
        seed: of the random parts.
        progress: called with (steps done, steps).

    Returns:
        The merge by the ordinary linear rule. With `steps=0` it is the base.

    Raises:
        InputError: for a budget that is not positive, or per that is unknown; see also `learn`.
    """
    if per not in ("tensor", "model"):
        raise InputError(f"per is 'tensor' or 'model', got {per!r}")
    if budget is not None and budget < 1:
        raise InputError(f"budget is the number of vectors a block may use, at least 1, got {budget}")
    merged = MergedModel(model, base, experts, blocks=per, parts=parts, seed=seed)  # type: ignore[arg-type]
    device = next(iter(merged.leaves.values())).device
    streams = endless(data, device)
    call = Linearised(merged) if linear else merged
    learned = _Coefficients(merged)

    def losses(step: int) -> Iterator[Tensor]:
        if step:
            _cosine(optimiser, lr, step, steps)
        if step and step % every == 0 and validate is not None:
            learned.keep(validate(merged))
        for task, stream in streams.items():
            inputs, targets = next(stream)
            measure = loss[task] if isinstance(loss, Mapping) else loss
            yield measure(call(inputs, task), targets) / len(streams)

    optimiser = torch.optim.AdamW([learned.raw], lr=lr, weight_decay=weight_decay)
    if budget is not None and budget < len(experts):
        size = block_sensitivity(merged, losses(0))
        learned.allowed = torch.zeros_like(learned.allowed).scatter_(0, size.topk(budget, dim=0).indices, 1.0)
    history = learn(
        merged, learned, [learned.raw], losses, optimiser=optimiser, steps=steps, clip=clip, progress=progress,
        penalty=(lambda: penalty * 0.5 * learned().square().sum(0).mean()) if penalty else None,
    )  # fmt: skip
    if validate is not None:
        merged.set(learned())
        learned.keep(validate(merged))
    return learned.result(history)


def atlas_negation(
    model: nn.Module,
    base: Weights,
    expert: Weights,
    target: tuple[str, Iterable[Any]],
    control: tuple[str, Iterable[Any]],
    *,
    validate: Callable[[nn.Module], tuple[float, float]],
    floor: float = 0.95,
    loss: Loss = F.cross_entropy,
    steps: int = 200,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    every: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> Merge:
    """Learn to forget one task while keeping another: minimises `-loss(target) + loss(control)`.

    Args:
        model, base: as for `atlas`.
        expert: the target task's expert.
        target: (task, batches) to forget.
        control: (task, batches) to keep; without it the ascent has no bound.
        validate: merged model -> (target score, control score) on validation.
        floor: share of the base's control score that must be kept, (0, 1].
        every: steps between validations; training stops at the first one below the floor.

    Returns:
        The merge with the lowest target score among those above the floor (the base, if none was).
    """
    if not 0 < floor <= 1:
        raise InputError(f"floor is a share in (0, 1], got {floor:g}")
    merged = MergedModel(model, base, {"negated": expert})
    device = next(iter(merged.leaves.values())).device
    streams = endless({f"-{target[0]}": target[1], f"+{control[0]}": control[1]}, device)
    learned = _Coefficients(merged)
    merged.set(learned())
    target_score, control_score = validate(merged)
    learned.keep(-target_score)
    least = floor * control_score
    frozen = False

    def check() -> None:
        nonlocal frozen
        now_target, now_control = validate(merged)
        if now_control < least:
            frozen = True
        elif not frozen:
            learned.keep(-now_target)

    def losses(step: int) -> Iterator[Tensor]:
        for sign, (task, stream) in zip((-1, 1), streams.items(), strict=True):
            inputs, targets = next(stream)
            yield sign * loss(merged(inputs, task[1:]), targets) / 2

    optimiser = torch.optim.AdamW([learned.raw], lr=lr, weight_decay=weight_decay)
    history: list[float] = []
    for start in range(0, steps, every):
        count = min(every, steps - start)
        history += learn(merged, learned, [learned.raw], losses, optimiser=optimiser, steps=count, clip=clip)
        merged.set(learned())
        check()
        if progress is not None:
            progress(start + count, steps)
        if frozen:
            break
    return learned.result(history)


def trusted(logits: Tensor, *, per_class: int) -> Tensor:
    """Places of the `per_class` most confident rows of each predicted class of `logits` `(N, C)`, sorted."""
    confidence, label = logits.softmax(-1).max(-1)
    order = confidence.argsort(descending=True, stable=True)
    first = torch.nn.functional.one_hot(label[order], logits.shape[-1]).cumsum(0).gather(1, label[order, None])
    return order[first.squeeze(1) <= per_class].sort().values


def atlas_test_time(
    model: nn.Module,
    base: Weights,
    experts: Mapping[str, Weights],
    task: str,
    inputs: Tensor | dict[str, Tensor],
    *,
    augment: Callable[[Any, torch.Generator], Any] | None = None,
    threshold: float = 0.9,
    batch_size: int = 128,
    steps: int = 200,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Merge:
    """Adapt to unlabelled inputs of one task with pseudo-labels (unsupervised FixMatch).

    The `min(N / C / 10, 100)` most confident inputs of each class keep the base's label; the others get the
    merged model's own label while its confidence is above `threshold`. Both are learned on augmented views,
    three quarters of a batch from all inputs and one quarter from the trusted ones.

    Args:
        model, base, experts: as for `atlas`.
        task: whose head is used.
        inputs: all unlabelled inputs, `(N, ...)`.
        augment: `(batch of inputs, generator) -> batch of inputs`, a strong augmentation; `None` for none.
        threshold: least confidence of a pseudo-label, [0, 1).
        batch_size, steps, lr, weight_decay, clip: of AdamW. Paper: 128, 10 epochs, 1e-3, 0.1.
        seed: of the batches and the augmentation.
    """
    merged = MergedModel(model, base, experts)
    device = next(iter(merged.leaves.values())).device
    learned = _Coefficients(merged)
    merged.set(learned())
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    data = Examples(inputs, torch.zeros(len(first), dtype=torch.int64))
    with torch.no_grad():
        places = torch.arange(len(data)).split(batch_size)
        logits = torch.cat([merged(to_device(data[part][0], device), task).cpu() for part in places])
    sure = trusted(logits, per_class=max(1, min(len(data) // logits.shape[-1] // 10, 100)))
    labels = logits.argmax(-1)
    generator = torch.Generator().manual_seed(seed)
    view = augment or (lambda batch, _: batch)

    def losses(step: int) -> Iterator[Tensor]:
        quarter = max(1, batch_size // 4)
        safe = sure[torch.randint(len(sure), (quarter,), generator=generator)]
        wide = torch.randint(len(data), (batch_size - quarter,), generator=generator)
        with torch.no_grad():
            confidence, guess = merged(to_device(data[wide][0], device), task).softmax(-1).max(-1)
        kept = wide[(confidence > threshold).cpu()]
        chosen = torch.cat([safe, kept])
        targets = torch.cat([labels[safe], guess.cpu()[(confidence > threshold).cpu()]]).to(device)
        outputs = merged(to_device(view(data[chosen][0], generator), device), task)
        yield F.cross_entropy(outputs, targets, reduction="sum") / batch_size

    optimiser = torch.optim.AdamW([learned.raw], lr=lr, weight_decay=weight_decay)
    return learned.result(
        learn(merged, learned, [learned.raw], losses, optimiser=optimiser, steps=steps, clip=clip, progress=progress)
    )
