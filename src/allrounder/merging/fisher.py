"""Fisher merging: average the experts entry by entry, each weighted by how much its own predictions need that entry.

`theta_i = sum_k w_k F_ki theta_ki / sum_k w_k F_ki`, where `F_k` is the diagonal of expert k's Fisher
information, `F_i = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2`. It is the mode of the product of K
Gaussians around the experts, with those diagonals as precisions.

Use it when some examples of each task are at hand and the experts are classifiers. It moves little away
from averaging when the experts' information is alike; RegMean usually gains more from the same examples.

Cost of the information: one forward pass per example and one backward pass per example and label (`exact`),
or per example (`sampled`, `given`); P numbers per expert. Gradients of single examples are kept for as many
rows as fit in 64 Mi numbers (4 Mi on a CPU), at least one. Cost of the merge: one read of 2 K models in
blocks, and one more of the K information sets before it (norms and checks).

Paper: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832.
Departures: information is divided by its root mean square, where the paper's code divides by the L2 norm
(they differ by one factor for all experts); the floor comes after that division and holds for every expert,
so it means the same for every model size, and entries that no expert needs become the plain average
instead of the first expert's. Reference code in circulation that squares the gradient of a batch's sum
computes another quantity: the cross terms between examples and labels do not vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from ..checkpoint import Weights
from ..errors import InputError
from ..nets.multitask import shared
from ..saving import BLOCK
from .engine import Aligned, Block, Merge, Rule, working
from .evidence import at, call_arguments, double, evaluating, limited, matched, wide

__all__ = ["Fisher", "fisher", "fisher_information"]

ENTRIES = (1 << 26, 1 << 22)  # numbers of single examples' gradients kept at a time: accelerator, CPU (its cache)


def _cotangents(log_p: Tensor, targets: Any, labels: str, generator: torch.Generator) -> Tensor:
    """Rows whose products with d log p, squared and summed, are one example's information: `(N, rows, C)`."""
    if labels == "exact":
        return torch.diag_embed(log_p.mul(0.5).exp())
    if labels == "sampled":
        chosen = torch.multinomial(log_p.exp().double().cpu(), 1, generator=generator).squeeze(1)
    elif not isinstance(targets, Tensor):
        raise InputError("labels='given' needs batches (inputs, targets); these have inputs alone")
    elif targets.shape != log_p.shape[:1] or targets.is_floating_point():
        raise InputError(f"labels='given' needs one class number per example, got targets {tuple(targets.shape)}")
    else:
        chosen = targets
    if chosen.min() < 0 or chosen.max() >= log_p.shape[1]:
        raise InputError(f"targets run from {chosen.min()} to {chosen.max()}, the model has {log_p.shape[1]} classes")
    return F.one_hot(chosen.to(log_p.device).long(), log_p.shape[1]).to(log_p).unsqueeze(1)


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
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"Fisher information needs outputs (N, classes) with two classes or more, got {got}")
        return logits.to(working(logits.dtype)).log_softmax(-1)

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
        model: the expert; its outputs are logits `(N, C)`, or have them in `.logits`. Called as
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
        InputError: no batches, outputs that are not `(N, C)` with C >= 2, targets that are missing or out of
            range, information that is not finite.

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


@dataclass(frozen=True)
class Fisher(Rule):
    """`sum_k w_k f_k theta_k / sum_k w_k f_k` with `f = max(F / rms(F), floor)`; elementwise.

    Tensors without information (running statistics) take the mean weighted by `weights`.
    """

    information: Sequence[Mapping[str, Tensor]]
    weights: Sequence[float]
    floor: float
    normalise: bool
    labels: Sequence[str]
    names: Mapping[str, str]

    def statistic(self, models: Aligned) -> list[float]:
        """What each expert's information is multiplied by."""
        return [self._factor(*pair) for pair in zip(self.labels, self.information, strict=True)]

    def _factor(self, label: str, information: Mapping[str, Tensor]) -> float:
        total, count = 0.0, 0
        for name in self.names.values():
            for block in information[name].detach().reshape(-1).split(BLOCK):
                if not (torch.isfinite(block).all() and (block >= 0).all()):
                    raise InputError(f"the information of expert {label!r} in {name!r} has negative or infinite values")
                total += double(block).square().sum().item()
                count += block.numel()
        if total == 0:
            raise InputError(f"the information of expert {label!r} is zero everywhere: check its examples and head")
        return (count / total) ** 0.5 if self.normalise else 1.0

    def __call__(self, block: Block) -> Tensor:
        # averages the differences from the first expert: experts that agree are then kept bit for bit
        first, *others = [expert.to(working(block.base.dtype)) for expert in block.experts]
        source = self.names.get(block.name)
        below = self._share(0, source, block, first)
        above = torch.zeros_like(first)
        for k, expert in enumerate(others, 1):
            share = self._share(k, source, block, first)
            above.addcmul_(share, expert - first)
            below += share
        return above.div_(below).add_(first)

    def _share(self, k: int, source: str | None, block: Block, like: Tensor) -> Tensor:
        if source is None:
            return torch.full_like(like, self.weights[k])
        own = self.information[k][source].detach().reshape(-1)[block.start : block.stop]
        return own.to(like, copy=True).mul_(block.statistic[k]).clamp_(min=self.floor).mul_(self.weights[k])


def fisher(
    base: Weights | None,
    experts: Mapping[str, Weights],
    information: Mapping[str, Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    normalise: bool = True,
) -> Merge:
    """Average of the experts weighted, entry by entry, with their Fisher information.

    Args:
        base: only its integer tensors are used; may be `None`.
        experts: name -> weights.
        information: expert -> name -> information, not negative, shaped as the tensor
            (`fisher_information`); may lie on disk (`Checkpoint`).
        weights: K numbers, not negative, not all zero. Default: equal.
        floor: least information of an entry, > 0, after normalisation (1 is then the expert's root mean
            square). Paper: 1e-6, before it.
        normalise: divide each expert's information by its root mean square, so that no expert wins because
            its loss is on a larger scale.

    Raises:
        InputError: information that is missing for an expert, of another shape, negative or zero everywhere.

    >>> experts = {"a": {"w": torch.tensor([0.0, 0.0])}, "b": {"w": torch.tensor([1.0, 1.0])}}
    >>> information = {"a": {"w": torch.tensor([1.0, 3.0])}, "b": {"w": torch.tensor([3.0, 1.0])}}
    >>> fisher(None, experts, information)["w"]
    tensor([0.7500, 0.2500])
    """
    models = Aligned(base, experts)
    weights = [1.0] * len(experts) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(experts) or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise InputError(f"fisher needs {len(experts)} weights, not negative and not all zero, got {weights}")
    if not floor > 0:
        raise InputError(f"floor is the least information of an entry, above 0, got {floor:g}")
    names = matched(models, information, "information", "fisher_information", lambda shape, _: shape)
    rows = [information[label] for label in experts]
    return Merge(models, Fisher(rows, weights, float(floor), bool(normalise), list(experts), names))
