"""Rules that turn the gradients of K tasks into one, through their Gramian `G = J J^T` `(K, K)` alone.

A rule gives weights w, and the step's gradient is `d = w^T J`:

    mgda      w = argmin over the simplex of w^T G w                       (2018, arXiv 1810.04650)
    pcgrad    each gradient loses what points against the others, summed   (2020, arXiv 2001.06782)
    gradvac   the same towards a running target cosine                     (2020, arXiv 2010.05874)
    cagrad    argmin over the simplex of <g_w, g0> + c |g0| |g_w|, then
              d = g0 + c |g0| / |g_w| g_w, g0 the mean                     (2021, arXiv 2110.14048)
    imtl-g    equal projections on all unit gradients                      (2021, ICLR, IMTL)
    nash      G w = 1 / w                                                  (2022, arXiv 2202.01017)
    aligned   singular values of J made equal                              (2023, arXiv 2305.19000)
    upgrad    gradients projected on the cone that hurts no task, averaged (2024, arXiv 2406.16232)
    graddrop  entry by entry one sign is kept; needs J itself              (2020, arXiv 2010.06808)

torchjd computes all but four. Its CAGrad and Nash-MTL need cvxpy, its MGDA stops Frank-Wolfe a thousandth short of the
minimum, and its PCGrad takes 40 ms at 40 tasks. MGDA is solved here exactly, as non-negative least squares of unit
gradients, so that a task a million times as steep as another does no harm; CAGrad by scipy's SLSQP, good to six orders
of magnitude between gradients; Nash-MTL by damped Newton steps on `w^T G w / 2 - sum log w`, which is self-concordant,
so that they converge for any G whose tasks can all be improved at once.

Pure functions take G and give w; scale it as the paper does. Rules are modules with `needs`, state, `reset` and a state
dict. Only tasks with a gradient take part: means are over them, the others get the weight 0.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = [
    "MGDA", "CAGrad", "GradDrop", "NashMTL", "Need", "PCGrad", "Rule", "TorchJD", "cagrad", "mgda", "nash_mtl",
    "pcgrad",
]  # fmt: skip

Need = Literal["losses", "gramian", "jacobian"]


class Rule(nn.Module):
    """`rule(gramian, losses, tasks) -> weights`, all of length K in the order of `tasks`.

    Args:
        seed: of what the rule draws; its generator is part of the state dict.

    Attributes:
        needs: `losses` when the Gramian is not looked at (it is then `None`), `gramian`, or `jacobian` (the rule then
            has `combine(jacobian)` instead).
        weighs_losses: whether a task's weight also holds for the parameters that only this task has.
        looks_back: whether `after` wants the losses of the same batch once the step is made.
    """

    needs: ClassVar[Need] = "gramian"
    weighs_losses: ClassVar[bool] = False
    looks_back: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def after(self, losses: Mapping[str, Tensor]) -> None:
        """Task -> its loss on the step's batch, at the weights after the step; only if `looks_back`."""

    def reset(self) -> None:
        """Forget what earlier steps left."""
        self.generator.manual_seed(self.seed)

    def get_extra_state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())

    def __deepcopy__(self, memo: dict) -> Rule:
        state, generator = self.generator.get_state(), self.generator
        del self.generator  # generators cannot be copied
        try:
            made = self.__class__.__new__(self.__class__)
            memo[id(self)] = made
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        finally:
            self.generator = generator
        made.generator = torch.Generator().manual_seed(0)
        made.generator.set_state(state)
        return made

    def drawn_seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator))


class TorchJD(Rule):
    """A weighting of torchjd, by its class's name, in float64 on the CPU.

    Args:
        name: for instance `UPGradWeighting`.
        options: of that class.
        seed: of the order in which tasks are visited, where it matters.
    """

    weighting: Any

    def __init__(self, name: str, *, seed: int = 0, **options: Any) -> None:
        super().__init__(seed=seed)
        from torchjd import aggregation

        self.name = name
        self.__dict__["weighting"] = getattr(aggregation, name)(**options)  # its state is in the extra state
        self._tasks: tuple[str, ...] | None = None

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        assert gramian is not None
        if hasattr(self.weighting, "reset") and self._tasks not in (None, tuple(tasks)):
            self.weighting.reset()  # its state is of those tasks
        self._tasks = tuple(tasks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.drawn_seed())
            weights = self.weighting(gramian.detach().cpu().double())
        if self.name == "IMTLGWeighting" and not 0 < weights.abs().sum() < 1e6:  # they sum to 1, or are not defined
            warnings.warn(
                f"the gradients of {', '.join(tasks)} sum to zero on the equalising direction; the weights of IMTL-G "
                "are undefined, and what the tasks share stays as it is in this step",
                stacklevel=2,
            )
            weights = torch.zeros_like(weights)
        return weights.to(gramian)

    def reset(self) -> None:
        super().reset()
        self._tasks = None
        if hasattr(self.weighting, "reset"):
            self.weighting.reset()

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"tasks": self._tasks, "running": getattr(self.weighting, "_phi_t", None)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self._tasks = state["tasks"]
        if (running := state["running"]) is not None:  # GradVac: torchjd cannot load what it saves
            self.weighting._phi_t, self.weighting._state_key = running.clone(), (len(running), running.dtype)


def _on_simplex(value: Callable[[Any], tuple[float, Any]], count: int) -> Tensor:
    """The weights >= 0 with sum 1 that minimise a convex function, given with its gradient."""
    import numpy as np
    from scipy.optimize import minimize

    found = minimize(
        value, np.full(count, 1 / count), jac=True, method="SLSQP", bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
        options={"ftol": 1e-14, "maxiter": 300},
    )  # fmt: skip
    w = torch.from_numpy(found.x).clamp_min(0)
    return w / w.sum()


def mgda(gramian: Tensor) -> Tensor:
    """Weights of the shortest convex combination of the gradients.

    >>> mgda(torch.tensor([[9.0, 0.0], [0.0, 1.0]])).tolist()
    [0.10000000149011612, 0.8999999761581421]
    """
    import numpy as np
    from scipy.optimize import nnls

    g = gramian.detach().cpu().double().numpy()
    lengths = np.sqrt(g.diagonal())
    values, vectors = np.linalg.eigh(g / lengths / lengths[:, None])
    # a >= 0 that minimises |a^T unit rows|^2 + (sum_k a_k min|g| / |g_k| - 1)^2 lies on the ray of the solution
    matrix = np.vstack([np.sqrt(values.clip(0))[:, None] * vectors.T, lengths.min() / lengths])
    a, _ = nnls(matrix, np.eye(len(matrix))[-1], maxiter=100 * len(g))
    w = a / lengths
    return torch.from_numpy(w / w.sum()).to(gramian)


def cagrad(gramian: Tensor, *, c: float = 0.4, rescale: Literal[0, 1, 2] = 1) -> Tensor:
    """Weights of CAGrad, including those of the mean.

    Args:
        gramian: `(K, K)`.
        c: how far from the mean gradient, in its lengths, 0 <= c < 1. Paper: 0.4, 0.5.
        rescale: 0 as the formula has it, 1 divides by 1 + c^2 (the authors' code), 2 by 1 + c.

    >>> cagrad(torch.tensor([[1.0, -0.5], [-0.5, 1.25]]), c=0.0, rescale=0).tolist()
    [0.5, 0.5]
    """
    count = len(gramian)
    mean = torch.full((count,), 1 / count, dtype=torch.float64)
    g = gramian.detach().cpu().double()
    if count == 1 or c == 0:
        return mean.to(gramian) / _rescale(c, rescale)
    g = g / g.diagonal().mean()
    row, length = (g @ mean).numpy(), max(float(mean @ g @ mean), 0.0) ** 0.5
    matrix = g.numpy()

    def value(w: Any) -> tuple[float, Any]:
        product = matrix @ w
        norm = max(float(w @ product), 1e-24) ** 0.5
        return float(w @ row) + c * length * norm, row + c * length / norm * product

    w = _on_simplex(value, count)
    norm = max(float(w @ g @ w), 0.0) ** 0.5
    shift = c * length / norm * w if norm > 1e-6 * length else torch.zeros_like(w)
    return ((mean + shift) / _rescale(c, rescale)).to(gramian)


def _rescale(c: float, rescale: int) -> float:
    return {0: 1.0, 1: 1 + c**2, 2: 1 + c}[rescale]


def nash_mtl(gramian: Tensor, *, iterations: int = 100) -> Tensor:
    """The positive w with `G w = 1 / w`, before any limit on the length of d (which is sqrt(K) at the solution).

    Args:
        gramian: `(K, K)` of non-zero gradients.
        iterations: most Newton steps; where no common descent direction exists there is no solution, and the last
            iterate is returned.

    >>> nash_mtl(torch.tensor([[9.0, 0.0], [0.0, 1.0]])).tolist()
    [0.3333333432674408, 1.0]
    """
    g = gramian.detach().cpu().double()
    lengths = g.diagonal().sqrt()
    unit = g / lengths / lengths[:, None]  # the solution scales with each gradient, so unit gradients are solved for
    w = torch.full((len(g),), len(g) ** -0.5, dtype=torch.float64)
    for _ in range(iterations):
        gradient = unit @ w - 1 / w
        step = torch.linalg.solve(unit + torch.diag(w**-2), gradient)
        decrement = max(float(gradient @ step), 0.0) ** 0.5
        w = w - step / (1 + decrement if decrement > 0.25 else 1)  # stays positive: inside the Dikin ellipsoid
        if decrement < 1e-10 or w.max() > 1e6:  # solved, or no direction improves all tasks
            break
    return (w / lengths).to(gramian)


class CAGrad(Rule):
    """`cagrad` as a rule."""

    def __init__(self, *, c: float = 0.4, rescale: Literal[0, 1, 2] = 1, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not 0 <= c < 1:
            raise InputError(f"c of CAGrad is in [0, 1), got {c:g}")
        if rescale not in (0, 1, 2):
            raise InputError(f"rescale of CAGrad is 0, 1 or 2, got {rescale!r}")
        self.c: float = c
        self.scale: Literal[0, 1, 2] = rescale

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        assert gramian is not None
        return cagrad(gramian, c=self.c, rescale=self.scale)


def pcgrad(gramian: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of PCGrad: their gradients are those of all tasks after the surgery, summed.

    Args:
        gramian: `(K, K)` of non-zero gradients.
        generator: of the order in which each task visits the others.
    """
    g = gramian.detach().cpu().double().numpy()
    total = torch.zeros(len(g), dtype=torch.float64)
    for i in range(len(g)):
        kept = torch.zeros(len(g), dtype=torch.float64)
        kept[i] = 1.0
        row = kept.numpy()
        for j in torch.randperm(len(g), generator=generator).tolist():
            if j != i and (product := g[j] @ row) < 0:
                row[j] -= product / g[j, j]
        total += kept
    return total.to(gramian)


class PCGrad(Rule):
    """`pcgrad` as a rule."""

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        assert gramian is not None
        return pcgrad(gramian, self.generator)


class MGDA(Rule):
    """`mgda` as a rule."""

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        assert gramian is not None
        return mgda(gramian)


class NashMTL(Rule):
    """`nash_mtl` as a rule.

    Args:
        max_norm: longest d; longer ones are shortened. 0 for no limit.
        every: weights are computed at every so many steps and used again in between (while the tasks stay the same).
    """

    def __init__(self, *, max_norm: float = 1.0, every: int = 1, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if max_norm < 0 or every < 1:
            raise InputError(f"max_norm is at least 0 and every at least 1, got {max_norm:g} and {every}")
        self.max_norm, self.every = max_norm, every
        self._kept: tuple[int, tuple[str, ...], Tensor] | None = None

    def forward(self, gramian: Tensor | None, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        assert gramian is not None
        age, known, w = self._kept or (0, (), gramian.new_zeros(0))
        if known != tuple(tasks) or age >= self.every:
            age, w = 0, nash_mtl(gramian)
        self._kept = age + 1, tuple(tasks), w
        w = w.to(gramian)
        length = (w @ gramian @ w).clamp_min(0).sqrt()
        return w * (self.max_norm / length) if self.max_norm and length > self.max_norm else w

    def reset(self) -> None:
        super().reset()
        self._kept = None

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"kept": self._kept}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self._kept = state["kept"]


class GradDrop(Rule):
    """Keeps, entry by entry, the positive or the negative gradients, with the odds of their sums."""

    needs: ClassVar[Need] = "jacobian"

    def combine(self, jacobian: Tensor) -> Tensor:
        """`(K, P)` -> `(P,)`."""
        from torchjd.aggregation import GradDrop as Aggregator

        with torch.random.fork_rng(devices=[jacobian.device] if jacobian.is_cuda else []):
            torch.manual_seed(self.drawn_seed())
            return Aggregator()(jacobian)


def torchjd_rule(name: str, **fixed: Any) -> Callable[..., Rule]:
    """A constructor for `TorchJD(name)`."""
    return lambda **options: TorchJD(name, **fixed, **options)
