"""Writing weights: header first, every tensor at its offset, in blocks, so that memory does not grow with the model.

A folder appears whole or not at all: everything is written under a temporary name beside it, synced, and
renamed. Space is reserved before the first byte, so a full disk is known at once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{str(path)!r} exists and is not an empty folder; give another output folder")
    work: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        work.chmod(0o777 & ~_umask())
        yield work
        for folder, _, files in os.walk(work):
            for file in files:
                _sync(Path(folder) / file)
        _sync(work)
        os.rename(work, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"no space for {str(path)!r}: free some or give another output folder") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise InputError(f"cannot write {str(path)!r} ({error.strerror}); give another output folder") from error
        raise
    finally:
        if work is not None and work.exists():
            shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value


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
    return memoryview(block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _write_tensor(file: int, at: int, weights: Weights, name: str, dtype: torch.dtype) -> None:
    blocks = getattr(weights, "blocks", None)
    if blocks is not None:
        for block in blocks(name, dtype):
            at += os.pwrite(file, _as_bytes(block), at)
        return
    flat = weights[name].detach().reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        at += os.pwrite(file, _as_bytes(flat[start : start + BLOCK].to(dtype)), at)


def _write_shard(
    path: Path, weights: Weights, shard: dict[str, tuple], metadata: dict[str, str], jobs: int, tick: Callable[[int], None]
) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, size) in shard.items():
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.posix_fallocate(file, 0, start + offset)
        os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)

        def write(name: str) -> None:
            dtype, _, size = shard[name]
            _write_tensor(file, start + header[name]["data_offsets"][0], weights, name, dtype)  # type: ignore[index]
            tick(size)

        if jobs == 1:
            for name in shard:
                write(name)
        else:
            from joblib import Parallel, delayed

            Parallel(n_jobs=jobs, backend="threading")(delayed(write)(name) for name in shard)
    finally:
        os.close(file)


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
        settings = json.loads(config.read_text())
        for key in ("dtype", "torch_dtype"):
            if key in settings:
                settings[key] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(settings, indent=2))


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
    shards = _plan(weights, [name for name in weights if name not in aliases], dtype, shard_bytes)
    total, done = sum(size for shard in shards for *_, size in shard.values()), 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    head = {"format": "pt"} | aliases | (metadata or {})
    with replacing(path) as work:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write_shard(work / file, weights, shard, head, jobs, tick)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        if like is not None:
            _companions(Path(like), work, dtype)
    return path
