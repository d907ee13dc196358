"""Causal language models from model folders, as backbones whose outputs are the next token's logits.

A language model needs no head a task: what experts share is all of it. Its tensors keep the names they have in the
folder, so that what is merged is written as an ordinary folder again: `save(model.checkpoint(weights), path,
like=folder)`. A head that is tied to the embedding is one tensor, as in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Weights, tied
from ..errors import InputError
from ..task import Suite
from .encoders import load_config, load_model, names_in, replaced

__all__ = ["CausalLM", "check_rows"]


class CausalLM(nn.Module):
    """Logits `(N, T, vocabulary)` of the token after each, from a transformers language model.

    Args:
        folder: a local model folder. Loaded in float32.

    Called with `{"input_ids": (N, T)}`, and `attention_mask` `(N, T)` where there is padding.

    Raises:
        InputError: a folder that is no causal language model, or is incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.model = load_model("AutoModelForCausalLM", self.folder)
        last = self.model.config.get_text_config().vocab_size - 1
        with torch.no_grad():  # an encoder (BERT, RoBERTa) loads as well, and reads the tokens that it is to predict
            one, other = (
                self({"input_ids": torch.tensor([[last, last // 2, end]])})[0, :2] for end in (last, last // 3)
            )
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
            raise InputError(f"{str(folder)!r} reads the tokens that follow, so it is no causal language model")

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False).logits

    def checkpoint_names(self) -> dict[str, str]:
        """Own tensor name -> its name in the folder's checkpoint."""
        own = self.state_dict()
        second = tied(own)
        return {name: stored for name, stored in self._names().items() if name not in second}

    def _names(self) -> dict[str, str]:
        return names_in(self.folder, list(self.state_dict()), "model.")

    def checkpoint(self, weights: Weights) -> dict[str, Tensor]:
        """The folder's checkpoint with these weights (named as the model's own) in it."""
        found, names = replaced(self.folder, self.checkpoint_names(), weights), self._names()
        again = {names[name]: found[names[first]] for name, first in tied(self.state_dict()).items()}
        return found | {name: value for name, value in again.items() if name in found}  # in folders that store both


def check_rows(suite: Suite, folder: str | Path) -> None:
    """Whether the folder's model can read the rows of a suite, before anything is trained.

    Raises:
        InputError: rows longer than its positions, tokens outside its vocabulary.
    """
    config = load_config(folder).get_text_config()
    positions, vocabulary = (getattr(config, key, None) for key in ("max_position_embeddings", "vocab_size"))
    for task in suite.values():
        splits: list[Any] = [task.train, task.validation, task.test]
        length, highest = splits[0].targets.shape[1], max(int(split.targets.max()) for split in splits)
        if positions and length > positions:
            raise InputError(
                f"{str(folder)!r} reads at most {positions} tokens, got length: {length}; shorten the rows"
            )
        if vocabulary and highest >= vocabulary:
            raise InputError(
                f"the tokenizer of {str(folder)!r} gives token {highest}, its model has {vocabulary}; give a folder "
                "whose tokenizer and model belong together"
            )
