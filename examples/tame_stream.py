"""A stream of pictures that does not say when its task changes: digits, clothes, letters, and the digits once more.

mnist, fashion_mnist, notmnist and mnist again, 2,000 training images each, ten labels that all of them share, in
batches of 50, five passes over each. No learner is told where a task begins, but for the last two rows of the table:

- finetuning and replay (ER, 500 stored images): one network;
- TAME: experts found by their loss, a selector trained on 500 stored images; also with experts pruned to a tenth and
  to a fiftieth of their weights and stored packed;
- EWC at the changes that TAME's detector finds, and EWC told the true boundaries;
- an expert for each task with true numbers in training and at test: what a perfect detector and selector would give.

All networks are the same small convolutional net from scratch with the same SGD; no setting was searched. Labels are
shared, so an answer is counted twice: `within` (the label is right, whichever expert answered: what the paper's code
counts) and `strict` (and the expert is one of the picture's own task).

    python examples/tame_stream.py --data FOLDER --json tame_stream.json
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch import nn

from allrounder.continual import ER, EWC, Finetune, Learner, Stream, hide, in_sequence, learn, revisit
from allrounder.continual.change_detection import AtChanges, LossJump
from allrounder.continual.tame import TAME, expert_accuracies
from allrounder.data.images import image_suite
from allrounder.nets import mlp
from allrounder.nets.vision import conv_net

TASKS = ["mnist", "fashion_mnist", "notmnist"]
ORDER = [0, 1, 2, 0]
BATCH, STORED, WINDOW = 50, 500, 35
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
SECRET = ("boundaries", "task_id_train", "class_list")
Tick = Callable[[str, int, int], None]


def network(outputs: int, seed: int) -> nn.Module:
    """130 thousand parameters."""
    return nn.Sequential(*list(conv_net(seed=seed))[:-1], nn.ReLU(), *mlp([64, outputs], seed=seed + 1))


def watch() -> LossJump:
    return LossJump(math.log(10), window=WINDOW)


def tame(seed: int, small: bool, sparsity: float = 0.0) -> TAME:
    return TAME(
        lambda s: network(10, s), network, 10, buffer=STORED, detector=watch(), selector_epochs=10 if small else 30,
        selector_lr=0.05, batch_size=50, sparsity=sparsity, pruning_epochs=5 if small else 20, seed=100 * seed, **SGD,
    )  # fmt: skip


def about(learner: TAME, stream: Stream, steps: int) -> dict[str, float]:
    """What the learner found out about the stream, judged with what only we know."""
    true = [task.task for task in stream for _ in range(steps)]
    owners = learner.owners(true)
    alarms = [event.batch for event in learner.events[1:]]
    changes = [steps * i for i in range(1, len(stream))]
    delays = [min((a - c for a in alarms if c <= a < c + steps), default=steps) for c in changes]
    counts = list(expert_accuracies(learner, stream, owners).values())
    return {
        "experts": len(learner.experts),
        "false alarms": len(alarms) - sum(delay < steps for delay in delays),
        "worst delay": max(delays),
        **{name: 100 * fmean(row[name] for row in counts) for name in ("within", "strict", "selected")},
    }


def told(stream: Stream, seed: int, tick: Tick, **options: Any) -> list[float]:
    """An expert for each task, trained on all its visits."""
    scores = []
    for number, task in enumerate(stream.tasks):
        visits = Stream([item for item in stream if item.task == task.task], outputs=10, name=task.name)
        learner = Finetune(network(10, 100 * seed + number), 10, **SGD)
        scores.append(learn(learner, visits, seed=seed, progress=tick, **options).matrix[-1][0])
    return scores


def once(seed: int, stream: Stream, epochs: int, small: bool, tick: Tick) -> dict[str, dict[str, float]]:
    def net() -> nn.Module:
        return network(10, 100 * seed)

    blind = hide(stream, *SECRET)
    kinds: dict[str, tuple[Learner, Stream]] = {
        "finetuning": (Finetune(net(), 10, **SGD), blind),
        "replay (ER)": (ER(net(), 10, buffer=STORED, **SGD), blind),
        "EWC at detected changes": (AtChanges(EWC(net(), 10, strength=10.0, **SGD), watch(), memory=500), blind),
        "TAME": (tame(seed, small), blind),
        "TAME, experts pruned to 10%": (tame(seed, small, 0.9), blind),
        "TAME, experts pruned to 2%": (tame(seed, small, 0.98), blind),
        "EWC at true boundaries": (EWC(net(), 10, strength=10.0, **SGD), stream),
    }
    if small:
        kinds = {name: kinds[name] for name in ("finetuning", "replay (ER)", "TAME", "TAME, experts pruned to 10%")}
    rows: dict[str, dict[str, float]] = {}
    for name, (learner, seen) in kinds.items():
        record = learn(learner, seen, epochs=epochs, batch_size=BATCH, seed=seed, progress=tick)
        rows[name] = {task: 100 * score for task, score in zip(record.tasks, record.matrix[-1], strict=True)}
        rows[name] |= {"held, kB": sum(record.held[-1].values()) / 1000, "gradients": record.gradients / 1000}
        if isinstance(learner, TAME):
            rows[name] |= about(learner, stream, epochs * len(stream[0].train) // BATCH)
    scores = told(stream, seed, tick, epochs=epochs, batch_size=BATCH)
    rows["true tasks told"] = {task: 100 * score for task, score in zip(TASKS, scores, strict=True)}
    return rows


def summary(name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    means = [fmean(run[task] for task in TASKS) for run in runs]
    line: dict[str, Any] = {"learner": name, "accuracy": fmean(means)}
    line["deviation"] = stdev(means) if len(means) > 1 else None
    for column in (*TASKS, "held, kB", "gradients"):
        line[column] = fmean(run[column] for run in runs) if column in runs[0] else None
    return line


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    epochs = 3 if chosen.small else 5
    found: dict[str, list[dict[str, float]]] = {}
    with Progress(transient=True) as bars:
        for seed in chosen.seeds:
            suite = image_suite(TASKS, folder=chosen.data, seed=seed, train=2000)
            stream = revisit(in_sequence(suite, scenario="domain"), ORDER)
            bar = bars.add_task(f"seed {seed}")

            def tick(name: str, done: int, steps: int, bar: Any = bar, seed: int = seed) -> None:
                bars.update(bar, description=f"seed {seed}, {name}", completed=done, total=steps)

            for name, row in once(seed, stream, epochs, chosen.small, tick).items():
                found.setdefault(name, []).append(row)
            bars.remove_task(bar)
    columns = ("experts", "false alarms", "worst delay", "within", "strict", "selected")
    tables = {
        "test accuracy in percent after the stream": [summary(name, runs) for name, runs in found.items()],
        "what TAME found, each seed": [
            {"learner": name, "seed": seed, **{column: run[column] for column in columns}}
            for name, runs in found.items()
            if "experts" in runs[0]
            for seed, run in zip(chosen.seeds, runs, strict=True)
        ],
    }
    notes = [
        f"{' > '.join(TASKS[i] for i in ORDER)}; 2000 training images a task, {epochs} passes over each visit, batches "
        f"of {BATCH}; deviation over seeds; gradients in thousands of examples",
        "held: bytes besides one network, stored images (float32) among them; delays in batches",
    ]
    finish(chosen, "TAME on a stream of pictures", tables, notes)


if __name__ == "__main__":
    main()
