"""DTRN: each task's own view of the user's behaviour and of the features, before any sharing of experts.

With the history X_s of behaviour s, the shown item e, task t, and a hypernetwork over a task code and a behaviour code:

    gamma, beta = hyper([q_t ; b_s])                          for each LayerNorm of one transformer shared by all t, s
    H = CLN1(X_s + attention(X_s)),  H = CLN2(H + FFN(H))     CLN(h) = gamma * normalised(h) + beta
    v_ts = sum_i softmax_i(<H_i, W e> / sqrt(d)) H_i          task-specific interest, TIM
    a_t  = 2 sigmoid(W2_t relu(W1_t [fields, v_t, e]))        one weight a field, TRM
    x_t  = a_t * [fields, v_t, e]                             and any multi-task head on x_1 .. x_T

Use it when several tasks (click, conversion) read the same histories and need different parts of them; without
histories only TRM is left. Not when tasks agree: a shared bottom is cheaper. Cost: Q, K, V, attention and residual of
the first block do not depend on the task and run once for each behaviour; LayerNorms, FFN and pooling run T times, in
one product with the tasks as leading dimension (activations T * N * n * 4d). A new task adds a code, a TRM and a tower.

Deep Task-specific Bottom Representation Network for Multi-Task Recommendation (2023, CIKM, arXiv 2308.05996). No code
of its authors was found, and only the abstract and a note on the paper could be read: from them come the hypernetwork
over tasks and behaviours that gives gamma and beta, and the SENet-like weighing of fields. Choices of this file:
LayerNorm after the residual, pooling by the shown item, all sizes, a learned vector for an empty history, 2 sigmoid
with a last layer of zeros and a hypernetwork at gamma = 1, beta = 0 exactly, so that training starts at the
unconditioned model.
The last layer of the hypernetwork takes the mean over its hidden units, not the sum: with the sum a step of Adam moves
gamma by dozens of learning rates, and on development draws of the study gammas swung and training AUC fell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .experts import SharedBottom
from .features import FeatureSchema, FieldEmbeddings

__all__ = ["DTRN", "TIM", "TRM", "entire_space", "masked_bce"]


class _Block(nn.Module):
    """A transformer block without norms of its own: `attend` up to the first, `refine` from there on."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """`(..., N, n, d)` and the mask `(N, n)` of what may be read, to the same shape."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return x + self.out(read.transpose(-3, -2).flatten(-2))

    def refine(self, h: Tensor, condition: Tensor) -> Tensor:
        """`(1 or T, N, n, d)` under the conditions `(T, 4, d)`: gamma, beta, gamma, beta."""
        gamma1, beta1, gamma2, beta2 = condition[:, None, None].unbind(-2)
        h = F.layer_norm(h, h.shape[-1:]) * gamma1 + beta1
        return F.layer_norm(h + self.ffn(h), h.shape[-1:]) * gamma2 + beta2


class TIM(nn.Module):
    """Task-specific interest: one vector for each task and behaviour, from one conditional transformer.

    Args:
        tasks: number of tasks.
        behaviours: name -> longest history.
        dim: width of the item vectors.
        heads, blocks: of the transformer.
        code, hidden: width of task and behaviour codes, and of the hypernetwork's hidden layer.
        conditional: without, one gamma and beta for all tasks and behaviours, an ordinary shared transformer.
    """

    def __init__(
        self,
        tasks: int,
        behaviours: Mapping[str, int],
        dim: int,
        *,
        heads: int = 2,
        blocks: int = 1,
        code: int = 8,
        hidden: int = 64,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise InputError(f"dim={dim} must be a multiple of heads={heads}")
        self.names, self.dim = tuple(behaviours), dim
        self.positions = nn.ParameterList(nn.Parameter(0.1 * torch.randn(n, dim)) for n in behaviours.values())
        self.blocks = nn.ModuleList(_Block(dim, heads) for _ in range(blocks))
        self.query = nn.Linear(dim, dim)
        self.empty = nn.Parameter(0.1 * torch.randn(len(behaviours), dim))
        neutral = torch.zeros(blocks, 4, dim)
        neutral[:, [0, 2]] = 1
        self.norms = nn.Parameter(neutral)
        self.hyper, self.hidden = None, hidden
        if conditional:
            self.task_codes = nn.Parameter(torch.randn(tasks, code))
            self.behaviour_codes = nn.Parameter(torch.randn(len(behaviours), code))
            last = nn.Linear(hidden, neutral.numel(), bias=False)  # its bias is `norms`
            nn.init.zeros_(last.weight)
            self.hyper = nn.Sequential(nn.Linear(2 * code, hidden), nn.ReLU(), last)

    def conditions(self) -> Tensor:
        """gamma, beta, gamma, beta of each block: `(T, S, blocks, 4, dim)`, with T = 1 when unconditional."""
        behaviours = len(self.names)
        if self.hyper is None:
            return self.norms.expand(1, behaviours, -1, -1, -1)
        tasks = len(self.task_codes)
        codes = [
            self.task_codes[:, None].expand(-1, behaviours, -1),
            self.behaviour_codes[None].expand(tasks, -1, -1),
        ]
        shift = self.hyper(torch.cat(codes, -1)) / self.hidden
        return self.norms + shift.unflatten(-1, (len(self.blocks), 4, self.dim))

    def forward(self, histories: Mapping[str, Tensor], masks: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Interests `(T, N, S, dim)`; T = 1 when unconditional.

        Args:
            histories: behaviour -> item vectors `(N, n, dim)`.
            masks: behaviour -> bool `(N, n)`, true where there is an item. Rows without any get the learned vector.
            target: vectors of the shown items `(N, dim)`.
        """
        conditions = self.conditions()
        query = self.query(target) / math.sqrt(self.dim)
        found = []
        for s, name in enumerate(self.names):
            mask = masks[name]
            some = mask.any(-1, keepdim=True)  # (N, 1)
            mask = mask | ~some  # a softmax over nothing is NaN, in the gradient too
            h = histories[name] + self.positions[s][: mask.shape[1]]
            for i, block in enumerate(self.blocks):
                h = block.attend(h, mask)  # type: ignore[operator]
                h = block.refine(h if i else h[None], conditions[:, s, i])  # type: ignore[operator]
            scores = torch.einsum("tnld,nd->tnl", h, query).masked_fill(~mask, -math.inf)
            pooled = torch.einsum("tnl,tnld->tnd", scores.softmax(-1), h)
            found.append(pooled.where(some, self.empty[s]))
        return torch.stack(found, -2)


class TRM(nn.Module):
    """Task-specific refinement: a weight in (0, 2) for each field, by a small network of each task; 1 at the start.

    Args:
        tasks, fields, dim: how many, how many, and the width of a field.
        reduction: the hidden layer has `fields / reduction` units, at least one.
    """

    def __init__(self, tasks: int, fields: int, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, fields // reduction)
        self.excite = nn.ModuleList(
            nn.Sequential(nn.Linear(fields * dim, hidden), nn.ReLU(), nn.Linear(hidden, fields)) for _ in range(tasks)
        )
        for network in self.excite:
            for parameter in network[-1].parameters():  # type: ignore[index]
                nn.init.zeros_(parameter)

    def weights(self, fields: Tensor) -> Tensor:
        """Weights `(T, N, M)` of the fields `(1 or T, N, M, dim)`."""
        each = fields.flatten(-2).expand(len(self.excite), -1, -1)
        return 2 * torch.stack([network(x) for network, x in zip(self.excite, each, strict=True)]).sigmoid()

    def forward(self, fields: Tensor) -> Tensor:
        """The fields of each task times their weights: `(T, N, M, dim)`."""
        return fields * self.weights(fields)[..., None]


class DTRN(nn.Module):
    """Embeddings, TIM, TRM and a multi-task head: `model(batch)` gives task -> logits `(N,)`.

    Args:
        schema: the fields of a batch.
        tasks: their names; each is a yes or no.
        head: called as `head(in_features, tasks, seed=seed)`; `SharedBottom`, `MMoE`, `CGC`, `PLE` or a
            `functools.partial` of them.
        dim: width of each field's vector. Usual: 16 to 64.
        heads, blocks, code, hidden: of `TIM`.
        reduction: of `TRM`.
        tim, trm: leave one out (an ordinary shared transformer; no weights). Without both it is the plain head.
        seed: of the initial weights.

    Raises:
        InputError: for bad sizes, and in a call for a batch that breaks the schema (see `FeatureSchema.check`).

    >>> model = DTRN(FeatureSchema(categorical={"city": 5}, behaviours={"click": 3}, items=9), ["click", "buy"])
    >>> history = torch.tensor([[4, 7, -1], [-1, -1, -1]])  # the second user never clicked
    >>> batch = {"city": torch.tensor([0, 4]), "click": history, "item": torch.tensor([8, 0])}
    >>> {task: tuple(logits.shape) for task, logits in model(batch).items()}
    {'click': (2,), 'buy': (2,)}
    """

    def __init__(
        self,
        schema: FeatureSchema,
        tasks: Sequence[str],
        *,
        head: Callable[..., nn.Module] = SharedBottom,
        dim: int = 16,
        heads: int = 2,
        blocks: int = 1,
        code: int = 8,
        hidden: int = 64,
        reduction: int = 4,
        tim: bool = True,
        trm: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "heads": heads, "blocks": blocks, "code": code, "hidden": hidden, "reduction": reduction}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        self.schema, self.tasks = schema, tuple(tasks)
        fields = len(schema.fields)
        self.head = head(fields * dim, tasks, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = FieldEmbeddings(schema, dim)
            self.tim = None
            if schema.behaviours:
                self.tim = TIM(
                    len(tasks), schema.behaviours, dim,
                    heads=heads, blocks=blocks, code=code, hidden=hidden, conditional=tim,
                )  # fmt: skip
            self.trm = TRM(len(tasks), fields, dim, reduction=reduction) if trm else None

    def _fields(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Vectors of all fields, `(1 or T, N, M, dim)`, in the order of `schema.fields`."""
        self.schema.check(batch)
        plain = self.embed.plain(batch)
        parts = [torch.stack(plain, 1)[None]] if plain else []
        if self.schema.items:
            target = self.embed.item(batch[self.schema.target])
            if self.tim is not None:
                histories = {name: self.embed.item(batch[name]) for name in self.schema.behaviours}
                masks = {name: batch[name] >= 0 for name in self.schema.behaviours}
                parts.append(self.tim(histories, masks, target))
            parts.append(target[None, :, None])
        tasks = max(len(part) for part in parts)
        return torch.cat([part.expand(tasks, -1, -1, -1) for part in parts], -2)

    def forward(self, inputs: Mapping[str, Tensor], task: str | None = None) -> dict[str, Tensor] | Tensor:
        """Logits of all tasks, or of one, `(N,)`.

        Args:
            inputs: a batch that keeps to the schema; other entries are not read.
            task: one task alone, as `train.fit` asks for it; this costs as much as all of them.
        """
        if task is not None and task not in self.tasks:
            raise InputError(f"the model has no task {task!r}; it has {', '.join(self.tasks)}")
        fields = self._fields(inputs)
        if self.trm is not None:
            fields = self.trm(fields)
        flat = fields.flatten(-2)  # (1 or T, N, M * dim)
        logits = self.head(flat[0] if len(flat) == 1 else dict(zip(self.tasks, flat, strict=True)))
        return logits if task is None else logits[task]

    @torch.no_grad()
    def importance(self, batch: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Task -> field -> mean of TRM's weight over the batch; 1 is neutral.

        Raises:
            InputError: when the model has no TRM.
        """
        if self.trm is None:
            raise InputError("importance is the weight that TRM gives; this model was made with trm=False")
        means = self.trm.weights(self._fields(batch)).double().mean(1).tolist()
        return {t: dict(zip(self.schema.fields, mean, strict=True)) for t, mean in zip(self.tasks, means, strict=True)}


def masked_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tasks of the mean binary cross-entropy over the rows whose label is known.

    Args:
        logits: `(N,)`, or `(N, T)` for T tasks.
        targets: the same shape, within [0, 1]; NaN where unknown (a conversion that could not be seen). A task without
            a known label in the batch adds 0.

    Raises:
        InputError: for shapes that differ, an empty batch, targets outside [0, 1].

    >>> round(masked_bce(torch.zeros(3), torch.tensor([1.0, 0.0, float("nan")])).item(), 6)
    0.693147
    """
    if logits.shape != targets.shape or logits.ndim not in (1, 2) or not len(logits):
        given = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise InputError(f"logits and targets take one shape, (N,) or (N, tasks) with N at least 1, got {given}")
    known = ~targets.isnan()
    labels = targets.where(known, 0).to(torch.promote_types(logits.dtype, torch.float32))
    if ((labels < 0) | (labels > 1)).any():
        raise InputError("targets lie within [0, 1], or are NaN where the label is unknown")
    losses = F.binary_cross_entropy_with_logits(logits.to(labels.dtype), labels, reduction="none")
    return (losses.where(known, 0).sum(0) / known.sum(0).clamp_min(1)).sum()


def entire_space(click: Tensor, conversion: Tensor) -> Tensor:
    """Logit of the product of two probabilities, p(click) * p(conversion given click), from their logits.

    With it the conversion label is 0, and known, for every row that was not clicked: train on this logit against
    "clicked and converted" in place of a masked conversion.

    >>> entire_space(torch.tensor(0.0), torch.tensor(0.0)).sigmoid().item()
    0.25
    """
    return -torch.logsumexp(torch.stack([-click, -conversion, -click - conversion]), 0)
