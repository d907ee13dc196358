"""`allrounder run`: base, specialists, every method, scores, report, and the best merged model.

The work is a list of steps, each with one file for its result. So a run that was killed continues where it was,
a run that is finished has nothing to do, and a changed recipe re-does what changed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import InputError
from .recipe import Recipe
from .steps import Step, bench_of, enter, plan, plan_compression, work, write_json

if TYPE_CHECKING:
    from .task import Suite

__all__ = ["run"]

TITLES = {
    "base": "training the base", "expert": "training the specialists", "score": "merging and scoring",
    "merged": "keeping the chosen model", "compress": "making it smaller",
}  # fmt: skip


def _parallel(jobs: int, cluster: str | None, calls: list[Any]) -> Iterable[Any]:
    """Results of joblib calls as they come: in this process, in worker processes, or on a Ray cluster."""
    from joblib import Parallel, parallel_config

    if cluster is None:
        yield from Parallel(n_jobs=min(jobs, max(1, len(calls))), return_as="generator_unordered")(calls)
        return
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise InputError("--cluster needs Ray: pip install 'allrounder[cluster]'") from error
    if not ray.is_initialized():
        try:
            address = None if cluster == "auto" and not os.environ.get("RAY_ADDRESS") else cluster
            ray.init(
                address=address,
                num_cpus=jobs if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise InputError(f"no Ray cluster answers at {cluster!r}; start one or use --cluster auto") from error
    register_ray()
    with parallel_config(backend="ray", n_jobs=jobs):
        yield from Parallel()(calls)


def _device_and_jobs(device: str, jobs: int | None) -> tuple[str, int]:
    from .settings import best_device

    kind = best_device(device).type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return kind, jobs or (cores if kind == "cpu" else 1)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    jobs: int | None = None,
    device: str = "auto",
    cluster: str | None = None,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Do what the recipe says, in a folder that can be continued.

    Args:
        recipe: what to do.
        out: the run's folder: new, empty, or of an earlier run.
        jobs: steps side by side; default: all cores on a CPU, 1 on an accelerator.
        device: `auto`, `cpu`, `cuda` or `mps`.
        cluster: `auto` or the address of a Ray cluster; `out` must be a folder that all its machines see.
        command: what was typed, for the report.
        progress: called with (what is being done, steps done, steps).

    Returns:
        The report, as in `report.json`; `report.html`, `merged/` and, where asked for, `compressed/` stand beside it.

    Raises:
        InputError: when another process holds the folder, or it holds something else.
    """
    from filelock import FileLock, Timeout

    from .settings import make_setting

    out = Path(out).expanduser().absolute()
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "steps").is_dir():
        raise InputError(f"{str(out)!r} is neither empty nor the folder of an earlier run; give another")
    device, jobs = _device_and_jobs(device, jobs)
    progress = progress or (lambda *_: None)
    progress("reading the tasks", 0, 1)
    suite = make_setting(recipe, recipe.seed).suite
    tasks = list(suite)
    if unknown := sorted(set(recipe.experts) - set(tasks)):
        raise InputError(f"the recipe, experts.{unknown[0]}: no such task; there are {', '.join(tasks)}")
    try:
        (out / "steps").mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process is running in {str(out)!r}; wait for it or give another folder") from error
    except OSError as error:
        raise InputError(f"cannot write {str(out)!r} ({error.strerror}); give another folder") from error
    try:
        for left in (out / "steps").glob(".*"):
            left.unlink()
        return _run(recipe, suite, out, jobs, device, cluster, command, progress)
    finally:
        lock.release()


def _run(
    recipe: Recipe, suite: Suite, out: Path, jobs: int, device: str, cluster: str | None, command: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    from .entrants import ENTRANTS
    from .report import build, compressed, write

    tasks = list(suite)
    metric = getattr(next(iter(suite.values())).metric, "__name__", "score").replace("_", " ")
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    asked = recipe.methods or {name: {} for name, entrant in ENTRANTS.items() if entrant.default}
    methods = {name: {} for name in ("base", "experts") if name not in asked} | asked
    stages = plan(recipe, tasks, methods)
    steps = [step for stage in stages for step in stage]
    text = recipe.model_dump_json()
    threads = 1 if jobs > 1 or cluster else max(1, jobs)
    done, log, cached = 0, [], []

    def carry_out(stage: list[Step]) -> None:
        nonlocal done
        todo = [step for step in stage if not (out / "steps" / step.file).is_file()]
        cached.extend(step for step in stage if step not in todo)
        done += len(stage) - len(todo)
        if not todo:
            return
        from joblib import delayed

        progress(TITLES[stage[0].kind], done, len(steps))
        for step, seconds in _parallel(
            jobs, cluster, [delayed(work)(text, step, steps, out, device, threads) for step in todo]
        ):
            done += 1
            log.append({"name": step.title, "seconds": seconds})
            progress(TITLES[step.kind], done, len(steps))

    for stage in stages:
        carry_out(stage)
    results = {
        name: {
            step.seed: json.loads((out / "steps" / step.file).read_text()) for step in stages[2] if step.name == name
        }
        for name in methods
    }  # fmt: skip
    report = build(recipe, tasks, methods, results, {}, metric=metric)
    previous = out / "report.json"
    before = json.loads(previous.read_text())["ran"]["seconds"] if previous.is_file() else None

    def publish() -> None:
        seconds = round(time.perf_counter() - clock, 1) if log or before is None else before
        report["ran"] |= {
            "command": command, "device": device, "cores": jobs, "started": started, "seconds": seconds,
            "steps": [entry | {"seconds": round(entry["seconds"], 2), "cached": False} for entry in log]
            + [{"name": step.title, "seconds": 0.0, "cached": True} for step in cached],
        }  # fmt: skip
        write_json(out / "report.json", report)
        write(report, out / "report.html")

    progress("writing the best model", done, len(steps))
    if report["chosen"]:
        _export(recipe, report, stages, out, device)
    if recipe.compress and not report["chosen"]:
        report["notes"].append("Nothing was compressed: no merging method gave a single model to choose.")
    publish()
    if recipe.compress and report["chosen"]:
        more = plan_compression(recipe, stages[2], report["chosen"]["method"])
        steps += [step for stage in more for step in stage]
        for stage in more:
            carry_out(stage)
        smaller = {
            name: {
                step.seed: json.loads((out / "steps" / step.file).read_text()) for step in more[1] if step.name == name
            }
            for name in recipe.compress
        }
        report["compressed"] = compressed(recipe, report, smaller)
        for step in more[1]:
            if step.seed == recipe.seed:
                _place(out, step)
        publish()
    progress("done", len(steps), len(steps))
    return report


def _place(out: Path, step: Step) -> None:
    """Set the step's model to `compressed/NAME`, unless it stands there already."""
    target, marker = out / "compressed" / step.name, out / "compressed" / f".{step.name}"
    if marker.is_file() and marker.read_text() == step.fingerprint and target.is_dir():
        return
    target.parent.mkdir(exist_ok=True)
    fresh = target.with_name(f".{step.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(out / "steps" / Path(step.file).stem, fresh)
    marker.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(fresh, target)
    marker.write_text(step.fingerprint)


def _export(recipe: Recipe, report: dict[str, Any], stages: list[list[Step]], out: Path, device: str) -> None:
    """Write the chosen model's weights for the first seed, unless they stand there already."""
    from .saving import save

    name = report["chosen"]["method"]
    step = next(step for step in stages[2] if step.name == name and step.seed == recipe.seed)
    marker = out / "steps" / f"export-{step.fingerprint}.json"
    target = out / "merged"
    if marker.is_file() and target.is_dir():
        return
    bench, setting = bench_of(recipe, recipe.seed, [step for stage in stages for step in stage], out, device)
    weights: Any = enter(bench, name, step.options).weights
    complete = getattr(bench.model.backbone, "checkpoint", None)
    if complete is not None:
        weights = complete(weights)
    else:
        heads = {key: value for key, value in bench.model.state_dict().items() if key.startswith("heads.")}
        weights = {f"backbone.{key}": weights[key] for key in weights} | heads
    fresh = out / f".merged.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    save(weights, fresh, like=setting.files, metadata={"method": name, "made-by": f"allrounder {__version__}"})
    shutil.rmtree(target, ignore_errors=True)
    os.rename(fresh, target)
    for old in (out / "steps").glob("export-*.json"):
        old.unlink()
    write_json(marker, {"method": name})
