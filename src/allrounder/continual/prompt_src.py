"""PromptSRC: learn prompts for a two-tower model from a few examples a class, and keep what it can do without them.

Only the prompts are trained. With g, f the text and image features of the prompted model, g0, f0 those of the frozen
one (g0 from many templates), all of length 1, and logits `z = scale f . g`:

    L = CE(z, y) + 25 mean|g - g0| + 10 mean|f - f0| + sum_b KL(softmax z0_b || softmax z_b) / (B C)

where the means are over all entries. The final prompts are a Gaussian-weighted mean over the epochs (GPA),
`sum_e w_e P_e`, `w_e ~ exp(-(e - mu)^2 / (2 sigma^2))`. They serve any class names, those never trained on too.

Use it with a good zero-shot model, few labels, and classes that will be added later by their names. Not with a poor
zero-shot model: the regulariser holds on to the teacher, and then plain cross-entropy is better (the study measures
that too). mu and sigma belong to a number of epochs: change them together.

Cost per step: forward and backward through both towers, with all C class names in the text tower, and one frozen
forward pass of the images (none with `Taught` examples: cached features, right when images are not augmented).
Storage: the prompts, a second copy of them for GPA, C x d teacher features.

Paper: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", ICCV 2023,
arXiv 2307.06948. Departures from its code: prompts are float32 in a model of any type and losses are computed in
float32; only prompts are averaged; the average can be read after any epoch, over the epochs so far; mu and sigma are
arguments; texts are cut to the longest class name; the templates are our own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.averaging import Averager
from ..nets.calling import evaluating
from ..state import load_state, save_state
from ..task import to_device
from .two_tower import TEMPLATES, TwoTower, class_names, cosines, teacher_features, unit

__all__ = ["VARIANTS", "PromptSRC", "gaussian_weights", "load_prompts", "prompt_src_loss", "save_prompts"]

VARIANTS: dict[str, dict[str, Any]] = {
    "IVLP": {"text_weight": 0.0, "image_weight": 0.0, "logit_weight": 0.0, "aggregate": None},
    "CE + GPA": {"text_weight": 0.0, "image_weight": 0.0, "logit_weight": 0.0},
    "CE + SCL": {"aggregate": None},
    "plain average": {"aggregate": "mean"},
    "one template": {"templates": TEMPLATES[:1]},
    "PromptSRC": {},
}
"""Settings of `PromptSRC` that make it one of the methods and ablations it is compared with."""


def gaussian_weights(epochs: int, mean: float, deviation: float) -> list[float]:
    """Weights of the epochs 1..E, proportional to a normal density there, with sum 1.

    Args:
        epochs: E.
        mean: the epoch that counts most. Paper: 15 of 20 epochs; 30 or 45 of 50.
        deviation: in epochs, > 0. Paper: 1 with 20 epochs; 30 or 5 with 50.

    Warns:
        When `mean` is outside 1..E: the weight then lies on the first or the last epochs.

    >>> [round(weight, 3) for weight in gaussian_weights(4, 3, 1)]
    [0.058, 0.258, 0.426, 0.258]
    """
    if epochs < 1 or not (math.isfinite(mean) and deviation > 0):
        raise InputError(
            f"epochs is at least 1, mean finite and deviation above 0, got {epochs}, {mean!r} and {deviation!r}"
        )
    if not 1 <= mean <= epochs:
        warnings.warn(
            f"the mean {mean:g} of the epochs' weights is outside 1..{epochs}: aggregate=(mean, deviation) belongs to "
            "a number of epochs, change them together",
            stacklevel=2,
        )
    logs = [-((epoch - mean) ** 2) / (2 * deviation**2) for epoch in range(1, epochs + 1)]
    found = [math.exp(log - max(logs)) for log in logs]
    return [value / math.fsum(found) for value in found]


def prompt_src_loss(
    image: Tensor,
    text: Tensor,
    targets: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor,
    *,
    scale: float,
    text_weight: float = 25.0,
    image_weight: float = 10.0,
    logit_weight: float = 1.0,
) -> dict[str, Tensor]:
    """The loss and its terms.

    Args:
        image: `(B, d)`, features of the prompted model, of length 1.
        text: `(C, d)`, the same for the classes; `(B, C, d)` where they depend on the image.
        targets: `(B,)`, 0 to C - 1.
        teacher_image: `(B, d)`, of the frozen model for the same images. `None` will do when `image_weight` and
            `logit_weight` are 0.
        teacher_text: `(C, d)`.
        scale: what multiplies the cosines, CLIP's `exp(logit_scale)`.
        text_weight, image_weight, logit_weight: paper: 25, 10, 1.

    Returns:
        Scalars `total`, `ce`, and, unweighted, `text`, `image`, `logits` (0 where they were not computed). The last one
        is `KL(teacher || prompted)` summed over the batch and divided by B C, not by B.

    Raises:
        InputError: when the teacher's features have another shape than the prompted ones.
    """
    for name, own, taught in (("text", text, teacher_text), ("image", image, teacher_image)):
        if taught is not None and own.shape[-2:] != taught.shape:
            raise InputError(
                f"the {name} features are {tuple(own.shape)}, the teacher's {tuple(taught.shape)}; they must be "
                "those of the same examples or classes"
            )
    logits = cosines(scale * image, text)  # (B, C)
    zero = logits.new_zeros(())
    terms = {"ce": F.cross_entropy(logits, targets), "text": zero, "image": zero, "logits": zero}
    if text_weight:
        terms["text"] = (text - teacher_text).abs().mean()
    if image_weight and teacher_image is not None:
        terms["image"] = (image - teacher_image).abs().mean()
    if logit_weight and teacher_image is not None:
        teacher = (scale * teacher_image @ teacher_text.T).log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), teacher, reduction="sum", log_target=True)
        terms["logits"] = divergence / logits.numel()
    total = terms["ce"] + text_weight * terms["text"] + image_weight * terms["image"] + logit_weight * terms["logits"]
    return {"total": total} | terms


class PromptSRC:
    """Trains the prompts of a two-tower model. Afterwards `tower.prompts` are the final ones.

    Args:
        tower: the model and its prompts; only `tower.prompts` change.
        classes: names of the classes of the training targets, in their order.
        epochs: E. Paper: 20; 50 for few-shot without new classes.
        aggregate: `(mu, sigma)` of the Gaussian over epochs; `"mean"`: all epochs alike; `None`: the last epoch.
            Paper: (15, 1); (6, 10) across data sets; (30, 30) or (45, 5) with 50 epochs.
        text_weight, image_weight, logit_weight: of the three regularisers. Paper: 25, 10, 1.
        templates: sentences with `{}` for a class's name, of which the teacher's text features are a mean.
        teacher: `(C, d)`, those features instead, for towers whose classes are not names.
        lr, momentum, weight_decay: of SGD. Paper: 0.0025, and the defaults of its toolbox, 0.9 and 5e-4.
        warmup_lr: constant in the first epoch (when there is more than one); from the second on, lr falls along a
            cosine, epoch by epoch. Paper: 1e-5.

    Raises:
        InputError: settings outside their range, names twice, templates without `{}`, a teacher of another shape.

    Warns:
        When mu is outside 1..E.
    """

    def __init__(
        self,
        tower: TwoTower,
        classes: Sequence[Any],
        *,
        epochs: int = 20,
        aggregate: tuple[float, float] | Literal["mean"] | None = (15.0, 1.0),
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        logit_weight: float = 1.0,
        templates: Sequence[str] = TEMPLATES,
        teacher: Tensor | None = None,
        lr: float = 0.0025,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_lr: float = 1e-5,
    ) -> None:
        weights = {"text_weight": text_weight, "image_weight": image_weight, "logit_weight": logit_weight}
        for name, value in {**weights, "lr": lr, "warmup_lr": warmup_lr}.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is a finite number, at least 0, got {value!r}")
        if epochs < 1:
            raise InputError(f"epochs is at least 1, got {epochs}")
        self.parameters = list(tower.prompts.parameters())
        if not self.parameters:
            raise InputError("the tower has no prompts to train: tower.prompts has no parameters")
        self.tower, self.classes, self.epochs, self.weights = tower, class_names(classes), epochs, weights
        self.lr, self.warmup_lr = lr, warmup_lr
        if aggregate is None or aggregate == "mean":
            self.epoch_weights = None if aggregate is None else [1 / epochs] * epochs
        elif isinstance(aggregate, tuple) and len(aggregate) == 2:
            self.epoch_weights = gaussian_weights(epochs, *aggregate)
        else:
            raise InputError(f"aggregate is (mean, deviation) in epochs, 'mean' or None, got {aggregate!r}")
        self.teacher = self._teacher(teacher, templates)  # (C, d)
        self.optimiser = torch.optim.SGD(self.parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.average, self.epoch = Averager(), 0
        self.history: list[dict[str, float]] = []

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def _teacher(self, given: Tensor | None, templates: Sequence[str]) -> Tensor:
        if given is None:
            return teacher_features(self.tower, self.classes, templates)
        if given.ndim != 2 or len(given) != len(self.classes):
            raise InputError(
                f"teacher has the shape {tuple(given.shape)}, expected ({len(self.classes)}, d): a row for each class "
                "of the training targets"
            )
        return unit(given.detach()).to(self.device)

    def fit(
        self, batches: Iterable[Any], *, progress: Callable[[int, int], None] | None = None
    ) -> list[dict[str, float]]:
        """Train the epochs that remain, then put the aggregate in place.

        Args:
            batches: iterated once an epoch, of `(inputs, targets)`, or `(inputs, targets, frozen image features)`
                (`Taught`). Paper: batches of 4, 16 examples a class.
            progress: called with (epochs done, epochs).

        Returns:
            For each epoch the means of `total`, `ce`, `text`, `image`, `logits`, and its `lr`.

        Raises:
            InputError: no or endless batches, targets outside the classes, a loss that is not finite.
        """
        if getattr(batches, "endless", False):
            raise InputError("an epoch of endless batches has no end; give Batches(..., endless=False)")
        while self.epoch < self.epochs:
            self._train(batches)
            self.epoch += 1
            if self.epoch_weights is not None:
                self.average.add(dict(self.tower.prompts.named_parameters()), self.epoch_weights[self.epoch - 1])
                if self.epoch == self.epochs:
                    self.tower.prompts.load_state_dict(self.average.mean(), strict=False)
            if progress is not None:
                progress(self.epoch, self.epochs)
        return self.history

    def _rate(self) -> float:
        if self.epoch == 0 and self.epochs > 1:
            return self.warmup_lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(0, self.epoch - 1) / self.epochs))

    def _train(self, batches: Iterable[Any]) -> None:
        rate, sums, steps = self._rate(), dict.fromkeys(("total", "ce", "text", "image", "logits"), 0.0), 0
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with evaluating(self.tower), _only(self.tower, self.parameters):
            for batch in batches:
                terms = self._step(to_device(batch, self.device), steps)
                sums = {name: value + terms[name] for name, value in sums.items()}
                steps += 1
        if not steps:
            raise InputError(f"epoch {self.epoch + 1} has no batches: give a list or a Batches object, not a generator")
        self.history.append({name: value / steps for name, value in sums.items()} | {"lr": rate})

    def _step(self, batch: Sequence[Any], step: int) -> dict[str, float]:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise InputError("a batch is (inputs, targets) or (inputs, targets, frozen image features)")
        inputs, targets = batch[:2]
        if targets.ndim != 1 or targets.is_floating_point():
            raise InputError(f"targets are whole numbers (B,), got {tuple(targets.shape)} of {targets.dtype}")
        if not len(targets) or targets.min() < 0 or targets.max() >= len(self.classes):
            odd = "is empty" if not len(targets) else f"has targets {int(targets.min())} to {int(targets.max())}"
            raise InputError(f"batch {step} {odd}; targets are 0 to {len(self.classes) - 1}, one for each class's name")
        teacher_image = None
        if self.weights["image_weight"] or self.weights["logit_weight"]:
            with torch.no_grad():
                teacher_image = batch[2] if len(batch) == 3 else self.tower.encode_image(inputs, prompted=False)
                teacher_image = unit(teacher_image)
        image = unit(self.tower.encode_image(inputs))
        text = unit(self.tower.text_for(self.classes, image))
        terms = prompt_src_loss(
            image, text, targets, teacher_image, self.teacher, scale=self.tower.scale, **self.weights
        )
        if not torch.isfinite(terms["total"]):
            raise InputError(
                f"the loss is {terms['total'].item()} in epoch {self.epoch + 1}, batch {step}; look for NaN in the "
                f"inputs or lower the learning rate (lr={self.lr:g})"
            )
        self.optimiser.zero_grad()
        terms["total"].backward()
        self.optimiser.step()
        return {name: value.item() for name, value in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after any epoch, for `save_state`; the order of batches is the caller's."""
        return {
            "epoch": self.epoch,
            "prompts": {name: value.detach().clone() for name, value in self.tower.prompts.state_dict().items()},
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, in a trainer that was made with the same settings."""
        _put(self.tower, state["prompts"], "the saved state")
        self.average.load_state_dict(to_device(state["average"], self.device))
        self.optimiser.load_state_dict(dict(state["optimiser"]))
        self.epoch, self.history = state["epoch"], [dict(row) for row in state["history"]]


@contextmanager
def _only(tower: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone inside the block."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in tower.parameters() if p.requires_grad and id(p) not in chosen]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _put(tower: TwoTower, prompts: Mapping[str, Tensor], what: str) -> None:
    own = tower.prompts.state_dict()
    if odd := sorted(set(own) ^ set(prompts)):
        raise InputError(f"{what} does not fit the tower: the prompt {odd[0]!r} is in one of them only")
    for name, value in own.items():
        if value.shape != prompts[name].shape:
            have, want = tuple(prompts[name].shape), tuple(value.shape)
            raise InputError(f"the prompt {name!r} has the shape {have} in {what} and {want} in the tower")
    tower.prompts.load_state_dict(dict(prompts))


def save_prompts(tower: TwoTower, path: str | Path) -> None:
    """Write the prompts, and nothing else of the model, to one safetensors file."""
    save_state(dict(tower.prompts.state_dict()), path)


def load_prompts(tower: TwoTower, path: str | Path) -> None:
    """Put prompts that `save_prompts` wrote into a tower.

    Raises:
        InputError: when the file is missing or cut off, or its prompts have other names or shapes.
    """
    _put(tower, load_state(path), repr(str(path)))
