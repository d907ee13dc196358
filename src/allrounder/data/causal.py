"""Texts as tasks for causal language models: predict the next token of each domain.

A task is the path of a `.txt` or `.jsonl` file (also with `.gz`), or a NAME for NAME.jsonl or NAME.txt, or
NAME/NAME.jsonl or NAME/NAME.txt, of the data folder; `data.documents` says how it is read. Documents go to train,
validation and test as their field `split` says; without it they are shared out 80 : 10 : 10 by `seed`, and a single
long text 80 : 10 : 10 in its order. No document and no passage is in two splits.

The tokens of a split's documents, each ended by the tokenizer's end-of-text token, are cut into rows. The score is the
inverse perplexity, exp(-mean loss a token), between 0 and 1: what a model keeps of an expert's is the ratio of their
perplexities.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..task import Examples, Suite, Task
from .documents import KINDS, documents

__all__ = ["InversePerplexity", "Rows", "language_suite", "sequence_loss", "text_file", "text_rows"]

SPLITS = ("train", "validation", "test")
NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
         "dev": "validation", "test": "test"}  # fmt: skip
SHARES = (0.8, 0.9)  # where train and validation end
PASSAGE = 4000  # characters of a long text that are tokenised at a time
PIECES = rf"(?s).{{1,{PASSAGE}}}(?:(?<=\s)|\Z)|.{{1,{PASSAGE}}}"


class Rows(Examples):
    """Rows of tokens without padding: inputs `{"input_ids": (N, T)}`, targets `(N, T)` the token after each.

    Logits of long rows and large vocabularies are large: scoring takes eight rows at a time.
    """

    batch_size = 8


def sequence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy a token of `(N, T, vocabulary)` against `(N, T)`, in nats and at least float32."""
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten().to(logits.device))


class InversePerplexity:
    """exp(-mean loss a token), 0 to 1, gathered batch by batch as `torchmetrics` does.

    >>> metric = InversePerplexity()
    >>> metric.update(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))  # four tokens, all as likely
    >>> round(metric.compute(), 6)
    0.25
    """

    __name__ = "inverse_perplexity"

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.total += sequence_loss(logits, targets).item() * targets.numel()
        self.count += targets.numel()

    def compute(self) -> float:
        return math.exp(-self.total / self.count) if self.count else math.nan

    def __call__(self, logits: Tensor, targets: Tensor) -> float:
        return math.exp(-sequence_loss(logits, targets).item())


def text_file(name: str, folder: str | Path | None = None) -> Path:
    """The file of a text: a path, or a name in the data folder (default: the environment variable ALLROUNDER_DATA).

    Raises:
        InputError: when there is none.
    """
    own = Path(name).expanduser()
    if own.is_file():
        return own
    chosen = folder if folder is not None else os.environ.get("ALLROUNDER_DATA")
    if not chosen:
        raise InputError(f"{name!r} is no text file; give the path of one, 'data' in the recipe or set ALLROUNDER_DATA")
    place = Path(chosen).expanduser()
    for base in (place / own, place / own / own.name):
        for end in ("", *(kind + zipped for kind in reversed(KINDS) for zipped in ("", ".gz"))):
            if (path := base.with_name(base.name + end)).is_file():
                return path
    raise InputError(
        f"{str(place)!r} has no text {name!r}: no {name}.txt, {name}.jsonl, {name}/{name}.txt or {name}/{name}.jsonl"
    )


def _passages(text: str) -> list[str]:
    """A long text in pieces of whole lines; of whole words, where a line is longer than a piece."""
    found: list[list[str]] = [[]]
    size = 0
    for line in (part for whole in text.splitlines(keepends=True) for part in re.findall(PIECES, whole)):
        if size + len(line) > PASSAGE and found[-1]:
            found.append([])
            size = 0
        found[-1].append(line)
        size += len(line)
    return ["".join(lines) for lines in found]


def _divided(path: Path, seed: int) -> dict[str, list[str]]:
    """The documents of each split."""
    found = documents(path)
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    if any(split is not None for _, split in found):
        for text, split in found:
            if split not in NAMES:
                raise InputError(f"{str(path)!r} has a split {split!r}; it is one of {', '.join(NAMES)}, in every line")
            parts[NAMES[split]].append(text)
        if not parts["validation"]:
            cut = len(parts["train"]) * 8 // 9
            parts["train"], parts["validation"] = parts["train"][:cut], parts["train"][cut:]
        return parts
    if len(found) == 1:
        texts = _passages(found[0][0])
    else:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
        texts = [found[i][0] for i in order]
    first, second = (round(share * len(texts)) for share in SHARES)
    return {"train": texts[:first], "validation": texts[first:second], "test": texts[second:]}


def _rows(
    path: Path, split: str, texts: list[str], tokenizer: Any, length: int, count: int, generator: torch.Generator
) -> Tensor:
    """At most `count` rows `(rows, length + 1)` from documents in random order; no more are tokenised than are used."""
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise InputError("the tokenizer has no end-of-text token (eos_token), which stands between documents; set one")
    end = [tokenizer.eos_token_id]
    ids: list[int] = []
    for i in torch.randperm(len(texts), generator=generator).tolist():
        ids += tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) >= count * (length + 1):
            break
    kept = min(count, len(ids) // (length + 1)) * (length + 1)
    if not kept:
        what = f"{split} text".strip()
        raise InputError(
            f"{str(path)!r} has too little {what} for a row of {length} tokens; give more text or shorter rows"
        )
    return torch.tensor(ids[:kept], dtype=torch.long).view(-1, length + 1)


def _targets(rows: Tensor) -> Rows:
    return Rows({"input_ids": rows[:, :-1].contiguous()}, rows[:, 1:].contiguous())


def text_rows(
    name: str, *, tokenizer: Any, folder: str | Path | None = None, seed: int = 0, rows: int = 128, length: int = 128
) -> Rows:
    """Rows of one text, of all of it: of documents that name a split, those of `train`.

    Args:
        name, tokenizer, folder, seed, length: as for `language_suite`.
        rows: at most so many, at least 1.

    Raises:
        InputError: as for `language_suite`.
    """
    path = text_file(name, folder)
    found = [text for text, split in documents(path) if split in (None, "train")]
    texts = _passages(found[0]) if len(found) == 1 else found
    return _targets(_rows(path, "", texts, tokenizer, length, rows, torch.Generator().manual_seed(seed)))


def language_suite(
    tasks: Sequence[str],
    *,
    tokenizer: Any,
    folder: str | Path | None = None,
    seed: int = 0,
    train: int = 1000,
    validation: int = 100,
    test: int = 200,
    length: int = 128,
) -> Suite:
    """One task a text: the next token of it.

    Args:
        tasks: files or names, as above. A file's task is called by its name without endings.
        tokenizer: a transformers tokenizer with an end-of-text token.
        folder: the data folder; default: the environment variable ALLROUNDER_DATA.
        seed: how documents are shared out, and which are read first.
        train, validation, test: most rows a split.
        length: tokens a row, at least 2.

    Returns:
        Tasks over `Rows`, with `sequence_loss` and `InversePerplexity`.

    Raises:
        InputError: a text that is missing, unreadable, or too short for a row in each split; two of one name; a
            tokenizer without an end-of-text token; sizes out of range.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    if min(sizes.values()) < 1 or length < 2:
        raise InputError(f"splits need at least 1 row and rows 2 tokens, got {sizes}, length={length}")
    found = []
    for name in tasks:
        path = text_file(name, folder)
        generator, made = torch.Generator().manual_seed(seed), {}
        for split, texts in _divided(path, seed).items():
            made[split] = _targets(_rows(path, split, texts, tokenizer, length, sizes[split], generator))
        title = path.name.partition(".")[0]
        found.append(Task(title, **made, outputs=len(tokenizer), loss=sequence_loss, metric=InversePerplexity()))
    return Suite(found, name="language")
