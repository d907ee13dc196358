"""What the benchmarks share: warm workers, whole commands, private memory, and the table at the end.

Time is CPU time (user + system), one thread, because wall time on a shared machine measures its neighbours.
Competitors take turns within one run (A B A B ...), and a ratio is formed within each turn, so that both
sides of it saw the same machine; the median over turns is reported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["MIB", "Report", "Row", "Side", "command", "command_cpu", "folder_of", "peak_private", "turns"]

MIB = 1 << 20
HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
os.environ.update(THREADS, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore")
os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCE), str(HERE)])
sys.path[:0] = [path for path in (str(SOURCE), str(HERE)) if path not in sys.path]


def folder_of(name: str) -> Path:
    """A folder for files that a benchmark makes: `benchmarks/work/NAME`, ignored by git."""
    path = HERE / "work" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _timed(function: Callable[..., Any], arguments: tuple) -> tuple[float, float, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = function(*arguments)
    return time.process_time() - cpu, time.perf_counter() - wall, result


class Side:
    """One competitor: a process of its own that stays warm, so that imports are paid once and not measured.

    Functions and arguments must be importable by name (top level of the benchmark's file).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
        """CPU seconds, wall seconds, and what the function gave."""
        return self._pool.submit(_timed, function, arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def turns(
    sides: Mapping[str, Callable[[], float]], *, repeats: int, note: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Every side once, in order, `repeats` times over: name -> measurements."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, measure in sides.items():
            found[name].append(measure())
            if note is not None:
                note(f"turn {turn + 1}/{repeats}  {name:42s} {found[name][-1]:8.3f} s CPU")
    return found


def command_cpu(arguments: Sequence[str]) -> float:
    """CPU seconds of a whole command and its children.

    Raises:
        SystemExit: when the command fails, with what it printed.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{printed[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def command(name: str) -> list[str]:
    """The installed command of that name beside this Python, as a list of arguments."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-m", name]


def peak_private(arguments: Sequence[str], *, every: float = 0.002) -> int:
    """Largest private memory (RssAnon) of a command in bytes, looked at every few milliseconds.

    Mapped files are not private: the kernel drops their clean pages when memory is short.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) * 1024) if found else peak
        time.sleep(every)
    assert process.stderr is not None
    printed = process.stderr.read()
    if process.wait():
        raise SystemExit(f"{' '.join(arguments)} failed:\n{printed[-3000:]}")
    return peak


@dataclass
class Row:
    """One line of the table.

    Args:
        what: what was measured.
        value: the median.
        unit: of the value; `x` for ratios.
        low, high: the range over turns.
        target: the target, if there is one; at least this, or at most this with `at_most`.
    """

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass
class Report:
    """The rows of one benchmark, printed as a table and written as JSON."""

    name: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    load: list[float] = field(default_factory=lambda: [os.getloadavg()[0]])

    def add(self, what: str, value: float, unit: str, *, target: float | None = None, at_most: bool = False) -> None:
        self.rows.append(Row(what, value, unit, None, None, target, at_most))

    def spread(
        self, what: str, values: Sequence[float], unit: str, *, target: float | None = None, at_most: bool = False
    ) -> None:
        """A row for measurements over turns: their median and range."""
        self.rows.append(Row(what, statistics.median(values), unit, min(values), max(values), target, at_most))

    def ratio(self, what: str, slow: Sequence[float], fast: Sequence[float], *, target: float | None = None) -> None:
        """A row for how many times faster: the ratio within each turn, median over turns."""
        self.spread(what, [a / b for a, b in zip(slow, fast, strict=True)], "x", target=target)

    def table(self) -> str:
        lines = [f"{'':46s} {'measured':>12s}  {'range over turns':>20s}  {'target':>10s}  met"]
        for row in self.rows:
            value = f"{row.value:.3g} {row.unit}" if row.value < 1000 else f"{row.value:,.0f} {row.unit}"
            spread = "" if row.low is None else f"{row.low:.3g} - {row.high:.3g}"
            target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}"
            met = {None: "", True: "yes", False: "NO"}[row.met]
            lines.append(f"{row.what:46s} {value:>12s}  {spread:>20s}  {target:>10s}  {met}")
        return "\n".join([self.name, *lines, *self.notes])

    def finish(self, to: Path | None) -> None:
        """Print the table; write the JSON file where one was asked for."""
        self.load.append(os.getloadavg()[0])
        self.notes.append(
            f"one thread, CPU seconds; 1-minute load {self.load[0]:.1f} before, {self.load[1]:.1f} after, "
            f"on {os.cpu_count()} cores"
            + ("" if max(self.load) <= (os.cpu_count() or 1) else ": TAKEN UNDER LOAD, ratios only")
        )
        print("\n" + self.table())
        if to is None:
            return
        packages = ("torch", "safetensors", "transformers", "mergekit", "fusion-bench")
        versions = {"python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        content = {
            "benchmark": self.name,
            "versions": versions,
            "cores": os.cpu_count(),
            "load": [round(value, 2) for value in self.load],
            "rows": [asdict(row) | {"met": row.met} for row in self.rows],
            "notes": self.notes,
        }
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(content, indent=2) + "\n")


def arguments(description: str, *, repeats: int = 5) -> argparse.Namespace:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"turns, at least 3 (default {repeats})")
    parser.add_argument("--small", action="store_true", help="tiny models: checks only that it runs")
    chosen = parser.parse_args()
    if chosen.repeats < 3 and not chosen.small:
        parser.error("--repeats is at least 3: a median of fewer says little")
    return chosen
