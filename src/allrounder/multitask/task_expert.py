"""TaskExpert: each task builds its features from shared experts at several depths and carries a memory between them.

At each tap l of a backbone, with the map F_l and the memory M^t of task t:

    U_n     = expert_n(F_l)                                  N maps, shared by all tasks
    alpha^t = softmax(gate^t([mean of F_l ; p^t]))           N + 1 shares, for each task and sample
    Z^t     = sum_n alpha^t_n U_n + alpha^t_{N+1} read^t(M^t)
    Y^t     = refine^t(Z^t),    M^t = M^t + write^t(Y^t)

and the head of task t reads its last memory. At the first tap the memory is empty and gets no share.

Use it for segmentation, depth, normals, edges from one backbone when they need different depths, or when what a task
needs depends on the image. A shared decoder is cheaper. Cost: the experts once per tap, whatever the number of tasks;
the rest, about 11 D^2 products a pixel, for each task and tap. Memory of activations: taps * (N + 2 T) * D maps.

TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts (2023, ICCV,
arXiv 2307.15324). Its code was never published. The part of its text that could be had gives experts, gates for each
sample, the memory as one more expert and its update; layer sizes, the linear write and the mean as context are choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .dense_heads import DenseHead, Norm, aligned, check_decoder, conv_block

__all__ = ["TaskExpert"]


class _Tap(nn.Module):
    """The memorial mixture of experts at one depth; all experts, and all tasks, in one grouped convolution each."""

    def __init__(
        self, tasks: int, channels: int, width: int, experts: int, dynamic: bool, memory: bool, norm: Norm
    ) -> None:
        super().__init__()
        self.tasks, self.experts = tasks, experts
        wide, all_tasks = experts * width, tasks * width
        self.decompose = nn.Sequential(nn.Conv2d(channels, wide, 1), *conv_block(wide, wide, groups=experts, norm=norm))
        if dynamic:
            self.gate = nn.Sequential(
                nn.Conv1d(tasks * (channels + width), all_tasks, 1, groups=tasks),
                nn.GELU(),
                nn.Conv1d(all_tasks, tasks * (experts + 1), 1, groups=tasks),
            )
        else:
            self.gate = None
            self.shared = nn.Parameter(torch.zeros(tasks, experts + 1))
        self.read = nn.Conv2d(all_tasks, all_tasks, 1, groups=tasks) if memory else None
        self.refine = conv_block(all_tasks, all_tasks, groups=tasks, norm=norm)
        self.write = nn.Conv2d(all_tasks, all_tasks, 1, groups=tasks)

    def shares(self, features: Tensor, codes: Tensor) -> Tensor:
        """Shares `(N, tasks, experts + 1)` before the softmax, the memory's last; codes are `(N or 1, tasks, D)`."""
        if self.gate is None:
            return self.shared.expand(len(features), -1, -1)
        context = features.mean((2, 3))[:, None].expand(-1, self.tasks, -1)  # (N, tasks, C)
        seen = torch.cat([context, codes.expand(len(features), -1, -1)], 2)
        return self.gate(seen.flatten(1)[..., None]).unflatten(1, (self.tasks, -1))[..., 0]

    def forward(self, features: Tensor, shares: Tensor, memory: Tensor | None) -> Tensor:
        """The new memory `(N, tasks * D, h, w)`."""
        parts = self.decompose(features).unflatten(1, (self.experts, -1))  # (N, experts, D, h, w)
        mixed = torch.einsum("bte,bedhw->btdhw", shares[..., : self.experts], parts)
        if memory is not None and self.read is not None:
            kept = self.read(memory).unflatten(1, (self.tasks, -1))
            mixed = mixed + shares[..., self.experts, None, None, None] * kept
        written = self.write(self.refine(mixed.flatten(1, 2)))
        return written if memory is None else memory + written


class TaskExpert(nn.Module):
    """The decoder; `DensePredictor` puts a backbone in front of it.

    Args:
        tasks: name -> output channels.
        channels: C of each tap of the backbone, first to last; maps of different sizes are brought to the largest.
        width: D, channels of experts and memories.
        experts: N >= 1 at each tap.
        dynamic: gates that see the image and the task. `False`: free shares for each task and tap, the ablation.
        memory: whether a tap reads what earlier ones wrote. `False`: what the taps write is summed, the ablation.
        upsample: enlarges the last memory before the heads (4 for a transformer with patches of 16).
        norm: channels -> normalisation, BatchNorm by default. One that mixes channels must not mix those of different
            tasks and experts: GroupNorm with a divisor of `width` as channels of a group.
        seed: of the initial weights.

    Raises:
        InputError: no tasks, no taps, sizes below 1.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        channels: Sequence[int],
        *,
        width: int = 64,
        experts: int = 5,
        dynamic: bool = True,
        memory: bool = True,
        upsample: int = 1,
        norm: Norm = nn.BatchNorm2d,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_decoder(tasks, channels, width)
        if experts < 1:
            raise InputError(f"experts is at least 1, got {experts}")
        self.channels, self.memory = tuple(channels), memory
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.codes = nn.Parameter(torch.randn(len(tasks), width))
            self.taps = nn.ModuleList(
                _Tap(len(tasks), c, width, experts, dynamic, memory and i > 0, norm) for i, c in enumerate(channels)
            )
            self.heads = nn.ModuleDict(
                {task: DenseHead(width, n, upsample=upsample, norm=norm) for task, n in tasks.items()}
            )

    def _shares(self, i: int, features: Tensor, codes: Tensor | None) -> Tensor:
        tap = self.taps[i]
        scores = tap.shares(features, self.codes[None] if codes is None else codes)  # type: ignore[operator]
        if not self.memory or i == 0:
            empty = torch.zeros_like(scores[..., -1:])
            return torch.cat([scores[..., :-1].softmax(-1), empty], -1)
        return scores.softmax(-1)

    def routing(self, features: Sequence[Tensor], *, codes: Tensor | None = None) -> dict[str, Tensor]:
        """Shares of the experts, task -> `(taps, N, experts + 1)`; the memory's share is the last.

        Args:
            features, codes: as for `forward`.
        """
        maps = aligned(features, self.channels)
        shares = torch.stack([self._shares(i, part, codes) for i, part in enumerate(maps)])
        return dict(zip(self.heads, shares.unbind(2), strict=True))

    def forward(
        self,
        features: Sequence[Tensor],
        *,
        size: Sequence[int],
        tasks: Sequence[str] | None = None,
        codes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every task's map.

        Args:
            features: a map `(N, C, h, w)` for each tap.
            size: (H, W) of the outputs.
            tasks: which to predict. Default: all.
            codes: `(N, tasks, D)`, for instance task tokens of the backbone, instead of the learned p^t.

        Returns:
            Task -> `(N, outputs, H, W)`.

        Raises:
            InputError: other taps or channels, an unknown task, codes of another shape.
        """
        wanted = list(self.heads) if tasks is None else list(tasks)
        for task in wanted:
            if task not in self.heads:
                raise InputError(f"the decoder has no task {task!r}; it has {', '.join(self.heads)}")
        maps = aligned(features, self.channels)
        if codes is not None and codes.shape != (len(maps[0]), *self.codes.shape):
            expected = (len(maps[0]), *self.codes.shape)
            raise InputError(f"codes must be (N, tasks, D) = {expected}, got {tuple(codes.shape)}")
        memory = None
        for i, part in enumerate(maps):
            memory = self.taps[i](part, self._shares(i, part, codes), memory)
        parts = dict(zip(self.heads, memory.unflatten(1, (len(self.heads), -1)).unbind(1), strict=True))  # type: ignore[union-attr]
        return {task: self.heads[task](parts[task], size) for task in wanted}
