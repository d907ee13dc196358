"""`allrounder run`: base, specialists, every method, scores, report, and the best merged model.

The work is a list of steps. A step is named by what it does and a fingerprint of all that it depends on; its
result is one file in `OUT/steps`, written whole or not at all. So a run that was killed continues where it
was, a run that is finished has nothing to do, and a changed recipe re-does what changed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import InputError
from .recipe import Recipe

if TYPE_CHECKING:
    from .task import Suite

__all__ = ["run"]

VERSION = "1"  # of the steps' meaning: raise it when a method's result changes


@dataclass(frozen=True)
class Step:
    """One piece of work: `kind` is base, expert, score (of a method) or export."""

    kind: str
    seed: int
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name} seed {self.seed}".replace("  ", " ")

    @property
    def file(self) -> str:
        label = "-".join(part for part in (self.kind, self.name.replace("/", "."), str(self.seed)) if part)
        return f"{label}-{self.fingerprint}" + (".safetensors" if self.kind in ("base", "expert") else ".json")


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()[:12]


def _identity(source: str | None) -> Any:
    """What a file or folder is now: names, sizes and times of its files."""
    if source is None or not Path(source).exists():
        return source
    path = Path(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [source, [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def _data(recipe: Recipe, tasks: list[str]) -> Any:
    """What the files of the tasks are now, in suites that read a data folder."""
    if recipe.suite not in ("images", "text"):
        return None
    folder = Path(recipe.data or os.environ["ALLROUNDER_DATA"]).expanduser()
    names = sorted({task.partition("/")[0] for task in tasks})
    return [_identity(str(path)) for name in names for path in sorted(folder.glob(f"{glob.escape(name)}*"))]


def plan(recipe: Recipe, tasks: list[str], methods: dict[str, dict[str, Any]]) -> list[list[Step]]:
    """Stages of steps; those of one stage are independent."""
    data = {key: getattr(recipe, key) for key in ("suite", "tasks", "train", "validation", "test")}
    data |= {"base": _identity(recipe.base), "data": _data(recipe, tasks)}
    bases, experts, scores = [], [], []
    for seed in recipe.all_seeds:
        base = Step("base", seed, fingerprint=_fingerprint(data, seed))
        made = []
        for task in tasks:
            given = _identity(recipe.experts.get(task))
            how = None if given else recipe.training.model_dump()
            made.append(Step("expert", seed, task, fingerprint=_fingerprint(base.fingerprint, task, given, how)))
        parents = [step.fingerprint for step in made]
        for name, options in methods.items():
            how = recipe.training.model_dump() if name == "joint" else None
            scores.append(Step("score", seed, name, options, _fingerprint(parents, name, options, how)))
        bases.append(base)
        experts += made
    return [bases, experts, scores]


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_weights(path: Path, weights: dict[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    from .checkpoint import tied

    second = tied(weights)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    kept = {name: value.detach().cpu().contiguous() for name, value in weights.items() if name not in second}
    save_file(kept, temporary, metadata=metadata | second)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _models(recipe: Recipe, steps: list[Step], seed: int, out: Path, device: str) -> tuple[Any, Any, dict[str, Any]]:
    """Setting, base model and experts' weights of a seed, read from finished steps."""
    from .checkpoint import Checkpoint
    from .settings import best_device, make_setting
    from .train import load_weights

    setting = make_setting(recipe, seed)
    model = (
        setting.make_base() if recipe.suite not in ("digits", "scripts", "images") else _shape(recipe, setting, seed)
    )
    mine = {
        step.name: out / "steps" / step.file for step in steps if step.seed == seed and step.kind in ("base", "expert")
    }
    load_weights(model, Checkpoint(mine.pop("")))
    experts = {task: dict(Checkpoint(path)) for task, path in mine.items()}
    return setting, model.to(best_device(device)).eval(), experts


def _shape(recipe: Recipe, setting: Any, seed: int) -> Any:
    """An untrained model of the suite's architecture."""
    if recipe.suite == "digits":
        from .data.digits import digits_shape

        return digits_shape(setting.suite)
    from .nets.vision import image_shape

    return image_shape(setting.suite)


def work(recipe_text: str, step: Step, steps: list[Step], out: Path, device: str, threads: int) -> tuple[Step, float]:
    """Do one step and write its file. Runs in a worker process."""
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    recipe = Recipe.model_validate_json(recipe_text)
    path = out / "steps" / step.file
    if step.kind == "base":
        from .settings import best_device, make_setting

        setting = make_setting(recipe, step.seed)
        _write_weights(path, setting.make_base().to(best_device(device)).state_dict(), {})
    elif step.kind == "expert":
        from .settings import given_expert

        bases = [other for other in steps if other.kind == "base"]
        setting, model, _ = _models(recipe, bases, step.seed, out, device)
        if step.name in recipe.experts:
            weights = given_expert(model, recipe.experts[step.name], step.name)
        else:
            weights = setting.make_expert(model, step.name, None).backbone.state_dict()
        _write_weights(path, dict(weights), {})
    else:
        _write_json(path, _compete(recipe, step, steps, out, device) | {"seconds": time.perf_counter() - start})
    return step, time.perf_counter() - start


def _bench(recipe: Recipe, seed: int, steps: list[Step], out: Path, device: str) -> Any:
    from .entrants import Bench

    setting, model, experts = _models(recipe, steps, seed, out, device)
    target = next(model.parameters()).device
    placed = {task: {name: value.to(target) for name, value in weights.items()} for task, weights in experts.items()}
    base = {name: value.detach().clone() for name, value in model.backbone.state_dict().items()}
    joint: Callable[[], Any] = lambda: setting.make_joint(model, None).backbone.state_dict()  # noqa: E731
    return Bench(setting.suite, model, base, placed, joint, seed), setting


def _compete(recipe: Recipe, step: Step, steps: list[Step], out: Path, device: str) -> dict[str, Any]:
    """Enter one method: its scores on validation and test, what it stores, what it chose."""
    import warnings

    from .entrants import ENTRANTS
    from .scoring import score

    bench, _ = _bench(recipe, step.seed, steps, out, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        start = time.perf_counter()
        outcome = ENTRANTS[step.name].enter(bench, **step.options)
        weights = None if outcome.weights is None else dict(outcome.weights)
        seconds = time.perf_counter() - start
    model: Any = outcome.answer if weights is None else bench.with_weights(weights)
    notes = [outcome.note, *{str(warning.message) for warning in caught if warning.category is UserWarning}]

    def answer(inputs: Any, task: str) -> Any:
        from .task import to_device

        return model(to_device(inputs, bench.device), task)

    result = {
        "scores": score(answer, bench.suite, split="test"),
        "validation": score(answer, bench.suite, split="validation"),
        "bytes": int(outcome.bytes),
        "merge_seconds": seconds,
        "single": weights is not None,
        "note": "; ".join(note for note in notes if note),
        "coefficients": outcome.coefficients,
    }
    if step.name == "experts":
        result |= _matrices(bench)
    return result


def _matrices(bench: Any) -> dict[str, Any]:
    """Every expert on every task, and the cosines between task vectors."""
    import torch

    from .merging.engine import Aligned
    from .scoring import score

    cross = [
        list(score(bench.with_weights(weights), bench.suite, split="test").values())
        for weights in bench.experts.values()
    ]
    models = Aligned(bench.base, bench.experts)
    gram = torch.zeros(len(bench.experts), len(bench.experts), dtype=torch.float64)
    for name in models.float_names:
        for _, deltas in models.deltas(name):
            gram += (deltas @ deltas.T).cpu().double()
    norm = gram.diagonal().clamp_min(1e-300).sqrt()
    return {"cross": cross, "cosine": (gram / norm[:, None] / norm).tolist()}


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
        The report, as in `report.json`; `report.html` and `merged/` stand beside it.

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
    from .report import build, write

    tasks = list(suite)
    metric = getattr(next(iter(suite.values())).metric, "__name__", "score").replace("_", " ")
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    asked = recipe.methods or {name: {} for name in ENTRANTS}
    methods = {name: {} for name in ("base", "experts") if name not in asked} | asked
    stages = plan(recipe, tasks, methods)
    steps = [step for stage in stages for step in stage]
    text = recipe.model_dump_json()
    threads = 1 if jobs > 1 or cluster else max(1, jobs)
    done, log, cached = 0, [], []
    for stage in stages:
        todo = [step for step in stage if not (out / "steps" / step.file).is_file()]
        cached += [step for step in stage if step not in todo]
        done += len(stage) - len(todo)
        if not todo:
            continue
        from joblib import delayed

        titles = {"base": "training the base", "expert": "training the specialists", "score": "merging and scoring"}
        progress(titles[stage[0].kind], done, len(steps))
        for step, seconds in _parallel(
            jobs, cluster, [delayed(work)(text, step, steps, out, device, threads) for step in todo]
        ):
            done += 1
            log.append({"name": step.title, "seconds": seconds})
            progress(titles[step.kind], done, len(steps))
    results = {
        name: {
            step.seed: json.loads((out / "steps" / step.file).read_text()) for step in stages[2] if step.name == name
        }
        for name in methods
    }  # fmt: skip
    account = {
        "command": command, "device": device, "cores": jobs, "started": started,
        "steps": [entry | {"seconds": round(entry["seconds"], 2), "cached": False} for entry in log]
        + [{"name": step.title, "seconds": 0.0, "cached": True} for step in cached],
    }  # fmt: skip
    report = build(recipe, tasks, methods, results, account, metric=metric)
    progress("writing the best model", done, len(steps))
    if report["chosen"]:
        _export(recipe, report, stages, out, device)
    account["seconds"] = round(time.perf_counter() - clock, 1)
    previous = out / "report.json"
    if not log and previous.is_file():
        report["ran"] |= {"seconds": json.loads(previous.read_text())["ran"]["seconds"]}
    else:
        report["ran"]["seconds"] = account["seconds"]
    _write_json(out / "report.json", report)
    write(report, out / "report.html")
    progress("done", len(steps), len(steps))
    return report


def _export(recipe: Recipe, report: dict[str, Any], stages: list[list[Step]], out: Path, device: str) -> None:
    """Write the chosen model's weights for the first seed, unless they stand there already."""
    from .entrants import ENTRANTS
    from .saving import save

    name = report["chosen"]["method"]
    step = next(step for step in stages[2] if step.name == name and step.seed == recipe.seed)
    marker = out / "steps" / f"export-{step.fingerprint}.json"
    target = out / "merged"
    if marker.is_file() and target.is_dir():
        return
    bench, setting = _bench(recipe, recipe.seed, [step for stage in stages for step in stage], out, device)
    weights: Any = ENTRANTS[name].enter(bench, **step.options).weights
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
    _write_json(marker, {"method": name})
