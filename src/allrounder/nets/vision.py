"""The small vision networks of the suites `scripts` and `images`: base model, heads and specialists.

Four strided 3 x 3 convolutions with GroupNorm and ReLU and a linear layer take `(N, 1, 28, 28)` to features
on the unit sphere in 64 dimensions: 130 thousand parameters, about 20 ms a training step of 128 on one core.
GroupNorm and not BatchNorm: a merged model is then given by its weights alone, as the transformers of the
merging papers are. Running statistics are no parameters: the average of variances is not the variance of the
averaged network (REPAIR, 2022, arXiv 2211.08403), and task arithmetic with `scale * tasks > 1` can make them
negative, so that a comparison of merge rules would measure that instead.

`network="resnet"` is there for what needs BatchNorm (Genie): a CIFAR ResNet of 8 layers on grey images, its first
convolution strided, 79 thousand parameters. Running statistics of what is merged are then estimated anew
(`contest.Bench.settled`). Its schedule and heads are those of the other network, set before it was; nothing was tuned.

The regime was set by the accuracies of the base alone, before any merge method was run on these suites.
The base learns other glyphs (`data.scripts.blocks`: capitals, Braille, Hebrew, ...), never a task's own
classes. Heads are fixed before fine-tuning, as CLIP's text heads are: head k of a task is
`12 * normalise(W_k + 2 N_k / 8)` with W_k the direction of the class's mean base feature (training split, mean
over classes taken out) and the task's own noise N_k. Without noise the base solves too much (validation, seed 0:
76% on `scripts`, 64% on the data folder's seven sets); with twice the direction's length it stands at 41% and
49%, near the 41% of `digits`, and specialists learn the rest.
Use it to compare methods in minutes; its accuracies are no statement about larger vision models.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.scripts import blocks
from ..errors import InputError
from ..task import Examples, Suite
from ..train import fit
from .cifar_resnet import CifarResNet
from .multitask import MultiTaskModel, Normalize, class_head

__all__ = [
    "EXPERT_LR", "EXPERT_STEPS", "NETWORKS", "conv_net", "image_base", "image_expert", "image_shape", "res_net",
    "script_base",
]  # fmt: skip

CHANNELS = (1, 16, 32, 64, 128)
WIDTH = 64
TEMPERATURE = 1 / 12
NOISE = 2.0  # length of a head's noise, in lengths of its class direction
BASE_STEPS = 600
BASE_LR = 2e-3
EXPERT_STEPS = 200
EXPERT_LR = 1e-3
Progress = Callable[[int, int], None] | None


def conv_net(*, seed: int, share: float = 1.0) -> nn.Sequential:
    """The untrained backbone, initialised from `seed`: `(N, 1, 28, 28)` -> `(N, 64)` of unit length.

    `share` is what is left of the channels, in fours.
    """
    widths = [CHANNELS[0], *(max(4, 4 * round(share * channels / 4)) for channels in CHANNELS[1:])]
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    empty = nn.utils.skip_init  # without the default initialisation, which draws from torch's global generator
    for before, channels in pairwise(widths):
        conv = empty(nn.Conv2d, before, channels, 3, stride=2, padding=1)
        layers += [conv, nn.GroupNorm(4, channels), nn.ReLU()]
    layers += [nn.Flatten(), empty(nn.Linear, 4 * widths[-1], WIDTH), Normalize()]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def res_net(*, seed: int, share: float = 1.0) -> nn.Sequential:
    """The same with BatchNorm and residual blocks: `(N, 1, 28, 28)` -> `(N, 64)` of unit length."""
    widths = [max(4, 4 * round(share * channels / 4)) for channels in (16, 32, 64)]
    return nn.Sequential(CifarResNet(8, classes=WIDTH, channels=1, widths=widths, stride=2, seed=seed), Normalize())


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {"conv": conv_net, "resnet": res_net}
"""What a recipe's `network` may be: `(seed=, share=)` -> untrained backbone."""


def image_shape(suite: Suite, *, seed: int = 0, network: str = "conv") -> MultiTaskModel:
    """The untrained model: a backbone and a head of the right size for each task, to load weights into."""
    heads = {name: class_head(torch.ones(task.outputs, WIDTH), temperature=TEMPERATURE) for name, task in suite.items()}
    return MultiTaskModel(NETWORKS[network](seed=seed), heads)


def _noise(name: str, classes: int, seed: int) -> Tensor:
    """A task's own noise `(classes, 64)`, rows about 1 long; the same whichever other tasks there are."""
    generator = torch.Generator().manual_seed(seed + (zlib.crc32(name.encode()) << 16))
    return torch.randn(classes, WIDTH, generator=generator) / WIDTH**0.5


@torch.no_grad()
def _class_directions(backbone: nn.Module, examples: Examples, classes: int) -> Tensor:
    """Unit vectors from the mean over classes to each class's mean feature, `(classes, 64)`."""
    features = torch.cat([backbone(part) for part in torch.as_tensor(examples.inputs).split(500)])
    sums = torch.zeros(classes, WIDTH).index_add_(0, examples.targets, features)
    means = sums / examples.targets.bincount(minlength=classes).clamp_min(1).unsqueeze(1)
    return F.normalize(means - means.mean(0), dim=1)


def _pretrained(seed: int, network: str, progress: Progress) -> nn.Module:
    suite = blocks(seed=seed)
    heads = {
        name: class_head(_noise(name, task.outputs, seed), temperature=TEMPERATURE) for name, task in suite.items()
    }  # fmt: skip
    model = MultiTaskModel(NETWORKS[network](seed=seed), heads)
    fit(model, suite, steps=BASE_STEPS, lr=BASE_LR, schedule="cosine", seed=seed, progress=progress)
    return model.backbone


def image_base(suite: Suite, *, seed: int = 0, network: str = "conv", progress: Progress = None) -> MultiTaskModel:
    """The base model with its fixed heads, in about 20 s on one core.

    Args:
        suite: tasks of 28 x 28 grey images whose training splits are `Examples`.
        seed: of initial weights, pretraining glyphs and head noise.
        network: `conv` or `resnet`.
        progress: called with (steps done, steps).

    Returns:
        A model pretrained on other glyphs: 600 AdamW steps, lr 2e-3 falling to zero as a cosine, batch 128, one
        block of Unicode a step in turn.
    """
    backbone = _pretrained(seed, network, progress)
    heads = {}
    for name, task in suite.items():
        directions = _class_directions(backbone, task.train, task.outputs)  # type: ignore[arg-type]
        heads[name] = class_head(directions + NOISE * _noise(name, task.outputs, seed), temperature=TEMPERATURE)
    return MultiTaskModel(backbone, heads).eval()


script_base = image_base
"""The same for `scripts`: what the base learned is as foreign to its letters as to photographs' classes."""


def image_expert(
    base: MultiTaskModel, suite: Suite, task: str, *, seed: int = 0, progress: Progress = None
) -> MultiTaskModel:
    """A specialist: 200 AdamW steps, lr 1e-3, batch 128, of the whole backbone on one task.

    Raises:
        InputError: for a task that the suite lacks.
    """
    if task not in suite:
        raise InputError(f"suite {suite.name!r} has no task {task!r}; it has {', '.join(suite)}")
    expert = copy.deepcopy(base)
    return fit(expert, suite.only([task]), steps=EXPERT_STEPS, lr=EXPERT_LR, seed=seed, progress=progress)  # type: ignore[return-value]
