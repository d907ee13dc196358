"""Texts for language models: one long row of tokens each for training, validation and test.

`corpus("tinyshakespeare")` and `corpus("wikitext2_sample")` read the data folder; `corpus(path)` reads your own `.txt`
(or `.txt.gz`) file, or all of those of a folder in order of name. A file NAME.txt(.gz) or NAME/NAME.txt(.gz) of the
data folder goes by its name too. Splits are contiguous, so that no passage is shared:

    one text (tinyshakespeare, your own)   the first 90 % train, the next 5 % validation, the last 5 % test
    wikitext2_sample                       holds WikiText-2's validation and test texts alone (its training text is
                                           not there): test is the official test text; the first 90 % of the official
                                           validation text trains, its last 10 % is validation

The test perplexity of `wikitext2_sample` is thus of a model that saw a tenth of WikiText-2's training text.

Words are what stands between blanks, with `<eos>` for the end of a line that is not blank; characters are what they
are. The vocabulary is that of the training part in order of frequency, ties in order of code points; `<unk>` stands
for what validation and test have beyond it. Reading a million characters takes about a second as words.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Corpus", "corpus", "windows"]

UNKNOWN, END = "<unk>", "<eos>"
SUFFIXES = (".txt", ".txt.gz")


@dataclass(frozen=True)
class Corpus:
    """Token ids of one text, split.

    Args:
        train, validation, test: `(length,)` int64, in the text's order.
        vocabulary: the token of each id.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]


def corpus(name: str | Path, *, folder: str | Path | None = None, level: Literal["word", "char"] = "word") -> Corpus:
    """The tokens of a text.

    Args:
        name: a text of the data folder, or the path of your own file or folder of `.txt(.gz)`.
        folder: the data folder. Default: the environment variable ALLROUNDER_DATA. A path needs none.
        level: tokens are words, or single characters.

    Returns:
        The splits above, with the vocabulary of the training part and `<unk>` as id 0.

    Raises:
        InputError: an unknown level; a text that is missing, cannot be read, or is too short to be split.
    """
    if level not in ("word", "char"):
        raise InputError(f"level is 'word' or 'char', got {level!r}")
    if str(name) == "wikitext2_sample":
        place = _folder(folder) / "wikitext2_sample"
        seen, test = (_read(_one(place, f"wikitext2_{part}", "wikitext2_sample")) for part in ("valid", "test"))
        tokens = _tokens(seen, level)
        cut = len(tokens) * 9 // 10
        parts = tokens[:cut], tokens[cut:], _tokens(test, level)
    else:
        tokens = _tokens("\n".join(_read(path) for path in _files(name, folder)), level)
        first, second = len(tokens) * 90 // 100, len(tokens) * 95 // 100
        parts = tokens[:first], tokens[first:second], tokens[second:]
    if min(map(len, parts)) < 2:
        raise InputError(
            f"the text {str(name)!r} has {sum(map(len, parts))} {level} tokens, too few to be split; give a longer one"
        )
    counts = Counter(parts[0])
    counts.pop(UNKNOWN, None)
    vocabulary = (UNKNOWN, *sorted(counts, key=lambda token: (-counts[token], token)))
    ids = {token: i for i, token in enumerate(vocabulary)}
    train, validation, test = (torch.tensor([ids.get(token, 0) for token in part]) for part in parts)
    return Corpus(train, validation, test, vocabulary)


def windows(tokens: Tensor, length: int, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Endless batches of stretches of the text: inputs are `batch[:, :-1]`, targets `batch[:, 1:]`.

    Args:
        tokens: `(T,)`, T > length.
        length: predictions a row.
        batch_size: rows N.
        seed: where the stretches start, each start as likely as any other; global generators are not touched.

    Yields:
        `(N, length + 1)`, of the type and on the device of `tokens`.

    Raises:
        InputError: tokens of another shape, a text that is too short, sizes under 1.

    >>> next(windows(torch.arange(3), 2, 2, seed=0))
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise InputError(f"tokens are one row of integers, got {tuple(tokens.shape)} {tokens.dtype}")
    if length < 1 or batch_size < 1:
        raise InputError(f"length and batch_size are at least 1, got {length} and {batch_size}")
    if len(tokens) <= length:
        raise InputError(f"windows of {length} need a text of {length + 1} tokens, got {len(tokens)}; shorten them")
    return _windows(tokens, length, batch_size, torch.Generator().manual_seed(seed))


def _windows(tokens: Tensor, length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    rows = tokens.unfold(0, length + 1, 1)  # (T - length, length + 1), a view
    while True:
        yield rows[torch.randint(len(rows), (batch_size,), generator=generator).to(tokens.device)]


def _folder(folder: str | Path | None) -> Path:
    chosen = folder if folder is not None else os.environ.get("ALLROUNDER_DATA")
    if not chosen:
        raise InputError("a named text needs a data folder: give 'folder', set ALLROUNDER_DATA, or give a path")
    path = Path(chosen).expanduser()
    if not path.is_dir():
        raise InputError(f"the data folder {str(path)!r} does not exist; give another or set ALLROUNDER_DATA")
    return path


def _one(place: Path, stem: str, name: str) -> Path:
    for suffix in SUFFIXES:
        if (path := place / f"{stem}{suffix}").is_file():
            return path
    raise InputError(f"the text {name!r} needs {stem}.txt(.gz) in {str(place)!r}; copy it there")


def _files(name: str | Path, folder: str | Path | None) -> list[Path]:
    own = Path(name).expanduser()
    if own.is_file():
        return [own]
    if own.is_dir() and (found := sorted(path for path in own.iterdir() if path.name.endswith(SUFFIXES))):
        return found
    if isinstance(name, Path) or own.is_dir() or own.suffix:
        raise InputError(f"{str(own)!r} is no text file and no folder with .txt(.gz) files; give the path of one")
    place = _folder(folder)
    for base in (place, place / own):
        for suffix in SUFFIXES:
            if (path := base / f"{own.name}{suffix}").is_file():
                return [path]
    raise InputError(f"{str(place)!r} has no text {str(name)!r}: no {name}.txt(.gz) nor {name}/{name}.txt(.gz)")


def _read(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read as UTF-8 text ({error}); copy or convert it again") from error


def _tokens(text: str, level: str) -> list[str]:
    if level == "char":
        return list(text)
    return [token for line in text.splitlines() if (words := line.split()) for token in (*words, END)]
