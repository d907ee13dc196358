"""One interface for every rule that turns the losses of several tasks into one step.

    update = Aggregate(model, "cagrad", c=0.5)
    fit(model, suite, sampler="all", update=update)        # or: update(losses, tasks); optimiser.step()

Parameters that at least two tasks reach are shared; their gradient is what the rule makes of the tasks' gradients
`J` `(K, P)`. Parameters of one task get their own gradient, times the task's weight where the rule weights losses.
After a step `update.last` tells the weights, the Gramian, the cosines between tasks and how many of them conflict.

Rules that look at losses only cost one backward pass; `famo` looks at them again after the step, so call
`update.stepped()` there (`fit` does). The others take one forward pass, K backward passes through what the tasks share,
and hold the K gradients (K x P numbers; at 40 tasks and 11 M parameters 1.8 GB). The rule itself sees a K x K matrix.
With `space="features"` the K passes go through the heads alone and one through the backbone: about the cost of `mean`,
for tasks whose heads read one output (`feature_space` has the mathematics).

Gradients must be unscaled and reduced over processes before they are combined: with mixed precision or several
processes, wrap `losses` accordingly; combining on each process is something else.

Which rule: `mean` first. `cagrad`, `pcgrad` and `imtl-g` where tasks pull in different directions, `nash`, `mgda`,
`uncertainty` and `famo` where their losses also differ in scale. Sources stand in `gradient_rules` and `loss_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..train import Losses
from .feature_space import backbone_of, cut_at
from .gradient_rules import MGDA, CAGrad, GradDrop, NashMTL, PCGrad, Rule, torchjd_rule
from .loss_weights import DWA, FAMO, Afterwards, Constant, GradNorm, RandomWeights, Uncertainty, known
from .task_gradients import Blocks, Partition, check_tasks, gramian_of, stacked, task_gradients

__all__ = ["RULES", "Aggregate", "Aggregated", "combine", "delta_m", "make_rule", "own_factors"]

RULES: dict[str, Callable[..., Rule]] = {
    "mean": Constant,
    "sum": lambda **options: Constant(total=None, **options),
    "rlw": RandomWeights,
    "dwa": DWA,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "famo": FAMO,
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
"""Name -> constructor. A learning rate that suits one scale is K times off for another. The scale of the mean: mean,
rlw, famo, mgda, imtl-g (weights that add up to 1), cagrad, upgrad. Of the sum: sum, dwa, gradnorm (weights that add up
to K), pcgrad, gradvac, graddrop. Of their own: uncertainty (1 / (2 variance)), nash (length at most `max_norm`),
aligned (singular values all like the smallest)."""

OF_TASKS = ("dwa", "uncertainty", "gradnorm", "famo")


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


def combine(rule: Rule, blocks: Blocks, losses: Mapping[str, Tensor]) -> tuple[Blocks, Aggregated]:
    """One gradient for each parameter, by a rule: place -> `(*shape)`.

    Args:
        rule: what combines.
        blocks: place -> gradients `(K, *shape)`.
        losses: task -> loss, K of them in the order of the rows.

    Raises:
        InputError: a gradient that is not finite (with its task), or tasks that the rule was not made for.
    """
    tasks = list(losses)
    known(rule, tasks)
    values = torch.stack([loss.detach() for loss in losses.values()])
    gramian = gramian_of(blocks, values)
    lengths = gramian.diagonal().tolist()
    if bad := [task for task, length in zip(tasks, lengths, strict=True) if not math.isfinite(length)]:
        raise InputError(f"the gradient of task {bad[0]!r} is not finite; lower the learning rate or look at its loss")
    if rule.needs == "jacobian":
        made = {i: rule.combine(block.reshape(len(tasks), -1)) for i, block in blocks.items()}  # type: ignore[operator]
        weights = None
    else:
        active = [k for k, length in enumerate(lengths) if length > 0]
        weights = torch.zeros(len(tasks), dtype=gramian.dtype, device=gramian.device)
        if active:
            index = torch.tensor(active, device=gramian.device)
            given = gramian[index[:, None], index] if rule.needs == "gramian" else None
            weights[index] = rule(given, values[index], [tasks[k] for k in active]).to(weights)
        made = {
            i: weights.to(block.device) @ block.reshape(len(tasks), -1).to(weights.dtype) for i, block in blocks.items()
        }
    shaped = {i: made[i].to(block.dtype).view(block.shape[1:]) for i, block in blocks.items()}
    return shaped, Aggregated(tuple(tasks), weights, gramian)


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
        space: `parameters`, or `features`: the rule sees the gradients at the output of `model.backbone`, and what it
            makes of them goes down the backbone once. For losses whose heads all read one such output.
        options: of the rule.

    Attributes:
        last: `Aggregated` of the last step.

    Raises:
        InputError: as `make_rule`; a parameter given as shared that the model does not have; an unknown space, or
            features without a backbone. When called: a task that reaches no shared parameter, losses or gradients that
            are not finite, a loss without graph, tasks named twice or none; with `space="features"` a backbone that
            ran more than once, or that a loss reaches around its output.
    """

    last: Aggregated | None

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Parameter],
        rule: str | Rule = "mean",
        *,
        tasks: Sequence[str] = (),
        shared: Iterable[nn.Parameter] | None = None,
        space: Literal["parameters", "features"] = "parameters",
        **options: Any,
    ) -> None:
        super().__init__()
        self.rule = make_rule(rule, tasks, **options)
        # tuples, so that they are not registered as this module's own
        self._parameters_of = tuple(model.parameters() if isinstance(model, nn.Module) else model)
        self._backbone = (backbone_of(model, space, shared),)
        self.partition = Partition((torch.empty(0), *self._parameters_of), shared)  # the features come first
        self._afterwards = Afterwards(model, self.rule)
        self.last = None

    def forward(self, losses: Losses, tasks: Sequence[str]) -> Mapping[str, Tensor]:
        check_tasks(tasks)
        self._afterwards.keep(losses, tasks)
        if self.rule.needs == "losses":
            return self._weighted(losses(tasks))
        (backbone,) = self._backbone
        found, cut = (losses(tasks), None) if backbone is None else cut_at(backbone, losses, tasks)
        features = torch.empty(0) if cut is None else cut.features
        gradients = task_gradients(found, [features, *self._parameters_of])
        places = self.partition.shared(gradients)
        blocks = stacked(gradients, places)
        combined, self.last = combine(self.rule, blocks, {task: found[task] for task in gradients})
        for row, factor in zip(gradients.values(), own_factors(self.rule, self.last), strict=True):
            for i, own in enumerate(row):
                if own is not None:
                    combined[i] = own if factor == 1 else own * factor
        if cut is not None:
            cut.down(combined, self._parameters_of)
        for i, parameter in enumerate(self._parameters_of, 1):
            parameter.grad = combined.get(i)
        return found

    def stepped(self) -> None:
        """Call it after the optimiser's step, as `allrounder.fit` does: rules that look back (`famo`) see the losses
        of the step's batch once more, in one forward pass. Nothing happens for others."""
        self._afterwards.show()

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
        (row,) = task_gradients({"all": (weights * values).sum()}, self._parameters_of).values()
        for parameter, gradient in zip(self._parameters_of, row, strict=True):
            parameter.grad = gradient  # of this step alone, as the other rules leave it
        self.last = Aggregated(tuple(tasks), weights, None)
        return found

    def get_extra_state(self) -> list[list[str]]:
        return self.partition.state()

    def set_extra_state(self, state: list[list[str]]) -> None:
        self.partition.load(state)


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
