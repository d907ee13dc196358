"""The CIFAR ResNets: three stages of 16, 32 and 64 channels, 6n + 2 layers, shortcuts without parameters.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, section 4.2. A shortcut into
a smaller stage takes every other pixel and fills the new channels with zeros, half on each side ("option A").
Parameters are named as in the checkpoints of akamaster/pytorch_resnet_cifar10, which load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import Weights, open_weights
from ..errors import InputError
from ..train import load_weights

__all__ = ["CIFAR_MEAN", "CIFAR_STD", "CifarResNet", "resnet20", "resnet32", "resnet44", "resnet56"]

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the checkpoints were trained with: `(x / 255 - mean) / std` for images in RGB order."""


def _conv(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, 1, bias=False)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = _conv(after, after), nn.BatchNorm2d(after)
        self.stride, self.new = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """`(N, channels, H, W)` -> `(N, classes)`; the paper's takes 3 x 32 x 32.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, ...
        classes: outputs.
        channels: of the images. Paper: 3.
        widths: channels of the three stages, each at least as many as before. Paper: 16, 32, 64.
        stride: of the first convolution. Paper: 1.
        seed: of the initial weights.
        weights: weights to load, or where they are; the model is then in evaluation mode.

    Raises:
        InputError: another depth, widths that are not three or shrink, weights that do not fit.

    >>> CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, depth: int, *, classes: int = 10, channels: int = 3, widths: Sequence[int] = (16, 32, 64),
        stride: int = 1, seed: int = 0, weights: Weights | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"the depth of a CIFAR ResNet is 6n + 2 (20, 32, 44, 56, ...), got {depth}")
        if len(widths) != 3 or min(widths) < 1 or any(a > b for a, b in pairwise(widths)):
            raise InputError(f"widths are the channels of three stages that do not shrink, got {tuple(widths)}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            one, two, three = widths
            self.conv1, self.bn1 = _conv(channels, one, stride), nn.BatchNorm2d(one)
            self.layer1 = self._stage(one, one, 1, depth)
            self.layer2 = self._stage(one, two, 2, depth)
            self.layer3 = self._stage(two, three, 2, depth)
            self.linear = nn.Linear(three, classes)
        if weights is not None:
            load_weights(self, open_weights(weights))
            self.eval()

    @staticmethod
    def _stage(before: int, after: int, stride: int, depth: int) -> nn.Sequential:
        rest = [_Block(after, after, 1) for _ in range((depth - 2) // 6 - 1)]
        return nn.Sequential(_Block(before, after, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _of_depth(depth: int) -> Callable[[], CifarResNet]:
    def make() -> CifarResNet:
        return CifarResNet(depth)

    make.__name__, make.__qualname__ = f"resnet{depth}", f"resnet{depth}"
    make.__doc__ = f"An untrained ResNet-{depth} for CIFAR-10."
    return make


resnet20, resnet32, resnet44, resnet56 = (_of_depth(depth) for depth in (20, 32, 44, 56))
