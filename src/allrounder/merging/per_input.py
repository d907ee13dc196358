"""Weights of its own for every input of a batch: `theta_i = theta + sum_k w_ik e_k`, with parts of low rank or whole.

`Parts` holds the K parts of each tensor and runs a module with them, in the fastest of three ways that is right:

- *layered*: linear, convolution, embedding and normalisation layers add their parts to the activations,
  `y_i = W x_i + sum_k w_ik U_k V_k x_i`. One pass for the batch, no merged weights, `K r (m + n)` more
  multiply-adds per token. Needs every part to be in such a layer and inputs along its first dimension.
- *mapped*: the same inside `torch.vmap` over inputs; what is in other modules is merged for each input.
- *merged*: one merge and one pass for each distinct mixture; the fastest when few mixtures are shared by many
  inputs, and the one that any module can do.

A way is used once its first batch agrees with *merged*, at its first and last input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import InputError
from ..nets.calling import at
from .evidence import double

__all__ = ["Part", "Parts", "compressed"]

PER_MERGE = 8  # inputs that must share a mixture for its merge to be worth its while
MAPPED = 1 << 26  # numbers of merged weights that are made at a time
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Arguments = Callable[[Any], tuple[tuple, dict[str, Any]]]


def _fit(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Values `(N, c)`, shaped to lie along dimension 0 and `dim` (from the end) of `like`; one row fits any layout."""
    if len(values) == 1:
        return values.reshape(-1, *[1] * (-dim - 1))
    if like.ndim + dim < 1:
        raise RuntimeError(f"{tuple(like.shape)} has no dimension for {len(values)} inputs")
    return values.reshape(len(values), *[1] * (like.ndim + dim - 1), -1, *[1] * (-dim - 1))


def compressed(deltas: Tensor, *, rank: int | None, ratio: float) -> dict[str, Tensor]:
    """K differences of one tensor, each cut to its best approximation of some rank (truncated SVD).

    Args:
        deltas: `(K, *shape)`. Sides of size 1 do not count; with two or more others, the first against the
            rest makes the matrix `(m, n)`. Vectors stay whole.
        rank: of the approximation; `None` for `ratio * min(m, n)`, rounded down, at least 1 unless `ratio` is 0.

    Returns:
        `left` `(m, K r)` and `right` `(K r, n)`; `whole`, the deltas, where factors would not be smaller; nothing
        at rank 0.
    """
    sizes = [size for size in deltas.shape[1:] if size > 1]
    if len(sizes) < 2:
        return {"whole": deltas}
    m, n = sizes[0], prod(sizes[1:])
    kept = min(rank, m, n) if rank is not None else int(ratio * min(m, n) + 1e-9) or int(ratio > 0)
    if kept == 0:
        return {}
    if kept * (m + n) >= m * n:
        return {"whole": deltas}
    left, right = [], []
    for delta in deltas.reshape(-1, m, n):
        exact = double(delta)
        # projecting onto leading eigenvectors is the truncated SVD, without division by singular values
        basis = torch.linalg.eigh(exact @ exact.T if m <= n else exact.T @ exact).eigenvectors[:, -kept:]
        left.append((basis if m <= n else exact @ basis).to(delta))
        right.append((basis.T @ exact if m <= n else basis.T).to(delta))
    return {"left": torch.cat(left, 1).contiguous(), "right": torch.cat(right, 0).contiguous()}


class Part(nn.Module):
    """The K parts of one tensor of some shape: `whole` `(K, *shape)`, or `left` `(m, K r)` and `right` `(K r, n)`."""

    whole: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @property
    def low_rank(self) -> bool:
        return "left" in self._buffers

    def _spread(self, mixture: Tensor) -> Tensor:
        """`(N, K)`, repeated for the columns of the factors: `(N, K r)`."""
        return mixture.to(self.left).repeat_interleave(self.left.shape[1] // mixture.shape[1], 1)

    def dense(self, mixture: Tensor) -> Tensor:
        """`sum_k w_ik e_k` for mixtures `(N, K)`: `(N, *shape)`."""
        if self.low_rank:
            mixed = (self.left * self._spread(mixture).unsqueeze(1)) @ self.right
        else:
            mixed = mixture.to(self.whole) @ self.whole.flatten(1)
        return mixed.reshape(len(mixture), *self.shape)

    def answer(self, mixture: Tensor, run: Callable[[Tensor], Tensor], channel: int, transposed: bool) -> Tensor:
        """What a layer answers whose weights are the mixed parts.

        Args:
            mixture: `(N, K)`.
            run: the layer with other weights: `(rows, n)` -> answer with `rows` channels.
            channel: the dimension of channels, from the end.
            transposed: the layer's weights are stored as `(n, m)`.
        """
        if self.low_rank:
            first, last = (self.left.T, self.right.T) if transposed else (self.right, self.left)
            hidden = run(first).movedim(channel, -1)
            hidden = F.linear(hidden * _fit(self._spread(mixture), hidden, -1), last)
        else:
            whole = self.whole.transpose(1, 2) if transposed else self.whole.flatten(2)
            hidden = run(whole.flatten(0, 1)).movedim(channel, -1).unflatten(-1, (mixture.shape[1], -1))
            hidden = (hidden * _fit(mixture.to(whole), hidden, -2)).sum(-2)
        return hidden.movedim(-1, channel)

    def rows(self, mixture: Tensor, index: Tensor) -> Tensor:
        """Rows of the mixed parts: `(*index, n)`."""
        if self.low_rank:
            hidden = F.embedding(index, self.left)
            return (hidden * _fit(self._spread(mixture), hidden, -1)) @ self.right
        hidden = self.whole[:, index].movedim(0, -2)
        return (hidden * _fit(mixture.to(self.whole), hidden, -2)).sum(-2)


def _conv1d(layer: nn.Module) -> bool:
    """transformers' linear layer with a transposed weight (GPT-2)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers")


def _mixes(layer: Any, weight: Part | None) -> bool:
    """Whether the layer can add its parts to activations. A subclass may compute something else, so none counts."""
    if type(layer) in CONVOLUTIONS:
        return layer.groups == 1 and (weight is None or not weight.low_rank or len(weight.left) == layer.out_channels)
    if type(layer) is nn.Embedding:
        return layer.max_norm is None
    return (
        type(layer) is nn.Linear
        or _conv1d(layer)
        or (type(layer) in NORMS and getattr(layer, "running_mean", 0) is not None)
    )


def _add(parts: dict[str, Part], mixture: Tensor, layer: Any, arguments: tuple, output: Tensor) -> Tensor:
    """Forward hook: the layer's answer with each input's own weights."""
    (x,) = arguments
    if isinstance(layer, NORMS):
        return _normalised(parts, mixture, layer, x).to(output.dtype)
    convolution = isinstance(layer, CONVOLUTIONS)
    channel = -1 - (len(layer.kernel_size) if convolution else 0)
    weight, bias = parts.get("weight"), parts.get("bias")
    if weight is not None and isinstance(layer, nn.Embedding):
        output = output + weight.rows(mixture, x)
    elif weight is not None:

        def run(rows: Tensor) -> Tensor:
            if convolution:
                return layer._conv_forward(x, rows.unflatten(1, layer.weight.shape[1:]), None)
            return F.linear(x, rows)

        output = output + weight.answer(mixture, run, channel, _conv1d(layer))
    return output if bias is None else output + _fit(bias.dense(mixture), output, channel)


def _normalised(parts: dict[str, Part], mixture: Tensor, layer: Any, x: Tensor) -> Tensor:
    """The answer of a normalisation layer whose vectors are each input's own."""

    def own(name: str) -> Tensor | None:
        value = getattr(layer, name)
        if value is None or name not in parts:
            mixed = None if value is None else value.flatten().expand(len(mixture), -1)
        else:
            mixed = value.flatten() + parts[name].dense(mixture).flatten(1)
        if mixed is None or not isinstance(layer, nn.LayerNorm):
            return None if mixed is None else _fit(mixed, x, 1 - x.ndim)
        flat = x.flatten(-len(layer.normalized_shape))
        return _fit(mixed, flat, -1).unflatten(-1, layer.normalized_shape)

    if isinstance(layer, nn.LayerNorm):
        y = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    elif isinstance(layer, nn.GroupNorm):
        y = F.group_norm(x, layer.num_groups, eps=layer.eps)
    else:
        y = (x - own("running_mean")) * (own("running_var") + layer.eps).rsqrt()  # type: ignore[operator]
    weight, bias = own("weight"), own("bias")
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise InputError(f"the model returns {type(outputs).__name__}; wrap it so that it returns one tensor")
    return outputs


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention written out: the fused kernels have no batching rule."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Parts(nn.ModuleDict):
    """Tensor name -> the K parts of that tensor (`keep` them, then `plan`)."""

    def keep(self, name: str, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        self["/" + name.replace(".", "/")] = Part(shape, tensors)  # a module's name takes no dots

    def named(self) -> dict[str, Part]:
        return {self.name(key): part for key, part in self.items()}  # type: ignore[misc]

    @staticmethod
    def name(key: str) -> str:
        """The tensor's name for a key."""
        return key[1:].replace("/", ".")

    def plan(self, module: nn.Module) -> None:
        """Find which layers of the module can add their parts to activations, and which tensors are left."""
        parts, own = self.named(), module.state_dict(keep_vars=True)
        name_of = {id(own[name]): name for name in parts}
        found = []
        for path, layer in module.named_modules():
            held = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
            names = {key: name_of[id(value)] for key, value in held.items() if id(value) in name_of}
            weight = parts[names["weight"]] if "weight" in names else None
            found.append((path, names, _mixes(layer, weight)))
        self.rest = {name for _, names, mixes in found if not mixes for name in names.values()}
        layers = [
            (path, {k: n for k, n in names.items() if n not in self.rest}) for path, names, mixes in found if mixes
        ]
        self.layers = [(path, names) for path, names in layers if names]
        self.ways = ["mapped"] if self.rest else ["layered", "mapped"]
        self.proved: set[str] = set()

    def weights(self, module: nn.Module, mixture: Tensor) -> dict[str, Tensor]:
        """The module's tensors that have parts, with one mixture `(K,)` added."""
        own = module.state_dict(keep_vars=True)
        return {name: own[name] + part.dense(mixture[None])[0] for name, part in self.named().items()}

    def run(self, module: nn.Module, arguments: Arguments, inputs: Any, mixture: Tensor) -> Tensor:
        """The module's answers `(N, ...)` with mixtures `(N, K)`.

        Args:
            module: the one that was planned for.
            arguments: inputs -> the positional and keyword arguments to call it with.
            inputs: N inputs, a tensor or a mapping to tensors.
            mixture: weights of the parts for each input.
        """
        distinct, group = mixture.unique(dim=0, return_inverse=True)
        if len(distinct) * PER_MERGE <= len(mixture):
            return self.merged(module, arguments, inputs, distinct, group)
        for place, way in enumerate(self.ways):
            try:
                outputs = getattr(self, way)(module, arguments, inputs, mixture)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError):
                continue  # if the inputs are at fault, merging says so
            if way not in self.proved and not self._agrees(module, arguments, inputs, mixture, outputs):
                continue
            self.proved.add(way)
            self.ways = self.ways[place:]
            return outputs
        outputs = self.merged(module, arguments, inputs, distinct, group)
        if self.ways:
            self.ways = []
            warnings.warn("this model cannot take weights per input: they are merged one input at a time", stacklevel=2)
        return outputs

    def _agrees(self, module: nn.Module, arguments: Arguments, inputs: Any, mixture: Tensor, outputs: Tensor) -> bool:
        ends = torch.tensor([0, len(mixture) - 1], device=mixture.device)
        one_each = torch.arange(2, device=mixture.device)
        exact = self.merged(module, arguments, at(inputs, ends), mixture[ends], one_each)
        if outputs.shape[1:] != exact.shape[1:]:
            return False
        error = (double(outputs[ends]) - double(exact)).norm()
        return bool(error <= torch.finfo(exact.dtype).eps ** 0.5 * double(exact).norm())

    def merged(self, module: nn.Module, arguments: Arguments, inputs: Any, distinct: Tensor, group: Tensor) -> Tensor:
        """One merge and pass for each of G mixtures `(G, K)`; `group` `(N,)` says whose is whose."""
        outputs: Tensor | None = None
        for i, mixture in enumerate(distinct):
            rows = (group == i).nonzero().flatten()
            answer = _tensor(functional_call(module, self.weights(module, mixture), *arguments(at(inputs, rows))))
            outputs = answer.new_empty(len(group), *answer.shape[1:]) if outputs is None else outputs
            outputs[rows] = answer
        assert outputs is not None
        return outputs

    def layered(self, module: nn.Module, arguments: Arguments, inputs: Any, mixture: Tensor) -> Tensor:
        """Parts added to activations, the whole batch at once."""
        positional, keywords = arguments(inputs)
        with self._mixing(module, mixture):
            return _tensor(module(*positional, **keywords))

    def mapped(self, module: nn.Module, arguments: Arguments, inputs: Any, mixture: Tensor) -> Tensor:
        """The same for batches of one inside `vmap`, with everything else merged for each input."""
        own, parts = module.state_dict(keep_vars=True), self.named()

        def one(mixture: Tensor, inputs: Any) -> Tensor:
            inputs, mixture = at(inputs, None), mixture[None]
            weights = {name: own[name] + parts[name].dense(mixture)[0] for name in self.rest}
            with self._mixing(module, mixture):
                return _tensor(functional_call(module, weights, *arguments(inputs)))[0]

        entries = sum(own[name].numel() for name in self.rest)
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        with _plain_attention():
            return vmap(one, chunk_size=max(1, MAPPED // max(1, entries)))(mixture, inputs)

    @contextmanager
    def _mixing(self, module: nn.Module, mixture: Tensor) -> Iterator[None]:
        parts, hooks = self.named(), []
        try:
            for path, names in self.layers:
                mine = {key: parts[name] for key, name in names.items()}
                hooks.append(module.get_submodule(path).register_forward_hook(partial(_add, mine, mixture)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
