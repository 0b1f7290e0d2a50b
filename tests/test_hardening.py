"""Hardened exits read attacked rows better; the backbone does not notice."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shallowdeep.attacks import Attack, slowdown
from shallowdeep.collection import collect
from shallowdeep.hardening import HARDENED_EXITS, Adversary, harden
from shallowdeep.network import ShallowDeepNetwork, fingerprint
from shallowdeep.types import DataError
from victim import PIXELS, pictures, victim

WEAK = Attack(eps=0.04, steps=3, step_size=0.02)
RECIPE = replace(HARDENED_EXITS, batch_size=64, lr=3e-3, bf16=False)


def losses(sdn: ShallowDeepNetwork, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every exit."""
    trace = collect(sdn, (images, labels))
    return torch.stack([F.cross_entropy(logits_NC, labels) for logits_NC in trace.logits_ENC])


def test_hardened_exits_read_rows_better_that_were_attacked_against_them() -> None:
    tough = copy.deepcopy(victim())
    harden(tough, pictures(256, seed=5), pixels=PIXELS, attack=WEAK, recipe=RECIPE)
    assert fingerprint(tough.backbone) == fingerprint(victim().backbone)
    images, labels = pictures(128, seed=6)
    before = losses(victim(), slowdown(victim(), images, WEAK, pixels=PIXELS), labels)
    after = losses(tough, slowdown(tough, images, WEAK, pixels=PIXELS), labels)
    assert bool((after[:-1] < before[:-1] - 0.02).all())
    assert bool((losses(tough, images, labels)[:-1] < losses(victim(), images, labels)[:-1] + 0.1).all())


def test_an_adversary_attacks_its_share_with_the_weights_of_the_moment() -> None:
    sdn = copy.deepcopy(victim()).train()
    images, _ = pictures(64, seed=7)
    adversary = Adversary(sdn=sdn, attack=WEAK, pixels=PIXELS, share=0.5)
    moved = adversary(images, torch.Generator().manual_seed(0))
    touched = (moved != images).flatten(1).any(1)
    assert 16 < int(touched.sum()) < 48
    assert torch.equal(moved, adversary(images, torch.Generator().manual_seed(0)))
    assert all(module.training for module in sdn.modules())
    with torch.no_grad():
        for parameter in sdn.classifiers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.equal(moved, adversary(images, torch.Generator().manual_seed(0)))
    with pytest.raises(DataError, match="one tensor of images, found a dict"):
        adversary({"x": images}, torch.Generator())


def test_a_killed_hardening_goes_on(tmp_path: Path) -> None:
    rows = pictures(32, seed=5)
    whole, parts = copy.deepcopy(victim()), copy.deepcopy(victim())
    harden(whole, rows, pixels=PIXELS, attack=WEAK, recipe=replace(RECIPE, epochs=2), checkpoint_dir=tmp_path)
    harden(parts, rows, pixels=PIXELS, attack=WEAK, recipe=replace(RECIPE, epochs=2), checkpoint_dir=tmp_path)
    assert fingerprint(parts) == fingerprint(whole), "all epochs were in the checkpoint"
