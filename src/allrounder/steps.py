"""The steps of a run: what has to be done for a recipe, and the doing of one.

A step is named by what it does and a fingerprint of all that it depends on; its result is one file in
`OUT/steps`, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import InputError
from .recipe import Recipe
from .sources import general_text, identity, sources

__all__ = ["Step", "bench_of", "enter", "plan", "plan_compression", "work", "write_json"]

VERSION = "1"  # of the steps' meaning: raise it when a method's result changes


@dataclass(frozen=True)
class Step:
    """One piece of work: `kind` is base, expert, score (of a method), merged (the chosen model) or compress."""

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
        return f"{label}-{self.fingerprint}" + (
            ".safetensors" if self.kind in ("base", "expert", "merged") else ".json"
        )


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()[:12]


def plan(recipe: Recipe, tasks: list[str], methods: dict[str, dict[str, Any]]) -> list[list[Step]]:
    """Stages of steps; those of one stage are independent.

    Raises:
        InputError: a compressor's text or task that there is not.
    """
    from .entrants import ENTRANTS

    for name, options in recipe.compress.items():
        general_text(recipe, options)  # known to be there before anything is trained
        if options.get("domain") not in (None, *tasks):
            raise InputError(
                f"the recipe, compress.{name}.domain: no task {options['domain']!r}; there are {', '.join(tasks)}"
            )
    data = {key: getattr(recipe, key) for key in ("suite", "tasks", "train", "validation", "test", "length")}
    data |= sources(recipe, tasks)
    if recipe.network is not None:
        data["network"] = recipe.network
    bases, experts, scores = [], [], []
    for seed in recipe.all_seeds:
        base = Step("base", seed, fingerprint=_fingerprint(data, seed))
        made = []
        for task in tasks:
            given = identity(recipe.experts.get(task))
            how = None if given else recipe.training.model_dump()
            made.append(Step("expert", seed, task, fingerprint=_fingerprint(base.fingerprint, task, given, how)))
        parents = [step.fingerprint for step in made]
        for name, options in methods.items():
            trains = ENTRANTS[name].family in ("training", "in sequence")
            how = recipe.training.model_dump() if trains else None
            scores.append(Step("score", seed, name, options, _fingerprint(parents, name, options, how)))
        bases.append(base)
        experts += made
    return [bases, experts, scores]


def plan_compression(recipe: Recipe, scores: list[Step], chosen: str) -> list[list[Step]]:
    """Two stages more: the chosen model of each seed, and what is made of it."""
    merged, smaller = [], []
    for step in scores:
        if step.name != chosen:
            continue
        made = Step("merged", step.seed, chosen, step.options, _fingerprint(step.fingerprint))
        merged.append(made)
        for name, options in recipe.compress.items():
            mark = _fingerprint(
                made.fingerprint, name, options, recipe.training.model_dump(), *general_text(recipe, options)
            )
            smaller.append(Step("compress", step.seed, name, options, mark))
    return [merged, smaller]


def write_json(path: Path, content: Any) -> None:
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

    return image_shape(setting.suite, network=recipe.network or "conv")


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
    elif step.kind == "merged":
        bench, _ = bench_of(recipe, step.seed, steps, out, device)
        weights: Any = enter(bench, step.name, step.options).weights
        _write_weights(path, {name: weights[name] for name in weights}, {})
    elif step.kind == "compress":
        write_json(path, _compress(recipe, step, steps, out, device))
    else:
        write_json(path, _compete(recipe, step, steps, out, device) | {"seconds": time.perf_counter() - start})
    return step, time.perf_counter() - start


def bench_of(recipe: Recipe, seed: int, steps: list[Step], out: Path, device: str) -> Any:
    from .checkpoint import tied
    from .contest import Bench

    setting, model, experts = _models(recipe, steps, seed, out, device)
    target = next(model.parameters()).device
    placed = {task: {name: value.to(target) for name, value in weights.items()} for task, weights in experts.items()}
    state = model.backbone.state_dict()
    second = tied(state)
    base = {name: value.detach().clone() for name, value in state.items() if name not in second}

    def joint(how: Any = None) -> Any:
        return setting.make_joint(model, None, how).backbone.state_dict()

    return Bench(setting.suite, model, base, placed, joint, seed, setting.tuning), setting


def enter(bench: Any, name: str, options: dict[str, Any]) -> Any:
    """The outcome of one method."""
    import warnings

    from .entrants import ENTRANTS

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is a running statistic")  # the bench has estimated it again
        return ENTRANTS[name].enter(bench, **options)


def _compete(recipe: Recipe, step: Step, steps: list[Step], out: Path, device: str) -> dict[str, Any]:
    """Enter one method: its scores on validation and test, what it stores, what it chose."""
    import warnings

    from .scoring import score

    bench, _ = bench_of(recipe, step.seed, steps, out, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        start = time.perf_counter()
        outcome = enter(bench, step.name, step.options)
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
        "matrix": outcome.matrix,
    }
    if step.name == "experts":
        result |= _matrices(bench)
    return result


def _compress(recipe: Recipe, step: Step, steps: list[Step], out: Path, device: str) -> dict[str, Any]:
    """Make the chosen model of a seed smaller: scores, bytes and latency beside the merged model's."""
    from .checkpoint import Checkpoint
    from .compression.footprint import footprints
    from .compressors import COMPRESSORS, SmallBench, write_smaller
    from .scoring import score
    from .task import Batches, Suite, to_device
    from .train import load_weights

    bench, setting = bench_of(recipe, step.seed, steps, out, device)
    source = next(other for other in steps if other.kind == "merged" and other.seed == step.seed)
    load_weights(bench.model.backbone, Checkpoint(out / "steps" / source.file))
    unseen = Suite([replace(task, test=task.validation) for task in bench.suite.values()], name=bench.suite.name)
    small = SmallBench(bench.model, unseen, setting.make_small, bench.tuning, step.seed, recipe.data)
    start = time.perf_counter()
    found = COMPRESSORS[step.name].shrink(small, **step.options)
    seconds = time.perf_counter() - start
    model = found.model.to(bench.device).eval()
    size = getattr(next(iter(bench.suite.values())).validation, "batch_size", 32)
    inputs = to_device(next(iter(Batches(next(iter(bench.suite.values())).validation, size)))[0], bench.device)
    costs = footprints({"merged": bench.model.backbone, "smaller": model.backbone}, (inputs,))  # type: ignore[dict-item]
    target = out / "steps" / Path(step.file).stem
    shutil.rmtree(target, ignore_errors=True)
    write_smaller(found, target, like=setting.files, metadata={"method": step.name})
    return {
        "scores": score(model, bench.suite, split="test"),
        "validation": score(model, bench.suite, split="validation"),
        "bytes": int(found.bytes),
        "latency": costs["smaller"].latency,
        "merged_latency": costs["merged"].latency,
        "seconds": seconds,
        "note": found.note,
    }


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
        if name.endswith(("running_mean", "running_var")):
            continue  # statistics of inputs, and no part of a task vector
        for _, deltas in models.deltas(name):
            gram += (deltas @ deltas.T).cpu().double()
    norm = gram.diagonal().clamp_min(1e-300).sqrt()
    return {"cross": cross, "cosine": (gram / norm[:, None] / norm).tolist()}
