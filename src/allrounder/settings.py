"""What a recipe's `suite` stands for: tasks, a base model with fixed heads, and how a specialist is made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Weights, open_weights, resolve, tied
from .errors import InputError
from .nets.multitask import MultiTaskModel
from .recipe import Recipe
from .sources import sources
from .task import Suite
from .train import fit, load_weights

__all__ = ["Setting", "make_setting"]

Progress = Callable[[int, int], None] | None
How = Callable[[MultiTaskModel], dict[str, Any]] | None


@dataclass
class Setting:
    """One suite, made real for one seed.

    Args:
        suite: the tasks.
        make_base: makes the base model, with heads that stay fixed.
        make_expert: (base, task) -> a fine-tuned copy.
        make_joint: (base, progress, how) -> a copy trained on as many examples as all experts together. `how` takes
            the copy and gives further arguments of `fit`: `sampler`, `update`, `optimiser`, and `model` for a network
            made of the copy.
        tuning: how a specialist is fine-tuned: `lr`, `batch_size`, `weight_decay`, and `steps` or `epochs`.
        make_small: (model, share) -> a smaller model of the suite's kind with the model's heads, if there is one.
        files: the folder whose configuration and tokenizer belong to the base's weights, if it has one.
    """

    suite: Suite
    make_base: Callable[[], MultiTaskModel]
    make_expert: Callable[[MultiTaskModel, str, Progress], MultiTaskModel]
    make_joint: Callable[[MultiTaskModel, Progress, How], MultiTaskModel]
    tuning: dict[str, Any]
    make_small: Callable[[MultiTaskModel, float], MultiTaskModel] | None = None
    files: Path | None = None


def _heads(model: MultiTaskModel) -> dict[str, Any]:
    return copy.deepcopy(dict(model.heads.items()))


def _fewer_layers(model: MultiTaskModel, share: float) -> MultiTaskModel:
    """The encoder with the first of its layers, their weights copied."""
    from .compression.encoder_states import build_student

    backbone: Any = copy.copy(model.backbone)
    backbone._modules = dict(model.backbone._modules)
    inner: Any = model.backbone.model
    backbone.model = build_student(inner, layers=max(1, round(share * inner.config.num_hidden_layers)))
    return MultiTaskModel(backbone, _heads(model))


def _chosen(suite: Suite, recipe: Recipe) -> Suite:
    return suite if recipe.tasks is None else suite.only(recipe.tasks)


def _together(
    base: MultiTaskModel, progress: Progress, how: How, *, suite: Suite, steps: int, **options: Any
) -> MultiTaskModel:
    """Train a copy on all tasks of the suite. A step on all K tasks counts as K: the same number of examples."""
    model = copy.deepcopy(base)
    chosen: dict[str, Any] = {"model": model, **({} if how is None else how(model))}
    if chosen.get("sampler") == "all":
        steps = math.ceil(steps / len(suite))
    return fit(suite=suite, steps=steps, progress=progress, **options, **chosen)  # type: ignore[return-value]


def _train(
    recipe: Recipe, suite: Suite, seed: int, base: MultiTaskModel, tasks: list[str], progress: Progress,
    how: How = None,
) -> MultiTaskModel:  # fmt: skip
    """Fine-tune as the recipe's `training` says: so many passes over these tasks' training splits."""
    training = recipe.training
    batches = sum(math.ceil(len(suite[task].train) / training.batch_size) for task in tasks)  # type: ignore[arg-type]
    return _together(
        base, progress, how, suite=suite.only(tasks), steps=max(1, round(training.epochs * batches)), lr=training.lr,
        batch_size=training.batch_size, weight_decay=training.weight_decay, seed=seed,
    )  # fmt: skip


def _own(recipe: Recipe, seed: int) -> Setting:
    """Suites that make their own base: digits, scripts, images."""
    if recipe.base is not None:
        raise InputError(f"suite {recipe.suite!r} makes its own base model; leave out 'base', or use suite 'text'")
    if recipe.suite == "digits":
        from .data.digits import digits, digits_base, digits_expert, digits_shape

        suite = _chosen(digits(seed=seed), recipe)

        return Setting(
            suite,
            lambda: digits_base(suite, seed=seed),
            lambda base, task, progress: digits_expert(base, suite, task, seed=seed, progress=progress),
            partial(_together, suite=suite, steps=120 * len(suite), lr=3e-4, seed=seed),
            {"steps": 120, "lr": 3e-4, "batch_size": 128, "weight_decay": 0.0},
            lambda model, share: MultiTaskModel(digits_shape(suite, seed=seed, share=share).backbone, _heads(model)),
        )
    from .nets.vision import EXPERT_LR, EXPERT_STEPS, NETWORKS, image_base, image_expert, script_base

    network = recipe.network or "conv"
    if recipe.suite == "scripts":
        from .data.scripts import scripts

        sizes = {"train": recipe.train, "validation": recipe.validation, "test": recipe.test}
        suite = _chosen(scripts(seed=seed, **{key: value for key, value in sizes.items() if value}), recipe)  # type: ignore[arg-type]
        make_base = partial(script_base, suite, seed=seed, network=network)
    else:
        from .data.images import image_suite

        suite = image_suite(
            recipe.tasks,
            folder=recipe.data,
            seed=seed,
            train=recipe.train,
            validation=recipe.validation,
            test=recipe.test,
        )
        make_base = partial(image_base, suite, seed=seed, network=network)

    return Setting(
        suite,
        make_base,
        lambda base, task, progress: image_expert(base, suite, task, seed=seed, progress=progress),
        partial(_together, suite=suite, steps=EXPERT_STEPS * len(suite), lr=EXPERT_LR, seed=seed),
        {"steps": EXPERT_STEPS, "lr": EXPERT_LR, "batch_size": 128, "weight_decay": 0.0},
        lambda model, share: MultiTaskModel(NETWORKS[network](seed=seed, share=share), _heads(model)),
    )


def _text(recipe: Recipe, seed: int) -> Setting:
    from .nets.encoders import TextEncoder, find_minilm, load_tokenizer, text_heads

    folder = (
        find_minilm() if recipe.base in (None, "sentence-transformers/all-MiniLM-L6-v2") else resolve(recipe.base or "")
    )
    tokenizer = load_tokenizer(folder)
    sizes = {"train": recipe.train, "validation": recipe.validation, "test": recipe.test}
    sizes = {key: value for key, value in sizes.items() if value}
    if not recipe.tasks:
        raise InputError(f"suite {recipe.suite!r} needs 'tasks': the data sets to use")
    if recipe.suite == "text":
        from .data.text import text_suite

        suite = text_suite(recipe.tasks, tokenizer=tokenizer, folder=recipe.data, seed=seed, **sizes)
    else:
        from .data.hub import hub_text_suite

        suite = hub_text_suite(recipe.tasks, tokenizer=tokenizer, seed=seed, **sizes)

    def base() -> MultiTaskModel:
        encoder = TextEncoder(folder)
        return MultiTaskModel(encoder, text_heads(encoder, tokenizer, suite))

    return Setting(
        suite,
        base,
        lambda model, task, progress: _train(recipe, suite, seed, model, [task], progress),
        lambda model, progress, how: _train(recipe, suite, seed, model, list(suite), progress, how),
        recipe.training.model_dump(),
        _fewer_layers,
        folder,
    )


def _language(recipe: Recipe, seed: int) -> Setting:
    from .data.causal import language_suite
    from .nets.encoders import load_tokenizer
    from .nets.language_model import CausalLM, check_rows

    if recipe.base is None or not recipe.tasks:
        raise InputError("suite 'language' needs 'base', a causal language model, and 'tasks', the texts")
    folder = resolve(recipe.base)
    sizes = {key: getattr(recipe, key) for key in ("train", "validation", "test", "length")}
    suite = language_suite(
        recipe.tasks, tokenizer=load_tokenizer(folder, padding=False), folder=recipe.data, seed=seed,
        **{key: value for key, value in sizes.items() if value},
    )  # fmt: skip
    check_rows(suite, folder)

    def base() -> MultiTaskModel:
        return MultiTaskModel(CausalLM(folder), {name: torch.nn.Identity() for name in suite})

    return Setting(
        suite,
        base,
        lambda model, task, progress: _train(recipe, suite, seed, model, [task], progress),
        lambda model, progress, how: _train(recipe, suite, seed, model, list(suite), progress, how),
        recipe.training.model_dump(),
        files=folder,
    )


def _clip(recipe: Recipe, seed: int) -> Setting:
    from .data.hub import hub_image_suite
    from .nets.encoders import ClipImageEncoder, clip_heads, load_processor

    folder = resolve(recipe.base or "openai/clip-vit-base-patch32")
    sizes = {"train": recipe.train, "validation": recipe.validation, "test": recipe.test}
    suite = hub_image_suite(
        recipe.tasks,
        processor=load_processor(folder),
        seed=seed,
        **{key: value for key, value in sizes.items() if value},
    )

    def base() -> MultiTaskModel:
        return MultiTaskModel(ClipImageEncoder(folder), clip_heads(folder, suite))

    return Setting(
        suite,
        base,
        lambda model, task, progress: _train(recipe, suite, seed, model, [task], progress),
        lambda model, progress, how: _train(recipe, suite, seed, model, list(suite), progress, how),
        recipe.training.model_dump(),
        files=folder,
    )


@lru_cache(maxsize=2)
def _cached(text: str, seed: int, files: str) -> Setting:
    recipe = Recipe.model_validate_json(text)
    if recipe.suite in ("digits", "scripts", "images"):
        return _own(recipe, seed)
    makers = {"hub-images": _clip, "language": _language}
    return makers.get(recipe.suite, _text)(recipe, seed)


def make_setting(recipe: Recipe, seed: int) -> Setting:
    """The setting of a recipe and a seed; the data are loaded once a process, and again when their files change.

    Raises:
        InputError: for tasks, data or models that cannot be had.
    """
    return _cached(
        recipe.model_copy(update={"methods": {}, "compress": {}, "title": "", "seed": 0, "seeds": 1}).model_dump_json(),
        seed,
        repr(sources(recipe, recipe.tasks or [])),
    )


def given_expert(base: MultiTaskModel, source: str, task: str) -> Weights:
    """Weights of an expert that the recipe names, checked against the base's backbone.

    Its tensors may be called as the base's checkpoint calls them, or with a prefix more or less.
    """
    from .merging.engine import Aligned

    own = base.backbone.state_dict()
    names = getattr(base.backbone, "checkpoint_names", lambda: {name: name for name in own})()
    stored = {names[name]: value for name, value in own.items() if name in names}
    weights = open_weights(source, base=stored)
    if not set(stored) & set(weights):
        longer = {name.removesuffix(key) for key in stored for name in weights if name.endswith("." + key)}
        shorter = {key.removesuffix(name) for key in stored for name in weights if key.endswith("." + name)}
        if longer:
            prefix = min(longer)
            weights = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
        elif shorter:
            weights = {min(shorter) + name: weights[name] for name in weights}
    for name, first in tied(own).items():
        for key in weights:
            if f".{name}".endswith(f".{key}") and not torch.equal(weights[key], weights[names[first]]):
                raise InputError(
                    f"the expert of {task!r} has a {key!r} of its own, which is tied to another tensor in the base; "
                    "give experts of one base, or a base with untied weights"
                )
    weights = {name: weights[key] for name, key in names.items() if key in weights}
    Aligned(own, {task: weights})
    model = load_weights(copy.deepcopy(base).backbone, weights)
    return {name: value.detach() for name, value in model.state_dict().items()}


def best_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        InputError: when the machine has no such device.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(key for key in ("cuda", "mps", "cpu") if there[key]))
    if name not in there:
        raise InputError(f"device is 'auto', 'cpu', 'cuda' or 'mps', got {name!r}")
    if not there[name]:
        raise InputError(f"this machine has no {name!r} device; use --device auto")
    return torch.device(name)
