"""Reads, while a model trains, the numbers that go wrong before the loss does.

    with StabilityProbes(model, optimiser, every=20) as probes:
        train()                      # your own loop, unchanged
    probes.records, probes.summary()

Per layer: the largest |attention logit| and the attention entropy, RMS of a block's input and output. Per tensor:
RMS of gradient, update and weight. Of the model's output: mean log Z (logsumexp over classes) and the largest logit.

Attention logits are taken where they are made: calls of `scaled_dot_product_attention`, and of `softmax` inside a
module whose name or class has "att" in it, are seen while the model runs forward. That covers `nets.CausalTransformer`
and the models of `transformers` (sdpa and eager), `timm` and others as they are; it does not see fused kernels of
other packages (flash-attn), `nn.MultiheadAttention`, or inside a compiled model: probe the model that was compiled.
A fused kernel never holds its score matrix, so the logits of `rows` query rows are computed again: the largest of them
is a lower bound of the largest of all, exact for sequences up to `rows`.

Nothing is hooked between the steps that are read. A step that is read costs about rows / T of attention, and one copy
of the trained weights in memory and time.

Which quantities: Small-scale proxies for large-scale Transformer training instabilities (2023, arXiv 2309.14322).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import InputError

__all__ = ["StabilityProbes"]

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
OUTPUT_ROWS = 1024  # rows of the output that log Z is averaged over: with a large vocabulary it would be a second loss


class StabilityProbes:
    """Probes of one training run, to be entered around its loop.

    Args:
        model: what trains. Forward passes without gradients (validation) are not read.
        optimiser: its steps are the clock. Gradients are read as it gets them: after clipping, if you clip.
        every: steps from one reading to the next; the first step is read.
        rows: query rows of each attention matrix that are read, evenly spaced.

    Attributes:
        records: one dict for each reading: `step` (from 0), `attention_logit` and `attention_entropy` (layer -> value,
            nats), `activation` (`layer.in` and `layer.out` -> RMS), `gradient`, `update`, `weight` (tensor -> RMS),
            `log_z`, `output_logit` (where the model returns logits, or an object with `logits`).

    Raises:
        InputError: `every` or `rows` under 1, or a model that the optimiser does not train.
    """

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer, *, every: int = 10, rows: int = 64) -> None:
        if every < 1 or rows < 1:
            raise InputError(f"every and rows are at least 1, got {every} and {rows}")
        stepped = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
        self._trained = {name: value for name, value in model.named_parameters() if id(value) in stepped}
        if not self._trained:
            raise InputError("the optimiser trains no parameter of the model; give the optimiser of this model")
        self.records: list[dict[str, Any]] = []
        self._model, self._optimiser, self._every, self._rows = model, optimiser, every, rows
        self._step = 0
        self._clock: list[Any] = []
        self._reading: _Reading | None = None
        self._before: dict[str, Tensor] = {}

    def __enter__(self) -> StabilityProbes:
        self._clock = [
            self._optimiser.register_step_pre_hook(self._before_step),
            self._optimiser.register_step_post_hook(self._after_step),
        ]
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._clock:
            handle.remove()
        if self._reading is not None:
            self._reading.remove()
        self._reading = None

    def summary(self) -> dict[str, float]:
        """What `stability_report` asks of a run.

        Returns:
            `max_attention_logit`, `max_output_logit`: the largest of the run. Means over the last tenth of the
            readings: `attention_entropy` of the layer with the least, `log_z`, `activation_rms` of the block with the
            most, `gradient_rms` and `update_rms` of the matrix with the least, `weight_rms` of the one with the most.
            Left out: what the model does not have.

        Raises:
            InputError: when nothing was read.
        """
        if not self.records:
            raise InputError("the probes read no step; enter them around the training loop")
        late = self.records[-max(1, len(self.records) // 10) :]
        matrices = {name for name, value in self._trained.items() if value.ndim > 1}
        found = {
            "max_attention_logit": _worst(max, self.records, "attention_logit"),
            "max_output_logit": _worst(max, self.records, "output_logit"),
        }
        for name, key, pick in (
            ("attention_entropy", "attention_entropy", min), ("log_z", "log_z", max),
            ("activation_rms", "activation", max), ("gradient_rms", "gradient", min), ("update_rms", "update", min),
            ("weight_rms", "weight", max),
        ):  # fmt: skip
            only = matrices if key in ("gradient", "update", "weight") else None
            values = [value for record in late if (value := _worst(pick, [record], key, only)) is not None]
            found[name] = fmean(values) if values else None
        return {name: value for name, value in found.items() if value is not None}

    def _begin(self) -> None:
        self._reading = None if self._step % self._every else _Reading(self._model, self._rows)

    @torch.no_grad()
    def _before_step(self, *_: object) -> None:
        if self._reading is not None:
            self._before = {name: value.clone() for name, value in self._trained.items() if value.grad is not None}
            for name in self._before:
                self._reading.note("gradient", name, _rms(self._trained[name].grad))

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        if self._reading is not None:
            for name, value in self._before.items():
                self._reading.note("update", name, _rms(self._trained[name].float() - value.float()))
                self._reading.note("weight", name, _rms(value))
            self.records.append({"step": self._step} | self._reading.remove())
            self._before = {}
        self._step += 1
        self._begin()


class _Reading(TorchFunctionMode):
    """The hooks of one step: a mode that sees attention while the model runs forward, and what was noted."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.noted: dict[tuple[str, str], list[Tensor]] = {}
        self.inside: list[str] = []  # names of the modules that are running, the innermost last
        self.handles: list[Any] = []
        self.running = False
        blocks = set(_blocks(model))
        for name, module in model.named_modules():
            if next(module.parameters(), None) is None and name not in blocks and module is not model:
                continue  # what has no weights takes the name of what it is a part of
            self.handles += [
                module.register_forward_pre_hook(self._enter(name, name in blocks, module is model), with_kwargs=True),
                module.register_forward_hook(self._leave(name, name in blocks, module is model), always_call=True),
            ]

    def note(self, quantity: str, name: str, value: Tensor | None) -> None:
        if value is not None:
            self.noted.setdefault((quantity, name), []).append(value)

    def remove(self) -> dict[str, Any]:
        """Takes the hooks off, and brings what was noted to the host in one transfer."""
        for handle in self.handles:
            handle.remove()
        self._stop()
        merged: list[Tensor] = []
        for (quantity, _), values in self.noted.items():  # several values: gradients accumulated over several passes
            together = torch.stack([value.to(values[0].device) for value in values])
            merged.append(together.amax() if quantity.endswith("_logit") else together.mean())
        numbers = torch.stack([value.to(merged[0].device) for value in merged]).tolist() if merged else []
        record: dict[str, Any] = {}
        for (quantity, name), value in zip(self.noted, numbers, strict=True):
            if name:
                record.setdefault(quantity, {})[name] = value
            else:
                record[quantity] = value
        return record

    def _stop(self) -> None:
        if self.running:
            self.running = False
            self.__exit__(None, None, None)

    def _enter(self, name: str, block: bool, root: bool) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if root and torch.is_grad_enabled():
                self._stop()  # an interrupted pass
                self.inside.clear()
                self.running = True
                self.__enter__()
            if self.running:
                self.inside.append(f"{name} {type(module).__name__}")
                first = next((v for v in (*inputs, *named.values()) if isinstance(v, Tensor)), None)
                if block and first is not None and first.is_floating_point():
                    self.note("activation", f"{name}.in", _rms(first))

        return hook

    def _leave(self, name: str, block: bool, root: bool) -> Any:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not self.running:
                return
            self.inside.pop()
            first = output[0] if isinstance(output, tuple) and output else output
            if block and isinstance(first, Tensor) and first.is_floating_point():
                self.note("activation", f"{name}.out", _rms(first))
            if root:
                self._stop()
                self._outputs(getattr(output, "logits", output))

        return hook

    @torch.no_grad()
    def _outputs(self, logits: object) -> None:
        if isinstance(logits, Tensor) and logits.ndim > 1 and logits.is_floating_point() and logits.numel():
            flat = logits.detach().flatten(0, -2)
            self.note("output_logit", "", flat.amax().float())
            self.note("log_z", "", flat[:: -(-len(flat) // OUTPUT_ROWS)].float().logsumexp(-1).mean())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._attention(_scores(self.rows, *args, **kwargs))
        elif func in SOFTMAX and self.inside and "att" in self.inside[-1].lower():
            scores = args[0] if args else kwargs["input"]
            if scores.ndim > 2:
                self._attention(_unmasked(scores.detach()[..., _spaced(scores.shape[-2], self.rows), :]).float())
        return func(*args, **kwargs)

    @torch.no_grad()
    def _attention(self, logits: Tensor) -> None:
        """Notes of `(..., rows, keys)`, -inf where a key is masked."""
        name = self.inside[-1].split(" ")[0] or "model"
        self.note("attention_logit", name, logits.masked_fill(logits == -torch.inf, 0).abs().amax())
        chances = logits.softmax(-1).nan_to_num()  # rows that see no key at all
        self.note("attention_entropy", name, -torch.special.xlogy(chances, chances).sum(-1).mean())


@torch.no_grad()
def _scores(
    rows: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Logits of some query rows `(..., rows, keys)` in float32, with the arguments of the fused function."""
    length, keys = query.shape[-2], key.shape[-2]
    chosen = _spaced(length, rows).to(query.device)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query[..., chosen, :].float() @ key.float().transpose(-2, -1)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.arange(keys, device=query.device) > chosen[:, None], -torch.inf)
    if attn_mask is not None:
        mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., chosen, :]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + _unmasked(mask).float()
    return logits


def _unmasked(logits: Tensor) -> Tensor:
    """-inf in place of the large negative numbers that stand for it."""
    return logits.masked_fill(logits <= max(torch.finfo(logits.dtype).min / 2, -1e8), -torch.inf)


def _spaced(length: int, count: int) -> Tensor:
    """At most `count` evenly spaced positions, the last one among them: it sees the most keys."""
    return length - 1 - torch.arange(0, length, -(-length // count)).flip(0)


def _blocks(model: nn.Module) -> Iterator[str]:
    """Names of the blocks: the members of the longest module list, or the model's own parts if it has none."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    prefix, longest = max(lists, key=lambda pair: len(pair[1]), default=("", model))
    for name, _ in longest.named_children():
        yield f"{prefix}.{name}".lstrip(".")


def _rms(value: Tensor | None) -> Tensor | None:
    if value is None or value.layout != torch.strided or not value.numel():
        return None
    return torch.linalg.vector_norm(value.detach(), dtype=torch.float32) / value.numel() ** 0.5


def _worst(pick: Any, records: list[dict[str, Any]], key: str, only: set[str] | None = None) -> float | None:
    """Largest or smallest over layers and records; not a number if one of them is."""
    values: list[float] = []
    for record in records:
        found = record.get(key)
        named = found if isinstance(found, dict) else {} if found is None else {"": found}
        values += [value for name, value in named.items() if only is None or name in only]
    if not values:
        return None
    return pick(values) if all(map(isfinite, values)) else float("nan")
