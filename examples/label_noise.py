"""Wrong labels on mnist and fashion_mnist: the comp-sum family, truncated GCE and label smoothing.

A share of the training and validation labels is replaced by a uniform draw among the other nine; test labels stay
clean. Per run 2000 training, 1000 validation and 2000 test images, a 784-128-10 network, AdamW at 3e-3, 500 steps of
128 (32 times round: enough to learn wrong labels by heart). Truncated GCE (q 0.7, threshold 0.5) trains as GCE for the
first half. tau is chosen by accuracy on the noisy validation labels, as somebody with such data would have to; the
last table says what that choice is worth.

    python examples/label_noise.py --data FOLDER [--json FILE] [--small]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from allrounder.data.images import image_suite
from allrounder.losses.comp_sum import comp_sum, truncated_gce
from allrounder.nets.multitask import MultiTaskModel, mlp
from allrounder.scoring import score
from allrounder.task import Examples, Suite, Task
from allrounder.train import fit

SETS, CLASSES = ("mnist", "fashion_mnist"), 10
SHARES = (0.0, 0.2, 0.4)
TAUS = (0.0, 0.5, 1.0, 1.3, 1.7, 2.0)
Loss = Callable[[Tensor, Tensor], Tensor]


def half_truncated(steps: int) -> Loss:
    """GCE for the first half of the steps, truncated GCE after it."""
    done = 0

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        nonlocal done
        done += 1
        return comp_sum(logits, target, 1.7) if done <= steps // 2 else truncated_gce(logits, target)

    return loss


def losses(steps: int) -> dict[str, Loss]:
    return {
        **{f"tau = {tau:g}": partial(comp_sum, tau=tau) for tau in TAUS},
        "truncated GCE": half_truncated(steps),
        "label smoothing 0.1": partial(F.cross_entropy, label_smoothing=0.1),
    }


def noisy(examples: Any, share: float, generator: torch.Generator) -> Examples:
    """Flat pixels, and labels of which `share` are wrong."""
    y = examples.targets
    wrong = (y + torch.randint(1, CLASSES, y.shape, generator=generator)) % CLASSES
    chosen = torch.rand(y.shape, generator=generator) < share
    return Examples(examples.inputs.flatten(1), torch.where(chosen, wrong, y))


def main() -> None:
    chosen = options(__doc__ or "")
    steps, sets, shares = (100, SETS[:1], SHARES[::2]) if chosen.small else (500, SETS, SHARES)
    names = list(losses(steps))
    found: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    with Progress() as bar:
        work = bar.add_task("training", total=len(chosen.seeds) * len(sets) * len(shares) * len(names) * steps)
        tick = lambda *_: bar.advance(work)  # noqa: E731
        for seed in chosen.seeds:
            suite = image_suite(sets, folder=chosen.data, seed=seed, train=2000, validation=1000, test=2000)
            for data, task in suite.items():
                for share in shares:
                    generator = torch.Generator().manual_seed(seed)
                    train, validation = (noisy(x, share, generator) for x in (task.train, task.validation))
                    test = noisy(task.test, 0.0, generator)
                    for name, loss in losses(steps).items():
                        one = Suite([Task(data, train, validation, test, outputs=CLASSES, loss=loss)])
                        model = MultiTaskModel(mlp([784, 128, CLASSES], seed=seed), {data: nn.Identity()})
                        fit(model, one, steps=steps, lr=3e-3, seed=seed, progress=tick)
                        scores = {
                            split: 100 * score(model, one, split=split, batch_size=1000)[data]
                            for split in ("validation", "test")
                        }
                        found.setdefault((data, share, name), []).append(scores)

    tests = [
        {
            "data": data, "wrong labels": share, "loss": name,
            "test accuracy, %": round(fmean(run["test"] for run in runs), 2),
            "lowest": round(min(run["test"] for run in runs), 2),
            "highest": round(max(run["test"] for run in runs), 2),
            "noisy validation, %": round(fmean(run["validation"] for run in runs), 2),
        }
        for (data, share, name), runs in found.items()
    ]  # fmt: skip
    worth = []
    for data in sets:
        for share in shares:
            picks, gains = [], []
            for i in range(len(chosen.seeds)):
                family = {tau: found[data, share, f"tau = {tau:g}"][i] for tau in TAUS}
                picks.append(max(TAUS, key=lambda tau: family[tau]["validation"]))
                gains.append(family[picks[-1]]["test"] - family[1.0]["test"])
            worth.append({
                "data": data, "wrong labels": share, "tau chosen": ", ".join(f"{tau:g}" for tau in picks),
                "gain over tau = 1, points": round(fmean(gains), 2), "lowest gain": round(min(gains), 2),
                "highest gain": round(max(gains), 2),
            })  # fmt: skip
    notes = [
        "Test labels are clean. lowest and highest: over seeds.",
        "A classifier that is always right scores 1 - share on noisy validation labels.",
        "tau is chosen for each seed by its noisy validation accuracy; ties go to the smallest.",
    ]
    finish(chosen, "Wrong labels and the comp-sum family", {"losses": tests, "tau chosen on validation": worth}, notes)


if __name__ == "__main__":
    main()
