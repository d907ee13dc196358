"""Weights: a read-only mapping from names to tensors, in memory (a `dict`) or on disk (`Checkpoint`).

`Checkpoint` maps safetensors files into memory and hands out views: nothing is read before it is used,
and what was read can be dropped by the kernel. Files that need unpickling (`.bin`, `.pt`, `.pth`) are
read with `weights_only=True`, so code inside them never runs.
"""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
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
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth")


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the data and the header of a safetensors file, checked by the safetensors library."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _shards(index: Path) -> dict[str, list[str]]:
    """File name -> tensor names of a sharded checkpoint."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(index)!r} is not an index of shards: it needs a 'weight_map' object") from error
    shards: dict[str, list[str]] = {}
    for name, file in names.items():
        shards.setdefault(file, []).append(name)
    for file in shards:
        if Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{str(index)!r} names the shard {file!r}, which is not a plain file name in its folder")
        if not _is_file(index.parent / file):
            raise InputError(f"{str(index)!r} names the shard {file!r}, which is missing; download the folder again")
    return shards


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a damaged file may contain
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes that are damaged fail in every way there is
        raise InputError(
            f"{str(path)!r} was not loaded: it is damaged or holds more than tensors, and pickled code is never run; "
            "save it as safetensors"
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{str(path)!r} is not a mapping from names to tensors; save a state dict as safetensors")
    for name, value in loaded.items():
        if value.layout != torch.strided or value.dtype not in DTYPES.values() or value.device.type == "meta":
            kind = f"{value.dtype}, {value.layout}" if value.device.type != "meta" else "without values"
            raise InputError(f"{str(path)!r} holds {str(name)!r}, a tensor that cannot be merged ({kind})")
    return {str(name): value.detach() for name, value in loaded.items()}


class Checkpoint(Mapping[str, Tensor]):
    """Weights on disk, read tensor by tensor.

    Args:
        path: a `.safetensors` file; a folder with one (`model.safetensors`) or with shards and their
            `*.safetensors.index.json`; a `.bin` / `.pt` state dict, or a folder with one.

    Indexing gives a view of the mapped file (copy on write: changing it does not change the file). `tied` holds the
    second names of tensors that the file stores once: those that a pickle shares, and those that a header lists.

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
            opened = None if file.suffix in PICKLES else _File(file)
            held: dict[str, Any] = _unpickle(file) if opened is None else opened.entries
            missing = [name for name in names or () if name not in held]
            if missing:
                raise InputError(f"the index of {str(path)!r} puts {missing[0]!r} in {file.name!r}, which lacks it")
            self._where |= dict.fromkeys(names or held, opened)
            if opened is None:
                self._loaded |= {name: held[name] for name in names or held}
            else:
                self.metadata |= opened.metadata
        if not self._where:
            raise InputError(f"{str(path)!r} holds no tensors")
        aliases = {name: kept for name, kept in self.metadata.items() if name != "format" and name not in self._where}
        self.tied = tied(self._loaded) | {name: kept for name, kept in aliases.items() if kept in self._where}

    @staticmethod
    def _layout(path: Path) -> dict[Path, list[str] | None]:
        if path.is_file():
            if path.suffix == ".safetensors" or path.suffix in PICKLES:
                return {path: None}
            if path.name.endswith(".index.json"):
                return {path.parent / file: names for file, names in _shards(path).items()}
            raise InputError(f"{str(path)!r} is not a checkpoint; give a .safetensors file or a model folder")
        usual = [path / name for name in USUAL if (path / name).is_file()]
        if usual:
            return Checkpoint._layout(usual[0])
        for pattern in PATTERNS:
            found = sorted(file for file in path.glob(pattern) if not file.name.startswith((".", "training_args")))
            if len(found) > 1:
                listed = ", ".join(file.name for file in found[:4])
                raise InputError(f"{str(path)!r} holds several checkpoints ({listed}); give the one file you mean")
            if found:
                return Checkpoint._layout(found[0])
        if (path / "archive.json").is_file():
            raise InputError(
                f"{str(path)!r} is an archive, not a checkpoint; get a specialist with: allrounder restore"
            )
        raise InputError(f"{str(path)!r} holds no .safetensors, .bin or .pt file; give a model folder")

    def signature(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """Type and shape of a tensor, from the header alone."""
        name = name if name in self._where else self.tied[name]
        file = self._where[name]
        if file is None:
            return self._loaded[name].dtype, self._loaded[name].shape
        return DTYPES[file.entries[name]["dtype"]], torch.Size(file.entries[name]["shape"])

    def __getitem__(self, name: str) -> Tensor:
        name = name if name in self._where else self.tied[name]
        file = self._where[name]
        return self._loaded[name] if file is None else file.tensor(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._where
        yield from (name for name in self.tied if name not in self._where)

    def __len__(self) -> int:
        return len(self._where.keys() | self.tied.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self.tied

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def tied(weights: Weights) -> dict[str, str]:
    """Names that are second names of one tensor -> its first name.

    In memory two names are tied when they are the same storage; a lazy mapping may say so itself in
    an attribute `tied`.
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
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # too long a name, no permission, no such user
        raise InputError(
            f"{str(source)!r} cannot be read ({error}); give a file, a model folder or a hub id"
        ) from error
    name, _, revision = str(source).partition("@")
    parts = name.split("/")
    if (
        len(parts) != 2
        or not all(part and part[0].isalnum() for part in parts)
        or path.suffix in (".safetensors", *PICKLES)
    ):
        raise InputError(
            f"{str(source)!r} does not exist; give a safetensors file, a model folder or a hub id (org/name)"
        )
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
