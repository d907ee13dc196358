"""`images`: your own labelled small images, one npz file a task, as a suite.

A set is `NAME.npz` (or `NAME/NAME.npz`) in the data folder with four arrays: `train_x`, `test_x`, uint8,
`(N, H, W)` or `(N, H, W, C)` with C = 1 or 3; `train_y`, `test_y`, integers `(N,)` from 0. An array
`class_names` `(classes,)` is used if it is there; other arrays are ignored. Pickled arrays are refused.

All sets come into one input space: 28 x 28 grey in [0, 1] (ITU-R 601 luma, antialiased bilinear). Validation
is cut from train, never from test. Every split keeps the class shares of its file: examples are spread so that
any stretch of them holds each class in its proportion. A training file of 10,000 images takes about 0.3 s.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..task import Examples, Suite, Task

__all__ = ["image_suite"]

ARRAYS = ("train_x", "train_y", "test_x", "test_y")
SIDE = 28
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def _folder(folder: str | Path | None) -> Path:
    chosen = folder if folder is not None else os.environ.get("ALLROUNDER_DATA")
    if not chosen:
        raise InputError("suite 'images' needs a folder of npz files: give 'data' or set ALLROUNDER_DATA")
    path = Path(chosen).expanduser()
    if not path.is_dir():
        raise InputError(f"the data folder {str(path)!r} does not exist; give a folder with NAME.npz or NAME/NAME.npz")
    return path


def _open(path: Path) -> Any:
    """The opened npz file; nothing in it is unpickled."""
    import numpy as np

    try:
        opened = np.load(path, allow_pickle=False)
    except UNREADABLE as error:
        raise InputError(f"{str(path)!r} is not a readable npz file ({error}); save it with numpy.savez") from error
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise InputError(f"{str(path)!r} holds one bare array; save {', '.join(ARRAYS)} with numpy.savez")
    return opened


def _array(opened: Any, path: Path, name: str) -> Any:
    if name not in opened.files:
        raise InputError(
            f"{str(path)!r} has no array {name!r}; it needs {', '.join(ARRAYS)}, got {', '.join(opened.files)}"
        )
    try:
        return opened[name]
    except UNREADABLE as error:
        raise InputError(
            f"{name!r} of {str(path)!r} was not read ({error}); save a plain array, not objects"
        ) from error


def _pixels(array: Any, where: str) -> Tensor:
    """uint8 `(N, H, W[, C])`."""
    shape = tuple(array.shape)
    if str(array.dtype) != "uint8":
        raise InputError(f"{where} must be uint8, 0 to 255, got {array.dtype}; convert it before saving")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        raise InputError(f"{where} must have the shape (N, H, W) or (N, H, W, 1 or 3), got {shape}")
    return torch.from_numpy(array)


def _labels(array: Any, count: int, where: str) -> Tensor:
    if array.dtype.kind not in "iu":
        raise InputError(f"{where} must be integers from 0, got {array.dtype}; number the classes")
    if array.shape != (count,):
        raise InputError(f"{where} must have the shape ({count},), one label an image, got {tuple(array.shape)}")
    labels = torch.from_numpy(array.astype("int64"))
    if labels.min() < 0:
        raise InputError(f"{where} must be integers from 0, got {labels.min().item()}")
    return labels


def _grey(pixels: Tensor) -> Tensor:
    """uint8 `(N, H, W[, C])` -> float32 `(N, 1, 28, 28)` in [0, 1]."""
    images = pixels.float().div_(255)
    if images.ndim == 4:
        images = images[..., 0] if images.shape[3] == 1 else images @ torch.tensor([0.299, 0.587, 0.114])
    images = images.unsqueeze(1)
    if images.shape[2:] != (SIDE, SIDE):
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp_(0, 1).contiguous()


def _spread(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which every stretch holds the classes in their proportions, as nearly as it can."""
    shuffled = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        mine = shuffled[labels[shuffled] == label]
        place[mine] = (torch.arange(len(mine)) + torch.rand(1, generator=generator, dtype=torch.float64)) / len(mine)
    return place.argsort()


def _task(path: Path, name: str, seed: int, train: int, validation: int, test: int) -> Task:
    with _open(path) as opened:
        arrays = {key: _array(opened, path, key) for key in ARRAYS}
        named = _array(opened, path, "class_names") if "class_names" in opened.files else None
    pixels = {part: _pixels(arrays[f"{part}_x"], f"'{part}_x' of {str(path)!r}") for part in ("train", "test")}
    labels = {
        part: _labels(arrays[f"{part}_y"], len(pixels[part]), f"'{part}_y' of {str(path)!r}")
        for part in ("train", "test")
    }
    size = len(labels["train"])
    counts = labels["train"].clamp_max(size).bincount(minlength=2)
    if (counts < 2).any():
        rare = int((counts < 2).nonzero()[0])
        raise InputError(
            f"'train_y' of {str(path)!r} needs classes 0 to C - 1 with two examples each; class {rare} has fewer"
        )
    if labels["test"].max() >= len(counts):
        raise InputError(f"'test_y' of {str(path)!r} has class {labels['test'].max().item()}, which 'train_y' lacks")
    held = min(validation, max(1, size // 5))
    generator = torch.Generator().manual_seed(seed)
    order, test_order = (_spread(labels[part], generator) for part in ("train", "test"))
    parts = {"train": ("train", order[held : held + train]), "validation": ("train", order[:held])} | {
        "test": ("test", test_order[:test])
    }
    splits = {split: Examples(_grey(pixels[part][rows]), labels[part][rows]) for split, (part, rows) in parts.items()}
    classes = tuple(str(label) for label in named) if named is not None and named.shape == (len(counts),) else ()
    return Task(
        name, splits["train"], splits["validation"], splits["test"], outputs=len(counts), classes=classes
    )  # fmt: skip


def image_suite(
    tasks: Sequence[str] | None = None,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> Suite:
    """The suite of npz sets in a folder.

    Args:
        tasks: names of sets. Default: every npz file in the folder that has the four arrays, by name.
        folder: where they are. Default: the environment variable ALLROUNDER_DATA.
        seed: which examples go to which split.
        train, validation, test: most examples a task. Default: 2000, 400, 1000. Validation takes at most a
            fifth of the training file.

    Returns:
        Tasks with inputs `(N, 1, 28, 28)` float32 in [0, 1].

    Raises:
        InputError: when the folder, a set or an array is missing, an array has another type or shape or holds
            pickled objects, or a class has fewer than two training examples (each names the file and array).
    """
    place = _folder(folder)
    sizes = {"train": train, "validation": validation, "test": test}
    default = {"train": 2000, "validation": 400, "test": 1000}
    for split, count in sizes.items():
        if count is not None and count < 1:
            raise InputError(f"each split needs at least one example, got {split}={count}")
    most = {split: count or default[split] for split, count in sizes.items()}
    nested = [path for path in place.glob("*/*.npz") if path.parent.name == path.stem]
    files = {path.stem: path for path in [*nested, *place.glob("*.npz")]}
    if tasks is None:
        tasks = []
        for name in sorted(files):
            with _open(files[name]) as opened:
                tasks += [name] if set(ARRAYS) <= set(opened.files) else []
        if not tasks:
            raise InputError(f"the data folder {str(place)!r} has no npz file with {', '.join(ARRAYS)}")
    if not tasks:
        raise InputError(
            "suite 'images' needs at least one task; name npz files of the data folder, or leave 'tasks' out"
        )
    for name in tasks:
        if name not in files:
            there = ", ".join(sorted(files)) or "no npz files"
            raise InputError(f"the data folder {str(place)!r} has no {name}.npz or {name}/{name}.npz; it has {there}")
    return Suite([_task(files[name], name, seed, **most) for name in tasks], name="images")
