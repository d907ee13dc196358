"""Writes README.md of this folder: the tables behind every number quoted, from the JSON files beside it.

    python docs/results/tables.py

`run_*.json` are the reports of `allrounder run`, `real_*.json` come from the programs in `examples/`, `study_*.json`
from `allrounder study --json`, and `bench_*.json` from the programs in `benchmarks/`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NOTES = HERE / "notes"


def load(pattern: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob(pattern))}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def note(name: str) -> str:
    path = NOTES / f"{name}.md"
    return path.read_text().strip() if path.is_file() else ""


def versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())


def run_section(name: str, report: dict[str, Any]) -> str:
    """One table: every method, its share of the experts' scores, and its score on each task."""
    seeds = [str(seed) for seed in report["seeds"]]
    texts = report["metric"] == "inverse perplexity"
    shown = "perplexity" if texts else f"{report['metric']} in percent"
    rows = []
    for method in sorted(report["methods"], key=lambda m: -statistics.fmean(m["mean"].values())):
        scores = [[method["scores"][seed][task] for seed in seeds] for task in report["tasks"]]
        tasks = [statistics.fmean(1 / one if texts else 100 * one for one in found) for found in scores]
        chosen = report["chosen"] and method["name"] == report["chosen"]["method"]
        title = f"**{method['title']}**" if chosen else method["title"]
        kept = spread([method["mean"][seed] for seed in seeds])
        rows.append([title, kept, f"{method['bytes'] / 1e6:,.1f}", *(f"{value:.1f}" for value in tasks)])
    ran = report["ran"]
    return "\n\n".join(
        part
        for part in [
            f"## {report['title']}",
            note(name),
            f"`{ran['command']}`, seeds {', '.join(seeds)}. Kept: test {report['metric']} in percent of the task's own "
            f"expert, mean over tasks, ± standard deviation over seeds. Other columns: {shown}, mean over seeds. "
            "In bold: chosen on validation.",
            table(["method", "kept, %", "stored, MB", *report["tasks"]], rows),
            *compressed_part(report),
            f"{versions(ran['versions'])}; {ran['device']}, {ran['cores']} steps side by side.",
        ]
        if part
    )


def compressed_part(report: dict[str, Any]) -> list[str]:
    """The chosen model and what was made of it."""
    if "compressed" not in report:
        return []
    of = report["compressed"]["of"]
    rows = [
        [
            row["title"],
            spread(list(row["mean"].values())),
            f"{row['bytes'] / 1e3:,.1f}",
            f"{1e3 * row['latency']:.3g}",
            text,
        ]
        for row, text in [(of, "the merged model"), *((row, row["note"]) for row in report["compressed"]["rows"])]
    ]  # fmt: skip
    return ["The chosen model, made smaller:", table(["model", "kept, %", "kB", "one pass, ms", "setting"], rows)]


def real_section(name: str, found: dict[str, Any]) -> str:
    """The tables of an example program."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    parts = [f"## {found['title']}", note(name)]
    for title, rows in found["tables"].items():
        parts += [f"*{title}*", table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])]
    seeds = ", ".join(str(seed) for seed in found["seeds"])
    ran = f"`{found['command']}`, seeds {seeds}; {found['seconds']:.0f} s. {versions(found['versions'])}."
    return "\n\n".join([*parts, " ".join([*(f"{text.rstrip('.')}." for text in found["notes"]), ran])])


def study_sections(found: dict[str, Any]) -> str:
    """One table a paper: each claim, its bound, what each seed measured."""
    parts = ["## Studies: the papers' claims, measured again", note("studies")]
    for slug in dict.fromkeys(study["slug"] for study in found.values()):
        mine = [study for study in found.values() if study["slug"] == slug]
        rows = []
        for claims in zip(*(study["claims"] for study in mine), strict=True):
            figures = [f"{claim['measured']}{'' if claim['holds'] else ' (does not hold)'}" for claim in claims]
            rows.append([claims[0]["text"], claims[0]["expected"], *figures])
        seconds = ", ".join(f"{study['seconds']:.0f}" for study in mine)
        parts += [
            f"### {slug}",
            table(["claim", "expected", *(f"seed {study['seed']}" for study in mine)], rows),
            f"`allrounder study {slug} --scale {mine[0]['scale']} --seed SEED --json`; {seconds} s. "
            f"{versions(mine[0]['versions'])}.",
        ]
    return "\n\n".join(parts)


def bench_sections(found: dict[str, Any]) -> str:
    parts = ["## Speed and memory", note("speed")]
    for name, bench in found.items():
        rows = []
        for row in bench["rows"]:
            low = "" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"
            target = "" if row["target"] is None else f"{'<=' if row['at_most'] else '>='} {row['target']:g}"
            met = {None: "", True: "yes", False: "no"}[row["met"]]
            rows.append([row["what"], f"{row['value']:.3g} {row['unit']}".strip(), low, target, met])
        script = f"benchmarks/{name.removeprefix('bench_')}.py"
        parts += [
            f"### {bench['benchmark']}",
            table(["", "measured", "range over turns", "target", "met"], rows),
            f"`{script}`; {versions(bench['versions'])}; {bench['cores']} cores. {'. '.join(bench['notes'])}.",
        ]
    return "\n\n".join(parts)


def main() -> None:
    parts = ["# Results", note("head")]
    parts += [run_section(name, report) for name, report in load("run_*.json").items()]
    parts += [real_section(name, found) for name, found in load("real_*.json").items()]
    parts.append(study_sections(load("study_*.json")))
    parts.append(bench_sections(load("bench_*.json")))
    text = "\n\n".join(part for part in parts if part)
    (HERE / "README.md").write_text(text.replace("\n\n\n", "\n\n") + "\n")


if __name__ == "__main__":
    main()
