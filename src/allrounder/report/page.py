"""`report.html`: one file with everything in it, for a phone, a desk, the dark and paper."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import charts
from .ranking import MINUS, NOTHING, Line, answer, percent, ranking, seconds, size
from .sequences import curves, marks
from .svg import plain

__all__ = ["page", "write"]


def _factor(report: Mapping[str, Any]) -> int:
    """100 when every score lies in -1..1 and reads better in percent, else 1."""
    scores = [value for row in report["methods"] for by_task in row["scores"].values() for value in by_task.values()]
    return 100 if all(-1 <= value <= 1 for value in scores if value is not None) else 1


def _number(value: float | None, factor: int) -> str:
    if value is None:
        return NOTHING
    return f"{value * factor:.1f}" if factor == 100 or abs(value) >= 10 else f"{value:.3g}"


def _hundredths(value: float) -> str:
    """
    >>> _hundredths(0.25), _hundredths(1.5), _hundredths(-0.001)
    ('.25', '1.5', '.00')
    """
    if abs(value) >= 0.995:
        return f"{value:.1f}".replace("-", MINUS)
    text = f"{abs(value):.2f}"[1:]
    return MINUS + text if value < 0 and text != ".00" else text


def _tiles(report: Mapping[str, Any], lines: list[Line]) -> list[tuple[str, str]]:
    """Figure and what it is, for the chosen model."""
    known = {line.row["name"]: line for line in lines}
    best = next((line for line in lines if line.chosen), None)
    if best is None:
        return []
    found = []
    if best.mean is not None:
        found.append((percent(best.mean), f"of the experts' {report['metric']} kept, on test"))
        base = known.get("base")
        if base and base.mean is not None:
            gain = f"{best.mean - base.mean:+.1f}".replace("-", MINUS)
            found.append((gain, "points against the base model"))
    experts = known.get("experts")
    if experts:
        found.append((size(best.row["bytes"]), f"stored, where all experts take {size(experts.row['bytes'])}"))
    return found


def _papers(lines: list[Line]) -> list[dict[str, Any]]:
    """Papers behind the methods, each once, by year and title."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.row["paper"]:
            entry = found.setdefault(line.row["paper"]["arxiv"], line.row["paper"] | {"methods": []})
            entry["methods"].append(line.title)
    return sorted(found.values(), key=lambda paper: (paper["year"], paper["title"]))


def _matrices(report: Mapping[str, Any], factor: int, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    tasks, found = report["tasks"], []
    unit = ", in percent" if factor == 100 else ""

    def add(title: str, text: str, part: Mapping[str, Any], digits: Callable[..., str], **options: Any) -> None:
        rows, columns = part["rows"], part["columns"]
        about = {"name": f"heat-{len(found)}", "label": f"{title}. {text}"}
        drawn = charts.heat(rows, columns, part["values"], **about, **options)
        if drawn:
            few = len(columns) <= 32  # more belong in report.json
            table = [(row, [digits(value) for value in values]) for row, values in zip(rows, part["values"]) if few]
            wide = len(columns) > 12
            found.append(
                {"title": title, "text": text, "svg": Markup(drawn), "columns": columns, "rows": table, "wide": wide}
            )

    def thousandths(value: float | None) -> str:
        return NOTHING if value is None else f"{value:.3f}".replace("-", MINUS)

    def score(value: float) -> str:
        return f"{value * factor:.0f}" if factor == 100 or abs(value) >= 100 else f"{value:.2g}"

    add(
        "Every expert on every task",
        f"Test {report['metric']}{unit}. A row is an expert, a column a task; the diagonal is each expert at home.",
        report["cross"], lambda value: _number(value, factor), show=score, across="the same tasks, in the same order",
    )  # fmt: skip
    if len(tasks) > 1:
        names = report["cosine"]["names"]
        add(
            "How alike the experts' changes are",
            "Cosine between task vectors: 1 is the same direction, 0 unrelated, below 0 opposed. "
            "Colours are scaled to the values off the diagonal.",
            {"rows": names, "columns": names, "values": report["cosine"]["values"]}, thousandths,
            show=_hundredths, across="the same experts, in the same order", diverging=True, diagonal=False,
        )  # fmt: skip
    for learned in report["coefficients"]:
        count = len(learned["columns"])
        over = "one number for each expert" if count == 1 else "each expert's share in each tensor"
        add(
            f"Coefficients that {titles.get(learned['method'], learned['method'])} learned",
            f"With the first seed: {over}. 0 leaves it out, 1 adds its whole change.",
            learned, thousandths, show=_hundredths, across=f"{count} tensors, in the model's order", diverging=True,
        )  # fmt: skip
    return found


def _sequences(report: Mapping[str, Any], factor: int, titles: Mapping[str, str]) -> dict[str, Any] | None:
    """Figures, curves and their legend, where methods learned the tasks one after another."""
    from markupsafe import Markup

    given = report.get("sequences")
    if not given:
        return None
    figures = []
    for i, found in enumerate(given):
        title = titles.get(found["method"], found["method"])
        text = "A row is what had been learned last, a column a task; below the diagonal is what was forgotten."
        svg = charts.heat(
            found["rows"], found["columns"], found["values"], name=f"learned-{i}", label=f"{title}. {text}",
            show=lambda value: f"{value * factor:.0f}" if factor == 100 else f"{value:.2g}", across="the tasks",
        )  # fmt: skip
        figures.append((title, Markup(svg)))
    signs = [(series, sign) for series, _, sign in marks(len(given))]
    return {
        "figures": figures,
        "curves": [(task, Markup(svg)) for task, svg in curves(given, titles, factor=factor)],
        "legend": [(*sign, titles.get(found["method"], found["method"])) for sign, found in zip(signs, given)],
    }


def _smaller(report: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    """The chosen model and what was made of it, and a chart of score against bytes."""
    from markupsafe import Markup

    given = report.get("compressed")
    if not given:
        return None
    of = given["of"] | {
        "family": "reference",
        "single": True,
        "note": "the merged model",
        "paper": None,
        "path": "merged/",
    }
    inner = {"methods": [of, *given["rows"]], "tasks": report["tasks"], "chosen": {"method": of["name"]}}
    lines = ranking(inner)
    told = ", ".join(f"{line.title} {percent(line.mean)} in {size(line.row['bytes'])}" for line in lines)
    charts_of = [
        Markup(charts.tradeoff(lines, unit=of["bytes"], narrow=narrow, metric=metric, label=told, name="smaller"))
        for narrow in (False, True)
    ]
    return {"lines": lines, "charts": charts_of, "of": of}


def page(report: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        report: what `build` gave, or the content of `report.json`.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    lines, factor = ranking(report), _factor(report)
    titles = {line.row["name"]: line.title for line in lines}
    unit = next((line.row["bytes"] for line in lines if line.row["name"] == "base"), 0)
    told = ", ".join(f"{line.title} {percent(line.mean)}" for line in lines if line.mean is not None)
    kept = f"Score kept by each method: {told}"
    cost = f"Score kept against bytes stored, for {len(lines)} methods; the figures are in the table of methods"
    metric = report["metric"]
    drawn = {
        "dots": [charts.dots(lines, narrow=narrow, label=kept) for narrow in (False, True)],
        "tradeoff": [
            charts.tradeoff(lines, unit=unit, narrow=narrow, metric=metric, label=cost) for narrow in (False, True)
        ],
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": percent, "size": size, "seconds": seconds, "plain": lambda text: plain(str(text)),
        "number": lambda value: _number(value, factor),
    }  # fmt: skip
    source = files("allrounder").joinpath("report", "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        ran=report["ran"],
        lines=lines,
        answer=answer(report),
        tiles=_tiles(report, lines),
        charts={name: [Markup(svg) for svg in pair] for name, pair in drawn.items()},
        legend=[(i, *charts.GROUPS[i]) for i in sorted({charts.group(line.row["family"]) for line in lines})],
        matrices=_matrices(report, factor, titles),
        sequences=_sequences(report, factor, titles),
        smaller=_smaller(report, metric),
        papers=_papers(lines),
        unit=unit,
        in_percent=factor == 100,
        groups={line.row["name"]: charts.group(line.row["family"]) for line in lines},
        signs=[sign for _, _, sign in charts.GROUPS],
    )


def write(report: Mapping[str, Any], path: str | Path) -> None:
    """Write the page, whole or not at all.

    Args:
        report: what `build` gave, or the content of `report.json`.
        path: the file, usually `report.html`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(page(report))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
