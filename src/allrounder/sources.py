"""What a recipe's files are now: a changed base, expert or text makes every step that depends on it another one."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from .recipe import Recipe

__all__ = ["general_text", "identity", "sources"]


def identity(source: str | None) -> Any:
    """What a file or folder is now: names, sizes and times of its files."""
    if source is None or not (path := Path(source).expanduser()).exists():
        return source
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [source, [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def sources(recipe: Recipe, tasks: list[str]) -> dict[str, Any]:
    """What the base and the files of the tasks are now."""
    return {"base": identity(recipe.base), "data": _data(recipe, tasks)}


def _data(recipe: Recipe, tasks: list[str]) -> Any:
    """What the files of the tasks are now, in suites that read a data folder."""
    if recipe.suite == "language":
        from .data.causal import text_file

        return [identity(str(text_file(task, recipe.data))) for task in recipe.tasks or ()]
    place = recipe.data or os.environ.get("ALLROUNDER_DATA")
    if recipe.suite not in ("images", "text") or not place:
        return None
    folder = Path(place).expanduser()
    names = sorted({task.partition("/")[0] for task in tasks})
    return [identity(str(path)) for name in names for path in sorted(folder.glob(f"{glob.escape(name)}*"))]


def general_text(recipe: Recipe, options: dict[str, Any]) -> list[Any]:
    """What the text that a compressor reads beside the tasks is now, if it reads one."""
    from .data.causal import text_file

    return [identity(str(text_file(options["general"], recipe.data)))] if options.get("general") else []
