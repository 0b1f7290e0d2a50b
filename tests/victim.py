"""A small trained network that is sure of its images: what attacks are tried on."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nets import CLASSES, ZOO, planned
from shallowdeep.attacks import Pixels
from shallowdeep.network import ShallowDeepNetwork, attach
from shallowdeep.policies import Confidence
from shallowdeep.training import train_exits

PIXELS = Pixels(mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))
POLICY = Confidence(threshold=0.8)


def pictures(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Normalised images [N, 3, 8, 8] of pixels in [0, 1]: faint class patterns under noise; and labels."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    pixels = 0.7 * torch.rand(rows, 3, 8, 8, generator=generator) + 0.3 * patterns[labels]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXELS.mean, PIXELS.std))
    return (pixels - mean) / std, labels


@cache
def victim(classifier: Literal["strong", "paper"] = "strong") -> ShallowDeepNetwork:
    """The zoo's residual network and its ICs, trained for a few seconds. Leave it as it is."""
    model = ZOO["residual"].make()
    images, labels = pictures(512)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(120):
        rows = slice(128 * (step % 4), 128 * (step % 4) + 128)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    torch.manual_seed(0)
    sdn = attach(model.eval(), planned("residual", classifier))
    train_exits(sdn, (images, labels), epochs=12, precision="fp32")
    sdn.zero_grad()
    return sdn.eval()
