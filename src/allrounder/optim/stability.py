"""Tells from small models whether a large run would be stable: sweep the learning rate, see where the loss breaks.

LR sensitivity of a recipe A, with l0 the loss at initialisation and l* the best loss of the sweep:

    S = mean over the learning rates eta of  min(l(A(eta)), l0) - l*

S is 0 when the learning rate does not matter; a run that diverges counts as l0. High learning rates on small models
show what large models show at ordinary ones: attention logits that grow until attention collapses, output logits
that drift, gradients that fall below Adam's eps. Two of them can be seen coming, from how they grow with the number of
parameters N (`forecast`).

Use it before a long run: two or three sizes of your model, your own training function, a grid of learning rates over
three orders of magnitude, and once more for each remedy (`remedies`, `CausalTransformer(qk_norm=True)`). Compare S only
between sweeps of one grid and one number of tokens; vary depth and width together, as the large model will; do not
read a learning rate that is merely too slow for a short run as an instability (leave it out of the grid).

Cost: sizes x learning rates runs of your training; `diverged` says when one can be cut. The fits are free.

Small-scale proxies for large-scale Transformer training instabilities (2023, arXiv 2309.14322). Departure: l* is at
most l0, so that S is never negative. The default grid is from secondary sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from ..errors import InputError
from .forecast import Forecast, forecast_attention_logit, forecast_gradient_rms

__all__ = [
    "LEARNING_RATES",
    "StabilityReport",
    "Train",
    "Trial",
    "diverged",
    "lr_sensitivity",
    "stability_report",
]

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
Train = Callable[[float], Any]
"""`train(lr) -> losses`, or `(losses, probes)`: the training loss of every step, the first before any update, and the
numbers of `StabilityProbes.summary()`. Everything but the learning rate is the same from call to call."""


def lr_sensitivity(losses: Sequence[float] | Tensor, initial: float) -> float:
    """S of one sweep.

    Args:
        losses: final loss at each learning rate, log-spaced, two or more; not a number or infinite: diverged.
        initial: l0, the loss before training.

    Returns:
        S >= 0 in the loss's unit.

    Raises:
        InputError: fewer than two losses, an initial loss that is not finite, or no run that ended in a finite loss.

    >>> lr_sensitivity([1.0, 1.0, float("nan"), 2.0], 4.0)
    1.0
    """
    values = [float(loss) for loss in losses]
    if len(values) < 2:
        raise InputError(f"LR sensitivity needs the losses of two or more learning rates, got {len(values)}")
    if not math.isfinite(initial):
        raise InputError(
            f"the initial loss is {initial}; give the loss before training, it is what diverged runs count"
        )
    if not any(map(math.isfinite, values)):
        raise InputError("no run ended in a finite loss, so the best loss is unknown; add lower learning rates")
    held = [min(value, float(initial)) if math.isfinite(value) else float(initial) for value in values]
    best = min(held)
    return fmean(value - best for value in held)


def diverged(losses: Sequence[float], *, patience: int = 50) -> bool:
    """Whether a run can be stopped, because it will count as l0: its last loss is not finite, or its last `patience`
    losses are all above its first.

    Raises:
        InputError: no losses, or a patience under 1.

    >>> diverged([4.0, 3.0, float("inf")]), diverged([4.0, 5.0, 5.0], patience=2), diverged([4.0, 5.0], patience=2)
    (True, True, False)
    """
    if not losses or patience < 1:
        raise InputError(f"diverged needs losses and a patience of at least 1, got {len(losses)} and {patience}")
    if not math.isfinite(losses[-1]):
        return True
    return len(losses) > patience and min(losses[-patience:]) > losses[0]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Args:
        parameters: N of the model.
        lr: its learning rate.
        loss: mean of its last losses; not a number if it diverged.
        probes: what the run returned beside its losses.
    """

    parameters: int
    lr: float
    loss: float
    probes: Mapping[str, float]


@dataclass(frozen=True)
class StabilityReport:
    """What the sweeps found.

    Args:
        trials: every run.
        initial: N -> l0.
        forecasts: of the target size, if one was asked for and there were three sizes with probes.
        flags: in words, what to look at.
    """

    trials: tuple[Trial, ...]
    initial: Mapping[int, float]
    forecasts: tuple[Forecast, ...]
    flags: tuple[str, ...]

    @property
    def sensitivity(self) -> dict[int, float]:
        """N -> S."""
        return {
            size: lr_sensitivity([trial.loss for trial in self._of(size)], self.initial[size]) for size in self.initial
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row a size: N, S, best loss, best learning rate, learning rates that diverged."""
        found = []
        for size, sensitivity in self.sensitivity.items():
            runs = self._of(size)
            best = min(runs, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)
            broken = [f"{trial.lr:g}" for trial in runs if not math.isfinite(trial.loss)]
            found.append({
                "parameters": size, "sensitivity": sensitivity, "best loss": best.loss, "best lr": best.lr,
                "initial loss": self.initial[size], "diverged at": ", ".join(broken),
            })  # fmt: skip
        return found

    def plot(self, path: str | Path) -> Path:
        """Loss against learning rate for each size (a cross at l0: diverged), and S against N, as SVG, PNG or PDF.

        Raises:
            InputError: for another kind of file.
        """
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        path = Path(path)
        if path.suffix not in (".svg", ".png", ".pdf"):
            raise InputError(f"a plot is an .svg, .png or .pdf file, got {path.name!r}")
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        colours = matplotlib.colormaps["viridis"]
        for place, size in enumerate(self.initial):
            colour = colours(0.85 * place / max(1, len(self.initial) - 1))
            runs, initial = self._of(size), self.initial[size]
            lost = [trial for trial in runs if not math.isfinite(trial.loss)]
            height = [min(trial.loss, initial) if math.isfinite(trial.loss) else initial for trial in runs]
            left.plot([trial.lr for trial in runs], height, "o-", color=colour, markersize=4, label=_name(size))
            left.plot([trial.lr for trial in lost], [initial] * len(lost), "x", color=colour, markersize=10)
        if any(not math.isfinite(trial.loss) for trial in self.trials):
            left.plot([], [], "x", color="0.3", markersize=10, label="diverged")
        left.set(xscale="log", xlabel="learning rate", ylabel="final loss (at most the initial loss)")
        left.legend(frameon=False)
        right.plot(list(self.sensitivity), list(self.sensitivity.values()), "o-", color="0.2", markersize=4)
        right.set(xlabel="parameters N", ylabel="LR sensitivity S", ylim=(0, None))
        right.set_xscale("log" if all(self.initial) else "linear")
        right.set_xticks(list(self.initial), [_name(size).removeprefix("N=") for size in self.initial], rotation=45)
        grid = sorted({trial.lr for trial in self.trials})
        left.set_xticks(grid, [f"{rate:g}" for rate in grid], rotation=45)
        left.minorticks_off()
        right.minorticks_off()
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        with matplotlib.rc_context({"svg.hashsalt": "allrounder", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        return path

    def _of(self, size: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.parameters == size]


def stability_report(
    recipes: Train | Mapping[int, Train],
    lrs: Sequence[float] = LEARNING_RATES,
    *,
    target: int | None = None,
    last: float = 0.05,
    limit: float = 1e4,
    eps: float = 1e-8,
    progress: Callable[[int, int], None] | None = None,
) -> StabilityReport:
    """Sweep the learning rate at each size, and say how much it matters and what would break next.

    Args:
        recipes: number of parameters -> `train(lr)`, which trains a new model of that size and returns the loss of
            every step, the first before any update, or `(losses, probes.summary())`. It may stop when
            `diverged(losses)`. One function alone is a sweep of one size. Runs that were made elsewhere go in as
            `{n: results[n].__getitem__}`.
        lrs: the grid, two or more, log-spaced.
        target: N of the model that you mean to train: forecasts are made for it.
        last: the final loss is the mean over this share of the steps.
        limit: attention logits above it are flagged.
        eps: Adam's; gradients within 10 eps are flagged.
        progress: called with (runs done, runs).

    Returns:
        `report.rows()`, `.sensitivity`, `.trials`, `.forecasts`, `.flags` and `.plot(path)`.

    Raises:
        InputError: a grid of fewer than two, or of rates that are equal or not positive; runs without losses, with a
            first loss that is not finite, or of unequal length without having diverged; a size at which no run ended
            below its first loss.
    """
    sizes = dict(sorted(recipes.items())) if isinstance(recipes, Mapping) else {0: recipes}
    grid = sorted(float(rate) for rate in lrs)
    if len(grid) < 2 or len(set(grid)) < len(grid) or not all(math.isfinite(rate) and rate > 0 for rate in grid):
        raise InputError(f"the grid is two or more different learning rates above 0, got {list(lrs)}")
    if not sizes or not 0 < last <= 1:
        raise InputError(f"stability_report needs a recipe and 0 < last <= 1, got {len(sizes)} recipes, last={last}")
    trials: list[Trial] = []
    initial: dict[int, float] = {}
    for size, train in sizes.items():
        runs = []
        for rate in grid:
            runs.append(_outcome(train(rate), f"the run of {_name(size)} at lr={rate:g}"))
            if progress is not None:
                progress(len(trials) + len(runs), len(sizes) * len(grid))
        steps = max(len(losses) for losses, _, _ in runs)
        initial[size] = fmean(losses[0] for losses, _, _ in runs)
        for rate, (losses, probes, where) in zip(grid, runs, strict=True):
            final = fmean(losses[-max(1, round(last * steps)) :])
            lost = not math.isfinite(final) or final >= initial[size]
            if len(losses) < steps and not lost and math.isfinite(losses[-1]) and losses[-1] < losses[0]:
                raise InputError(f"{where} has {len(losses)} losses and others {steps}; compare runs of one length")
            trials.append(Trial(size, rate, math.nan if lost or len(losses) < steps else final, probes))
        if all(math.isnan(trial.loss) for trial in trials[-len(grid) :]):
            raise InputError(
                f"no run of {_name(size)} ended below its first loss, so the best loss is unknown; "
                "add lower learning rates or train longer"
            )
    forecasts = tuple(_forecasts(trials, grid, target, limit, eps)) if target is not None else ()
    report = StabilityReport(tuple(trials), initial, forecasts, ())
    return replace(report, flags=tuple(_flags(report, grid, limit, eps)))


def _outcome(result: Any, where: str) -> tuple[list[float], Mapping[str, float], str]:
    losses, probes = result if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping) else (
        result, {})  # fmt: skip
    try:
        found = [float(loss) for loss in losses]
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} returned no list of losses; return one loss a step, or (losses, probes)") from error
    if len(found) < 2 or not math.isfinite(found[0]):
        first = f"and the first is {found[0]}" if found else "none at all"
        raise InputError(f"{where} returned {len(found)} losses, {first}; the first is the loss before any update")
    return found, probes, where


def _forecasts(
    trials: Sequence[Trial], grid: Sequence[float], target: int, limit: float, eps: float
) -> Iterator[Forecast]:
    def read(name: str) -> list[Trial]:
        return [trial for trial in trials if 0 < trial.probes.get(name, math.nan) < math.inf]

    logits = read("max_attention_logit")
    for rate in grid:
        runs = [trial for trial in logits if trial.lr == rate]
        if len(runs) > 2:
            yield forecast_attention_logit(
                [run.parameters for run in runs], [run.probes["max_attention_logit"] for run in runs], target,
                lr=rate, limit=limit,
            )  # fmt: skip
    gradients = [trial for trial in read("gradient_rms") if math.isfinite(trial.loss)]
    if len({trial.parameters for trial in gradients}) > 2:
        sizes, rates, values = zip(*((t.parameters, t.lr, t.probes["gradient_rms"]) for t in gradients), strict=True)
        for rate in grid:
            yield forecast_gradient_rms(sizes, rates, values, target, rate, eps=eps)


def _flags(report: StabilityReport, grid: Sequence[float], limit: float, eps: float) -> Iterator[str]:
    for row in report.rows():
        where = _name(row["parameters"])
        if row["best lr"] in (grid[0], grid[-1]):
            yield f"{where}: the best learning rate {row['best lr']:g} is at the grid's end; extend the grid"
        if row["diverged at"]:
            yield f"{where}: diverged at {row['diverged at']}"
    for trial in report.trials:
        where = f"{_name(trial.parameters)}, lr={trial.lr:g}"
        if (logit := trial.probes.get("max_attention_logit", 0.0)) > limit:
            yield f"{where}: attention logits reach {logit:.3g}, above {limit:g}; try qk-layernorm"
        if (gradient := trial.probes.get("gradient_rms", math.inf)) <= 10 * eps:
            yield f"{where}: a gradient's RMS is {gradient:.2g}, within 10 eps = {10 * eps:g}; try a smaller eps"
    for found in report.forecasts:
        if found.flagged:
            where = f"forecast for {_name(found.parameters)}, lr={found.lr:g}"
            yield f"{where}: {found.quantity} {found.value:.3g}, limit {found.limit:g}"


def _name(size: int) -> str:
    """The model of a sweep in words."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale:
            return f"N={size / scale:.3g}{unit}"
    return f"N={size}" if size else "the model"
