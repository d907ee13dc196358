"""A small Llama as a base for `examples/language.yaml`, made from one text: an ordinary transformers folder.

    python examples/small_llama.py --text wikitext2_sample/wikitext2_valid --out small_llama

Four blocks of width 96, byte pairs of 1,024 tokens, 128 tokens a row; about four minutes on one core. `--text` is a
`.txt` or `.jsonl` file, or a name in ALLROUNDER_DATA; other texts, whose tokens the vocabulary should know too, come in
`--also` (the model does not learn them).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from allrounder.compression.pruning_text import next_token_loss
from allrounder.data.causal import text_file, text_rows
from allrounder.data.documents import documents
from allrounder.nets.encoders import quiet

LENGTH, BATCH, VOCABULARY = 128, 16, 1024
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": LENGTH, "bos_token_id": 0,
    "eos_token_id": 0, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


def byte_pairs(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of these texts whose token 0 is `<end>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<end>")


def trained(draw: Callable[[torch.Generator], Tensor], steps: int, seed: int, step_done: Callable[[], None]) -> Any:
    """A Llama trained on `steps` batches of rows `(N, 128)`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        next_token_loss(model, {"input_ids": draw(generator)}).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        step_done()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="what the model learns: a file, or a name in ALLROUNDER_DATA")
    parser.add_argument("--also", nargs="*", default=[], help="texts for the vocabulary alone")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    out = Path(chosen.out)
    if out.exists():
        parser.error(f"{chosen.out!r} exists; give another folder")
    names = [chosen.text, *chosen.also]
    tokenizer = byte_pairs(
        text[:200_000] for name in names for text, split in documents(text_file(name))[:200] if split in (None, "train")
    )
    data: Any = text_rows(chosen.text, tokenizer=tokenizer, rows=20_000, length=LENGTH - 1)
    rows = torch.cat([data.inputs["input_ids"], data.targets[:, -1:]], dim=1)
    with Progress() as bar:
        line = bar.add_task(f"training on {len(rows)} rows", total=chosen.steps)
        model = trained(
            lambda generator: rows[torch.randint(len(rows), (BATCH,), generator=generator)],
            chosen.steps, chosen.seed, lambda: bar.advance(line),
        )  # fmt: skip
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"{out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
