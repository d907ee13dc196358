"""Recipes: what `allrounder run` should do, as a YAML file that is checked before anything starts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .catalogue import nearest
from .errors import InputError

__all__ = ["Recipe", "Training", "load_recipe"]

SMALLER = {  # compressors that need the suite's kind of model, or a smaller one of it
    **dict.fromkeys(("d-pruner", "sparsegpt", "wanda"), ("language",)),
    "ernie-tiny": ("text", "hub-text"),
    "dual-head": ("digits", "scripts", "images", "text", "hub-text"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Training(_Strict):
    """How specialists are fine-tuned, where the suite does not fix it.

    Args:
        epochs: passes over the training split.
        lr: learning rate of AdamW.
        batch_size: examples a step.
        weight_decay: decoupled weight decay.
    """

    epochs: Annotated[float, Field(gt=0, le=1000)] = 2.0
    lr: Annotated[float, Field(gt=0, le=1)] = 5e-5
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01


class Recipe(_Strict):
    """The whole of a run.

    Args:
        title: heading of the report.
        suite: `digits`, `scripts`, `images` (npz files), `text` (jsonl files), `language` (texts, for
            causal language models), `hub-text` or `hub-images` (Hugging Face data sets).
        tasks: names of the tasks; for `images`, `text` and the hub the data sets. Default: all of the suite.
        data: folder of the data sets; default: the environment variable ALLROUNDER_DATA.
        network: of `scripts` and `images`: `conv` (default), or `resnet`, residual blocks with BatchNorm.
        base: a model folder or hub id: a transformers encoder for `text` and `hub-text`, a causal language
            model for `language`, CLIP for `hub-images`. The other suites make their own base when there is none.
        experts: task -> folder, file or hub id (or a LoRA adapter). Tasks without one are fine-tuned here.
        train, validation, test: most examples a task in each split (`language`: rows).
        length: tokens a row of `language`. Default: 128.
        training: how missing experts are fine-tuned (`text`, `language` and hub suites).
        seed, seeds: the first seed and how many there are.
        methods: name -> options; a list of names for their defaults. `multitask` holds ways of training on all tasks
            together, `continual` ways of learning them one after another, likewise: `multitask: {pcgrad: {}}` is
            `multitask/pcgrad: {}`. Default: all merging methods and joint training.
        compress: name -> options, or a list: what to do with the chosen merged model, to make it smaller.
    """

    title: str = "Specialists and one model"
    suite: Literal["digits", "scripts", "images", "text", "language", "hub-text", "hub-images"] = "digits"
    tasks: list[str] | None = None
    data: str | None = None
    network: Literal["conv", "resnet"] | None = None
    base: str | None = None
    experts: dict[str, str] = Field(default_factory=dict)
    train: Annotated[int, Field(ge=1)] | None = None
    validation: Annotated[int, Field(ge=1)] | None = None
    test: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    training: Training = Field(default_factory=Training)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    compress: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def all_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))


def _place(error: ValidationError, known: list[str]) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{place}: no such key; {nearest(str(first['loc'][-1]), known)}"
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _methods(given: Any) -> Any:
    """Lists of names become mappings, and what `multitask` and `continual` hold gets their name in front."""
    if isinstance(given, list):
        given = {str(name): {} for name in given}
    if not isinstance(given, dict):
        return given
    found = {}
    for name, options in given.items():
        inner = _methods(options) if name in ("multitask", "continual") else None
        if isinstance(inner, dict):
            found |= {f"{name}/{key}": value for key, value in inner.items()}
        else:
            found[name] = {} if options is None else options
    return found


def _check_network(recipe: Recipe, where: str) -> None:
    own = recipe.suite in ("scripts", "images")
    if recipe.network is not None and not own:
        raise InputError(f"{where}, network: is for the suites scripts and images; leave it out for {recipe.suite!r}")
    if "genie" in recipe.compress and recipe.network != "resnet":
        raise InputError(
            f"{where}, compress.genie: Genie needs a network with BatchNorm: set 'network: resnet' with the suites "
            "scripts or images, or use allrounder compress genie MODEL for a model of yours"
        )


def _check_methods(recipe: Recipe, where: str) -> None:
    from .compressors import COMPRESSORS
    from .entrants import ENTRANTS

    for name, suites in SMALLER.items():
        if name in recipe.compress and recipe.suite not in suites:
            raise InputError(f"{where}, compress.{name}: is for the suites {', '.join(suites)}, not {recipe.suite!r}")
    how = recipe.compress.get("d-pruner")
    if how is not None and not (how.get("general") or how.get("domain")):
        raise InputError(f"{where}, compress.d-pruner: needs 'general', a text, or 'domain', a task")
    if how is not None and how.get("general") in (recipe.tasks or ()):
        raise InputError(
            f"{where}, compress.d-pruner.general: is one of the tasks, whose test text it would read; give another "
            "text, or leave it out: it is the training text of the other tasks then"
        )
    _check_options(recipe.methods, {name: entrant.enter for name, entrant in ENTRANTS.items()}, f"{where}, methods")
    for name in recipe.methods:
        suites, network = ENTRANTS[name].suites, ENTRANTS[name].network
        if suites and recipe.suite not in suites:
            raise InputError(f"{where}, methods.{name}: is for the suites {', '.join(suites)}, not {recipe.suite!r}")
        if network and recipe.network not in (None, network):
            raise InputError(f"{where}, methods.{name}: is for 'network: {network}', not {recipe.network!r}")
    shrinks = {name: compressor.shrink for name, compressor in COMPRESSORS.items()}
    _check_options(recipe.compress, shrinks, f"{where}, compress")


def _check_options(given: dict[str, dict[str, Any]], there: dict[str, Any], where: str) -> None:
    """Names and the values of keyword-only options, converted in place."""
    for name, options in given.items():
        if name not in there:
            raise InputError(f"{where}.{name}: no such method; {nearest(name, list(there))}")
        parameters = inspect.signature(there[name], eval_str=True).parameters
        known = {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
        for key, value in options.items():
            place = f"{where}.{name}.{key}"
            if key not in known:
                hint = nearest(key, list(known)) if known else "it has no options"
                raise InputError(f"{place}: no such option; {hint}")
            try:
                options[key] = TypeAdapter(known[key].annotation).validate_python(value, strict=isinstance(value, bool))
            except ValidationError as error:
                raise InputError(f"{place}: {_place(error, []).lstrip(': ')}") from error


def load_recipe(path: str | Path | None = None, **changes: Any) -> Recipe:
    """The recipe in a file, or the default one.

    Args:
        path: a YAML file; `None` for the default: the embedded digits with every method.
        changes: fields to set after reading.

    Raises:
        InputError: when the file is missing or no YAML mapping, or a key, type or range in it is wrong (with
            its place).
    """
    where = "the recipe" if path is None else f"recipe {str(path)!r}"
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{where} does not exist") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            mark = getattr(error, "problem_mark", None)
            at = f" at line {mark.line + 1}" if mark else ""
            raise InputError(f"{where} is not readable YAML{at} ({problem})") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"{where} must be a mapping of keys, got {type(content).__name__}")
    for key in ("methods", "compress"):
        if key in content:
            content[key] = _methods(content[key])
    try:
        recipe = Recipe.model_validate(content | {key: value for key, value in changes.items() if value is not None})
    except ValidationError as error:
        keys = [*Recipe.model_fields, *Training.model_fields]
        raise InputError(f"{where}, {_place(error, keys)}") from error
    _check_network(recipe, where)
    _check_methods(recipe, where)
    return recipe
