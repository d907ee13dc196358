"""Networks with most weights gone, stored at the size of what is left.

`prune_globally` sets the smallest weights of all convolutions and linear layers to zero and trains the others on stored
examples; `pack` keeps of each tensor whichever takes fewest bytes:

    as it is        s n                      s bytes a number, n numbers
    with bits       s k + n / 8              k of them not zero, one bit a place
    with places     (s + 4) k                int32 places

so a network in float32 with 2 percent of its weights takes 4 percent of the bytes, one with half of them 53 percent.
A packed network is unpacked to be used: computation is dense. Cost: one pass over the weights each way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import at
from ..task import to_device
from .learner import portions

__all__ = ["Network", "pack", "prune_globally", "train_on", "unpack"]

Packed = dict[str, Any]
"""Name -> a tensor, or what is left of one: `values`, `shape`, and `bits` or `places`."""


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def prune_globally(model: nn.Module, sparsity: float) -> list[tuple[Tensor, Tensor]]:
    """Zero the smallest weights over all layers together, in place.

    Args:
        model: with convolutions or linear layers; biases and normalisation stay.
        sparsity: share of weights to remove, in (0, 1).

    Returns:
        (weight, bool of its shape: what stays) a layer.

    Raises:
        InputError: another sparsity, or a model without such layers.
    """
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity is the share of weights to remove, in (0, 1), got {sparsity:g}")
    weights = [module.weight for module in model.modules() if isinstance(module, LAYERS)]
    if not weights:
        raise InputError("pruning needs a model with convolutions or linear layers; this one has none")
    sizes = torch.cat([weight.abs().flatten().float() for weight in weights])
    keep = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    keep[sizes.topk(max(1, round((1 - sparsity) * len(sizes)))).indices] = True
    parts = keep.split([weight.numel() for weight in weights])
    masks = [(weight, part.view_as(weight)) for weight, part in zip(weights, parts, strict=True)]
    for weight, mask in masks:
        weight.mul_(mask)
    return masks


def train_on(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    generator: torch.Generator,
    masks: list[tuple[Tensor, Tensor]] | None = None,
) -> int:
    """Cross-entropy with SGD (momentum 0.9) on examples in memory; with `masks`, removed weights stay zero.

    Returns:
        Examples whose gradient was computed.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    model.train()
    for _ in range(epochs):
        for rows in portions(torch.randperm(len(targets), generator=generator), batch_size, model):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(at(inputs, rows)), targets[rows])
            if not torch.isfinite(loss):
                raise InputError(f"the loss on stored examples is {loss.item()}; lower the learning rate ({lr:g})")
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for weight, mask in masks or ():
                    weight.mul_(mask)
    return epochs * len(targets)


def _bits(mask: Tensor) -> Tensor:
    """Bool `(n,)` -> uint8 `(ceil(n / 8),)`."""
    rows = F.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def pack(state: Mapping[str, Tensor]) -> Packed:
    """A state dict at the size of its non-zero numbers.

    >>> packed = pack({"w": torch.eye(100)})
    >>> packed["w"]["values"].numel(), torch.equal(unpack(packed)["w"], torch.eye(100))
    (100, True)
    """
    packed: Packed = {}
    for name, tensor in state.items():
        flat = tensor.detach().flatten()
        mask = flat != 0
        kept, size, bit = int(mask.sum()), tensor.element_size(), -(-len(flat) // 8)
        least = min(size * len(flat), size * kept + bit, (size + 4) * kept)
        if least == size * len(flat):
            packed[name] = tensor.detach().clone()
            continue
        packed[name] = {"values": flat[mask], "shape": list(tensor.shape)}
        if least == (size + 4) * kept:
            packed[name]["places"] = mask.nonzero().flatten().to(torch.int32)
        else:
            packed[name]["bits"] = _bits(mask)
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The state dict that was packed."""
    state = {}
    for name, part in packed.items():
        if isinstance(part, Tensor):
            state[name] = part
            continue
        values, shape = part["values"], torch.Size(part["shape"])
        flat = values.new_zeros(shape.numel())
        if "places" in part:
            flat[part["places"].long()] = values
        else:
            bits = part["bits"].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=values.device)
            flat[(bits & 1).bool().flatten()[: len(flat)]] = values
        state[name] = flat.view(shape)
    return state


class Network:
    """A network that is in the open, to be trained, or packed.

    Args:
        make: gives a new network of the same kind each time; called once here, and to unpack.
        what: its name in errors.
    """

    def __init__(self, make: Callable[[], nn.Module], what: str) -> None:
        self.make, self.what = make, what
        self.module: nn.Module | None = make()
        self.packed: Packed = {}
        tensors = list(self.module.state_dict().values())
        self.device = tensors[0].device if tensors else torch.device("cpu")

    def _filled(self, packed: Packed) -> nn.Module:
        module = self.make().to(self.device)
        try:
            module.load_state_dict(unpack(packed))
        except RuntimeError as error:
            raise InputError(f"the saved weights of {self.what} are of another network ({error})") from error
        return module

    def view(self) -> nn.Module:
        """The network itself if it is open, otherwise a copy, to be used and forgotten."""
        return self._filled(self.packed) if self.module is None else self.module

    def open(self) -> nn.Module:
        """Unpack it; the network, for training."""
        self.module, self.packed = self.view(), {}
        return self.module

    def close(self) -> None:
        """Pack it."""
        if self.module is not None:
            self.packed, self.module = pack(self.module.state_dict()), None

    @property
    def content(self) -> Packed:
        """What is stored."""
        return self.packed if self.module is None else dict(self.module.state_dict())

    def state(self) -> dict[str, Any]:
        """What is stored, and whether it is packed."""
        return {"content": self.content, "packed": self.module is None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            InputError: when it is of another network.
        """
        module = self._filled(state["content"])
        self.module, self.packed = (None, to_device(state["content"], self.device)) if state["packed"] else (module, {})
