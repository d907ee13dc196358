"""One interface for every rule that turns the losses of several tasks into one step.

    update = Aggregate(model, "cagrad", c=0.5)
    fit(model, suite, sampler="all", update=update)        # or: update(losses, tasks); optimiser.step()

Parameters that at least two tasks reach are shared; their gradient is what the rule makes of the tasks' gradients
`J` `(K, P)`. Parameters of one task get their own gradient, times the task's weight where the rule weights losses.
After a step `update.last` tells the weights, the Gramian, the cosines between tasks and how many of them conflict.

Rules that look at losses only cost one backward pass. The others take one forward pass, K backward passes through what
the tasks share, and hold the K gradients (K x P numbers; at 40 tasks and 11 M parameters 1.8 GB). The rule itself sees
a K x K matrix. Gradients must be unscaled and reduced over processes before they are combined: with mixed precision or
several processes, wrap `losses` accordingly; combining on each process is something else.

Which rule: `mean` first. `cagrad`, `pcgrad` and `imtl-g` where tasks pull in different directions, `nash`, `mgda` and
`uncertainty` where their losses also differ in scale. Sources stand in `gradient_rules` and `loss_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..train import Losses
from .gradient_rules import MGDA, CAGrad, GradDrop, NashMTL, PCGrad, Rule, torchjd_rule
from .loss_weights import DWA, Constant, GradNorm, RandomWeights, Uncertainty, known

__all__ = ["RULES", "Aggregate", "Aggregated", "Gradients", "combine", "delta_m", "make_rule", "task_gradients"]

RULES: dict[str, Callable[..., Rule]] = {
    "mean": Constant,
    "sum": lambda **options: Constant(total=None, **options),
    "rlw": RandomWeights,
    "dwa": DWA,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "gradvac": torchjd_rule("GradVacWeighting"),
    "cagrad": CAGrad,
    "imtl-g": torchjd_rule("IMTLGWeighting"),
    "nash": NashMTL,
    "aligned": torchjd_rule("AlignedMTLWeighting"),
    "upgrad": torchjd_rule("UPGradWeighting"),
    "graddrop": GradDrop,
}
"""Name -> constructor. A learning rate that suits one scale is K times off for another. The scale of the
mean: mean, rlw, mgda, imtl-g (weights that add up to 1), cagrad, upgrad. Of the sum: sum, dwa, gradnorm (weights that
add up to K), pcgrad, gradvac, graddrop. Of their own: uncertainty (1 / (2 variance)), nash (length at most `max_norm`),
aligned (singular values all like the smallest)."""

OF_TASKS = ("dwa", "uncertainty", "gradnorm")
Gradients = dict[str, list[Tensor | None]]
"""Task -> its gradient for each parameter, `None` where it does not reach it."""


def make_rule(rule: str | Rule, tasks: Sequence[str] = (), **options: Any) -> Rule:
    """A rule from its name in `RULES`, or the rule itself.

    Args:
        rule: a name or a rule.
        tasks: all tasks, for rules with a parameter for each of them.
        options: of its constructor, among them `seed`.

    Raises:
        InputError: an unknown name, unknown options, tasks that are missing or named twice.
    """
    if isinstance(rule, Rule):
        if options:
            raise InputError(f"a rule that is made takes no options, got {', '.join(options)}")
        return rule
    if rule not in RULES:
        raise InputError(f"a rule is one of {', '.join(RULES)}, got {rule!r}")
    if len(set(tasks)) != len(tasks):
        raise InputError(f"task names must differ, got {', '.join(tasks)}")
    if rule in OF_TASKS:
        if not tasks:
            raise InputError(f"the rule {rule!r} needs the names of all tasks")
        options = {"tasks": list(tasks)} | options
    try:
        return RULES[rule](**options)
    except TypeError as error:
        raise InputError(f"the rule {rule!r} has no such option: {', '.join(options)}") from error


@dataclass(frozen=True)
class Aggregated:
    """What the last step saw.

    Args:
        tasks: in the order of the rest.
        weights: `(K,)`, `None` for rules that combine entry by entry.
        gramian: `(K, K)` of the gradients of shared parameters, `None` for rules that look at losses only.
    """

    tasks: tuple[str, ...]
    weights: Tensor | None
    gramian: Tensor | None

    @property
    def cosines(self) -> Tensor | None:
        """`(K, K)` cosines between the tasks' gradients, 0 where one is zero."""
        if self.gramian is None:
            return None
        lengths = self.gramian.diagonal().sqrt()
        return self.gramian / (lengths * lengths[:, None]).clamp_min(1e-30)

    @property
    def conflicts(self) -> float | None:
        """Share of the pairs of tasks whose gradients point against each other, 0 to 1."""
        if self.gramian is None or len(self.tasks) < 2:
            return None
        upper = torch.ones_like(self.gramian, dtype=torch.bool).triu(1)
        return (self.gramian[upper] < 0).double().mean().item()


def task_gradients(found: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Gradients:
    """Each loss's gradient; the graphs are freed with the last."""
    tasks = list(found)
    for task, loss in found.items():
        if not loss.requires_grad:
            raise InputError(f"the loss of task {task!r} has no graph; is its head detached?")
    return {
        task: list(
            torch.autograd.grad(found[task], parameters, retain_graph=task != tasks[-1], allow_unused=True)
        )
        for task in tasks
    }  # fmt: skip


def gramian_of(gradients: Gradients, places: Sequence[int]) -> Tensor:
    """`(K, K)` inner products over the parameters at these places, in at least float32, one parameter at a time."""
    rows = list(gradients.values())
    like = next((g for row in rows for g in row if g is not None), torch.zeros(()))
    gramian = torch.zeros(
        len(rows), len(rows), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )
    for i in places:
        there = [k for k, row in enumerate(rows) if row[i] is not None]
        block = torch.stack([rows[k][i].flatten().to(gramian.dtype) for k in there])  # type: ignore[union-attr]
        chosen = torch.tensor(there, device=gramian.device)
        gramian[chosen[:, None], chosen] += block @ block.T
    return gramian


def combine(
    rule: Rule, gradients: Gradients, places: Sequence[int], losses: Mapping[str, Tensor]
) -> tuple[list[Tensor | None], Aggregated]:
    """One gradient for each parameter, by a rule; `None` for parameters that are not at `places`.

    Args:
        rule: what combines.
        gradients: of each task.
        places: which parameters take part.
        losses: of each task, for rules that look at them.

    Raises:
        InputError: a gradient that is not finite (with its task), or tasks that the rule was not made for.
    """
    tasks = list(gradients)
    known(rule, tasks)
    values = torch.stack([losses[task].detach() for task in tasks])
    gramian = gramian_of(gradients, places)
    bad = [task for task, length in zip(tasks, gramian.diagonal().isfinite().tolist(), strict=True) if not length]
    if bad:
        raise InputError(f"the gradient of task {bad[0]!r} is not finite; lower the learning rate or look at its loss")
    size = len(next(iter(gradients.values())))
    combined: list[Tensor | None] = [None] * size
    if rule.needs == "jacobian":
        return _entrywise(rule, gradients, places, combined), Aggregated(tuple(tasks), None, gramian)
    active = [k for k, length in enumerate(gramian.diagonal().tolist()) if length > 0]
    weights = torch.zeros(len(tasks), dtype=gramian.dtype, device=gramian.device)
    if active:
        index = torch.tensor(active, device=gramian.device)
        given = gramian[index[:, None], index] if rule.needs == "gramian" else None
        weights[index] = rule(given, values[index.to(values.device)], [tasks[k] for k in active]).to(weights)
    for k, task in enumerate(tasks):
        weight = weights[k].item()
        row = gradients[task]
        mine = [i for i in places if row[i] is not None]
        first, later = [i for i in mine if combined[i] is None], [i for i in mine if combined[i] is not None]
        if first:
            for i, made in zip(first, torch._foreach_mul([row[i] for i in first], weight), strict=True):  # type: ignore[arg-type]
                combined[i] = made
        if later:
            torch._foreach_add_([combined[i] for i in later], [row[i] for i in later], alpha=weight)  # type: ignore[arg-type]
    return combined, Aggregated(tuple(tasks), weights, gramian)


def _entrywise(
    rule: Rule, gradients: Gradients, places: Sequence[int], combined: list[Tensor | None]
) -> list[Tensor | None]:
    for i in places:
        given = [row[i] for row in gradients.values()]
        like = next(g for g in given if g is not None)
        jacobian = torch.stack([torch.zeros_like(like).flatten() if g is None else g.flatten() for g in given])
        combined[i] = rule.combine(jacobian).view_as(like)  # type: ignore[operator]
    return combined


def own_factors(rule: Rule, found: Aggregated) -> list[float]:
    """What each task's gradient on its own parameters is multiplied with; 1 where the rule left the task out."""
    if not rule.weighs_losses or found.weights is None or found.gramian is None:
        return [1.0] * len(found.tasks)
    active = found.gramian.diagonal() > 0
    return torch.where(active, found.weights, torch.ones_like(found.weights)).tolist()


class Aggregate(nn.Module):
    """An update (see `allrounder.fit`) that combines tasks by a rule.

    Args:
        model: what the losses run, or its parameters.
        rule: a name in `RULES`, or a rule.
        tasks: all tasks, for rules with parameters of their own.
        shared: the parameters that the rule is for. Default: those that at least two tasks reach.
        options: of the rule.

    Attributes:
        last: `Aggregated` of the last step.

    Raises:
        InputError: as `make_rule`; a parameter given as shared that the model does not train. When called: a task
            that reaches no shared parameter, losses or gradients that are not finite, a loss without graph, tasks
            named twice or none.
    """

    last: Aggregated | None

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Parameter],
        rule: str | Rule = "mean",
        *,
        tasks: Sequence[str] = (),
        shared: Iterable[nn.Parameter] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = model.parameters() if isinstance(model, nn.Module) else model
        trained = [parameter for parameter in given if parameter.requires_grad]
        self.rule = make_rule(rule, tasks, **options)
        self._trained = tuple(trained)  # a tuple, so that they are not registered as this module's own
        self.partition = Partition(trained, shared)
        self.last = None

    def forward(self, losses: Losses, tasks: Sequence[str]) -> Mapping[str, Tensor]:
        check_tasks(tasks)
        found = losses(tasks)
        if self.rule.needs == "losses":
            return self._weighted(found)
        gradients = task_gradients(found, self._trained)
        places = self.partition.shared(gradients)
        combined, self.last = combine(self.rule, gradients, places, found)
        factors = own_factors(self.rule, self.last)
        for i, parameter in enumerate(self._trained):
            if combined[i] is None:
                for row, factor in zip(gradients.values(), factors, strict=True):
                    if (own := row[i]) is not None:
                        combined[i] = own if factor == 1 else own * factor
            parameter.grad = combined[i]
        return found

    def _weighted(self, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        tasks = list(found)
        known(self.rule, tasks)
        values = torch.stack([found[task] for task in tasks])
        for task, finite, loss in zip(tasks, values.isfinite().tolist(), found.values(), strict=True):
            if not finite:
                raise InputError(f"the loss of task {task!r} is {loss.item()}; lower the learning rate")
            if not loss.requires_grad:
                raise InputError(f"the loss of task {task!r} has no graph; is its head detached?")
        weights = self.rule(None, values.detach(), tasks)
        made = torch.autograd.grad((weights * values).sum(), self._trained, allow_unused=True)
        for parameter, gradient in zip(self._trained, made, strict=True):
            parameter.grad = gradient  # of this step alone, as the other rules leave it
        self.last = Aggregated(tuple(tasks), weights, None)
        return found


class Partition:
    """Which parameters tasks share, as far as steps have shown it."""

    def __init__(self, trained: Sequence[Tensor], shared: Iterable[Tensor] | None) -> None:
        known_ids = {id(parameter) for parameter in trained}
        self._given = None if shared is None else {id(parameter) for parameter in shared}
        if self._given is not None and not self._given <= known_ids:
            raise InputError("a parameter given as shared is not among those that the model trains")
        self._trained = trained
        self._reached: list[set[str]] = [set() for _ in trained]

    def shared(self, gradients: Gradients) -> list[int]:
        """Places of the shared parameters that a task of this step reaches.

        Raises:
            InputError: a task that reaches none of them, a parameter given as own that two tasks reach.
        """
        for task, row in gradients.items():
            for i, gradient in enumerate(row):
                if gradient is not None:
                    self._reached[i].add(task)
        now = [i for i in range(len(self._trained)) if any(row[i] is not None for row in gradients.values())]
        if self._given is None:
            places = [i for i in now if len(self._reached[i]) > 1]
        else:
            places = [i for i in now if id(self._trained[i]) in self._given]
            for i in set(now) - set(places):
                if len(self._reached[i]) > 1:
                    raise InputError(
                        f"a parameter of shape {tuple(self._trained[i].shape)} is not given as shared, but the tasks "
                        f"{', '.join(sorted(self._reached[i]))} reach it"
                    )
        for task, row in gradients.items():
            if len(gradients) > 1 and not any(row[i] is not None for i in places):
                raise InputError(f"task {task!r} has no gradient on any shared parameter; is its head detached?")
        return places


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError for no tasks and for tasks named twice."""
    if not tasks or len(set(tasks)) != len(tasks):
        raise InputError(f"a step needs tasks with different names, got {list(tasks)}")


def delta_m(
    scores: Mapping[str, float], baseline: Mapping[str, float], *, lower_is_better: Iterable[str] = ()
) -> float:
    """Mean relative change against single-task models in percent; negative is better, as in CAGrad and Nash-MTL.

    Args:
        scores: task -> metric of the multi-task model.
        baseline: task -> metric of the single-task model, not 0.
        lower_is_better: tasks whose metric is an error.

    Raises:
        InputError: other tasks, or a baseline of 0.

    >>> round(delta_m({"a": 0.9, "b": 1.1}, {"a": 1.0, "b": 1.0}, lower_is_better=["b"]), 6)
    10.0
    """
    if set(scores) != set(baseline) or not scores:
        raise InputError(f"scores are of {', '.join(scores)} and the baseline of {', '.join(baseline)}")
    if zero := [task for task, value in baseline.items() if value == 0]:
        raise InputError(f"the baseline of task {zero[0]!r} is 0; delta_m divides by it")
    errors = set(lower_is_better)
    changes = [(1 if t in errors else -1) * (scores[t] - baseline[t]) / baseline[t] for t in scores]
    return 100 * sum(changes) / len(changes)
