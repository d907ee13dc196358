"""Adult census: one classifier between two questions, for any weighting of them, without training.

Two tasks on the same inputs with one shared head: is the income above 50K, and was the person never married. Who was
never married seldom earns that much, so the answers conflict and a model must stand somewhere between. Left out of the
inputs, as in `dtrn_adult.py`: both targets (income, marital status), `relationship` and the survey weight. Inputs are
the numbers, standardised, and the categories, one-hot; the head is linear.

For eleven weights of the second task, from models trained on the training rows and judged on the test rows:

- IBCL with every task from the first priors, and with chained priors as published: six fits, then one product;
- the straight line between two heads that were trained on a task each;
- the reference: a head retrained on the weighted sum of both losses, eleven trainings;
- the one head trained for equal weights, used for all eleven.

`value` is what a user with weight w gets, (1 - w) accuracy 1 + w accuracy 2, mean over the eleven. Nothing was chosen:
the settings are the same for all. Seeds draw the order of examples, the fits' noise and the nine tenths trained on.

    python examples/ibcl_preferences.py --data FOLDER --json ibcl_preferences.json
"""

from __future__ import annotations

import csv
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from allrounder.continual import Experience, Stream, learn
from allrounder.continual.ibcl import IBCL
from allrounder.nets import mlp
from allrounder.task import Batches, Examples

TASKS = ("income", "never_married")
NUMBERS = ("age", "education_num", "hours_per_week", "capital_gain", "capital_loss")
CATEGORIES = ("workclass", "education", "occupation", "race", "sex", "native_country")
WEIGHTS = [i / 10 for i in range(11)]
BATCH, LR = 256, 0.01
Models = list[nn.Module]


def load(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and both targets of training and test rows; scales and categories are those of the training rows."""
    with gzip.open(folder / "adult" / "adult.csv.gz", "rt", newline="") as file:
        table = list(csv.DictReader(file))
    parts = {name: [row for row in table if row["split"] == name] for name in ("train", "test")}
    known = {name: sorted({row[name] for row in parts["train"]}) for name in CATEGORIES}

    def numbers(rows: list[dict[str, str]]) -> Tensor:
        columns = [[float(row[name]) for row in rows] for name in NUMBERS]
        values = torch.tensor(columns).T
        values[:, 3:] = values[:, 3:].log1p()
        return values

    middle, spread = numbers(parts["train"]).mean(0), numbers(parts["train"]).std(0)

    def encoded(rows: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
        columns = [(numbers(rows) - middle) / spread]
        for name, values in known.items():
            place = {value: i for i, value in enumerate(values)}  # a value that training rows do not have is all zeros
            ids = torch.tensor([place.get(row[name], len(values)) for row in rows])
            columns.append(F.one_hot(ids, len(values) + 1)[:, :-1].float())
        labels = [[row["income"] == ">50K", row["marital_status"] == "Never-married"] for row in rows]
        return torch.cat(columns, 1), torch.tensor(labels).long()

    return {name: encoded(rows) for name, rows in parts.items()}


def streamed(data: dict[str, tuple[Tensor, Tensor]], seed: int) -> Stream:
    inputs, labels = data["train"]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    rows, kept = order[: len(order) * 9 // 10], order[len(order) * 9 // 10 :]
    tasks = []
    for number, name in enumerate(TASKS):
        parts = [Examples(inputs[part], labels[part, number]) for part in (rows, kept)]
        test = Examples(data["test"][0], data["test"][1][:, number])
        tasks.append(Experience(name, *parts, test, task=number, classes=(0, 1)))
    return Stream(tasks, outputs=2, name="adult")


def head(width: int) -> nn.Module:
    """A linear layer of zeros."""
    model = mlp([width, 2], seed=0)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def retrained(stream: Stream, weight: float, epochs: int, seed: int) -> nn.Module:
    """The least weighted sum of both tasks' losses, with the learner's optimiser, batches and passes."""
    first, second = (task.train for task in stream)
    both = Examples(first.inputs, torch.stack([first.targets, second.targets], 1))
    model = head(both.inputs.shape[1])  # type: ignore[union-attr]
    optimiser = torch.optim.Adam(model.parameters(), lr=LR)
    batches = Batches(both, BATCH, seed=seed)
    for _ in range(epochs):
        for inputs, targets in batches:
            logits = model(inputs)
            losses = [F.cross_entropy(logits, targets[:, number]) for number in range(2)]
            optimiser.zero_grad()
            ((1 - weight) * losses[0] + weight * losses[1]).backward()
            optimiser.step()
    return model


def between(first: nn.Module, second: nn.Module, weight: float) -> nn.Module:
    one, other = first.state_dict(), second.state_dict()
    model = head(one["0.weight"].shape[1])
    model.load_state_dict({name: (1 - weight) * one[name] + weight * other[name] for name in one})
    return model


@torch.no_grad()
def points(models: Models, stream: Stream) -> Tensor:
    """Test accuracy in percent, `(models, tasks)`."""
    answers = [model(stream[0].test.inputs).argmax(1) for model in models]
    return torch.tensor([[100 * (a == task.test.targets).double().mean().item() for task in stream] for a in answers])


def once(stream: Stream, epochs: int, seed: int, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Kind of model -> its curve `(11, 2)`, trainings made, milliseconds to make the eleven models once trained."""
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, trainings: int, make: Callable[[], Models]) -> None:
        start = time.perf_counter()
        models = make()
        spent = 1000 * (time.perf_counter() - start)
        found[name] = {"curve": points(models, stream), "trainings": trainings, "making 11, ms": spent}
        tick()

    for name, chained in (("IBCL, first priors", False), ("IBCL, chained priors (published)", True)):
        learner = IBCL(head(stream[0].train.inputs.shape[1]), 2, chained=chained, lr=LR, start=0.1, seed=seed)  # type: ignore[union-attr]
        learn(learner, stream, epochs=epochs, batch_size=BATCH, seed=seed)
        note(name, learner.fits, lambda learner=learner: [learner.model_for([1 - w, w]) for w in WEIGHTS])
    alone = [retrained(stream, weight, epochs, seed) for weight in (0.0, 1.0)]
    note("line between two heads", 2, lambda: [between(alone[0], alone[1], w) for w in WEIGHTS])
    note("retrained for each weight", 11, lambda: [retrained(stream, w, epochs, seed) for w in WEIGHTS])
    note("trained for equal weights", 1, lambda: [retrained(stream, 0.5, epochs, seed)] * 11)
    return found


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    data = load(Path(chosen.data))
    epochs = 2 if chosen.small else 8
    runs: dict[str, list[dict[str, Any]]] = {}
    with Progress(transient=True) as bars:
        bar = bars.add_task("training", total=5 * len(chosen.seeds))
        for seed in chosen.seeds:
            for name, row in once(streamed(data, seed), epochs, seed, lambda: bars.advance(bar)).items():
                runs.setdefault(name, []).append(row)
    weights = torch.tensor(WEIGHTS)
    reference = torch.stack([row["curve"] for row in runs["retrained for each weight"]]).mean(0)
    summary, curves = [], []
    for name, rows in runs.items():
        values = [((1 - weights) * r["curve"][:, 0] + weights * r["curve"][:, 1]).mean().item() for r in rows]
        mean = torch.stack([row["curve"] for row in rows]).mean(0)
        summary.append(
            {
                "model": name,
                "value": fmean(values),
                "deviation": stdev(values) if len(values) > 1 else None,
                "farthest from retrained, points": (mean - reference).abs().max().item(),
                "trainings": rows[0]["trainings"],
                "making 11, ms": fmean(row["making 11, ms"] for row in rows),
            }
        )
        curves += [
            {"model": name, "weight of never_married": w, **dict(zip(TASKS, point, strict=True))}
            for w, point in zip(WEIGHTS, mean.tolist(), strict=True)
            if rows[0]["trainings"] != 1
        ]
    major = [100 * max(share, 1 - share) for share in data["test"][1].double().mean(0).tolist()]
    notes = [
        f"{len(data['train'][0]) * 9 // 10} training and {len(data['test'][0])} test rows; accuracies in percent; "
        f"the larger class is {major[0]:.1f} and {major[1]:.1f} percent of the test rows",
        "making: with the trainings already done, but for the retrained, which are made by training",
    ]
    tables = {"eleven preferences": summary, "accuracy by weight, mean over seeds": curves}
    finish(chosen, "IBCL on two questions of the Adult census", tables, notes)


if __name__ == "__main__":
    main()
