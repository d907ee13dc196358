"""RegMean: merge every linear layer so that it answers each expert's inputs as that expert's layer does.

`W = argmin sum_k |X_k W^T - X_k W_k^T|^2` has the closed form `W^T = (sum_k G_k)^-1 sum_k G_k W_k^T` with
the Gram matrices `G_k = X_k^T X_k / N_k` of the inputs that layer sees in expert k. Off-diagonal entries
are shrunk first, `G <- a G + (1 - a) diag(G)`. Everything that is not the weight of a linear layer is
averaged.

Use it when a few hundred unlabelled inputs of each task are at hand: among the rules that learn nothing by
gradient it usually gains most. With fewer inputs than a layer is wide, keep the shrinkage.

Cost: one forward pass of `examples` inputs per expert; `sum d_in^2` numbers per expert; per layer one
Cholesky factorisation, `d_in^3 / 3`, in float64 (on the CPU where the device has no float64).

Paper: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
arXiv 2212.09849. Departures: solved for the difference from the plain mean, which gives the mean exactly
where the inputs say nothing (an input that is always zero) or the experts agree; no jitter is added,
because shrinkage alone bounds the smallest eigenvalue of the scaled system by 1 - a; a system that is
singular to the precision of its Gram matrices is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Weights
from ..errors import InputError
from ..nets.calling import call_arguments, evaluating, limited, wide
from ..nets.multitask import shared
from .engine import Aligned, Block, Merge, Rule
from .evidence import double, matched

__all__ = ["RegMean", "gram_matrices", "regmean"]

TRANSPOSED = ".T"  # ends the name of a weight that is stored as (d_in, d_out)


def _linear_layers(module: nn.Module) -> dict[nn.Module, str]:
    """Linear layers -> the name of their weight; layers that share a weight have one name."""
    names = {id(value): name for name, value in module.named_parameters()}
    found = {}
    for layer in module.modules():
        # transformers' Conv1D is a linear layer with a transposed weight (GPT-2)
        transposed = type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers")
        weight = getattr(layer, "weight", None)
        if (isinstance(layer, nn.Linear) or transposed) and id(weight) in names:
            found[layer] = names[id(weight)] + TRANSPOSED * transposed
    return found


def _rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The rows a layer sees, without padding: `(rows, d_in)`."""
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask]
    if mask is not None and inputs.ndim == 2 and len(inputs) == mask.numel():
        return inputs[mask.flatten()]
    return inputs.reshape(-1, inputs.shape[-1])


@torch.no_grad()
def gram_matrices(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    task: str | None = None,
    examples: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """`X^T X / N` of the inputs X `(N, d_in)` of every linear layer in the shared part of one expert.

    Args:
        model: the expert. Called as `model(inputs, task)` with a task, otherwise as `model(inputs)`
            (`model(**inputs)` for a mapping). Left as it was; evaluation mode is used.
        batches: inputs, or tuples that start with them; labels are not read. Where inputs are a mapping with
            an `attention_mask` `(N, T)`, tokens that it masks are not counted.
        task: which head, for a `MultiTaskModel`.
        examples: use at most this many inputs. Paper: 256.
        progress: called with (examples done, examples) after each batch.

    Returns:
        Name of the weight -> `(d_in, d_in)`, at least float32. The name of a weight that is stored transposed
        (transformers' `Conv1D`) ends in `.T`. Layers that were not called as modules (inside
        `nn.MultiheadAttention`) are left out, and so averaged.

    Raises:
        InputError: no batches, a model without linear layers, inputs that are not finite.

    >>> model = nn.Linear(2, 3)
    >>> gram_matrices(model, [torch.tensor([[1.0, 0.0], [1.0, 2.0]])])["weight"].tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    layers = _linear_layers(shared(model))
    if not layers:
        raise InputError("the shared part of the model has no linear layers: RegMean has nothing to solve for")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: Tensor | None = None

    def look(layer: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        rows = wide(_rows(next(iter([*arguments, *keywords.values()])).detach(), mask))
        name = layers[layer]
        if name not in sums:
            sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        sums[name].addmm_(rows.T, rows)
        counts[name] = counts.get(name, 0) + len(rows)

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model):
            for inputs, _, seen in limited(batches, examples, next(model.parameters()).device):
                mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
                mask = None if mask is None else mask.bool()
                arguments, keywords = call_arguments(model, inputs, task)
                model(*arguments, **keywords)
                if progress is not None:
                    progress(seen, examples)
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in sums.items():
        if not torch.isfinite(value).all():
            raise InputError(f"the inputs of {name!r} are not finite: check the expert's weights and the inputs")
    return {name: value.div_(max(1, counts[name])) for name, value in sums.items()}


@dataclass(frozen=True)
class RegMean(Rule):
    """The closed form for each weight that has Gram matrices, the plain mean for everything else.

    Args:
        grams: K mappings from the names in the mappings to Gram matrices.
        names: name of the tensor -> name in the mappings.
        off_diagonal: a, the factor of off-diagonal entries.
        labels: the experts' names, for messages.
    """

    grams: Sequence[Mapping[str, Tensor]]
    names: Mapping[str, str]
    off_diagonal: float
    labels: Sequence[str]
    whole = True

    def tensor_statistic(self, models: Aligned, name: str, statistic: Any) -> torch.Size:
        return models.signatures[name][1]

    def _gram(self, k: int, source: str, like: Tensor) -> Tensor:
        gram = self.grams[k][source].detach().to(like)
        if not torch.isfinite(gram).all() or (gram.diagonal() < 0).any():
            raise InputError(f"the Gram matrix of {source!r} for expert {self.labels[k]!r} is not one: {_WHY}")
        shrunk = gram * self.off_diagonal
        shrunk.diagonal().copy_(gram.diagonal())
        return shrunk

    def __call__(self, block: Block) -> Tensor:
        source = self.names.get(block.name)
        if source is None:
            return torch.stack([wide(expert) for expert in block.experts]).mean(0)
        transposed = source.endswith(TRANSPOSED)
        experts = [expert.view(block.tensor_statistic) for expert in block.experts]
        experts = experts if transposed else [expert.T for expert in experts]  # (d_in, d_out)
        mean = torch.zeros_like(double(experts[0]))
        for expert in experts:
            mean += double(expert) / len(experts)
        left, right = mean.new_zeros(len(mean), len(mean)), torch.zeros_like(mean)
        for k, expert in enumerate(experts):
            gram = self._gram(k, source, mean)
            left += gram
            right.addmm_(gram, double(expert) - mean)
        merged = mean + self._solve(left, right, source)
        return (merged if transposed else merged.T).reshape(-1)

    def _solve(self, left: Tensor, right: Tensor, source: str) -> Tensor:
        """`left^-1 right`, with the system scaled to a diagonal of ones; rows of dead inputs are zero."""
        size = left.diagonal().sqrt()
        dead = size == 0
        scale = torch.where(dead, torch.ones_like(size), size).reciprocal()
        left = left * scale[:, None] * scale
        left.diagonal().fill_(1.0)
        factor, failed = torch.linalg.cholesky_ex(left)
        least = len(left) * torch.finfo(self.grams[0][source].dtype).eps
        if failed.item() or factor.diagonal().square().min() < least:
            raise InputError(
                f"the inputs of {source!r} do not determine its {len(left)} columns: "
                f"add shrinkage (off_diagonal below 1, here {self.off_diagonal:g}) or use more examples"
            )
        return torch.cholesky_solve(right * scale[:, None], factor) * scale[:, None]


_WHY = "it has negative squares, NaN or infinite values; make it with gram_matrices"


def regmean(
    experts: Mapping[str, Weights], grams: Mapping[str, Mapping[str, Tensor]], *, off_diagonal: float = 0.9
) -> Merge:
    """Merge linear layers by regression onto the experts' own answers, everything else by averaging.

    Args:
        experts: name -> weights.
        grams: expert -> name of a linear layer's weight -> `(d_in, d_in)` (`gram_matrices`); may lie on disk.
        off_diagonal: factor of the off-diagonal entries, [0, 1]. 1 is the exact regression, 0 weights each
            column by its inputs' mean square. Paper: 0.9 (0.1 for T5).

    Raises:
        InputError: Gram matrices that are missing for an expert or of another shape; when read, a system
            that the inputs leave singular.

    >>> experts = {"a": {"w": torch.tensor([[0.0, 0.0]])}, "b": {"w": torch.tensor([[1.0, 1.0]])}}
    >>> grams = {"a": {"w": torch.diag(torch.tensor([1.0, 3.0]))}, "b": {"w": torch.diag(torch.tensor([3.0, 1.0]))}}
    >>> regmean(experts, grams)["w"]
    tensor([[0.7500, 0.2500]])
    """
    if not 0 <= off_diagonal <= 1:
        raise InputError(f"off_diagonal is a share in [0, 1], got {off_diagonal:g}")
    models = Aligned(None, experts)

    def expected(shape: torch.Size, source: str) -> tuple[int, ...] | None:
        return None if len(shape) != 2 else (shape[0 if source.endswith(TRANSPOSED) else 1],) * 2

    names = matched(models, grams, "the set of Gram matrices", "gram_matrices", expected, suffix=TRANSPOSED)
    return Merge(models, RegMean([grams[label] for label in experts], names, float(off_diagonal), list(experts)))
