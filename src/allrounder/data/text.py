"""Text classification from jsonl files: tasks for a transformers encoder, tokenised once.

A task `name` is the file `name.jsonl(.gz)` or `name/name.jsonl(.gz)` of the data folder, one JSON object a
line with `text`, `label` (a string, or an integer with an optional `label_name`) and an optional `split`
(train, validation, test). `name/part` is such a file too, or those rows of `name` whose `task` or `domain`
is `part`. Without splits, the rows are shared out 80 : 10 : 10. A label of -1 means "none of the classes"
(CLINC150's out-of-scope queries), and its row is left out.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..task import Examples, Suite, Task

__all__ = ["Tokens", "draw", "tasks_from_rows", "text_suite", "tokenize"]

Row = tuple[str, Any, str | None]  # text or image, class, split
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test"}  # fmt: skip
BLANK = {"tweeteval"}  # sets that were published with empty texts; the rows are left out
TEXT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pubmedqa": lambda row: " ".join([row["question"], *row["contexts"]]),
}


class Tokens(Examples):
    """Tokenised texts, padded on the right; a batch of them is cut to its longest text.

    Args:
        inputs: `input_ids` and `attention_mask`, both `(N, T)`.
        targets: `(N,)`.
    """

    def __getitem__(self, index: Any) -> tuple[dict[str, Tensor], Tensor]:
        inputs, targets = super().__getitem__(index)
        if targets.ndim and len(targets):
            longest = max(1, int(inputs["attention_mask"].sum(1).max()))  # type: ignore[index]
            inputs = {key: column[:, :longest] for key, column in inputs.items()}  # type: ignore[union-attr]
        return inputs, targets  # type: ignore[return-value]

    def take(self, count: int, *, seed: int = 0) -> Tokens:
        return Tokens(*self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]])

    def by_length(self) -> Tokens:
        """The same texts, short ones first: batches in order then hold almost no padding."""
        return Tokens(*self[self.inputs["attention_mask"].sum(1).argsort(stable=True)])  # type: ignore[index]


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `(N, T)`, T the longest text but at most `max_length`."""
    encoded = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=True, padding_side="right", return_tensors="pt"
    )
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def draw(labels: Sequence[int], count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Positions of at most `count` examples with each class's share kept (within one), and of the rest."""
    order = torch.randperm(len(labels), generator=generator).tolist()
    members: dict[int, list[int]] = {}
    for position in order:
        members.setdefault(labels[position], []).append(position)
    offset = torch.rand(len(members), generator=generator).tolist()
    keys = {
        position: (rank + offset[i]) / len(members[label])
        for i, label in enumerate(sorted(members))
        for rank, position in enumerate(members[label])
    }
    order.sort(key=keys.__getitem__)
    return order[:count], order[count:]


def _find(folder: Path, name: str) -> tuple[Path, str | None]:
    """The file of a task, and which part of it when it holds several tasks."""
    head, _, part = name.rpartition("/")
    for stem, inner in ((name, None), (head, part)):
        if stem:
            for base in (folder / stem, folder / stem / Path(stem).name):
                for suffix in (".jsonl", ".jsonl.gz"):
                    if (path := base.with_name(base.name + suffix)).is_file():
                        return path, inner
    raise InputError(f"{str(folder)!r} has no text task {name!r}: no {name}.jsonl(.gz) nor {name}/{name}.jsonl(.gz)")


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each line."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{str(path)!r}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{place} is not JSON ({error}); write one object a line") from error
                if not isinstance(row, dict):
                    raise InputError(f"{place} is a {type(row).__name__}; write one object with 'text' and 'label'")
                yield place, row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read after line {number} ({error}); copy it again") from error


def _rows(path: Path, part: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file that belong to the task."""
    found, parts = False, set()
    for place, row in _lines(path):
        here = {str(row[key]) for key in ("task", "domain") if row.get(key) is not None}
        parts |= here
        if part is None and "task" in row:
            continue
        if part is None or part in here:
            found = True
            yield place, row
    if not found:
        several = f"; it holds {', '.join(sorted(parts))}" if parts else ""
        wanted = "rows of one task" if part is None else f"rows of {part!r}"
        raise InputError(f"{str(path)!r} has no {wanted}{several}")


def _checked(path: Path, part: str | None) -> Iterator[tuple[str, str, int | str, str | None, str]]:
    """(place, text, label, split, class name) of each row that counts."""
    known = path.name.partition(".")[0]
    make = TEXT.get(known, lambda row: row["text"])
    for place, row in _rows(path, part):
        try:
            text, label = make(row), row["label"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{place} lacks the field {error}; a row needs 'text' and 'label'") from error
        if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, (int, str)):
            raise InputError(f"{place}: 'text' must be a string and 'label' a string or an integer")
        if label == -1:
            continue
        if not text.strip() or label == "":
            if known in BLANK:
                continue
            raise InputError(f"{place}: 'text' or 'label' is empty; fill it in or remove the row")
        split = row.get("split")
        if split is not None and split not in SPLITS:
            raise InputError(f"{place}: split {split!r} is not one of {', '.join(SPLITS)}")
        yield place, text, label, split and SPLITS[split], str(row.get("label_name", label))


def _divide(
    rows: dict[str, list[int]], labels: list[int], validation: int, generator: torch.Generator, where: str
) -> dict[str, list[int]]:
    """Positions of train, validation and test; validation is taken from train where the data have none."""
    if list(rows) == [""]:
        everything = rows[""]
        test, rest = draw([labels[i] for i in everything], max(1, len(everything) // 10), generator)
        rows = {"train": [everything[i] for i in rest], "test": [everything[i] for i in test]}
        validation = min(validation, len(everything) // 10)
    elif "" in rows:
        raise InputError(f"{where} names the split of some rows only; name it for all or for none")
    for split in ("train", "test"):
        if not rows.get(split):
            raise InputError(f"{where} has no {split} rows; add some, or leave out 'split' to have the rows shared out")
    if not rows.get("validation"):
        train = rows["train"]
        held, rest = draw([labels[i] for i in train], min(validation, len(train) // 4), generator)
        rows = rows | {"train": [train[i] for i in rest], "validation": [train[i] for i in held]}
    if not rows["validation"] or not rows["train"]:
        raise InputError(f"{where} has too few training rows to set some aside for validation; add rows")
    return rows


def tasks_from_rows(
    name: str,
    splits: Sequence[str | None],
    labels: Sequence[int],
    classes: tuple[str, ...],
    make: Callable[[list[int]], Any],
    *,
    sizes: dict[str, int],
    seed: int,
    where: str,
    examples: Callable[[Any, Tensor], Examples] = Examples,
) -> Task:
    """A task from rows that were read: divided, drawn down to `sizes`, and made into tensors.

    Args:
        name: the task's name.
        splits: each row's split: train, validation, test, or `None` for all rows.
        labels: each row's class.
        classes: the classes' names.
        make: positions of rows -> inputs.
        sizes: most examples in each split.
        seed: of the division and of what is drawn; classes keep their shares.
        where: what messages call the data.
        examples: makes a split of inputs and targets.

    Raises:
        InputError: when there are no training or test rows.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[int]] = {}
    for position, split in enumerate(splits):
        rows.setdefault(split or "", []).append(position)
    rows = _divide(rows, list(labels), sizes["validation"], generator, where)
    made = {}
    for split in ("train", "validation", "test"):
        chosen, _ = draw([labels[i] for i in rows[split]], sizes[split], generator)
        positions = [rows[split][i] for i in chosen]
        made[split] = examples(make(positions), torch.tensor([labels[i] for i in positions]))
        if split != "train" and isinstance(made[split], Tokens):
            made[split] = made[split].by_length()
    return Task(name, made["train"], made["validation"], made["test"], outputs=len(classes), classes=classes)


def _read(folder: Path, name: str, tokenizer: Any, sizes: dict[str, int], seed: int, max_length: int) -> Task:
    path, part = _find(folder, name)
    where = repr(str(path)) if part is None else f"{str(path)!r}, {part}"
    rows = list(_checked(path, part))
    kinds = {type(label) for _, _, label, _, _ in rows}
    if len(kinds) > 1:
        raise InputError(f"{where} has strings and integers as labels; use one kind")
    training = {label: title for _, _, label, split, title in rows if split in (None, "train")}
    numbers = {label: i for i, label in enumerate(sorted(training))}  # type: ignore[type-var]
    for place, _, label, _, _ in rows:
        if label not in numbers:
            raise InputError(f"{place}: the label {label!r} does not occur in the training rows")
    if len(numbers) < 2:
        raise InputError(f"{where} has {len(numbers)} class(es) in its training rows; a task needs two or more")
    texts = [text for _, text, _, _, _ in rows]
    return tasks_from_rows(
        name,
        [split for _, _, _, split, _ in rows],
        [numbers[label] for _, _, label, _, _ in rows],
        tuple(training[label] for label in numbers),
        lambda positions: tokenize(tokenizer, [texts[i] for i in positions], max_length),
        sizes=sizes, seed=seed, where=where, examples=Tokens,
    )  # fmt: skip


def text_suite(
    tasks: Sequence[str],
    *,
    tokenizer: Any,
    folder: str | Path | None = None,
    seed: int = 0,
    train: int = 1500,
    validation: int = 300,
    test: int = 500,
    max_length: int = 64,
) -> Suite:
    """Text classification tasks from jsonl files.

    Args:
        tasks: names, as above: `["banking77", "clinc150/travel", "tweeteval/emotion", "my_tickets"]`.
        tokenizer: a transformers tokenizer (`nets.encoders.load_tokenizer`).
        folder: where the files are; default: the environment variable ALLROUNDER_DATA.
        seed: which rows are drawn, and where the data have no validation split, which are set aside for it.
            Test rows never leave the test split.
        train, validation, test: most examples a split; classes keep their shares. A validation split that is
            taken from train is at most a quarter of it.
        max_length: tokens a text, longer ones are cut. At least 8.

    Returns:
        Tasks over `input_ids`, `attention_mask`, with the classes' names. Validation and test are in order of
        length, which makes scoring about twice as fast: shuffle them before taking a part.

    Raises:
        InputError: a file that is missing; a row that is not JSON, lacks a field, is empty, has an unknown
            split, or a label that does not occur in training (with file and line).
    """
    if folder is None and not (folder := os.environ.get("ALLROUNDER_DATA")):
        raise InputError("text tasks need a data folder: give 'data' in the recipe or set ALLROUNDER_DATA")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"the data folder {str(folder)!r} does not exist; give another or set ALLROUNDER_DATA")
    sizes = {"train": train, "validation": validation, "test": test}
    if min(sizes.values()) < 1 or max_length < 8:
        raise InputError(f"splits need at least 1 example and texts 8 tokens, got {sizes}, max_length={max_length}")
    return Suite([_read(folder, name, tokenizer, sizes, seed, max_length) for name in tasks], name="text")
