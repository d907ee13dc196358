"""Charts of tasks that came one after another: for each task, how every method's score on it went on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import GROUPS
from .svg import GRID, MUTED, PAPER, SERIES, as_svg, canvas, plain

__all__ = ["curves", "marks"]


def marks(count: int) -> list[tuple[int, str, str]]:
    """Series number, matplotlib's marker and the same sign as text, different for up to 25 methods."""
    return [(i % 5, *GROUPS[(i + i // 5) % 5][1:]) for i in range(count)]


def curves(sequences: Sequence[Mapping[str, Any]], titles: Mapping[str, str], *, factor: int) -> list[tuple[str, str]]:
    """One drawing a task.

    Args:
        sequences: `method`, `rows` (what came), `columns` (tasks) and `values` of each method, over the same tasks.
        titles: of the methods.
        factor: 100 for scores that read better in percent.

    Returns:
        (task, svg) in the order of the columns.
    """
    rows, tasks = sequences[0]["rows"], sequences[0]["columns"]
    values = [value * factor for found in sequences for row in found["values"] for value in row if value is not None]
    high = max([float(factor), *values])
    low = min([0.9 * high, *values])
    found = []
    for j, task in enumerate(tasks):
        told = "; ".join(
            f"{titles.get(one['method'], one['method'])}: "
            + ", ".join("none" if row[j] is None else f"{row[j] * factor:.3g}" for row in one["values"])
            for one in sequences
        )
        with canvas(300, 190, 40, 12, 8, 40) as (figure, axes):
            axes.set(xlim=(0.7, len(rows) + 0.3), ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
            axes.set_xticks(range(1, len(rows) + 1))
            axes.locator_params(axis="y", nbins=4)
            axes.set_xlabel("tasks learned", labelpad=2)
            axes.grid(axis="y", color=GRID, linewidth=1)
            axes.set_axisbelow(True)
            if task in rows:
                axes.axvline(rows.index(task) + 1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for one, (series, marker, _) in zip(sequences, marks(len(sequences)), strict=True):
                points = [(i + 1, row[j] * factor) for i, row in enumerate(one["values"]) if row[j] is not None]
                if points:
                    style: dict[str, Any] = {"linewidth": 1.6, "markersize": 5.5, "markeredgecolor": PAPER}
                    axes.plot(*zip(*points), marker=marker, color=SERIES[series], **style)
            label = f"{plain(task)}: score after each task. {told}"
            found.append((task, as_svg(figure, f"sequence-{j}", label)))
    return found
