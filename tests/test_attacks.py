"""Attacks stay within their bounds, do what gradients can, and leave the network as it was."""

from __future__ import annotations

import copy
import dataclasses
import doctest

import pytest
import torch

from nets import ZOO, planned
from shallowdeep import attacks
from shallowdeep.attacks import Attack, Pixels, added, noise, slowdown, universal
from shallowdeep.collection import collect
from shallowdeep.cuts import plan
from shallowdeep.data import Preprocessing
from shallowdeep.network import attach, fingerprint
from shallowdeep.types import DataError
from shallowdeep.walking import simulate
from victim import PIXELS, POLICY, pictures, victim

STRONG = Attack(eps=0.06, steps=10, step_size=0.015)


def shift(moved: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """How far pixels moved, in their own units."""
    return (moved - images) * torch.tensor(PIXELS.std).view(3, 1, 1)


def mean_cost(images: torch.Tensor, labels: torch.Tensor) -> float:
    return float(simulate(POLICY, collect(victim(), (images, labels))).cost_N.mean())


def test_an_attack_costs_more_than_noise_and_one_image_for_all_lies_between() -> None:
    images, labels = pictures(128, seed=2)
    own, _ = pictures(256, seed=3)
    delta = universal(victim(), own, dataclasses.replace(STRONG, steps=20), pixels=PIXELS)
    clean = mean_cost(images, labels)
    random = mean_cost(noise(images, STRONG.eps, pixels=PIXELS), labels)
    one = mean_cost(added(images, delta, PIXELS), labels)
    each = mean_cost(slowdown(victim(), images, STRONG, pixels=PIXELS), labels)
    assert clean < 0.8, "a network that never stops early checks nothing"
    assert random < clean + 0.08
    assert one > random + 0.03
    assert each > one
    assert each > random + 0.2


def test_pixels_move_by_eps_at_most_and_stay_in_range() -> None:
    images, _ = pictures(40, seed=2)
    delta = universal(victim(), images, STRONG, pixels=PIXELS)
    assert delta.shape == images.shape[1:]
    assert float(delta.abs().max()) <= STRONG.eps
    low, high, _ = PIXELS.per_channel(images)
    for moved in (
        slowdown(victim(), images, STRONG, pixels=PIXELS),
        added(images, delta, PIXELS),
        noise(images, STRONG.eps, pixels=PIXELS),
    ):
        assert float(shift(moved, images).abs().max()) <= STRONG.eps + 1e-6
        assert float(shift(moved, images).abs().max()) > 0.9 * STRONG.eps, "an attack that hardly moves"
        assert bool(((moved >= low - 1e-6) & (moved <= high + 1e-6)).all())


def test_black_and_white_pixels_move_one_way_only() -> None:
    images = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    images = (images - torch.tensor(PIXELS.mean).view(3, 1, 1)) / torch.tensor(PIXELS.std).view(3, 1, 1)
    moved = shift(slowdown(victim(), images, STRONG, pixels=PIXELS), images)
    assert float(moved[0].min()) >= -1e-6
    assert float(moved[1].max()) <= 1e-6
    assert float(moved[0].max()) > 0


def test_the_network_is_left_as_it_was_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = pictures(8, seed=2)
    sdn = copy.deepcopy(victim()).train()
    sdn.classifiers[0].eval()
    for parameter in sdn.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = fingerprint(sdn), [module.training for module in sdn.modules()]
    with torch.inference_mode():
        slowdown(sdn, images, STRONG, pixels=PIXELS)
    universal(sdn, images, STRONG, pixels=PIXELS)
    monkeypatch.setattr(sdn, "answers", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slowdown(sdn, images, STRONG, pixels=PIXELS)
    assert (fingerprint(sdn), [module.training for module in sdn.modules()]) == before
    assert all(bool((p.grad == 2.0).all()) and p.requires_grad for p in sdn.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in sdn.parameters())


def test_gradients_are_whole() -> None:
    """Against differences of the loss itself: what an IC reads of the exit before it is part of the slope."""
    sdn = copy.deepcopy(victim()).double()
    images, _ = pictures(3, seed=4)
    images = images.double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(x: torch.Tensor, exit: int) -> float:
        with torch.no_grad():
            return float(-sdn(x)[exit].log_softmax(-1).mean(-1).sum())

    for exit in range(1, sdn.num_exits - 1):
        slope = (loss(images + 1e-5 * direction, exit) - loss(images - 1e-5 * direction, exit)) / 2e-5
        with torch.enable_grad():
            found = attacks._gradient(sdn, images, [exit], bf16=False)
        assert float((found * direction).sum()) == pytest.approx(slope, rel=2e-3)


def test_rows_are_attacked_alone() -> None:
    images, _ = pictures(20, seed=2)
    whole = slowdown(victim(), images, STRONG, pixels=PIXELS)
    parts = slowdown(victim(), images, STRONG, pixels=PIXELS, batch_size=7)
    assert float((whole != parts).double().mean()) < 0.01, "only a gradient of nearly 0 may turn with rounding"
    assert not torch.equal(whole, slowdown(victim(), images, STRONG, pixels=PIXELS, seed=1))


def test_nothing_allowed_nothing_done() -> None:
    images, _ = pictures(6, seed=2)
    none = dataclasses.replace(STRONG, eps=0.0)
    assert torch.equal(slowdown(victim(), images, none, pixels=PIXELS), images)
    assert torch.equal(added(images, universal(victim(), images, none, pixels=PIXELS), PIXELS), images)
    assert slowdown(victim(), images[:0], STRONG, pixels=PIXELS).shape == (0, 3, 8, 8)


def test_no_image_asks_nothing_of_the_network() -> None:
    """A batch of no rows is more than ``x.view(x.size(0), -1)`` can take."""

    class Viewed(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(x.size(0), -1))

    sdn = attach(
        net := Viewed(*(torch.nn.Linear(4, 4) for _ in range(3))), plan(net, torch.rand(4, 1, 2, 2), at=(0.3,))
    )
    assert slowdown(sdn, torch.rand(0, 1, 2, 2), STRONG).shape == (0, 1, 2, 2)


def test_a_network_with_one_classifier_and_one_pushed_exit() -> None:
    model = ZOO["shared"].make()
    cuts, classifiers = planned("shared").cuts[:1], planned("shared").classifiers[:1]
    sdn = attach(model, dataclasses.replace(planned("shared"), cuts=cuts, classifiers=classifiers))
    images = torch.rand(4, 3, 8, 8)
    usual = slowdown(sdn, images, STRONG)
    assert torch.equal(usual, slowdown(sdn, images, dataclasses.replace(STRONG, exits=(0,))))
    assert not torch.equal(usual, slowdown(sdn, images, dataclasses.replace(STRONG, exits=(1,))))


def test_bf16_attacks_nearly_as_well() -> None:
    images, labels = pictures(64, seed=2)
    half = slowdown(victim(), images, dataclasses.replace(STRONG, bf16=True), pixels=PIXELS)
    assert half.dtype == torch.float32
    whole = slowdown(victim(), images, STRONG, pixels=PIXELS)
    assert mean_cost(half, labels) == pytest.approx(mean_cost(whole, labels), abs=0.05)


def test_what_cannot_be_attacked_is_said() -> None:
    images, _ = pictures(4, seed=2)
    with pytest.raises(DataError, match="floating images"):
        slowdown(victim(), (images * 0).to(torch.uint8), STRONG)
    with pytest.raises(DataError, match=r"floating images.*tuple"):
        slowdown(victim(), (images, images), STRONG)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"not in 0\.\.1; say how.*Pixels\(mean"):
        slowdown(victim(), images, STRONG)
    with pytest.raises(DataError, match="not in 0"):
        slowdown(victim(), torch.full((1, 3, 8, 8), float("nan")), STRONG)
    with pytest.raises(DataError, match="2 channels, the images 3"):
        slowdown(victim(), images, STRONG, pixels=Pixels(mean=(0.0, 0.0), std=(1.0, 1.0)))
    with pytest.raises(DataError, match="found none"):
        universal(victim(), images[:0], STRONG, pixels=PIXELS)
    with pytest.raises(ValueError, match=r"No exit 9.*0\.\.4"):
        slowdown(victim(), images, dataclasses.replace(STRONG, exits=(9,)), pixels=PIXELS)
    with pytest.raises(ValueError, match="eps >= 0"):
        Attack(eps=-0.1)
    with pytest.raises(ValueError, match="std above 0"):
        Pixels(mean=(0.0,), std=(0.0,))


def test_pixels_of_a_preprocessing() -> None:
    preprocessing = Preprocessing(mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3), size=(8, 8))
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    low, high, unit = Pixels.of(preprocessing).per_channel(preprocessing.apply(extremes))
    assert torch.allclose(preprocessing.apply(extremes)[:, :, 0, 0], torch.stack([low, high])[:, :, 0, 0])
    assert torch.allclose(unit.flatten(), 1 / torch.tensor(preprocessing.std))


def test_examples() -> None:
    assert doctest.testmod(attacks).failed == 0
