"""Learn prompts for half of the intents of a text encoder, and see what the other half loses.

Two towers from one all-MiniLM-L6-v2: one reads utterances (the part that images play in CLIP), the other names of
intents written as phrases. CLINC150, the domains banking, credit cards and travel: 45 intents, the first half of the
sorted names is base (16 utterances each are learned from), the other half is novel and never seen. Prompts go into the
transformers encoder by hooks, 4 tokens in each of the first 4 of 6 layers of both towers; all weights stay frozen.

Zero-shot, cross-entropy alone (IVLP) and PromptSRC, each judged on the test utterances of base and novel intents among
their own names. The learning rate is the one of 0.0025, 0.01, 0.04, 0.16 with which IVLP had the best accuracy on the
validation utterances of the base intents (seed 0); nothing else was chosen.

    python examples/prompt_src_intents.py --data FOLDER --json prompt_src_intents.json
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from torch import Tensor, nn

from allrounder.continual.prompt_src import VARIANTS, PromptSRC
from allrounder.continual.two_tower import (
    TwoTower,
    base_novel,
    base_to_novel,
    few_shot,
    linear_probe,
    taught,
)
from allrounder.data.text import Tokens, text_suite, tokenize
from allrounder.nets.encoders import TextEncoder, find_minilm, humanise, load_tokenizer
from allrounder.nets.prompts import deep_prompts, insert_prompts
from allrounder.task import Batches

DOMAINS = ("banking", "credit_cards", "travel")
SHOTS, BATCH, EPOCHS, LR = 16, 32, 6, 0.16
SCALE, DEPTH, TOKENS = 20.0, 4, 4
PHRASE = "a customer asks about"
TEMPLATES = (
    f"{PHRASE} {{}}.",
    "{}",
    "a question about {}.",
    "a request about {}.",
    "the topic is {}.",
    "please help me with {}.",
    "I want to know about {}.",
    "I have a question regarding {}.",
    "this message is about {}.",
    "can you tell me about {}?",
    "the user needs help with {}.",
    "an utterance with the intent {}.",
)


class IntentTowers(TwoTower):
    """Utterances and names of intents through one frozen sentence encoder, with prompts of their own."""

    def __init__(self, encoder: TextEncoder, tokenizer: Any, seed: int) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.scale = encoder, tokenizer, SCALE
        words = encoder.model.embeddings.word_embeddings.weight
        phrase = tokenizer(PHRASE, add_special_tokens=False)["input_ids"]
        self.prompts = nn.ModuleDict(
            {
                "names": deep_prompts(len(phrase), words.shape[1], DEPTH, first=words[phrase], seed=seed),
                "utterances": deep_prompts(TOKENS, words.shape[1], DEPTH, seed=seed + 1),
            }
        )

    def encode_image(self, inputs: Any, *, prompted: bool = True) -> Tensor:
        if not prompted:
            return self.encoder(inputs)
        with insert_prompts(self.encoder.model, self.prompts["utterances"], at=1):  # after CLS; the mask is widened
            return self.encoder(inputs)

    def encode_text(self, texts: Sequence[str], *, prompted: bool = True) -> Tensor:
        if not prompted:
            return self.encoder(tokenize(self.tokenizer, texts, 64))
        inputs = tokenize(self.tokenizer, [f"{PHRASE} {name}." for name in texts], 64)
        entry = self.encoder.model.embeddings.word_embeddings  # the phrase holds the places, and has positions
        with insert_prompts(self.encoder.model, self.prompts["names"], at=1, replace=True, entry=entry):
            return self.encoder(inputs)


def of_classes(examples: Tokens, classes: list[int]) -> Tokens:
    """The examples of some classes, numbered anew."""
    number = torch.full((int(examples.targets.max()) + 1,), -1)
    number[torch.tensor(classes)] = torch.arange(len(classes))
    kept = (number[examples.targets] >= 0).nonzero().flatten()
    inputs, targets = examples[kept]
    return Tokens(inputs, number[targets])


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    folder = find_minilm()
    tokenizer = load_tokenizer(folder)
    encoder = TextEncoder(folder).eval().requires_grad_(False)
    domains = DOMAINS[:1] if chosen.small else DOMAINS
    epochs = 3 if chosen.small else EPOCHS
    rows = []
    with Progress() as bar:
        line = bar.add_task("epochs", total=len(chosen.seeds) * 2 * epochs)
        for seed in chosen.seeds:
            suite = text_suite([f"clinc150/{domain}" for domain in domains], tokenizer=tokenizer, folder=chosen.data,
                               seed=seed, train=10_000, validation=10_000, test=10_000, max_length=32)  # fmt: skip
            names = [humanise(name) for task in suite.values() for name in task.classes]
            train, test = (joined(suite, split) for split in ("train", "test"))
            sides = base_novel(names)
            titles = [[names[i] for i in side] for side in sides]
            judged = [(of_classes(test, side).by_length(), title) for side, title in zip(sides, titles, strict=True)]
            base = of_classes(train, sides[0])
            learned = Tokens(*base[few_shot(base.targets, SHOTS, seed=seed)])
            tower = IntentTowers(encoder, tokenizer, seed)

            def note(method: str, figures: dict[str, float | None], seed: int = seed) -> None:
                rows.append({"method": method, "seed": seed} | figures)

            note("zero-shot, one template", base_to_novel(tower, *judged, templates=TEMPLATES[:1]))
            note("zero-shot, 12 templates", base_to_novel(tower, *judged, templates=TEMPLATES))
            note("prompts before training", base_to_novel(tower, *judged))
            probe = linear_probe(tower, learned, len(titles[0]))
            features = taught(tower, judged[0][0]).features
            right = (probe(features).argmax(1) == judged[0][0].targets).double().mean().item()
            note("linear probe", {"base": right, "novel": None, "harmonic mean": None})
            for method in ("IVLP", "PromptSRC"):
                tower = IntentTowers(encoder, tokenizer, seed)
                settings = {"aggregate": (0.75 * epochs, 1.0), "templates": TEMPLATES} | VARIANTS[method]
                trainer = PromptSRC(tower, titles[0], epochs=epochs, lr=LR, **settings)
                batches = Batches(taught(tower, learned), BATCH, seed=seed)
                trainer.fit(batches, progress=lambda *_: bar.advance(line))
                note(method, base_to_novel(tower, *judged))
    means = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mean: dict[str, Any] = {"method": method}
        for figure in ("base", "novel", "harmonic mean"):
            values = [row[figure] for row in rows if row["method"] == method and row[figure] is not None]
            mean |= {
                figure: fmean(values) if values else None,
                f"{figure} sd": pstdev(values) if values else None,
            }
        means.append(mean)
    notes = [
        f"{len(titles[0])} base and {len(titles[1])} novel intents, {SHOTS} utterances a base intent, {epochs} epochs.",
        "novel: accuracy among the novel names. A linear probe has no answer for names it was not trained on.",
    ]
    finish(chosen, "PromptSRC on intents, base to novel", {"accuracy": means, "by seed": rows}, notes)


def joined(suite: Any, split: str) -> Tokens:
    """One split of all tasks, with the classes of each task after those of the ones before."""
    parts, offset = [], 0
    for task in suite.values():
        examples = task.split(split)
        parts.append((examples.inputs, examples.targets + offset))
        offset += task.outputs
    longest = max(inputs["input_ids"].shape[1] for inputs, _ in parts)
    inputs = {
        key: torch.cat([nn.functional.pad(one[key], (0, longest - one[key].shape[1])) for one, _ in parts])
        for key in ("input_ids", "attention_mask")
    }
    return Tokens(inputs, torch.cat([targets for _, targets in parts]))


if __name__ == "__main__":
    main()
