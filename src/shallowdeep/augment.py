"""Random views of image batches, each row with its own draw, from a generator that the caller seeds.

It refuses to know networks; any callable ``(inputs, generator) -> inputs`` can take its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from shallowdeep.inputs import Inputs
from shallowdeep.types import DataError

Augment: TypeAlias = Callable[[Inputs, torch.Generator], Inputs]
"""A function of a batch of inputs and a generator, answering a batch like it: one random view."""

CACHED_IMAGES = 8


def named_augment(augment: Augment | None) -> str:
    """``augment`` as a later process would call it, too."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(augment))


@dataclass(frozen=True, kw_only=True)
class FlipCrop:
    """Mirror half of the images [B, C, H, W] and shift each by up to ``padding`` pixels; the border is ``fill`` per
    channel.

    ``fill`` is the value of black after normalisation, or empty for 0; the usual augmentation of CIFAR has padding 4.
    """

    padding: int = 4
    mirror: bool = True
    fill: tuple[float, ...] = ()

    def __call__(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise DataError("FlipCrop takes one tensor of images [B, C, H, W].")
        batch, channels, height, width = inputs.shape
        border = torch.tensor(self.fill or (0.0,) * channels, dtype=inputs.dtype, device=inputs.device)
        if len(border) != channels:
            raise DataError(f"FlipCrop has {len(border)} fill values for images with {channels} channels.")
        shift = torch.randint(0, 2 * self.padding + 1, (2, batch), generator=generator)
        mirrored_B = (torch.rand(batch, generator=generator) < 0.5) & self.mirror
        if inputs.device.type == "cpu":  # elsewhere one gather is quicker than a copy per image
            return _shifted(inputs, border, shift - self.padding, mirrored_B)
        room = (batch, channels, height + 2 * self.padding, width + 2 * self.padding)
        padded = border[:, None, None].expand(room).contiguous()
        inner = padded[:, :, self.padding : self.padding + height, self.padding : self.padding + width]
        inner.copy_(torch.where(mirrored_B.to(inputs.device)[:, None, None, None], inputs.flip(3), inputs))
        windows, (top_B, left_B) = padded.unfold(2, height, 1).unfold(3, width, 1), shift.to(inputs.device)
        return windows[torch.arange(batch, device=inputs.device), :, top_B, left_B]


def _shifted(inputs: Tensor, border: Tensor, shift: Tensor, mirrored_B: Tensor) -> Tensor:
    """What is seen of each image, perhaps mirrored, through a window that is moved by ``shift`` (down, right)."""
    height, width = inputs.shape[2:]
    seen = border[:, None, None].expand_as(inputs).contiguous() if border.any() else torch.zeros_like(inputs)
    foreign = inputs.dtype == torch.bfloat16 or inputs.requires_grad

    def quick(images: Tensor) -> Any:  # numpy slices in half of the time, but knows neither of these
        return images if foreign else images.numpy()

    to, image = quick(seen), quick(inputs)
    for n, (mirrored, down, right) in enumerate(zip(mirrored_B.tolist(), *shift.tolist(), strict=True)):
        if n % CACHED_IMAGES == 0:  # so that the copy needs no memory of its own
            back = quick(inputs[n : n + CACHED_IMAGES].flip(3))
        top, left = max(0, -down), max(0, -right)
        bottom, end = min(height, height - down), min(width, width - right)
        if top < bottom and left < end:  # something of the image is left
            source = back[n % CACHED_IMAGES] if mirrored else image[n]
            to[n, :, top:bottom, left:end] = source[:, top + down : bottom + down, left + right : end + right]
    return seen


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Scale brightness, contrast and saturation of RGB images uint8 [B, 3, H, W], each image by factors of its own.

    Factors lie in 1 - x .. 1 + x and apply in this order; values are clamped to 0..255 after each step. Formulas as in
    ITU-R BT.601 greyscale, the ones image libraries use.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] != 3 or inputs.dtype != torch.uint8:
            raise DataError("ColorJitter takes one tensor of RGB images, uint8 [B, 3, H, W].")
        spread = torch.tensor([self.brightness, self.contrast, self.saturation])[:, None]
        factors = 1 + spread * (2 * torch.rand(3, len(inputs), generator=generator) - 1)
        bright, contrast, vivid = factors.to(inputs.device)[:, :, None, None]
        grey = torch.tensor([0.299, 0.587, 0.114], device=inputs.device)
        mixed = grey.expand(3, 3) * (1 - vivid) + torch.eye(3, device=inputs.device) * vivid
        # On a CPU a few images at a time, in memory that is used again and stays in its cache: four times as fast.
        together = min(len(inputs), CACHED_IMAGES) if inputs.device.type == "cpu" else len(inputs)
        room = torch.empty(2, together, 3, inputs.shape[2:].numel(), device=inputs.device)
        seen = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        whole = inputs.flatten(2), seen.flatten(2), bright, contrast, 1 - contrast, mixed
        for images, result, brighter, more, less, mix in zip(*(rows.split(together) for rows in whole), strict=True):
            pixels, found = room[:, : len(images)]
            pixels.copy_(images).mul_(brighter).clamp_(max=255)
            mean = (pixels.mean(2) @ grey)[:, None, None]
            # Half a step is added before the end, where bytes are cut off: a rounding without a pass of its own.
            pixels.mul_(more).add_((mean * less).add_(0.5)).clamp_(0.5, 255.5)
            torch.bmm(mix, pixels, out=found).clamp_(0, 255)
            if inputs.device.type == "cpu":  # numpy makes bytes in a third of the time
                np.copyto(result.numpy(), found.numpy(), casting="unsafe")
            else:
                result.copy_(found)
        return seen


@dataclass(frozen=True)
class Chain:
    """Several augmentations, one after the other, from one generator."""

    steps: tuple[Augment, ...]

    def __call__(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        for step in self.steps:
            inputs = step(inputs, generator)
        return inputs
