"""Documents of a text file: `.txt` holds one, `.jsonl` one a line; both also with `.gz`.

A line of `.jsonl` is an object. Its text is the field `text`; without one, all fields that are strings or lists of
strings, one below the other, except `split` and what ends in `id`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = ["KINDS", "Document", "documents"]

KINDS = (".txt", ".jsonl")
Document = tuple[str, str | None]
"""A text, and the split it says it belongs to."""


def _text(row: dict[str, Any]) -> str:
    if isinstance(row.get("text"), str):
        return row["text"]
    parts = []
    for key, value in row.items():
        some = value if isinstance(value, list) else [value]
        if key != "split" and not key.endswith("id"):
            parts += [part for part in some if isinstance(part, str)]
    return "\n".join(parts)


def documents(path: str | Path) -> list[Document]:
    """The documents of a file, in order; those without text are left out.

    Args:
        path: a file as above.

    Raises:
        InputError: another kind of file; one that is missing or unreadable, a line that is no JSON object (with its
            number), a file without text.
    """
    path = Path(path).expanduser()
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in KINDS:
        raise InputError(f"{str(path)!r} is no text file; give a .txt or a .jsonl (also with .gz)")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read as UTF-8 text ({error}); give another file") from error
    found: list[Document] = [(content, None)] if kind == ".txt" else []
    for number, line in enumerate(content.split("\n") if kind == ".jsonl" else (), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} of {str(path)!r} is not a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"line {number} of {str(path)!r} is a JSON {type(row).__name__}, not an object")
        split = row.get("split")
        text = _text(row).encode("utf-8", "replace").decode()  # half a surrogate pair, of text that was cut, is no text
        found.append((text, split if isinstance(split, str) else None))
    found = [(text, split) for text, split in found if text.strip()]
    if not found:
        raise InputError(f"{str(path)!r} has no text; give each line a field 'text'")
    return found
