"""Matplotlib drawings as SVG to set into a page.

Colours stand for the page's CSS variables (`--ink`, `--grid`, ...), so that one drawing serves light, dark and
print. Text stays text, in the page's font; names are never read as mathematics. The same figures give the same
bytes, whatever the user's matplotlibrc says, and matplotlib's settings are left as they were.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GRID", "INK", "MUTED", "PAPER", "SERIES", "as_svg", "canvas", "plain", "shortened", "width_of"]

# Colours that become CSS variables: no drawing uses them otherwise.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#010001", "#020002", "#030003", "#040004", "#050005")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"series-{i}" for i, colour in enumerate(SERIES)
}  # fmt: skip
FONT = 12.0
FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what XML cannot hold


def plain(text: str) -> str:
    """The text on one line, without characters that XML forbids."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def width_of(text: str, size: float = FONT) -> float:
    """About how wide a text is, in pixels, on the generous side."""
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.58 for letter in text)


def shortened(text: str, width: float, size: float = FONT) -> str:
    """The text, cut with an ellipsis where it would be wider than `width` pixels."""
    text = plain(text)
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _slim(text: str) -> str:
    """The drawing with the page's variables for colours, and without what a page does not need."""
    kept = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    unnamed, out = [], []
    for part in re.split(r"(<[^>]+>)", text):
        if not part.startswith("<"):
            out.append(part if out and out[-1].startswith(("<text", "<tspan")) else part.strip())
            continue
        tag = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in kept else "", part)
        tag = re.sub(r"#0[1-5]0[0-5]0[1-5]", lambda found: f"var(--{VARIABLES[found[0]]})", tag)
        tag = re.sub(r" ?font-family: [^;\"]*;?| transform=\"rotate\(-?0 [^)]*\)\"", "", tag)
        tag = re.sub(r"-?\b\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag)
        if tag.startswith("<path"):
            tag = " ".join(tag.split()).replace(' "', '"')
        if tag == "<g/>":
            continue
        if tag.startswith("<g") and not tag.endswith("/>"):
            unnamed.append(tag == "<g>")
        if tag == "<g>" or (tag == "</g>" and unnamed.pop()):
            continue
        out.append(tag)
    return "".join(out)


def as_svg(figure: Figure, name: str, label: str) -> str:
    """The drawing as an `svg` element.

    Args:
        figure: from `canvas`, inside its context.
        name: sets this drawing's ids apart from the others' of the page.
        label: what a screen reader says.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with rc_context({"svg.hashsalt": name}), io.StringIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's own font lacks; the page's font has them
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    text = _slim(text)
    width, height = (float(value) for value in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(plain(label))}" viewBox="0 0 {width:g} {height:g}" style="--width: {width:g}px">'
    )
    return root + text[text.index(">") + 1 :]


@contextmanager
def canvas(
    width: float, height: float, left: float, right: float, top: float, bottom: float
) -> Iterator[tuple[Any, Axes]]:
    """A figure whose unit is a CSS pixel, with one pair of axes; margins in pixels."""
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure

    with rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rcdefaults()  # the drawing must not depend on the user's matplotlibrc
        own: Any = {
            "svg.fonttype": "none", "text.parse_math": False, "font.size": FONT, "text.color": INK,
            "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.facecolor": "none",
            "axes.labelsize": FONT, "xtick.labelsize": FONT, "ytick.labelsize": FONT,
        }  # fmt: skip
        rcParams.update(own)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        axes = figure.add_axes(box)
        axes.tick_params(length=0, pad=6)
        for side in axes.spines.values():
            side.set_visible(False)
        yield figure, axes
