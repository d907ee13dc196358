"""IBCL: learn tasks one after another as distributions, and have a model for any weighting of them without training.

Each task is learned m times by variational inference with a mean-field Gaussian over the parameters, from m priors:

    q_t^j = argmin_q  E_q[-log p(D_t | theta)] + KL(q || prior_j)

The knowledge base is the matrix of these Gaussians (rows: means, then standard deviations). For a preference w over
tasks, every Gaussian of task t has the weight w_t / m, and the model is the weighted sum of rows:

    mean = sum_t sum_j (w_t / m) mean_t^j,      std = sum_t sum_j (w_t / m) std_t^j

Use it where tasks share one head and pull it different ways, and the trade-off is chosen after training, often, or by
many people; best on frozen features with a small head. Not where tasks have classes of their own, and not for networks
with hidden layers trained from different starts: the average of unlike hidden units is nothing.

`chained=True` takes task t's posteriors as the priors of task t + 1, as published: it keeps what was learned and, when
tasks disagree, bends every model to the first ones. With `chained=False` each task starts from the first priors, and
the models follow the retrained optimum closely (see the study).

Cost: m forward and backward passes a step, whatever the number of preferences; storage 2 P numbers a Gaussian, at most
m a task, fewer with `threshold` > 0; a model for a preference is one matrix product.

Paper: Lu et al., "IBCL: Zero-shot Model Generation for Task Trade-offs in Continual Learning", 2023, arXiv 2310.02995.
Departures from its code: the divergence counts once per pass over the data, not once per batch (`divergence_scale`);
regions have mass 1 - alpha (the code's have alpha) and every parameter is drawn for itself (the code draws one number a
tensor, so a diagonal of the box); the distance is the 2-Wasserstein distance a parameter, not a sum of norms over P;
means start at the module's own weights, from which all Gaussians descend.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import evaluating
from .learner import Batch, Learner, TaskInfo, size_of
from .variational import Box, Flat, distances, divergence, half_width

__all__ = ["IBCL"]

Preference = Sequence[float] | Tensor


class IBCL(Learner):
    """Imprecise Bayesian continual learning.

    Args:
        model: `inputs -> logits (B, outputs)`, one head for all tasks; used in evaluation mode, never changed. What
            does not require a gradient stays frozen.
        outputs: size of the output space, which all tasks share.
        priors: standard deviations of the m first priors, with mean 0. Paper: (2, 2.5, 3) or (.2, .25, .3).
        chained: whether a task's posteriors are the next one's priors. Paper: True.
        threshold: a posterior that is at most so far from a stored one is not stored, that one stands for it; in units
            of a parameter. 0 stores all (the paper's code: 0.01 of another distance).
        lr: of Adam. Paper: 5e-4 to 1e-3.
        start: first standard deviation of every parameter. Paper: 1.
        divergence_scale: factor of the divergence. 1 is the bound; examples / batch size is the paper's code.
        seed: of the draws.

    Attributes:
        rows: `(E, 2 P)` stored Gaussians, the knowledge base.
        extremes: the rows of each task learned, m numbers a task.
        replaced: how many of each task's posteriors were not stored, another one standing for them.
        fits: variational fits that were made: m a task.

    >>> learner, info = IBCL(nn.Linear(2, 2), 2), TaskInfo(None, None, [Batch(torch.eye(2), torch.tensor([0, 1]))])
    >>> for _ in range(2):
    ...     learner.begin_task(info)
    ...     learner.end_task(info)
    >>> learner.model_for([0.3, 0.7]), learner.combine([[0, 1], [0.5, 0.5]]).shape
    (Linear(in_features=2, out_features=2, bias=True), torch.Size([2, 12]))
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundaries"})
    kept: ClassVar[tuple[str, ...]] = (
        *Learner.kept, "rows", "extremes", "replaced", "tasks", "classes", "fits", "generator", "current",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        outputs: int,
        *,
        priors: Sequence[float] = (2.0, 2.5, 3.0),
        chained: bool = True,
        threshold: float = 0.0,
        lr: float = 1e-3,
        start: float = 1.0,
        divergence_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(outputs)
        self.priors = tuple(float(std) for std in priors)
        if not self.priors or not all(0 < std < float("inf") for std in self.priors):
            raise InputError(f"priors are standard deviations, at least one and all above 0, got {list(priors)}")
        if not (0 < lr < float("inf") and 0 < start < float("inf")):
            raise InputError(f"lr and start are above 0, got {lr:g} and {start:g}")
        if not (threshold >= 0 and divergence_scale >= 0):
            raise InputError(
                f"threshold and divergence_scale are at least 0, got {threshold:g} and {divergence_scale:g}"
            )
        self.model, self.chained, self.threshold, self.lr = model, chained, threshold, lr
        self.start, self.divergence_scale, self.seed = start, divergence_scale, seed
        self.flat = Flat(model)
        first = self.flat.vector()
        self.rows = first.new_zeros(0, 2 * self.flat.size)
        self.extremes: list[list[int]] = []
        self.replaced: list[int] = []
        self.tasks: list[int | None] = []
        self.classes: list[int] | None = None
        self.fits = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.current: _Fit | None = None

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "priors": list(self.priors), "parameters": self.flat.size}

    def begin_task(self, info: TaskInfo) -> None:
        """Set up m fits.

        Raises:
            InputError: no examples, a task that was learned before, or classes other than those of the first task.
        """
        if self.current is not None:
            raise InputError("a task has begun and has not ended; call end_task before the next begin_task")
        if info.task is not None and info.task in self.tasks:
            raise InputError(
                f"task {info.task} comes a second time; IBCL has one set of posteriors a task: join its data, or hide "
                "task_id_train to have it counted as another"
            )
        if info.classes is not None:
            self.classes = list(info.classes) if self.classes is None else self.classes
            if list(info.classes) != self.classes:
                raise InputError(
                    f"a task with the classes {list(info.classes)} after one with {self.classes}: IBCL averages models "
                    "of one head; give tasks that share their outputs (scenario 'domain')"
                )
        examples = sum(len(batch) for batch in info.batches)
        if not examples:
            raise InputError(
                "a task needs its examples at begin_task (info.batches): their number scales the divergence"
            )
        own = self.flat.vector()
        if self.chained and self.extremes:
            prior = self.rows[self.extremes[-1]]
            mean, std = prior.chunk(2, 1)
        else:
            stds = own.new_tensor(self.priors).unsqueeze(1).expand(-1, len(own))
            prior = torch.cat([torch.zeros_like(stds), stds], 1)
            mean, std = own.expand(len(stds), -1), torch.full_like(stds, self.start)
        self.current = _Fit(mean, std.log(), prior, examples, self.lr)
        self.tasks = [*self.tasks, info.task]

    def observe(self, batch: Batch) -> dict[str, float]:
        """One step of every fit: one draw of the parameters each.

        Raises:
            InputError: before begin_task, for an empty batch, outputs of another shape, a loss that is not finite.
        """
        fit = self.current
        if fit is None:
            raise InputError("IBCL learns within a task: call begin_task first")
        self.enough(batch)
        self.note_classes(batch.targets)
        fit.optimiser.zero_grad()
        noise = torch.randn(fit.mean.shape, generator=self.generator, dtype=fit.mean.dtype).to(fit.mean.device)
        std = fit.log_std.exp()
        drawn = fit.mean + std * noise  # (m, P)
        with evaluating(self.model):
            logits = torch.stack([self.flat(vector, batch.inputs) for vector in drawn])
        if logits.shape[1:] != (len(batch), self.outputs):
            raise InputError(f"the model gives {tuple(logits.shape[1:])}; expected ({len(batch)}, {self.outputs})")
        likelihood = F.cross_entropy(logits.flatten(0, 1), batch.targets.repeat(len(logits))) * len(logits)
        prior_mean, prior_std = fit.prior.chunk(2, 1)
        bound = likelihood + self.divergence_scale / fit.examples * (
            divergence(fit.mean, std, prior_mean, prior_std).sum()
        )
        if not torch.isfinite(bound):
            raise InputError(f"the loss is {bound.item()}; lower the learning rate (lr={self.lr:g})")
        bound.backward()
        fit.optimiser.step()
        self.gradients += len(logits) * len(batch)
        return {"loss": bound.item() / len(logits)}

    def end_task(self, info: TaskInfo) -> None:
        """Take the posteriors into the knowledge base, those that are new.

        Warns:
            When standard deviations have collapsed to less than a ten-thousandth of the prior's.
        """
        if self.current is None:
            raise InputError("no task has begun: call begin_task before end_task")
        fit, self.current = self.current, None
        found = torch.cat([fit.mean, fit.log_std.exp()], 1).detach()  # (m, 2 P)
        collapsed = (found.chunk(2, 1)[1] < 1e-4 * fit.prior.chunk(2, 1)[1]).double().mean().item()
        if collapsed:
            warnings.warn(
                f"{collapsed:.1%} of standard deviations collapsed; lower lr or the number of steps",
                stacklevel=2,
            )
        chosen, stood = [], 0
        for row in found:
            apart = distances(row, self.rows)
            if len(apart) and apart.min() <= self.threshold:
                chosen.append(int(apart.argmin()))
                stood += 1
            else:
                self.rows = torch.cat([self.rows, row.unsqueeze(0)])
                chosen.append(len(self.rows) - 1)
        self.extremes, self.replaced = [*self.extremes, chosen], [*self.replaced, stood]
        self.fits += len(found)

    def coefficients(self, preferences: Preference) -> Tensor:
        """The weight of every stored Gaussian, `(R, E)`, rows sum to 1.

        Args:
            preferences: `(T,)` or `(R, T)`: weights of the tasks learned, in their order, at least 0, with sum 1.

        Raises:
            InputError: for anything else.
        """
        weights = torch.as_tensor(preferences, dtype=torch.float64)
        weights = weights.unsqueeze(0) if weights.ndim == 1 else weights
        known = len(self.extremes)
        if not known:
            raise InputError("no task has been learned yet: there is nothing to prefer")
        if weights.ndim != 2 or weights.shape[1] != known:
            raise InputError(
                f"a preference has one weight for each of {known} tasks, got the shape {tuple(weights.shape)}"
            )
        if not (weights >= 0).all():
            raise InputError(f"a preference has no negative weights, got {weights.min():g}")
        if not torch.allclose(weights.sum(1), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6):
            raise InputError(f"the weights of a preference sum to 1, got {weights.sum(1).tolist()}")
        m = len(self.priors)
        places = torch.tensor(self.extremes).flatten()
        shares = (weights / m).repeat_interleave(m, 1)
        return torch.zeros(len(weights), len(self.rows), dtype=torch.float64).index_add(1, places, shares)

    @torch.no_grad()
    def combine(self, preferences: Preference) -> Tensor:
        """The Gaussian of each preference, `(R, 2 P)`: means, then standard deviations. One matrix product for all."""
        return self.coefficients(preferences).to(self.rows) @ self.rows

    def model_for(self, preference: Preference) -> nn.Module:
        """An ordinary module for a preference `(T,)`: a copy of the given one with the means as its parameters."""
        return self._module(self._one(preference).chunk(2)[0])

    def region(self, preference: Preference, alpha: float = 0.01, *, joint: bool = True) -> Box:
        """The box of mass 1 - alpha of the Gaussian of a preference.

        Args:
            preference: `(T,)`.
            alpha: mass outside, in (0, 1).
            joint: mass of the box as a whole, or (False, as in the paper's code) of each parameter's interval.
        """
        mean, std = self._one(preference).chunk(2)
        return Box(mean, std, half_width(alpha, len(mean) if joint else 1))

    @torch.no_grad()
    def draw(
        self, preference: Preference, count: int, *, alpha: float = 0.01, mixture: bool = False, seed: int = 0
    ) -> Tensor:
        """Parameter vectors from the region of a preference, `(count, P)`.

        Args:
            preference: `(T,)`.
            count: at least 1. Paper: 10.
            alpha: mass outside the region.
            mixture: from the weighted mixture of the stored Gaussians (each within its own box), not from the Gaussian
                with their mean parameters, which is narrower when they lie apart.
            seed: of the draws.
        """
        if count < 1:
            raise InputError(f"count is how many to draw, at least 1, got {count}")
        generator = torch.Generator().manual_seed(seed)
        if not mixture:
            return self.region(preference, alpha).draw(count, generator)
        (shares,), width = self.coefficients(preference), half_width(alpha, self.flat.size)
        which = torch.multinomial(shares, count, replacement=True, generator=generator).tolist()
        return torch.cat([self._box(row, width).draw(1, generator) for row in which])

    def sample(self, preference: Preference, count: int, **options: Any) -> list[nn.Module]:
        """Modules with parameters from the region of a preference; options as for `draw`."""
        return [self._module(vector) for vector in self.draw(preference, count, **options)]

    def _box(self, row: int, width: float) -> Box:
        mean, std = self.rows[row].chunk(2)
        return Box(mean, std, width)

    def _one(self, preference: Preference) -> Tensor:
        combined = self.combine(preference)
        if len(combined) != 1:
            raise InputError(f"one preference at a time here, got {len(combined)}; combine takes several")
        return combined[0]

    @torch.no_grad()
    def _module(self, vector: Tensor) -> nn.Module:
        model, named = copy.deepcopy(self.model), self.flat.named(vector)
        for name, parameter in model.named_parameters():
            if name in named:
                parameter.copy_(named[name])
        return model.eval()

    @torch.no_grad()
    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        """Of the model for equal weights, or for one task where its number is given and it was learned."""
        known = len(self.extremes)
        weights = torch.full((known,), 1 / max(known, 1), dtype=torch.float64)
        if task is not None and task in self.tasks[:known]:
            weights = F.one_hot(torch.tensor(self.tasks.index(task)), known).double()
        mean, _ = self._one(weights).chunk(2)
        with evaluating(self.model):
            return self.masked(self.flat(mean, inputs))

    def held(self) -> dict[str, int]:
        return {"posteriors": size_of(self.rows)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "current": None if self.current is None else self.current.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        rows = state.get("rows", self.rows)
        if rows.shape[1] != self.rows.shape[1]:
            raise InputError(
                f"the saved posteriors have {rows.shape[1] // 2} parameters, this model {self.flat.size}: they are of "
                "another model"
            )
        super().load_state_dict({**state, "rows": rows.to(self.rows), "current": None})
        if (fit := state["current"]) is not None:
            where = {name: fit[name].to(self.rows) for name in ("mean", "log_std", "prior")}
            self.current = _Fit(**where, examples=fit["examples"], lr=self.lr)
            self.current.optimiser.load_state_dict(fit["optimiser"])


class _Fit:
    """Variational fits in progress: m Gaussians, their priors, one optimiser."""

    def __init__(self, mean: Tensor, log_std: Tensor, prior: Tensor, examples: int, lr: float) -> None:
        self.mean, self.log_std = (value.detach().clone().requires_grad_() for value in (mean, log_std))
        self.prior, self.examples = prior.detach().clone(), examples
        self.optimiser = torch.optim.Adam([self.mean, self.log_std], lr=lr)

    def state(self) -> dict[str, Any]:
        return {
            "mean": self.mean.detach(), "log_std": self.log_std.detach(), "prior": self.prior,
            "examples": self.examples, "optimiser": self.optimiser.state_dict(),
        }  # fmt: skip
