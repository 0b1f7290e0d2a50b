"""Hardened exits resist better; the backbone does not notice."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shallowdeep.attacks import Attack, slowdown
from shallowdeep.collection import collect
from shallowdeep.hardening import HARDENED_EXITS, Adversary, harden
from shallowdeep.network import ShallowDeepNetwork, fingerprint
from shallowdeep.types import DataError
from shallowdeep.walking import simulate
from victim import PIXELS, POLICY, pictures, victim

WEAK = Attack(eps=0.04, steps=3, step_size=0.02)
RECIPE = replace(HARDENED_EXITS, batch_size=64, lr=3e-3, bf16=False)


def cost_and_accuracy(sdn: ShallowDeepNetwork, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    outcome = simulate(POLICY, collect(sdn, (images, labels)))
    return float(outcome.cost_N.mean()), float((outcome.labels_N == labels).double().mean())


def test_hardened_exits_are_slowed_down_less_by_an_attack_on_themselves() -> None:
    tough = copy.deepcopy(victim())
    harden(tough, pictures(256, seed=5), pixels=PIXELS, attack=WEAK, recipe=RECIPE)
    assert fingerprint(tough.backbone) == fingerprint(victim().backbone)
    assert fingerprint(tough) != fingerprint(victim())
    images, labels = pictures(128, seed=6)
    before, _ = cost_and_accuracy(victim(), slowdown(victim(), images, WEAK, pixels=PIXELS), labels)
    after, _ = cost_and_accuracy(tough, slowdown(tough, images, WEAK, pixels=PIXELS), labels)
    assert after < before - 0.02
    assert cost_and_accuracy(tough, images, labels)[1] > cost_and_accuracy(victim(), images, labels)[1] - 0.05


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
