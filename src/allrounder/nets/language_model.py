"""Causal language models from model folders, as backbones whose outputs are the next token's logits.

A language model needs no head a task: what experts share is all of it. Its tensors keep the names they have in the
folder, so that what is merged is written as an ordinary folder again: `save(model.checkpoint(weights), path,
like=folder)`. A head that is tied to the embedding is one tensor, as in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..checkpoint import Weights
from .encoders import load_model, names_in, replaced

__all__ = ["CausalLM"]


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

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False).logits

    def checkpoint_names(self) -> dict[str, str]:
        """Own tensor name -> its name in the folder's checkpoint."""
        first, own = {}, self.state_dict()
        for name, value in own.items():
            first.setdefault(value.data_ptr(), name)
        kept = [name for name, value in own.items() if first[value.data_ptr()] == name]
        return names_in(self.folder, kept, "model.")

    def checkpoint(self, weights: Weights) -> dict[str, Tensor]:
        """The folder's checkpoint with these weights (named as the model's own) in it."""
        return replaced(self.folder, self.checkpoint_names(), weights)
