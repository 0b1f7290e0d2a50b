"""The study's networks as plain classifiers, without a word about exits.

It refuses to know data and training. So far: the CIFAR ResNets with parameter-free shortcuts, for which public
weights exist.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the size changes, the shortcut is every second pixel padded with zero channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.grown = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.grown or self.stride > 1:
            side = self.grown // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2 with option-A shortcuts (arXiv 1512.03385, section 4.2).

    Parameter names are those of the public weights of akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"A CIFAR ResNet has depth 6n + 2 (20, 32, 44, 56, 110, ...), found {depth}.")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20 for 32x32 images, untrained."""
    return ResNet(20, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    """ResNet-56 for 32x32 images, untrained."""
    return ResNet(56, num_classes)
