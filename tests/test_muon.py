"""Muon: what a step does to singular values and norms, which parameters it takes, and that it teaches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from nets import CLASSES
from shallowdeep.checkpoints import OutOfTime, time_limit
from shallowdeep.joint import JointRecipe, train_backbone
from shallowdeep.muon import Muon, filters_of, orthogonal
from test_training import rows

RECIPE = JointRecipe(lr=0.02, batch_size=20, milestones=(), muon_lr=0.05)


def filters(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def plain(width: int = 8) -> nn.Sequential:
    """Convolutions without a normalisation, whose norms would be seen."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)
    )


@pytest.mark.parametrize("shape", [(16, 72), (72, 16), (24, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = filters(*shape).detach()
    found = orthogonal(matrix, 5)
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    turned = left.T @ found.double() @ right.T
    assert (turned.diagonal() - 0.95).abs().max() < 0.35
    assert (turned - turned.diagonal().diag()).abs().max() < 0.05  # rounding in bfloat16


def test_a_step_turns_by_its_rate_and_keeps_the_norm() -> None:
    bank = filters(8, 4, 3, 3)
    muon, before, moving = Muon([bank], lr=0.01, momentum=0.6), bank.detach().clone(), torch.zeros(8, 4, 3, 3)
    for step in range(20):
        bank.grad, last = filters(8, 4, 3, 3, seed=1 + step).detach(), bank.detach().clone()
        muon.step()
        moving = 0.6 * moving + bank.grad
        turn = orthogonal((bank.grad + 0.6 * moving).flatten(1), 4).view_as(bank)
        moved = last * (before.norm() / last.norm()) - bank.detach()
        torch.testing.assert_close(moved, turn * (0.01 * before.norm() / turn.norm()), rtol=1e-3, atol=1e-5)
    assert abs(bank.norm() / before.norm() - 1) < 0.011


def test_a_step_does_not_know_the_scale_of_the_loss() -> None:
    found = []
    for scale in (1.0, 1e-4):
        bank = filters(8, 4, 3, 3)
        muon = Muon([bank], lr=0.1)
        for step in range(3):
            bank.grad = scale * filters(8, 4, 3, 3, seed=1 + step).detach()
            muon.step()
        found.append(bank.detach())
    torch.testing.assert_close(*found, rtol=0, atol=0.02)


def test_no_gradient_moves_nothing() -> None:
    bank, other = filters(8, 4, 3, 3), filters(8, 4, 3, 3)
    bank.grad = torch.zeros_like(bank)
    before = bank.detach().clone()
    Muon([bank, other], lr=0.1).step()
    torch.testing.assert_close(bank.detach(), before)
    assert torch.equal(other.detach(), before)


def test_it_takes_filters_that_mix_channels() -> None:
    zeros, twice = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    nn.init.zeros_(zeros.weight)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 3, groups=8), zeros, twice, twice, nn.Linear(8, 8)
    )
    net.position = nn.Parameter(torch.randn(1, 8, 4, 4))
    taken = {id(parameter) for parameter in filters_of(net)}
    assert [name for name, parameter in net.named_parameters() if id(parameter) in taken] == [
        "0.weight",
        "1.weight",
        "4.weight",
    ]
    assert len(filters_of(net)) == 3


def test_filters_go_by_muon_and_the_rest_by_sgd(tmp_path: Path) -> None:
    """Stopped after every epoch and gone on with, a run ends at the weights of one that was not."""
    whole, sliced, alone = plain(), plain(), plain()
    train_backbone(whole, rows(), num_classes=CLASSES, epochs=3, recipe=RECIPE)
    for _ in range(3):
        sliced = plain()
        try:
            with time_limit(0.0):
                train_backbone(sliced, rows(), num_classes=CLASSES, epochs=3, recipe=RECIPE, checkpoint_dir=tmp_path)
        except OutOfTime:
            pass
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sliced.parameters(), strict=True))
    train_backbone(alone, rows(), num_classes=CLASSES, epochs=3, recipe=dataclasses.replace(RECIPE, muon_lr=0.0))
    for start, muon, sgd in zip(plain().parameters(), whole.parameters(), alone.parameters(), strict=True):
        assert not torch.equal(muon, sgd)
        if start.ndim == 4:
            torch.testing.assert_close(muon.norm(), start.norm(), rtol=2e-3, atol=0)
