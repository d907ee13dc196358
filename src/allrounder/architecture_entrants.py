"""Multi-task architectures that compete in `allrounder run`: networks with parts of their own for each task.

All are trained as `joint` is: on as many examples as all experts together, with the learning rate of a specialist, from
the base's weights and with the suite's fixed heads. What an architecture adds gives nothing at first, so that every one
starts as the base itself:

    answer = head_t(normalise(sqrt(d) f(x) + added_t(x)))      f: the base's backbone, features of length 1 in d numbers

Where the architecture takes the backbone apart instead (expert layers, a slimmable network), its parts are copies of
the base's. What is stored are all of these weights; the fixed heads count for nobody.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .contest import Bench, Count, Entrant, Outcome, Share, settle, stored_bytes
from .errors import InputError
from .multitask import (
    PLE,
    TIM,
    TRM,
    AttributeLinear,
    Configuration,
    Controllable,
    MMoE,
    Sandwich,
    SharedBottom,
    SharedDecoder,
    TaskExpert,
)
from .nets.multitask import MultiTaskModel, Normalize, mlp
from .scoring import mean, score
from .task import Batches, to_device
from .train import Update

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: dict[str, Entrant] = {}
PICTURES = ("digits", "scripts", "images")
POOLED = (*PICTURES, "text", "hub-text", "hub-images")  # one vector of features an input
GRID = 4  # parts of a picture along each side, for DTRN
GROUP = 4  # channels of a group of a dense decoder's normalisation


def _entrant(
    name: str, title: str, paper: str = "", suites: tuple[str, ...] = POOLED, network: str = ""
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    def keep(enter: Callable[..., Outcome]) -> Callable[..., Outcome]:
        entrant = Entrant(f"Together: {title}", "training", paper, enter, default=False, suites=suites, network=network)
        ARCHITECTURES[f"multitask/{name}"] = entrant
        return enter

    return keep


class _Beside(MultiTaskModel):
    """The base's features and what `added` makes of them for the task, then the task's fixed head.

    Args:
        base: backbone and heads, taken over.
        added: `(inputs, features (N, d) of a spread of about 1, maps, task) -> (N, d)`; zeros at first.
        taps: modules of the backbone whose outputs are the maps.
    """

    def __init__(self, base: MultiTaskModel, added: nn.Module, taps: Sequence[int] = ()) -> None:
        super().__init__(base.backbone, dict(base.heads.items()))
        self.added, self.taps = added, tuple(taps)

    def forward(self, inputs: Any, task: str) -> Tensor:
        features, maps = inputs, []
        if self.taps:
            for i, layer in enumerate(self.backbone):  # type: ignore[arg-type]
                features = layer(features)
                if i in self.taps:
                    maps.append(features)
        else:
            features = self.backbone(inputs)
        features = features * features.shape[-1] ** 0.5
        return self.heads[task](F.normalize(features + self.added(inputs, features, maps, task), dim=-1))


def _silent(*layers: nn.Module) -> None:
    """Layers that give zeros until they are trained."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def _trained(
    bench: Bench, make: Callable[[MultiTaskModel], MultiTaskModel], update: Callable[..., Update] | None = None
) -> MultiTaskModel:
    """The network that `make` builds of a copy of the base, trained on all tasks, in one step all if by an `update`."""
    made: list[MultiTaskModel] = []

    def build(model: MultiTaskModel) -> dict[str, Any]:
        made.append(make(model).to(bench.device))
        return {"model": made[0]} | ({} if update is None else {"sampler": "all", "update": update(made[0])})

    bench.joint(build)
    return made[0]


def _outcome(network: MultiTaskModel, note: str) -> Outcome:
    """All but the fixed heads is stored."""
    fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    stored = {name: value for name, value in network.state_dict().items() if name not in fixed}
    return Outcome(answer=network.eval(), bytes=stored_bytes(stored), note=note)


def _beside(bench: Bench, added: nn.Module, note: str, taps: Sequence[int] = ()) -> Outcome:
    network = _trained(bench, lambda model: _Beside(model, added, taps))
    settle(network.backbone, bench.suite, bench.seed)
    return _outcome(network, f"{note}, before the fixed heads")


class _Features(nn.Module):
    """A head of `multitask.experts` on the features."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head
        _silent(*(tower[-1] for tower in head.towers))

    def forward(self, inputs: Any, features: Tensor, maps: list[Tensor], task: str) -> Tensor:
        return self.head(features)[task]


def _width(bench: Bench) -> int:
    """How many numbers the base's features are."""
    inputs = next(iter(Batches(next(iter(bench.suite.values())).train, 1)))[0]
    with torch.no_grad():
        return bench.model.backbone(to_device(inputs, bench.device)).shape[-1]


def _on_features(bench: Bench, kind: Callable[..., nn.Module], hidden: int, note: str) -> Outcome:
    width = _width(bench)
    head = kind(width, list(bench.suite), hidden=hidden, tower=hidden, outputs=width, seed=bench.seed)
    return _beside(bench, _Features(head), f"{note} of {hidden} and a tower for each task")


@_entrant("shared-bottom", "shared bottom")
def _shared_bottom(bench: Bench, *, hidden: Count = 64) -> Outcome:
    return _on_features(bench, SharedBottom, hidden, "one layer")


@_entrant("mmoe", "MMoE")
def _mmoe(bench: Bench, *, experts: Count = 4, hidden: Count = 64) -> Outcome:
    return _on_features(bench, partial(MMoE, experts=experts), hidden, f"{experts} experts")


@_entrant("ple", "PLE")
def _ple(bench: Bench, *, own: Count = 1, shared: Count = 1, levels: Count = 2, hidden: Count = 64) -> Outcome:
    kind = partial(PLE, own=own, shared=shared, levels=levels)
    return _on_features(bench, kind, hidden, f"{levels} levels, {own} + {shared} experts")


class _TaskViews(nn.Module):
    """DTRN on pictures: their parts are the history, the features the shown item, all of them fields.

    Args:
        tasks: their names.
        pixels: of a picture, which is square.
        width: of the features.
        head: `(in_features, tasks) -> ` a head of `multitask.experts`.
        dim: of each field.
        seed: of the initial weights.
    """

    def __init__(
        self, tasks: list[str], pixels: int, width: int, head: Callable[..., Any], *, dim: int, seed: int
    ) -> None:
        super().__init__()
        fields = GRID**2 + 2  # parts, what the task reads of them, features
        self.tasks = tasks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.part, self.item = nn.Linear(pixels // GRID**2, dim), nn.Linear(width, dim)
            self.tim = TIM(len(tasks), {"parts": GRID**2}, dim)
            self.trm = TRM(len(tasks), fields, dim)
            self.head = head(fields * dim, tasks)
        _silent(*(tower[-1] for tower in self.head.towers))

    def forward(self, inputs: Tensor, features: Tensor, maps: list[Tensor], task: str) -> Tensor:
        step = round(inputs[0].numel() ** 0.5) // GRID
        parts = inputs.reshape(-1, GRID, step, GRID, step).transpose(2, 3).flatten(3).flatten(1, 2)
        history, item = self.part(parts), self.item(features)  # (N, 16, dim), (N, dim)
        mask = torch.ones(history.shape[:2], dtype=torch.bool, device=history.device)
        views = self.tim({"parts": history}, {"parts": mask}, item)  # (T, N, 1, dim)
        common = torch.cat([history, item[:, None]], 1).expand(len(self.tasks), -1, -1, -1)
        refined = self.trm(torch.cat([common, views], 2)).flatten(2)
        return self.head(dict(zip(self.tasks, refined, strict=True)))[task]


@_entrant("dtrn", "DTRN", "dtrn", PICTURES)
def _dtrn(
    bench: Bench,
    *,
    head: Literal["shared-bottom", "mmoe", "ple"] = "shared-bottom",
    dim: Annotated[int, Field(ge=2, le=1024, multiple_of=2)] = 16,
    hidden: Count = 64,
) -> Outcome:
    width, tasks = _width(bench), list(bench.suite)
    kind = {"shared-bottom": SharedBottom, "mmoe": MMoE, "ple": PLE}[head]
    make = partial(kind, hidden=hidden, tower=hidden, outputs=width, seed=bench.seed)
    pixels = next(iter(Batches(bench.suite[tasks[0]].train, 1)))[0].numel()  # type: ignore[union-attr]
    if (side := round(pixels**0.5)) ** 2 != pixels or side % GRID:
        raise InputError(f"DTRN takes square pictures whose side is a multiple of {GRID}, got {pixels} pixels")
    views = _TaskViews(tasks, pixels, width, make, dim=dim, seed=bench.seed)
    return _beside(bench, views, f"each task's view of {GRID**2} parts of the picture, {head} of {hidden}")


class _Maps(nn.Module):
    """A dense decoder on the backbone's maps; the mean of what it makes over the picture is added to the features."""

    def __init__(self, decoder: TaskExpert | SharedDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        _silent(*(head.out for head in decoder.heads.values()))  # type: ignore[misc]

    def forward(self, inputs: Tensor, features: Tensor, maps: list[Tensor], task: str) -> Tensor:
        size = max((part.shape[2:] for part in maps), key=lambda shape: shape.numel())
        return self.decoder(maps, size=size, tasks=[task])[task].mean((2, 3))


def _decoded(bench: Bench, kind: Callable[..., Any], width: int, note: str) -> Outcome:
    """All stages of the backbone but the first, whose maps are four times as large as the next and of few channels."""
    layers: Any = bench.model.backbone
    taps = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)][1:]
    channels = [next(part.num_channels for part in reversed(layers[:i]) if hasattr(part, "num_channels")) for i in taps]
    outputs = dict.fromkeys(bench.suite, _width(bench))
    decoder = kind(outputs, channels, width=width, seed=bench.seed, norm=lambda c: nn.GroupNorm(c // GROUP, c))
    return _beside(bench, _Maps(decoder), f"{note}, {width} wide, on {len(taps)} stages of the backbone", taps)


Wide = Annotated[int, Field(ge=GROUP, le=4096, multiple_of=GROUP)]


@_entrant("shared-decoder", "shared decoder", "", ("scripts", "images"), "conv")
def _shared_decoder(bench: Bench, *, width: Wide = 16) -> Outcome:
    return _decoded(bench, SharedDecoder, width, "one decoder")


@_entrant("task-expert", "TaskExpert", "task-expert", ("scripts", "images"), "conv")
def _task_expert(
    bench: Bench, *, experts: Count = 3, width: Wide = 16, dynamic: bool = True, memory: bool = True
) -> Outcome:
    kind = partial(TaskExpert, experts=experts, dynamic=dynamic, memory=memory)
    without = "".join(
        f", {what}" for what, there in {"static gates": dynamic, "no memory": memory}.items() if not there
    )
    return _decoded(bench, kind, width, f"{experts} experts a stage{without}")


class _Routed(MultiTaskModel):
    """Experts in the layers of the backbone, mixed by which task it is; all are the base's layer at first."""

    roles: Tensor

    def __init__(self, base: MultiTaskModel, *, experts: int, top: int, seed: int) -> None:
        super().__init__(base.backbone, dict(base.heads.items()))
        self.tasks = list(base.heads)
        self.register_buffer("roles", torch.eye(len(self.tasks)), persistent=False)
        self.experts = nn.ModuleDict()
        for i, (name, layer) in enumerate(_feed_forward(self.backbone).items()):
            start = layer.weight.detach().flatten(1)
            bank = AttributeLinear(
                start.shape[1], len(start), attributes=len(self.tasks), experts=experts, top=top, seed=seed + i
            ).to(start)
            with torch.no_grad():
                bank.weight.copy_(start.expand_as(bank.weight))
                bank.bias.copy_(layer.bias.expand_as(bank.bias))  # type: ignore[union-attr]
            self.experts[name.replace(".", "/")] = bank
            layer.weight = layer.bias = None  # type: ignore[assignment]  # what stands here now is the experts' mixture

    def forward(self, inputs: Any, task: str) -> Tensor:
        role, mixed = self.roles[self.tasks.index(task)], {}
        for key, bank in self.experts.items():
            name = key.replace("/", ".")
            layer: Any = self.backbone.get_submodule(name)
            weight, mixed[f"{name}.bias"] = bank.mixed(role)  # type: ignore[operator]
            if isinstance(layer, nn.Conv2d):
                weight = weight.unflatten(1, (-1, *layer.kernel_size))
            mixed[f"{name}.weight"] = weight
        return self.heads[task](functional_call(self.backbone, mixed, (inputs,)))


def _feed_forward(backbone: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and convolutional layers; of a transformer those of its MLPs."""
    other = ("attention", "attn", "embed", "pooler")
    found = {
        name: layer
        for name, layer in backbone.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None and not any(o in name for o in other)
    }
    if not found or any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in found.values()):
        raise InputError("attribute-experts needs a base with feed-forward or plain convolutional layers with biases")
    return found


@_entrant("attribute-experts", "attribute-gated experts", "uni-perceiver-v2", POOLED, "conv")
def _attribute_experts(bench: Bench, *, experts: Count = 4, top: Count = 2) -> Outcome:
    network = _trained(bench, lambda model: _Routed(model, experts=experts, top=top, seed=bench.seed))
    count = len(network.experts)  # type: ignore[arg-type]
    layers = f"{count} expert layers" if count > 1 else "one expert layer"
    return _outcome(network, f"{layers}, {top} of {experts} mixed for a task, before the fixed heads")


def _identity_decoder(width: int, head: nn.Module) -> nn.Sequential:
    """A decoder with a hidden layer that gives the features back at first, since gelu(x) - gelu(-x) = x.

    The two units of a feature stand side by side, so that a narrow decoder gives back the leading features.
    """
    layers = mlp([width, 2 * width, width], seed=0)
    signs = torch.stack([torch.eye(width), -torch.eye(width)], 1).flatten(0, 1)  # (2 width, width)
    _silent(layers)
    with torch.no_grad():
        cast(Tensor, layers[0].weight).copy_(width**0.5 * signs)
        cast(Tensor, layers[2].weight).copy_(signs.T)
    return nn.Sequential(*layers, Normalize(), head)


@_entrant("controllable", "Controllable", "controllable-mtl", PICTURES, "conv")
def _controllable(
    bench: Bench,
    *,
    budgets: Annotated[tuple[Share, ...], Field(max_length=100)] = (0.5, 0.25),
    preference: dict[str, Annotated[float, Field(ge=0)]] | None = None,
    random: Annotated[int, Field(ge=0, le=100)] = 1,
    strength: Annotated[float, Field(ge=0, le=100)] = 0.1,
    stages: bool = False,
) -> Outcome:
    """The score is that of full width; `budgets` are shares of its FLOPs, answered with the importance of the tasks."""
    width = _width(bench)
    example = next(iter(Batches(next(iter(bench.suite.values())).train, 1)))[0]

    def make(model: MultiTaskModel) -> Controllable:
        decoders = {task: _identity_decoder(width, head.cpu()) for task, head in model.heads.items()}
        network = Controllable(model.backbone.cpu(), decoders, cast(Tensor, example))
        for budget in budgets:
            _smaller(network, budget, preference)  # what cannot be met is refused before training
        return network

    def update(network: Controllable) -> Sandwich:
        inner = network.backbone.named_modules()
        activations = [name for name, layer in inner if stages and isinstance(layer, (nn.ReLU, nn.GELU))]
        return Sandwich(network, random=random, strength=strength, stages=activations, seed=bench.seed)

    network = cast(Controllable, _trained(bench, make, update))
    full = network.flops(network.uniform(1.0))
    parts = [f"every task in every step, {full / 1e6:.3g} MFLOPs at full width"]
    for budget in budgets:
        chosen = _smaller(network, budget, preference)

        def answer(inputs: Any, task: str, chosen: Configuration = chosen) -> Tensor:
            return network(to_device(inputs, bench.device), task, chosen)

        found = mean(score(answer, bench.suite, split="validation"))
        same = len(set(chosen.decoders.values())) == 1
        widths = [f"{width:g}" if same else f"{task} {width:g}" for task, width in chosen.decoders.items()]
        where = f"encoder {chosen.encoder:g}, decoders {', '.join(dict.fromkeys(widths))}"
        parts.append(f"{found:.3f} on validation at {network.flops(chosen) / 1e6:.3g} ({where})")
    return _outcome(network, "; ".join(parts))


def _smaller(network: Controllable, budget: float, preference: dict[str, float] | None) -> Configuration:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # before training no width was trained
        return network.configure(budget=budget * network.flops(network.uniform(1.0)), preference=preference)
