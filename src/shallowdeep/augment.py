"""Random views of image batches, each row with its own draw, from a generator that the caller seeds.

It refuses to know networks; any callable ``(inputs, generator) -> inputs`` can take its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
        shift = torch.randint(0, 2 * self.padding + 1, (2, batch), generator=generator).to(inputs.device)
        flip = (torch.rand(batch, generator=generator) < 0.5).to(inputs.device)
        if self.mirror:
            inputs = torch.where(flip[:, None, None, None], inputs.flip(3), inputs)
        room = (batch, channels, height + 2 * self.padding, width + 2 * self.padding)
        padded = border[:, None, None].expand(room).contiguous()
        padded[:, :, self.padding : self.padding + height, self.padding : self.padding + width] = inputs
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(batch, device=inputs.device), :, shift[0], shift[1]]
