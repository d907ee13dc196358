"""Rules that weight the losses of K tasks: one backward pass on `sum_k w_k L_k`.

    mean, sum     w_k = 1 / K, w_k = 1
    rlw           w = softmax of K normal draws, each step anew            (2021, arXiv 2111.10603)
    dwa           w = K softmax(r / T), r_k = mean loss of the last epoch
                  over that of the one before                             (2018, arXiv 1803.10704)
    uncertainty   sum_k L_k / (2 exp(s_k)) + s_k / 2, with s learned       (2017, arXiv 1705.07115)
    gradnorm      w = K softmax(v), v learned so that all w_k |g_k| keep
                  pace with their tasks                                   (2017, arXiv 1711.02257)
    famo          w = z / L over their sum, z = softmax(x), x learned so
                  that all log L_k fall alike                             (2023, arXiv 2306.03792)

Each weight also holds for the parameters that only its task has. What `uncertainty` and `gradnorm` learn are
parameters of the rule: give them to the optimiser without weight decay (`allrounder.fit` does). `famo` has an Adam of
its own, because its gradient is known only after the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..train import Losses
from .gradient_rules import Need, Rule
from .perturb import RandomState, frozen_batchnorm, random_state, replayed

__all__ = ["DWA", "FAMO", "Afterwards", "Constant", "GradNorm", "RandomWeights", "Uncertainty"]


class Constant(Rule):
    """The same weight for every task.

    Args:
        total: sum of the weights of the step's tasks; `None`: each weighs 1.
    """

    needs: ClassVar[Need] = "losses"
    weighs_losses: ClassVar[bool] = True

    def __init__(self, *, total: float | None = 1.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.total = total

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        return torch.full_like(losses, 1.0 if self.total is None else self.total / len(losses))


class RandomWeights(Rule):
    """Random loss weighting."""

    needs: ClassVar[Need] = "losses"
    weighs_losses: ClassVar[bool] = True

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        return torch.randn(len(tasks), generator=self.generator).softmax(0).to(losses)


class DWA(Rule):
    """Dynamic weight average.

    Args:
        tasks: all tasks.
        epoch: steps over which losses are averaged.
        temperature: T > 0. Paper: 2.
    """

    needs: ClassVar[Need] = "losses"
    weighs_losses: ClassVar[bool] = True
    seen: Tensor
    means: Tensor
    step: Tensor

    def __init__(self, tasks: Sequence[str], *, epoch: int = 100, temperature: float = 2.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if epoch < 1 or not temperature > 0:
            raise InputError(f"epoch is at least 1 and temperature above 0, got {epoch} and {temperature:g}")
        self.tasks, self.epoch, self.temperature = list(tasks), epoch, temperature
        self.register_buffer("seen", torch.zeros(2, len(tasks)))  # sum and count of this epoch's losses
        self.register_buffer("means", torch.full((2, len(tasks)), torch.nan))  # of the last two epochs
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        places = [self.tasks.index(task) for task in tasks]
        if self.step > 0 and self.step % self.epoch == 0:
            self.means[1] = self.means[0]
            self.means[0] = self.seen[0] / self.seen[1]
            self.seen.zero_()
        self.step += 1
        self.seen[0, places] += losses.detach().to(self.seen)
        self.seen[1, places] += 1
        ratio = (self.means[0] / self.means[1])[places]
        if not ratio.isfinite().all():  # the first two epochs, or a task that one of them did not see
            return torch.ones_like(losses)
        return (len(places) * (ratio / self.temperature).softmax(0)).to(losses)

    def reset(self) -> None:
        super().reset()
        self.seen.zero_()
        self.means.fill_(torch.nan)
        self.step.zero_()


class Uncertainty(Rule):
    """Uncertainty weighting; at its optimum exp(s_k) = L_k.

    Args:
        tasks: all tasks.
        start: of every s_k, the log variance.
    """

    needs: ClassVar[Need] = "losses"
    weighs_losses: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[str], *, start: float = -0.5, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.tasks = list(tasks)
        self.log_variance = nn.Parameter(torch.full((len(tasks),), float(start)))

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        places = [self.tasks.index(task) for task in tasks]
        with torch.no_grad():
            s = self.log_variance[places]
            gradient = torch.zeros_like(self.log_variance)
            gradient[places] = 0.5 - losses.detach().to(s) / (2 * s.exp())
        self.log_variance.grad = gradient
        return (0.5 * (-s).exp()).to(losses)


class GradNorm(Rule):
    """GradNorm, with the gradients of all shared parameters and the first losses as reference.

    Args:
        tasks: all tasks.
        alpha: how strongly slow tasks are favoured. Default: LibMTL's 1.5.
    """

    weighs_losses: ClassVar[bool] = True
    first: Tensor

    def __init__(self, tasks: Sequence[str], *, alpha: float = 1.5, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.tasks, self.alpha = list(tasks), alpha
        self.scores = nn.Parameter(torch.ones(len(tasks)))
        self.register_buffer("first", torch.full((len(tasks),), torch.nan))

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        assert gramian is not None
        places = [self.tasks.index(task) for task in tasks]
        now = losses.detach().to(self.first)
        unknown = self.first[places].isnan()
        self.first[places] = torch.where(unknown, now, self.first[places])
        lengths = gramian.detach().diagonal().sqrt().to(self.first)
        with torch.enable_grad():
            w = len(places) * self.scores[places].softmax(0)
            norms = w * lengths
            pace = now / self.first[places]
            target = (norms.mean() * (pace / pace.mean()) ** self.alpha).detach()
            (gradient,) = torch.autograd.grad((norms - target).abs().sum(), self.scores)
        self.scores.grad = gradient
        return w.detach().to(losses)

    def reset(self) -> None:
        super().reset()
        self.first.fill_(torch.nan)
        with torch.no_grad():
            self.scores.fill_(1.0)


class FAMO(Rule):
    """Fast adaptive multitask optimisation: every loss falls at the same relative rate, from losses alone.

    A step follows `c sum_k z_k grad log(L_k - least_k)`, `z = softmax(x)`, `c` such that the weights of the losses
    `c z_k / (L_k - least_k)` add up to 1. After it, x takes one step of Adam against the task that fell most: along
    `J(z)' (log L before - log L after) + decay x`, both on the same batch. Multiplying a loss with a constant changes c
    alone. Costs one forward pass more than the mean; draws (dropout) are replayed in it.

    Args:
        tasks: all tasks.
        lr: of x, above 0. Paper: 0.025.
        decay: of x, at least 0; holds z near uniform. Authors' code: 0.01; their search: 0.001 to 0.01.
        least: the least value of each loss, or of all; losses are at least that.

    Raises:
        InputError: settings out of range; when called: a loss below its least value or not finite, or a step before
            that was not followed by `update.stepped()`.
    """

    needs: ClassVar[Need] = "losses"
    weighs_losses: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    scores: Tensor
    moments: Tensor
    steps: Tensor

    def __init__(
        self, tasks: Sequence[str], *, lr: float = 0.025, decay: float = 0.01,
        least: float | Mapping[str, float] = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(seed=seed)
        if not (lr > 0 and decay >= 0):
            raise InputError(f"lr of FAMO is above 0 and decay at least 0, got {lr:g} and {decay:g}")
        if isinstance(least, Mapping) and set(least) != set(tasks):
            raise InputError(f"least is of all tasks, {', '.join(tasks)}, got {', '.join(least)}")
        self.tasks, self.lr, self.decay = list(tasks), lr, decay
        self.least = dict(least) if isinstance(least, Mapping) else dict.fromkeys(tasks, least)
        self.register_buffer("scores", torch.zeros(len(tasks)))
        self.register_buffer("moments", torch.zeros(2, len(tasks)))  # of Adam
        self.register_buffer("steps", torch.zeros(len(tasks)))  # of each task
        self._before: tuple[list[str], Tensor] | None = None

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        if self._before is not None:
            raise InputError(
                "famo has not seen the losses after the last step; call update.stepped() after each optimiser.step()"
            )
        above = self._above(losses, tasks)
        self._before = list(tasks), above.log()
        z = self.scores[[self.tasks.index(task) for task in tasks]].softmax(0)
        return (z / above / (z / above).sum()).to(losses)

    def after(self, losses: Mapping[str, Tensor]) -> None:
        if self._before is None:
            return
        (tasks, before), self._before = self._before, None
        places = [self.tasks.index(task) for task in tasks]
        fall = before - self._above(torch.stack([losses[task].detach() for task in tasks]), tasks).log()
        x = self.scores[places]
        z = x.softmax(0)
        gradient = z * (fall - z @ fall) + self.decay * x
        self.steps[places] += 1
        first = self.moments[0, places].lerp(gradient, 0.1)
        second = self.moments[1, places].lerp(gradient**2, 0.001)
        self.moments[0, places], self.moments[1, places] = first, second
        count = self.steps[places]
        self.scores[places] = x - self.lr * first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)

    def reset(self) -> None:
        super().reset()
        for value in (self.scores, self.moments, self.steps):
            value.zero_()
        self._before = None

    def _above(self, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        """Losses above their least values, in the type of the state and never 0."""
        least = losses.new_tensor([self.least[task] for task in tasks])
        for task, loss, low in zip(tasks, losses.tolist(), least.tolist(), strict=True):
            if not low <= loss < float("inf"):
                raise InputError(
                    f"famo takes the logarithm of a loss above its least value, and that of task {task!r} is {loss:g} "
                    f"with least {low:g}; lower `least`, or the learning rate if it is not finite"
                )
        return (losses.detach() - least).to(self.scores) + 1e-8


class Afterwards:
    """Shows rules that look back the losses of a step once more after it, and leaves no trace.

    Args:
        model: its BatchNorm statistics stay as they are; parameters alone have none.
        rules: of the update.
    """

    def __init__(self, model: nn.Module | Iterable[Tensor], *rules: Rule) -> None:
        self._model = model if isinstance(model, nn.Module) else None
        self._rules = [rule for rule in rules if rule.looks_back]
        self._kept: tuple[Losses, list[str], RandomState] | None = None

    def keep(self, losses: Losses, tasks: Sequence[str]) -> None:
        """Before the first forward pass of a step."""
        if self._rules:
            self._kept = losses, list(tasks), random_state()

    def show(self) -> None:
        """After the optimiser's step; nothing without a step."""
        if self._kept is None:
            return
        (losses, tasks, state), self._kept = self._kept, None
        with torch.no_grad(), frozen_batchnorm(self._model) if self._model else nullcontext(), replayed(state):
            found = losses(tasks)
        for rule in self._rules:
            rule.after(found)


def known(rule: Any, tasks: Sequence[str]) -> None:
    """Raises InputError when a rule with parameters of its own was not made for one of these tasks."""
    if (mine := getattr(rule, "tasks", None)) is not None and (other := [t for t in tasks if t not in mine]):
        raise InputError(f"the rule was made for the tasks {', '.join(mine)}, got {other[0]!r}")
