"""Every task as maximum likelihood over a set of targets: one encoder, one loss, no heads.

An input x and a candidate target y are both encoded, by one encoder g or by a pair, and

    P(y | x) = exp(cos(g(x), g(y)) / tau_k) / sum_{z in Y_k} exp(cos(g(x), g(z)) / tau_k)

over the task's candidates Y_k: class names for classification, the other half of each pair for retrieval, the
vocabulary for captioning. tau_k is learned, one per task. A new task is a new set of candidates. Scores say which
candidate is nearest; they are calibrated by tau only.

Use it when targets are things that the encoder can read (names, texts, images), or when tasks must share all of their
weights; for a few fixed classes a linear head is cheaper: here C candidates cost C encodings a step while training, and
once in evaluation. Retrieval over N pairs costs N^2 similarities.

Uni-Perceiver v2 (2022, arXiv 2211.09808; CVPR 2023), its formulation of tasks; the detection part of the paper
(proposals as inputs) is a matter of the encoder that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = ["TargetLikelihood", "retrieval_loss"]


def retrieval_loss(scores: Tensor, targets: Tensor | None = None) -> Tensor:
    """Likelihood of the pairs of a batch, in both directions.

    Args:
        scores: `(N, N)`, row i against candidate j; pair i is on the diagonal.
        targets: not looked at, so that it can be the `loss` of a `Task`.

    Returns:
        The mean over rows and columns.

    Raises:
        InputError: scores that are not square, or a batch of one (nothing to tell it from).

    >>> round(retrieval_loss(torch.zeros(4, 4)).item(), 4), round(math.log(4), 4)
    (1.3863, 1.3863)
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise InputError(f"retrieval needs square scores of at least 2 pairs, got {tuple(scores.shape)}")
    pairs = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2


class TargetLikelihood(nn.Module):
    """`model(inputs, task)`: the cosine of each input with each candidate over the task's temperature, `(N, C)`.

    Cross-entropy of these scores is the paper's loss, so any `Task` with the index of its target trains it.

    Args:
        encoder: inputs -> representations `(N, d)`.
        candidates: task -> what `target_encoder` reads, all C candidates of the task; `None` for a task whose
            candidates are in the batch: its inputs are then a dict with `input` and `target`, and the scores are
            `(N, N)` (`retrieval_loss`).
        target_encoder: candidates -> representations `(C, d)`. Default: the encoder itself.
        temperature: start of every tau_k, > 0 (0.07 is usual).

    Raises:
        InputError: no task, two candidates of one task that are the same, a temperature that is not positive.
    """

    def __init__(
        self,
        encoder: nn.Module,
        candidates: Mapping[str, Any],
        *,
        target_encoder: nn.Module | None = None,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        if not candidates:
            raise InputError("a likelihood needs the candidates of at least one task")
        if not temperature > 0:
            raise InputError(f"temperature is above 0, got {temperature:g}")
        for task, given in candidates.items():
            if isinstance(given, Tensor):
                _all_differ(given, task)
        self.encoder = encoder
        self.target_encoder = encoder if target_encoder is None else target_encoder
        self.candidates = dict(candidates)
        self.log_scales = nn.ParameterDict({task: torch.tensor(-math.log(temperature)) for task in candidates})
        self._kept: dict[str, tuple[list[tuple[int, int]], Tensor]] = {}

    def _targets(self, task: str) -> Tensor:
        """Encoded candidates `(C, d)`; in evaluation they are kept until a weight changes."""
        given = _to(self.candidates[task], self.log_scales[task].device)
        if self.training or torch.is_grad_enabled():
            return F.normalize(self.target_encoder(given), dim=-1)
        tensors = (*self.target_encoder.parameters(), *self.target_encoder.buffers())
        state = [(id(tensor), tensor._version) for tensor in tensors]
        if task not in self._kept or self._kept[task][0] != state:
            self._kept[task] = state, F.normalize(self.target_encoder(given), dim=-1)
        return self._kept[task][1]

    def forward(self, inputs: Any, task: str) -> Tensor:
        """Scores `(N, C)`.

        Raises:
            InputError: an unknown task, or inputs without both halves where candidates are in the batch.
        """
        if task not in self.candidates:
            raise InputError(f"the model has no candidates for task {task!r}; it has {', '.join(self.candidates)}")
        if self.candidates[task] is None:
            if not isinstance(inputs, Mapping) or not {"input", "target"} <= set(inputs):
                raise InputError(
                    f"task {task!r} finds its candidates in the batch: its inputs are a dict of 'input' and 'target'"
                )
            inputs, targets = inputs["input"], F.normalize(self.target_encoder(inputs["target"]), dim=-1)
        else:
            targets = self._targets(task)
        return F.normalize(self.encoder(inputs), dim=-1) @ targets.T * self.log_scales[task].exp()


def _to(given: Any, device: torch.device) -> Any:
    if isinstance(given, Mapping):
        return {key: _to(value, device) for key, value in given.items()}
    return given.to(device) if isinstance(given, Tensor) else given


def _all_differ(given: Tensor, task: str) -> None:
    first: dict[bytes, int] = {}
    for i, row in enumerate(given.detach().cpu().contiguous()):
        j = first.setdefault(row.reshape(-1).view(torch.uint8).numpy().tobytes(), i)
        if j != i:
            raise InputError(f"candidates {j} and {i} of task {task!r} are the same")
