"""Merging checkpoints on disk: `allrounder merge` and `allrounder restore`, callable.

Base and experts are safetensors files, model folders with or without shards, hub ids, `.bin` / `.pt` state dicts or
PEFT LoRA adapters, in any mixture of types; the result is a model folder with the base's configuration and
tokenizer. Methods are those of this room that need no data, by name, with the options of their functions.

Memory: a block of each model for elementwise methods, whatever their size. Merging an adapter holds one of its
tensors at a time.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..adapter import AdaptedWeights
from ..catalogue import nearest
from ..checkpoint import PICKLES, Weights, open_weights, resolve, tied
from ..errors import InputError
from ..saving import save
from .baselines import analogy, average, breadcrumbs, dare, negate, task_arithmetic, ties
from .engine import Aligned, Merge
from .self_positioning import slerp
from .tall_masks import compress, consensus, open_archive

__all__ = ["METHODS", "Method", "merge_checkpoints", "restore_archive"]

NEED_DATA = (
    "adamerging", "adamerging-plus", "adamerging-task", "atlas", "fisher", "regmean", "self-positioning",
    "task-arithmetic-search", "twin-merging", "joint",
)  # fmt: skip
TYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
PLAIN = ("model", "pytorch_model", "adapter_model", "consolidated", "weights")  # file names that say nothing
HEAD = 64  # entries that are compared first: two models that differ nearly always differ there

Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Method:
    """A merge function seen from the command line: what it takes, by its signature.

    Args:
        function: called with its sources by position and its options by name.
        sources: names of the parameters without a default: `base`, and `experts` or one name for each expert.
        options: name -> (kind, default) of the others that a word can stand for.
    """

    function: Callable[..., Any]
    sources: tuple[str, ...] = ()
    options: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @staticmethod
    def of(function: Callable[..., Any]) -> Method:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        kinds = {p.name: (_kind(p.annotation), p.default) for p in parameters if p.default is not p.empty}
        kinds = {name: kind for name, kind in kinds.items() if kind[0] is not None and name != "grid"}
        return Method(function, tuple(p.name for p in parameters if p.default is p.empty), kinds)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, when their number is fixed."""
        return tuple(name for name in self.sources if name not in ("base", "experts"))

    def __call__(self, base: Weights, experts: Mapping[str, Weights], options: Mapping[str, Any]) -> Any:
        given = {"base": base, "experts": experts} | dict(zip(self.experts, experts.values(), strict=False))
        return self.function(*(given[name] for name in self.sources), **options)


def _kind(annotation: Any) -> Any:
    """The first type of an annotation that a word can stand for."""
    several = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for kind in typing.get_args(annotation) if several else (annotation,):
        if kind in (float, int, bool) or typing.get_origin(kind) in (typing.Literal, Sequence):
            return kind
    return None


METHODS = {
    function.__name__.replace("_", "-"): Method.of(function)
    for function in (average, task_arithmetic, ties, dare, breadcrumbs, slerp, consensus, negate, analogy)
} | {"tall-masks": Method.of(compress)}


def _method(name: str) -> tuple[str, Method]:
    name = name.strip().lower().replace("_", "-")
    if name in METHODS:
        return name, METHODS[name]
    if name in NEED_DATA:
        raise InputError(f"{name!r} needs data and heads; use it with a recipe: allrounder run recipe.yaml")
    raise InputError(f"no method is called {name!r}; {nearest(name, [*METHODS, *NEED_DATA])}")


def _options(name: str, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Typed options."""
    typed = {}
    for key, value in given.items():
        if key not in method.options:
            raise InputError(f"{name} has no option {key!r}; {nearest(key, list(method.options))}")
        typed[key] = _typed(f"option {key!r} of {name}", method.options[key][0], value)
    return typed


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _typed(what: str, kind: Any, value: Any) -> Any:
    """The value that a word stands for; values of the right type stay."""
    try:
        if kind is bool:
            return value if isinstance(value, bool) else SWITCH[str(value).lower()]
        if kind is int:
            return int(str(value))
        if kind is float:
            return _number(value)
        if typing.get_origin(kind) is Sequence:
            return [_number(part) for part in (value.split(",") if isinstance(value, str) else value)]
        if value in typing.get_args(kind):
            return value
    except (ValueError, TypeError, KeyError):
        pass
    expected = {bool: "true or false", int: "a whole number", float: "a finite number"}.get(kind)
    if expected is None:
        literal = typing.get_origin(kind) is typing.Literal
        expected = " or ".join(map(repr, typing.get_args(kind))) if literal else "numbers with commas between them"
    raise InputError(f"{what} is {expected}, got {value!r}")


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    if name is None or isinstance(name, torch.dtype):
        return name
    if name.lower() not in TYPES:
        raise InputError(f"dtype is fp32, bf16, fp16 or fp64, got {name!r}")
    return TYPES[name.lower()]


def _size(text: str | int) -> int:
    """Bytes of '5GB', '200 MB', '4GiB', '1000000'."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", str(text).strip().lower())
    power = " kmgt".index(found[2] or " ") if found else 0
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** power) if found else 0
    if size < 1:
        raise InputError(f"a shard size is a number with kB, MB, GB, KiB, MiB or GiB, for example 5GB, got {text!r}")
    return size


def _labels(sources: Sequence[str]) -> dict[str, str]:
    """A name for each source, from its folder or file, made unique: name -> source."""
    labels: dict[str, str] = {}
    for source in map(str, sources):
        path = Path(source).expanduser()
        path = path.resolve() if path.exists() else Path(source.partition("@")[0])
        label, before = path.name, path.parent.name
        for ending in (".index.json", ".safetensors", *PICKLES):
            label = label.removesuffix(ending)
        label = (before if label in PLAIN and before else label) or "expert"
        number, first = 1, label
        while label in labels:
            number += 1
            label = f"{first}-{number}"
        labels[label] = source
    return labels


def _same(one: Weights, other: Weights) -> bool:
    """Whether two models hold the same floating numbers. Models that do not are told apart by their first few."""
    if isinstance(one, AdaptedWeights) or isinstance(other, AdaptedWeights):
        both = isinstance(one, AdaptedWeights) and isinstance(other, AdaptedWeights)
        return both and one.keys() == other.keys() and _same(one.stored, other.stored)  # type: ignore[union-attr]
    if one.keys() != other.keys():
        return False
    for count in (HEAD, None):
        for name in one:
            a, b = one[name].reshape(-1)[:count], other[name].reshape(-1)[:count]
            if a.shape != b.shape or not torch.equal(a, b):
                return False
    return True


def _notes(base: Weights, experts: dict[str, Weights]) -> list[str]:
    """What is no mistake but worth saying."""
    notes = [
        f"expert {label!r} equals the base, so it changes nothing" for label in experts if _same(experts[label], base)
    ]
    labels = list(experts)
    for i, label in enumerate(labels):
        twin = next((other for other in labels[:i] if _same(experts[label], experts[other])), None)
        if twin is not None:
            notes.append(f"experts {twin!r} and {label!r} are identical, so what they share counts twice")
    if len(experts) == 1:
        notes.append(f"{labels[0]!r} is the only expert")
    return notes


class _Based(Mapping[str, Tensor]):
    """A merge of experts alone, with the names, types and integer tensors of the base."""

    def __init__(self, models: Aligned, merge: Merge) -> None:
        self.models, self.merge, self.tied = models, merge, models.tied

    def signature(self, name: str) -> tuple[torch.dtype, torch.Size]:
        return self.models.signatures[self.tied.get(name, name)]

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        name = self.tied.get(name, name)
        if self.signature(name)[0].is_floating_point:
            return self.merge.blocks(name, dtype)
        return iter([self.models.base[name].reshape(-1)])

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.signature(name)
        return torch.cat([torch.empty(0, dtype=dtype), *self.blocks(name, dtype)]).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.models.names, *self.tied])

    def __len__(self) -> int:
        return len(self.models.names) + len(self.tied)


def merge_checkpoints(
    base: str | Path,
    experts: Sequence[str | Path],
    method: str,
    options: Mapping[str, Any],
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    jobs: int = 1,
    shard_size: str | int = "5GB",
    progress: Progress = None,
) -> dict[str, Any]:
    """Merge checkpoints on disk into a model folder (`tall-masks`: into an archive).

    Args:
        base: a safetensors file, model folder, hub id (`org/name`, `org/name@revision`) or `.bin` / `.pt` state dict.
            `average` takes names, types, configuration and tokenizer from it, but no values.
        experts: the same, or folders of PEFT LoRA adapters. `negate` takes one, `analogy` three.
        method: a name in `METHODS`.
        options: of the method's function; words (`"0.2"`, `"true"`, `"0.3,0.7"`) are understood.
        out: the folder to make; it must not exist or be empty. It appears whole or not at all.
        dtype: type of the floating tensors: fp32, bf16, fp16, fp64. Default: the base's, tensor by tensor.
        jobs: tensors side by side.
        shard_size: largest size of one file: `5GB`, `200MB`, `4GiB`, or bytes.
        progress: called with (bytes done, bytes in all).

    Returns:
        An account: method, all its options, base, experts (label -> source), out, bytes and names of the files,
        number of tensors, seconds, and notes on what may be a mistake (identical experts, an expert equal to the base:
        they are merged all the same, because the result is well defined).

    Raises:
        InputError: an unknown method, option or value, models that are missing, damaged or of different architectures,
            NaN or infinite weights, an output folder that cannot be written. Nothing is left on disk then.
    """
    start = time.perf_counter()
    name, how = _method(method)
    typed = _options(name, how, options)
    kind, limit, jobs = _dtype(dtype), _size(shard_size), _jobs(jobs)
    if not experts or (how.experts and len(experts) != len(how.experts)):
        count = f"{len(how.experts)} ({', '.join(how.experts)})" if how.experts else "at least one"
        raise InputError(f"{name} takes {count} of experts, got {len(experts)}")
    labels = _labels([str(expert) for expert in experts])
    path = resolve(base)
    start_weights = open_weights(path)
    opened = {label: open_weights(source, base=start_weights) for label, source in labels.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        models = Aligned(start_weights, opened)
        notes = _notes(start_weights, opened)
        merged = how(start_weights, opened, typed)
        if "base" not in how.sources:
            merged = _Based(models, merged)
        like = path if path.is_dir() else path.parent if path.name.endswith(".index.json") else None
        common = {"dtype": kind, "shard_bytes": limit, "jobs": jobs, "like": like, "progress": progress}
        full = {key: default for key, (_, default) in how.options.items()} | typed
        if isinstance(merged, Mapping):
            story = {"method": name, "options": full, "experts": list(labels), "version": __version__}
            save(merged, out, metadata={"allrounder": json.dumps(story)}, **common)
        else:
            merged.save(out, **common)
    notes += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return {
        "method": name, "options": full, "base": str(base), "experts": labels, **_written(out),
        "tensors": len(models.names), "seconds": round(time.perf_counter() - start, 3), "notes": notes,
    }  # fmt: skip


def restore_archive(
    archive: str | Path,
    task: str,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    jobs: int = 1,
    progress: Progress = None,
) -> dict[str, Any]:
    """Write one specialist of a TALL-masks archive as a model folder.

    Args:
        archive: the folder that `merge_checkpoints` wrote with `tall-masks`.
        task: the expert's label.
        out, dtype, jobs, progress: as in `merge_checkpoints`.

    Returns:
        An account: archive, task, out, bytes and names of the files, number of tensors, seconds.

    Raises:
        InputError: a folder that is no archive, is damaged, or holds parts that do not belong together; an unknown
            task; an output folder that cannot be written.
    """
    start = time.perf_counter()
    kind, jobs = _dtype(dtype), _jobs(jobs)
    opened = open_archive(archive)
    weights = opened.restore(task)
    save(weights, out, dtype=kind, jobs=jobs, like=opened.files, progress=progress)
    second = tied(weights)
    return {
        "archive": str(archive), "task": task, **_written(out), "tensors": sum(name not in second for name in weights),
        "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def _jobs(count: int) -> int:
    if count < 1:
        raise InputError(f"jobs is at least 1, got {count}")
    return count


def _written(out: str | Path) -> dict[str, Any]:
    folder = Path(out).expanduser()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    return {"out": str(out), "bytes": size, "files": [str(file.relative_to(folder)) for file in files]}
