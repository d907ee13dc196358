"""Preference losses on real harmlessness pairs: one small language model, one SFT checkpoint, eight losses.

A causal transformer over words is first trained by likelihood on the winning dialogues of the training pairs (SFT).
From that checkpoint, with the same checkpoint as the frozen reference (its log probabilities computed once), each loss
trains the model on the same pairs in the same order; one of them is typed as a formula. With the first seed, the
learning rate of each loss is chosen on validation pairs by what the loss itself works on: the implicit reward
log p - log r for losses with a reference, the mean log probability per token for the others. The test pairs only
report.

No pretrained model is used: 0.16 million parameters and 1.5 thousand pairs of upsetting dialogues, cut to 12 and 32
words, decide little. The figures compare losses; they do not make a model harmless.

    python examples/preference_hh.py --data FOLDER [--json FILE] [--small]
"""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from _report import finish, options
from rich.progress import Progress
from torch import Tensor, nn

from allrounder.losses.preference import PreferenceLoss, sequence_log_probs
from allrounder.losses.preference_logic import Structure, compile_loss
from allrounder.nets.causal import CausalTransformer
from allrounder.task import Examples, Suite, Task
from allrounder.train import fit

WORDS, PROMPT, ANSWER = 1000, 12, 32
PAD, UNKNOWN, HUMAN, ASSISTANT, END = range(5)
LENGTH = PROMPT + 1 + ANSWER

TYPED = Structure("(L & Rw) >> (W & Rl)", given="(W & Rl) | (L & Rw)")  # DPO without its worlds on both sides
LOSSES = {  # loss, and whether it works on mean log probabilities per token
    "CE": (PreferenceLoss("ce"), True),
    "DPO": (PreferenceLoss("dpo", beta=0.1), False),
    "IPO": (PreferenceLoss("ipo", beta=0.1), True),
    "CPO": (PreferenceLoss("cpo", beta=0.1), True),
    "ORPO": (PreferenceLoss("orpo", beta=0.1), True),
    "SimPO": (PreferenceLoss("simpo", beta=2.0, gamma=0.5), True),
    "cCPO": (PreferenceLoss("ccpo"), True),
    "typed": (compile_loss(TYPED), True),
}
RATES = (1e-4, 5e-4)


def words(text: str) -> list[str]:
    return re.findall(r"human:|assistant:|[a-z']+|[^\sa-z']", text.lower())


def read(folder: Path) -> dict[str, list[tuple[list[str], list[str], list[str]]]]:
    """Split -> (prompt, winner, loser) as words; every sixth training pair is for validation."""
    found: dict[str, list[tuple[list[str], list[str], list[str]]]] = {"train": [], "validation": [], "test": []}
    with gzip.open(folder / "hh_rlhf_harmless" / "hh_rlhf_harmless.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            prompts, answers = zip(*(row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected")))
            prompt, winner, loser = words(prompts[0]), words(answers[0])[:ANSWER], words(answers[1])[:ANSWER]
            if prompts[0] != prompts[1] or not winner or not loser or winner == loser:
                continue  # not two answers to one prompt, or the same answer as far as it is read
            split = row["split"]
            if split == "train" and len(found["train"]) / 5 > len(found["validation"]):
                split = "validation"
            found[split].append((prompt[-PROMPT:], winner, loser))
    return found


def encode(prompt: list[str], answer: list[str], index: dict[str, int]) -> tuple[list[int], list[int]]:
    """Tokens and labels of one dialogue; an answer that was cut has no end."""
    tail = [index.get(word, UNKNOWN) for word in answer] + [END] * (len(answer) < ANSWER)
    head = [index.get(word, UNKNOWN) for word in prompt] + [ASSISTANT]
    rest = LENGTH - len(head) - len(tail)
    return head + tail + [PAD] * rest, [-100] * len(head) + tail + [-100] * rest


class Pairs(nn.Module):
    """`(N, 2, 2, T)` tokens and labels of winner and loser -> sums and token counts `(N, 4)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, task: str) -> Tensor:
        tokens, labels = inputs.flatten(0, 1).unbind(1)  # winner and loser of a pair side by side
        found = sequence_log_probs(self.model(tokens), labels)
        return torch.cat([found.total.unflatten(0, (-1, 2)), found.tokens.unflatten(0, (-1, 2))], dim=1)


def preference(outputs: Tensor, reference: Tensor, loss: nn.Module, per_token: bool) -> Tensor:
    """`outputs` and `reference` are `(N, 4)`: log p of winner and loser, and their token counts."""
    lengths = (outputs[:, 2].detach(), outputs[:, 3].detach()) if per_token else None
    return loss(*outputs[:, :2].unbind(1), *reference[:, :2].unbind(1), lengths=lengths)


@torch.no_grad()
def log_probs(model: nn.Module, inputs: Tensor) -> Tensor:
    pairs = Pairs(model)
    return torch.cat([pairs(inputs[at : at + 128], "hh") for at in range(0, len(inputs), 128)])


def measures(outputs: Tensor, reference: Tensor) -> dict[str, float]:
    """Shares in percent of pairs in the right order, and changes of the mean log probability per token."""
    change = (outputs - reference)[:, :2]
    per_token, moved = outputs[:, :2] / outputs[:, 2:], change / outputs[:, 2:]
    return {
        "reward": 100 * (change[:, 0] > change[:, 1]).double().mean().item(),
        "log p": 100 * (per_token[:, 0] > per_token[:, 1]).double().mean().item(),
        "winner": moved[:, 0].mean().item(),
        "loser": moved[:, 1].mean().item(),
    }


def supervised(
    data: dict[str, Tensor], vocabulary: int, seed: int, steps: int, progress: Callable[..., None]
) -> CausalTransformer:
    """Likelihood of all words of the winning dialogues."""
    tokens = data["train"][:, 0, 0]
    labels = tokens.masked_fill(tokens == PAD, -100)
    split = Examples(tokens, labels)

    def likelihood(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CausalTransformer(vocabulary, width=64, depth=2, heads=4, context=LENGTH, tied=True, seed=seed)

        def forward(self, inputs: Tensor, task: str) -> Tensor:
            return self.model(inputs)

    task = Task("words", split, split, split, outputs=vocabulary, loss=likelihood)
    plain = Plain()
    fit(plain, Suite([task]), steps=steps, lr=3e-3, batch_size=32, schedule="cosine", seed=seed, progress=progress)
    return plain.model


def main() -> None:
    chosen = options(__doc__ or "")
    epochs, sft_steps = (1, 60) if chosen.small else (2, 400)
    text = read(Path(chosen.data))
    counts = Counter(word for prompt, winner, _ in text["train"] for word in (*prompt, *winner))
    index = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS), END + 1)}
    index |= {"human:": HUMAN, "assistant:": ASSISTANT}
    data = {
        split: torch.tensor([[encode(prompt, answer, index) for answer in answers] for prompt, *answers in rows])
        for split, rows in text.items()
    }  # (pairs, winner and loser, tokens and labels, T)
    if chosen.small:
        data = {split: inputs[:320] for split, inputs in data.items()}
    steps = epochs * len(data["train"]) // 32
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("SFT", *LOSSES)}
    with Progress() as bar:
        runs = len(RATES) + len(chosen.seeds) - 1
        total = len(chosen.seeds) * sft_steps + len(LOSSES) * runs * steps
        work = bar.add_task("training", total=total)
        tick = lambda *_: bar.advance(work)  # noqa: E731
        for seed in chosen.seeds:
            base = supervised(data, len(index) + END + 1, seed, sft_steps, tick)
            reference = {split: log_probs(base, inputs) for split, inputs in data.items()}
            found["SFT"].append(measures(reference["test"], reference["test"]))
            for name, (loss, per_token) in LOSSES.items():
                own = "reward" if getattr(loss, "needs_reference", False) else "log p"
                best: tuple[float, dict[str, float]] | None = None
                for rate in RATES if seed == chosen.seeds[0] else (found[name][0]["rate"],):
                    model = Pairs(copy.deepcopy(base))
                    split = Examples(data["train"], reference["train"])
                    objective = partial(preference, loss=loss, per_token=per_token)
                    task = Task("hh", split, split, split, outputs=4, loss=objective)
                    fit(model, Suite([task]), steps=steps, lr=rate, batch_size=32, schedule="cosine", seed=seed,
                        progress=tick)  # fmt: skip
                    picked = measures(log_probs(model.model, data["validation"]), reference["validation"])[own]
                    if best is None or picked > best[0]:
                        result = measures(log_probs(model.model, data["test"]), reference["test"])
                        best = (picked, result | {"rate": rate})
                assert best is not None
                found[name].append(best[1])

    def row(name: str) -> dict[str, float | str]:
        runs = found[name]
        shown: dict[str, float | str] = {"loss": name}
        for title, key in (("right by log p - log r, %", "reward"), ("right by mean log p, %", "log p")):
            values = [run[key] for run in runs]
            nothing = name == "SFT" and key == "reward"  # it is its own reference
            shown[title] = "" if nothing else round(fmean(values), 1)
            shown["spread, " + key] = "" if nothing else round(stdev(values), 1) if len(values) > 1 else 0.0
        shown["winner, nats per token"] = round(fmean(run["winner"] for run in runs), 4)
        shown["loser, nats per token"] = round(fmean(run["loser"] for run in runs), 4)
        shown["rate"] = f"{runs[0]['rate']:g}" if "rate" in runs[0] else ""
        return shown

    tokens = data["test"][:, :, 1].ne(-100).sum(-1)  # (pairs, winner and loser)
    shorter = 100 * (tokens[:, 0] < tokens[:, 1]).double().mean().item()
    sizes = ", ".join(f"{len(inputs)} {split}" for split, inputs in data.items())
    notes = [
        f"Pairs: {sizes}. Chance is 50 %; the standard error of one share is {50 / len(tokens) ** 0.5:.1f} points.",
        f"Of the test pairs the winner is the shorter one, as far as it is read, in {shorter:.1f} %.",
        f"typed: {TYPED}; spread: standard deviation over seeds; nats: change from the SFT checkpoint.",
    ]
    table = {"held-out pairs": [row(name) for name in found]}
    finish(chosen, "Preference losses on hh-rlhf harmless", table, notes)


if __name__ == "__main__":
    main()
