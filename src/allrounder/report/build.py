"""From the results of a run to the report that is written, drawn and printed."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..catalogue import papers
from ..entrants import ENTRANTS
from ..score import mean, normalised
from ..study import versions

if TYPE_CHECKING:
    from ..recipe import Recipe

__all__ = ["build"]

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def _paper(slug: str) -> dict[str, Any] | None:
    if not slug:
        return None
    found = papers()[slug]
    return {"slug": slug, "title": found.title, "year": found.year, "arxiv": found.arxiv}


def _choose(results: Results) -> str | None:
    """The single merged model with the best mean validation score; the first, when they tie."""
    merged = [
        name for name, by_seed in results.items()
        if ENTRANTS[name].family not in ("reference", "training") and all(one["single"] for one in by_seed.values())
    ]  # fmt: skip
    return max(merged, key=lambda name: fmean(mean(one["validation"]) for one in results[name].values()), default=None)


def build(
    recipe: Recipe,
    tasks: list[str],
    methods: Mapping[str, Mapping[str, Any]],
    results: Results,
    account: dict[str, Any],
) -> dict[str, Any]:
    """The report of a run, JSON-ready; its form is described in `allrounder.report`.

    Args:
        recipe: what was asked for.
        tasks: names of the tasks.
        methods: name -> options.
        results: method -> seed -> what the step gave.
        account: command, device, cores, started, steps.
    """
    experts = results["experts"]
    rows = []
    for name, options in methods.items():
        entrant, by_seed = ENTRANTS[name], results[name]
        scores = {str(seed): dict(one["scores"]) for seed, one in by_seed.items()}
        notes = dict.fromkeys(one["note"] for one in by_seed.values() if one["note"])
        rows.append(
            {
                "name": name,
                "title": entrant.title,
                "family": entrant.family,
                "options": dict(options),
                "paper": _paper(entrant.paper),
                "scores": scores,
                "validation": {str(seed): dict(one["validation"]) for seed, one in by_seed.items()},
                "normalised": {
                    str(seed): normalised(one["scores"], experts[seed]["scores"]) for seed, one in by_seed.items()
                },
                "bytes": int(fmean(one["bytes"] for one in by_seed.values())),
                "seconds": round(fmean(one["merge_seconds"] for one in by_seed.values()), 3),
                "note": next(iter(notes), "") if len(notes) == 1 else " / ".join(notes),
            }
        )
    chosen = _choose(results)

    def over_seeds(key: str) -> list[list[float]]:
        tables = [one[key] for one in experts.values()]
        return [[fmean(values) for values in zip(*table, strict=True)] for table in zip(*tables, strict=True)]

    report: dict[str, Any] = {
        "title": recipe.title,
        "suite": recipe.suite,
        "base": recipe.base or f"made for the suite {recipe.suite!r}",
        "seeds": recipe.all_seeds,
        "tasks": tasks,
        "chosen": chosen
        and {
            "method": chosen,
            "validation": fmean(mean(one["validation"]) for one in results[chosen].values()),
            "test": fmean(mean(one["scores"]) for one in results[chosen].values()),
            "path": "merged/",
        },
        "methods": rows,
        "cross": {"rows": tasks, "columns": tasks, "values": over_seeds("cross")},
        "cosine": {"names": tasks, "values": over_seeds("cosine")},
        "ran": {"versions": versions(), **account},
        "notes": [
            "Methods learn on the training splits, choose on validation and are reported on test.",
            "Bytes count the shared weights and what a method keeps beside them; heads are the same for all.",
            "Dynamic logit fusion needs a second, smaller model and is measured by its study: allrounder study logit-fusion.",
        ],
    }
    learned = chosen and results[chosen][recipe.seed]["coefficients"]
    if learned:
        report["coefficients"] = {
            "rows": tasks, "columns": list(learned), "values": [list(row) for row in zip(*learned.values(), strict=True)],
        }  # fmt: skip
    return report
