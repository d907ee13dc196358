"""What a model costs to keep and to run: parameters, bytes, and a latency that was measured properly.

Latency is the median over repeats of one forward pass in evaluation mode without gradients, after warm-up, on a stated
number of threads. Several models take turns (A B A B ...), so that a busy machine slows all of them alike: compare
latencies of one call of `footprints` only. On a GPU each pass is waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..nets.calling import evaluating

__all__ = ["Footprint", "footprint", "footprints"]


@dataclass(frozen=True)
class Footprint:
    """The costs of one model.

    Args:
        parameters: how many; tied ones once.
        bytes: of parameters and buffers as they lie in memory, tied ones once.
        latency: median seconds of one pass; `None` when no inputs were given.
        low, high: fastest and slowest pass.
        threads: that torch was allowed.
    """

    parameters: int
    bytes: int
    latency: float | None = None
    low: float | None = None
    high: float | None = None
    threads: int | None = None

    def row(self) -> dict[str, float | int | None]:
        """Columns of a table: parameters, MB (10^6 bytes), and milliseconds where a latency was measured."""
        return {
            "parameters": self.parameters,
            "MB": round(self.bytes / 1e6, 3),
            "ms": None if self.latency is None else round(1e3 * self.latency, 3),
        }


def footprint(
    model: nn.Module, inputs: Any = None, *, repeats: int = 20, warmup: int = 3, threads: int = 1
) -> Footprint:
    """The footprint of one model; see `footprints`.

    >>> footprint(nn.Linear(3, 2)).row()
    {'parameters': 8, 'MB': 0.0, 'ms': None}
    """
    return footprints({"model": model}, inputs, repeats=repeats, warmup=warmup, threads=threads)["model"]


def footprints(
    models: Mapping[str, nn.Module], inputs: Any = None, *, repeats: int = 20, warmup: int = 3, threads: int = 1
) -> dict[str, Footprint]:
    """Footprints of several models, their passes taking turns.

    Args:
        models: name -> model; modes are as before afterwards.
        inputs: of a pass: a tuple of arguments, a dict of keywords, or one argument. `None`: no latency.
        repeats: passes of each model that count, >= 1.
        warmup: passes before them, >= 0.
        threads: torch may use, on the CPU; as before afterwards. Default 1, which means the same on all machines.

    Returns:
        Name -> `Footprint`.

    Raises:
        InputError: no models, numbers out of range.
    """
    if not models:
        raise InputError("footprints of no models; give at least one")
    if repeats < 1 or warmup < 0 or threads < 1:
        raise InputError(f"repeats and threads are at least 1 and warmup 0, got {repeats}, {threads} and {warmup}")
    sizes = {name: _size(model) for name, model in models.items()}
    if inputs is None:
        return {name: Footprint(*size) for name, size in sizes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()), _threads(threads), torch.inference_mode():
        for turn in range(warmup + repeats):
            for name, model in models.items():
                taken = _seconds(model, inputs)
                if turn >= warmup:
                    seconds[name].append(taken)
    return {
        name: Footprint(*sizes[name], statistics.median(times), min(times), max(times), threads)
        for name, times in seconds.items()
    }


def _size(model: nn.Module) -> tuple[int, int]:
    parameters = sum(p.numel() for p in model.parameters())
    stored = {(t.untyped_storage().data_ptr(), t.storage_offset(), t.shape): t.numel() * t.element_size()
              for t in (*model.parameters(), *model.buffers())}  # fmt: skip
    return parameters, sum(stored.values())


def _seconds(model: nn.Module, inputs: Any) -> float:
    call: Callable[[], Any]
    if isinstance(inputs, tuple):
        call = lambda: model(*inputs)  # noqa: E731
    elif isinstance(inputs, Mapping):
        call = lambda: model(**inputs)  # noqa: E731
    else:
        call = lambda: model(inputs)  # noqa: E731
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
