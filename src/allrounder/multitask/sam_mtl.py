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
copies of the parameters; the memory of the K gradients is kept from step to step.

Improving Multi-task Learning via Seeking Task-based Flat Regions (2022, arXiv 2211.13723; ICCV 2025). Departures from
the authors' code: weights are restored bit for bit; a task without gradient is not perturbed and takes no part, where
the code divides by zero; shared and own parameters always have a radius each.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..optim.aggregation import Aggregated, combine, make_rule, own_factors
from ..optim.gradient_rules import Rule
from ..optim.loss_weights import Afterwards
from ..optim.perturb import RandomState, frozen_batchnorm, perturbed, random_state, replayed, same_state
from ..optim.task_gradients import Blocks, Gradients, Partition, check_tasks, stacked, task_gradients
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
        self._trained = list(model.parameters())
        self.partition = Partition(self._trained, None)
        self._afterwards = Afterwards(model, self.rule, self.flat_rule)
        self.last = self.last_flat = None
        self._draws = False
        self._blocks: Blocks = {}  # kept, because K x P numbers of new memory cost as much as working on them
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
        self._afterwards.keep(losses, tasks)
        memory = {i: block for i, block in self._blocks.items() if len(block) == len(tasks)}
        into = {task: {} for task in tasks}
        for i, block in memory.items():
            for task, row in zip(tasks, block.unbind(), strict=True):
                into[task][i] = row
        found, gradients, states = self._first(losses, tasks, into)
        places = self.partition.shared(gradients)
        # the shared gradients, in each row h_k instead of g_k after task k's turn
        blocks = self._blocks = stacked(gradients, places, memory)
        given = {task: found[task] for task in gradients}
        combined: Blocks = {}
        own: dict[int, tuple[int, Tensor]] = {}  # place -> index of its task, gradient
        if self.variant == "decomposed":
            combined, self.last = combine(self.rule, blocks, given)
        lengths = self._plain_lengths(blocks, gradients)
        shared = [self._trained[i] for i in places]
        kept = [parameter.detach().clone() for parameter in shared]
        rows_of = list(zip(*(blocks[i].unbind() for i in places), strict=True)) or [()] * len(given)
        with frozen_batchnorm(model):
            for k, (task, rows) in enumerate(zip(given, rows_of, strict=True)):
                with ExitStack() as stack:
                    stack.enter_context(self._moved(shared, rows, lengths[0][k], kept))
                    stack.enter_context(self._moved(self._trained, gradients.pop(task), lengths[1][k]))
                    if states:
                        stack.enter_context(replayed(states[task]))
                    sharp = task_gradients(losses([task]), self._trained)[task]
                if rows:
                    self._replace(rows, [sharp[i] for i in places])
                own |= {i: (k, g) for i, g in enumerate(sharp) if g is not None and i not in blocks}
        if self.variant == "decomposed":
            flat, self.last_flat = combine(self.flat_rule, blocks, given)
        else:
            flat, self.last = combine(self.rule, blocks, given)
        factors = own_factors(self.rule, self.last)  # type: ignore[arg-type]
        for i, gradient in flat.items():
            combined[i] = combined[i].add_(gradient) if i in combined else gradient
        for i, (k, gradient) in own.items():
            combined[i] = gradient if factors[k] == 1 else gradient * factors[k]
        for i, parameter in enumerate(self._trained):
            parameter.grad = combined.get(i)
        return found

    def stepped(self) -> None:
        """As `optim.Aggregate.stepped`: call it after the optimiser's step, as `allrounder.fit` does."""
        self._afterwards.show()

    def get_extra_state(self) -> list[list[str]]:
        return self.partition.state()

    def set_extra_state(self, state: list[list[str]]) -> None:
        self.partition.load(state)

    def _replace(self, rows: list[Tensor] | tuple[Tensor, ...], sharp: list[Tensor | None]) -> None:
        """g_k by h_k, or by gS_k for the direct variant, in place; a parameter that was not reached counts as 0."""
        if self.variant == "direct":
            torch._foreach_zero_(rows)
        reached = [(row, gradient) for row, gradient in zip(rows, sharp, strict=True) if gradient is not None]
        if reached:
            torch._foreach_sub_([row for row, _ in reached], [gradient for _, gradient in reached])
        torch._foreach_neg_(rows)

    def _first(
        self, losses: Losses, tasks: Sequence[str], into: Mapping[str, Mapping[int, Tensor]]
    ) -> tuple[dict[str, Tensor], Gradients, dict[str, RandomState]]:
        """Losses, gradients, and where forward passes draw (dropout) the state in front of each task's."""
        start, (model,) = random_state(), self._model
        moving = any(part.training for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
        if not self._draws or moving:  # all tasks at once, so that running statistics move as they do without SAM
            with torch.set_grad_enabled(not self._draws):
                found = losses(tasks)
                found = {task: found[task] for task in tasks}
            if not self._draws and same_state(start, random_state()):
                return found, task_gradients(found, self._trained, into), {}
            self._draws = True
        found, gradients, states = {}, {}, {}
        with replayed(start, keep=True), frozen_batchnorm(model):
            for task in tasks:
                states[task] = random_state()
                one = losses([task])
                found |= {task: one[task]}
                gradients |= task_gradients({task: one[task]}, self._trained, into)
        return found, gradients, states

    def _plain_lengths(self, blocks: Blocks, gradients: Gradients) -> tuple[list[float], list[float]]:
        """Of each task's gradient of shared and of own parameters."""
        count = len(gradients)
        if self.variant == "decomposed" and self.last is not None and self.last.gramian is not None:
            shared = self.last.gramian.diagonal().sqrt().tolist()
        else:
            shared = _lengths([[block[k] for block in blocks.values()] for k in range(count)])
        return shared, _lengths([[g for g in row if g is not None] for row in gradients.values()])

    def _moved(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        length: float,
        kept: Sequence[Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Inside, these parameters stand one radius up these gradients of that length."""
        if length == 0:
            return nullcontext()
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        directions = [gradient for gradient in gradients if gradient is not None]
        moving = [parameters[i] for i in places]
        if self.adaptive:
            sizes = [parameter.detach().abs() for parameter in moving]
            directions = list(torch._foreach_mul(directions, sizes))
            (length,) = _lengths([directions])
            if length == 0:  # where gradients are not zero the weights are
                return nullcontext()
            torch._foreach_mul_(directions, sizes)
        saved = None if kept is None else [kept[i] for i in places]
        return perturbed(moving, directions, scale=self.radius / length, kept=saved)


def _lengths(groups: Sequence[Sequence[Tensor]]) -> list[float]:
    """Of the tensors of each group together, in at least float32; 0 for none."""
    tensors = [tensor for group in groups for tensor in group]
    if not tensors:
        return [0.0] * len(groups)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    parts = iter(torch.stack([part.to(tensors[0].device) for part in torch._foreach_norm(tensors, 2, dtype)]).tolist())
    return [math.hypot(*(next(parts) for _ in group)) for group in groups]


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
            (length,) = _lengths([[g for g in row if g is not None]])
            scale = radius / length if length else 0.0
            with perturbed(trained, row, scale=scale), replayed(state), torch.no_grad():
                after = losses([task])[task]
            rises[task] = (after - before[task].detach()).item()
    return rises
