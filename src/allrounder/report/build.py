"""From the results of a run to the report that is written, drawn and printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..catalogue import papers
from ..entrants import ENTRANTS
from ..scoring import mean, normalised
from ..study import versions

if TYPE_CHECKING:
    from ..recipe import Recipe

__all__ = ["build", "compressed"]

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]

MERGES = ("data-free", "unlabelled", "labelled", "keeps every task", "chooses per input")
NEEDS = {
    "reference": "nothing",
    "training": "all training data",
    "in sequence": "training data, task by task",
    "data-free": "no data",
    "unlabelled": "unlabelled data",
    "labelled": "labelled data",
    "keeps every task": "labelled data",
    "chooses per input": "data sorted by task",
}
# Methods that stand in the catalogue under another paper are cited by their own: title, authors, venue, year, arXiv.
OWN_PAPERS = {
    "average": ("Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
                "inference time", "Wortsman, Mitchell and others", "ICML", 2022, "2203.05482"),
    "ties": ("TIES-Merging: Resolving Interference When Merging Models",
             "Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit",
             "NeurIPS", 2023, "2306.01708"),
    "dare": ("Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
             "Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin", "ICML", 2024, "2311.03099"),
    "breadcrumbs": ("Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
                    "Davari, MohammadReza and Belilovsky, Eugene", "ECCV", 2024, "2312.06795"),
    "fisher": ("Merging Models with Fisher-Weighted Averaging", "Matena, Michael and Raffel, Colin",
               "NeurIPS", 2022, "2111.09832"),
    "regmean": ("Dataless Knowledge Fusion by Merging Weights of Language Models",
                "Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang",
                "ICLR", 2023, "2212.09849"),
}  # fmt: skip


def _paper(name: str, slug: str) -> dict[str, Any] | None:
    if not slug:
        return None
    found = papers()[slug]
    own = OWN_PAPERS.get(name, (found.title, found.authors, found.venue, found.year, found.arxiv))
    return {"slug": slug} | dict(zip(("title", "authors", "venue", "year", "arxiv"), own, strict=True))


def _finite(content: Any) -> Any:
    """The same nest with `None` for what is no number: JSON has no NaN."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _shares(scores: Mapping[str, float], experts: Mapping[str, float]) -> tuple[dict[str, float | None], float | None]:
    """Normalised scores and their mean, over the tasks whose expert scores above 0."""
    counted = [task for task in scores if 0 < experts[task] < math.inf]
    found = normalised({task: scores[task] for task in counted}, experts)
    shares = {task: _finite(found.get(task)) for task in scores}
    whole = bool(counted) and all(shares[task] is not None for task in counted)
    return shares, mean(found) if whole else None


def _choose(results: Results) -> str | None:
    """The single merged model with the best mean validation score; the first, when they tie."""
    merged = {
        name: fmean(mean(one["validation"]) for one in by_seed.values())
        for name, by_seed in results.items()
        if ENTRANTS[name].family in MERGES and all(one["single"] for one in by_seed.values())
    }
    return max((name for name in merged if math.isfinite(merged[name])), key=lambda name: merged[name], default=None)


def _warnings(results: Results) -> list[str]:
    """What is missing in the report, and why."""
    notes = []
    for seed, one in results["experts"].items():
        for task, value in one["scores"].items():
            if not 0 < value < math.inf:
                what = f"The expert of {task} scores {value:g} with seed {seed}, of which a share means nothing"
                notes.append(f"{what}: the task is left out of that seed's means.")
    for name, by_seed in results.items():
        broken = {task for one in by_seed.values() for task, value in one["scores"].items() if not math.isfinite(value)}
        if broken and name != "experts":
            tasks = ", ".join(sorted(broken))
            notes.append(f"{ENTRANTS[name].title} has no score on {tasks} (not a number), and so no mean.")
    return notes


def build(
    recipe: Recipe,
    tasks: list[str],
    methods: Mapping[str, Mapping[str, Any]],
    results: Results,
    account: dict[str, Any],
    *,
    metric: str = "accuracy",
) -> dict[str, Any]:
    """The report of a run, JSON-ready; its form is described in `allrounder.report`.

    Args:
        recipe: what was asked for.
        tasks: names of the tasks.
        methods: name -> options.
        results: method -> seed -> what the step gave.
        account: command, device, cores, started, steps.
        metric: what the scores are, in a word.
    """
    experts = results["experts"]
    rows = []
    for name, options in methods.items():
        entrant, by_seed = ENTRANTS[name], results[name]
        shares = {str(seed): _shares(one["scores"], experts[seed]["scores"]) for seed, one in by_seed.items()}
        notes = dict.fromkeys(one["note"] for one in by_seed.values() if one["note"])
        rows.append(
            {
                "name": name,
                "title": entrant.title,
                "family": entrant.family,
                "needs": NEEDS[entrant.family],
                "single": all(one["single"] for one in by_seed.values()),
                "options": dict(options),
                "paper": _paper(name, entrant.paper),
                "scores": {str(seed): dict(one["scores"]) for seed, one in by_seed.items()},
                "validation": {str(seed): dict(one["validation"]) for seed, one in by_seed.items()},
                "normalised": {seed: share for seed, (share, _) in shares.items()},
                "mean": {seed: value for seed, (_, value) in shares.items()},
                "bytes": int(fmean(one["bytes"] for one in by_seed.values())),
                "seconds": round(fmean(one["merge_seconds"] for one in by_seed.values()), 3),
                "note": " / ".join(notes),
            }
        )
    chosen = _choose(results)

    def over_seeds(key: str) -> list[list[float]]:
        tables = [one[key] for one in experts.values()]
        return [[fmean(values) for values in zip(*table, strict=True)] for table in zip(*tables, strict=True)]

    learned = {name: results[name][recipe.seed].get("coefficients") for name in methods}
    given = {name: [one.get("matrix") for one in results[name].values()] for name in methods}
    matrices: dict[str, list[Any]] = {name: found for name, found in given.items() if all(found)}
    report: dict[str, Any] = {
        "title": recipe.title,
        "suite": recipe.suite,
        "base": recipe.base or f"made for the suite {recipe.suite!r}",
        "metric": metric,
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
        "coefficients": [
            {
                "method": name,
                "rows": tasks,
                "columns": list(found),
                "values": [list(row) for row in zip(*found.values(), strict=True)],
            }
            for name, found in learned.items()
            if found
        ],
        "sequences": [
            {
                "method": name,
                "rows": found[0]["rows"],
                "columns": found[0]["columns"],
                "values": [
                    [None if None in values else fmean(values) for values in zip(*rows, strict=True)]
                    for rows in zip(*(one["values"] for one in found), strict=True)
                ],
            }
            for name, found in matrices.items()
        ],
        "ran": {"versions": versions(), **account},
        "notes": [
            "Methods learn on the training splits, choose on validation and are reported on test.",
            "Bytes count the shared weights and what a method keeps beside them; heads are the same for all.",
            "Dynamic logit fusion needs a second, smaller model and has a study: allrounder study logit-fusion.",
            *_warnings(results),
        ],
    }
    return _finite(report)


def compressed(recipe: Recipe, report: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """What became of the chosen model, JSON-ready, beside the model itself; see `allrounder.report`."""
    from ..compressors import COMPRESSORS

    experts = next(row for row in report["methods"] if row["name"] == "experts")["scores"]
    merged = next(row for row in report["methods"] if row["name"] == report["chosen"]["method"])
    rows = []
    for name, by_seed in results.items():
        shares = {str(seed): _shares(one["scores"], experts[str(seed)]) for seed, one in by_seed.items()}
        rows.append(
            {
                "name": name,
                "title": COMPRESSORS[name].title,
                "family": "labelled",
                "single": True,
                "options": dict(recipe.compress[name]),
                "paper": _paper(name, COMPRESSORS[name].paper),
                "scores": {str(seed): dict(one["scores"]) for seed, one in by_seed.items()},
                "mean": {seed: value for seed, (_, value) in shares.items()},
                "bytes": int(fmean(one["bytes"] for one in by_seed.values())),
                "latency": fmean(one["latency"] for one in by_seed.values()),
                "seconds": round(fmean(one["seconds"] for one in by_seed.values()), 3),
                "note": " / ".join(dict.fromkeys(one["note"] for one in by_seed.values() if one["note"])),
                "path": f"compressed/{name}/",
            }
        )
    latency = fmean(one["merged_latency"] for by_seed in results.values() for one in by_seed.values())
    of = {key: merged[key] for key in ("name", "title", "mean", "scores", "bytes")} | {"latency": latency}
    return _finite({"of": of, "rows": rows})
