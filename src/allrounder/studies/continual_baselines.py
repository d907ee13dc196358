"""The usual continual learners on handwritten digits: two classes after another, and five orders of the pixels.

One network 64-100-100-10, plain SGD at 0.05, batches of 32, ten rounds a task, buffers of 200; differences are means
over draws. The claims are those that the field agrees on: with one head and no task id, holding weights or answers in
place keeps nothing of earlier classes, replay and class means do; with shared outputs they help, and stored logits help
more than stored labels.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from torch import nn

from ..continual.baselines import AGEM, ER, DERpp, Finetune, GDumb, Joint
from ..continual.learner import Learner
from ..continual.regularisers import EWC, SI, LwF
from ..continual.simple_cil import SimpleCIL
from ..continual.stream import Stream, permuted, split_by_class
from ..errors import InputError
from ..study import Claim, Finding, Scale, draws
from .continual_substrate import digits_task, network, run_learner

__all__ = ["run"]

Make = Callable[[int], Learner]


def _on_network(kind: Any, **options: Any) -> Make:
    return lambda seed: kind(network(seed), 10, seed=seed, **options)


LEARNERS: dict[str, Make] = {
    "finetune": _on_network(Finetune),
    "joint": _on_network(Joint),
    "EWC, 10": _on_network(EWC, strength=10.0),
    "SI, 0.5": _on_network(SI, strength=0.5),
    "LwF": _on_network(LwF),
    "A-GEM": _on_network(AGEM),
    "ER": _on_network(ER),
    "DER++": _on_network(DERpp),
    "GDumb": _on_network(GDumb, epochs=50),
    "SimpleCIL on pixels": lambda seed: SimpleCIL(nn.Identity(), 10),
}
ALWAYS = ("finetune", "joint", "ER", "EWC, 10", "SimpleCIL on pixels")


def _refuses(stream: Stream, seed: int) -> bool:
    """Whether EWC with a strength that must diverge says so."""
    try:
        run_learner(EWC(network(seed), 10, strength=1e5, seed=seed), stream, seed, epochs=1)
    except InputError as error:
        return "diverge" in str(error)
    return False


def run(scale: Scale, seed: int) -> Finding:
    names = [name for name in LEARNERS if scale != "smoke" or name in ALWAYS]
    found: dict[str, dict[str, list[Any]]] = {"classes": {}, "orders": {}}
    refused = []
    for draw in draws(scale, seed):
        task = digits_task(draw)
        streams = {"classes": split_by_class(task, 2, seed=draw), "orders": permuted(task, 5, seed=draw)}
        for kind, stream in streams.items():
            for name in names:
                record = run_learner(LEARNERS[name](draw), stream, draw)
                found[kind].setdefault(name, []).append(record.summary)
        refused.append(_refuses(streams["orders"], draw))

    def gain(kind: str, one: str, other: str) -> float:
        """Difference of average accuracy, mean over draws, in points."""
        rows = found[kind]
        return 100 * (fmean(row["average"] for row in rows[one]) - fmean(row["average"] for row in rows[other]))

    at_end = max(row["average"] for row in found["classes"]["finetune"])
    claims = [
        Claim.at_most("classes: finetuning keeps one task of five, its best draw", 100 * at_end, 25, "%"),
        Claim.at_least("classes: ER over finetuning", gain("classes", "ER", "finetune"), 40),
        Claim.at_least("classes: joint over ER", gain("classes", "joint", "ER"), 0),
        Claim.at_least("classes: class means over ER", gain("classes", "SimpleCIL on pixels", "ER"), 0),
        Claim.at_most("classes: EWC over finetuning", gain("classes", "EWC, 10", "finetune"), 5),
        Claim("a strength of EWC that must diverge is refused", "yes", "yes" if all(refused) else "no", all(refused)),
    ]
    if scale != "smoke":
        claims += [
            *(
                Claim.at_least(f"orders: {name} over finetuning", gain("orders", name, "finetune"), 5)
                for name in ("EWC, 10", "SI, 0.5", "A-GEM", "LwF")
            ),
            Claim.at_least("orders: DER++ over ER", gain("orders", "DER++", "ER"), 0),
            *(
                Claim.at_most(f"classes: {name} over finetuning", gain("classes", name, "finetune"), 5)
                for name in ("SI, 0.5", "LwF")
            ),
        ]
    return Finding(claims, {f"five tasks: {kind}": _table(rows) for kind, rows in found.items()})


def _table(rows: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    table = []
    for name, records in rows.items():
        averages = [100 * record["average"] for record in records]
        lost = [100 * record["forgetting"] for record in records if "forgetting" in record]
        table.append(
            {
                "learner": name,
                "average %": round(fmean(averages), 1),
                "spread": round(stdev(averages), 1) if len(averages) > 1 else None,
                "forgetting": round(fmean(lost), 1) if lost else None,
                "kB stored": round(records[0]["bytes"] / 1000, 1),
                "gradients": int(records[0]["gradients"]),
            }
        )
    return table
