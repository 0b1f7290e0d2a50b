"""Images -> sprite sheets, and where each exit looked -> small grids, as text that a page can hold.

It refuses to know traces and pages. Images are shrunk to thumbnails and joined to sheets, so that a browser decodes
tens of files and not thousands.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from io import BytesIO

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shallowdeep.explain import enlarged, grad_cam
from shallowdeep.inputs import Inputs
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.types import DataError

LARGEST = 96
"""Longest side of a thumbnail in pixels."""
COLUMNS, SHEET = 20, 400
"""Thumbnails in a row of a sheet, and in a sheet."""
GRID = 16
"""Places of a heat map, across and down."""


@dataclass(frozen=True, kw_only=True)
class Sheets:
    """Thumbnails of ``width`` x ``height`` pixels, SHEET to a sheet, COLUMNS to a row; ``uris`` hold the sheets."""

    width: int
    height: int
    uris: tuple[str, ...]


def as_pictures(inputs: Inputs, source: str) -> Tensor:
    """uint8 [N, 3, H, W] of images with one or three channels; floats are stretched to their range.

    Raises ``DataError`` for what is no image.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        found = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DataError(f"The explorer shows images [N, 1 or 3, height, width]; {source} holds {found}.")
    if inputs.dtype != torch.uint8:
        low, high = float(inputs.min()), float(inputs.max())
        inputs = ((inputs.float() - low) / max(high - low, 1e-9) * 255).round().to(torch.uint8)
    return inputs.expand(-1, 3, -1, -1)


def sheets_of(pictures_GCHW: Tensor) -> Sheets:
    """The pictures (uint8 [G, 3, H, W]) as sheets of thumbnails, in order."""
    height, width = pictures_GCHW.shape[2:]
    ratio = min(1.0, LARGEST / max(height, width))
    height, width = max(1, round(height * ratio)), max(1, round(width * ratio))
    uris = []
    for start in range(0, len(pictures_GCHW), SHEET):
        part = pictures_GCHW[start : start + SHEET]
        if ratio < 1:
            part = F.interpolate(part.float(), (height, width), mode="area").round().to(torch.uint8)
        rows = math.ceil(len(part) / COLUMNS)
        part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, rows * COLUMNS - len(part)))
        sheet = part.view(rows, COLUMNS, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, -1, 3)
        file = BytesIO()
        Image.fromarray(sheet.contiguous().numpy()).save(file, "WEBP", quality=82, method=4)
        uris.append("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode())
    return Sheets(width=width, height=height, uris=tuple(uris))


def looks(sdn: ShallowDeepNetwork, inputs: Inputs) -> Tensor:
    """Where every exit looked for its own answer: uint8 [B, E, GRID, GRID], each scaled to its own greatest value.

    Tokens that make a square, after a class token or without one, are laid out as a square, others as a strip. Raises
    ``CutError`` where an exit has no places to look at, ``MissingExtra`` without captum.
    """
    found = []
    for exit in range(sdn.num_exits):
        heat = grad_cam(sdn, inputs, exit)
        if heat.ndim == 2:
            tokens = heat.shape[1]
            side = math.isqrt(tokens)
            heat = heat[:, tokens - side * side :] if tokens - side * side <= 1 else heat
            heat = heat.reshape(-1, side, side) if heat.shape[1] == side * side else heat[:, None]
        found.append((enlarged(heat, (GRID, GRID)) * 255).round().to(torch.uint8))
    return torch.stack(found, 1)
