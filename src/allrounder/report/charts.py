"""The report's charts: what each method keeps, what it costs to store, and matrices as coloured cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .ranking import NOTHING, TIMES, Line, percent
from .svg import GRID, INK, MUTED, PAPER, SERIES, as_svg, canvas, plain, shortened, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GROUPS", "dots", "group", "heat", "tradeoff"]

# Families that share a colour: what the reader sees, matplotlib's marker, the same sign as text.
GROUPS = (
    ("one model, from the weights alone", "o", "●"),
    ("one model, from unlabelled data", "^", "▲"),
    ("one model, from labelled data", "D", "◆"),
    ("several sets of weights, or a choice for each input", "P", "✚"),
    ("reference", "s", "■"),
)
FAMILIES = {"data-free": 0, "unlabelled": 1, "labelled": 2, "keeps every task": 3, "chooses per input": 3}

Matrix = Sequence[Sequence[float | None]]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def group(family: str) -> int:
    """Place in `GROUPS` of a family of methods."""
    return FAMILIES.get(family, 4)


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = math.floor((min(values) - 2) / 5) * 5, max(100, math.ceil(max(values) / 5) * 5)
    return float(low if min(values) < 0 else max(0, low)), float(high)


def _bold(line: Line) -> str:
    return "bold" if line.chosen else "normal"


def _mark(axes: Axes, line: Line, x: float, y: float) -> None:
    """The mark of a method's family, ringed for the chosen one."""
    which = group(line.row["family"])
    axes.plot(x, y, GROUPS[which][1], color=SERIES[which], markersize=9, markeredgecolor=PAPER, zorder=3)
    if line.chosen:
        axes.plot(x, y, "o", markersize=16, fillstyle="none", color=INK, markeredgewidth=1.5)


def dots(lines: Sequence[Line], *, narrow: bool, label: str) -> str:
    """Methods by normalised score: a large mark for the mean, a line and small dots for the seeds.

    Args:
        lines: in the order to draw; those without a mean are left out.
        narrow: 320 pixels wide with names above the marks, or 960 with names beside them.
        label: what a screen reader says.
    """
    references = {line.row["name"]: line.mean for line in lines if line.row["name"] in ("base", "experts")}
    references = {name: value for name, value in references.items() if value is not None}
    lines = [line for line in lines if line.mean is not None and line.row["name"] not in references]
    if not lines:
        return ""
    pitch = 38 if narrow else 26
    width, left, right, top, bottom = (320, 12, 12, 26, 28) if narrow else (960, 214, 110, 26, 28)
    low, high = _limits([*references.values(), *(value for line in lines for value in line.means)])
    plot = width - left - right
    with canvas(width, top + pitch * len(lines) + bottom, left, right, top, bottom) as (figure, axes):
        axes.set(xlim=(low, high), ylim=(len(lines) - 0.5, -0.5), yticks=[])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.locator_params(axis="x", nbins=4 if narrow else 7)
        if narrow:  # a track for each row, so that no line crosses the words between the tracks
            axes.hlines([i + 0.2 for i in range(len(lines))], low, high, color=GRID, linewidth=1, zorder=0)
        else:
            axes.grid(axis="x", color=GRID, linewidth=1)
        axes.set_axisbelow(True)
        for name, value in references.items():
            ends = [(i - 0.02, i + 0.42) if narrow else (i - 0.5, i + 0.5) for i in range(len(lines))]
            ends = ends if narrow else [(ends[0][0], ends[-1][1])]
            style = (0, (4, 3)) if name == "base" and not narrow else "solid"
            axes.vlines([value] * len(ends), *zip(*ends), color=MUTED, linewidth=1.2, linestyle=style, zorder=1)
            place = (value - low) / (high - low) * plot
            side = "left" if place < 40 else "right" if place > plot - 40 and narrow else "center"
            text = f"{name} {value:.0f}%"
            axes.annotate(text, (value, -0.5), (0, 6), textcoords="offset points", ha=side, color=MUTED)
        across = axes.get_yaxis_transform()
        for i, line in enumerate(lines):
            colour, y, bold = SERIES[group(line.row["family"])], i + 0.2 if narrow else i, _bold(line)
            axes.plot([min(line.means), max(line.means)], [y, y], color=colour, linewidth=2.5, alpha=0.55)
            axes.plot(line.means, [y] * len(line.means), "o", color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
            _mark(axes, line, float(line.mean or 0), y)
            value = percent(line.mean, line.spread)
            if narrow:
                title = shortened(line.title, plot - width_of(value) - 12)
                axes.text(0, y - 0.4, title, transform=across, va="center", weight=bold)
                axes.text(1, y - 0.4, value, transform=across, va="center", ha="right", weight=bold)
            else:
                common: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center", "weight": bold}
                axes.annotate(shortened(line.title, left - 20), (0, y), (-14, 0), across, **common)
                axes.annotate(value, (1, y), (right - 4, 0), across, **common)
        return as_svg(figure, f"dots-{narrow}", label)


def _front(points: list[tuple[float, float]]) -> list[int]:
    """Points that no other beats: fewer bytes, or a better score; by bytes."""
    front, best = [], -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            front.append(i)
    return front


def _place(at: tuple[float, float], width: float, taken: list[Box], room: Box) -> tuple[Box, str] | None:
    """A free box near a point for a line of text, and how it is aligned; boxes are x0, y0, x1, y1."""
    x, y = at
    for far in (9, 13, 20, 30, 46, 64):
        for dx, dy in ((1, 0), (-1, 0), (1, -1), (1, 1), (-1, 1), (-1, -1), (0, 1), (0, -1)):
            middle = y + dy * far
            start = x + dx * far - (0 if dx > 0 else width if dx < 0 else width / 2)
            box = (start, middle - 8, start + width, middle + 8)
            inside = box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                return box, "left" if dx > 0 else "right" if dx < 0 else "center"
    return None


def _name(
    axes: Axes, lines: Sequence[Line], places: list[Point], front: list[int], taken: list[Box], room: Box
) -> None:
    """Names beside the marks, the more important first; none where there is no room."""

    def rank(i: int) -> tuple[bool, bool, bool, bool]:
        row = lines[i].row
        return not lines[i].chosen, i not in front, row["name"] not in ("base", "experts"), row["single"]

    pixels: dict[str, Any] = {"xycoords": "axes pixels", "textcoords": "axes pixels"}
    for i in sorted(range(len(lines)), key=rank):
        x, y = places[i]
        crowd = sum(abs(u - x) < 8 and abs(v - y) < 60 for u, v in places)
        if all(rank(i)) and crowd > 3:
            continue  # a column of marks: the chart above names each of them
        text = shortened(lines[i].title, 190)
        found = _place(places[i], width_of(text) + 4, taken, room)
        if found is None:
            continue
        (x0, y0, x1, y1), side = found
        if all(rank(i)[:2]) and math.dist((x, y), ((x0 + x1) / 2, (y0 + y1) / 2)) > 130:
            continue  # too far away to be seen as this mark's
        taken.append(found[0])
        end = (min(max(x, x0), x1), min(max(y, y0 + 3), y1 - 3))
        if math.dist((x, y), end) > 14:
            line = {"arrowstyle": "-", "color": MUTED, "linewidth": 1, "shrinkA": 6, "shrinkB": 0}
            axes.annotate("", end, places[i], arrowprops=line, **pixels)
        at = {"left": x0, "right": x1, "center": (x0 + x1) / 2}[side], (y0 + y1) / 2
        axes.annotate(text, at, at, ha=side, va="center", annotation_clip=False, weight=_bold(lines[i]), **pixels)


def tradeoff(
    lines: Sequence[Line], *, unit: float, narrow: bool, label: str, metric: str, name: str = "tradeoff"
) -> str:
    """Normalised score against bytes stored, with the front that no method beats on both.

    Training on all tasks, together or in sequence, is drawn, but not part of the front: it merges nothing.

    Args:
        lines: those without a mean are left out.
        unit: bytes of one model, in which bytes are counted.
        narrow: 320 pixels wide, or 960.
        label: what a screen reader says.
        metric: what the score is.
        name: sets this chart's ids apart from the others' of the page.
    """
    lines = [line for line in lines if line.mean is not None]
    if not lines or unit <= 0:
        return ""
    points = [(line.row["bytes"] / unit, float(line.mean or 0)) for line in lines]
    width, height = (320, 340) if narrow else (960, 420)
    left, right, top, bottom = (46, 10, 10, 46) if narrow else (60, 20, 12, 48)
    plot, rise = width - left - right, height - top - bottom
    low, high = _limits([y for _, y in points])
    high += (high - low) * 0.06
    least, most = min(x for x, _ in points), max(x for x, _ in points)
    log = least > 0 and most > 3 * least
    start, stop = (least / 1.35, most * 1.25) if log else (0.0, max(most * 1.12, 1.5))
    along: Callable[[float], float] = math.log if log else float

    def pixel(x: float, y: float) -> Point:
        return (along(x) - along(start)) / (along(stop) - along(start)) * plot, (y - low) / (high - low) * rise

    with canvas(width, height, left, right, top, bottom) as (figure, axes):
        axes.set(xlim=(start, stop), ylim=(low, high))
        axes.set_xlabel("stored, in sizes of one model" + (" (logarithmic)" if log else ""), labelpad=8)
        if not narrow:
            axes.set_ylabel(f"kept of the experts' {plain(metric)}", labelpad=4)
        axes.locator_params(axis="both", nbins=6)
        if log:
            axes.set_xscale("log")
            ticks = [step * 10.0**power for power in range(-3, 5) for step in (1, 1.5, 2, 3, 4, 6)]
            axes.set_xticks([tick for tick in ticks if start <= tick <= stop])
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{TIMES}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.grid(color=GRID, linewidth=1)
        axes.set_axisbelow(True)
        merges = [line.row["family"] not in ("training", "in sequence") for line in lines]
        front = _front([(x, y) if own else (x, -math.inf) for own, (x, y) in zip(merges, points)])
        steps = [points[i] for i in front]
        if steps:
            steps.append((stop, steps[-1][1]))
            axes.step(*zip(*steps), where="post", color=MUTED, linewidth=1.4, dashes=(5, 3), zorder=1)
        for line, (x, y) in zip(lines, points, strict=True):
            _mark(axes, line, x, y)
        places = [pixel(x, y) for x, y in points]
        radii = [11 if line.chosen else 7 for line in lines]
        taken: list[Box] = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(places, radii)]
        for (x, y), (x_next, y_next) in itertools.pairwise(pixel(x, y) for x, y in steps):
            taken += [(x, y - 1, x_next, y + 1), (x_next - 1, y, x_next + 1, y_next)]
        _name(axes, lines, places, front, taken, (0, 0, plot, rise))
        return as_svg(figure, f"{name}-{narrow}", label)


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Matrix,
    *,
    name: str,
    label: str,
    show: Callable[[float], str],
    across: str,
    diverging: bool = False,
    diagonal: bool = True,
) -> str:
    """A matrix as coloured cells, with its numbers where they fit.

    Args:
        rows, columns: names.
        values: one list a row; `None` leaves a cell empty.
        name: sets this chart's ids apart from the others' of the page.
        label: what a screen reader says.
        show: a value as a few letters.
        across: what stands under columns too many to name.
        diverging: colours on both sides of 0; otherwise from the smallest to the largest value.
        diagonal: whether the diagonal takes part in the scale of the colours.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    table = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    table = table.reshape(len(rows), len(columns))
    seen = table if diagonal else np.where(np.eye(*table.shape, dtype=bool), np.nan, table)
    known = seen[np.isfinite(seen)]
    if not np.isfinite(table).any():
        return ""
    if diverging:
        edge = max(float(np.abs(known).max(initial=0.0)), 1e-9)
        scale, colours = Normalize(-edge, edge, clip=True), colormaps["PuOr"]
    else:
        low, high = float(known.min()), float(known.max())
        scale, colours = Normalize(low - 0.15 * (high - low), max(high, low + 1e-9), clip=True), colormaps["Blues"]
    many = len(columns) > 24
    cell = 5.0 if len(columns) > 80 else 10.0 if many else 27.0 if len(columns) > 8 else 36.0
    font = 11 if cell > 30 else 10
    tall = 26.0 if len(columns) > 8 else 32.0
    left = min(110.0, max(width_of(plain(row)) for row in rows) + 8) + 6
    names = [] if many else [shortened(column, 110) for column in columns]
    bottom = 26 if many else max(width_of(column) for column in names) * 0.72 + 16
    width = left + cell * len(columns) + 16
    height = 4 + tall * len(rows) + bottom
    with canvas(width, height, left, 16, 4, bottom) as (figure, axes):
        if many:
            axes.imshow(scale(table), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="none")
            axes.set_xlabel(across, labelpad=4)
        else:
            grid = np.ma.masked_invalid(table)
            axes.pcolormesh(grid, cmap=colours, norm=scale, edgecolors=PAPER, linewidth=2, clip_on=False)
            axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
            for (i, j), value in np.ndenumerate(table):
                red, green, blue, _ = colours(scale(value))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                text = show(float(value)) if math.isfinite(value) else NOTHING
                ink = MUTED if not math.isfinite(value) else "#14181d" if light else "#ffffff"
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=font, color=ink)
        half = 0.0 if many else 0.5
        axes.set_yticks([i + half for i in range(len(rows))], [shortened(row, 110) for row in rows])
        axes.set_xticks([i + 0.5 for i in range(len(names))], names, rotation=45, ha="right", rotation_mode="anchor")
        for tick in axes.get_yticklabels() + axes.get_xticklabels():
            tick.set_color(INK)
        return as_svg(figure, name, label)
