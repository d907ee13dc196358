"""State on disk: a nest of dicts and lists with tensors and plain values, in one safetensors file.

What `torch.save` does with pickles, without them: tensors become entries of the file, everything else (numbers,
strings, booleans, None, the shape of the nest) becomes JSON in its header. Written whole or not at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import InputError

__all__ = ["load_state", "save_state"]


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = f"{len(tensors)}:{path}"  # numbered: paths of different keys may read alike
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        keys = list(value)
        if bad := [key for key in keys if not isinstance(key, (str, int))]:
            raise InputError(f"state {path or '/'} has the key {bad[0]!r}; keys are strings or integers")
        return {"dict": [[key, _flatten(value[key], f"{path}/{key}", tensors)] for key in keys]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (str, int, float, bool)):
        return {"value": value}
    raise InputError(
        f"state {path or '/'} is a {type(value).__name__}; it may hold tensors, numbers, strings, lists, dicts"
    )


def _restore(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    (kind, content), *_ = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        items = [_restore(value, tensors) for value in content]
        return items if kind == "list" else tuple(items)
    return content


def save_state(state: Any, path: str | Path) -> None:
    """Write a nest of dicts, lists, tuples, tensors and plain values to one file.

    Tensors are copied to the CPU; their sharing is not kept.

    Raises:
        InputError: for anything else in the nest, with its place.
    """
    from safetensors.torch import save_file

    path, tensors = Path(path), {}
    nest = _flatten(state, "", tensors)
    pointers: set[int] = set()
    for name, value in tensors.items():  # safetensors refuses two entries over one storage
        if value.untyped_storage().data_ptr() in pointers:
            tensors[name] = value.clone()
        pointers.add(value.untyped_storage().data_ptr())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"nest": json.dumps(nest)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | Path) -> Any:
    """What `save_state` wrote, on the CPU.

    Raises:
        InputError: when the file is missing, truncated, or was not written by `save_state`.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"no state at {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            nest = json.loads((file.metadata() or {})["nest"])
            return _restore(nest, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(f"{str(path)!r} is not a state that was saved here, or it is cut off ({error})") from error
