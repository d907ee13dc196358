"""A transformers folder and text files in, a pruned transformers folder out: what `allrounder compress d-pruner` calls.

    prune_folder("llama", "pruned", general="wiki.txt", domain="clinic.jsonl", sparsity=0.5)

Texts are `.txt` (one long text, cut into rows) or `.jsonl` (one example a line), as `data.documents` reads them; of
lines that name a split, those of `train`. General text is always cut into rows; an example of the domain is a row of
its own, cut at `length`. Needs the extra `hf`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checkpoint import resolve
from ..data.documents import documents
from ..errors import InputError
from .d_pruner import d_pruner
from .pruning import Pruned, Structure, check
from .pruning_baselines import magnitude, wanda
from .sparsegpt import sparsegpt

__all__ = ["PruningMethod", "prune_folder"]

PruningMethod = Literal["d-pruner", "sparsegpt", "wanda", "magnitude"]


def prune_folder(
    model: str | Path,
    out: str | Path,
    *,
    general: str | Path | None = None,
    domain: str | Path | None = None,
    method: PruningMethod = "d-pruner",
    sparsity: float = 0.5,
    structure: Structure = "matrix",
    length: int = 2048,
    rows: int = 128,
    examples: int = 1000,
    batch_size: int = 8,
    epochs: int = 5,
    lr: float = 0.03,
    regulariser: float = 10.0,
    seed: int = 0,
    device: str = "cpu",
    work: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Prune a causal language model of transformers and write it with its tokenizer.

    Args:
        model: a folder, or a hub id.
        out: the folder to make; it must not exist, or be empty.
        general, domain: files as above. D-Pruner needs both, magnitude none; SparseGPT and Wanda are calibrated on what
            is given, on both texts if both are.
        method: `d-pruner`, `sparsegpt`, `wanda` or `magnitude`.
        sparsity, structure: as for `keep_mask`.
        length: tokens a row, at most as many as the model takes.
        rows: of the general text, drawn with `seed`. Paper: 128 of 2048 tokens.
        examples: of the domain, the first ones. Paper: about 1000.
        batch_size, epochs, lr, regulariser: of D-Pruner.
        device: where to compute.
        work: folder for what is kept on the way, to resume from; it stays.
        progress: as for `d_pruner`.

    Raises:
        InputError: a model that is no causal language model of transformers, quantised or an adapter; a text that is
            missing, unreadable or too short; as for the method.

    Warns:
        When a tenth of the domain's lines or more are lines of the general text.
    """
    if method not in get_args(PruningMethod):
        raise InputError(f"method is one of {', '.join(get_args(PruningMethod))}, got {method!r}")
    check(sparsity, structure)
    if min(length, rows, examples, batch_size) < 1 or length < 2:
        raise InputError("length is at least 2; rows, examples and batch_size are at least 1")
    texts = {name: _train(path) for name, path in (("general", general), ("domain", domain)) if path is not None}
    if method == "d-pruner" and len(texts) < 2:
        raise InputError(f"D-Pruner needs a general and a domain text, got {', '.join(texts) or 'neither'}")
    if method in ("sparsegpt", "wanda") and not texts:
        raise InputError(f"{method} needs a general or a domain text to be calibrated on")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} exists and is not an empty folder; give another output folder")
    if len(texts) == 2:
        _compare(texts["general"], texts["domain"])
    net, tokenizer = _load(resolve(model), device)
    length = min(length, getattr(net.config, "max_position_embeddings", None) or length)
    batches: dict[str, list[Any]] = {}
    for name, found in texts.items():
        if name == "domain" and len(found) > 1:
            batches[name] = _examples(found[:examples], tokenizer, length, batch_size)
        else:
            count = rows if name == "general" else examples
            batches[name] = _rows(name, found, tokenizer, length, count, batch_size, seed)
    options: dict[str, Any] = {"sparsity": sparsity, "structure": structure}
    if method == "magnitude":
        pruned = magnitude(net, **options)
    elif method == "d-pruner":
        pruned = d_pruner(
            net, batches["general"], batches["domain"], regulariser=regulariser, lr=lr, epochs=epochs, folder=work,
            progress=progress, **options,
        )  # fmt: skip
    else:
        both = [batch for some in batches.values() for batch in some]
        pruned = (sparsegpt if method == "sparsegpt" else wanda)(net, both, folder=work, progress=progress, **options)
    pruned.save(target, tokenizer=tokenizer)
    return pruned


def _train(path: str | Path) -> list[str]:
    found = [text for text, split in documents(path) if split in (None, "train")]
    if not found:
        raise InputError(f"{str(path)!r} has no line of the split 'train'; leave out 'split' to use them all")
    return found


def _compare(general: list[str], domain: list[str]) -> None:
    known = {line.strip() for text in general for line in text.splitlines()} - {""}
    lines = [line.strip() in known for text in domain for line in text.splitlines() if line.strip()]
    share = sum(lines) / max(1, len(lines))
    if share >= 0.1:
        warnings.warn(f"general and domain sets share {100 * share:.0f}% of lines", stacklevel=3)


def _load(path: Path, device: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError("pruning a model folder needs: pip install 'allrounder[hf]'") from error
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise InputError(f"{str(path)!r} is an adapter; merge it into its model first (merge_and_unload)")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} has no readable config.json ({error}); give a transformers folder") from error
    if config.get("quantization_config"):
        raise InputError(f"{str(path)!r} is quantised; prune the model before it is quantised")
    try:
        net: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{str(path)!r} is no causal language model with a tokenizer ({reason})") from error
    return net.to(device).eval(), tokenizer


def _rows(
    name: str, documents: list[str], tokenizer: Any, length: int, count: int, batch_size: int, seed: int
) -> list[Tensor]:
    """`count` rows of one long text, drawn without replacement from those that do not overlap."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    if len(ids) < length:
        raise InputError(f"the {name} text has {len(ids)} tokens, a row has {length}; give more text or lower length")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return list(rows[order].split(batch_size))


def _examples(documents: list[str], tokenizer: Any, length: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of examples, padded on the right; what is padding is in the mask."""
    ids = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in documents]
    ids = [row for row in ids if len(row) > 1]
    if not ids:
        raise InputError("no example of the domain has two tokens; give longer ones")
    found = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        width = max(map(len, part))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        found.append({"input_ids": tokens, "attention_mask": mask})
    return found
