"""Classification tasks from Hugging Face data sets: text for an encoder, images for CLIP.

A task is `org/name`, with a configuration `org/name:config`, or a local folder that `datasets.load_dataset`
can read (parquet files, folders of images by class). Columns are found by their types: the label is the
`ClassLabel`, the image the `Image`, the text the string. A data set without a labelled test split is tested
on its validation split; without a validation split, part of train is set aside.

>>> list(CLIP_TASKS)
['sun397', 'stanford-cars', 'resisc45', 'eurosat', 'svhn', 'gtsrb', 'mnist', 'dtd']
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..task import Examples, Suite, Task
from .text import SPLITS, Tokens, tasks_from_rows, tokenize

__all__ = ["CLIP_TASKS", "Pixels", "hub_image_suite", "hub_text_suite"]

CLIP_TASKS = {
    "sun397": "tanganke/sun397",
    "stanford-cars": "tanganke/stanford_cars",
    "resisc45": "tanganke/resisc45",
    "eurosat": "tanganke/eurosat",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "gtsrb": "tanganke/gtsrb",
    "mnist": "ylecun/mnist",
    "dtd": "tanganke/dtd",
}


STRINGS = ("string", "large_string")
LABELS = ("label", "labels", "class", "fine_label")
TEXTS = ("text", "sentence", "content", "tweet", "review", "question", "utterance", "query")


class Pixels(Examples):
    """Images as bytes, normalised when a batch is taken: a quarter of the memory of floats.

    Args:
        inputs: `(N, 3, H, W)` uint8, resized and cropped.
        targets: `(N,)`.
        scale: factor of the bytes.
        mean, std: of each channel, after scaling.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, scale: float, mean: Any, std: Any) -> None:
        super().__init__(inputs, targets)
        self.scale = scale
        self.mean, self.std = (torch.as_tensor(value).float().view(-1, 1, 1) for value in (mean, std))

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitem__(index)
        return (inputs.float() * self.scale - self.mean) / self.std, targets  # type: ignore[union-attr]

    def take(self, count: int, *, seed: int = 0) -> Pixels:
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        inputs, targets = super().__getitem__(chosen)
        return Pixels(inputs, targets, scale=self.scale, mean=self.mean, std=self.std)  # type: ignore[arg-type]


def _load(source: str) -> tuple[str, Any]:
    """A task's name and its `DatasetDict`."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("data from the hub need: pip install 'allrounder[hf]'") from error
    local = Path(source).expanduser()
    path, _, config = (str(local), "", "") if local.is_dir() else source.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None)
    except Exception as error:  # the client has a dozen kinds of failure, and all mean the same here
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the data set {source!r} cannot be loaded ({reason}); give org/name, org/name:config or a folder"
        ) from error
    name = local.name if local.is_dir() else source.replace(":", "/")
    return re.sub(r"[^\w/-]", "_", name), loaded


def _column(found: Sequence[str], usual: Sequence[str], features: Any, source: str, what: str) -> str:
    """The one column that was found, or the first of the usual names among several."""
    for name in usual:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise InputError(f"the data set {source!r} has {len(found) or 'no'} columns that could be the {what}, of {columns}")


def _task(
    source: str,
    content: Callable[[Any], tuple[str, Callable[[Any, list[int]], Any]]],
    sizes: dict[str, int],
    seed: int,
    examples: Callable[..., Examples],
    name: str | None = None,
) -> Task:
    """A task from a data set; `content` finds the column to read in its features and says how."""
    import datasets

    found, loaded = _load(source)
    parts: dict[str, Any] = {}
    for split, part in loaded.items():
        if split in SPLITS:
            parts.setdefault(SPLITS[split], part)
    if "train" not in parts:
        raise InputError(f"the data set {source!r} has the splits {', '.join(loaded)}; one must be called train")
    features = parts["train"].features
    column, read = content(features)
    named = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [key for key in LABELS if key in features and key != column]
    label = _column(named or plain, LABELS, features, source, "label")

    rows = [
        (split, i, value)
        for split, part in parts.items()
        for i, value in enumerate(part[label])
        if value is not None and value != -1
    ]
    if label in named:
        classes = tuple(features[label].names)
        labels = [value for *_, value in rows]
    else:
        distinct = sorted({value for split, _, value in rows if split == "train"})
        numbers = {value: i for i, value in enumerate(distinct)}
        if unknown := [value for *_, value in rows if value not in numbers]:
            raise InputError(f"the data set {source!r}: the label {unknown[0]!r} does not occur in the training rows")
        classes = tuple(str(value) for value in distinct)
        labels = [numbers[value] for *_, value in rows]
    there = {split for split, *_ in rows}
    called: dict[str, str | None] = {split: split for split in there}
    if "test" not in there:
        called = {"train": "train", "validation": "test"} if "validation" in there else {"train": None}

    def make(positions: list[int]) -> Any:
        # what is drawn for one split comes from one part of the data set: only these rows are decoded
        return read(parts[rows[positions[0]][0]], [rows[i][1] for i in positions])

    return tasks_from_rows(
        name or found, [called[split] for split, *_ in rows], labels, classes, make,
        sizes=sizes, seed=seed, where=f"the data set {source!r}", examples=examples,
    )  # fmt: skip


def _sizes(train: int, validation: int, test: int) -> dict[str, int]:
    sizes = {"train": train, "validation": validation, "test": test}
    if min(sizes.values()) < 1:
        raise InputError(f"splits need at least 1 example, got {sizes}")
    return sizes


def hub_text_suite(
    tasks: Sequence[str],
    *,
    tokenizer: Any,
    seed: int = 0,
    train: int = 1500,
    validation: int = 300,
    test: int = 500,
    max_length: int = 64,
) -> Suite:
    """Text classification tasks from data sets of the hub, or local folders that `datasets` can read.

    Args:
        tasks: `["org/name", "org/name:config", "folder"]`.
        tokenizer: a transformers tokenizer.
        seed: which rows are drawn; classes keep their shares.
        train, validation, test: most examples a split.
        max_length: tokens a text.

    Returns:
        Tasks over `input_ids`, `attention_mask`; a task is called as its data set, with `/` for `:`.

    Raises:
        InputError: a data set that cannot be loaded, or whose label or text column is not clear.
    """
    sizes = _sizes(train, validation, test)

    def content(source: str) -> Callable:
        def find(features: Any) -> tuple[str, Callable[[Any, list[int]], Any]]:
            strings = [key for key, feature in features.items() if getattr(feature, "dtype", "") in STRINGS]
            column = _column([key for key in strings if key not in LABELS], TEXTS, features, source, "text")
            return column, lambda part, rows: tokenize(tokenizer, part.select(rows)[column], max_length)

        return find

    return Suite([_task(source, content(source), sizes, seed, Tokens) for source in tasks], name="hub-text")


def hub_image_suite(
    tasks: Sequence[str] | None = None,
    *,
    processor: Any,
    seed: int = 0,
    train: int = 1500,
    validation: int = 300,
    test: int = 500,
) -> Suite:
    """Image classification tasks from data sets of the hub, or local folders that `datasets` can read.

    Args:
        tasks: `["org/name", "org/name:config", "folder"]`, or short names among `CLIP_TASKS`, which are also
            the default: the eight data sets on which CLIP models are merged in the literature.
        processor: a transformers image processor (`nets.encoders.load_processor`).
        seed: which rows are drawn; classes keep their shares.
        train, validation, test: most examples a split. An image takes 147 KB of memory at 224 x 224.

    Returns:
        Tasks over `pixel_values` `(N, 3, H, W)`.

    Raises:
        InputError: a data set that cannot be loaded, or whose label or image column is not clear.
    """
    sizes = _sizes(train, validation, test)
    tasks = list(CLIP_TASKS) if tasks is None else tasks
    examples: Callable[..., Examples] = lambda inputs, targets: Pixels(  # noqa: E731
        inputs, targets, scale=processor.rescale_factor, mean=processor.image_mean, std=processor.image_std
    )

    def read(part: Any, rows: list[int], column: str) -> Tensor:
        chunks = []
        for start in range(0, len(rows), 64):
            images = [image.convert("RGB") for image in part.select(rows[start : start + 64])[column]]
            chunks.append(processor(images, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"])
        return torch.cat(chunks).to(torch.uint8)

    def content(source: str) -> Callable:
        def find(features: Any) -> tuple[str, Callable[[Any, list[int]], Any]]:
            images = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
            column = _column(images, ("image", "img"), features, source, "image")
            return column, lambda part, rows: read(part, rows, column)

        return find

    def one(task: str) -> Task:
        source = CLIP_TASKS.get(task, task)
        return _task(source, content(source), sizes, seed, examples, task if task in CLIP_TASKS else None)

    return Suite([one(task) for task in tasks], name="hub-images")
