"""The parts of a causal language model that pruning works on, and calibration one block at a time.

The blocks are the elements of the model's largest list of modules (`model.layers`, `transformer.h`, `blocks`), the
matrices the linear layers inside them, as `(out, in)` whichever way they are stored (transformers' `Conv1D` is the
other way round). Embeddings, norms and the head are left alone.

`calibrate` walks through the blocks in order. It keeps the hidden states between two blocks, runs one block on them to
gather `H = (2 / n) X X^T` (or its diagonal) for the inputs X of each linear layer, lets the block be pruned, and runs
it again, so that later blocks see what the pruned ones give.

Cost: two forward passes without the head, tokens * in^2 operations for each H; memory: the model, the hidden states
of the calibration text, and the statistics of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .pruning_journal import Journal, digest
from .pruning_statistics import Gathering, Statistic
from .pruning_text import Batch, evaluating, logits

__all__ = ["Matrix", "blocks_of", "calibrate", "matrices"]


@dataclass(frozen=True)
class Matrix:
    """One prunable weight: its parameter's name, its module, and whether it is stored as `(in, out)`."""

    name: str
    module: nn.Module
    swapped: bool

    @property
    def weight(self) -> Tensor:
        """`(out, in)`, a view of the parameter without its graph: writing to it changes the model."""
        weight = cast(Tensor, self.module.weight).detach()
        return weight.T if self.swapped else weight


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its name.

    Raises:
        InputError: when there is none, or the model is an encoder with a decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(f"a {type(model).__name__} is an encoder with a decoder; give a causal language model")
    outer: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{found}.") for found, _ in outer)
        if isinstance(module, nn.ModuleList) and not inside and any(is_linear(part) for part in module.modules()):
            outer.append((name, module))
    if not outer:
        raise InputError(
            f"a {type(model).__name__} has no ModuleList of blocks with linear layers; give a causal language model"
        )
    return max(outer, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def matrices(model: nn.Module) -> list[Matrix]:
    """Every linear layer inside the blocks, in order.

    Raises:
        InputError: a layer that is tied to another parameter, quantised, LoRA-wrapped, parametrised or without data.
    """
    prefix, blocks = blocks_of(model)
    if len(set(map(id, blocks))) < len(blocks):
        raise InputError(f"blocks of {prefix!r} are one and the same module; tied layers cannot be pruned")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    found: list[Matrix] = []
    for name, module in blocks.named_modules(prefix=prefix):
        _refuse(name, module)
        if is_linear(module):
            weight: Tensor = module.weight  # type: ignore[assignment]
            others = [other for other in owners.get(weight.data_ptr(), []) if other != f"{name}.weight"]
            if others:
                raise InputError(f"{name + '.weight'!r} is tied to {others[0]!r}; give the model separate weights")
            found.append(Matrix(f"{name}.weight", module, not isinstance(module, nn.Linear)))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether it is `nn.Linear` or the `Conv1D` of transformers' GPT-2."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _refuse(name: str, module: nn.Module) -> None:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
        raise InputError(f"{name!r} is LoRA-wrapped ({kind}); merge the adapter first (merge_and_unload)")
    shaped = hasattr(module, "in_features") and hasattr(module, "out_features")
    if not (is_linear(module) or shaped):
        return
    if nn.utils.parametrize.is_parametrized(module):
        raise InputError(f"{name!r} has a parametrised weight; remove the parametrisation first")
    weight: Any = getattr(module, "weight", None)
    plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
    if not plain or weight.element_size() == 1 or kind.startswith("bitsandbytes"):
        dtype = getattr(weight, "dtype", "no tensor")
        raise InputError(f"{name!r} is quantised ({kind}, {dtype}); prune the model before it is quantised")
    if weight.is_meta:
        raise InputError(f"{name!r} has no data (meta device); load the model into memory")


class _Stop(Exception):  # noqa: N818
    pass


@dataclass
class _Stream:
    """What enters the next block: hidden states of each batch, and the other arguments of each batch and block."""

    hidden: list[Tensor] = field(default_factory=list)
    others: list[list[tuple[tuple, dict[str, Any]]]] = field(default_factory=list)

    def run(self, block: nn.Module, number: int, batch: int) -> Tensor:
        args, keywords = self.others[batch][number]
        found = block(self.hidden[batch], *args, **keywords)
        return found[0] if isinstance(found, tuple) else found


def _enter(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> _Stream:
    """The stream before the first block. Blocks pass their input on, so this costs embeddings only; one block runs
    once, to see whether it gives a tensor or a tuple."""
    stream, rest = _Stream(), [()]
    wrapped = None

    def passing(number: int, own: Callable) -> Callable:
        def forward(*args: Any, **keywords: Any) -> Any:
            nonlocal wrapped
            named = not args
            hidden = keywords.pop("hidden_states") if named else args[0]
            if number == 0:
                stream.hidden.append(hidden)
                stream.others.append([])
            stream.others[-1].append((args[1:], keywords))
            if number == len(blocks) - 1:
                raise _Stop
            if wrapped is None:
                given = own(hidden, *args[1:], **keywords)
                wrapped = isinstance(given, tuple)
                rest[0] = given[1:] if wrapped else ()
            return (hidden, *rest[0]) if wrapped else hidden

        return forward

    before = [vars(block).get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.forward = passing(number, block.forward)  # type: ignore[method-assign]
        for batch in batches:
            try:
                logits(model, batch)
            except _Stop:
                continue
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own  # type: ignore[method-assign]
    return stream


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    visit: Callable[[list[Matrix], Statistic], dict[str, Tensor]],
    *,
    diagonal: bool = False,
    put_back: bool = False,
    settings: dict[str, Any],
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Walk through the blocks; prune each on what comes out of the pruned ones before it.

    Args:
        model: pruned in place by `visit`; its mode and hooks are left as they were.
        batches: from `token_batches`.
        visit: called with the layers that share an input and its statistic; changes their weights, and returns what is
            to be kept of each, by name (or nothing).
        diagonal: gather only the diagonal of H.
        put_back: restore a block's weights once its outputs are known.
        settings: what a resumed run must have in common with this one.
        folder: finished blocks are kept there; the same call resumes after them.
        progress: called with (blocks done, blocks).

    Returns:
        What `visit` kept, and the number of dead inputs of each matrix.
    """
    found = matrices(model)
    prefix, blocks = blocks_of(model)
    inside = [[m for m in found if m.name.startswith(f"{prefix}.{number}.")] for number in range(len(blocks))]
    kept: dict[str, Tensor] = {}
    dead: dict[str, int] = {}
    with evaluating(model), torch.no_grad():
        journal = None
        if folder is not None:
            journal = Journal(folder, digest({m.name: m.weight for m in found}, batches, settings))
        stream = _enter(model, list(blocks), batches)
        first = 0
        if journal is not None and (first := journal.state.get("blocks", 0)):
            dead |= journal.state["dead"]
            for number in range(first):
                part = journal.read(f"block-{number:04}")
                kept |= {m.name: part[f"kept/{m.name}"] for m in inside[number] if f"kept/{m.name}" in part}
                for matrix in inside[number]:
                    if not put_back:
                        matrix.weight.copy_(part[f"weight/{matrix.name}"])
            if first < len(blocks):
                part, device = journal.read(f"hidden-{first:04}"), stream.hidden[0].device
                stream.hidden = [part[str(i)].to(device) for i in range(len(batches))]
        for number in range(first, len(blocks)):
            block, here = blocks[number], inside[number]
            with _restored(here if put_back else []):
                kept_here, dead_here = _one(block, number, stream, batches, here, visit, diagonal)
                dead |= dead_here
                if number + 1 < len(blocks):
                    for i in range(len(batches)):
                        stream.hidden[i] = stream.run(block, number, i)
            if journal is not None:
                tensors = {f"kept/{name}": value for name, value in kept_here.items()}
                tensors |= {} if put_back else {f"weight/{m.name}": m.weight for m in here}
                part = journal.write(f"block-{number:04}", tensors)
                kept_here = {name: part[f"kept/{name}"] for name in kept_here}  # the kernel can drop its pages
                if number + 1 < len(blocks):
                    journal.write(f"hidden-{number + 1:04}", {str(i): h for i, h in enumerate(stream.hidden)})
                journal.note(blocks=number + 1, dead=dead)
                journal.drop(f"hidden-{number:04}")
            kept |= kept_here
            if progress is not None:
                progress(number + 1, len(blocks))
    return kept, dead


@contextmanager
def _restored(found: Sequence[Matrix]) -> Iterator[None]:
    before = [m.weight.clone() for m in found]
    try:
        yield
    finally:
        for matrix, weight in zip(found, before, strict=True):
            matrix.weight.copy_(weight)


def _one(
    block: nn.Module, number: int, stream: _Stream, batches: Sequence[Batch], found: list[Matrix],
    visit: Callable[[list[Matrix], Statistic], dict[str, Tensor]], diagonal: bool,
) -> tuple[dict[str, Tensor], dict[str, int]]:  # fmt: skip
    gathering = Gathering(found, diagonal)
    for i, batch in enumerate(batches):
        with gathering.batch(batch["attention_mask"] != 0 if "attention_mask" in batch else None):
            stream.run(block, number, i)
    kept: dict[str, Tensor] = {}
    dead: dict[str, int] = {}
    groups = gathering.result()
    while groups:  # a statistic is dropped as soon as it was used
        group, statistic = groups.pop(0)
        own = statistic.second if diagonal else statistic.second.diagonal()
        dead |= dict.fromkeys((m.name for m in group), int((own == 0).sum()))
        kept |= visit(group, statistic)
    return kept, dead
