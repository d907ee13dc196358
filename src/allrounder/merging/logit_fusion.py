"""Dynamic logit fusion: a large model that nobody fine-tuned follows the fine-tuning of a small one, token by token.

At each position, with logits L of the large model, S of the small base and E_t of small experts, `d_t = E_t - S`,
the next token follows `P~ = softmax(L + sum_t a_t d_t)`. The scales a are chosen afresh so that the large model
moves as far as the small ones did, measured both ways:
`min_a sum_t (KL(P~|P) - KL(Q_t|Q))^2 + (KL(P|P~) - KL(Q|Q_t))^2`, with P, Q, Q_t the softmaxes of L, S, E_t.
A fixed scale of 1 is proxy tuning.

Use it when the large model cannot be trained (memory, access to logits alone) and a small one with the same
vocabulary can. Not when the large model can take an adapter: training it is better and cheaper to serve. Against
proxy tuning expect little (the paper: 1.7 points more on average; this project's study: 1.1 to 1.6 fewer on
sequences), and scales at the bound of 2 when the large model is much surer of itself than the small one.

Cost: a token takes one step of the large model and K + 1 of small ones, whose KV caches are kept; memory is that
of all of them. The search reads about 35 times `(K, N, V)` numbers, in float32 or wider; nothing is trained.

What the search rests on: with `lz(a) = log E_P exp(sum a_t d_t)` the divergences are `E_P~[sum a_t d_t] - lz` and
`lz - E_P[sum a_t d_t]`; for one active expert both grow with a. The objective reaches the experts' targets through
their mean alone: a sum of squares is K times the square of the distance to the mean, plus a constant.

Paper: Fan et al., "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", NeurIPS 2024,
arXiv 2406.15480. Its official repository has no code; the grid, and ties going to the smaller scale and the
earlier expert, are our reading. Departures: the best grid point is refined between its neighbours (`refine=False`
for the grid alone); the paper's equation over all scales at once, which it replaces by one active expert for
speed, is there as `select="joint"`. Fused logits keep the log-sum-exp of the large model's, so that beam search,
which adds up log-probabilities, stays right.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["LogitFusion", "fuse", "fusion_scales"]

ENTRIES = (1 << 26, 1 << 18)  # numbers worked on at a time in the grid search: accelerator, CPU (its cache)
BISECTIONS = 12  # of two grid steps: 0.2 / 2^12 with the defaults
ITERATIONS = 20  # of the joint solve
TIE = 1e-6  # objectives this near, as a share of the targets' squares, are equal

Select = Literal["one", "joint"]


def _listed(experts: Any) -> list[Any]:
    if isinstance(experts, Mapping):
        return list(experts.values())
    return list(experts) if isinstance(experts, Sequence) else [experts]


def _aligned(large: Tensor, base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of large model and small base `(R, V)`, shifts `(K, R, V)`, banned tokens `(R, V)`."""
    if not experts:
        raise InputError("logit fusion needs the logits of one small expert or more, got none")
    dtype = torch.float32
    named = {"large model": large, "small base": base} | {f"expert {i}": value for i, value in enumerate(experts)}
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim == 0:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the logits of the {name} are a floating tensor (..., vocabulary), got {got}")
        if value.shape[-1] != large.shape[-1]:
            raise InputError(
                f"the {name} has {value.shape[-1]} logits and the large model {large.shape[-1]}: logit fusion needs "
                "one vocabulary, so take models of one tokenizer, or cut rows that this tokenizer never uses"
            )
        if value.shape != large.shape:
            have, want = tuple(value.shape), tuple(large.shape)
            raise InputError(f"the logits of the {name} are {have} and the large model's {want}; give equal shapes")
        dtype = torch.promote_types(dtype, value.dtype)
    flat = torch.stack([value.to(large.device, dtype).reshape(-1, large.shape[-1]) for value in named.values()])
    sound = (flat.amax(-1) < math.inf).all(-1)  # false for NaN too
    if not sound.all():
        name = list(named)[int(sound.int().argmin())]
        raise InputError(f"the logits of the {name} hold NaN or +inf; only -inf (a banned token) can be fused")
    banned = (flat == -math.inf).any(0)
    if banned.all(-1).any():
        raise InputError("a row has no token left: each has a logit of -inf in one of the models")
    flat.masked_fill_(banned, -math.inf)
    log_p, log_q = flat[:2].log_softmax(-1)
    return log_p, log_q, _centred(log_p, (flat[2:] - flat[1]).masked_fill_(banned, 0.0)), banned


def _centred(log_p: Tensor, shifts: Tensor) -> Tensor:
    """Shifts with mean 0 under P: a constant changes no distribution, and without it nothing cancels in float32."""
    return shifts - torch.einsum("rv,krv->kr", log_p.exp(), shifts).unsqueeze(-1)


def _along(log_p: Tensor, shift: Tensor, scales: Tensor) -> Tensor:
    """Both divergences at `(n, R)` scales of one centred shift `(R, V)`: `(2, n, R)`."""
    moved = log_p + scales.unsqueeze(-1) * shift  # (n, R, V)
    top = moved.amax(-1, keepdim=True)
    total = moved.sub_(top).exp_().sum(-1)
    log_z = total.log() + top.squeeze(-1)
    mean = torch.linalg.vecdot(moved, shift) / total
    return torch.stack([scales * mean - log_z, log_z])


def _measure(log_p: Tensor, shifts: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both divergences `(2, R)` at scales `(R, K)` of centred shifts `(K, R, V)`, and their derivatives `(2, R, K)`."""
    shift = torch.einsum("rk,krv->rv", scales, shifts)
    moved = log_p + shift
    log_z = moved.logsumexp(-1)
    p = moved.sub_(log_z.unsqueeze(-1)).exp_()
    mean = torch.einsum("rv,krv->rk", p, shifts)
    total = (scales * mean).sum(-1)
    spread = torch.einsum("rv,krv->rk", p * (shift - total.unsqueeze(-1)), shifts)
    return torch.stack([total - log_z, log_z]), torch.stack([spread, mean])


def _cost(log_p: Tensor, shifts: Tensor, scales: Tensor, target: Tensor) -> Tensor:
    return (_measure(log_p, shifts, scales)[0] - target).square().sum(0)


def _single(log_p: Tensor, shift: Tensor, target: Tensor, bound: Tensor, points: int, refine: bool) -> Tensor:
    """The best scale `(R, 1)` in `[0, bound]` of one shift `(1, R, V)` for divergences `(2, R)`."""
    fractions = torch.linspace(0, 1, points, dtype=log_p.dtype, device=log_p.device)
    size = max(1, ENTRIES[log_p.device.type == "cpu"] // max(1, log_p.numel()))
    tried = (fractions * bound).unsqueeze(-1).expand(-1, len(log_p)).split(size)
    found = torch.cat([_along(log_p, shift[0], part) for part in tried], 1)
    best = (found - target.unsqueeze(1)).square().sum(0).argmin(0)  # the first of equals: the smallest scale
    scale = (fractions[best] * bound).unsqueeze(-1)
    if not refine:
        return scale
    step = bound / (points - 1)
    low, high = (scale - step).clamp(min=0), torch.minimum(scale + step, bound)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found, slope = _measure(log_p, shift, middle)
        rising = ((found - target).unsqueeze(-1) * slope).sum(0) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    middle = (low + high) / 2
    finer = _cost(log_p, shift, middle, target) < _cost(log_p, shift, scale, target)
    return torch.where(finer.unsqueeze(-1), middle, scale)


def _joint(log_p: Tensor, shifts: Tensor, target: Tensor, bound: Tensor, scales: Tensor) -> Tensor:
    """Damped Gauss-Newton in the box from scales `(R, K)`: two residuals, so a step solves 2 x 2 systems."""
    damping = torch.full_like(target[0], 1e-2)
    identity = torch.eye(2, dtype=log_p.dtype, device=log_p.device)
    for _ in range(ITERATIONS):
        found, slopes = _measure(log_p, shifts, scales)
        residual = (found - target).T.unsqueeze(-1)  # (R, 2, 1)
        jacobian = slopes.transpose(0, 1)  # (R, 2, K)
        uphill = (jacobian.mT @ residual).squeeze(-1)
        stuck = ((scales <= 0) & (uphill > 0)) | ((scales >= bound) & (uphill < 0))
        jacobian = jacobian.masked_fill(stuck.unsqueeze(1), 0.0)
        gram = jacobian @ jacobian.mT
        level = gram.diagonal(dim1=1, dim2=2).sum(-1) * damping + 1e-12
        step = jacobian.mT @ torch.linalg.solve_ex(gram + level.view(-1, 1, 1) * identity, residual).result
        proposed = torch.minimum((scales - step.squeeze(-1).nan_to_num()).clamp(min=0), bound)
        better = _cost(log_p, shifts, proposed, target) < residual.square().sum((1, 2))
        scales = torch.where(better.unsqueeze(-1), proposed, scales)
        damping = torch.where(better, damping / 4, damping * 4).clamp(1e-4, 1e6)  # float32 is noise below
    return scales


def _per_expert(name: str, value: Any, shape: Sequence[int], like: Tensor) -> Tensor:
    """One number, or one for each expert (and row), as a tensor of the shape."""
    numbers = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if not torch.isfinite(numbers).all() or (name == "bound" and not (numbers > 0).all()):
        raise InputError(f"{name} is finite{' and above 0' if name == 'bound' else ''}, got {value!r}")
    try:
        return numbers.expand(*shape)
    except RuntimeError:
        have = tuple(numbers.shape)
        raise InputError(f"{name} is one number or one for each of the {shape[-1]} experts, got {have}") from None


@torch.no_grad()
def fusion_scales(
    large: Tensor,
    small_base: Tensor,
    small_experts: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    select: Select = "one",
    bound: float | Sequence[float] = 2.0,
    points: int = 21,
    refine: bool = True,
) -> Tensor:
    """The scale of each expert at which the large model moves as far as the small ones did, row by row.

    Args:
        large: logits of the large model `(..., V)`, before temperature and sampling filters. A token with -inf
            in any of the tensors is out of the running in all.
        small_base: logits of the small base model, `(..., V)`.
        small_experts: logits of one or several fine-tuned copies of it, `(..., V)` each.
        select: `one`, at each row the single expert with the best objective, the others 0 (what the paper runs);
            `joint`, all at once: local solves from all at a common scale (kept among equals) and from each alone.
        bound: largest scale, for all experts or for each; default the paper's 2.
        points: grid points from 0 to the bound; default 21, steps of 0.1.
        refine: search on between the neighbours of the best point.

    Returns:
        Scales `(..., K)`, in float32 or wider.

    Raises:
        InputError: other vocabularies or shapes, NaN or +inf, a row without any token left, a wrong option.

    >>> large, base, expert = (torch.tensor(x) for x in ([2.0, 1, 0, -1], [1.0, 1, 0, 0], [0.0, 3, 0, 0]))
    >>> round(fusion_scales(large, base, expert).item(), 3)
    0.868
    """
    if select not in ("one", "joint"):
        raise InputError(f"select is 'one' (one active expert per row) or 'joint' (all at once), got {select!r}")
    if points < 2:
        raise InputError(f"points are the scales tried from 0 to the bound, 2 or more, got {points}")
    experts = _listed(small_experts)
    log_p, log_q, shifts, _ = _aligned(large, small_base, experts)
    limits = _per_expert("bound", bound, (len(experts),), log_p)
    one = torch.ones_like(log_p[:, :1])
    target = torch.stack([_measure(log_q, d.unsqueeze(0), one)[0] for d in _centred(log_q, shifts)]).mean(0)  # (2, R)
    candidates = []
    if select == "joint" and len(experts) > 1:
        common = _single(log_p, shifts.sum(0, keepdim=True), target, limits.min(), points, refine)
        candidates.append(common.expand(-1, len(experts)))
    for i, limit in enumerate(limits):
        scale = _single(log_p, shifts[i : i + 1], target, limit, points, refine)
        candidates.append(nn.functional.pad(scale, (i, len(experts) - 1 - i)))
    if select == "joint":
        candidates = [_joint(log_p, shifts, target, limits, start) for start in candidates]
    costs = torch.stack([_cost(log_p, shifts, scales, target) for scales in candidates])
    # Several joint solutions may reach the targets: rounding must not choose among them, so the first of equals.
    best = (costs <= costs.amin(0) + TIE * target.square().sum(0)).int().argmax(0)
    scales = torch.stack(candidates)[best, torch.arange(len(best), device=best.device)]
    return scales.reshape(*large.shape[:-1], len(experts))


@torch.no_grad()
def fuse(
    large: Tensor,
    small_base: Tensor,
    small_experts: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    scale: float | Sequence[float] | Tensor | None = None,
    **search: Any,
) -> Tensor:
    """Logits of the large model moved by the small experts' shifts: `large + sum_t scale_t (expert_t - base)`.

    Args:
        large, small_base, small_experts: as `fusion_scales` takes them.
        scale: None, searched for; or fixed: a number for all experts, one for each, or `(..., K)` as
            `fusion_scales` gives them. One expert at 1 is proxy tuning.
        search: options of `fusion_scales`.

    Returns:
        `(..., V)` in the type of `large`, with its log-sum-exp over the tokens in the running: log-probabilities
        in, log-probabilities out. A scale of 0 gives `large` itself.

    Raises:
        InputError: as `fusion_scales`, or a scale that does not fit, is not finite, or comes with `search`.

    >>> large, base, expert = (torch.tensor(x) for x in ([2.0, 1, 0, -1], [1.0, 1, 0, 0], [0.0, 3, 0, 0]))
    >>> round(fuse(large, base, expert).softmax(-1)[1].item(), 3)
    0.775
    """
    if scale is not None and search:
        raise InputError(f"the scale is fixed, so nothing is searched for: leave out {', '.join(search)}")
    experts = _listed(small_experts)
    if scale is None:
        scale = fusion_scales(large, small_base, experts, **search)
    log_p, _, shifts, banned = _aligned(large, small_base, experts)
    scales = _per_expert("scale", scale, (*large.shape[:-1], len(experts)), log_p).reshape(-1, len(experts))
    shift = torch.einsum("rk,krv->rv", scales, shifts)
    log_z = (log_p + shift).logsumexp(-1, keepdim=True)
    shift = (shift - log_z).masked_fill_((scales == 0).all(-1, keepdim=True), 0.0)
    moved = large.to(log_p.dtype).reshape(log_p.shape) + shift
    return moved.masked_fill_(banned, -math.inf).to(large.dtype).reshape(large.shape)


class _Small:
    """One small model, and its KV cache where it is a transformers model."""

    def __init__(self, model: Callable[..., Any], name: str) -> None:
        if not callable(model):
            raise InputError(f"the {name} is a causal language model or a callable, got {type(model).__name__}")
        self.model, self.cache = model, None
        self.cached = hasattr(model, "generate") and hasattr(model, "config")
        if self.cached and getattr(model.config, "is_encoder_decoder", False):  # type: ignore[attr-defined]
            raise InputError(f"the {name} is an encoder-decoder; logit fusion takes decoder-only language models")
        self.known: set[str] = set()
        self.device = None
        if isinstance(model, nn.Module):
            model.eval()
            self.known = set(inspect.signature(model.forward).parameters)
            self.device = next((value.device for value in model.parameters()), None)

    def __call__(self, ids: Tensor, mask: Tensor | None, start: int, order: Tensor | None) -> Tensor:
        """Logits of the next token `(N, V)`; the cache holds the first `start` tokens, rows to be put in `order`."""
        ids = ids.to(self.device or ids.device)
        if not self.cached:
            outputs = self.model(ids)
        else:
            if self.cache is not None and order is not None:
                self.cache.reorder_cache(order.to(ids.device))  # type: ignore[attr-defined]
            given: dict[str, Any] = {"use_cache": True, "return_dict": True}
            if self.cache is None:
                start = 0
            else:
                given[self.key] = self.cache
            if mask is not None:
                # Without positions of their own, models count from the left edge, padding included.
                given["attention_mask"] = mask.long().to(ids.device)
                if not self.known.isdisjoint({"position_ids", "kwargs"}):
                    given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, start:]
            if "logits_to_keep" in self.known:
                given["logits_to_keep"] = 1
            outputs = self.model(input_ids=ids[:, start:], **given)
            # transformers renamed its cache; a model that gives none is run over the whole prefix each time.
            self.key = next((name for name in ("cache", "past_key_values") if name in outputs), "")
            self.cache = outputs[self.key] if self.key else None
        logits = getattr(outputs, "logits", outputs)
        if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or len(logits) != len(ids):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"a small model gives logits (N, T, V) or (N, V) for {len(ids)} rows, got {got}")
        return logits[:, -1] if logits.ndim == 3 else logits


class LogitFusion:
    """A logits processor: `large.generate(..., logits_processor=[LogitFusion(small_base, small_expert)])`.

    Args:
        small_base: a decoder-only transformers model with the large model's tokeniser, whose KV cache is kept
            from step to step; or any callable from token ids `(N, T)` to logits `(N, T, V)` or `(N, V)`, called
            on the whole prefix each time. Modules are put into evaluation mode.
        small_experts: one or several fine-tuned copies of it (a sequence or a mapping), of either kind.
        scale: None, searched for at each token and row; or fixed, one number or one for each expert.
        pad_token_id: this token, leading a row, is padding. Give it when prompts are padded on the left.
        attention_mask: instead, the mask `(N, T)` of the prompts, for tokenisers whose padding may also start a
            text. A fusion with a mask serves those prompts alone.
        search: options of `fusion_scales`.

    Attributes:
        history: the scales `(N, K)` of each step since the last prompt.

    Callables are given padded ids as they are. Prompts are told apart by their ids: ids that lengthen those of
    the step before, in any order of rows (beams), go on with the caches, all others start anew. `reset()` frees
    the caches. Other processors that ban tokens may stand before or after; temperature, top-k and top-p belong
    after, where `generate` puts them.

    Raises:
        InputError: a model that is not callable or has an encoder, a wrong option, a mask that does not fit; in
            use, all that `fuse` refuses.
    """

    def __init__(
        self,
        small_base: Callable[..., Any],
        small_experts: Callable[..., Any] | Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]],
        *,
        scale: float | Sequence[float] | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        **search: Any,
    ) -> None:
        experts = _listed(small_experts)
        if pad_token_id is not None and attention_mask is not None:
            raise InputError("give pad_token_id or attention_mask, not both")
        fuse(torch.zeros(2), torch.zeros(2), [torch.zeros(2)] * len(experts), scale=scale, **search)  # checks options
        self.small = [_Small(small_base, "small base")]
        self.small += [_Small(model, f"expert {i}") for i, model in enumerate(experts)]
        self.scale, self.pad_token_id, self.attention_mask, self.search = scale, pad_token_id, attention_mask, search
        self.reset()

    def reset(self) -> None:
        """Forget the prompt and free the caches."""
        self.history: list[Tensor] = []
        self._seen: Tensor | None = None
        for model in self.small:
            model.cache = None

    def _mask(self, ids: Tensor) -> Tensor | None:
        """True at tokens, False at padding, `(N, T)`; None without padding."""
        if self.attention_mask is not None:
            mask = self.attention_mask.to(ids.device).bool()
            if mask.ndim != 2 or len(ids) % len(mask) or mask.shape[1] > ids.shape[1]:
                raise InputError(f"attention_mask is {tuple(mask.shape)} and does not fit ids {tuple(ids.shape)}")
            mask = mask.repeat_interleave(len(ids) // len(mask), 0)  # beams of one prompt stand together
            mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=True)
        elif self.pad_token_id is not None:
            mask = (ids != self.pad_token_id).cumsum(1) > 0
            mask[:, -1] = True
        else:
            return None
        return None if mask.all() else mask

    def _follow(self, seen: Tensor | None, ids: Tensor) -> tuple[int, Tensor | None]:
        """How many tokens the caches hold already, and which of their rows each row continues (None: its own)."""
        if seen is None or ids.shape[1] <= seen.shape[1]:
            return 0, None
        length = seen.shape[1]
        if torch.equal(ids[:, :length], seen):
            return length, None
        labels = torch.unique(torch.cat([seen, ids[:, :length]]), dim=0, return_inverse=True)[1]
        same = labels[len(seen) :, None] == labels[None, : len(seen)]
        if not same.any(1).all():
            return 0, None
        return length, same.int().argmax(1)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Fused scores `(N, V)` for ids `(N, T)` and the large model's scores `(N, V)`, as `fuse` gives them."""
        mask = self._mask(input_ids)
        seen = input_ids if mask is None else input_ids.masked_fill(~mask, -1)
        start, order = self._follow(self._seen, seen)
        if start == 0:
            self.reset()
        self._seen = None  # until all is done: after an error nothing is known about the caches
        base, *experts = [model(input_ids, mask, start, order).to(scores.device) for model in self.small]
        if self.scale is None:
            scales = fusion_scales(scores, base, experts, **self.search)
        else:
            scales = _per_expert("scale", self.scale, (len(scores), len(experts)), scores)
        fused = fuse(scores, base, experts, scale=scales)
        if start == 0:
            _warn(base, experts)
        self.history.append(scales)
        self._seen = seen.clone()  # callers may go on writing into their ids
        return fused


def _warn(base: Tensor, experts: Sequence[Tensor]) -> None:
    log_q = base.float().log_softmax(-1)
    for i, expert in enumerate(experts):
        log_e = expert.float().log_softmax(-1)
        move = (log_e.exp() * (log_e - log_q)).nansum(-1).mean().item()
        if move > math.log(base.shape[-1]):
            warnings.warn(
                f"KL(expert {i} | small base) is {move:.1f} nats: a uniform guess tells more about this expert than "
                "the base does; is it a fine-tuned copy of this base, with the same prompt template?",
                stacklevel=3,
            )
