"""LoRA adapters as weights: the full model that a PEFT adapter folder stands for, tensor by tensor.

`W + scale B A`, with `scale = alpha / r` (`alpha / sqrt(r)` for rank-stabilised LoRA). An adapter is merged as the
delta it stands for: averaging the factors A and B of several adapters one by one adds cross terms `B_1 A_2` that no
expert has.

Linear, Conv1D (`fan_in_fan_out`), convolution and embedding layers; patterns of ranks and alphas; whole modules and
biases that were trained besides. Refused, in a sentence: adapters that are no LoRA, and kinds of LoRA that are more
than a delta of known weights (DoRA, activated LoRA, PiSSA's changed base, ...).

Cost: an adapted tensor is computed each time it is read, one matrix product and one copy in at least float32, so that
a small delta survives a half-precision base. All other tensors are the base's own. peft is not needed.

LoRA: Hu et al., 2021, arXiv 2106.09685; rank-stabilised: Kalajdzievski, 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Weights, tied
from .errors import InputError
from .saving import signature

__all__ = ["AdaptedWeights"]

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.\w+)?(?<!\.bias)$")
WRAPPERS = re.compile(r"\.(modules_to_save(\.\w+)?|original_module|base_layer)(?=\.)")
FILES = ("adapter_model.safetensors", "adapter_model.bin")
MORE = (  # settings of LoRA with which it is not a delta of the base's weights
    "use_dora", "lora_bias", "alora_invocation_tokens", "use_qalora", "layer_replication", "target_parameters",
    "trainable_token_indices", "arrow_config", "use_bdlora", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base
DROPPED = 3  # leading parts of a module's name that the base's names may lack


@dataclass(frozen=True)
class _Factors:
    """Names of the factors in the file; `swapped` when the weight is the transpose of B A."""

    a: str
    b: str
    scale: float
    swapped: bool


def _config(path: Path) -> dict[str, Any]:
    """The checked content of `adapter_config.json`."""
    file = path / "adapter_config.json"
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
        numbers = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
        if config.get("peft_type") == "LORA" and not all(math.isfinite(float(number)) for number in numbers):
            raise ValueError(f"its alphas are {numbers}")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(file)!r} is not the configuration of an adapter ({error}); save it again") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{str(path)!r} is an adapter of type {kind}; only LORA can be merged: merge it with peft first"
        )
    more = [key for key in MORE if config.get(key)]
    if more:
        raise InputError(f"{str(path)!r} uses {more[0]}, which is more than a LoRA delta; merge it with peft first")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED):
        raise InputError(f"{str(path)!r} began as {start!r}, which changes the base; save it converted to plain LoRA")
    return config


class AdaptedWeights(Mapping[str, Tensor]):
    """The full weights that a folder with a PEFT LoRA adapter stands for.

    Args:
        base: the weights that the adapter was trained on. Their names may have, or lack, a prefix: `encoder.layer.0`
            is found for the adapter's `base_model.model.bert.encoder.layer.0`, and the other way round.
        path: the folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Adapted tensors are at least float32, the others keep the base's type. Modules that were trained whole and that
    the base lacks (a new head) appear under their own names.

    Raises:
        InputError: when a file is missing or damaged, the adapter is not a plain LoRA, or it does not fit the base.
    """

    def __init__(self, base: Weights, path: str | Path) -> None:
        self.base, self.path = base, Path(path)
        config = _config(self.path)
        files = [self.path / name for name in FILES if (self.path / name).is_file()]
        if not files:
            raise InputError(f"{str(path)!r} lacks {FILES[0]}; save the adapter again")
        self.stored = Checkpoint(files[0])
        self.tied = dict(tied(base))
        pairs: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        for key in self.stored:
            name = key.removeprefix("base_model.model.")
            found = FACTOR.match(name)
            if found:
                module = found["module"].removesuffix(".base_layer")
                pairs.setdefault(module, {})[(found["embedding"] or "") + found["side"]] = key
            elif ".lora_" in name or "token_adapter" in name:
                raise InputError(
                    f"{str(path)!r} holds {key!r}, which is more than a LoRA delta; merge it with peft first"
                )
            else:
                saved[WRAPPERS.sub("", name)] = key
        if not pairs:
            raise InputError(f"{str(path)!r} holds no LoRA factors; save the adapter again")
        drop, add = self._fit(list(pairs))
        self._saved = {self._saved_name(name, drop, add): key for name, key in saved.items()}
        self._factors: dict[str, _Factors] = {}
        for module, keys in pairs.items():
            name = _moved(module, drop, add) + ".weight"
            if name in self.tied:
                raise InputError(f"{str(path)!r} adapts {name!r}, which the base shares with {self.tied[name]!r}")
            self._factors[name] = self._read(name, module, keys, config)
        self._settle_squares(config)

    def _fit(self, modules: list[str]) -> tuple[int, str]:
        """How many leading parts to drop from the adapter's names and what to put before them."""
        for drop in range(DROPPED + 1):
            rest = ".".join(modules[0].split(".")[drop:]) + ".weight"
            starts = {name.removesuffix(rest) for name in self.base if name == rest or name.endswith("." + rest)}
            fitting = []
            for add in sorted(starts):
                names = {_moved(module, drop, add) + ".weight" for module in modules}
                if len(names) == len(modules) and all(name in self.base for name in names):
                    fitting.append(add)
            if len(fitting) > 1:
                places = f"{fitting[0]!r} and {fitting[1]!r}"
                raise InputError(f"{str(self.path)!r} fits the base under {places}; give the model it was trained on")
            if fitting:
                return drop, fitting[0]
        lost = next((module for module in modules if module + ".weight" not in self.base), modules[0])
        raise InputError(f"{str(self.path)!r} adapts {lost!r}, which the base lacks; give the model it was trained on")

    def _saved_name(self, name: str, drop: int, add: str) -> str:
        moved = _moved(name, drop, add) if name.count(".") >= drop else name
        return moved if moved in self.base else name

    def _read(self, name: str, module: str, keys: dict[str, str], config: dict[str, Any]) -> _Factors:
        embedding = "embedding_A" in keys or "embedding_B" in keys
        a, b = (keys.get(("embedding_" if embedding else "") + side) for side in "AB")
        if a is None or b is None or len(keys) != 2:
            raise InputError(f"{str(self.path)!r} holds only one LoRA factor of {module!r}; save the adapter again")
        (_, left), (_, right) = signature(self.stored, b), signature(self.stored, a)
        if len(left) < 2 or len(right) < 2 or left[1] != right[0] or left[1:].numel() != right[0] or not right[0]:
            raise InputError(f"{str(self.path)!r} holds LoRA factors {tuple(left)} and {tuple(right)} of {module!r}")
        alpha = config.get("lora_alpha", 8)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        scale = float(alpha) / (math.sqrt(right[0]) if config.get("use_rslora") else right[0])
        shape = signature(self, name)[1]
        whole = (left[0], right[1:].numel())
        straight = len(shape) >= 2 and (shape[0], shape[1:].numel()) == whole and not embedding
        swapped = len(shape) == 2 and tuple(shape) == whole[::-1]
        if not straight and not swapped:
            raise InputError(
                f"{str(self.path)!r} has a delta of {whole} for {name!r}, the base has {tuple(shape)}; give the model "
                "it was trained on (convolutions in groups cannot be merged)"
            )
        return _Factors(a, b, scale, swapped and (embedding or not straight))

    def _settle_squares(self, config: dict[str, Any]) -> None:
        """Square weights do not show whether they are transposed: they follow the configuration and the others."""
        plain = {name: factors for name, factors in self._factors.items() if "lora_embedding" not in factors.a}
        if not config.get("fan_in_fan_out") and not any(factors.swapped for factors in plain.values()):
            return
        for name, factors in plain.items():
            shape = signature(self, name)[1]
            if len(shape) == 2 and shape[0] == shape[1]:
                self._factors[name] = _Factors(factors.a, factors.b, factors.scale, True)

    def _matrices(self, factors: _Factors) -> tuple[Tensor, Tensor]:
        a, b = self.stored[factors.a].flatten(1), self.stored[factors.b].flatten(1)
        return (b.T, a.T) if factors.swapped else (a, b)

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """`(A, B, scale)` with `expert - base = scale B A`; `None` where the difference is not of that form."""
        factors = self._factors.get(name)
        if factors is None or name in self._saved or len(signature(self, name)[1]) != 2:
            return None
        return *self._matrices(factors), factors.scale

    def signature(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """Type and shape of a tensor, without computing it."""
        name = self.tied.get(name, name)
        dtype, shape = signature(self.stored, self._saved[name]) if name in self._saved else signature(self.base, name)
        return (torch.promote_types(dtype, torch.float32) if name in self._factors else dtype), shape

    def __getitem__(self, name: str) -> Tensor:
        name = self.tied.get(name, name)
        weight = self.stored[self._saved[name]] if name in self._saved else self.base[name]
        factors = self._factors.get(name)
        if factors is None:
            return weight
        a, b = (
            matrix.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            for matrix in self._matrices(factors)
        )
        return torch.addmm(weight.detach().to(b.dtype).reshape(len(b), -1), b, a, alpha=factors.scale).view(
            weight.shape
        )

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from (name for name in self._saved if name not in self.base)

    def __len__(self) -> int:
        return len(self.base) + sum(name not in self.base for name in self._saved)

    def __contains__(self, name: object) -> bool:
        return name in self.base or name in self._saved

    def __repr__(self) -> str:
        return f"AdaptedWeights({str(self.path)!r}, {len(self._factors)} adapted tensors)"


def _moved(module: str, drop: int, add: str) -> str:
    return add + ".".join(module.split(".")[drop:])
