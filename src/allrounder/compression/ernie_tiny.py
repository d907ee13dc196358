"""ERNIE-Tiny: four distillation stages, each of which changes one thing, as a list that can be edited.

    stage             teacher      data      loss
    general           pretrained   general   latent                 once per student
    general-enhanced  FINE-TUNED   general   latent
    task-adaptive     fine-tuned   TASK      latent
    task-specific     fine-tuned   task      LATENT + SOFT + HARD

with `latent = sum over layers of KL(attention) + MSE(H_S W, H_T)`, plus MSE(E_S W_e, E_T) of the embeddings.

    teacher, tuned = Encoder(pretrained), Encoder(finetuned)
    student = Encoder(build_student(pretrained, layers=3, labels=4))
    distil(student, ernie_tiny(student, teacher, tuned, general, task), folder="work")
    student.model.save_pretrained("student")

`ernie_tiny` gives a list of `Stage`: leave one out with a comprehension, change one with `dataclasses.replace`, put
other losses in (`RelationLoss` is MiniLM's). Without `general-enhanced` it is TinyBERT's order.

Use it when one encoder must become small for one task and there is general text besides the task's. When labels are
plenty and the student is made of the teacher's own layers, try plain fine-tuning first; balance matters more than
stages (a latent weight that is large beside the labels in the last stage ruins it).

Cost: a teacher and a student pass per step; attention scores of mapped layers, `heads T^2` numbers an example and
layer. Stage 2 repeats a pass over general text for every task; 5 to 20% of the corpus is usual (`enhanced`).

Paper: Su et al., "ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression", 2021,
arXiv 2106.02241; no code of the four stages was released. The form of the latent loss, temperature 1, weights 1,
epochs and learning rates are TinyBERT's practice (2020, arXiv 1909.10351), not read from the paper. Departures:
attention is compared by KL where TinyBERT takes the squared error of scores (`attention="mse"`): for three layers cut
from all-MiniLM-L6-v2 that error starts at 30, the KL at 6, hidden states and embeddings at 0.5, and labels in the last
stage at 1 to 3. W starts as the identity when the widths agree, so that a student cut from the teacher is not disturbed
first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import InputError
from ..losses.distillation import attention_kl, attention_mse, check_targets, hidden_mse, relation_kl, soft_label_loss
from .encoder_states import Encoder, States, uniform_map
from .stages import Stage

__all__ = ["LatentLoss", "RelationLoss", "ernie_tiny"]

EPOCHS = {"general": 3.0, "general-enhanced": 1.0, "task-adaptive": 10.0, "task-specific": 3.0}
LR = {"general": 1e-4, "general-enhanced": 1e-4, "task-adaptive": 5e-5, "task-specific": 3e-5}


class LatentLoss(nn.Module):
    """Layer-wise error of attention and hidden states: a loss for `Stage`.

    Args:
        student, teacher: encoders.
        layer_map: student layer -> teacher layer. Default: `uniform_map`.
        attention: `kl` of distributions, `mse` of scores before the softmax (TinyBERT), or `None` for hidden states
            only.
        embeddings: include the embeddings' error.
        seed: of the projections, when the widths differ.

    Attributes:
        projection, embedding_projection: `(d_S, d_T)`, trained with the student and thrown away with this loss. The
            identity at first when the widths agree.

    Raises:
        InputError: head counts that differ (with attention), layers that do not exist, a quotient of depths that is
            no integer.
    """

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        *,
        layer_map: Mapping[int, int] | None = None,
        attention: Literal["kl", "mse"] | None = "kl",
        embeddings: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if attention not in ("kl", "mse", None):
            raise InputError(f"attention is 'kl', 'mse' or None, got {attention!r}")
        self.layer_map = dict(uniform_map(student.depth, teacher.depth) if layer_map is None else layer_map)
        for i, j in self.layer_map.items():
            if not (1 <= i <= student.depth and 1 <= j <= teacher.depth):
                raise InputError(
                    f"layer map {i} -> {j}: the student has {student.depth} layers, the teacher {teacher.depth}"
                )
        if attention is not None and student.heads != teacher.heads:
            raise InputError(
                f"teacher has {teacher.heads} attention heads, student {student.heads}; give the student as many, or "
                "choose attention=None"
            )
        self.attention = attention
        generator = torch.Generator().manual_seed(seed)
        self.projection = _projection(student.width, teacher.width, generator)
        self.embedding_projection = _projection(student.width, teacher.width, generator) if embeddings else None

    def forward(self, student: States, teacher: States, targets: Any = None) -> Tensor:
        compare = {"mse": attention_mse, "kl": attention_kl}
        mask, total = student.mask, torch.zeros((), device=student.mask.device)
        for i, j in self.layer_map.items():
            total = total + hidden_mse(student.hidden[i], teacher.hidden[j], self.projection, mask)
            if self.attention is not None:
                total = total + compare[self.attention](student.scores(i), teacher.scores(j), mask)
        if self.embedding_projection is not None:
            total = total + hidden_mse(student.hidden[0], teacher.hidden[0], self.embedding_projection, mask)
        return total


class RelationLoss:
    """MiniLM's loss: KL of attention and of value relations of one layer each, the last by default. It has no weights.

    Args:
        student, teacher: encoders with as many heads; widths may differ.
        student_layer, teacher_layer: default: the last.

    Raises:
        InputError: head counts that differ.
    """

    def __init__(
        self, student: Encoder, teacher: Encoder, *, student_layer: int | None = None, teacher_layer: int | None = None
    ) -> None:
        if student.heads != teacher.heads:
            raise InputError(f"teacher has {teacher.heads} attention heads, student {student.heads}; give it as many")
        self.layers = student_layer or student.depth, teacher_layer or teacher.depth

    def __call__(self, student: States, teacher: States, targets: Any = None) -> Tensor:
        i, j = self.layers
        attention = attention_kl(student.scores(i), teacher.scores(j), student.mask)
        return attention + relation_kl(student.values[i], teacher.values[j], student.mask)


def ernie_tiny(
    student: Encoder,
    pretrained: Encoder | None,
    finetuned: Encoder,
    general: Dataset | None,
    task: Dataset,
    *,
    enhanced: Dataset | None = None,
    latent: Any = None,
    temperature: float = 1.0,
    regression: bool = False,
    epochs: Mapping[str, float] | None = None,
    lr: Mapping[str, float] | None = None,
    batch_size: int = 32,
) -> list[Stage]:
    """The four stages.

    Args:
        student: with a head for the task.
        pretrained: the teacher before fine-tuning; `None` leaves out `general`.
        finetuned: the teacher fine-tuned on this task, with its head.
        general: tokenised general text, a split whose targets are never read; `None` or an empty one leaves out both
            stages on it.
        task: tokenised training examples of the task; targets are read in the last stage alone.
        enhanced: the part of the general text for `general-enhanced`. Default: all of it; an empty one leaves the
            stage out (TinyBERT's order).
        latent: the latent loss, shared by all stages. Default: `LatentLoss(student, finetuned)`.
        temperature: of soft labels. Default 1.
        regression: MSE of outputs in place of soft and hard labels; targets `(N,)` floating.
        epochs, lr: by stage. Default: 3, 1, 10, 3 passes; 1e-4, 1e-4, 5e-5, 3e-5.
        batch_size: of all stages. Default 32.

    Returns:
        Stages for `distil`, whose numbers of steps are the epochs' batches rounded up.

    Raises:
        InputError: vocabularies, labels or their order that differ, teachers without a head, unknown stages in
            `epochs` or `lr`.
    """
    passes, rates = EPOCHS | dict(epochs or {}), LR | dict(lr or {})
    if unknown := sorted((set(passes) | set(rates)) - set(EPOCHS)):
        raise InputError(f"stages are {', '.join(EPOCHS)}, got {unknown[0]!r}")
    for teacher in (pretrained, finetuned):
        if teacher is not None:
            _same_vocabulary(student.model.config, teacher.model.config)
    _same_labels(student.model.config, finetuned.model.config)
    latent = LatentLoss(student, finetuned) if latent is None else latent

    def soft(mine: States, shown: States, targets: Any = None) -> Tensor:
        z, t = _head(mine, "student"), _head(shown, "teacher")
        if regression:
            return F.mse_loss(z.float(), t.float())
        return soft_label_loss(z, t, temperature=temperature)

    def hard(mine: States, shown: States, targets: Any) -> Tensor:
        z = _head(mine, "student")
        if regression:
            return F.mse_loss(z.float().squeeze(-1), targets.float())
        check_targets(targets, *z.shape)
        return F.cross_entropy(z.float(), targets)

    enhanced = general if enhanced is None else enhanced
    last = {"latent": latent, "soft": soft, "hard": hard}
    table: list[tuple[str, Encoder | None, Dataset | None, dict[str, Any]]] = [
        ("general", pretrained, general, {"latent": latent}),
        ("general-enhanced", finetuned, enhanced, {"latent": latent}),
        ("task-adaptive", finetuned, task, {"latent": latent}),
        ("task-specific", finetuned, task, last),
    ]
    return [
        Stage(
            name, data, losses, teacher, steps=math.ceil(passes[name] * len(data) / batch_size), lr=rates[name],  # type: ignore[arg-type]
            batch_size=batch_size,
        )
        for name, teacher, data, losses in table
        if teacher is not None and data is not None and len(data)  # type: ignore[arg-type]
    ]  # fmt: skip


def _projection(student: int, teacher: int, generator: torch.Generator) -> nn.Parameter:
    if student == teacher:
        return nn.Parameter(torch.eye(student))
    return nn.Parameter(torch.randn(student, teacher, generator=generator) / student**0.5)


def _head(states: States, whose: str) -> Tensor:
    if states.logits is None:
        raise InputError(f"the {whose} has no head: give a model for sequence classification")
    return states.logits


def _same_vocabulary(student: Any, teacher: Any) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise InputError(
            f"teacher and student tokenisers differ ({teacher.vocab_size} vs {student.vocab_size} tokens); "
            "position-wise losses need one tokeniser"
        )


def _same_labels(student: Any, teacher: Any) -> None:
    mine, theirs = (dict(config.id2label or {}) for config in (student, teacher))
    if len(mine) != len(theirs):
        raise InputError(
            f"teacher has {len(theirs)} labels, student {len(mine)}: fine-tune the teacher on the student's task"
        )
    default = {i: f"LABEL_{i}" for i in mine}
    if mine != default and theirs != default and mine != theirs:
        i = next(i for i in mine if mine[i] != theirs.get(i))
        raise InputError(
            f"label {i} is {theirs.get(i)!r} for the teacher and {mine[i]!r} for the student; give both one order"
        )
