"""MT-AdamW: AdamW for training in which each step sees one task ("task-balanced gradient normalisation").

With tasks drawn in the ratios s_k, a step of task k does

    g     = omega_k * grad L_k / ||grad L_k||
    m     = beta1 m + (1 - beta1) / s_k * g
    n     = beta2 n + (1 - beta2) / s_k * g^2
    theta = theta - lr * (m_hat / (sqrt(n_hat) + eps) + weight_decay * theta)

At fixed weights E[m] = sum_k omega_k grad L_k / ||grad L_k|| whatever the ratios and the scales of the losses are:
neither a rare task nor one with a small loss is lost. Without the normalisation the steepest loss decides, without
1 / s_k the most frequent task does; neither repair is enough alone (the study shows it).

Use it when tasks cannot share a step: other inputs, other batch sizes, other negatives, several processes. When all
tasks fit in one step, the rules of `allrounder.optim` see their gradients together. Time: AdamW and one norm. Memory:
AdamW's two moments, one set for all tasks.

Uni-Perceiver v2 (2022, arXiv 2211.09808; CVPR 2023). The code of the paper was never published. Where its text is
silent: a parameter that the step's task does not reach has the gradient 0 (its moments decay and it still moves, so
that the expectation above holds for it too); the bias correction counts all steps; a gradient of norm 0 skips the step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..data.mixture import checked_shares
from ..errors import InputError
from ..train import Losses

__all__ = ["MTAdamW"]


def _norm(tensors: list[Tensor]) -> float:
    """Norm of all of them together, at least in float32."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    if not tensors:
        return 0.0
    norms = torch._foreach_norm(tensors, dtype=dtype)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm().item()


class MTAdamW(Optimizer):
    """AdamW with normalised gradients and moments corrected for how often each task is drawn.

    In a loop of one's own: `loss.backward(); optimiser.step(task="retrieval")`. In `allrounder.fit`:
    `optimiser=partial(MTAdamW, shares=ratios), sampler=unmixed(ratios)`. Clipping of gradients has no effect.

    Args:
        params: parameters or groups, as in torch.
        shares: task -> sampling ratio, > 0, summing to one.
        contributions: task -> omega, the share of each task in the direction. Default: 1 for each task.
        lr, betas, eps, weight_decay: as in torch's AdamW; the decay is decoupled.

    Attributes:
        skipped: steps that were left out because the gradient's norm was 0.

    Raises:
        InputError: ratios that are not positive or do not sum to one, contributions for other tasks, values out of
            range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        shares: Mapping[str, float],
        contributions: Mapping[str, float] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.shares = checked_shares(shares)
        self.contributions = dict.fromkeys(shares, 1.0) if contributions is None else dict(contributions)
        if set(self.contributions) != set(self.shares) or not all(v > 0 for v in self.contributions.values()):
            raise InputError(
                f"contributions must be above 0 for the tasks {', '.join(self.shares)}, got {self.contributions}"
            )
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(
                f"lr, eps and weight_decay are at least 0 and betas in [0, 1), got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, betas={betas}"
            )
        rare = min(self.shares, key=lambda task: self.shares[task])
        if self.shares[rare] < 1 - betas[0]:
            warnings.warn(
                f"task {rare!r} is drawn with ratio {self.shares[rare]:g}, below 1 - beta1 = {1 - betas[0]:g}: each of "
                "its steps moves the first moment by more than its gradient; raise the ratio or beta1",
                stacklevel=2,
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.steps = 0
        self.skipped = 0
        self._task: str | None = None

    def __call__(self, losses: Losses, tasks: Sequence[str]) -> Mapping[str, Tensor]:
        """As an update of `allrounder.fit`: backward of the step's one task.

        Raises:
            InputError: several tasks in one step.
        """
        if len(tasks) != 1:
            raise InputError(f"MT-AdamW takes one task a step, got {', '.join(tasks)}; use sampler=unmixed(ratios)")
        found = losses(tasks)
        found[tasks[0]].backward()
        self._task = tasks[0]
        return found

    @torch.no_grad()
    def step(self, closure: None = None, *, task: str | None = None) -> None:  # type: ignore[override]
        """One step with the gradient of one task.

        Args:
            closure: not taken.
            task: whose gradient is in `.grad`; in `allrounder.fit` it is known.

        Raises:
            InputError: no or an unknown task, a closure, a gradient that is not finite.
        """
        if closure is not None:
            raise InputError("MT-AdamW takes no closure; call backward, then step(task=...)")
        task, self._task = task or self._task, None
        if task not in self.shares:
            raise InputError(f"step needs one of the tasks {', '.join(self.shares)}, got {task!r}")
        reached = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = _norm(reached)
        if not math.isfinite(norm):
            raise InputError(f"the gradient of task {task!r} is not finite; lower the learning rate")
        if norm == 0:
            self.skipped += 1
            return
        self.steps += 1
        for group in self.param_groups:
            self._step_group(group, self.contributions[task] / norm, 1 / self.shares[task])

    def _step_group(self, group: dict[str, Any], scale: float, boost: float) -> None:
        known = [p for p in group["params"] if p.grad is not None or p in self.state]
        if not known:
            return
        for p in known:
            if p not in self.state:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        beta1, beta2 = group["betas"]
        first = [self.state[p]["exp_avg"] for p in known]
        second = [self.state[p]["exp_avg_sq"] for p in known]
        torch._foreach_mul_(first, beta1)
        torch._foreach_mul_(second, beta2)
        now = [p for p in known if p.grad is not None]
        grads = torch._foreach_mul([p.grad for p in now], scale)
        torch._foreach_add_([self.state[p]["exp_avg"] for p in now], grads, alpha=(1 - beta1) * boost)
        squares = [self.state[p]["exp_avg_sq"] for p in now]
        torch._foreach_addcmul_(squares, grads, grads, (1 - beta2) * boost)

        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, math.sqrt(1 - beta2**self.steps))
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(known, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(known, first, denominator, -group["lr"] / (1 - beta1**self.steps))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the shares, contributions and counts."""
        own = {"shares": self.shares, "contributions": self.contributions, "steps": self.steps, "skipped": self.skipped}
        return super().state_dict() | {"mt": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume.

        Raises:
            InputError: a state of other tasks, shares or contributions.
        """
        own = state_dict.get("mt")
        if own is None:
            raise InputError("this state dict is not MT-AdamW's: it has no entry 'mt'")
        for name in ("shares", "contributions"):
            if own[name] != getattr(self, name):
                raise InputError(
                    f"the state dict was made with {name} {own[name]}, this optimiser has {getattr(self, name)}"
                )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "mt"})
        self.steps, self.skipped = own["steps"], own["skipped"]
