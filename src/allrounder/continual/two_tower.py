"""Two-tower models with prompts: what a prompt learner needs of one, its teacher, its heads, and how it is judged.

A `TwoTower` puts inputs and texts into one space and classifies by cosine. `PromptedCLIP` is one; any other is a
subclass with two methods. Base-to-novel evaluation: train on the first half of the classes, test on each half among its
own classes, and take the harmonic mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import InputError
from ..nets.calling import evaluating, wide
from ..nets.multitask import class_head
from ..task import Batches, Examples, accuracy, to_device

__all__ = [
    "TEMPLATES", "Taught", "TwoTower", "base_novel", "base_to_novel", "class_names", "cosines", "few_shot",
    "harmonic_mean", "linear_probe", "prompt_head", "taught", "teacher_features", "unit", "zero_shot_head",
]  # fmt: skip

LOOKS = ("", "close-up ", "blurry ", "bright ", "dark ", "cropped ", "small ", "large ", "sharp ", "grainy ")
KINDS = ("photo", "picture", "view")
TEMPLATES: tuple[str, ...] = tuple(
    f"a {look}{kind} of {article} {{}}." for kind in KINDS for article in ("a", "the") for look in LOOKS
)
"""60 sentences about a thing in a picture. For other inputs (satellites, textures, utterances) give your own."""


def unit(features: Tensor) -> Tensor:
    """Rows of length 1, in at least float32."""
    return F.normalize(wide(features), dim=-1)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """`(B, C)` of features of length 1: `(B, d)` and `(C, d)`, or `(B, C, d)` where each image has texts of its own."""
    return images @ texts.T if texts.ndim == 2 else (texts @ images.unsqueeze(-1)).squeeze(-1)


class TwoTower(nn.Module, ABC):
    """A frozen model with two encoders and prompts. Subclasses set `prompts` and `scale`.

    Attributes:
        prompts: module that holds all that is trained.
        scale: what multiplies the cosines, CLIP's `exp(logit_scale)`.
        conditional: whether the prompts of a text depend on the image that it is compared with (CoCoOp).
    """

    prompts: nn.Module
    scale: float
    conditional: bool = False

    @abstractmethod
    def encode_image(self, inputs: Any, *, prompted: bool = True) -> Tensor:
        """Features `(B, d)` of any length; without prompts those of the frozen model."""

    @abstractmethod
    def encode_text(self, texts: Sequence[Any], *, prompted: bool = True) -> Tensor:
        """Features `(C, d)` of any length: with prompts, texts are class names; without, whole sentences."""

    def text_for(self, texts: Sequence[Any], images: Tensor) -> Tensor:
        """Features of class names for these images, `(C, d)`; `(B, C, d)` from a conditional tower, which overrides it.

        Args:
            texts: class names.
            images: `(B, d)`, prompted features of length 1.
        """
        return self.encode_text(texts)

    def logits(self, images: Tensor, texts: Sequence[Any]) -> Tensor:
        """`(B, C)`, the scaled cosines of image features `(B, d)` of length 1 and class names."""
        return self.scale * cosines(images, unit(self.text_for(texts, images)))

    @property
    def device(self) -> torch.device:
        return next(self.prompts.parameters()).device


def class_names(classes: Sequence[Any]) -> Sequence[Any]:
    """Names with `_` read as a space. Classes that are not strings are left as they are.

    Raises:
        InputError: no classes, an empty name, a name twice.
    """
    if not len(classes):
        raise InputError("classes is empty: give the name of each class")
    if isinstance(classes, str):
        raise InputError(f"classes is a list of names, got the string {classes!r}")
    if not all(isinstance(name, str) for name in classes):
        return classes
    names = [" ".join(name.replace("_", " ").split()) for name in classes]
    if "" in names:
        raise InputError(f"class {names.index('')} has an empty name")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"class names must differ, got {doubled[0]!r} more than once")
    return names


@torch.no_grad()
def teacher_features(
    tower: TwoTower, classes: Sequence[Any], templates: Sequence[str] = TEMPLATES, *, batch_size: int = 256
) -> Tensor:
    """The frozen model's features of the classes `(C, d)`, of length 1, float32.

    Args:
        tower: its frozen text encoder is used.
        classes: names.
        templates: sentences with `{}` for the name. The mean is taken over features as they come, then normalised.
        batch_size: sentences at a time.

    Raises:
        InputError: no templates, or one without exactly one `{}`; classes that are not names.
    """
    names = class_names(classes)
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            "templates need classes that are names; for other classes give the teacher's features, teacher="
        )
    if isinstance(templates, str) or not templates or any(template.count("{}") != 1 for template in templates):
        raise InputError(f"templates is a list of sentences with one {{}} for the class's name, got {templates!r}")
    texts = [template.replace("{}", name) for name in names for template in templates]
    with evaluating(tower):
        parts = [
            wide(tower.encode_text(texts[start : start + batch_size], prompted=False))
            for start in range(0, len(texts), batch_size)
        ]
    return unit(torch.cat(parts).unflatten(0, (len(names), len(templates))).mean(1))


@torch.no_grad()
def prompt_head(tower: TwoTower, classes: Sequence[Any]) -> nn.Linear:
    """The prompted text features of any classes as an ordinary linear head on `unit(tower.encode_image(x))`.

    Raises:
        InputError: for a conditional tower, which has other text features for each image.
    """
    if tower.conditional:
        raise InputError("prompts that depend on the image give no fixed head; use tower.logits(features, classes)")
    with evaluating(tower):
        return class_head(unit(tower.encode_text(class_names(classes))), temperature=1 / tower.scale)


def zero_shot_head(tower: TwoTower, classes: Sequence[Any], templates: Sequence[str] = TEMPLATES[:1]) -> nn.Linear:
    """The frozen model's head, on `unit(tower.encode_image(x, prompted=False))`; of one template by default."""
    return class_head(teacher_features(tower, classes, templates), temperature=1 / tower.scale)


def _encoded(tower: TwoTower, examples: Examples, prompted: bool, batch_size: int) -> tuple[Tensor, Tensor]:
    """Features of length 1 `(N, d)` and targets `(N,)`, on the CPU, in order."""
    found, targets = [], []
    with torch.no_grad(), evaluating(tower):
        for batch in Batches(examples, batch_size):
            found.append(unit(tower.encode_image(to_device(batch[0], tower.device), prompted=prompted)).cpu())
            targets.append(batch[1])
    return torch.cat(found), torch.cat(targets)


class Taught(Dataset):
    """Examples with the frozen model's image features beside them: `(input, target, features)`.

    Args:
        examples: what to learn from.
        features: `(N, d)`.
    """

    def __init__(self, examples: Examples, features: Tensor) -> None:
        if len(features) != len(examples):
            raise InputError(f"{len(features)} features for {len(examples)} examples; give one for each")
        self.examples, self.features = examples, features

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> tuple[Any, Tensor, Tensor]:
        """One example for an int; a batch for a slice or an index tensor."""
        return (*self.examples[index], self.features[index])

    def __getitems__(self, indices: list[int]) -> tuple[Any, Tensor, Tensor]:
        return self[torch.as_tensor(indices)]


def taught(tower: TwoTower, examples: Examples, *, batch_size: int = 128) -> Taught:
    """Encode the examples once with the frozen model, so that training need not. Right only without augmentation."""
    return Taught(examples, _encoded(tower, examples, False, batch_size)[0])


def few_shot(targets: Tensor, shots: int, *, seed: int = 0) -> Tensor:
    """Positions of `shots` examples of each class, drawn without replacement, in order of class.

    Args:
        targets: `(N,)` classes.
        shots: examples a class. Paper: 16.
        seed: which are drawn.

    Raises:
        InputError: a class with fewer examples.

    >>> few_shot(torch.tensor([1, 0, 1, 0]), 2).sort().values
    tensor([0, 1, 2, 3])
    """
    if shots < 1 or targets.ndim != 1 or not len(targets):
        raise InputError(f"few_shot takes targets (N,) and shots >= 1, got {tuple(targets.shape)} and {shots}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in targets.unique().tolist():
        members = (targets == label).nonzero().flatten()
        if len(members) < shots:
            raise InputError(f"class {label} has {len(members)} examples, fewer than shots={shots}; lower shots")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)


def base_novel(classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """The numbers of the base classes (the first half of the sorted names, rounded up) and of the novel ones.

    >>> base_novel(["cat", "ant", "bee"])
    ([1, 2], [0])
    """
    if len(classes) < 2:
        raise InputError(f"base and novel classes take two classes or more, got {len(classes)}")
    order = sorted(range(len(classes)), key=lambda i: (classes[i], i))
    half = (len(order) + 1) // 2
    return order[:half], order[half:]


def harmonic_mean(base: float, novel: float) -> float:
    """`2 b n / (b + n)`, 0 when either is 0."""
    return 2 * base * novel / (base + novel) if base > 0 and novel > 0 else 0.0


def base_to_novel(
    tower: TwoTower,
    base: tuple[Examples, Sequence[Any]],
    novel: tuple[Examples, Sequence[Any]],
    *,
    templates: Sequence[str] | None = None,
    batch_size: int = 128,
) -> dict[str, float]:
    """Accuracies (0 to 1) on base and novel classes, each among its own classes, and their harmonic mean.

    Args:
        tower: its prompts as they are.
        base, novel: (examples, names of their classes); targets count within these names.
        templates: judge the frozen model with the mean of these instead.
        batch_size: examples at a time.

    Returns:
        `{"base", "novel", "harmonic mean"}`.
    """
    found = {}
    for side, (examples, classes) in {"base": base, "novel": novel}.items():
        prompted = templates is None
        features, targets = _encoded(tower, examples, prompted, batch_size)
        if targets.min() < 0 or targets.max() >= len(classes):
            raise InputError(f"the {side} examples have targets outside 0 to {len(classes) - 1}, the names given")
        if prompted and tower.conditional:
            logits = _conditional(tower, features, classes, batch_size)
        else:
            head = prompt_head(tower, classes) if prompted else zero_shot_head(tower, classes, templates)
            logits = head.cpu()(features)
        found[side] = accuracy(logits, targets)
    return found | {"harmonic mean": harmonic_mean(found["base"], found["novel"])}


@torch.no_grad()
def _conditional(tower: TwoTower, features: Tensor, classes: Sequence[Any], batch_size: int) -> Tensor:
    """Logits `(N, C)` on the CPU of a tower whose texts depend on the image."""
    names = class_names(classes)
    with evaluating(tower):
        return torch.cat([tower.logits(part.to(tower.device), names).cpu() for part in features.split(batch_size)])


def linear_probe(tower: TwoTower, examples: Examples, outputs: int, *, strength: float = 0.316) -> nn.Linear:
    """Logistic regression on the frozen image features (of length 1), as a linear head.

    Args:
        tower: its frozen image encoder is used.
        examples: every class from 0 to `outputs` - 1 must occur.
        outputs: classes.
        strength: inverse of the L2 penalty. Default: that of CLIP's paper.
    """
    from sklearn.linear_model import LogisticRegression

    features, targets = _encoded(tower, examples, False, 128)
    if outputs < 2 or targets.unique().tolist() != list(range(outputs)):
        raise InputError(f"a linear probe takes two classes or more and examples of each of 0 to {outputs - 1}")
    fitted = LogisticRegression(C=strength, max_iter=1000).fit(features.numpy(), targets.numpy())
    weight, bias = torch.tensor(fitted.coef_).float(), torch.tensor(fitted.intercept_).float()
    if outputs == 2:  # one row stands for both
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    head = nn.Linear(features.shape[1], outputs, device="meta").to_empty(device="cpu")
    head.weight, head.bias = nn.Parameter(weight), nn.Parameter(bias)
    return head
