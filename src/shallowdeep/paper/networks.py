"""The study's networks as plain classifiers, without a word about exits, equal to the authors' to the last weight.

It refuses to know data and training. All take images [B, 3, side, side] and answer logits [B, C]; the side is 32
(CIFAR) or 64 (Tiny ImageNet). Source: arXiv 1810.07052, section 5, and the authors' code, which differs from the
textbook in places; those are named where they stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _start(network: nn.Module, draw: Callable[[nn.Conv2d], Tensor]) -> None:
    """The authors' starting weights: convolutions by ``draw``, linear layers nearly zero, no bias anywhere."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            draw(module)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- VGG-16


class ConvBlock(nn.Sequential):
    """3x3 convolution (with bias), normalisation, activation and, where ``pool``, 2x2 max pooling."""

    def __init__(self, channels_in: int, channels: int, pool: bool) -> None:
        layers = [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        super().__init__(*layers, *([nn.MaxPool2d(2)] if pool else []))


class VGG16(nn.Module):
    """VGG-16 with batch normalisation: 13 convolutions and three linear layers, the last two without activation
    between them.
    """

    def __init__(self, num_classes: int, side: int = 32) -> None:
        super().__init__()
        channels = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
        pooled = (1, 3, 6, 9, 12)
        self.blocks = nn.Sequential(
            *(ConvBlock(a, b, i in pooled) for i, (a, b) in enumerate(zip((3, *channels), channels, strict=False)))
        )
        flat = 512 * (side // 32) ** 2
        wide, narrow = (512, 512) if side == 32 else (2048, 1024)
        self.first = nn.Sequential(nn.Linear(flat, wide), nn.ReLU(), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Linear(wide, narrow), nn.Dropout(0.5))
        self.last = nn.Linear(narrow, num_classes)
        _start(self, lambda conv: nn.init.normal_(conv.weight, 0, math.sqrt(2 / (9 * conv.out_channels))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(self.blocks(x).flatten(1))))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- ResNet-56


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    Where the size changes, the shortcut is a 1x1 convolution if ``projected`` (option B), else every second pixel
    padded with zero channels (option A).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.grown = stride, channels - channels_in
        self.shortcut = nn.Sequential()
        if projected and (self.grown or stride > 1):
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if len(self.shortcut):
            x = self.shortcut(x)
        elif self.grown or self.stride > 1:
            side = self.grown // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2 (arXiv 1512.03385, section 4.2).

    With ``projected`` shortcuts it is the study's; without, parameter names are those of the public weights of
    akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, depth: int, num_classes: int, *, projected: bool = False, side: int = 32) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"A CIFAR ResNet has depth 6n + 2 (20, 32, 44, 56, 110, ...), found {depth}.")
        self.conv1 = nn.Conv2d(3, 16, 3, side // 32, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, projected)
        self.layer2 = _stage(16, 32, blocks, 2, projected)
        self.layer3 = _stage(32, 64, blocks, 2, projected)
        self.linear = nn.Linear(64, num_classes)
        _start(self, lambda conv: nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu"))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(channels_in: int, channels: int, blocks: int, stride: int, projected: bool) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride, projected)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, projected) for _ in range(blocks - 1)))


# ---------------------------------------------------------------- Wide ResNet


class WideBlock(nn.Module):
    """Normalisation and activation before each of two 3x3 convolutions (with bias); the second one has the stride."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1)
        changes = stride > 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(F.relu(self.bn1(x))))
        y = self.conv2(F.relu(self.bn2(y)))
        return y + self.shortcut(x)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """Three stages of five blocks, four times as wide: the study's "32-4" (arXiv 1605.07146 would say 34).

    The last normalisation follows the latest batch (momentum 0.9), as the authors' does.
    """

    def __init__(self, num_classes: int, side: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, side // 32, 1)
        widths = (16, 64, 128, 256)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(WideBlock(a if i == 0 else b, b, stride if i == 0 else 1) for i in range(5)))
                for a, b, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
            )
        )
        self.bn1 = nn.BatchNorm2d(256, momentum=0.9)
        self.linear = nn.Linear(256, num_classes)
        _start(self, lambda conv: nn.init.xavier_uniform_(conv.weight, math.sqrt(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stages(self.conv1(x))))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- MobileNet


class SeparableBlock(nn.Sequential):
    """3x3 convolution of every channel alone, then 1x1 over channels, each normalised and activated."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False),
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class MobileNet(nn.Module):
    """MobileNet (arXiv 1704.04861) whose first convolution keeps the size; it starts as PyTorch's layers do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        halved = (1, 3, 5, 11)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(
            *(
                SeparableBlock(a, b, 2 if i in halved else 1)
                for i, (a, b) in enumerate(zip((32, *widths), widths, strict=False))
            )
        )
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- by name


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20 for 32x32 images with parameter-free shortcuts, untrained."""
    return ResNet(20, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    """ResNet-56 for 32x32 images with parameter-free shortcuts, untrained."""
    return ResNet(56, num_classes)


class Normalised(nn.Module):
    """A network that takes bytes: images uint8 [B, 3, side, side] are brought to its mean and deviation first."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.to(self.mean.dtype) - self.mean) / self.std)  # type: ignore[no-any-return]


NETWORKS = ("vgg16", "resnet56", "wrn32-4", "mobilenet")


def make_network(name: str, num_classes: int, side: int) -> nn.Module:
    """The study's network ``name``, untrained. Raises ``ValueError`` for a name it does not have."""
    if name == "vgg16":
        return VGG16(num_classes, side)
    if name == "resnet56":
        return ResNet(56, num_classes, projected=True, side=side)
    if name == "wrn32-4":
        return WideResNet(num_classes, side)
    if name == "mobilenet":
        return MobileNet(num_classes)
    raise ValueError(f"No network {name!r} in the study. Networks: {', '.join(NETWORKS)}.")
