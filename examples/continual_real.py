"""Real streams, class after class, no task id at test: every general learner, with what it stores.

- mnist and fashion_mnist, two classes after another (2,000 training images);
- seven image sets in sequence, 60 classes (300 training images each);
- eight alphabets of omniglot, 242 characters, 16 drawings of each to learn from and 4 to be tested on;
- the ten domains of clinc150, 150 intents, 30 texts of each, as embeddings of all-MiniLM-L6-v2 that stay frozen.

Images: a small convolutional network; texts: one hidden layer. AdamW at 1e-3, batches of 32, five passes over a task,
buffers of 500 examples. The strengths of EWC and SI are chosen on the validation split with the first seed. Class means
(SimpleCIL) are of pixels or embeddings. Methods for transformers have programs of their own: mos_intents.py,
multi_lane_glyphs.py, prompt_src_intents.py; so have tame_stream.py and ibcl_preferences.py.

    python examples/continual_real.py --data FOLDER --json continual_real.json
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from _report import finish, options
from rich.progress import Progress
from torch import nn

import allrounder as ar
from allrounder.continual import (
    AGEM,
    ER,
    EWC,
    FPF,
    SI,
    DERpp,
    Finetune,
    GDumb,
    Joint,
    Learner,
    LwF,
    SimpleCIL,
    Stream,
    in_sequence,
    learn,
    split_by_class,
)  # fmt: skip
from allrounder.data.images import image_suite
from allrounder.nets.encoders import TextEncoder, find_minilm, load_tokenizer
from allrounder.nets.vision import conv_net
from allrounder.task import Examples, Suite, Task

SETS = ["mnist", "fashion_mnist", "notmnist", "omniglot_alphabets", "pneumoniamnist", "spoken_digits_mel",
        "sign_language_digits"]  # fmt: skip
BATCH, LR, PASSES, BUFFER = 32, 1e-3, 5, 500
STRENGTHS = {"EWC": (EWC, [1.0, 100.0, 10_000.0]), "SI": (SI, [1.0, 100.0, 10_000.0])}
Net = Callable[[int], nn.Module]


def of_images(outputs: int) -> Net:
    def make(seed: int) -> nn.Module:
        return nn.Sequential(*list(conv_net(seed=seed))[:-1], nn.ReLU(), ar.nets.mlp([64, outputs], seed=seed + 1))

    return make


def omniglot(folder: Path, seed: int) -> Stream:
    """Characters of one alphabet after another; one drawing of each is kept for validation."""
    with np.load(folder / "omniglot_alphabets" / "omniglot_alphabets.npz", allow_pickle=False) as found:
        x = {part: torch.tensor(found[f"{part}_x"]).float().div(255).unsqueeze(1) for part in ("train", "test")}
        y = {part: torch.tensor(found[f"{part}_char"].astype("int64")) for part in ("train", "test")}
        alphabet = dict(zip(y["train"].tolist(), found["train_y"].tolist(), strict=True))
    order = torch.randperm(len(y["train"]), generator=torch.Generator().manual_seed(seed))
    first = {int(label): int(row) for row, label in zip(order.flip(0), y["train"][order].flip(0), strict=True)}
    held = torch.tensor(sorted(first.values()))
    rest = order[~torch.isin(order, held)]
    parts = [Examples(x["train"][rows], y["train"][rows]) for rows in (rest, held)]
    task = Task("omniglot", *parts, Examples(x["test"], y["test"]), outputs=max(alphabet) + 1)
    groups = [[c for c, a in sorted(alphabet.items()) if a == which] for which in sorted(set(alphabet.values()))]
    return split_by_class(task, groups)


@torch.no_grad()
def clinc(folder: Path, seed: int, each: int, note: Callable[[], None]) -> Stream:
    """Intents of one domain after another, as embeddings."""
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    domain = {}
    (path,) = (folder / "clinc150").glob("*.jsonl.gz")
    with gzip.open(path, "rt") as file:
        for row in map(json.loads, file):
            if row["label"] >= 0 and row["split"] in rows:
                rows[row["split"]].append((row["text"], row["label"]))
                domain[row["label"]] = row["domain"]
    encoder, tokenizer = TextEncoder(find_minilm()).eval(), load_tokenizer(find_minilm())
    generator, parts = torch.Generator().manual_seed(seed), []
    for split, most in (("train", each), ("val", 10), ("test", 30)):
        texts, labels = zip(*rows[split], strict=True)
        labels = torch.tensor(labels)
        order = torch.randperm(len(labels), generator=generator)
        kept = torch.cat([order[labels[order] == c][:most] for c in sorted(domain)])
        found = []
        for chosen in kept.split(64):
            words = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=32, return_tensors="pt"
            )
            found.append(encoder(dict(words)))
            note()
        parts.append(Examples(torch.cat(found), labels[kept]))
    task = Task("clinc150", *parts, outputs=len(domain))
    names = sorted(set(domain.values()))
    return split_by_class(task, [[c for c in sorted(domain) if domain[c] == name] for name in names], names=names)


def streams(folder: Path, seed: int, small: bool, note: Callable[[], None]) -> dict[str, tuple[Stream, Net, nn.Module]]:
    """Name -> stream, a network for it, and features for class means."""
    size, each = (400, 100) if small else (2000, 300)
    found: dict[str, tuple[Stream, Net, nn.Module]] = {}
    for name in ("mnist",) if small else ("mnist", "fashion_mnist"):
        task = image_suite([name], folder=folder, seed=seed, train=size, validation=200, test=1000)[name]
        found[f"{name}, split"] = (split_by_class(task, 2, seed=seed), of_images(10), nn.Flatten())
    suite = image_suite(SETS[:3] if small else SETS, folder=folder, seed=seed, train=each, validation=100, test=300)
    stream = in_sequence(Suite(list(suite.values()), name="image sets"))
    found["image sets"] = (stream, of_images(stream.outputs), nn.Flatten())
    if not small:
        found["omniglot"] = (omniglot(folder, seed), of_images(242), nn.Flatten())
    found["clinc150"] = (
        clinc(folder, seed, 5 if small else 30, note), lambda s: ar.nets.mlp([384, 256, 150], seed=s), nn.Identity(),
    )  # fmt: skip
    return found


def learners(net: Net, features: nn.Module, outputs: int, seed: int, strength: dict[str, float]) -> dict[str, Any]:
    common = {"lr": LR, "optimiser": lambda p: torch.optim.AdamW(p, LR, weight_decay=0.0), "seed": seed}

    def made(kind: Any, **own: Any) -> Learner:
        return kind(net(seed), outputs, **common, **own)

    return {
        "finetuning": lambda: made(Finetune),
        "joint": lambda: made(Joint, epochs=PASSES * 2),
        "EWC": lambda: made(EWC, strength=strength["EWC"], examples=300),
        "SI": lambda: made(SI, strength=strength["SI"]),
        "LwF": lambda: made(LwF),
        "A-GEM": lambda: made(AGEM, buffer=BUFFER),
        "ER": lambda: made(ER, buffer=BUFFER),
        "DER++": lambda: made(DERpp, buffer=BUFFER),
        "GDumb": lambda: made(GDumb, buffer=BUFFER, epochs=PASSES * 2),
        "FPF": lambda: FPF(made(Finetune), buffer=BUFFER, steps=200, lr=0.03, seed=seed),
        "ER + FPF": lambda: FPF(made(ER, buffer=BUFFER), steps=200, lr=0.03, seed=seed),
        "SimpleCIL": lambda: SimpleCIL(features, outputs),
    }


def choose(stream: Stream, net: Net, advance: Callable[[], None]) -> dict[str, float]:
    """The strength with the best average accuracy on validation, first seed."""
    chosen = {}
    for name, (kind, values) in STRENGTHS.items():
        scores = {}
        for value in values:
            options_of = {"examples": 300} if kind is EWC else {}
            learner = kind(
                net(0), stream.outputs, lr=LR, strength=value, seed=0, **options_of,
                optimiser=lambda p: torch.optim.AdamW(p, LR, weight_decay=0.0),
            )  # fmt: skip
            try:
                record = learn(learner, stream, epochs=PASSES, batch_size=BATCH, split="validation")
                scores[value] = record.average
            except ar.InputError:  # the loss is not finite: far too strong
                scores[value] = 0.0
            advance()
        chosen[name] = max(scores, key=lambda value: scores[value])
    return chosen


def main() -> None:
    chosen = options(__doc__)
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    strengths: dict[str, dict[str, float]] = {}
    with Progress(transient=True) as progress:
        names = 3 if chosen.small else 5
        bar = progress.add_task("streams", total=names * (len(chosen.seeds) * 12 + 6))
        for seed in chosen.seeds:
            for name, (stream, net, features) in streams(Path(chosen.data), seed, chosen.small, lambda: None).items():
                progress.update(bar, description=f"{name}, seed {seed}")
                if name not in strengths:
                    strengths[name] = choose(stream, net, lambda: progress.advance(bar))
                for kind, make in learners(net, features, stream.outputs, seed, strengths[name]).items():
                    record = learn(make(), stream, epochs=PASSES, batch_size=BATCH, seed=seed)
                    rows.setdefault(name, {}).setdefault(kind, []).append(record.summary)
                    progress.advance(bar)
    notes = [f"{name}: strengths chosen on validation: {found}" for name, found in strengths.items()]
    finish(chosen, "Class after class: general learners on real streams", tables(rows), notes)


def tables(rows: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, list[dict[str, Any]]]:
    def line(kind: str, found: list[dict[str, float]]) -> dict[str, Any]:
        average = [100 * one["average"] for one in found]
        over = "forgetting" in found[0]
        return {
            "learner": kind,
            "average %": round(fmean(average), 1),
            "spread": round(stdev(average), 1) if len(average) > 1 else None,
            "during %": round(100 * fmean(one["incremental"] for one in found), 1) if over else None,
            "forgetting": round(100 * fmean(one["forgetting"] for one in found), 1) if over else None,
            "kB stored": round(found[0]["bytes"] / 1000),
            "gradients": int(found[0]["gradients"]),
            "seconds": round(fmean(one["seconds"] for one in found), 1),
        }

    return {name: [line(kind, found) for kind, found in kinds.items()] for name, kinds in rows.items()}


if __name__ == "__main__":
    main()
