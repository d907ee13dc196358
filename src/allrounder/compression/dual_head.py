"""Dual-head distillation: a second head learns the teacher's logits, the first learns the labels, one backbone gains.

    z = backbone(x),  p = W z + b (labels),  a = auxiliary(z) (teacher's logits t)
    loss = labels * CE(p, y) + weight * binary_kl_norm(a, t)

After training the auxiliary head is thrown away: shape, speed and outputs are those of the plain classifier.

    model = DualHead(classifier, teacher, aux="linear")
    loss = DualHeadLoss()                                    # or DualHeadLoss(RECIPES["kd"]), any row of the table
    suite = Suite([replace(task, loss=loss)])
    fit(model, suite, steps=1000, lr=0.05, update=Aligned(model, loss))
    student = model.without_auxiliary()

A logit-level loss and the labels pull the rows of one head apart (the paper's argument, made for deep networks trained
to neural collapse); with two heads only the backbone sees both. Small networks show no such collapse: there one head
with labels and `binary_kl` did better than two (study `dual_head_kd`), so try `RECIPES` before you settle.

Cost: `h C` parameters more in training (linear), or `200 (h + C)` (mlp); one teacher pass a batch. Alignment takes two
backward passes through the backbone and holds two gradients. The loss is summed over classes: lower `weight * lr` as C
grows.

Paper: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", KDD 2025,
arXiv 2411.08937. Departures from its code: alignment projects backbone gradients only by default; the released one
projects all parameters (`over="all"`), which multiplies the main head's step when gradients conflict. Single-head
baselines run (the released CIFAR loop cannot run them). Its ImageNet loop steps the optimiser twice a batch; ours once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..losses.distillation import binary_kl, binary_kl_norm, check_targets, dist, dkd, soft_label_loss
from ..nets.calling import evaluating
from ..nets.taps import tapped
from ..train import Losses

__all__ = ["RECIPES", "Aligned", "DualHead", "DualHeadLoss", "DualOutput", "Recipe"]

HIDDEN, DROPOUT = 200, 0.1


class DualOutput(NamedTuple):
    """What a `DualHead` gives in training mode: logits `(N, C)` of its heads and of its teacher."""

    main: Tensor
    auxiliary: Tensor | None
    teacher: Tensor


class DualHead(nn.Module):
    """A classifier with an auxiliary head and a frozen teacher beside it.

    In training mode it gives a `DualOutput`; in evaluation mode the classifier's own logits, bit for bit.

    Args:
        classifier: any module whose logits come from one linear layer; used as it is, not copied.
        teacher: called with the same arguments, in evaluation mode and without gradients. It is no submodule: neither
            `parameters()` nor the state dict has it.
        aux: `linear`; `mlp` (linear 200, dropout 0.1, BatchNorm, ReLU, linear) where teacher and student differ in
            kind; `None` for no second head, for the baselines on one head.
        head: name of the linear layer in `named_modules()`. Default: the last one.
        seed: of the auxiliary head's weights; torch's global generator is left as it was.

    Raises:
        InputError: no linear layer, or a name that is none; a teacher that shares parameters with the classifier. When
            called: a teacher with another number of classes, batches of one with `mlp`.
    """

    def __init__(
        self,
        classifier: nn.Module,
        teacher: nn.Module,
        *,
        aux: Literal["linear", "mlp"] | None = "linear",
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        linears = {name: part for name, part in classifier.named_modules() if isinstance(part, nn.Linear)}
        if not linears:
            raise InputError(f"{type(classifier).__name__} has no linear layer to put a second head beside")
        if head is not None and head not in linears:
            raise InputError(f"the classifier has no linear layer {head!r}; it has {', '.join(linears)}")
        if aux not in ("linear", "mlp", None):
            raise InputError(f"aux is 'linear', 'mlp' or None, got {aux!r}")
        own = {id(p) for p in classifier.parameters()}
        if any(id(p) in own for p in teacher.parameters()):
            raise InputError("the teacher shares parameters with the classifier; give it a copy")
        self.classifier = classifier
        self.head = list(linears)[-1] if head is None else head
        self.auxiliary = None if aux is None else _auxiliary(aux, linears[self.head], seed)
        self._teacher, self._checked = (teacher,), False

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, *arguments: Any) -> Any:
        if not self.training:
            return self.classifier(*arguments)
        with tapped(self.classifier, [self.head], inputs=True) as seen:
            main = self.classifier(*arguments)
        if self.head not in seen:
            raise InputError(
                f"the linear layer {self.head!r} took no part in the pass; name the one that gives the logits"
            )
        features, raw = seen[self.head]
        if not self._checked and not (raw is main or (raw.shape == main.shape and torch.equal(raw, main))):
            raise InputError(
                f"the logits do not come from the linear layer {self.head!r}; name the one that gives them"
            )
        self._checked = True
        with evaluating(self.teacher), torch.no_grad():
            shown = self.teacher(*arguments)
        if shown.shape != main.shape:
            raise InputError(
                f"teacher has {shown.shape[-1]} logits, student head {main.shape[-1]} (shapes {tuple(shown.shape)} and "
                f"{tuple(main.shape)}); use a teacher of the same classes"
            )
        if isinstance(self.auxiliary, nn.Sequential) and len(features) < 2:
            raise InputError("the 'mlp' head has BatchNorm and needs two or more examples a batch; use aux='linear'")
        return DualOutput(main, None if self.auxiliary is None else self.auxiliary(features), shown)

    def without_auxiliary(self) -> nn.Module:
        """The plain classifier, in evaluation mode."""
        return self.classifier.eval()


@dataclass(frozen=True)
class Recipe:
    """One row of the table of methods: which loss on which head, beside the labels on the main head.

    Args:
        labels: weight of cross-entropy, the paper's gamma.
        weight: of the distillation loss, the paper's alpha.
        loss: `(student logits, teacher logits, target) -> scalar`; `None` for labels alone.
        head: that learns from the teacher.
    """

    labels: float
    weight: float
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    head: Literal["main", "auxiliary"] = "main"


def _ignoring_labels(loss: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    chosen = partial(loss, **options)
    return lambda student, teacher, target: chosen(student, teacher)


RECIPES: dict[str, Recipe] = {
    "labels": Recipe(1, 0, None),
    "kd": Recipe(0.1, 0.9, _ignoring_labels(soft_label_loss, temperature=4.0)),
    "binary-kl only": Recipe(0, 1, _ignoring_labels(binary_kl)),
    "one head, binary-kl": Recipe(1, 1, _ignoring_labels(binary_kl)),
    "one head, binary-kl-norm": Recipe(1, 1, _ignoring_labels(binary_kl_norm)),
    "one head, mse": Recipe(1, 1, _ignoring_labels(F.mse_loss)),
    "dkd": Recipe(1, 1, dkd),
    "dist": Recipe(1, 1, _ignoring_labels(dist, temperature=4.0)),
    "two heads, binary-kl": Recipe(1, 1, _ignoring_labels(binary_kl), "auxiliary"),
    "two heads, binary-kl-norm": Recipe(1, 1, _ignoring_labels(binary_kl_norm), "auxiliary"),
}
"""The paper's method (the last row, T = 2) and what it is compared with. The paper's alpha is 1 for CIFAR-100 and 0.1
for ImageNet: `dataclasses.replace(RECIPES[name], weight=0.1)`."""


class DualHeadLoss:
    """The loss of a `DualHead`, to be a task's loss: `(DualOutput, target) -> scalar`.

    Args:
        recipe: a row of `RECIPES`, or your own. Default: the paper's.

    Attributes:
        last: the weighted (label, distillation) losses of the latest call.

    Raises:
        InputError: weights that are missing, negative or both 0; when called: outputs of evaluation mode, a recipe for
            the auxiliary head of a model without one, targets that are no classes.
    """

    last: tuple[Tensor, Tensor] | None

    def __init__(self, recipe: Recipe = RECIPES["two heads, binary-kl-norm"]) -> None:
        for name in ("labels", "weight"):
            value = getattr(recipe, name)
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(
                    f"the recipe's {name} is a number from 0 on, got {value}; the paper's is 1 (ImageNet: 0.1)"
                )
        if recipe.labels == 0 and (recipe.weight == 0 or recipe.loss is None):
            raise InputError("the recipe has no loss: labels and weight are both 0")
        self.recipe = recipe
        self.last = None

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        if not isinstance(output, DualOutput):
            raise InputError("a DualHeadLoss takes the output of a DualHead in training mode; call model.train() first")
        main, recipe = output.main, self.recipe
        check_targets(target, *main.shape)
        labels = recipe.labels * F.cross_entropy(main.float() if main.dtype.itemsize < 4 else main, target)
        chosen = main if recipe.head == "main" else output.auxiliary
        if chosen is None:
            raise InputError("the recipe is for two heads and the model has one: DualHead(..., aux='linear')")
        taught = torch.zeros_like(labels)
        if recipe.loss is not None:
            taught = recipe.weight * recipe.loss(chosen, output.teacher, target)
        self.last = labels, taught
        return labels + taught


class Aligned:
    """Gradient alignment, an update for `allrounder.fit`: what the teacher asks for never works against the labels.

    With g1 the gradient of the label part and g2 of the distillation part: where `<g1, g2> < 0`,
    `g2 <- g2 - <g1, g2> / |g1|^2 g1`; the step takes `g1 + g2`. So `<g1, step> >= |g1|^2` always.

    Args:
        model: what is trained.
        loss: the tasks' loss, whose parts are read after each call.
        over: `backbone` projects what is before the heads; `all` projects every parameter, as released, which also adds
            `|<g1, g2>| / |g1|^2 g1` to the main head's gradient.

    Attributes:
        cosine: between g1 and g2 of the last step, over the parameters that are projected; 0 where one is zero.
    """

    cosine: float | None

    def __init__(self, model: DualHead, loss: DualHeadLoss, *, over: Literal["backbone", "all"] = "backbone") -> None:
        if over not in ("backbone", "all"):
            raise InputError(f"over is 'backbone' or 'all', got {over!r}")
        heads = [model.classifier.get_submodule(model.head), *([] if model.auxiliary is None else [model.auxiliary])]
        inside = {id(p) for part in heads for p in part.parameters()}
        self.loss = loss
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._projected = [over == "all" or id(p) not in inside for p in self._trained]
        self.cosine = None

    def __call__(self, losses: Losses, tasks: Sequence[str]) -> Mapping[str, Tensor]:
        if len(tasks) != 1:
            raise InputError(f"alignment takes one task a step, got {', '.join(tasks)}; use sampler='turn'")
        found = losses(tasks)
        if self.loss.last is None:
            raise InputError("the tasks do not use the loss that was given to Aligned")
        first, second = (self._gradient(part, keep) for part, keep in zip(self.loss.last, (True, False), strict=True))
        chosen = [(a, b) for a, b, on in zip(first, second, self._projected, strict=True) if on]
        inner, length, other = (
            _dot(pairs) for pairs in (chosen, [(a, a) for a, _ in chosen], [(b, b) for _, b in chosen])
        )
        self.cosine = inner / (length * other) ** 0.5 if length * other > 0 else 0.0
        back = -inner / length if inner < 0 else 0.0
        for parameter, a, b, on in zip(self._trained, first, second, self._projected, strict=True):
            parts = [] if a is None else [a * (1 + back) if on and back else a]
            parts += [] if b is None else [b]
            parameter.grad = None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
        self.loss.last = None
        return found

    def _gradient(self, loss: Tensor, keep: bool) -> Sequence[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(self._trained)
        return torch.autograd.grad(loss, self._trained, retain_graph=keep, allow_unused=True)


def _dot(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> float:
    """Inner product of two gradients, in at least float32."""
    there = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not there:
        return 0.0
    return float(torch.stack([(a * b).sum(dtype=torch.promote_types(a.dtype, torch.float32)) for a, b in there]).sum())


def _auxiliary(kind: str, head: nn.Linear, seed: int) -> nn.Module:
    device, dtype = head.weight.device, head.weight.dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(head.in_features, head.out_features).to(device, dtype)
        return nn.Sequential(
            nn.Linear(head.in_features, HIDDEN), nn.Dropout(DROPOUT), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, head.out_features),
        ).to(device, dtype)  # fmt: skip
