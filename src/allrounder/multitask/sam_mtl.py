"""SAM-MTL: every task settles in a flat valley of its own, over any rule that combines gradients.

With theta shared and phi_k of task k alone, on one batch:

    g_k   = dL_k/dtheta                        eps_k   = radius * T^2 g_k / |T g_k|,   T = I, or |theta| (adaptive)
    u_k   = dL_k/dphi_k                        delta_k = radius * T^2 u_k / |T u_k|
    gS_k, uS_k = the same gradients at (theta + eps_k, phi_k + delta_k)
    h_k   = gS_k - g_k                         about radius * grad |g_k|: the way to flatter ground
    theta follows A(g_1..g_K) + A(h_1..h_K),   phi_k follows uS_k (times w_k where A weights losses)

A is any rule of `optim.aggregation`; the two calls have states of their own. Combining gS_k directly (`direct`) lets
conflicts of the two parts hide each other.

Use it where tasks are small or their labels noisy and training goes on to memorisation. Where a model still underfits
it costs accuracy. Time: K + 1 forward and 2K backward passes (2K forward passes for models with dropout, whose masks
are replayed task by task, and one more of all tasks where they also have BatchNorm). Memory: the K gradients and two
copies of the parameters.

Improving Multi-task Learning via Seeking Task-based Flat Regions (2022, arXiv 2211.13723; ICCV 2025). Departures from
the authors' code: weights are restored bit for bit; a task without gradient is not perturbed and takes no part, where
the code divides by zero; shared and own parameters always have a radius each.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..optim.aggregation import (
    Aggregated,
    Gradients,
    Partition,
    check_tasks,
    combine,
    make_rule,
    own_factors,
    task_gradients,
)
from ..optim.gradient_rules import Rule
from ..optim.perturb import RandomState, frozen_batchnorm, perturbed, random_state, replayed, same_state
from ..train import Losses

__all__ = ["SAMMTL", "sharpness"]


class SAMMTL(nn.Module):
    """An update (see `allrounder.fit`) that seeks flat regions task by task.

    Args:
        model: what the losses run, in training mode.
        rule: a name in `optim.RULES`, or a rule.
        radius: of the perturbation, >= 0. Plain: 0.05 to 0.1; adaptive: the authors' 2.
        adaptive: scale by the size of each weight (ASAM).
        variant: `decomposed`, or `direct` (the ablation).
        tasks: all tasks, for rules with parameters of their own.
        options: of the rule.

    Attributes:
        last, last_flat: `Aggregated` of the loss part and of the flat part of the last step.

    Raises:
        InputError: a negative radius, an unknown variant; when called as `optim.Aggregate`.
    """

    last: Aggregated | None
    last_flat: Aggregated | None

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "pcgrad",
        *,
        radius: float = 0.05,
        adaptive: bool = False,
        variant: Literal["decomposed", "direct"] = "decomposed",
        tasks: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        if not (math.isfinite(radius) and radius >= 0):
            raise InputError(f"the radius is finite and at least 0, got {radius}")
        if variant not in ("decomposed", "direct"):
            raise InputError(f"variant is 'decomposed' or 'direct', got {variant!r}")
        self.rule = make_rule(rule, tasks, **options)
        self.flat_rule = copy.deepcopy(self.rule)
        self.radius, self.adaptive, self.variant = radius, adaptive, variant
        self._model = (model,)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.partition = Partition(self._trained, None)
        self.last = self.last_flat = None
        self._draws = False
        length = math.sqrt(sum(float(p.detach().float().square().sum()) for p in self._trained))
        if not adaptive and radius > 0.5 * length > 0:
            warnings.warn(
                f"a plain radius of {radius:g} is {100 * radius / length:.0f}% of the weights' norm; did you mean "
                "adaptive=True?",
                stacklevel=2,
            )

    def forward(self, losses: Losses, tasks: Sequence[str]) -> Mapping[str, Tensor]:
        check_tasks(tasks)
        (model,) = self._model
        found, gradients, states = self._first(losses, tasks)
        places = self.partition.shared(gradients)
        shared = set(places)
        combined: list[Tensor | None] = [None] * len(self._trained)
        own: list[tuple[int, Tensor] | None] = [None] * len(self._trained)  # index of the task, its gradient
        if self.variant == "decomposed":
            combined, self.last = combine(self.rule, gradients, places, found)
        with frozen_batchnorm(model):
            for k, (task, row) in enumerate(gradients.items()):
                directions = self._directions(row, shared)
                with ExitStack() as stack:
                    stack.enter_context(perturbed(self._trained, directions))
                    if states:
                        stack.enter_context(replayed(states[task]))
                    sharp = task_gradients(losses([task]), self._trained)[task]
                for i, gradient in enumerate(sharp):
                    if gradient is None:
                        continue
                    if i not in shared:
                        own[i] = k, gradient
                    elif self.variant == "decomposed":
                        row[i] = gradient - row[i]  # type: ignore[operator]
                    else:
                        row[i] = gradient
        if self.variant == "decomposed":
            flat, self.last_flat = combine(self.flat_rule, gradients, places, found)
        else:
            flat, self.last = combine(self.rule, gradients, places, found)
        factors = own_factors(self.rule, self.last)  # type: ignore[arg-type]
        for i, parameter in enumerate(self._trained):
            if (mine := own[i]) is not None:
                combined[i] = mine[1] if factors[mine[0]] == 1 else mine[1] * factors[mine[0]]
            elif i in shared and flat[i] is not None:
                combined[i] = flat[i] if combined[i] is None else combined[i] + flat[i]  # type: ignore[operator]
            parameter.grad = combined[i]
        return found

    def _first(
        self, losses: Losses, tasks: Sequence[str]
    ) -> tuple[dict[str, Tensor], Gradients, dict[str, RandomState]]:
        """Losses, gradients, and where forward passes draw (dropout) the state in front of each task's."""
        start, (model,) = random_state(), self._model
        moving = any(part.training for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
        if not self._draws or moving:  # all tasks at once, so that running statistics move as they do without SAM
            with torch.set_grad_enabled(not self._draws):
                found = dict(losses(tasks))
            if not self._draws and same_state(start, random_state()):
                return found, task_gradients(found, self._trained), {}
            self._draws = True
        found, gradients, states = {}, {}, {}
        with replayed(start, keep=True), frozen_batchnorm(model):
            for task in tasks:
                states[task] = random_state()
                one = losses([task])
                found |= {task: one[task]}
                gradients |= task_gradients({task: one[task]}, self._trained)
        return found, gradients, states

    def _directions(self, row: Sequence[Tensor | None], shared: set[int]) -> list[Tensor | None]:
        """eps for shared and delta for own parameters; `None` where there is no gradient."""
        directions: list[Tensor | None] = [None] * len(row)
        for mine in (shared, set(range(len(row))) - shared):
            places = [i for i in mine if row[i] is not None]
            for i, direction in zip(places, self._ball([row[i] for i in places], places), strict=True):  # type: ignore[misc]
                directions[i] = direction
        return directions

    def _ball(self, gradients: list[Tensor], places: Sequence[int]) -> list[Tensor]:
        if not gradients:
            return []
        sizes = [self._trained[i].detach().abs() for i in places] if self.adaptive else None
        scaled = list(torch._foreach_mul(gradients, sizes)) if sizes else gradients
        length = torch.stack([n.float() for n in torch._foreach_norm(scaled)]).norm().item()
        if length == 0:
            return [torch.zeros_like(g) for g in gradients]
        if sizes:
            scaled = list(torch._foreach_mul(scaled, sizes))
        return list(torch._foreach_mul(scaled, self.radius / length))


def sharpness(model: nn.Module, losses: Losses, tasks: Sequence[str], *, radius: float = 0.05) -> dict[str, float]:
    """How much each task's loss rises one radius up its own gradient: `L(w + radius g / |g|) - L(w)`.

    Args:
        model: what the losses run; left as it was, bit for bit.
        losses: of a fixed batch, as for an update.
        tasks: whose sharpness is wanted.
        radius: > 0, of all trained parameters together.

    Raises:
        InputError: a radius that is not positive.
    """
    if not radius > 0:
        raise InputError(f"the radius is above 0, got {radius:g}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rises = {}
    with frozen_batchnorm(model):
        for task in tasks:
            state = random_state()
            before = losses([task])
            row = task_gradients(before, trained)[task]
            there = [g for g in row if g is not None]
            length = torch.stack([g.float().norm() for g in there]).norm().item() if there else 0.0
            directions = [None if g is None or length == 0 else radius / length * g for g in row]
            with perturbed(trained, directions), replayed(state), torch.no_grad():
                after = losses([task])[task]
            rises[task] = (after - before[task].detach()).item()
    return rises
