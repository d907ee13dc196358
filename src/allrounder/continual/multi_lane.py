"""MULTI-LANE: new label sets for a frozen transformer, a cheap lane for each task, and earlier labels stay as they are.

Task t trains its own selectors E_t, prefix prompts P_t and rows of the head (see `lanes`), on its own classes Y_t:

    z_c = w_c . a_t + b_c,  a_t the unit feature of lane t        # c in Y_t
    multi-label: mean over Y_t of the binary cross-entropy        # single-label: cross-entropy over Y_t

All lanes answer at once, class c of Y_t by lane t: nothing is selected, and nothing that belongs to an earlier task is
ever touched again. Lanes are added as tasks come. A lane's numbers stay bit-identical, and so do its answers when it is
asked alone (by the number of its task); beside more lanes in one batch, rounding may differ in the last bits.

Use it where images show several things and each task labels only its own, or for class-incremental streams with many
tasks: old classes cannot be forgotten, nothing is stored of the data. Not where tasks share classes. Lanes were never
trained together: for single labels the argmax compares logits that are not calibrated to each other, and an
overconfident lane wins too often.

Cost: for T tasks about one frozen pass and T passes of 1 to S tokens (see `lanes`) instead of T frozen passes for
prompts selected by task; storage `S d + 2 P K d + |Y_t| (d + 1)` numbers a task, and `blocks x S x d` more in memory.

Paper: De Min et al., "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning",
CoLLAs 2024, arXiv 2405.15633. Departures: every task has tensors of its own, so that earlier lanes stay bit-identical
with any optimiser and weight decay (the paper's are one tensor, which needs weight decay 0) and the number of tasks is
not needed beforehand. The paper's loss is a mean over all C classes with zeros outside Y_t, which is `|Y_t| / C` times
this one and a constant: the same steps under Adam. Rows of new classes begin as N(0, 0.02^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .lane_backbone import LaneBackbone, vit_backbone
from .lanes import Lane, LaneStack
from .learner import Batch, Learner, TaskInfo, size_of

__all__ = ["MultiLane"]


class MultiLane(Learner):
    """The learner.

    Args:
        backbone: a transformers `ViTModel`, or any pre-LN transformer described as `LaneBackbone`; never changed.
        outputs: size of the output space.
        selectors: S, summaries a lane makes of an image; at least 1, no more than the image has tokens. Paper: 20
            (COCO, CIFAR-100), 10 (VOC).
        prompts: K, prefix prompts in each of the first blocks; at least 0. Paper: as many as selectors.
        depth: how many blocks have them; all where there are fewer. Paper: 5 of 12.
        lr: of Adam. Paper: 0.03, 0.05 and 0.01 x batch / 256 for COCO, VOC and CIFAR-100.
        epochs: passes over each task, for a learning rate that falls to 0 along a cosine within each task, as in the
            paper; `None` keeps it constant.
        optimiser: parameters -> optimiser, anew for each task. Default: Adam, no weight decay.
        seed: of the beginning of the lanes.

    A task whose classes are those of an earlier one goes on with that lane.

    Raises:
        InputError: settings outside their range; in training: a class that another lane scores, targets that are not 0
            and 1 or not of the task, a loss that is not finite.

    Attributes:
        lanes: in the order of their first training.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundaries", "class_list"})
    labels: ClassVar[frozenset[str]] = frozenset({"single", "multi"})
    kept: ClassVar[tuple[str, ...]] = (
        "seen", "gradients", "generator", "backbone", "shape", "tasks", "lanes", "current", "optimiser", "step",
        "steps",
    )  # fmt: skip

    def __init__(
        self,
        backbone: LaneBackbone | nn.Module,
        outputs: int,
        *,
        selectors: int = 20,
        prompts: int = 20,
        depth: int = 5,
        lr: float = 0.015,
        epochs: int | None = None,
        optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(outputs)
        if not 0 < lr < float("inf"):
            raise InputError(f"lr is a positive learning rate, got {lr:g}")
        if epochs is not None and epochs < 1:
            raise InputError(f"epochs is at least 1, or None for a constant learning rate, got {epochs}")
        if selectors < 1 or prompts < 0 or depth < 0:
            raise InputError(
                f"selectors are at least 1, prompts and depth at least 0, got {selectors}, {prompts} and {depth}"
            )
        self.backbone = backbone if isinstance(backbone, LaneBackbone) else vit_backbone(backbone)
        self.selectors, self.prompts = selectors, prompts
        self.depth = min(depth, len(self.backbone.blocks))
        self.lr, self.epochs, self.seed = lr, epochs, seed
        self.fingerprint = self.backbone.fingerprint()
        self.generator = torch.Generator().manual_seed(seed)
        self._optimiser = optimiser or (lambda parameters: torch.optim.Adam(parameters, lr=lr))
        self.lanes: list[Lane] = []
        self.tasks: dict[int, int] = {}  # number of a task -> its lane
        self.current: int | None = None  # the lane in training
        self.optimiser: torch.optim.Optimizer | None = None
        self.step, self.steps = 0, 0
        self._rates: list[float] = []
        self._stack: LaneStack | None = None

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def begin_task(self, info: TaskInfo) -> None:
        if info.classes is None:
            raise InputError("MULTI-LANE needs to know a task's classes before it starts; this stream does not tell")
        classes = tuple(sorted(info.classes))
        same = [index for index, lane in enumerate(self.lanes) if lane.classes == classes]
        taken = sorted({number for lane in self.lanes for number in lane.classes} & set(classes))
        if taken and not same:
            raise InputError(
                f"class {taken[0]} of the new task is scored by the lane of an earlier one; a class has one lane: give "
                "tasks that share no class, or the very same classes again"
            )
        if classes and not 0 <= classes[0] <= classes[-1] < self.outputs:
            raise InputError(
                f"the task has the classes {list(classes)}; the learner has outputs 0 to {self.outputs - 1}"
            )
        if not same:
            self.lanes.append(self._lane(classes, self.lanes[-1] if self.lanes else None))
        self.current = same[0] if same else len(self.lanes) - 1
        if info.task is not None:
            self.tasks[info.task] = self.current
        self.step = 0
        self.steps = 0 if self.epochs is None else self.epochs * sum(1 for _ in info.batches)
        self._stack = None
        self._start(self.lanes[self.current])

    def _start(self, lane: Lane) -> torch.optim.Optimizer:
        self.optimiser = self._optimiser(list(lane.parameters()))
        self._rates = [group["lr"] for group in self.optimiser.param_groups]
        return self.optimiser

    def _lane(self, classes: tuple[int, ...], like: Lane | None) -> Lane:
        return Lane(
            self.backbone, classes, selectors=self.selectors, prompts=self.prompts, depth=self.depth,
            generator=self.generator, like=like,
        )  # fmt: skip

    def loss(self, batch: Batch) -> Tensor:
        """Of the present task's lane, over its own classes."""
        if self.current is None:
            raise InputError("no task has begun: call begin_task, or let `learn` do it")
        lane, targets = self.lanes[self.current], batch.targets
        if targets.ndim == 2:
            if targets.shape[1] != self.outputs:
                raise InputError(f"targets are {tuple(targets.shape)}, expected (B, {self.outputs}) of 0 and 1")
            own = targets[:, list(lane.classes)]
            if not ((own == 0) | (own == 1)).all():
                raise InputError("multi-label targets must be 0 and 1; give a row of labels for each example")
            scores = lane.scores(self.backbone, batch.inputs)
            return F.binary_cross_entropy_with_logits(scores, own.to(scores))
        rows = targets.unsqueeze(1) == torch.tensor(lane.classes, device=targets.device)  # (B, classes of the lane)
        if not rows.any(1).all():
            odd = int(targets[~rows.any(1)][0])
            raise InputError(f"the target {odd} is not a class of the present task, which has {list(lane.classes)}")
        return F.cross_entropy(lane.scores(self.backbone, batch.inputs), rows.int().argmax(1))

    def observe(self, batch: Batch) -> dict[str, float]:
        self.enough(batch)
        with torch.enable_grad():
            loss = self.loss(batch)
            if not torch.isfinite(loss):
                raise InputError(
                    f"the loss is {loss.item()}; look for NaN in the inputs or lower the learning rate (lr={self.lr:g})"
                )
            lane, optimiser = self.lanes[self.current or 0], self.optimiser
            assert optimiser is not None
            optimiser.zero_grad()
            loss.backward()
        if self.steps:
            for group, rate in zip(optimiser.param_groups, self._rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(1, self.step / self.steps)))
        optimiser.step()
        self.step, self.gradients, self._stack = self.step + 1, self.gradients + len(batch), None
        self.seen[list(lane.classes)] = True
        return {"loss": loss.item()}

    def end_task(self, info: TaskInfo) -> None:
        self.current, self.optimiser = None, None
        for lane in self.lanes:
            lane.zero_grad(set_to_none=True)

    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        if not self.seen.any():
            raise InputError("the learner has seen no class yet: train it before asking for predictions")
        if task in self.tasks:
            stack = LaneStack(self.backbone, [self.lanes[self.tasks[task]]])
        else:
            stack = self._stack = self._stack or LaneStack(self.backbone, self.lanes)
        scores = stack.scores(inputs)
        logits = scores.new_full((len(scores), self.outputs), float("-inf"))
        if task is None or task in self.tasks:
            logits = logits.index_copy(1, stack.classes, scores)
        return self.masked(logits)

    def held(self) -> dict[str, int]:
        """Of all lanes; `evolved selectors` are kept in memory only and made anew when a state is loaded."""
        blocks = len(self.backbone.blocks)
        return {
            "selectors": sum(size_of(lane.selectors) for lane in self.lanes),
            "prompts": sum(size_of(lane.keys) + size_of(lane.values) for lane in self.lanes),
            "head": sum(size_of(lane.weight) + size_of(lane.bias) for lane in self.lanes),
            "evolved selectors": sum(blocks * lane.selectors.numel() for lane in self.lanes)
            * self.backbone.cls.element_size(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The lanes and what training needs to go on, within a task too; of the backbone only a fingerprint."""
        return {
            "seen": self.seen.clone(),
            "gradients": self.gradients,
            "generator": self.generator.get_state(),
            "backbone": self.fingerprint,
            "shape": [self.selectors, self.prompts, self.depth, self.backbone.width, self.outputs],
            "tasks": dict(self.tasks),
            "lanes": [
                {"classes": list(lane.classes)}
                | {name: value.detach().clone() for name, value in lane.state_dict().items()}
                for lane in self.lanes
            ],
            "current": self.current,
            "optimiser": None if self.optimiser is None else self.optimiser.state_dict(),
            "step": self.step,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            InputError: when it is of another learner, backbone, or shape of lanes.
        """
        if odd := sorted(set(state) ^ set(self.kept)):
            raise InputError(f"the saved state does not fit MultiLane: {odd[0]!r} is in one of them only")
        names = ("selectors", "prompts", "depth", "width", "outputs")
        own = (self.selectors, self.prompts, self.depth, self.backbone.width, self.outputs)
        for name, saved, mine in zip(names, state["shape"], own, strict=True):
            if saved != mine:
                raise InputError(f"the saved lanes have {name} {saved}, this learner {mine}; make it with the same")
        if state["backbone"] != self.fingerprint:
            raise InputError("the saved lanes belong to another backbone: its weights are not those of this one")
        self.seen, self.gradients = state["seen"].clone(), state["gradients"]
        self.lanes = []
        for saved in state["lanes"]:
            lane = self._lane(tuple(saved["classes"]), None)
            lane.load_state_dict({name: value for name, value in saved.items() if name != "classes"})
            self.lanes.append(lane)
        self.generator.set_state(state["generator"])
        self.tasks, self.current = dict(state["tasks"]), state["current"]
        self.step, self.steps, self._stack = state["step"], state["steps"], None
        self.optimiser = None
        if self.current is not None:
            self._start(self.lanes[self.current]).load_state_dict(state["optimiser"])
