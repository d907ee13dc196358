"""Hidden states, queries, keys and values of a transformers encoder, and students cut from one.

`Encoder(model)` is the model with its inside in view: `encoder(inputs)` gives `States`, from which every latent loss
is computed. Attention scores come from queries and keys, so that they are there whichever attention kernel the model
runs on: fused kernels, which return no attention, need no `attn_implementation="eager"`. In return the position
information must be in the embeddings (BERT, RoBERTa, ELECTRA, ERNIE, DistilBERT): models that rotate queries or add
position biases to scores have hidden states here but no attention.

`build_student(teacher, layers=3)` makes the small model: chosen layers of the teacher, or a narrower configuration.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nets.taps import tapped, watching

__all__ = ["Encoder", "States", "build_student", "uniform_map"]

PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


@dataclass(frozen=True)
class States:
    """What one forward pass of an `Encoder` showed. Layers are counted from 1; 0 are the embeddings.

    Args:
        mask: `(N, T)`, true where a token is no padding.
        hidden: layer -> `(N, T, d)`.
        queries, keys, values: layer -> `(N, heads, T, d / heads)`; empty for models without such projections.
        logits: `(N, C)`, or `None` for an encoder without a head.
    """

    mask: Tensor
    hidden: dict[int, Tensor]
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def scores(self, layer: int) -> Tensor:
        """Attention scores before the softmax, `(N, heads, T, T)`.

        Raises:
            InputError: a model whose queries and keys are not in view.
        """
        if layer not in self.queries:
            raise InputError(
                f"queries and keys of layer {layer} are not in view: this kind of model has no attention scores here; "
                "choose the latent loss of hidden states only (attention=None)"
            )
        q, k = self.queries[layer], self.keys[layer]
        return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


class Encoder(nn.Module):
    """A transformers encoder, with or without a head, that shows its states.

    Args:
        model: `PreTrainedModel`; its weights are shared, not copied.
        layers: numbers of the layers to show, 0 for the embeddings. Default: all. A teacher needs only those that the
            student is mapped to.

    Called with `{"input_ids": (N, T), "attention_mask": (N, T), ...}`.

    Raises:
        InputError: a model whose layers cannot be found, layer numbers it lacks.
    """

    def __init__(self, model: Any, layers: Iterable[int] | None = None) -> None:
        super().__init__()
        self.model = model
        blocks = _blocks(model)
        self.depth = len(blocks)
        self.shown = sorted(set(range(self.depth + 1) if layers is None else layers))
        if not self.shown or self.shown[0] < 0 or self.shown[-1] > self.depth:
            raise InputError(f"the model has layers 0 (embeddings) to {self.depth}, got {self.shown}")
        self._blocks = {i + 1: name for i, name in enumerate(blocks)}
        inside = {i: _projections(model.get_submodule(self._blocks[i])) for i in self.shown if i}
        self._inside = {
            f"{self._blocks[i]}.{name}": (kind, i)
            for i, names in inside.items()
            for kind, name in zip(("queries", "keys", "values"), names, strict=False)
        }

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads

    def forward(self, inputs: Mapping[str, Tensor]) -> States:
        if "attention_mask" not in inputs or "input_ids" not in inputs:
            raise InputError(f"inputs are a dict with input_ids and attention_mask, got {', '.join(map(str, inputs))}")
        hidden: dict[int, Tensor] = {}

        def first(name: str, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
            hidden[0] = arguments[0] if arguments else keywords["hidden_states"]

        with ExitStack() as stack:
            if 0 in self.shown:
                stack.enter_context(watching(self.model, [self._blocks[1]], first))
            names = [*(self._blocks[i] for i in self.shown if i), *self._inside]
            seen = stack.enter_context(tapped(self.model, names))
            output = self.model(**inputs)
        for i in self.shown:
            if i:
                value = seen[self._blocks[i]]
                hidden[i] = value[0] if isinstance(value, tuple) else value
        found: dict[str, dict[int, Tensor]] = {"queries": {}, "keys": {}, "values": {}}
        for name, (kind, i) in self._inside.items():
            flat = seen[name]  # (N, T, d)
            found[kind][i] = flat.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return States(inputs["attention_mask"] != 0, hidden, **found, logits=getattr(output, "logits", None))


def uniform_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Student layer -> teacher layer, `i -> i M / m`; the last goes to the last.

    Raises:
        InputError: more layers in the student, or a quotient that is no integer.

    >>> uniform_map(3, 12)
    {1: 4, 2: 8, 3: 12}
    """
    if not 1 <= student_layers <= teacher_layers:
        raise InputError(f"the student has 1 to {teacher_layers} layers (the teacher's), got {student_layers}")
    if teacher_layers % student_layers:
        divisors = [m for m in range(1, teacher_layers + 1) if teacher_layers % m == 0]
        raise InputError(
            f"{teacher_layers} teacher layers do not divide by {student_layers} student layers; use "
            f"{', '.join(map(str, divisors))} layers, or give the layer map yourself"
        )
    step = teacher_layers // student_layers
    return {i: i * step for i in range(1, student_layers + 1)}


def build_student(
    teacher: Any,
    *,
    layers: int,
    keep: Literal["first", "every"] = "first",
    width: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    labels: int | None = None,
    seed: int = 0,
) -> Any:
    """A smaller model of the teacher's kind.

    Args:
        teacher: a transformers encoder, with or without a head; left as it was.
        layers: of the student.
        keep: which layers of the teacher it starts from: the `first`, or `every` M / m-th, the last among them.
        width, intermediate, heads: for a narrower student, which starts from random weights. TinyBERT-4: 4 layers,
            312, 1200, 12.
        labels: outputs of a new, random classification head; `None`: a model of the teacher's class, its head copied
            when the width is the teacher's.
        seed: of all random weights; torch's global generator is left as it was.

    Returns:
        A transformers model in evaluation mode, to be saved with `save_pretrained`.

    Raises:
        InputError: more layers than the teacher has, a width that the heads do not divide.
    """
    import transformers

    blocks = _blocks(teacher)
    depth = len(blocks)
    if not 1 <= layers <= depth:
        raise InputError(f"the student has 1 to {depth} layers (the teacher's), got {layers}")
    if keep not in ("first", "every"):
        raise InputError(f"keep is 'first' or 'every', got {keep!r}")
    config = copy.deepcopy(teacher.config)
    given = {"hidden_size": width, "intermediate_size": intermediate, "num_attention_heads": heads}
    narrower = {key: value for key, value in given.items() if value is not None and value != getattr(config, key)}
    for key, value in {"num_hidden_layers": layers, **narrower}.items():
        setattr(config, key, value)
    if config.hidden_size % config.num_attention_heads:
        raise InputError(f"{config.num_attention_heads} heads do not divide the width {config.hidden_size}")
    config.architectures = None
    if labels is not None:
        config.num_labels = labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if labels is None:
            student = type(teacher)(config)
        else:
            student = transformers.AutoModelForSequenceClassification.from_config(config)
    if not narrower:
        chosen = list(range(1, layers + 1)) if keep == "first" else list(uniform_map(layers, depth).values())
        _copy_weights(teacher, student, chosen, head=labels is None)
    dtype = next(teacher.parameters()).dtype
    return student.to(device=next(teacher.parameters()).device, dtype=dtype).eval()


def _body(model: Any) -> tuple[nn.Module, str]:
    """The encoder below the head, and what its names begin with in the model."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    return (inner, prefix + ".") if isinstance(inner, nn.Module) else (model, "")


def _blocks(model: Any) -> list[str]:
    """Names of the layers, in order."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    body, prefix = _body(model)
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return [f"{prefix}{name}.{i}" for i in range(len(module))]
    raise InputError(f"{type(model).__name__} is no transformers encoder: its {depth} layers cannot be found")


def _projections(block: nn.Module) -> tuple[str, ...]:
    """Names of the query, key and value layers in a block, where it has such."""
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    for kinds in PROJECTIONS:
        found = [[name for name in names if name.rpartition(".")[2] == kind] for kind in kinds]
        if all(len(ones) == 1 for ones in found):
            return tuple(ones[0] for ones in found)
    return ()


def _copy_weights(teacher: Any, student: Any, chosen: list[int], *, head: bool) -> None:
    """Copy everything but the layers, and layer i of the student from layer `chosen[i - 1]` of the teacher."""
    (source, cut), (_, joined) = _body(teacher), _body(student)
    weights = {name.removeprefix(cut): value for name, value in teacher.state_dict().items()}
    place = _blocks(source)[0].removesuffix(".0")
    pattern = re.compile(re.escape(place) + r"\.(\d+)\.(.+)")
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if not head and not name.startswith(joined):
                continue
            short = name.removeprefix(joined)
            if found := pattern.fullmatch(short):
                short = f"{place}.{chosen[int(found[1])] - 1}.{found[2]}"
            if short in weights and weights[short].shape == value.shape:
                value.copy_(weights[short])
