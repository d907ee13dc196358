import json
import math
from statistics import fmean

import pytest

FEW = ["base", "experts", "average", "regmean", "tall-masks", "adamerging", "adamerging-task"]


def rows(report):
    return {row["name"]: row for row in report["methods"]}


def test_report_is_json_and_means_are_means_of_ratios(made):
    report = json.loads(json.dumps(made(methods=FEW), allow_nan=False))
    found = rows(report)
    assert list(found) == FEW
    for row in found.values():
        for seed in ("0", "1", "2"):
            experts = found["experts"]["scores"][seed]
            ratios = [100 * row["scores"][seed][task] / experts[task] for task in report["tasks"]]
            assert row["mean"][seed] == pytest.approx(fmean(ratios), rel=1e-12)
            assert list(row["normalised"][seed].values()) == pytest.approx(ratios, rel=1e-12)
    assert [found[name]["single"] for name in FEW] == [True, False, True, True, False, True, True]
    assert found["tall-masks"]["needs"] == "labelled data"
    assert found["average"]["needs"] == "no data"


def test_chosen_on_validation_among_single_merged_models(made):
    def change(results):
        for seed in results["average"]:
            results["average"][seed]["validation"] = dict.fromkeys(results["average"][seed]["scores"], 0.99)
            results["regmean"][seed]["validation"] = dict.fromkeys(results["average"][seed]["scores"], 0.98)
            results["base"][seed]["validation"] = dict.fromkeys(results["average"][seed]["scores"], 1.0)

    report = made(methods=FEW, change=change)
    assert report["chosen"]["method"] == "average"  # not the better on test, not the base, not TALL-masks
    assert report["chosen"]["validation"] == pytest.approx(0.99)
    assert report["chosen"]["test"] == pytest.approx(
        fmean(fmean(scores.values()) for scores in rows(report)["average"]["scores"].values())
    )
    assert made(methods=["base", "experts", "tall-masks"])["chosen"] is None


def test_a_method_that_fails_in_one_seed_is_not_one_model(made):
    def change(results):
        results["regmean"][1]["single"] = False

    report = made(methods=FEW, change=change)
    assert report["chosen"]["method"] == "adamerging"
    assert not rows(report)["regmean"]["single"]


def test_expert_at_zero_leaves_its_task_out_of_that_seed(made):
    def change(results):
        results["experts"][1]["scores"]["noise"] = 0.0

    report = made(methods=FEW, change=change)
    average = rows(report)["average"]
    assert average["normalised"]["1"]["noise"] is None
    assert average["normalised"]["0"]["noise"] is not None
    others = [value for task, value in average["normalised"]["1"].items() if task != "noise"]
    assert average["mean"]["1"] == pytest.approx(fmean(others))
    assert any("noise scores 0 with seed 1" in note for note in report["notes"])
    assert len(made(methods=FEW)["notes"]) == 3


def test_no_expert_above_zero_gives_no_mean(made):
    def change(results):
        results["experts"][0]["scores"]["plain"] = 0.0

    report = made(tasks=["plain"], seeds=1, methods=FEW, change=change)
    assert {row["mean"]["0"] for row in report["methods"]} == {None}
    assert report["chosen"]["method"] == "regmean"


def test_nan_is_null_has_no_mean_and_is_never_chosen(made):
    def change(results):
        for which in ("scores", "validation"):
            results["regmean"][0][which] = results["regmean"][0]["scores"] | {"plain": math.nan}
        results["experts"][0]["cosine"][0][1] = math.inf

    report = made(methods=FEW, change=change)
    json.dumps(report, allow_nan=False)
    regmean = rows(report)["regmean"]
    assert regmean["scores"]["0"]["plain"] is None
    assert regmean["mean"]["0"] is None
    assert regmean["mean"]["1"] is not None
    assert report["cosine"]["values"][0][1] is None
    assert report["chosen"]["method"] == "adamerging"
    assert any(note.startswith("RegMean has no score on plain") for note in report["notes"])


def test_coefficients_of_every_method_that_learned_some(made):
    report = made(methods=FEW)
    learned = {entry["method"]: entry for entry in report["coefficients"]}
    assert list(learned) == ["adamerging", "adamerging-task"]
    layers = learned["adamerging"]
    assert len(layers["values"]) == len(layers["rows"]) == 6
    assert {len(row) for row in layers["values"]} == {len(layers["columns"])} == {6}
    assert learned["adamerging-task"]["columns"] == ["all"]


def test_each_method_is_cited_by_its_own_paper(made):
    found = rows(made(methods=["base", "experts", "ties", "regmean", "adamerging"]))
    assert found["base"]["paper"] is None
    assert found["ties"]["paper"]["arxiv"] == "2306.01708"
    assert found["regmean"]["paper"]["arxiv"] == "2212.09849"
    assert found["adamerging"]["paper"] == {
        "slug": "adamerging", "title": "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        "authors": found["adamerging"]["paper"]["authors"], "venue": "ICLR", "year": 2024, "arxiv": "2310.02575",
    }  # fmt: skip


def test_learners_in_sequence_bring_their_matrix_and_are_never_the_chosen_merge(made):
    report = made(methods=["base", "experts", "average", "continual/er", "continual/finetune"])
    assert [entry["method"] for entry in report["sequences"]] == ["continual/er", "continual/finetune"]
    values = report["sequences"][0]["values"]
    assert [[value is None for value in row] for row in values] == [[j > i for j in range(6)] for i in range(6)]
    assert all(0.3 <= value <= 1 for row in values for value in row if value is not None)
    assert report["chosen"]["method"] == "average"
    assert rows(report)["continual/er"]["needs"] == "training data, task by task"
    assert made(methods=FEW)["sequences"] == []
