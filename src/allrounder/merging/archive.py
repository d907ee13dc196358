"""An archive of specialists: base weights, merged weights, and one bit for each task and entry that says which.

`theta_t = where(mask_t, merged, base)`. Read it tensor by tensor, or give a whole specialist to `save`; on disk it is
a folder with `base` (a model folder of its own), `merged` and `masks` as safetensors, and `archive.json`. Names of
tasks stand in that file alone and never become paths. `tall_masks.compress` makes archives.

Size: 2 P b + K P / 8 bytes, with each tensor's bits filled up to whole bytes; tensors that no expert changed and
integer tensors are stored once and have no mask. Giving a specialist back reads 2 P b + P / 8 bytes and writes P b;
it chooses between stored numbers and rounds nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Weights, tied
from ..errors import InputError
from ..saving import BLOCK, replacing, save, signature

__all__ = ["Archive", "Specialist", "open_archive"]

FORMAT, VERSION, HEAD = "allrounder tall-masks", 1, "archive.json"
PARTS = ("base", "merged", "masks")
PIECE = 1 << 17  # entries chosen at a time: what they touch stays in a core's cache


def _unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits, as bytes 0 and 1."""
    import numpy

    return torch.from_numpy(numpy.unpackbits(packed.numpy(), bitorder="little", count=count))


def _bytes(weights: Weights, dtype: torch.dtype | None = None) -> int:
    """Bytes of the distinct tensors, floating ones in `dtype`."""
    second, total = tied(weights), 0
    for name in weights:
        if name not in second:
            own, shape = signature(weights, name)
            total += (dtype if dtype is not None and own.is_floating_point else own).itemsize * math.prod(shape)
    return total


class Archive:
    """K specialists as base weights, merged weights and one packed mask a task; made by `compress` or `open_archive`.

    Args:
        base: the base's weights.
        merged: `theta_0 + scale * tau_MT` of the tensors that were fine-tuned.
        masks: for the same tensors, uint8 `(K ceil(n / 8),)`: for each `block` entries of the flattened tensor,
            one row of bits a task, lowest bit first.
        thresholds: task -> threshold of its mask, in the order of the rows.
        block: entries in a row of bits; a multiple of 8.
        files: the folder whose configuration and tokenizer belong to the base's weights, if there is one.
    """

    def __init__(
        self,
        base: Weights,
        merged: Weights,
        masks: Weights,
        thresholds: Mapping[str, float],
        *,
        block: int = BLOCK,
        files: Path | None = None,
    ) -> None:
        self.base, self.merged, self.masks = base, merged, masks
        self.thresholds, self.block, self.files = dict(thresholds), block, files

    @property
    def tasks(self) -> list[str]:
        return list(self.thresholds)

    @property
    def nbytes(self) -> int:
        """Bytes of what has to be stored: 2 P b + K P / 8 (each tensor's bits filled up to whole bytes)."""
        return _bytes(self.base) + _bytes(self.merged) + _bytes(self.masks)

    def __repr__(self) -> str:
        return f"Archive({len(self.thresholds)} tasks, {len(self.masks)} masked tensors, {self.nbytes / 1e6:,.1f} MB)"

    def restore(self, task: str) -> Specialist:
        """One task's weights, chosen when they are read.

        Raises:
            InputError: for a task that the archive does not hold.
        """
        if task not in self.thresholds:
            near = difflib.get_close_matches(str(task), self.tasks, 1, 0.0)
            listed = ", ".join(self.tasks)
            raise InputError(f"the archive has no task {task!r}; did you mean {near[0]!r}? It has {listed}")
        return Specialist(self, task)

    def rows(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, packed masks `(K, ceil((stop - start) / 8))`) of each block of a masked tensor."""
        packed, at = self.masks[name], 0
        entries = signature(self.merged, name)[1].numel()
        for start in range(0, entries, self.block):
            stop = min(start + self.block, entries)
            end = at + len(self.thresholds) * math.ceil((stop - start) / 8)
            yield start, stop, packed[at:end].view(len(self.thresholds), -1)
            at = end

    def counts(self) -> list[int]:
        """How many fine-tuned entries 0, 1, ..., K masks keep: catastrophic, selfish, and agreement by degree."""
        found = torch.zeros(len(self.thresholds) + 1, dtype=torch.int64)
        for name in self.masks:
            for start, stop, rows in self.rows(name):
                kept = torch.zeros(stop - start, dtype=torch.int32)
                for row in rows:
                    kept += _unpack(row, stop - start)
                found += torch.bincount(kept, minlength=len(found))
        return found.tolist()

    def densities(self) -> dict[str, float]:
        """Share of the fine-tuned entries that each task's mask keeps, 0 to 1."""
        kept, entries = [0] * len(self.thresholds), 0
        for name in self.masks:
            for start, stop, rows in self.rows(name):
                kept = [count + int(_unpack(row, stop - start).sum()) for count, row in zip(kept, rows, strict=True)]
                entries += stop - start
        return {task: count / entries for task, count in zip(self.thresholds, kept, strict=True)}

    def save(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        like: str | Path | None = None,
        shard_bytes: int = 5_000_000_000,
        jobs: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write the archive as a folder: `base` (a model folder), `merged`, `masks`, and `archive.json`.

        Args:
            path: the folder to make; it must not exist or be empty. It appears whole or not at all.
            dtype: type of base and merged weights; `None` keeps the base's.
            like: a model folder whose other files (configuration, tokenizer) are copied into `base`. Default: `files`.
            shard_bytes, jobs: as in `allrounder.save`.
            progress: called with (bytes done, bytes in all) after each tensor.

        Raises:
            InputError: as `allrounder.save` does.
        """
        path = Path(path)
        parts: dict[str, Weights] = {"base": self.base, "merged": self.merged, "masks": self.masks}
        sizes = {part: _bytes(weights, dtype) for part, weights in parts.items()}
        done = 0

        def tick(size: int, _: int) -> None:
            if progress is not None:
                progress(done + size, sum(sizes.values()))

        like = self.files if like is None else like
        with replacing(path) as work:
            for part, weights in parts.items():
                files = like if part == "base" else None
                save(weights, work / part, dtype=dtype, shard_bytes=shard_bytes, jobs=jobs, like=files, progress=tick)
                done += sizes[part]
            head = {
                "format": FORMAT, "version": VERSION, "block": self.block, "tasks": list(self.thresholds.items()),
                "fingerprints": {part: _fingerprint(Checkpoint(work / part)) for part in PARTS},
            }  # fmt: skip
            (work / HEAD).write_text(json.dumps(head, indent=2))
        return path


class Specialist(Mapping[str, Tensor]):
    """One task's weights: entry by entry the base's or the merged ones, as the task's mask says, chosen when read.

    Integer tensors and tensors without a mask are the base's; second names of tied tensors give the same values.
    """

    def __init__(self, archive: Archive, task: str) -> None:
        self.archive, self.task = archive, task
        self.row = archive.tasks.index(task)
        self.tied = tied(archive.base)

    def signature(self, name: str) -> tuple[torch.dtype, torch.Size]:
        return signature(self.archive.base, self.tied.get(name, name))

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor, flattened, piece by piece.

        Raises:
            InputError: when a value does not fit `dtype`.
        """
        archive, name = self.archive, self.tied.get(name, name)
        base = archive.base[name].detach().reshape(-1)
        if name not in archive.masks:
            dtype = dtype if base.is_floating_point() else base.dtype
            yield from (_fitting(name, piece, dtype) for piece in base.split(BLOCK))
            return
        merged = archive.merged[name].detach().reshape(-1)
        work = base.dtype if base.dtype.itemsize > 1 else torch.float32
        for first, last, rows in archive.rows(name):
            for start in range(first, last, PIECE):
                stop = min(start + PIECE, last)
                bits = _unpack(rows[self.row, (start - first) // 8 :], stop - start)
                # lerp with weights 0 and 1 gives either end exactly, without the branch on each entry of `where`
                chosen = torch.lerp(base[start:stop].to(work), merged[start:stop].to(work), bits.to(base.device, work))
                yield _fitting(name, chosen.to(base.dtype), dtype)

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.signature(name)
        return torch.cat(list(self.blocks(name, dtype))).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.archive.base)

    def __len__(self) -> int:
        return len(self.archive.base)

    def __contains__(self, name: object) -> bool:
        return name in self.archive.base


def _fitting(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == values.dtype:
        return values
    cast = values.to(dtype)
    if not torch.equal(torch.isfinite(cast), torch.isfinite(values)):
        raise InputError(f"values of {name!r} do not fit {dtype}; choose a wider dtype")
    return cast


def _fingerprint(weights: Weights) -> str:
    """Hash of names, types, shapes and the sixteen middle values of each tensor: cheap, and another model's differs."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        flat = weights[name].detach().reshape(-1)
        middle = max(0, flat.numel() // 2 - 8)
        digest.update(f"{name!r} {flat.dtype} {tuple(weights[name].shape)}".encode())
        digest.update(flat[middle : middle + 16].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_archive(path: str | Path) -> Archive:
    """An archive on disk; nothing is read before it is used.

    Raises:
        InputError: when the folder is not an archive or of another version, a part of it is missing or damaged, or
            base, merged weights and masks do not belong together.
    """
    path = Path(path).expanduser()
    head = _head(path)
    named = f"archive {str(path)!r}"
    for part in PARTS:
        if not (path / part).is_dir():
            raise InputError(f"{named} lacks its folder {part!r}; copy it again")
    base, merged, masks = (Checkpoint(path / part) for part in PARTS)
    archive = Archive(base, merged, masks, head["tasks"], block=head["block"], files=path / "base")
    if set(masks) != set(merged):
        raise InputError(f"{named} has masks and merged weights of different tensors; make it again")
    for name in merged:
        if name not in base or signature(base, name) != signature(merged, name):
            raise InputError(f"{named} has merged weights that do not fit its base in {name!r}; make it again")
        dtype, shape = signature(masks, name)
        size = len(archive.tasks) * math.ceil(merged[name].numel() / 8)
        if dtype != torch.uint8 or tuple(shape) != (size,):
            raise InputError(
                f"{named} has a mask of {tuple(shape)} {dtype} for {name!r}, {len(archive.tasks)} tasks need {size} "
                "bytes; make it again"
            )
    for part, weights in zip(PARTS, (base, merged, masks), strict=True):
        if _fingerprint(weights) != head["fingerprints"].get(part):
            raise InputError(f"{named} was not made with these weights in {part!r}; copy it again or make it again")
    return archive


def _head(path: Path) -> dict[str, Any]:
    """The checked content of `archive.json`."""
    file = path / HEAD
    if not file.is_file():
        raise InputError(
            f"{str(path)!r} is no TALL-masks archive: it lacks {HEAD}; give a folder that an archive wrote"
        )
    try:
        head = json.loads(file.read_text())
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {head['format']!r}")
        if head["version"] == VERSION:
            tasks = {name: float(value) for name, value in head["tasks"]}
            if not tasks or len(tasks) < len(head["tasks"]) or not all(isinstance(name, str) for name in tasks):
                raise ValueError("its tasks are not names, each once")
            if not all(0 <= value < math.inf for value in tasks.values()):
                raise ValueError("its thresholds are not finite or negative")
            if type(head["block"]) is not int or head["block"] < 8 or head["block"] % 8:
                raise ValueError("its block is not a multiple of 8")
            return head | {"tasks": tasks, "fingerprints": dict(head["fingerprints"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{str(file)!r} is not the head of an archive ({error}); copy the archive again") from error
    version = head["version"]
    raise InputError(f"{str(path)!r} is an archive of version {version!r}, this program reads {VERSION}; make it again")
