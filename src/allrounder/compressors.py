"""What `allrounder run` can do with the merged model it chose: make it smaller, and say what that cost.

A compressor gets the merged model and the suite's training and validation splits; test is scored by the run. Bytes are
those of the shared weights, as everywhere in the report; heads are the same for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import Weights
from .compression.d_pruner import d_pruner
from .compression.dual_head import DualHeadLoss, DualOutput
from .compression.encoder_states import Encoder
from .compression.ernie_tiny import LatentLoss
from .compression.genie import quantize
from .compression.genie_data import Synthesis
from .compression.genie_rounding import Rounding
from .compression.nearest import restore_weights, round_weights
from .compression.pruning import Pruned, Structure, keep_mask
from .compression.pruning_baselines import magnitude, wanda
from .compression.quantized import QuantizedNetwork
from .compression.sparsegpt import sparsegpt
from .compression.stages import Stage, distil
from .contest import Share, Steps, settle, stored_bytes
from .data.causal import text_rows
from .errors import InputError
from .losses.distillation import soft_label_loss
from .nets.language_model import CausalLM
from .nets.multitask import MultiTaskModel
from .task import Batches, Examples, Suite
from .train import fit, load_weights

__all__ = ["COMPRESSORS", "Compressor", "SmallBench", "Smaller"]

Rows = Annotated[int, Field(ge=1, le=1_000_000)]
Bits = Annotated[int, Field(ge=2, le=8)]
Sparsity = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Layers = Annotated[int, Field(ge=1, le=1000)]


@dataclass
class SmallBench:
    """What a compressor may use.

    Args:
        model: the merged model with its heads.
        suite: the tasks.
        make_small: share -> an untrained model of the suite's kind with that share of the width (encoders: of the
            layers, taken from the merged model) and the merged model's heads; `None` where the suite has none.
        tuning: as in `contest.Bench`.
        seed: of everything random.
        data: the recipe's data folder.
    """

    model: MultiTaskModel
    suite: Suite
    make_small: Callable[[MultiTaskModel, float], MultiTaskModel] | None
    tuning: Mapping[str, Any]
    seed: int
    data: str | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps that show every task as often as its expert saw it."""
        how = self.tuning
        if "steps" in how:
            return how["steps"] * len(self.suite)
        count = sum(len(task.train) for task in self.suite.values())  # type: ignore[arg-type]
        return max(1, round(how["epochs"] * count / how["batch_size"]))

    def small(self, share: float) -> MultiTaskModel:
        if self.make_small is None:
            raise InputError("this suite has no smaller model of its kind to distil into; compress it with 'nearest'")
        return self.make_small(self.model, share).to(next(self.model.parameters()).device)


@dataclass
class Smaller:
    """What came out.

    Args:
        model: `(inputs, task) -> outputs`.
        bytes: of the shared weights as they are stored.
        weights: what is written; `None` for a model that writes itself.
        note: a setting, in words.
    """

    model: MultiTaskModel
    bytes: int
    weights: Weights | None
    note: str


@dataclass(frozen=True)
class Compressor:
    """One line of the table.

    Args:
        title: as the report has it.
        paper: its slug in the catalogue, if it has one.
        shrink: `(bench, **options) -> Smaller`.
    """

    title: str
    paper: str
    shrink: Callable[..., Smaller]


def _matrices(backbone: nn.Module) -> dict[str, Any]:
    """Linear and convolutional layers by name."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    found = {name: part for name, part in backbone.named_modules() if isinstance(part, kinds)}
    if not found:
        raise InputError("the model has no linear or convolutional layer to compress")
    return found


def _nearest(bench: SmallBench, *, bits: Bits = 8) -> Smaller:
    """Integer weights of linear and convolutional layers, rounded to the nearest."""
    model = copy.deepcopy(bench.model)
    weights = round_weights(model.backbone, bits)
    load_weights(model.backbone, restore_weights(weights))
    return Smaller(model, stored_bytes(weights), weights, f"{bits} bits a weight")


def _genie(
    bench: SmallBench,
    *,
    weights: Bits = 4,
    activations: Bits | None = 4,
    images: Literal["generated", "training"] = "generated",
    count: Annotated[int, Field(ge=2, le=1_000_000)] = 256,
    image_steps: Steps = 300,
    steps: Steps = 500,
) -> Smaller:
    """Weights and activations of the BatchNorm backbone as integers, fitted block by block, on images made from the
    BatchNorm statistics or on `count` training images of all tasks. Rates are for some hundred steps a block."""
    shown = [torch.as_tensor(task.train.inputs) for task in bench.suite.values()]  # type: ignore[attr-defined]
    shape = tuple(shown[0].shape[1:])
    mean, std = (values.tolist() for values in _levels(torch.cat(shown)))
    given = None
    if images == "training":
        each = -(-count // len(shown))
        given = torch.cat([task.train.take(each, seed=bench.seed).inputs for task in bench.suite.values()])[:count]  # type: ignore[attr-defined]
    small = quantize(
        bench.model.backbone, weights=weights, activations=activations, image_shape=shape, images=given,
        synthesis=Synthesis(count=count, batch=128, steps=max(1, image_steps), mean=mean, std=std),
        rounding=Rounding(steps=steps, lr_bits=3e-2, lr_scale=1e-3, lr_activation=1e-3, weight=0.01), seed=bench.seed,
    )  # fmt: skip
    kind = "floats" if activations is None else f"{activations} bits"
    note = f"weights {weights} bits, activations {kind}, 8 at both ends; {count} {images} images; timed in floats"
    model = MultiTaskModel(small, copy.deepcopy(dict(bench.model.heads.items())))
    return Smaller(model, sum(small.bytes.values()), None, note)


def _levels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel: what a preprocessor's configuration says of a published network."""
    return images.mean((0, 2, 3)), images.std((0, 2, 3))


def _sparse(model: MultiTaskModel, pruned: Pruned, note: str) -> Smaller:
    whole = stored_bytes(model.backbone.state_dict()) - pruned.dense_bytes + pruned.sparse_bytes
    return Smaller(model, whole, None, f"{note}{100 * pruned.overall:.0f}% of all weights; smaller when stored sparse")


def _rows(suite: Suite, count: int, seed: int) -> list[dict[str, Tensor]]:
    """About `count` training rows, as many of each task, in batches of eight."""
    each, found = -(-count // len(suite)), []
    for task in suite.values():
        found += [inputs for inputs, _ in Batches(task.train.take(each, seed=seed), 8)]  # type: ignore[attr-defined]
    return found


def _calibrated(prune: Callable[..., Pruned]) -> Callable[..., Smaller]:
    def shrink(
        bench: SmallBench, *, sparsity: Sparsity = 0.5, structure: Structure = "matrix", rows: Rows = 128
    ) -> Smaller:
        model = copy.deepcopy(bench.model)
        text = _rows(bench.suite, rows, bench.seed)
        pruned = prune(model.backbone.model, text, sparsity, structure)
        return _sparse(model, pruned, f"{structure}, calibrated on {rows} rows of all tasks: zeros are ")

    return shrink


def _d_pruner(
    bench: SmallBench,
    *,
    sparsity: Sparsity = 0.5,
    structure: Structure = "matrix",
    domain: str | None = None,
    general: str | None = None,
    rows: Rows = 128,
    examples: Rows = 1000,
    epochs: Annotated[int, Field(ge=1, le=1000)] = 5,
    lr: Annotated[float, Field(gt=0, le=10)] = 0.03,
) -> Smaller:
    """Weights that neither the general text nor the domain needs become zeros. `domain` is a task, by default all of
    them; `general` a text, by default that of the other tasks."""
    from .nets.encoders import load_tokenizer

    model, suite = copy.deepcopy(bench.model), bench.suite
    kept = suite if domain is None else suite.only([domain])
    others = [task for task in suite if task != domain]
    if general is not None:
        length = next(iter(suite.values())).train.inputs["input_ids"].shape[1]  # type: ignore[attr-defined]
        tokenizer = load_tokenizer(bench.model.backbone.folder, padding=False)  # type: ignore[arg-type]
        found = text_rows(general, tokenizer=tokenizer, folder=bench.data, seed=bench.seed, rows=rows, length=length)
        open_text = [inputs for inputs, _ in Batches(found, 8)]
    elif domain is None or not others:
        raise InputError("d-pruner needs 'general', a text; to keep all tasks alike without one take 'sparsegpt'")
    else:
        open_text = _rows(suite.only(others), rows, bench.seed)
    pruned = d_pruner(
        model.backbone.model, open_text, _rows(kept, examples, bench.seed), sparsity, structure,  # type: ignore[arg-type]
        epochs=epochs, lr=lr,
    )  # fmt: skip
    about = f"{structure}, general: {general or 'the other tasks'}, domain: {domain or 'all tasks'}: zeros are "
    return _sparse(model, pruned, about)


@torch.no_grad()
def _magnitude(bench: SmallBench, *, sparsity: Sparsity = 0.5) -> Smaller:
    """The smallest weights of each layer (of language models: in the blocks) become zeros; stored as a bit a weight
    and the values that are left."""
    model = copy.deepcopy(bench.model)
    if isinstance(model.backbone, CausalLM):
        return _sparse(model, magnitude(model.backbone.model, sparsity), "zeros are ")
    whole = stored_bytes(model.backbone.state_dict())
    for layer in _matrices(model.backbone).values():
        rows: Any = layer.weight.flatten(1)
        layer.weight.mul_(keep_mask(rows.abs(), sparsity).view_as(layer.weight))
        size = layer.weight.element_size()
        whole += -(-rows.numel() // 8) - int((rows == 0).sum()) * size
    note = f"{100 * sparsity:g}% zeros: smaller when stored sparse, not faster"
    return Smaller(model, whole, model.backbone.state_dict(), note)


class _Taught(nn.Module):
    """The small model with an auxiliary head a task; its outputs in training are those of a `DualHead`."""

    def __init__(self, small: MultiTaskModel, teacher: MultiTaskModel) -> None:
        super().__init__()
        self.small, self._teacher = small, (teacher.eval(),)
        self.auxiliary = nn.ModuleDict(copy.deepcopy(dict(small.heads.items()))).requires_grad_(True)

    def forward(self, inputs: Any, task: str) -> Any:
        if not self.training:
            return self.small(inputs, task)
        features = self.small.backbone(inputs)
        with torch.no_grad():
            taught = self._teacher[0](inputs, task)
        return DualOutput(self.small.heads[task](features), self.auxiliary[task](features), taught)


def _trained(bench: SmallBench, model: Any, suite: Suite) -> None:
    how = bench.tuning
    fit(
        model, suite, steps=bench.steps, lr=how["lr"], batch_size=how["batch_size"], weight_decay=how["weight_decay"],
        schedule="cosine", seed=bench.seed,
    )  # fmt: skip
    settle(model.small.backbone, bench.suite, bench.seed)


def _dual_head(bench: SmallBench, *, share: Share = 0.5, weight: Weight = 1.0) -> Smaller:
    """A narrower model learns the labels with its fixed heads and the merged model's logits with heads that go."""
    small = bench.small(share)
    for head in small.heads.values():
        head.requires_grad_(False)
    loss = DualHeadLoss()
    loss.recipe = replace(loss.recipe, weight=weight)
    suite = Suite([replace(task, loss=loss) for task in bench.suite.values()], name=bench.suite.name)
    _trained(bench, _Taught(small, bench.model), suite)
    state = small.backbone.state_dict()
    return Smaller(small, stored_bytes(state), state, f"{100 * share:g}% of the width, labels and the merged logits")


class _Softly(nn.Module):
    """The small model's logits beside the merged model's."""

    def __init__(self, small: MultiTaskModel, teacher: MultiTaskModel) -> None:
        super().__init__()
        self.small, self._teacher = small, (teacher.eval(),)

    def forward(self, inputs: Any, task: str) -> Any:
        if not self.training:
            return self.small(inputs, task)
        with torch.no_grad():
            taught = self._teacher[0](inputs, task)
        return DualOutput(self.small(inputs, task), None, taught)


def _ernie_tiny(
    bench: SmallBench, *, layers: Layers = 3, epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
) -> Smaller:
    """The stages that need no general text: the merged encoder's states, then its logits and the labels."""
    teacher = getattr(bench.model.backbone, "model", None)
    depth = getattr(getattr(teacher, "config", None), "num_hidden_layers", None)
    if depth is None or bench.make_small is None:
        raise InputError("ERNIE-Tiny is for the text suites, whose models are transformers encoders")
    if layers > depth:
        raise InputError(f"the student has 1 to {depth} layers (the merged model's), got {layers}")
    small = bench.small(layers / depth)
    for head in small.heads.values():
        head.requires_grad_(False)
    student, shown = Encoder(small.backbone.model), Encoder(copy.deepcopy(teacher).eval())  # type: ignore[arg-type]
    inputs = [task.train.inputs for task in bench.suite.values()]  # type: ignore[attr-defined]
    longest = max(part["input_ids"].shape[1] for part in inputs)
    union = {
        key: torch.cat([F.pad(part[key], (0, longest - part[key].shape[1])) for part in inputs]) for key in inputs[0]
    }
    data = Examples(union, torch.zeros(len(union["input_ids"]), dtype=torch.long))
    size = bench.tuning["batch_size"]
    latent = LatentLoss(student, shown)
    stage = Stage(
        "task-adaptive", data, {"latent": latent}, shown, steps=max(1, round(epochs * len(data) / size)),
        lr=bench.tuning["lr"], batch_size=size,
    )  # fmt: skip
    distil(student, [stage], seed=bench.seed)

    def loss(output: DualOutput, targets: Tensor) -> Tensor:
        return soft_label_loss(output.main, output.teacher) + F.cross_entropy(output.main, targets)

    suite = Suite([replace(task, loss=loss) for task in bench.suite.values()], name=bench.suite.name)
    _trained(bench, _Softly(small, bench.model), suite)
    note = f"{layers} of {depth} layers; states of the merged model, then its logits and the labels"
    return Smaller(small, stored_bytes(small.backbone.state_dict()), None, note)


COMPRESSORS = {
    "nearest": Compressor("Nearest rounding", "", _nearest),
    "genie": Compressor("Genie", "genie", _genie),
    "magnitude": Compressor("Magnitude pruning", "", _magnitude),
    "wanda": Compressor("Wanda", "", _calibrated(wanda)),
    "sparsegpt": Compressor("SparseGPT", "", _calibrated(sparsegpt)),
    "d-pruner": Compressor("D-Pruner", "d-pruner", _d_pruner),
    "dual-head": Compressor("Dual-head distillation", "dual-head-kd", _dual_head),
    "ernie-tiny": Compressor("ERNIE-Tiny", "ernie-tiny", _ernie_tiny),
}


def write_smaller(found: Smaller, path: Path, *, like: Path | None, metadata: dict[str, str]) -> None:
    """Write a compressed model into a new folder: safetensors, an ordinary transformers folder, or a quantised network
    with its heads beside it."""
    from .saving import replacing, save

    heads = {key: value for key, value in found.model.state_dict().items() if key.startswith("heads.")}
    if isinstance(found.model.backbone, QuantizedNetwork):
        from safetensors.torch import save_file

        with replacing(path) as folder:
            found.model.backbone.write(folder)
            save_file({key: value.detach().cpu() for key, value in heads.items()}, folder / "heads.safetensors")
        return
    if found.weights is None:
        from .nets.encoders import load_tokenizer, quiet

        inner: Any = found.model.backbone
        with replacing(path) as folder, quiet():
            inner.model.save_pretrained(folder)
            if like is not None:
                load_tokenizer(like, padding=False).save_pretrained(folder)
        return
    save({f"backbone.{key}": found.weights[key] for key in found.weights} | heads, path, metadata=metadata)
