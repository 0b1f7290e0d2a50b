"""Random views of image batches, each row with its own draw, from a generator that the caller seeds.

It refuses to know networks; any callable ``(inputs, generator) -> inputs`` can take its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shallowdeep.inputs import Inputs
from shallowdeep.types import DataError


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
        offset = border[:, None, None]
        padded = F.pad(inputs - offset, [self.padding] * 4) + offset
        shift = torch.randint(0, 2 * self.padding + 1, (2, batch, 1), generator=generator)
        flip = torch.rand(batch, 1, generator=generator) < 0.5
        rows = torch.arange(height) + shift[0]
        columns = torch.arange(width) + shift[1]
        if self.mirror:
            columns = torch.where(flip, columns.flip(1), columns)
        rows, columns = rows.to(inputs.device), columns.to(inputs.device)
        picked = torch.arange(batch, device=inputs.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
