"""Several real tasks in one model: rules that combine gradients, and SAM-MTL, with and without a noisy task.

Images: mnist, fashion_mnist, notmnist and sign_language_digits, 300 training images each, a small convolutional network
from scratch with a linear head for each task. Texts: six tasks of the data folder, 600 training texts each, as
embeddings of all-MiniLM-L6-v2 that stay frozen under a shared layer and linear heads. In the noisy variant two in five
training and validation labels of one task are drawn at random; the test is clean. Every method sees the same number of
batches of each task as a model of that task alone; the radius of SAM-MTL is chosen on validation.

    python examples/multitask_real.py --data FOLDER --json multitask_real.json
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch import nn

import allrounder as ar
from allrounder.data.images import image_suite
from allrounder.data.text import text_suite
from allrounder.nets.encoders import TextEncoder, find_minilm, load_tokenizer
from allrounder.nets.vision import conv_net
from allrounder.task import Batches, Examples, Suite, Task

IMAGES = ["mnist", "fashion_mnist", "notmnist", "sign_language_digits"]
TEXTS = [f"tweeteval/{name}" for name in ("emotion", "irony", "offensive", "hate", "sentiment")] + ["banking77"]
NOISY = {"images": "notmnist", "texts": "tweeteval/emotion"}
WRONG, BATCH, LR = 0.4, 32, 1e-3
RULES = ("mean", "uncertainty", "mgda", "pcgrad", "cagrad", "imtl-g", "nash")
FLAT = [(rule, radius) for rule in ("pcgrad", "cagrad") for radius in (0.05, 0.2)]
Make = Callable[[Suite, int], ar.nets.MultiTaskModel]


def heads(suite: Suite, width: int, seed: int) -> dict[str, nn.Module]:
    return {name: ar.nets.mlp([width, task.outputs], seed=seed + i) for i, (name, task) in enumerate(suite.items())}


def of_images(suite: Suite, seed: int) -> ar.nets.MultiTaskModel:
    trunk = nn.Sequential(*list(conv_net(seed=seed))[:-1], nn.ReLU())
    return ar.nets.MultiTaskModel(trunk, heads(suite, 64, seed + 1))


def of_texts(suite: Suite, seed: int) -> ar.nets.MultiTaskModel:
    trunk = nn.Sequential(ar.nets.mlp([384, 256], seed=seed), nn.GELU())
    return ar.nets.MultiTaskModel(trunk, heads(suite, 256, seed + 1))


@torch.no_grad()
def embedded(suite: Suite, advance: Callable[[], None]) -> Suite:
    """The same tasks with each text replaced by its embedding."""
    encoder = TextEncoder(find_minilm()).eval()

    def features(split: Any) -> Examples:
        found = [(encoder(inputs), targets) for inputs, targets in Batches(split, 64)]
        advance()
        return Examples(*(torch.cat(part) for part in zip(*found, strict=True)))

    return Suite(
        [
            Task(name, *(features(task.split(part)) for part in ("train", "validation", "test")), outputs=task.outputs)
            for name, task in suite.items()
        ]
    )


def with_noise(suite: Suite, noisy: str, seed: int) -> Suite:
    """Two in five labels of one task drawn anew, in training and validation."""

    def spoiled(split: Any, salt: int) -> Examples:
        generator = torch.Generator().manual_seed(7 * seed + salt)
        wrong = torch.rand(len(split.targets), generator=generator) < WRONG
        drawn = torch.randint(suite[noisy].outputs, split.targets.shape, generator=generator)
        return Examples(split.inputs, torch.where(wrong, drawn, split.targets))

    task = suite[noisy]
    changed = Task(noisy, spoiled(task.train, 1), spoiled(task.validation, 2), task.test, outputs=task.outputs)
    return Suite([changed if name == noisy else suite[name] for name in suite])


def compare(
    make: Make, suite: Suite, steps: int, seed: int, advance: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Method -> task -> test accuracy in percent."""
    tasks = list(suite)

    def train(update: Callable[[nn.Module], Any]) -> tuple[dict[str, float], float]:
        model = make(suite, seed)
        ar.fit(
            model, suite, steps=steps, lr=LR, batch_size=BATCH, schedule="cosine", seed=seed, sampler="all",
            update=update(model),
        )  # fmt: skip
        advance()
        validation = fmean(ar.score(model, suite, split="validation").values())
        return {task: 100 * value for task, value in ar.score(model, suite).items()}, validation

    single = {}
    for task in tasks:
        model = make(suite, seed)
        ar.fit(model, suite.only([task]), steps=steps, lr=LR, batch_size=BATCH, schedule="cosine", seed=seed)
        single |= {task: 100 * ar.score(model, suite.only([task]))[task]}
        advance()
    found = {"single tasks": single}
    for rule in RULES:
        found[rule] = train(lambda m, rule=rule: ar.optim.Aggregate(m, rule, tasks=tasks, seed=seed))[0]
    flat = [train(lambda m, r=rule, a=radius: ar.multitask.SAMMTL(m, r, radius=a, seed=seed)) for rule, radius in FLAT]
    for rule in dict.fromkeys(rule for rule, _ in FLAT):
        mine = [result for result, (name, _) in zip(flat, FLAT, strict=True) if name == rule]
        found[f"SAM-MTL, {rule}"] = max(mine, key=lambda result: result[1])[0]
    return found


def table(found: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for method in found[0]:
        means = [fmean(one[method].values()) for one in found]
        change = [ar.optim.delta_m(one[method], one["single tasks"]) for one in found]
        rows.append(
            {"method": method, "mean, %": fmean(means), "spread": stdev(means) if len(means) > 1 else None}
            | {"delta_m, %": fmean(change)}
            | {task.rpartition("/")[2]: fmean(one[method][task] for one in found) for task in found[0][method]}
        )
    return rows


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    steps = 30 if chosen.small else 150
    sizes = {"train": 300, "validation": 200, "test": 200 if chosen.small else 1000}
    kinds: dict[str, tuple[Make, Callable[[int], Suite]]] = {}
    with Progress() as bar:
        runs = sum(len(tasks) + len(RULES) + len(FLAT) for tasks in (IMAGES, TEXTS))
        line = bar.add_task("training", total=2 * len(chosen.seeds) * runs + 3 * len(TEXTS))
        advance = lambda: bar.advance(line)  # noqa: E731
        share = 0.1 if chosen.small else 1
        count = {"train": int(600 * share), "validation": int(300 * share), "test": int(500 * share)}
        raw = text_suite(TEXTS, tokenizer=load_tokenizer(find_minilm()), folder=chosen.data, seed=0, **count)
        texts = embedded(raw, advance)
        kinds["images"] = of_images, lambda seed: image_suite(IMAGES, folder=chosen.data, seed=seed, **sizes)
        kinds["texts"] = of_texts, lambda seed: texts
        tables = {}
        for kind, (make, suite_of) in kinds.items():
            clean, noisy = [], []
            for seed in chosen.seeds:
                suite = suite_of(seed)
                length = steps if kind == "images" else 2 * steps
                clean.append(compare(make, suite, length, seed, advance))
                noisy.append(compare(make, with_noise(suite, NOISY[kind], seed), length, seed, advance))
            tables[f"{kind}, clean labels"] = table(clean)
            tables[f"{kind}, {NOISY[kind].rpartition('/')[2]} with noisy labels"] = table(noisy)
    finish(
        chosen, "Several real tasks in one model", tables,
        [
            "Test accuracy in percent, mean over seeds; spread: standard deviation of the mean over seeds.",
            "delta_m: mean relative change against single-task models, negative is better.",
            f"{steps} steps for images, {2 * steps} for texts, of {BATCH} examples a task, AdamW {LR:g} falling as a "
            "cosine; seeds change initial weights, batches and noise, for images also which examples are used.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
