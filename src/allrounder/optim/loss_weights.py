"""Rules that weight the losses of K tasks: one backward pass on `sum_k w_k L_k`.

    mean, sum     w_k = 1 / K, w_k = 1
    rlw           w = softmax of K normal draws, each step anew            (2021, arXiv 2111.10603)
    dwa           w = K softmax(r / T), r_k = mean loss of the last epoch
                  over that of the one before                             (2018, arXiv 1803.10704)
    uncertainty   sum_k L_k / (2 exp(s_k)) + s_k / 2, with s learned       (2017, arXiv 1705.07115)
    gradnorm      w = K softmax(v), v learned so that all w_k |g_k| keep
                  pace with their tasks                                   (2017, arXiv 1711.02257)

Each weight also holds for the parameters that only its task has. What `uncertainty` and `gradnorm` learn are
parameters of the rule: give them to the optimiser without weight decay (`allrounder.fit` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from .gradient_rules import Need, Rule

__all__ = ["DWA", "Constant", "GradNorm", "RandomWeights", "Uncertainty"]


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


def known(rule: Any, tasks: Sequence[str]) -> None:
    """Raises InputError when a rule with parameters of its own was not made for one of these tasks."""
    if (mine := getattr(rule, "tasks", None)) is not None and (other := [t for t in tasks if t not in mine]):
        raise InputError(f"the rule was made for the tasks {', '.join(mine)}, got {other[0]!r}")
