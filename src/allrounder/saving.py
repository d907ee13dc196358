"""Writing weights: header first, every tensor at its offset, in blocks, so that memory does not grow with the model.

A folder appears whole or not at all: everything is written under a temporary name beside it, synced, and
renamed. Space for all shards is reserved before the first tensor is computed, so a full disk is known at once.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import DTYPES, PICKLES, Weights, tied
from .errors import InputError

__all__ = ["replacing", "save", "signature"]

BLOCK = 1 << 18
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def signature(weights: Weights, name: str) -> tuple[torch.dtype, torch.Size]:
    """Type and shape of one tensor, without computing it where the mapping is lazy."""
    lazy = getattr(weights, "signature", None)
    if lazy is not None:
        return lazy(name)
    tensor = weights[name]
    return tensor.dtype, tensor.shape


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises:
        InputError: when `path` exists and is not an empty folder, or nothing can be written there.
    """
    path = Path(path).expanduser().absolute()
    work, made = path.with_name(f".{path.name}.{secrets.token_hex(4)}"), []
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{str(path)!r} exists and is not an empty folder; give another output folder")
        for folder in reversed([parent for parent in path.parents if not parent.exists()]):
            folder.mkdir(exist_ok=True)
            made.append(folder)
        work.mkdir()
        yield work
        for folder, _, files in os.walk(work):
            for file in files:
                _sync(Path(folder) / file)
        _sync(work)
        os.rename(work, path)
        made.clear()
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"no space for {str(path)!r}: free some or give another output folder") from error
        raise InputError(
            f"cannot write {str(path)!r} ({error.strerror or error}); give another output folder"
        ) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(work, ignore_errors=True)
            for folder in reversed(made):
                folder.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plan(weights: Weights, names: list[str], dtype: torch.dtype | None, limit: int) -> list[dict[str, tuple]]:
    """Shards: name -> (type, shape, bytes), each shard at most `limit` bytes unless one tensor is larger."""
    shards: list[dict[str, tuple]] = [{}]
    used = 0
    for name in names:
        kind, shape = signature(weights, name)
        kind = dtype if dtype is not None and kind.is_floating_point else kind
        if kind not in NAMES:
            raise InputError(f"{name!r} has the type {kind}, which safetensors cannot hold")
        size = prod(shape) * kind.itemsize
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = (kind, shape, size)
        used += size
    return shards


def _as_bytes(block: Tensor) -> memoryview:
    return memoryview(block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(file: int, content: bytes | memoryview, at: int) -> int:
    """Write all of it, and say where it ends: one call may write less than it was given."""
    rest = memoryview(content)
    while rest:
        count = os.pwrite(file, rest, at)
        rest, at = rest[count:], at + count
    return at


@dataclass
class _Shard:
    """One file: name -> (type, shape, bytes), its header, and where each tensor begins."""

    path: Path
    tensors: dict[str, tuple]
    metadata: dict[str, str]

    def __post_init__(self) -> None:
        self.begins: dict[str, int] = {}
        offset = 0
        for name in sorted(self.tensors, key=lambda name: -self.tensors[name][0].itemsize):  # so that all are aligned
            self.begins[name] = offset
            offset += self.tensors[name][2]
        header: dict[str, object] = {"__metadata__": self.metadata}
        for name, (dtype, shape, size) in self.tensors.items():
            begin = self.begins[name]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + size]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.size = len(self.header) + offset

    def reserve(self) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, self.size)
            _write(file, self.header, 0)
        finally:
            os.close(file)

    def write(self, weights: Weights, jobs: int, tick: Callable[[int], None]) -> None:
        file = os.open(self.path, os.O_WRONLY)
        try:
            if jobs == 1:
                for name in self.tensors:
                    self._tensor(file, weights, name)
                    tick(self.tensors[name][2])
                return
            pool = ThreadPoolExecutor(jobs)
            try:
                for name, done in [(name, pool.submit(self._tensor, file, weights, name)) for name in self.tensors]:
                    done.result()
                    tick(self.tensors[name][2])
            finally:
                pool.shutdown(cancel_futures=True)  # waits: no thread writes into a file that is closed
        finally:
            os.close(file)

    def _tensor(self, file: int, weights: Weights, name: str) -> None:
        dtype, at = self.tensors[name][0], len(self.header) + self.begins[name]
        blocks = getattr(weights, "blocks", None)
        if blocks is not None:
            for block in blocks(name, dtype):
                at = _write(file, _as_bytes(block), at)
                del block  # or its memory would be held while the next is made
            return
        flat = weights[name].detach().reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            at = _write(file, _as_bytes(flat[start : start + BLOCK].to(dtype)), at)


def _companions(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy what belongs to a model besides its weights: configuration, tokenizer, pooling, licence."""
    weights = (".safetensors", *PICKLES, ".h5", ".msgpack", ".onnx", ".ot", ".gguf")
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not file.is_file() or file.suffix in weights or file.name.endswith(".index.json"):
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / inside)
    config = target / "config.json"
    if dtype is not None and config.is_file():
        try:
            settings = dict(json.loads(config.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{str(source / 'config.json')!r} is not a JSON object ({error}); repair it") from error
        settings |= {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in settings}
        config.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def save(
    weights: Weights,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    jobs: int = 1,
    like: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write weights as a model folder.

    Args:
        weights: any weights; lazy ones (a merge, a checkpoint) are computed block by block while writing.
        path: the folder to make; it must not exist or be empty.
        dtype: type of the floating tensors; `None` keeps each tensor's own.
        shard_bytes: largest size of one file in bytes; a single tensor is never split. Default 5e9.
        jobs: tensors written side by side, in threads.
        like: a model folder whose other files (configuration, tokenizer) are copied.
        metadata: text entries for the header.
        progress: called with (bytes done, bytes in all) after each tensor.

    Returns:
        The folder: `model.safetensors`, or `model-00001-of-0000N.safetensors` with its index.

    Raises:
        InputError: when the folder is not empty or not writable, or the disk is full. Nothing is left behind.
    """
    if shard_bytes < 1:
        raise InputError(f"a shard needs at least one byte, got shard_bytes={shard_bytes}")
    path = Path(path)
    aliases = tied(weights)
    plans = _plan(weights, [name for name in weights if name not in aliases], dtype, shard_bytes)
    total, done = sum(size for plan in plans for *_, size in plan.values()), 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    head = {"format": "pt"} | aliases | (metadata or {})
    files = [f"model-{number:05}-of-{len(plans):05}.safetensors" for number in range(1, len(plans) + 1)]
    files = ["model.safetensors"] if len(plans) == 1 else files
    with replacing(path) as work:
        shards = [_Shard(work / file, plan, head) for file, plan in zip(files, plans, strict=True)]
        for shard in shards:
            shard.reserve()
        for shard in shards:
            shard.write(weights, jobs, tick)
        if len(plans) > 1:
            weight_map = {name: file for file, plan in zip(files, plans, strict=True) for name in plan}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        if like is not None:
            _companions(Path(like), work, dtype)
    return path
