"""An output layer for any number of classes whose training step costs the same for ten thousand as for a million.

`FactoredOutput` is the last linear layer and its loss in one: exact loss, exact gradient for the layers below, exact
plain-SGD update of all D x d weights, in O(d^2) an example. It takes a loss of the spherical family (`ZLoss`, ...),
which sees the outputs o = W h only by the target's a, q = sum o^2 = h' Q h and s = sum o = h' w. Q = W'W and w = W'1
are kept up to date, and the weights are never formed but factored as

    W = V U + 1 omega'        V (D, d): only rows of targets are touched;  U (d, d), its inverse, omega (d): all others

Use it with many classes (words, products, extreme classification), from about 4 d on. Log-softmax is not of the family:
take it, or `torch.nn.AdaptiveLogSoftmaxWithLoss`, when probabilities are needed.

`loss.backward()` trains the layers below and updates this layer, with its learning rate `layer.lr`. The update is part
of backward, and no separate call, because that is hardest to get wrong: there is nothing to forget, nothing to call in
the wrong order or twice, and any training loop will do. The weights are buffers, so that no optimiser can be given
them: momentum, Adam and clipping have no such factored form. What remains to go wrong is refused: a backward of an
outdated forward (two forwards then two backwards, or a second backward through one graph), a gradient scaler, several
processes, a step too large to invert. In `eval()` mode nothing is ever updated.

Cost of a step of m examples: 14 m d^2 + 8 m^2 d + 2 m^3 operations (keep m <= d) and m rows of V; every `upkeep`
steps an eigendecomposition of d x d. Memory: V, four d x d, O(m d + m^2). A singular value of U that has left [1/2, 2]
costs O(D d) at the next upkeep. O(D d^2) is spent when a third of them have, and at every hundredth upkeep, to take Q
and w from the weights: at 800 000 classes, d = 300, m = 200 about a twentieth of the time.

Paper: Vincent, de Brebisson & Bouthillier, "Efficient Exact Gradient Update for training Deep Networks with Very Large
Sparse Targets", NIPS 2015, arXiv 1412.7091, as used by arXiv 1604.08859. Departures: its code's weight decay rescales
neither Q nor w, so that losses are wrong afterwards; here it is exactly that of `torch.optim.SGD`. The small matrices
are float64 whatever V is, against cancellation and drift (the code has an inverse that drifts in float32). The new
inverse applied to H falls out of the m x m solve, one product less. Upkeep also comes early when U runs away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .spherical import SphericalLoss, reduced, target_columns

__all__ = ["FactoredOutput"]

BLOCK = 8192  # rows of V a time, where all of V is read
LARGEST_FACTOR = 1000.0  # a loss multiplied by more than this is taken for the work of a gradient scaler
REFRESH = 100  # checks of the factors from one recomputation of Q and w to the next
STRETCH = 100.0  # a singular value of U beyond this, or below its inverse, calls for upkeep at once


class FactoredOutput(nn.Module):
    """Linear output layer and loss: `layer(hidden, targets)` is the loss, `loss.backward()` trains.

    Args:
        features: d, the width of the last hidden layer. There is no bias: append a constant to `hidden` for one.
        classes: D.
        loss: of the spherical family; its `reduction` holds here too.
        lr: learning rate of this layer; `layer.lr` may be set at any time, by a schedule for example.
        weight_decay: as in `torch.optim.SGD`.
        std: deviation of the initial weights. Paper: 0.001.
        upkeep: updates from one check of the factors to the next. Paper's example: 100.
        seed: of the initial weights.
        dtype: of V, and of the loss: float32 or float64.
        small_dtype: of the d x d state and all arithmetic. float32 is about twice as fast and drifts more.
        device: where the weights live.

    Shapes: `hidden` `(N, d)`, any float type; `targets` `(N,)` or `(N, K)` as for the loss. The loss is a scalar, or
    `(N,)` with `reduction="none"`. `state_dict` has all that a resumed training needs; `lr` is a setting, not state.
    `layer.float()` turns the small state into float32 as well.

    Raises:
        InputError: settings out of range; wrong shapes and targets; hidden values or losses that are not finite; and in
            backward the misuses above. The layer is then as it was before.

    >>> from allrounder.losses.spherical import ZLoss
    >>> layer = FactoredOutput(8, 1000, ZLoss(), lr=0.1)
    >>> hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    >>> layer(hidden, torch.tensor([3, 14, 15, 3])).backward()
    >>> hidden.grad.shape, layer.updates.item(), layer.topk(hidden, 2)[1].shape
    (torch.Size([4, 8]), 1, torch.Size([4, 2]))
    """

    rows: Tensor  # V (D, d)
    basis: Tensor  # U (d, d)
    inverse: Tensor  # of U (d, d)
    offset: Tensor  # omega (d,)
    gram: Tensor  # Q = W'W (d, d)
    column_sum: Tensor  # w = W'1 (d,)
    updates: Tensor  # how many there were, ()

    def __init__(
        self,
        features: int,
        classes: int,
        loss: SphericalLoss,
        *,
        lr: float,
        weight_decay: float = 0.0,
        std: float = 1e-3,
        upkeep: int = 100,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        small_dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(features, upkeep) < 1 or classes < 2:
            raise InputError(
                f"features and upkeep are at least 1 and classes 2, got features={features}, upkeep={upkeep}, "
                f"classes={classes}"
            )
        if not isinstance(loss, SphericalLoss):
            raise InputError(f"the factored layer takes a loss of the spherical family such as ZLoss(), got {loss!r}")
        if not 0 < std < math.inf:
            raise InputError(f"std is above 0 (equal outputs have no gradient to part them), got {std:g}")
        self.features, self.classes, self.loss, self.upkeep = features, classes, loss, upkeep
        self.lr, self.weight_decay = lr, weight_decay
        generator = torch.Generator(device or "cpu").manual_seed(seed)
        rows = torch.empty(classes, features, dtype=dtype, device=device).normal_(0, std, generator=generator)
        eye = torch.eye(features, dtype=small_dtype, device=device)
        self.register_buffer("rows", rows)
        self.register_buffer("basis", eye)
        self.register_buffer("inverse", eye.clone())
        self.register_buffer("offset", torch.zeros_like(eye[0]))
        self.register_buffer("gram", torch.zeros_like(eye))
        self.register_buffer("column_sum", torch.zeros_like(eye[0]))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long, device=device))
        self._settings()
        gram, column_sum = self._moments()
        self.gram.copy_(gram)
        self.column_sum.copy_(column_sum)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        self._settings()
        self._check(hidden)
        columns = target_columns(targets, len(hidden), self.classes)
        # the anchor has the update run even where nothing below is trained
        anchor = torch.zeros((), device=hidden.device, requires_grad=self.training and torch.is_grad_enabled())
        return _Loss.apply(hidden, anchor, self, columns)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """W `(D, d)`, materialised, in the type of V."""
        found = torch.empty_like(self.rows)
        for start in range(0, self.classes, BLOCK):
            found[start : start + BLOCK] = self._block(start)
        return found

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best classes of each row: their scores and numbers, best first, both `(N, k)`.

        O(N D d) time, a block of classes at a time: memory O(N (k + 8192)). Scores are `loss.score` of the outputs (for
        the Z-loss the outputs themselves), not log-probabilities.

        Raises:
            InputError: k outside 1 to D, wrong shapes.
        """
        self._check(hidden)
        if not 1 <= k <= self.classes:
            raise InputError(f"k is from 1 to the number of classes {self.classes}, got {k}")
        small = hidden.to(self.basis.dtype)
        queries, offset = ((small @ part).to(self.rows.dtype) for part in (self.basis.T, self.offset[:, None]))
        values, classes = queries.new_empty(len(hidden), 0), queries.new_empty(len(hidden), 0, dtype=torch.long)
        for start in range(0, self.classes, BLOCK):
            scores = self.loss.score(queries @ self.rows[start : start + BLOCK].T + offset)
            best, where = scores.topk(min(k, scores.shape[1]), dim=1)
            values, classes = torch.cat([values, best], 1), torch.cat([classes, where + start], 1)
            values, kept = values.topk(min(k, values.shape[1]), dim=1)
            classes = classes.gather(1, kept)
        return values, classes

    @torch.no_grad()
    def drift(self) -> float:
        """How far Q, w and the inverse have drifted from V, U and omega, relative; O(D d^2).

        Q moves exactly and V is rounded: 1e-7 to 1e-5 with a V in float32 (more if weights were once far larger than
        now, as after first steps that overshoot), 1e-13 in float64. `refresh()` sets it back.
        """
        gram, column_sum = self._moments()
        size = gram.trace()
        eye = torch.eye(self.features, dtype=self.basis.dtype, device=self.basis.device)
        parts = (
            (self.gram - gram).norm() / gram.norm(),
            (self.column_sum - column_sum).norm() / (self.classes * size).sqrt(),
            (self.basis @ self.inverse - eye).abs().max(),
        )
        return max(part.item() for part in parts)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write W into V, the identity into U, and recompute Q and w; the weights stay what they are. O(D d^2)."""
        for start in range(0, self.classes, BLOCK):
            self.rows[start : start + BLOCK] = self._block(start)
        for square in (self.basis, self.inverse):
            square.zero_().fill_diagonal_(1)
        self.offset.zero_()
        gram, column_sum = self._moments()
        self.gram.copy_(gram)
        self.column_sum.copy_(column_sum)

    def extra_repr(self) -> str:
        return f"features={self.features}, classes={self.classes}, lr={self.lr:g}, weight_decay={self.weight_decay:g}"

    def _settings(self) -> None:
        if not (0 <= self.lr < math.inf and self.weight_decay >= 0 and self.lr * self.weight_decay < 1):
            raise InputError(
                f"lr and weight_decay are at least 0 with a product below 1, got {self.lr:g} and {self.weight_decay:g}"
            )
        for name in ("rows", "basis"):
            if (found := getattr(self, name).dtype) not in (torch.float32, torch.float64):
                raise InputError(f"the factored layer works in float32 or float64, got {found}; convert the rest alone")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.training and distributed and torch.distributed.get_world_size() > 1:
            raise InputError("the factored layer trains in one process: its updates are not shared with other ranks")

    def _check(self, hidden: Tensor) -> None:
        if hidden.ndim != 2 or hidden.shape[1] != self.features or not hidden.is_floating_point():
            raise InputError(
                f"hidden values are floats (N, {self.features}), got {tuple(hidden.shape)} {hidden.dtype}; "
                "flatten other axes"
            )

    def _block(self, start: int) -> Tensor:
        return self.rows[start : start + BLOCK].to(self.basis.dtype) @ self.basis + self.offset

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Q and w from V, U and omega."""
        gram, column_sum = torch.zeros_like(self.gram), torch.zeros_like(self.column_sum)
        for start in range(0, self.classes, BLOCK):
            block = self.rows[start : start + BLOCK].to(gram.dtype)
            gram.addmm_(block.T, block)
            column_sum += block.sum(0)
        column_sum = column_sum @ self.basis  # U'V'1
        crossed = torch.outer(column_sum, self.offset)
        gram = self.basis.T @ gram @ self.basis + crossed + crossed.T
        gram += self.classes * torch.outer(self.offset, self.offset)
        return gram, column_sum + self.classes * self.offset

    def _update(self, step: _Step, ga: Tensor, gq: Tensor, gs: Tensor, below: Tensor, passed: Tensor) -> None:
        """Plain SGD on W, by its factors.

        Args:
            ga, gq, gs: gradients of the loss in a `(m, K)`, twice that in q `(m,)`, and that in s `(m,)`.
            below: the gradient passed to the layers below `(m, d)`.
            passed: its part that does not come from q, `(m, d)`.
        """
        h, d = step.hidden, self.classes
        decay = 1 - self.lr * self.weight_decay
        eta = self.lr / decay  # k W - lr dW = k (W - lr/k dW)
        scaled = gq[:, None] * h  # G H
        system = torch.eye(len(h), dtype=h.dtype, device=h.device) - eta * (h @ scaled.T)  # (m, m)
        solved, failed = torch.linalg.inv_ex(system)
        condition = (system.abs().sum(1).amax() * solved.abs().sum(1).amax()).item()  # of the maximum norm
        if failed.item() or not condition < torch.finfo(h.dtype).eps ** -0.5:
            raise InputError(
                f"the step with lr={self.lr:g} cannot be inverted (condition number {condition:.1e}); lower layer.lr"
            )
        moved = solved @ (h @ self.inverse)  # H times the new inverse of U
        summed = ga.sum(1)
        flat, picked = ga.flatten(), step.columns.flatten()
        same = torch.where(picked[:, None] == picked, flat[:, None] * flat, 0)  # (mK, mK)
        crossed = torch.outer(gs, summed)
        crossed += scaled @ (passed + gq[:, None] / 2 * step.squared).T  # h Q h' is symmetric: half of it on each side
        inner = same.reshape(*ga.shape, *ga.shape).sum((1, 3)) + crossed + crossed.T
        inner += d * torch.outer(gs, gs)  # (m, m)
        half = h.T @ ((eta * eta / 2) * (inner @ h) - eta * below)

        self.gram += half
        self.gram += half.T
        self.column_sum -= eta * (h.T @ (gq * (h @ self.column_sum) + d * gs + summed))
        self.offset -= eta * (h.T @ (gq * step.offset + gs))
        self.basis.addmm_(step.turned.T, scaled, alpha=-eta)
        self.inverse.addmm_(scaled.T, moved, alpha=eta)
        change = (-eta * ga)[:, :, None] * moved[:, None]
        self.rows.index_add_(0, picked, change.flatten(0, 1).to(self.rows.dtype))
        if self.weight_decay:
            for value, factor in (
                (self.basis, decay), (self.offset, decay), (self.column_sum, decay), (self.inverse, 1 / decay),
                (self.gram, decay**2),
            ):  # fmt: skip
                value *= factor
        self.updates += 1
        widest = max(torch.dot(value.flatten(), value.flatten()).item() for value in (self.basis, self.inverse))
        if int(self.updates) % self.upkeep == 0 or widest > 4 * self.features + STRETCH**2:
            self._mend()

    def _mend(self) -> None:
        """Bring singular values of U that left [1/2, 2] back to 1, and invert U afresh."""
        squares, left = torch.linalg.eigh(self.basis @ self.basis.T)
        values = squares.clamp_min(0).sqrt()
        out = (values < 0.5) | (values > 2)
        count = int(out.sum())
        if 3 * count > self.features or int(self.updates) % (REFRESH * self.upkeep) == 0:
            self.refresh()
            return
        if count:
            left, values = left[:, out], values[out]
            self.basis.addmm_(left * (1 / values - 1), left.T @ self.basis)
            back = (left * (values - 1)).to(self.rows.dtype)  # (d, count)
            left = left.to(self.rows.dtype)
            for start in range(0, self.classes, BLOCK):
                block = self.rows[start : start + BLOCK]
                block.addmm_(block @ left, back.T)
        self.inverse.copy_(torch.linalg.inv(self.basis))


class _Step:
    """What forward leaves for backward."""

    def __init__(self, layer: FactoredOutput, hidden: Tensor, columns: Tensor) -> None:
        self.hidden = hidden.to(layer.basis.dtype)  # (m, d)
        self.columns = columns  # (m, K)
        self.squared = self.hidden @ layer.gram  # H Q
        self.turned = self.hidden @ layer.basis.T  # H U'
        self.picked = layer.rows[columns].to(self.hidden.dtype)  # V[y] (m, K, d)
        self.offset = self.hidden @ layer.offset  # (m,)
        target = (self.picked @ self.turned[:, :, None])[:, :, 0] + self.offset[:, None]
        square = (self.hidden * self.squared).sum(1).clamp_min(0)
        total = self.hidden @ layer.column_sum
        self.statistics = (target, square, total)

    def losses(self, layer: FactoredOutput) -> Tensor:
        """The loss of each row, and its gradients in the three statistics."""
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in self.statistics]
            rows = layer.loss.rows(leaves[0], leaves[1], leaves[2], layer.classes)
            self.gradients = torch.autograd.grad(rows.sum(), leaves, materialize_grads=True)
        return rows.detach()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, layer: FactoredOutput, columns: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            ctx.step = _Step(layer, hidden, columns)
            rows = ctx.step.losses(layer)
        if not torch.isfinite(rows).all():
            raise InputError("the loss is not finite; look for NaN in the hidden values, or lower the learning rate")
        ctx.layer, ctx.version, ctx.training, ctx.dtype = layer, layer.basis._version, layer.training, hidden.dtype
        return reduced(rows, layer.loss.reduction).to(layer.rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        layer, step = ctx.layer, ctx.step
        if ctx.version != layer.basis._version:
            raise InputError(
                "the factored layer has been updated since this forward pass; every backward needs a forward of its "
                "own just before it (for several losses, add them up and call backward once)"
            )
        factor = gradients[0].to(step.hidden.dtype)
        if not factor.abs().max() <= LARGEST_FACTOR:
            raise InputError(
                f"the gradient of the factored layer's loss is {factor.abs().max().item():g}, not about 1; leave out "
                "the gradient scaler (bfloat16 needs none)"
            )
        with torch.autocast(step.hidden.device.type, enabled=False):
            if layer.loss.reduction == "mean":
                factor = factor / len(step.hidden)
            ga, gq, gs = step.gradients
            ga, gq, gs = ga * factor.reshape(-1, 1), 2 * gq * factor, gs * factor
            passed = (ga[:, :, None] * step.picked).sum(1) @ layer.basis
            passed += torch.outer(ga.sum(1), layer.offset) + torch.outer(gs, layer.column_sum)
            below = gq[:, None] * step.squared + passed  # (m, d)
            if ctx.training:
                layer._update(step, ga, gq, gs, below, passed)
        return below.to(ctx.dtype), None, None, None
