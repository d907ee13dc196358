"""Weights rounded to the nearest of 2^b levels, for any network: quantisation's baseline, and often enough at 8 bits.

    q = clamp(round(w / s) + z, 0, 2^b - 1),   w ~ s (q - z);   s, z for each output, the best of 100 shrunk ranges

    stored = round_weights(model, bits=8)      # integers, steps and zero points beside what is not rounded
    save(stored, "small"); load_weights(model, restore_weights(open_weights("small")))

The `Conv1D` of transformers' GPT-2 is stored the other way round and has s, z for each input.
Activations stay as they are, so nothing has to be calibrated; below 4 bits use `quantize`, which learns the rounding.
Cost: 100 passes over the weights. Stored: b bits a weight, and a step, a zero point and the shape a layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Weights
from ..errors import InputError
from .genie_rounding import SoftWeight
from .pruning_layers import is_linear
from .quantized import pack, unpack

__all__ = ["restore_weights", "round_weights"]

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int = 8) -> dict[str, Tensor]:
    """The model's state with the weights of linear and convolutional layers as packed integers.

    Args:
        model: any module; left as it was. Weights that several of these layers share are stored for each; an embedding
            that is tied to one of them is stored there alone.
        bits: 2 to 8.

    Returns:
        The state dict with, for each of those layers, `NAME.packed`, `NAME.scale`, `NAME.zero`, `NAME.shape` and
        `NAME.bits` in place of `NAME.weight`.

    Raises:
        InputError: bits out of range, no such layer, weights that are not finite.

    >>> net = nn.Linear(4, 2)
    >>> stored = round_weights(net, bits=8)
    >>> (restore_weights(stored)["weight"] - net.weight).abs().max().item() < 0.01
    True
    """
    if not 2 <= bits <= 8:
        raise InputError(f"bits is 2 to 8, got {bits}")
    state = dict(model.state_dict())
    layers: dict[str, Any] = {
        name: part for name, part in model.named_modules() if isinstance(part, KINDS) or is_linear(part)
    }
    if not layers:
        raise InputError("the model has no linear or convolutional layer to round")
    own = {f"{name}.weight" if name else "weight" for name in layers}
    for one in {layer.weight.data_ptr() for layer in layers.values()}:  # an embedding that is the head's weight too
        for name in [name for name, value in state.items() if value.data_ptr() == one and name not in own]:
            del state[name]
    for name, layer in layers.items():
        weight = layer.weight.detach()
        if not torch.isfinite(weight).all():
            raise InputError(f"the weight of {name or 'the model'!r} is not finite; repair the checkpoint")
        dot = f"{name}." if name else ""
        if f"{dot}weight" not in state:
            raise InputError(f"the weight of {name or 'the model'!r} is computed (parametrised); remove that first")
        found = SoftWeight(weight.float(), bits)
        del state[f"{dot}weight"]
        state |= {
            f"{dot}packed": pack(found.hard(), bits),
            f"{dot}scale": found.scale.flatten().to(weight.dtype),
            f"{dot}zero": found.zero.flatten().to(torch.uint8),
            f"{dot}shape": torch.tensor(weight.shape),
            f"{dot}bits": torch.tensor(bits),
        }
    return state


def restore_weights(stored: Weights) -> dict[str, Tensor]:
    """The state dict with floating weights again.

    Raises:
        InputError: when a part of a layer is missing or has another size.
    """
    found, parts = {}, ("scale", "zero", "shape", "bits")
    for name in stored:
        stem, _, last = name.rpartition(".")
        dot = f"{stem}." if stem else ""
        if last in parts and f"{dot}packed" in stored:
            continue
        if last != "packed":
            found[name] = stored[name]
            continue
        if missing := [part for part in parts if f"{dot}{part}" not in stored]:
            raise InputError(f"layer {stem!r} lacks {missing[0]!r}; it was not written by round_weights")
        scale, zero, shape, bits = (stored[f"{dot}{part}"] for part in parts)
        size, count = shape.tolist(), math.prod(shape.tolist())
        if stored[name].numel() != -(-count * int(bits) // 8) or scale.numel() != size[0]:
            raise InputError(f"layer {stem!r} has {stored[name].numel()} bytes for {count} weights of {int(bits)} bits")
        along = (-1, *[1] * (len(size) - 1))
        integers = unpack(stored[name], int(bits), count).view(size).to(scale.dtype)
        found[f"{dot}weight"] = (integers - zero.to(scale.dtype).view(along)) * scale.view(along)
    return found
