"""Weights: a read-only mapping from names to tensors, in memory (a `dict`) or on disk (`Checkpoint`).

`Checkpoint` maps safetensors files into memory and hands out views: nothing is read before it is used,
and what was read can be dropped by the kernel. Files that need unpickling (`.bin`, `.pt`, `.pth`) are
read with `weights_only=True`, so code inside them never runs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["Checkpoint", "Weights", "open_weights", "resolve", "tied"]

Weights = Mapping[str, Tensor]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the data and the header of a safetensors file, checked by the safetensors library."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a whole safetensors file ({error}); copy or export it again") from error
    unknown = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} - set(DTYPES)
    if unknown:
        raise InputError(f"{str(path)!r} holds tensors of type {', '.join(sorted(unknown))}, which cannot be merged")
    return 8 + size, header


class _File:
    """One mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start, header = _header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries: dict[str, dict[str, Any]] = header
        self._bytes: Tensor | None = None

    def tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        dtype = DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        if self._bytes is None:
            size = self.path.stat().st_size
            self._bytes = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        flat = self._bytes[self.start + begin : self.start + end]
        if (self.start + begin) % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(entry["shape"])


def _shards(index: Path) -> dict[str, list[str]]:
    """File name -> tensor names of a sharded checkpoint."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{str(index)!r} is not an index of shards: it needs a 'weight_map' object") from error
    shards: dict[str, list[str]] = {}
    for name, file in names.items():
        shards.setdefault(file, []).append(name)
    for file in shards:
        if Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{str(index)!r} names the shard {file!r}, which is not a plain file name in its folder")
        if not (index.parent / file).is_file():
            raise InputError(f"{str(index)!r} names the shard {file!r}, which is missing; download the folder again")
    return shards


def _unpickle(path: Path) -> dict[str, Tensor]:
    import pickle

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"{str(path)!r} was not loaded: it is damaged or holds more than tensors, and pickled code is never run; "
            "save it as safetensors"
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{str(path)!r} is not a mapping from names to tensors; save a state dict as safetensors")
    return {str(name): value for name, value in loaded.items()}


class Checkpoint(Mapping[str, Tensor]):
    """Weights on disk, read tensor by tensor.

    Args:
        path: a `.safetensors` file; a folder with one (`model.safetensors`) or with shards and their
            `*.safetensors.index.json`; a `.bin` / `.pt` state dict, or a folder with one.

    Indexing gives a view of the mapped file (copy on write: changing it does not change the file).

    Raises:
        InputError: when the path is missing, truncated, corrupt, ambiguous, an index names a shard that
            is missing or outside the folder, or a pickle holds anything but tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._where: dict[str, _File | None] = {}
        self._loaded: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        if not self.path.exists():
            raise InputError(f"{str(path)!r} does not exist; give a safetensors file or a model folder")
        for file, names in self._layout(self.path).items():
            if file.suffix in PICKLES:
                self._loaded |= _unpickle(file)
                continue
            opened = _File(file)
            self.metadata |= opened.metadata
            missing = [name for name in names or () if name not in opened.entries]
            if missing:
                raise InputError(f"the index of {str(path)!r} puts {missing[0]!r} in {file.name!r}, which lacks it")
            self._where |= dict.fromkeys(names or opened.entries, opened)
        self._where |= dict.fromkeys(self._loaded)
        if not self._where:
            raise InputError(f"{str(path)!r} holds no tensors")

    @staticmethod
    def _layout(path: Path) -> dict[Path, list[str] | None]:
        if path.is_file():
            if path.suffix == ".safetensors" or path.suffix in PICKLES:
                return {path: None}
            if path.name.endswith(".index.json"):
                return {path.parent / file: names for file, names in _shards(path).items()}
            raise InputError(f"{str(path)!r} is not a checkpoint; give a .safetensors file or a model folder")
        for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth"):
            found = sorted(file for file in path.glob(pattern) if not file.name.startswith((".", "training_args")))
            if len(found) > 1:
                listed = ", ".join(file.name for file in found[:4])
                raise InputError(f"{str(path)!r} holds several checkpoints ({listed}); give the one file you mean")
            if found and found[0].name.endswith(".index.json"):
                return {path / file: names for file, names in _shards(found[0]).items()}
            if found:
                return {found[0]: None}
        raise InputError(f"{str(path)!r} holds no .safetensors, .bin or .pt file")

    def __getitem__(self, name: str) -> Tensor:
        file = self._where[name]
        return self._loaded[name] if file is None else file.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def tied(weights: Weights) -> dict[str, str]:
    """Names that are second names of one tensor -> its first name.

    In memory two names are tied when they are the same storage; a lazy mapping may say so itself in
    an attribute `tied`. Checkpoints on disk hold every tensor once.
    """
    if not isinstance(weights, dict):
        return getattr(weights, "tied", {})
    first: dict[tuple, str] = {}
    second: dict[str, str] = {}
    for name, tensor in weights.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        kept = first.setdefault(key, name)
        if kept != name:
            second[name] = kept
    return second


def resolve(source: str | Path) -> Path:
    """A local path for a path or a Hugging Face hub id (`org/name`, optionally `@revision`).

    Raises:
        InputError: when it is neither a path that exists nor a hub id that can be had.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name, _, revision = str(source).partition("@")
    parts = name.split("/")
    if len(parts) != 2 or not all(part and part[0].isalnum() for part in parts) or path.suffix in (".safetensors", *PICKLES):
        raise InputError(f"{str(source)!r} does not exist; give a safetensors file, a model folder or a hub id (org/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(f"{name!r} is no local path, and hub ids need: pip install 'allrounder[hf]'") from error
    try:
        ignore = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*", "openvino/*", "original/*", "*.gguf"]
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=ignore))
    except Exception as error:  # the hub's client has a dozen kinds of failure, and all mean the same here
        raise InputError(f"{name!r} is no local path, and the hub did not give it ({type(error).__name__})") from error


def open_weights(source: Weights | str | Path, *, base: Weights | None = None) -> Weights:
    """Weights from anything that names them.

    Args:
        source: weights (returned as they are), a path, or a hub id; a folder with a PEFT LoRA adapter
            becomes the full weights it stands for, which needs `base`.
        base: the weights that an adapter was trained on.
    """
    if isinstance(source, Mapping):
        return source
    path = resolve(source)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        from .adapter import AdaptedWeights

        if base is None:
            raise InputError(f"{str(source)!r} is a PEFT adapter: it needs the base model it was trained on")
        return AdaptedWeights(base, path)
    return Checkpoint(path)
