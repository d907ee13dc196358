"""Prompts in both towers of a transformers `CLIPModel`, by hooks: the tower that `PromptSRC` was made for.

Text: context tokens after the start of text, with positions as words have, begun as the embeddings of "a photo of
a"; in the layers 2..J other tokens take their places. Image: tokens after CLS and patches, before the first layer norm,
and again other ones in the layers 2..J. Both towers keep their weights, code and pooling.

With `vision_tokens=0, depth=1` and the settings of IVLP it is CoOp (text context only); with `coupled=True`, MaPLe
(image tokens are linear maps of the text's); with `vision_tokens=0, depth=1, conditional=True`, CoCoOp (a small network
of the image's features makes a token that is added to each context token: other texts for every image). Texts are cut
to the longest one: exact, as attention is causal and the end of text is read at its own place, and several times
cheaper than the usual 77 tokens.

Cost: `(context d_text + vision_tokens d_image) J` trained numbers, 46,080 for ViT-B/16 with 4 + 4 tokens and J = 9.
CoCoOp: `context d_text + (d + 1) h + (h + 1) d_text` with h = d / 16, 35,360; its text tower runs on C texts for each
image, in training and at test, where the others' runs on C texts a step (a list of classes).

Papers: Khattak et al., "Self-regulating Prompts", ICCV 2023, arXiv 2307.06948; "MaPLe: Multi-modal Prompt Learning",
CVPR 2023, arXiv 2210.03117; Zhou et al., "Learning to Prompt for Vision-Language Models" (CoOp), IJCV 2022,
arXiv 2109.01134, and "Conditional Prompt Learning for Vision-Language Models" (CoCoOp), CVPR 2022, arXiv 2203.05557.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nets.multitask import mlp
from ..nets.prompts import deep_prompts, encoder_layers, insert_prompts, meta_net
from .two_tower import TwoTower

__all__ = ["PromptedCLIP"]

TEXTS = 256  # in one pass of the text tower, where every image has its own


class PromptedCLIP(TwoTower):
    """A CLIP model with prompts; `encode_image` takes `pixel_values` `(B, 3, H, W)`, `encode_text` class names.

    Args:
        model: a transformers `CLIPModel`, of any float type. Its weights are shared, never changed.
        tokenizer: its tokenizer, called with a list of texts; only `input_ids` are used.
        context: text tokens a layer. Paper: 4.
        vision_tokens: image tokens a layer; 0 leaves the image tower without prompts. Paper: 4.
        depth: J, the number of layers with tokens of their own, the input counted. Paper: 9; 3 across data sets.
        phrase: words whose embeddings the context of the first layer begins as, at its end if it is longer. Empty: all
            begin as N(0, 0.02^2), as the deeper ones do.
        coupled: image tokens are linear maps of the text tokens (MaPLe) instead of independent ones.
        conditional: the context depends on the image (CoCoOp); takes `vision_tokens=0` and `depth=1`.
        seed: of the random beginnings.

    Raises:
        InputError: a context shorter than the phrase, a depth above the layers of a tower.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context: int = 4,
        vision_tokens: int = 4,
        depth: int = 9,
        phrase: str = "a photo of a",
        coupled: bool = False,
        conditional: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (hasattr(model, "text_model") and hasattr(model, "vision_model") and hasattr(model, "logit_scale")):
            raise InputError(f"PromptedCLIP takes a transformers CLIPModel, got a {type(model).__name__}")
        if context < 1 or vision_tokens < 0:
            raise InputError(f"context is at least 1 and vision_tokens at least 0, got {context} and {vision_tokens}")
        if coupled and vision_tokens != context:
            raise InputError(f"coupled image tokens are as many as the context, got {vision_tokens} and {context}")
        if conditional and (vision_tokens or depth != 1):
            raise InputError(
                f"a conditional context is that of the first layer, without image tokens: give vision_tokens=0 and "
                f"depth=1, got {vision_tokens} and {depth}"
            )
        towers = {"text": model.text_model, "image": model.vision_model}
        for name, tower in towers.items():
            layers = len(encoder_layers(tower)) if name == "text" or vision_tokens else depth
            if not 1 <= depth <= layers:
                raise InputError(f"depth is 1 to the {layers} layers of the {name} tower, got {depth}")
        self.model, self.tokenizer, self.context, self.coupled = model, tokenizer, context, coupled
        self.conditional = conditional
        widths = {name: tower.config.hidden_size for name, tower in towers.items()}
        self.scale = model.logit_scale.detach().exp().item()
        self.image_size = model.vision_model.config.image_size
        self.longest = model.text_model.config.max_position_embeddings
        prompts: dict[str, nn.Module] = {
            "text": deep_prompts(context, widths["text"], depth, first=self._first(phrase, seed), seed=seed)
        }
        if coupled:
            shape = [widths["text"], widths["image"]]
            prompts["coupling"] = nn.ModuleList(mlp(shape, seed=seed + 1 + layer) for layer in range(depth))
        elif vision_tokens:
            prompts["image"] = deep_prompts(vision_tokens, widths["image"], depth, seed=seed + 1)
        if conditional:
            prompts["meta"] = meta_net(model.config.projection_dim, widths["text"], seed=seed + 1)
        self.prompts = nn.ModuleDict(prompts).to(model.logit_scale.device)
        self._known: dict[tuple[str, ...], Tensor] = {}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts)["input_ids"]]

    def _first(self, phrase: str, seed: int) -> Tensor:
        embeddings = self.model.text_model.embeddings.token_embedding.weight.detach()
        words = self._ids([phrase])[0][1:-1] if phrase else []
        if len(words) > self.context:
            raise InputError(
                f"context={self.context} is fewer than the {len(words)} tokens of the phrase {phrase!r}; give a longer "
                "context or a shorter phrase"
            )
        first = deep_prompts(self.context, embeddings.shape[1], seed=seed)[0].detach()
        if words:
            first[-len(words) :] = embeddings[words].to(first)
        return first

    def _tokens(self, texts: Sequence[str], placeholders: int) -> Tensor:
        """`(C, T)`, T the longest text's; `placeholders` start tokens after the start, where the context comes in."""
        key = (str(placeholders), *texts)
        if key not in self._known:
            rows = [[ids[0]] * placeholders + ids for ids in self._ids(list(texts))]
            length = max(map(len, rows))
            if length > self.longest:
                worst = texts[[len(row) for row in rows].index(length)]
                raise InputError(f"{worst!r} takes {length} tokens with its context, the text tower has {self.longest}")
            padded = [row + [row[-1]] * (length - len(row)) for row in rows]  # padded with the end of text, never read
            self._known = {} if len(self._known) > 8 else self._known
            self._known[key] = torch.tensor(padded)
        return self._known[key].to(self.model.logit_scale.device)

    def encode_text(self, texts: Sequence[Any], *, prompted: bool = True) -> Tensor:
        text_model = self.model.text_model
        with ExitStack() as stack:
            if prompted:
                entry = text_model.embeddings.token_embedding
                prompts: Any = self.prompts["text"]  # type: ignore[index]
                stack.enter_context(insert_prompts(text_model, prompts, at=1, replace=True, entry=entry))
                texts = [f"{name}." for name in texts]
            ids = self._tokens(texts, self.context if prompted else 0)
            return self.model.text_projection(text_model(input_ids=ids).pooler_output)

    def text_for(self, texts: Sequence[Any], images: Tensor) -> Tensor:
        """`(C, d)`; with a conditional context `(B, C, d)`, and then `encode_text` is what is left without images."""
        if not self.conditional:
            return self.encode_text(texts)
        text_model, prompts = self.model.text_model, self.prompts
        ids = self._tokens([f"{name}." for name in texts], self.context)  # (C, T)
        first: Tensor = prompts["text"][0]  # type: ignore[index]
        shifts = prompts["meta"](images.to(first.dtype))  # type: ignore[index, operator]
        entry, found = text_model.embeddings.token_embedding, []
        for part in shifts.split(max(1, TEXTS // len(ids))):
            tokens = (first + part.unsqueeze(1)).repeat_interleave(len(ids), 0)  # (b C, context, d_text)
            with insert_prompts(text_model, [tokens], at=1, replace=True, entry=entry):
                pooled = text_model(input_ids=ids.repeat(len(part), 1)).pooler_output
            found.append(self.model.text_projection(pooled).unflatten(0, (len(part), len(ids))))
        return torch.cat(found)

    def encode_image(self, inputs: Any, *, prompted: bool = True) -> Tensor:
        if inputs.ndim != 4 or inputs.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(
                f"images have the shape {tuple(inputs.shape)}, the encoder takes (B, 3, {self.image_size}, "
                f"{self.image_size}); resize them"
            )
        vision_model, tokens = self.model.vision_model, self._image_tokens() if prompted else []
        with ExitStack() as stack:
            if tokens:
                stack.enter_context(insert_prompts(vision_model, tokens, at="end"))
            return self.model.visual_projection(vision_model(pixel_values=inputs).pooler_output)

    def _image_tokens(self) -> list[Tensor]:
        prompts: Any = self.prompts
        if self.coupled:
            return [linear(tokens) for linear, tokens in zip(prompts["coupling"], prompts["text"], strict=True)]
        return list(prompts["image"]) if "image" in prompts else []
