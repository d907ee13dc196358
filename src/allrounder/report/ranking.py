"""The methods of a report in order, the answer in words, and the table that the command line prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MINUS", "NOTHING", "TIMES", "Line", "answer", "percent", "ranking", "seconds", "size", "summary"]

Report = Mapping[str, Any]

NOTHING, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Line:
    """One method, over seeds.

    Args:
        row: the method's entry in the report.
        chosen: whether it is the merged model that was written.
        means: each seed's mean normalised score, in percent.
        mean: their mean; `None` when a seed has none.
        spread: their standard deviation; `None` for one seed.
        scores: each task's score, mean over seeds; `None` when a seed has none.
    """

    row: Mapping[str, Any]
    chosen: bool
    means: list[float]
    mean: float | None
    spread: float | None
    scores: list[float | None]

    @property
    def title(self) -> str:
        return self.row["title"]


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there and len(there) == len(values) else None


def ranking(report: Report) -> list[Line]:
    """Best mean normalised test score first, those without one last."""
    chosen = report["chosen"] and report["chosen"]["method"]
    lines = []
    for row in report["methods"]:
        means = [value for value in row["mean"].values() if value is not None]
        mean = _mean(list(row["mean"].values()))
        spread = stdev(means) if mean is not None and len(means) > 1 else None
        scores = [_mean([by_task[task] for by_task in row["scores"].values()]) for task in report["tasks"]]
        lines.append(Line(row, row["name"] == chosen, means, mean, spread, scores))
    return sorted(lines, key=lambda line: (line.mean is None, -(line.mean or 0.0)))


def percent(value: float | None, spread: float | None = None) -> str:
    """
    >>> percent(87.04, 0.61), percent(None)
    ('87.0 ± 0.6%', 'none')
    """
    if value is None:
        return "none"
    return f"{value:.1f}%" if spread is None else f"{value:.1f} ± {spread:.1f}%"


def size(count: float) -> str:
    """
    >>> size(999), size(5_140), size(437_000_000)
    ('999 B', '5.1 kB', '437.0 MB')
    """
    power = next((power for power in range(4) if count < 1000 ** (power + 1)), 4)
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def seconds(value: float) -> str:
    """
    >>> seconds(0.004), seconds(12.34), seconds(192)
    ('0.004 s', '12.3 s', '3 min 12 s')
    """
    if value < 1:
        return f"{value:.3f} s"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def answer(report: Report) -> list[str]:
    """What the run found: first the one sentence, then what to hold against it."""
    lines = ranking(report)
    experts = "the expert's" if len(report["tasks"]) == 1 else "the experts'"
    best = next((line for line in lines if line.chosen), None)
    if best is None:
        found = ["No merged model was chosen: no method gave a single model with a score."]
    elif best.mean is None:
        found = [f"Best merged model: {best.title}. Its share of {experts} {report['metric']} is not known."]
    else:
        instead = f" in 1 model instead of {len(report['tasks'])}" if len(report["tasks"]) > 1 else ""
        kept = f"{best.mean:.1f}% of {experts} {report['metric']}"
        found = [f"Best merged model: {best.title}. It keeps {kept}{instead}."]
    known = {line.row["name"]: line for line in lines if line.mean is not None}
    if "base" in known:
        found.append(f"The base model, before any fine-tuning, reaches {known['base'].mean:.1f}%.")
    merged = [line for line in known.values() if line.row["family"] not in ("reference", "training", "in sequence")]
    if best is not None and best.mean is not None:
        better = next((line for line in merged if line.row["single"] and (line.mean or 0) > best.mean), None)
        if better:
            other = f"{better.title} came out higher, at {better.mean:.1f}%"
            found.append(f"{best.title} was chosen on validation; on test, {other}.")
    several = next((line for line in merged if not line.row["single"]), None)
    if several and (best is None or best.mean is None or (several.mean or 0) > best.mean):
        unit = known["base"].row["bytes"] if "base" in known else 0
        cost = f"{several.row['bytes'] / unit:.1f} times the bytes of one model" if unit else size(several.row["bytes"])
        found.append(f"{several.title}, which is not one model, keeps {several.mean:.1f}% in {cost}.")
    return found


def summary(report: Report) -> Table:
    """A table for the terminal (rich): methods by mean normalised test score, the chosen one marked.

    Args:
        report: what `build` gave, or the content of `report.json`.
    """
    from rich.table import Table
    from rich.text import Text

    count = len(report["seeds"])
    kept = f"kept: mean over tasks of test {report['metric']}, % of the task's own expert"
    over = f"; ± standard deviation over {count} seeds" if count > 1 else ""
    caption = Text(f"{answer(report)[0]}\n{kept}{over}")
    table = Table(title=Text(report["title"]), caption=caption, caption_justify="left")
    table.add_column("")
    table.add_column("method")
    for heading in ("kept", "stored", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("needs")
    for line in ranking(report):
        row = line.row
        style = "bold" if line.chosen else "dim" if row["family"] == "reference" else ""
        cells = [
            "*" if line.chosen else "", line.title, percent(line.mean, line.spread), size(row["bytes"]),
            seconds(row["seconds"]), row["needs"],
        ]  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table
