"""What the commands print with: JSON, and a progress bar on the error stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

__all__ = ["Json", "bar", "print_json"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; no progress bars.")]


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


@contextmanager
def bar(quiet: bool, unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the time left, on the terminal's error stream."""
    if quiet:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda text, done, total: shown.update(task, description=text, completed=done, total=total)
