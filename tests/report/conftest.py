"""Reports with figures like those of the embedded digits, made by `build` from results that nobody ran."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from allrounder.entrants import ENTRANTS
from allrounder.report import build

# name: percent of the experts kept, bytes in models, whether it is one model
KEPT = {
    "base": (41, 1, True), "average": (62, 1, True), "task-arithmetic": (70, 1, True), "ties": (71, 1, True),
    "task-arithmetic-search": (71, 1, True), "dare": (69.5, 1, True), "breadcrumbs": (69, 1, True),
    "slerp": (64, 1, True),
    "fisher": (66, 1, True), "regmean": (90.6, 1, True), "adamerging": (78, 1, True), "adamerging-task": (73, 1, True),
    "adamerging-plus": (79, 1, True), "atlas": (85.4, 1, True), "self-positioning": (75, 1, True),
    "consensus": (72, 1, True), "tall-masks": (98, 1.19, False), "twin-merging": (88, 1.72, False),
    "joint": (97, 1, True), "experts": (100, 6, False),
    "continual/finetune": (74, 1, True), "continual/er": (93, 1, True),
}  # fmt: skip


def make_results(
    tasks: list[str], seeds: list[int], methods: list[str], *, tensors: int = 6, size: int = 101_416
) -> dict[str, dict[int, dict[str, Any]]]:
    draw = random.Random(0)
    expert = {seed: {task: 0.96 + draw.uniform(-0.02, 0.02) for task in tasks} for seed in seeds}
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for name in methods:
        kept, models, single = KEPT[name]
        models = len(tasks) if name == "experts" else models
        for seed in seeds:
            noise = 0 if name == "experts" else draw.gauss(0, 0.8)
            scores = {
                task: min(1.0, expert[seed][task] * (kept + noise + (name != "experts") * draw.gauss(0, 3)) / 100)
                for task in tasks
            }  # fmt: skip
            learned = name in ("adamerging", "adamerging-plus", "atlas", "self-positioning")
            columns = [f"{i // 2}.{('weight', 'bias')[i % 2]}" for i in range(tensors)]
            columns = columns if learned else ["all"] if name == "adamerging-task" else []
            results.setdefault(name, {})[seed] = {
                "scores": scores, "validation": scores, "bytes": int(size * models), "single": single,
                "merge_seconds": draw.uniform(0.002, 4), "note": "scale 0.3" if name == "task-arithmetic" else "",
                "coefficients": {column: [draw.gauss(0.35, 0.2) for _ in tasks] for column in columns},
            }  # fmt: skip
    for name in (name for name in results if name.startswith("continual/")):
        for one in results[name].values():
            values = [[draw.uniform(0.3, 1) if j <= i else None for j in range(len(tasks))] for i in range(len(tasks))]
            one["matrix"] = {"rows": tasks, "columns": tasks, "values": values}
    for seed in seeds:

        def square(one: float, other: float) -> list[list[float]]:
            return [[one if row == column else draw.gauss(other, 0.07) for column in tasks] for row in tasks]

        results["experts"][seed] |= {"cross": square(0.96, 0.4), "cosine": square(1.0, 0.12)}
    if "tall-masks" in results:
        for one in results["tall-masks"].values():
            one["note"] = "thresholds chosen on validation: " + ", ".join(f"{task} 0.4" for task in tasks)
    return results


DIGITS = ["plain", "inverted", "rotated", "noise", "coarse", "shifted"]


@pytest.fixture(scope="session")
def made() -> Any:
    """`made(tasks=..., seeds=..., methods=..., change=..., **recipe)`: a report."""

    def make(
        tasks: list[str] = DIGITS, seeds: int = 3, methods: list[str] | None = None, change: Any = None,
        tensors: int = 6, command: str = "allrounder run --out run", **recipe: Any,
    ) -> dict[str, Any]:  # fmt: skip
        methods = [name for name in ENTRANTS if name in KEPT and ENTRANTS[name].default] if methods is None else methods
        all_seeds = list(range(seeds))
        results = make_results(tasks, all_seeds, methods, tensors=tensors)
        if change:
            change(results)
        steps = [
            {"name": f"score {name} seed {seed}", "seconds": 1.25, "cached": seed == 1}
            for name in methods
            for seed in all_seeds
        ]
        account = {
            "command": command, "device": "cpu", "cores": 2, "started": "2026-01-02T03:04:05+00:00", "steps": steps,
            "seconds": 61.5,
        }  # fmt: skip
        settings = SimpleNamespace(
            all_seeds=all_seeds, seed=0, title="Specialists and one model", suite="digits", base=None
        )
        settings.__dict__.update(recipe)
        return build(settings, tasks, {name: {} for name in methods}, results, account)  # type: ignore[arg-type]

    return make
