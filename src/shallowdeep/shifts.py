"""Inputs that change: blur, noise, faded contrast, other shares of the classes.

It refuses to know networks and monitors: images or labels come in, changed images or row positions go out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shallowdeep.types import DataError


def blurred(images_NCHW: Tensor, sigma: float) -> Tensor:
    """uint8 images [N, C, H, W] under a Gaussian blur of ``sigma`` pixels, as an unfocused lens gives.

    >>> blurred(torch.full((1, 1, 4, 4), 7, dtype=torch.uint8), 1.0).unique().tolist()
    [7]
    """
    images = _pixels(images_NCHW)
    radius = max(1, round(3 * _positive("sigma", sigma)))
    if radius >= min(images.shape[2:]):
        raise DataError(f"A blur of {sigma:g} pixels needs images larger than {radius}, found {images.shape[2:]}.")
    kernel_D = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel_D = (kernel_D / kernel_D.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel_D[:, :, None, :], groups=images.shape[1])
    return _bytes(F.conv2d(rows, kernel_D[:, :, :, None], groups=images.shape[1]))


def noisy(images_NCHW: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """uint8 images with Gaussian noise of ``sigma`` (in shares of white) added to every pixel and channel.

    >>> grey = torch.full((1, 1, 50, 50), 128, dtype=torch.uint8)
    >>> 20 < float(noisy(grey, 0.1, torch.Generator().manual_seed(0)).float().std()) < 30
    True
    """
    images = _pixels(images_NCHW)
    return _bytes(images + 255 * _positive("sigma", sigma) * torch.randn(images.shape, generator=generator))


def faded(images_NCHW: Tensor, contrast: float) -> Tensor:
    """uint8 images whose pixels move towards their own image's mean until ``contrast`` of the distance is left.

    >>> faded(torch.tensor([[[[0, 200]]]], dtype=torch.uint8), 0.5).tolist()
    [[[[50, 150]]]]
    """
    images = _pixels(images_NCHW)
    mean = images.mean((1, 2, 3), keepdim=True)
    return _bytes(mean + _positive("contrast", contrast) * (images - mean))


def overlaid(images_NCHW: Tensor, pattern_CHW: Tensor) -> Tensor:
    """uint8 images with one pattern (in shares of white) added to all of them, as a universal attack does.

    >>> overlaid(torch.tensor([[[[0, 200]]]], dtype=torch.uint8), torch.tensor([[[-0.5, 0.1]]])).tolist()
    [[[[0, 226]]]]
    """
    images = _pixels(images_NCHW)
    if pattern_CHW.shape != images.shape[1:]:
        raise DataError(f"The pattern must be {list(images.shape[1:])}, found {list(pattern_CHW.shape)}.")
    return _bytes(images + 255 * pattern_CHW)


def reweighted(labels_N: Tensor, weight_C: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Positions of ``rows`` rows drawn with replacement, class c in proportion to its rows times ``weight_C[c]``.

    >>> labels_N = torch.tensor([0, 1, 1])
    >>> reweighted(labels_N, torch.tensor([1.0, 0.0]), 2, torch.Generator().manual_seed(0)).tolist()
    [0, 0]
    """
    if int(labels_N.max()) >= len(weight_C):
        raise DataError(f"Class {int(labels_N.max())} has no weight: found {len(weight_C)} weights.")
    weight_N = weight_C.double()[labels_N]
    if bool((weight_N < 0).any()) or not 0 < float(weight_N.sum()) < torch.inf:
        raise DataError(f"Weights must be numbers from 0, one above it for a class at hand; found {weight_C.tolist()}.")
    return torch.multinomial(weight_N, rows, replacement=True, generator=generator)


def _pixels(images_NCHW: Tensor) -> Tensor:
    if images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4:
        raise DataError(f"Images must be uint8 [N, C, H, W], found {images_NCHW.dtype} {list(images_NCHW.shape)}.")
    return images_NCHW.float()


def _positive(name: str, value: float) -> float:
    if not 0 < value < torch.inf:
        raise DataError(f"{name} must be above 0, found {value}.")
    return value


def _bytes(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)
