"""Distillation in stages: a list of (teacher, data, losses), and the one loop that runs it.

    stages = [
        Stage("general", corpus, {"latent": latent}, teacher=pretrained, steps=1000, lr=1e-4),
        Stage("task", examples, {"soft": soft, "hard": hard}, teacher=finetuned, steps=300, lr=3e-5),
    ]
    distil(student, stages, folder="work")

Every stage minimises `sum of weight * loss(student's output, teacher's output, targets)`; the student's weights pass
on, optimiser and schedule start afresh. ERNIE-Tiny's four stages are such a list (`ernie_tiny`); TinyBERT's order is
the same list with one stage left out, plain fine-tuning is one stage without a teacher.

With a folder the state is written at the start and after each stage. Started again with the same stages it goes on
behind the last one that was finished, from the weights in the folder, and gives the same bits as a run without
interruption: the randomness of a stage depends on the seed and the stage's name, not on what ran before. Leaving a
stage out does not change the batches of the others.

Cost of a step: one forward pass of the teacher, one forward and backward pass of the student. Teachers are in
evaluation mode, without gradients, and unchanged. A teacher in bfloat16 halves its part on a GPU: losses compute in
float32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import InputError
from ..nets.calling import evaluating
from ..state import load_state, save_state
from ..task import Batches, to_device

__all__ = ["Loss", "Stage", "distil"]

Loss = Callable[[Any, Any, Any], Tensor]
"""`(student's output, teacher's output, targets) -> scalar`, mean over the batch. A loss that is a module has its own
parameters trained beside the student (projections), over all stages it appears in."""

History = dict[str, dict[str, list[float]]]
STATE = "distil.safetensors"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: of the stage, unique.
        data: a split whose batches are `(inputs, targets)`, or inputs alone.
        losses: name -> loss.
        teacher: called as `teacher(inputs)`; `None` for losses that need none.
        weights: of losses, by name; 1 for those that are missing.
        steps: of the optimiser. 0 leaves the stage out.
        lr: peak learning rate of AdamW, reached after the warm-up and falling linearly to zero.
        batch_size: examples a step.
        warmup: share of the steps over which the learning rate rises from zero. Default 0.1.
        weight_decay: decoupled. Default 0.01.
    """

    name: str
    data: Dataset
    losses: Mapping[str, Loss]
    teacher: nn.Module | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    steps: int = 1000
    lr: float = 5e-5
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        if not self.losses:
            raise InputError(f"{where} has no loss; give at least one")
        if unknown := sorted(set(self.weights) - set(self.losses)):
            raise InputError(f"{where} weighs {unknown[0]!r}, which is none of its losses {', '.join(self.losses)}")
        if bad := [w for w in self.weights.values() if not (math.isfinite(w) and w >= 0)]:
            raise InputError(f"weights of {where} are finite and at least 0, got {bad[0]:g}")
        if self.steps < 0 or self.batch_size < 1 or not self.lr > 0 or not 0 <= self.warmup <= 1:
            raise InputError(
                f"{where} needs steps >= 0, batch_size >= 1, lr > 0 and warmup in [0, 1], got {self.steps}, "
                f"{self.batch_size}, {self.lr:g} and {self.warmup:g}"
            )

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is continued."""
        return {
            "name": self.name, "losses": {name: float(self.weights.get(name, 1)) for name in self.losses},
            "teacher": self.teacher is not None, "examples": len(self.data) if self.steps else 0,  # type: ignore[arg-type]
            "steps": self.steps, "lr": self.lr, "batch_size": self.batch_size, "warmup": self.warmup,
            "weight_decay": self.weight_decay,
        }  # fmt: skip


def distil(
    student: nn.Module,
    stages: Sequence[Stage],
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> History:
    """Run the stages one after another on a student, in place.

    Args:
        student: called as `student(inputs)`. Parameters that require a gradient are trained; one that no loss of a
            stage reaches (a head, before the last stage) is left as it is, weight decay included.
        stages: see `Stage`.
        seed: order of examples and dropout; torch's global generator is left as it was.
        folder: where the state is kept between stages, and found again.
        progress: called with (name of the stage, steps done, steps), for finished stages too.

    Returns:
        Stage -> loss -> its values, unweighted, step by step. The student is in evaluation mode.

    Raises:
        InputError: stages with one name, a teacher that shares parameters with the student, a loss that is no finite
            scalar (with stage, loss and step), a folder with the state of another run.
    """
    names = [stage.name for stage in stages]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"stages need names that differ, got {doubled[0]!r} more than once")
    modules = _loss_modules(stages)
    mine = {id(p) for part in (student, *modules.values()) for p in part.parameters()}
    for stage in stages:
        if stage.teacher is not None and any(id(p) in mine for p in stage.teacher.parameters()):
            raise InputError(f"the teacher of stage {stage.name!r} shares parameters with the student; give it a copy")
    settings = [stage.settings() for stage in stages]
    path = None if folder is None else Path(folder) / STATE
    history: History = {}

    def keep() -> None:
        if path is not None:
            losses = {name: module.state_dict() for name, module in modules.items()}
            state = {"seed": seed, "settings": settings, "history": history}
            save_state(state | {"student": student.state_dict(), "losses": losses}, path)

    if path is not None and path.is_file():
        history = _restored(path, student, modules, settings, seed)
    elif path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep()
    for stage in stages:
        if stage.name in history:
            if progress is not None:
                progress(stage.name, stage.steps, stage.steps)
            continue
        history[stage.name] = _run(student, stage, modules, seed, progress)
        keep()
    student.eval()
    return history


def _loss_modules(stages: Sequence[Stage]) -> dict[str, nn.Module]:
    """Losses that are modules, each once, called by the stage and name they have first."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for stage in stages:
        for name, loss in stage.losses.items():
            if isinstance(loss, nn.Module):
                found.setdefault(id(loss), (f"{stage.name}/{name}", loss))
    return dict(found.values())


def _restored(
    path: Path, student: nn.Module, modules: dict[str, nn.Module], settings: list[dict[str, Any]], seed: int
) -> History:
    state = load_state(path)
    if state.get("seed") != seed or state.get("settings") != settings:
        raise InputError(f"{str(path.parent)!r} holds the state of other stages or another seed; give another folder")
    try:
        student.load_state_dict(state["student"])
        for name, module in modules.items():
            module.load_state_dict(state["losses"][name])
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{str(path.parent)!r} holds the state of another student; give another folder") from error
    return state["history"]


def _factor(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate: up over the warm-up, then down to zero."""
    rise = math.ceil(warmup * steps)
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def _run(
    student: nn.Module, stage: Stage, modules: dict[str, nn.Module], seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, list[float]]:  # fmt: skip
    curves: dict[str, list[float]] = {name: [] for name in stage.losses}
    if not stage.steps:
        return curves
    own = seed + zlib.crc32(stage.name.encode())
    device = next(student.parameters()).device
    losses = [module.to(device) for module in modules.values() if any(module is loss for loss in stage.losses.values())]
    trained = [p for part in (student, *losses) for p in part.parameters() if p.requires_grad]
    fused = device.type in ("cpu", "cuda")  # a fifth of the time on a CPU, where embeddings are most of the weights
    optimiser = torch.optim.AdamW(trained, lr=stage.lr, weight_decay=stage.weight_decay, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, stage.steps, stage.warmup))
    batches = iter(Batches(stage.data, stage.batch_size, seed=own, endless=True))
    teacher = stage.teacher
    student.train()
    with torch.random.fork_rng(), evaluating(teacher) if teacher is not None else nullcontext():
        torch.manual_seed(own)
        for step in range(stage.steps):
            batch = to_device(next(batches), device)
            inputs, targets = batch if isinstance(batch, (tuple, list)) else (batch, None)
            with torch.no_grad():
                shown = None if teacher is None else teacher(inputs)
            output = student(inputs)
            total: Tensor | None = None
            values = []
            for name, loss in stage.losses.items():
                value = loss(output, shown, targets)
                if value.ndim:
                    raise InputError(f"loss {name!r} of stage {stage.name!r} is a scalar, got {tuple(value.shape)}")
                values.append(value.detach())
                weighted = stage.weights.get(name, 1.0) * value
                total = weighted if total is None else total + weighted
            assert total is not None
            for name, number in zip(stage.losses, torch.stack([v.double() for v in values]).tolist(), strict=True):
                if not math.isfinite(number):
                    raise InputError(
                        f"loss {name!r} of stage {stage.name!r} is {number} at step {step}; lower the learning rate"
                    )
                curves[name].append(number)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            schedule.step()
            if progress is not None:
                progress(stage.name, step + 1, stage.steps)
    return curves
