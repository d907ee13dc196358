"""Two targets of the Adult census at once: does a weighting of the fields by each task (DTRN's TRM) help the heads?

Targets, as in papers on mixtures of experts: income above 50K, and never married. Taken out of the inputs: both targets
(income, marital status), `relationship`, which tells the second (a husband is married), and the survey weight `fnlwgt`.
Adult has no histories, so of DTRN only TRM is at work: TIM needs sequences, and nothing here speaks for or against it.

Compared: a network for each task alone; shared bottom, MMoE and PLE on one input; the same three heads under DTRN. All
have the same embeddings. A tenth of the training rows is for validation; the epoch with the best mean AUC there is kept
(for a task alone, the best of that task). The test rows only report. No setting was searched.

    python examples/dtrn_adult.py --data FOLDER [--json FILE] [--small]
"""

from __future__ import annotations

import copy
import csv
import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from sklearn.metrics import roc_auc_score
from torch import Tensor

from allrounder.multitask.dtrn import DTRN, masked_bce
from allrounder.multitask.experts import PLE, MMoE, SharedBottom
from allrounder.multitask.features import FeatureSchema

TASKS = ("income", "never_married")
NUMBERS = ("age", "education_num", "hours_per_week", "capital_gain", "capital_loss")
CATEGORIES = ("workclass", "education", "occupation", "race", "sex", "native_country")
DIM, BATCH, LR, EPOCHS, PATIENCE = 8, 512, 1e-3, 20, 3
HEADS = {"shared bottom": SharedBottom, "MMoE": partial(MMoE, experts=3), "PLE": PLE}
Rows = tuple[dict[str, Tensor], Tensor]


def load(folder: Path) -> tuple[FeatureSchema, Rows, Rows]:
    """The schema, training rows and test rows; scales and categories are those of the training rows."""
    with gzip.open(folder / "adult" / "adult.csv.gz", "rt", newline="") as file:
        table = list(csv.DictReader(file))
    parts = [[row for row in table if row["split"] == name] for name in ("train", "test")]
    ids = {
        name: {value: i + 1 for i, value in enumerate(sorted({row[name] for row in parts[0]}))} for name in CATEGORIES
    }

    def numbers(rows: list[dict[str, str]], name: str) -> Tensor:
        values = torch.tensor([float(row[name]) for row in rows])
        return values.log1p() if name.startswith("capital") else values

    scale = {name: (numbers(parts[0], name).mean(), numbers(parts[0], name).std()) for name in NUMBERS}

    def encoded(rows: list[dict[str, str]]) -> Rows:
        fields = {name: (numbers(rows, name) - scale[name][0]) / scale[name][1] for name in NUMBERS}
        for name in CATEGORIES:  # 0 is for a value that training rows do not have
            fields[name] = torch.tensor([ids[name].get(row[name], 0) for row in rows])
        labels = [[row["income"] == ">50K", row["marital_status"] == "Never-married"] for row in rows]
        return fields, torch.tensor(labels).float()

    schema = FeatureSchema(
        dense=dict.fromkeys(NUMBERS, 1), categorical={name: len(known) + 1 for name, known in ids.items()}
    )
    return schema, encoded(parts[0]), encoded(parts[1])


def logits(model: DTRN, rows: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(model(rows).values()), 1)  # type: ignore[union-attr]


@torch.no_grad()
def auc(model: DTRN, data: Rows) -> list[float]:
    made = logits(model, data[0])
    return [float(roc_auc_score(data[1][:, t], made[:, t])) for t in range(made.shape[1])]


def part(data: Rows, chosen: Tensor, tasks: list[int]) -> Rows:
    return {name: value[chosen] for name, value in data[0].items()}, data[1][chosen][:, tasks]


def train(model: DTRN, rows: Rows, held_out: Rows, epochs: int, seed: int, step: Callable[[], None]) -> int:
    """Train in place, keep the best epoch by mean validation AUC; returns its number."""
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, foreach=True)
    generator = torch.Generator().manual_seed(seed)
    best, at, kept = 0.0, 0, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        for chosen in torch.randperm(len(rows[1]), generator=generator).split(BATCH):
            loss = masked_bce(logits(model, {name: value[chosen] for name, value in rows[0].items()}), rows[1][chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        step()
        score = fmean(auc(model, held_out))
        if score > best:
            best, at, kept = score, epoch + 1, copy.deepcopy(model.state_dict())
        elif epoch + 1 - at >= PATIENCE:
            break
    model.load_state_dict(kept)
    return at


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    schema, training, test = load(Path(chosen.data))
    epochs = 4 if chosen.small else EPOCHS
    models = {name: partial(DTRN, head=head, trm=False) for name, head in HEADS.items()}
    models |= {f"DTRN, {name}": partial(DTRN, head=head) for name, head in HEADS.items()}
    alone = {f"{task} alone": [t] for t, task in enumerate(TASKS)}
    runs = [(name, models["shared bottom"], columns) for name, columns in alone.items()]
    runs += [(name, make, list(range(len(TASKS)))) for name, make in models.items()]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in runs}
    importance: list[dict[str, Any]] = []
    with Progress(transient=True) as bars:
        bar, done = bars.add_task("training", total=len(chosen.seeds) * len(runs) * epochs), 0
        for seed in chosen.seeds:
            order = torch.randperm(len(training[1]), generator=torch.Generator().manual_seed(seed))
            cut = len(order) // 10
            for name, make, columns in runs:
                model = make(schema, [TASKS[t] for t in columns], dim=DIM, seed=seed)
                rows, held_out = part(training, order[cut:], columns), part(training, order[:cut], columns)
                epoch = train(model, rows, held_out, epochs, seed, lambda: bars.advance(bar))
                done += epochs  # also those that early stopping saved
                bars.update(bar, completed=done)
                scores = dict(zip(model.tasks, auc(model, (test[0], test[1][:, columns])), strict=True))
                found[name].append(scores | {"epoch": epoch, "parameters": sum(p.numel() for p in model.parameters())})
                if name == "DTRN, shared bottom" and seed == chosen.seeds[0]:
                    weights = model.importance(held_out[0])
                    importance = [{"field": f} | {task: weights[task][f] for task in TASKS} for f in schema.fields]

    def row(name: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
        line: dict[str, Any] = {"model": name}
        for task in TASKS:
            values = [score[task] for score in scores if task in score]
            line[f"{task}, AUC"] = fmean(values) if values else None
            line[f"{task}, deviation"] = stdev(values) if len(values) > 1 else None
        return line | {"epoch": fmean(s["epoch"] for s in scores), "parameters": scores[0]["parameters"]}

    tables = {"test": [row(name, scores) for name, scores in found.items()]}
    tables["TRM's mean weight of each field, first seed, DTRN with shared bottom"] = importance
    notes = [
        f"{len(training[1]) - len(training[1]) // 10} training, {len(training[1]) // 10} validation and "
        f"{len(test[1])} test rows; deviation over seeds",
        "TIM is not at work here: the data have no histories",
    ]
    finish(chosen, "Adult census: two targets", tables, notes)


if __name__ == "__main__":
    main()
