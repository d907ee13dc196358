"""Which preference loss is above which, for every model at once: the lattice of losses and its picture.

If top_1 is within top_2 and bottom_2 within bottom_1, then WMC(top_1) <= WMC(top_2) and WMC(bottom_1) >= WMC(bottom_2)
whatever the probabilities, so rho_1 <= rho_2 and, for every link that falls with rho (log, margin, hinge), loss 1 is at
least loss 2. The condition is sufficient; losses it does not order may still be ordered by numbers.

Use it to place a new loss among the known ones: above is stricter, below easier to satisfy, and two names in one node
are one loss. Cost: comparisons of at most 16 worlds.

Paper: Richardson, Srikumar and Sabharwal, "Understanding the Logic of Direct Preference Alignment through Logic",
ICML 2025, arXiv 2412.17696.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import pairwise, product

from ..errors import InputError
from .preference_logic import STRUCTURES, Structure, _structure
from .preference_text import World, simplest, worlds

__all__ = ["entails", "lattice", "lattice_svg"]

Sets = tuple[frozenset[World], frozenset[World]]


def entails(first: Structure | str, second: Structure | str) -> bool:
    """Whether the first loss is at least the second for all probabilities, by their worlds.

    Args:
        first, second: structures, names of known losses, or core formulas as text.

    >>> entails("cpo", "ccpo"), entails("ccpo", "cpo"), entails("cpo", "orpo")
    (True, False, False)
    """
    return _above(_sets(first), _sets(second))


def lattice(losses: Mapping[str, Structure | str] | None = None) -> list[tuple[str, str]]:
    """Edges `(above, below)` of the order without those that follow from others (the Hasse diagram).

    Args:
        losses: name -> structure. Default: the known losses without a reference. Losses with the same worlds become
            one node, named `a = b`.

    >>> lattice({"CPO": "cpo", "ORPO": "orpo", "mine": Structure("L >> W", "W | L")})
    [('CPO', 'mine'), ('ORPO', 'mine')]
    """
    nodes = _nodes(losses)
    pairs = {(a, b) for a, b in product(nodes, nodes) if a != b and _above(nodes[a], nodes[b])}
    return sorted((a, b) for a, b in pairs if not any((a, c) in pairs and (c, b) in pairs for c in nodes))


def lattice_svg(losses: Mapping[str, Structure | str] | None = None) -> str:
    """The lattice as an SVG picture: stricter losses above, each with its top / bottom formula.

    Args:
        losses: as for `lattice`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    nodes, edges = _nodes(losses), lattice(losses)
    labels = {name: _ratio_text(sets) for name, sets in nodes.items()}
    rows, lines = _rows(list(nodes), edges)
    width = {name: 0.13 * max(len(name) * 1.15, len(labels[name])) + 0.4 for name in nodes}  # inches
    total = max(sum(width.get(name, 0) + 0.4 for name in row) for row in rows)
    place: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        x = (total - sum(width.get(name, 0) + 0.4 for name in row)) / 2
        for name in row:
            place[name] = (x + width.get(name, 0) / 2 + 0.2, -1.2 * level)
            x += width.get(name, 0) + 0.4
    height = 1.2 * (len(rows) - 1) + 1.0
    settings = {"svg.fonttype": "none", "svg.hashsalt": "lattice", "text.parse_math": False, "font.size": 11}
    with rc_context(settings), io.StringIO() as file:  # type: ignore[arg-type]
        figure = Figure(figsize=(total, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, total), ylim=(0.5 - height, 0.5))
        axes.set_axis_off()
        for line in lines:
            points = [(place[name][0], place[name][1] + side) for name in line for side in (0.33, -0.33)][1:-1]
            axes.plot(*zip(*points), color="#777777", linewidth=1.2, zorder=1)
        for name in nodes:
            (x, y), size = place[name], width[name]
            box = Rectangle((x - size / 2, y - 0.33), size, 0.66, facecolor="#f4f6fa", edgecolor="#33507a", zorder=2)
            axes.add_patch(box)
            axes.text(x, y + 0.12, name, ha="center", va="center", weight="bold", color="#1a1a1a", zorder=3)
            axes.text(x, y - 0.14, labels[name], ha="center", va="center", color="#444444", zorder=3)
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
        return file.getvalue()


def _sets(structure: Structure | str) -> Sets:
    """Top and bottom as worlds of four propositions, so that all losses can be compared."""
    found = _structure(structure)
    if found.size == 4:
        return found.top, found.bottom
    rest = worlds(2)
    return (
        frozenset(own + other for own, other in product(found.top, rest)),
        frozenset(own + other for own, other in product(found.bottom, rest)),
    )


def _above(first: Sets, second: Sets) -> bool:
    return first[0] <= second[0] and second[1] <= first[1]


def _nodes(losses: Mapping[str, Structure | str] | None) -> dict[str, Sets]:
    if losses is None:
        losses = {name: structure for name, structure in STRUCTURES.items() if structure.size == 2}
    if not losses:
        raise InputError("a lattice needs at least one loss")
    same: dict[Sets, list[str]] = {}
    for name, structure in losses.items():
        same.setdefault(_sets(structure), []).append(name)
    return {" = ".join(names): sets for sets, names in same.items()}


def _ratio_text(sets: Sets) -> str:
    top, bottom = (simplest(side, 4) for side in sets)
    return f"{top}  :  {bottom}"


def _rows(names: list[str], edges: list[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the picture, a node as far down as the longest way to it, and each edge as the places it goes through.

    An edge that skips rows gets a place of its own in each of them, so that it does not run behind a node.
    """
    depth = dict.fromkeys(names, 0)
    for _ in names:
        for above, below in edges:
            depth[below] = max(depth[below], depth[above] + 1)
    rows = [[name for name in names if depth[name] == level] for level in range(max(depth.values()) + 1)]
    lines = []
    for above, below in edges:
        bends = [f"{above}\n{below}\n{level}" for level in range(depth[above] + 1, depth[below])]
        for level, bend in enumerate(bends, depth[above] + 1):
            rows[level].append(bend)
        lines.append([above, *bends, below])
    steps = [step for line in lines for step in pairwise(line)]
    at: dict[str, float] = {}
    for row in rows:  # in the order of the neighbours above, so that fewer edges cross
        over = {name: [at[a] for a, b in steps if b == name] for name in row}
        row.sort(key=lambda name: sum(over[name]) / len(over[name]) if over[name] else 0.5)
        at.update({name: (i + 0.5) / len(row) for i, name in enumerate(row)})
    return rows, lines
