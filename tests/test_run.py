"""The main job: whole, continued after any interruption, and the same however it is spread out."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

import allrounder as ar
from allrounder.cli import app
from allrounder.data.digits import digits, digits_shape
from allrounder.recipe import load_recipe
from allrounder.run import run

RECIPE = """
tasks: [straight, turned]
seeds: 1
methods: {average: , task-arithmetic: {scale: 0.4}}
"""


def recipe(folder, text=RECIPE):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def scores(report):
    return {method["name"]: method["scores"] for method in report["methods"]}


def times(out):
    """Of finished steps; what is being written has a name that begins with a dot."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "steps").glob("[!.]*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted: its folder and its report."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "out", run(load_recipe(recipe(folder)), folder / "out", jobs=1)


def test_a_run_leaves_a_report_and_a_model(finished):
    out, report = finished
    assert json.loads((out / "report.json").read_text()) == report
    assert "<html" in (out / "report.html").read_text()
    assert {method["name"] for method in report["methods"]} == {"base", "experts", "average", "task-arithmetic"}
    assert report["chosen"]["method"] in ("average", "task-arithmetic")
    suite = digits(seed=0).only(["straight", "turned"])
    model = digits_shape(suite)
    ar.load_weights(model, ar.Checkpoint(out / "merged"))
    assert ar.score(model, suite) == scores(report)[report["chosen"]["method"]]["0"]
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def test_the_chosen_model_is_the_best_on_validation(finished):
    _, report = finished
    means = {
        method["name"]: sum(method["validation"]["0"].values())
        for method in report["methods"]
        if method["family"] != "reference"
    }
    assert report["chosen"]["method"] == max(means, key=means.get)


def test_with_nothing_to_do_nothing_is_done(finished):
    out, report = finished
    before = times(out)
    again = run(load_recipe(recipe(out.parent)), out, jobs=1)
    assert times(out) == before
    assert all(step["cached"] for step in again["ran"]["steps"])
    assert scores(again) == scores(report)


def test_a_changed_recipe_redoes_what_changed(finished, tmp_path):
    out, _ = finished
    before = set(times(out))
    run(load_recipe(recipe(tmp_path, RECIPE.replace("0.4", "0.5"))), out, jobs=1)
    fresh = set(times(out)) - before
    assert [name.split("-0-")[0] for name in fresh if not name.startswith("export")] == ["score-task-arithmetic"]


def test_killed_at_any_moment_it_continues(finished, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "allrounder",
        "run",
        str(recipe(tmp_path)),
        "--out",
        str(out),
        "--jobs",
        "2",
        "--json",
    ]
    kept = {}
    for wanted in (1, 3):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while not (out / "steps").is_dir() or len(times(out)) < wanted:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "report.json").exists()
        assert kept.items() <= times(out).items()
        kept = times(out)
    report = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert kept.items() <= times(out).items()
    assert scores(report) == scores(finished[1])
    assert sum(step["cached"] for step in report["ran"]["steps"]) == len(kept) >= 3


def test_on_a_local_ray_cluster_it_is_the_same(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default, which starves beside other tests
    ray = pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
    try:
        report = run(load_recipe(recipe(tmp_path)), tmp_path / "out", jobs=2, cluster="auto")
    finally:
        ray.shutdown()
    assert scores(report) == scores(finished[1])


def test_given_experts_are_used_and_checked(finished, tmp_path):
    out, report = finished
    expert = next((out / "steps").glob("expert-turned-0-*"))
    text = RECIPE + f"experts: {{turned: {expert}}}\n"
    given = run(load_recipe(recipe(tmp_path, text)), tmp_path / "out", jobs=1)
    assert scores(given) == scores(report)
    ar.save({"other": torch.zeros(2)}, tmp_path / "wrong")
    text = RECIPE + f"experts: {{turned: {tmp_path / 'wrong'}}}\n"
    with pytest.raises(ar.InputError, match="expert 'turned' is not of the base's architecture"):
        run(load_recipe(recipe(tmp_path, text)), tmp_path / "out2", jobs=1)
    with pytest.raises(ar.InputError, match="experts.nobody: no such task; there are straight, turned"):
        run(load_recipe(recipe(tmp_path, RECIPE + "experts: {nobody: x}\n")), tmp_path / "out3", jobs=1)


def test_a_folder_that_another_process_holds_is_refused(tmp_path):
    (tmp_path / "out" / "steps").mkdir(parents=True)
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ar.InputError, match="another process is running in"):
        run(load_recipe(recipe(tmp_path)), tmp_path / "out")


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ar.InputError, match="neither empty nor the folder of an earlier run"):
        run(load_recipe(), tmp_path / "mine")
    with pytest.raises(ar.InputError, match="is a file; give a folder"):
        run(load_recipe(), tmp_path / "mine" / "thesis.tex")
    with pytest.raises(ar.InputError, match="cannot write"):
        run(load_recipe(), tmp_path / "mine" / "thesis.tex" / "out")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "'auto', 'cpu', 'cuda' or 'mps', got 'tpu'"),
        (["none.yaml"], "recipe 'none.yaml' does not exist"),
    ],
)
def test_mistakes_on_the_command_line_leave_nothing(tmp_path, arguments, message):
    command = [sys.executable, "-m", "allrounder", "run", *arguments, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_tasks_that_the_suite_lacks_are_named(tmp_path):
    with pytest.raises(ar.InputError, match="suite 'digits' has no task 'sideways'; it has straight"):
        run(load_recipe(recipe(tmp_path, "tasks: [sideways]")), tmp_path / "out")
    assert CliRunner().invoke(app, ["run", "--seeds", "0"]).exit_code == 2
