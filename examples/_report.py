"""What the example programs share: their options, and their tables on the screen and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from allrounder.study import versions


def options(description: str, *, seeds: int = 3) -> argparse.Namespace:
    """`--data FOLDER`, `--seeds N`, `--json FILE` and `--small`; the clock starts here."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ALLROUNDER_DATA"), help="folder of the data sets")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"repetitions (default {seeds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--small", action="store_true", help="a minute's look: fewer steps, one seed")
    chosen = parser.parse_args()
    if chosen.data is None or not Path(chosen.data).is_dir():
        parser.error(f"--data or ALLROUNDER_DATA must be the folder of the data sets, got {chosen.data}")
    chosen.seeds = list(range(1 if chosen.small else chosen.seeds))
    chosen.started = time.perf_counter()
    return chosen


def finish(chosen: argparse.Namespace, title: str, tables: dict[str, list[dict[str, Any]]], notes: list[str]) -> None:
    """Print the tables; write them to `--json`."""
    console = Console()
    for name, rows in tables.items():
        table = Table(*rows[0], title=name)
        for row in rows:
            shown = ("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            table.add_row(*shown)
        console.print(table)
    for note in notes:
        console.print(note)
    if chosen.json is not None:
        content = {
            "title": title,
            "command": f"python examples/{Path(sys.argv[0]).name}",
            "seeds": chosen.seeds,
            "seconds": round(time.perf_counter() - chosen.started, 1),
            "versions": versions(),
            "tables": tables,
            "notes": notes,
        }
        chosen.json.write_text(json.dumps(content, indent=2) + "\n")
