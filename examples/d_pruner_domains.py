"""Half of a small Llama, kept for one domain: D-Pruner and its rivals on biomedical, legal and program text.

One model a seed (Llama of 4 blocks, width 96, BPE of 1024 tokens made here) learns WikiText-2 and three domains:
PubMedQA (question, abstract, conclusion), BillSum (bills with summaries), MBPP and HumanEval (task, program, tests).
Documents are split into training and test by the seed, whole documents at a time. Every linear layer in the blocks is
then pruned to 50%, calibrated on training text: 32 rows of general text and 32 of the domain. Perplexity a token, on
test documents of the domain and of WikiText-2. Nothing is chosen: the settings are the library's defaults.

    python examples/d_pruner_domains.py --data FOLDER --json d_pruner_domains.json
"""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress
from small_llama import BATCH, LENGTH, byte_pairs, trained
from torch import Tensor, nn

from allrounder.compression.d_pruner import d_pruner, general_importance
from allrounder.compression.domain_importance import domain_importance
from allrounder.compression.pruning import Pruned, prune_by
from allrounder.compression.pruning_baselines import magnitude, wanda
from allrounder.compression.pruning_text import perplexity
from allrounder.compression.sparsegpt import sparsegpt

DOMAINS = ("biomedical", "legal", "code")
CALIBRATION, HELD_OUT = 32, 48  # rows of 128 tokens of each text
Text = dict[str, dict[str, Tensor]]


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(folder / name / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def articles(folder: Path, part: str) -> list[str]:
    """WikiText-2's articles: a heading with one = on each side begins one."""
    with gzip.open(folder / "wikitext2_sample" / f"wikitext2_{part}.txt.gz", "rt", encoding="utf-8") as file:
        found: list[list[str]] = [[]]
        for line in file:
            if line.startswith(" = ") and not line.startswith(" = ="):
                found.append([])
            found[-1].append(line.strip())
    return ["\n".join(lines).strip() for lines in found if any(lines)]


def documents(folder: Path) -> dict[str, list[str]]:
    medical = [f"{r['question']}\n{' '.join(r['contexts'])}\n{r['long_answer']}" for r in rows_of(folder, "pubmedqa")]
    bills = [f"{r['source']}\n{r['summary']}" for r in rows_of(folder, "billsum_sample")]
    programs = ["\n".join([f'"""{r["text"]}"""', r["code"], *r["test_list"]]) for r in rows_of(folder, "mbpp")]
    programs += [r["prompt"] + r["canonical_solution"] for r in rows_of(folder, "humaneval")]
    return {
        "general": articles(folder, "valid") + articles(folder, "test"),
        "biomedical": medical, "legal": bills, "code": programs,
    }  # fmt: skip


def prepared(texts: dict[str, list[str]], seed: int) -> tuple[Any, Text]:
    """A tokenizer of the training documents, and rows of tokens: name -> train and test `(rows, 128)`."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, dict[str, list[str]]] = {}
    for name, found in texts.items():
        order = torch.randperm(len(found), generator=generator).tolist()
        cut = len(found) * 7 // 10
        parts[name] = {"train": [found[i] for i in order[:cut]], "test": [found[i] for i in order[cut:]]}
    tokenizer = byte_pairs(text for part in parts.values() for text in part["train"][:200])
    rows: Text = {}
    for name, part in parts.items():
        rows[name] = {}
        for split, found in part.items():
            ids = [i for encoded in tokenizer.backend_tokenizer.encode_batch(found) for i in [*encoded.ids, 0]]
            rows[name][split] = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return tokenizer, rows


def every_text(rows: Text) -> Callable[[torch.Generator], Tensor]:
    """Batches that hold as many rows of each text."""

    def draw(generator: torch.Generator) -> Tensor:
        picked = []
        for text in rows.values():
            some = torch.randint(len(text["train"]), (BATCH // len(rows),), generator=generator)
            picked.append(text["train"][some])
        return torch.cat(picked)

    return draw


def some(rows: Tensor, count: int, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def arms(model: nn.Module, general: list[Tensor], domain: list[Tensor]) -> dict[str, Callable[[nn.Module], Any]]:
    """What is compared for one domain; G is computed once and shared."""
    g = general_importance(copy.deepcopy(model), general)
    taylor = domain_importance(model, domain)
    added = {name: g[name] / g[name].mean() + taylor[name] / taylor[name].mean() for name in g}
    both = [*general, *domain]
    return {
        "Wanda, domain": lambda net: wanda(net, domain),
        "Wanda, both": lambda net: wanda(net, both),
        "SparseGPT, domain": lambda net: sparsegpt(net, domain),
        "SparseGPT, both": lambda net: sparsegpt(net, both),
        "domain only (Taylor)": lambda net: prune_by(net, taylor),
        "D-Pruner": lambda net: d_pruner(net, general, domain),
        "G/mean + S/mean": lambda net: prune_by(net, added),
    }


def reopened(pruned: Pruned, tokenizer: Any, held: list[Tensor]) -> tuple[float, float]:
    """The perplexity after saving and opening the folder with transformers, and how far it is from that before."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder = pruned.save(Path(place) / "pruned", tokenizer=tokenizer)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
        value = perplexity(again, held)
    return value, abs(value - perplexity(pruned.model, held))


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    steps = 60 if chosen.small else 500
    domains = DOMAINS[:1] if chosen.small else DOMAINS
    texts = documents(Path(chosen.data))
    found: dict[str, dict[str, list[dict[str, float]]]] = {domain: {} for domain in domains}
    notes: list[str] = []
    with Progress() as bar:
        line = bar.add_task("training and pruning", total=len(chosen.seeds) * (steps + 4 * 20 + 20 * 7 * len(domains)))
        for seed in chosen.seeds:
            tokenizer, rows = prepared(texts, seed)
            model = trained(every_text(rows), steps, seed, lambda: bar.advance(line))
            held = {name: list(some(rows[name]["test"], HELD_OUT, seed).split(BATCH)) for name in ("general", *domains)}
            calibration = {name: list(some(rows[name]["train"], CALIBRATION, seed).split(8)) for name in held}
            general = calibration["general"]
            shared: dict[str, Callable[[nn.Module], Any]] = {
                "dense": lambda net: None,
                "magnitude": magnitude,
                "Wanda, general": lambda net, text=general: wanda(net, text),
                "SparseGPT, general": lambda net, text=general: sparsegpt(net, text),
                "general only (G)": lambda net, text=general: prune_by(net, general_importance(net, text)),
            }
            for name, prune in shared.items():
                net = copy.deepcopy(model)
                prune(net)
                values = {text: perplexity(net, batches) for text, batches in held.items()}
                for domain in domains:
                    row = {"general": values["general"], "domain": values[domain]}
                    found[domain].setdefault(name, []).append(row)
                bar.advance(line, 20)
            for domain in domains:
                for name, prune in arms(model, general, calibration[domain]).items():
                    net = copy.deepcopy(model)
                    pruned = prune(net)
                    row = {"general": perplexity(net, held["general"]), "domain": perplexity(net, held[domain])}
                    found[domain].setdefault(name, []).append(row)
                    bar.advance(line, 20)
                    if name == "D-Pruner" and seed == chosen.seeds[0] and domain == domains[0]:
                        value, gap = reopened(pruned, tokenizer, held[domain])
                        notes.append(f"saved and opened again: perplexity {value:.4f}, {gap:.1e} from before")
                        notes.append(str(pruned))
    tables = {}
    for domain, by_arm in found.items():
        tables[domain] = [
            {
                "arm": arm,
                **{f"{k} perplexity": fmean(row[k] for row in rows) for k in ("domain", "general")},
                "domain spread": stdev(row["domain"] for row in rows) if len(rows) > 1 else None,
                "ratios to dense, sum": fmean(
                    sum(row[k] / dense[k] for k in row) for row, dense in zip(rows, by_arm["dense"], strict=True)
                ),
            }
            for arm, rows in by_arm.items()
        ]
    notes.insert(
        0, f"{steps} steps of {BATCH} rows of {LENGTH} tokens; {CALIBRATION} rows of each text to calibrate on"
    )
    finish(chosen, "D-Pruner: half of a small Llama, kept for one domain", tables, notes)


if __name__ == "__main__":
    main()
