"""Twin-Merging: one shared model and K small parts that a router mixes anew for every input.

`theta(x) = theta_s + sum_k w_k(x) e_k`, with the shared expert `theta_s` (any merge), the exclusive parts
`e_k = theta_k - theta_s` of which each matrix keeps its best rank-r approximation and every vector is kept
whole, and `w = softmax(router(features of x under theta_s))`. At full rank theta_s cancels:
`theta(x) = sum_k w_k theta_k`; the shared part matters only through what compression drops.

Use it when inputs of all tasks arrive mixed and each must be answered nearly as its own expert would, for far
less storage than K experts. When the task of each input is known, TALL-masks or the experts themselves are
better; when one ordinary checkpoint is wanted, use a static merge (or take `weights` of one mixture away).

Cost. Storage: P numbers, `r (m + n)` per task and m x n matrix, the router. Time: one pass for the features and
one for the answer, which adds `K r (m + n)` multiply-adds per token and merges nothing, or merges once for each
mixture where a batch has few (`top=1`); `per_input` says how, and what other models cost. Making it: one
eigendecomposition, `min(m, n)^3`, per matrix and task, in float64.

Paper: Lu et al., "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging", NeurIPS 2024,
arXiv 2406.15479. Departures, against leaks in its code: the router's best step is chosen on validation (theirs on
test), and biases and running statistics are mixed and, without a task, the head is chosen by the router (theirs
takes both from the input's true task). The router has one hidden layer on standardised features instead of two
with BatchNorm and dropout, so an answer never depends on the rest of the batch. Convolutions are compressed as
(out, in * kernel) matrices. Factors that would not be smaller than their matrix are not made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..checkpoint import Weights, tied
from ..errors import InputError
from ..nets.calling import call_arguments, limited
from ..nets.multitask import MultiTaskModel, mlp
from ..nets.multitask import shared as shared_part
from ..task import Batches
from ..train import load_weights
from .baselines import task_arithmetic
from .engine import Aligned
from .per_input import Parts, compressed

__all__ = ["TwinMerging"]

EVERY = 10  # steps between looks at validation


class _Router(nn.Module):
    """Standardised features `(N, d)` -> scores `(N, K)`; takes its width from the state it is given."""

    layers: nn.Module
    mean: Tensor
    spread: Tensor

    @torch.random.fork_rng(devices=[])
    def make(self, width: int, tasks: int, *, seed: int, device: torch.device) -> None:
        self.layers = mlp([width, 2 * width, tasks], seed=seed).to(device)
        for name in ("mean", "spread"):
            self.register_buffer(name, torch.ones(width, device=device))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers((features.to(self.mean) - self.mean) / self.spread)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = prefix + "layers.0.weight"
        if name in state and ("mean" not in self._buffers or len(self.mean) != state[name].shape[1]):
            tasks = len(state[prefix + "layers.2.bias"])
            self.make(state[name].shape[1], tasks, seed=0, device=state[name].device)
            self.to(state[name].dtype)
        super()._load_from_state_dict(state, prefix, *rest)


def _pooled(outputs: Any, inputs: Any) -> Tensor:
    """Features `(N, d)`: the mean over tokens that are not padding, or over positions of `(N, d, H, W)`."""
    outputs = getattr(outputs, "last_hidden_state", outputs)
    dims = outputs.ndim if isinstance(outputs, Tensor) else 0
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if dims == 3 and mask is not None and mask.shape == outputs.shape[:2]:
        return (outputs * mask.to(outputs).unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    if 2 <= dims <= 5:
        return outputs.mean(1) if dims == 3 else outputs.flatten(2).mean(2) if dims > 3 else outputs
    what = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise InputError(f"the shared model gives {what}, not features (N, d): give features=, a function that makes them")


def _decoded(names: Tensor) -> list[str]:
    return bytes(names.tolist()).decode().split("\n")


class TwinMerging(nn.Module):
    """`twin(inputs, task)`: each input answered by the shared expert plus its own mixture of exclusive parts.

    Args:
        model: a `MultiTaskModel`, whose backbone is merged and whose heads are kept, or a module that returns
            a tensor, called as `model(inputs)` (`model(**inputs)` for a mapping; with `task` as a second
            argument where one is given). Copied, frozen, and always in evaluation mode.
        base: the weights all experts were fine-tuned from.
        experts: task -> weights, named as the shared part's state dict names them.
        shared: the shared expert. Default: task arithmetic with scale 0.3 (paper: 0.29).
        rank_ratio: rank of a matrix's part over its smaller side, [0, 1]; rounded down, at least 1.
            0 leaves matrices without parts. Paper: 0.1 (its mask rate 0.9).
        rank: the same rank for every matrix instead. Paper: 8 for adapters of language models.
        top: mix only this many of each input's likeliest tasks. Default: all (paper). 1 is hard routing.
        confidence: an input whose likeliest task is less probable than this gets the shared expert alone,
            [0, 1]. Default 0 (paper). A router is often sure of inputs that it has never seen the like of.
        features: (shared model, inputs) -> features `(N, d)` for the router. Default: the shared model's output,
            averaged over tokens or positions, padding left out.

    The state dict holds everything, heads too; `from_state` needs no experts. Not for several threads at once.

    Raises:
        InputError: experts that do not fit the base or the model, or settings out of range.

    >>> experts = {"a": {"weight": torch.eye(2)}, "b": {"weight": 3 * torch.eye(2)}}
    >>> twin = TwinMerging(nn.Linear(2, 2, bias=False), {"weight": torch.zeros(2, 2)}, experts, rank_ratio=1)
    >>> twin(torch.tensor([[1.0, 2.0]]), mixture={"a": 0.5, "b": 0.5})
    tensor([[2., 4.]])
    """

    names: Tensor

    def __init__(
        self,
        model: nn.Module,
        base: Weights,
        experts: Mapping[str, Weights],
        *,
        shared: Weights | None = None,
        rank_ratio: float = 0.1,
        rank: int | None = None,
        top: int | None = None,
        confidence: float = 0.0,
        features: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        if not 0 <= rank_ratio <= 1:
            raise InputError(f"rank_ratio is a share of a matrix's smaller side in [0, 1], got {rank_ratio:g}")
        if rank is not None and rank < 0:
            raise InputError(f"rank is the rank of every matrix's part, at least 0, got {rank}")
        super().__init__()
        models = Aligned(base, experts)
        if shared is None:
            shared = task_arithmetic(base, experts, scale=0.3)
        elif shared is not base:
            Aligned(base, {"shared": shared})
        self._hold(model, list(models.experts), top, confidence, features)
        load_weights(self._body, shared)
        own = self._own
        if not (known := [name for name in models.float_names if name in own]):
            raise InputError(f"the base's weights have none of the model's tensors, such as {next(iter(own), 'any')!r}")
        for name in known:
            start = own[name].detach()
            work = torch.promote_types(start.dtype, torch.float32)
            values = [expert[name].detach().to(start.device, work) for expert in models.experts.values()]
            deltas = torch.stack(values) - start.to(work)
            if not torch.isfinite(deltas).all():
                for block in models.blocks(name):
                    models.explain(block)
                raise InputError(f"the shared expert has NaN or infinite values in {name!r}; choose another merge")
            if deltas.any() and (kept := compressed(deltas, rank=rank, ratio=rank_ratio)):
                self.exclusive.keep(name, start.shape, {kind: value.to(start.dtype) for kind, value in kept.items()})
        self.exclusive.plan(self._body)

    @classmethod
    def from_state(cls, model: nn.Module, state: Weights, **options: Any) -> TwinMerging:
        """The twin whose `state_dict()` this is.

        Args:
            model: of the same architecture, with heads; their values are the state's.
            state: may lie on disk (a `Checkpoint`).
            options: `top`, `confidence` and `features`, which are not in the state.
        """
        if unknown := sorted(set(options) - {"top", "confidence", "features"}):
            raise InputError(f"from_state takes 'top', 'confidence' and 'features', got {unknown[0]!r}")
        if "names" not in state:
            raise InputError("the state is not that of a TwinMerging: it lacks 'names'; save twin.state_dict()")
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        twin._hold(model, _decoded(state["names"]), **{"top": None, "confidence": 0.0, "features": None} | options)
        own, kept = twin._own, {}
        for entry in (key for key in state if key.startswith("exclusive.")):
            _, key, kind = entry.split(".")
            name = Parts.name(key)
            if name not in own:
                raise InputError(f"the state has an exclusive part for {name!r}, which the model lacks")
            kept.setdefault(name, {})[kind] = own[name].new_empty(state[entry].shape)
        for name, tensors in kept.items():
            twin.exclusive.keep(name, own[name].shape, tensors)
        twin.exclusive.plan(twin._body)
        try:
            twin.load_state_dict(dict(state))
        except RuntimeError as error:
            raise InputError(f"the state does not fit the model: {error}") from error
        return twin

    def _hold(self, model: nn.Module, tasks: list[str], top: int | None, confidence: float, features: Any) -> None:
        if top is not None and top < 1:
            raise InputError(f"top is how many tasks to mix, at least 1, got {top}")
        if not 0 <= confidence <= 1:
            raise InputError(f"confidence is a probability in [0, 1], got {confidence:g}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.tasks, self.top, self.confidence, self.features = tasks, top, confidence, features
        self.exclusive, self.router = Parts(), _Router()
        names = torch.tensor(list("\n".join(tasks).encode()), dtype=torch.uint8)
        self.register_buffer("names", names.to(next(iter(self._own.values()), names).device))

    @property
    def _body(self) -> nn.Module:
        return shared_part(self.model)

    @property
    def _own(self) -> dict[str, Tensor]:
        return self._body.state_dict(keep_vars=True)

    @property
    def nbytes(self) -> int:
        """Bytes to store for serving all tasks: shared expert, exclusive parts, router. Heads are not counted."""
        body = self._body.state_dict()
        second = tied(body)
        stored = [value for name, value in body.items() if name not in second]
        return sum(value.nbytes for value in (*stored, *self.exclusive.buffers(), *self.router.state_dict().values()))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.tasks = _decoded(self.names)

    def train(self, mode: bool = True) -> TwinMerging:
        """Always evaluation mode: this module answers."""
        return super().train(False)

    def _arguments(self, inputs: Any, task: str | None) -> tuple[tuple, dict[str, Any]]:
        if isinstance(self.model, MultiTaskModel):
            return (inputs,), {}
        return call_arguments(self.model, inputs, task)

    def _features(self, inputs: Any) -> Tensor:
        if self.features is not None:
            return self.features(self._body, inputs)
        arguments, keywords = self._arguments(inputs, None)
        return _pooled(self._body(*arguments, **keywords), inputs)

    @torch.no_grad()
    def fit_router(
        self,
        train: Mapping[str, Dataset],
        validation: Mapping[str, Dataset],
        *,
        examples: int = 5000,
        steps: int = 300,
        lr: float = 5e-3,
        batch_size: int = 256,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> float:
        """Learn to tell the tasks apart by the shared expert's features; labels are not read.

        Args:
            train, validation: task -> split. The step with the least cross-entropy on validation is kept.
            examples: inputs of each split to use at most. Paper: 5,500 a task, validated on 1,000.
            steps, lr, batch_size: of AdamW; every batch has as many inputs of each task as of any other.
            seed: of the initial router, the inputs and the batches.
            progress: called with (steps done, steps).

        Returns:
            Accuracy on validation, mean over tasks, 0 to 1.

        Raises:
            InputError: when a task has no data, or features are not finite.
        """
        if steps < 0 or batch_size < 1 or lr <= 0:
            raise InputError(f"steps >= 0, batch_size >= 1, lr > 0 are needed, got {steps}, {batch_size}, {lr:g}")
        for what, splits in (("training", train), ("validation", validation)):
            if wrong := sorted(set(splits) ^ set(self.tasks)):
                raise InputError(f"{what} data and experts must be of the same tasks; {wrong[0]!r} is in one set only")
        seen = [self._all_features(train[task], examples, seed) for task in self.tasks]
        unseen = [self._all_features(validation[task], examples, seed) for task in self.tasks]
        everything = torch.cat(seen)
        if not torch.isfinite(everything).all():
            raise InputError("the shared expert's features are not finite; choose another merge as the shared expert")
        self.router.make(everything.shape[1], len(self.tasks), seed=seed, device=everything.device)
        spread = everything.std(0, correction=0)
        self.router.mean.copy_(everything.mean(0))
        self.router.spread.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))
        each = max(1, batch_size // len(self.tasks))
        generator = torch.Generator().manual_seed(seed)
        target = torch.arange(len(self.tasks), device=everything.device).repeat_interleave(each)
        optimiser = torch.optim.AdamW(self.router.layers.parameters(), lr=lr)
        best = (float("inf"), 0.0, copy.deepcopy(self.router.state_dict()))
        for step in range(steps + 1):
            if step % EVERY == 0 or step == steps:
                loss, right = self._judge(unseen)
                if loss < best[0]:
                    best = (loss, right, copy.deepcopy(self.router.state_dict()))
            if step == steps:
                break
            drawn = [own[torch.randint(len(own), (each,), generator=generator).to(own.device)] for own in seen]
            with torch.enable_grad():
                optimiser.zero_grad()
                F.cross_entropy(self.router(torch.cat(drawn)), target).backward()
            optimiser.step()
            if progress is not None:
                progress(step + 1, steps)
        self.router.load_state_dict(best[2])
        self.router.requires_grad_(False)
        return best[1]

    @torch.random.fork_rng(devices=[])  # a loader draws from the global generator, whatever its sampler does
    def _all_features(self, split: Dataset, examples: int, seed: int) -> Tensor:
        batches = limited(Batches(split, getattr(split, "batch_size", 128), seed=seed), examples, self.names.device)
        return torch.cat([self._features(inputs).float() for inputs, *_ in batches])

    def _judge(self, features: list[Tensor]) -> tuple[float, float]:
        """Cross-entropy and accuracy, means over tasks."""
        scores = [self.router(rows).log_softmax(1) for rows in features]
        loss = torch.stack([-rows[:, k].mean() for k, rows in enumerate(scores)]).mean()
        right = torch.stack([(rows.argmax(1) == k).float().mean() for k, rows in enumerate(scores)]).mean()
        return loss.item(), right.item()

    @torch.no_grad()
    def route(self, inputs: Any) -> Tensor:
        """The probability of each task for each input, `(N, K)` in the order of `tasks`; a row's entropy says how sure.

        Raises:
            InputError: before `fit_router`.
        """
        if "mean" not in self.router._buffers:
            raise InputError("the router has not learned yet: call fit_router, or give mixture=")
        return self.router(self._features(inputs)).float().softmax(1)

    def _mixture(self, probabilities: Tensor) -> Tensor:
        sure = probabilities.amax(1, keepdim=True) >= self.confidence
        if self.top is None or self.top >= len(self.tasks):
            return probabilities * sure
        kept = probabilities.topk(self.top, 1)
        shares = kept.values / kept.values.sum(1, keepdim=True)
        return torch.zeros_like(probabilities).scatter_(1, kept.indices, shares * sure)

    def _given(self, mixture: Mapping[str, float] | Tensor, count: int) -> Tensor:
        """A mixture as a tensor with a row for each of `count` inputs."""
        if isinstance(mixture, Mapping):
            if unknown := [task for task in mixture if task not in self.tasks]:
                raise InputError(f"a mixture has weights for {', '.join(self.tasks)}, got {unknown[0]!r}")
            mixture = torch.tensor([float(mixture.get(task, 0.0)) for task in self.tasks])
        rows = mixture.expand(count, -1) if mixture.ndim == 1 else mixture
        if rows.shape != (count, len(self.tasks)):
            raise InputError(f"a mixture for {count} inputs is {(count, len(self.tasks))}, got {tuple(mixture.shape)}")
        return rows.to(self.names.device)

    @torch.no_grad()
    def forward(
        self, inputs: Any, task: str | None = None, *, mixture: Mapping[str, float] | Tensor | None = None
    ) -> Tensor:
        """Answer a batch.

        Args:
            inputs: N inputs, of any mixture of tasks.
            task: whose head answers. `None`: each input's likeliest task, where all heads give the same number
                of outputs. The router never sees the task.
            mixture: weights of the exclusive parts instead of the router's: `(K,)`, `(N, K)` or by task.

        Returns:
            Outputs `(N, ...)`.

        Raises:
            InputError: an unknown task, or no task and heads of different outputs.
        """
        heads = self.model.heads if isinstance(self.model, MultiTaskModel) else None
        if heads is not None and task is not None and task not in heads:
            raise InputError(f"the model has no head for task {task!r}; it has {', '.join(heads)}")
        if mixture is None:
            likely = self.route(inputs)
            weights = self._mixture(likely)
        else:
            count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
            likely = weights = self._given(mixture, count)
        outputs = self.exclusive.run(self._body, partial(self._arguments, task=task), inputs, weights)
        if heads is None:
            return outputs
        if task is not None:
            return heads[task](outputs)
        answers = [heads[name](outputs) for name in self.tasks if name in heads]
        if len(answers) < len(self.tasks) or len({answer.shape for answer in answers}) > 1:
            raise InputError(
                "without a task every task needs a head, all of as many outputs: give task=, as route finds it"
            )
        return torch.stack(answers)[likely.argmax(1), torch.arange(len(outputs), device=outputs.device)]

    @torch.no_grad()
    def weights(self, mixture: Mapping[str, float] | Tensor) -> dict[str, Tensor]:
        """The ordinary weights of one mixture, `(K,)` or by task (those left out weigh 0), to take away."""
        given = self._given(mixture, 1)[0]
        own = self._own
        merged = {id(own[name]): value for name, value in self.exclusive.weights(self._body, given).items()}
        copies = {id(value): merged.get(id(value), value.detach().clone()) for value in own.values()}
        return {name: copies[id(value)] for name, value in own.items()}
