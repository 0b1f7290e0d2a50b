"""Shifts are what their definitions say, keep kind and shape, and refuse what is no image."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

import shallowdeep.shifts as shifts
from shallowdeep.shifts import blurred, faded, noisy, overlaid, reweighted
from shallowdeep.types import DataError

IMAGES = torch.randint(0, 256, (3, 3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_blur_is_the_slow_sum() -> None:
    sigma, (n, c, y, x) = 0.7, (1, 2, 4, 7)
    weight = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-2, 3)]
    mirrored = lambda i, size: abs(i) if i < size else 2 * (size - 1) - i  # noqa: E731
    total = sum(
        weight[dy + 2] * weight[dx + 2] * float(IMAGES[n, c, mirrored(y + dy, 9), mirrored(x + dx, 8)])
        for dy in range(-2, 3)
        for dx in range(-2, 3)
    )
    assert abs(int(blurred(IMAGES, sigma)[n, c, y, x]) - total / sum(weight) ** 2) <= 0.51


def test_noise_and_contrast_are_as_large_as_asked() -> None:
    grey = torch.full((4, 3, 40, 40), 100, dtype=torch.uint8)
    assert float(noisy(grey, 0.05, draw()).double().std()) == pytest.approx(0.05 * 255, rel=0.05)
    half = faded(IMAGES, 0.5).double()
    assert float(half[0].std() / IMAGES[0].double().std()) == pytest.approx(0.5, abs=0.01)
    assert float(half[0].mean()) == pytest.approx(float(IMAGES[0].double().mean()), abs=0.5)


def test_a_pattern_is_added_to_every_image() -> None:
    pattern = torch.zeros(3, 9, 8)
    pattern[1, 2, 3] = -1.0
    changed = overlaid(IMAGES, pattern)
    assert changed[:, 1, 2, 3].tolist() == [0, 0, 0]
    assert int((changed != IMAGES).sum()) <= 3
    with pytest.raises(DataError, match=r"pattern must be \[3, 9, 8\]"):
        overlaid(IMAGES, pattern[:2])


def test_classes_come_as_often_as_weighed() -> None:
    labels = torch.tensor([0] * 300 + [1] * 100 + [2] * 100)
    rows = reweighted(labels, torch.tensor([1.0, 3.0, 0.0]), 6000, draw())
    assert (labels[rows].bincount(minlength=3) / 6000).tolist() == pytest.approx([0.5, 0.5, 0], abs=0.03)
    for weight in ([1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]):
        with pytest.raises(DataError, match="eight"):
            reweighted(labels, torch.tensor(weight), 5, draw())


@pytest.mark.parametrize("shift", [lambda x: blurred(x, 1.0), lambda x: noisy(x, 0.1, draw()), lambda x: faded(x, 0.5)])
def test_kind_and_shape_stay(shift: object) -> None:
    changed = shift(IMAGES)  # type: ignore[operator]
    assert (changed.shape, changed.dtype) == (IMAGES.shape, torch.uint8)
    with pytest.raises(DataError, match=r"uint8 \[N, C, H, W\], found torch.float32"):
        shift(IMAGES.float())  # type: ignore[operator]


def test_strengths_make_sense() -> None:
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DataError, match="above 0"):
            blurred(IMAGES, wrong)
    with pytest.raises(DataError, match="larger than 9"):
        blurred(IMAGES, 3.0)


def test_the_examples_run() -> None:
    assert doctest.testmod(shifts).failed == 0
