"""Random views: the slow loop over images with the same draws gives the same pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shallowdeep.augment import Chain, ColorJitter, FlipCrop
from shallowdeep.types import DataError


def slow(images: Tensor, generator: torch.Generator, padding: int, mirror: bool, fill: tuple[float, ...]) -> Tensor:
    """Image by image: perhaps mirrored, a border, a window of the old size at the drawn place."""
    batch, channels, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    out = torch.empty_like(images)
    for b in range(batch):
        bordered = torch.empty(channels, height + 2 * padding, width + 2 * padding, dtype=images.dtype)
        for c in range(channels):
            bordered[c] = fill[c] if fill else 0
        image = images[b].flip(2) if mirror and bool(flip[b]) else images[b]
        bordered[:, padding : padding + height, padding : padding + width] = image
        top, left = int(shift[0, b]), int(shift[1, b])
        out[b] = bordered[:, top : top + height, left : left + width]
    return out


@pytest.mark.parametrize(("padding", "mirror"), [(4, True), (2, False), (0, True), (9, True)])
@pytest.mark.parametrize("fill", [(), (-1.5, 0.25, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_image_has_its_own_draw(padding: int, mirror: bool, fill: tuple[float, ...], dtype: torch.dtype) -> None:
    images = torch.randn(40, 3, 7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = FlipCrop(padding=padding, mirror=mirror, fill=fill)(images, torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, slow(images, torch.Generator().manual_seed(2), padding, mirror, fill))


def test_rows_of_one_batch_differ() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8) + 1
    views = FlipCrop(padding=2)(image.expand(400, 1, 8, 8), torch.Generator().manual_seed(0))
    assert len(views.flatten(1).unique(dim=0)) == 2 * 5 * 5, "all flips and shifts are drawn"
    mirrored = (views[:, 0, 4, 3] > views[:, 0, 4, 4]).double().mean()
    assert 0.4 < float(mirrored) < 0.6


def test_the_generator_says_everything() -> None:
    images = torch.randn(9, 3, 8, 8)
    a, b, c = (FlipCrop()(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    kept = images.clone()
    FlipCrop()(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, kept)


def test_strides_and_gradients_are_the_callers_own() -> None:
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = slow(images, torch.Generator().manual_seed(2), 4, True, ())
    for odd in (images.to(memory_format=torch.channels_last), images.clone().requires_grad_()):
        found = FlipCrop()(odd, torch.Generator().manual_seed(2))
        torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert 0 < float(odd.grad.sum()) < images.numel()  # type: ignore[union-attr]


def test_bytes_and_empty_batches() -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    found = FlipCrop(padding=2, fill=(7.0, 8.0, 9.0))(images, torch.Generator().manual_seed(0))
    assert found.dtype == torch.uint8
    assert torch.equal(found, slow(images, torch.Generator().manual_seed(0), 2, True, (7, 8, 9)))
    assert FlipCrop()(images[:0], torch.Generator()).shape == (0, 3, 8, 8)


def test_what_cannot_be_shifted() -> None:
    for inputs in (torch.zeros(2, 8), {"x": torch.zeros(2, 3, 8, 8)}):
        with pytest.raises(DataError, match=r"one tensor of images \[B, C, H, W\]"):
            FlipCrop()(inputs, torch.Generator())
    with pytest.raises(DataError, match="2 fill values for images with 3 channels"):
        FlipCrop(fill=(0.0, 1.0))(torch.zeros(2, 3, 8, 8), torch.Generator())


def test_colours_are_jittered_image_by_image() -> None:
    """Each step against the formula for one pixel, with the same draws."""
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    jitter = ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2)
    found = jitter(images, torch.Generator().manual_seed(1))
    drawn = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for b in range(5):
        bright, contrast, vivid = (1 + s * float(d) for s, d in zip((0.4, 0.3, 0.2), drawn[:, b], strict=True))
        pixels = [[float(v) for v in images[b, :, i // 4, i % 4]] for i in range(16)]
        pixels = [[min(255.0, v * bright) for v in p] for p in pixels]
        grey = sum(0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2] for p in pixels) / 16
        pixels = [[min(255.0, max(0.0, grey + (v - grey) * contrast)) for v in p] for p in pixels]
        for i, p in enumerate(pixels):
            own = 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]
            expected = [min(255.0, max(0.0, own + (v - own) * vivid)) for v in p]
            assert found[b, :, i // 4, i % 4].tolist() == pytest.approx(expected, abs=0.51)
    assert torch.equal(ColorJitter(brightness=0, contrast=0, saturation=0)(images, torch.Generator()), images)
    with pytest.raises(DataError, match="uint8"):
        jitter(images.float(), torch.Generator())


def test_a_chain_goes_step_by_step() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    expected = FlipCrop()(ColorJitter()(images, generator), generator)
    assert torch.equal(Chain((ColorJitter(), FlipCrop()))(images, torch.Generator().manual_seed(0)), expected)
