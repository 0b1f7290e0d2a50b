"""Internal classifiers: the paper's to the last parameter, ours within its limits, users' own within the contract."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import shallowdeep as sd
from nets import CLASSES, ZOO, images
from shallowdeep.classifiers import (
    MACS_LIMIT,
    PARAMS_FLOOR,
    PARAMS_LIMIT,
    InternalClassifier,
    Said,
    make_classifier,
    size_classifier,
)
from shallowdeep.paper.networks import resnet56
from shallowdeep.types import ClassifierSpec, CutPoint, DataError

PLENTY = 10**10


def cut(*shape: int, channel_dim: int | None = None) -> CutPoint:
    if channel_dim is None:
        channel_dim = 1 if len(shape) == 3 else -1
    return CutPoint(name="x:out", module="x", call=0, port="out", macs_before=1, shape=shape, channel_dim=channel_dim)


def sized(
    kind: str, place: CutPoint, classes: int = 10, macs: int = PLENTY, params: int = PLENTY, after: bool = False
) -> ClassifierSpec:
    previous = size_classifier(kind, place, classes, macs, params, None) if after else None
    return size_classifier(kind, place, classes, macs, params, previous)


def made(spec: ClassifierSpec, seed: int = 0) -> InternalClassifier:
    torch.manual_seed(seed)
    return make_classifier(spec).eval()


def said(spec: ClassifierSpec, rows: int) -> Said:
    hidden = torch.randn(rows, spec.fed_hidden) if spec.fed_hidden else None
    return Said.of(torch.randn(rows, spec.num_classes), hidden)


# ---------------------------------------------------------------- the paper's


@pytest.mark.parametrize(
    ("side", "kernel", "cells"),
    [
        (64, 16, 4),
        (32, 8, 4),
        (16, 4, 4),
        (8, 2, 4),
        (4, 1, 4),
        (56, 14, 4),
        (28, 7, 4),
        (14, 4, 3),
        (7, 2, 3),
        (5, 2, 2),
    ],
)
def test_the_papers_classifier_pools_and_mixes(side: int, kernel: int, cells: int) -> None:
    """Kernel = stride = ceil(side / 4), one learned mix of maximum and mean, one linear layer."""
    spec = sized("paper", cut(6, side, side))
    assert kernel == math.ceil(side / 4)
    assert (spec.features, spec.views) == (6 * cells**2, 2)
    assert spec.params == 6 * cells**2 * 10 + 10 + 1
    assert spec.macs == 6 * cells**2 * 10
    classifier, x = made(spec).double(), torch.randn(2, 6, side, side, dtype=torch.float64)
    pooled = torch.zeros(2, 6, cells, cells, dtype=torch.float64)
    mix = float(classifier.mix.detach())  # type: ignore[union-attr]
    for i in range(cells):
        for j in range(cells):
            window = x[:, :, i * kernel : (i + 1) * kernel, j * kernel : (j + 1) * kernel].flatten(2)
            pooled[:, :, i, j] = mix * window.amax(2) + (1 - mix) * window.mean(2)
    with torch.no_grad():
        expected = classifier.linear(pooled.flatten(1))  # type: ignore[operator]
        torch.testing.assert_close(classifier(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_below_side_four_nothing_is_pooled_or_mixed(side: int) -> None:
    spec = sized("paper", cut(6, side, side))
    assert (spec.features, spec.views, spec.params) == (6 * side**2, 1, 6 * side**2 * 10 + 10)
    classifier, x = made(spec), torch.randn(2, 6, side, side)
    assert classifier.mix is None
    assert torch.equal(classifier(x)[0], classifier.linear(x.flatten(1)))  # type: ignore[operator]


def test_the_papers_mix_starts_anywhere_and_learns() -> None:
    spec = sized("paper", cut(6, 8, 8))
    starts = torch.tensor([float(made(spec, seed).mix.detach()) for seed in range(200)])  # type: ignore[union-attr]
    assert 0 <= starts.min() < 0.1
    assert 0.9 < starts.max() < 1, "drawn from [0, 1)"
    classifier = made(spec)
    classifier(torch.randn(3, 6, 8, 8))[0].sum().backward()
    assert float(classifier.mix.grad.abs()) > 0  # type: ignore[union-attr]


def test_the_papers_sizes_on_resnet56() -> None:
    plan = sd.plan(resnet56(), torch.zeros(1, 3, 32, 32), classifier="paper")
    assert [spec.features for spec in plan.classifiers] == [256, 256, 512, 512, 1024, 1024]
    assert [spec.params for spec in plan.classifiers] == [10 * n + 11 for n in (256, 256, 512, 512, 1024, 1024)]
    assert sum(spec.params for spec in plan.classifiers) == 891_676 - 855_770, "Table A: SDN less CNN"


def test_the_papers_classifier_never_shrinks_and_is_never_fed() -> None:
    spec = sized("paper", cut(64, 8, 8), classes=1000, macs=1, params=1, after=True)
    assert spec.params == 1024 * 1000 + 1001
    assert not spec.fed


# ---------------------------------------------------------------- ours


@pytest.mark.parametrize(
    "place",
    [cut(16, 32, 32), cut(64, 2, 2), cut(3, 9, 12), cut(7, 20, channel_dim=1), cut(12, 4, 4, 4), cut(20, 16), cut(40)],
    ids=str,
)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["paper", "strong"])
def test_costs_are_counted_on_the_real_module(place: CutPoint, after: bool, kind: str) -> None:
    spec = sized(kind, place, classes=7, after=after)
    classifier, x = made(spec), torch.randn(3, *place.shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits, _ = classifier(x, said(spec, 3) if spec.fed else None)
    assert logits.shape == (3, 7)
    assert counter.get_total_flops() // 2 == 3 * spec.macs
    assert sum(p.numel() for p in classifier.parameters()) == spec.params
    assert spec.fed == (after and kind == "strong")


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("place", [cut(64, 56, 56), cut(512, 7, 7), cut(197, 384), cut(2048)], ids=str)
@pytest.mark.parametrize(("macs", "params"), [(4 * 10**9, 25_000_000), (5 * 10**7, 2_000_000), (10**6, 10**5)])
def test_a_strong_classifier_keeps_to_its_limits(classes: int, place: CutPoint, macs: int, params: int) -> None:
    spec = sized("strong", place, classes, macs, params, after=True)
    smallest = 2 * place.shape[0 if place.layout == "map" else -1] + classes + 1
    if MACS_LIMIT * macs >= smallest:
        assert spec.macs <= MACS_LIMIT * macs
    else:
        assert spec.macs <= smallest, "not even rank 1 fits; it is the least there is"
    assert spec.params <= max(PARAMS_LIMIT * params, PARAMS_FLOOR)
    assert made(spec)(torch.randn(2, *place.shape))[0].shape == (2, classes)


def test_what_fits_is_used() -> None:
    rich, poor = (sized("strong", cut(64, 16, 16), macs=macs) for macs in (PLENTY, 10**6))
    assert poor.macs < rich.macs
    assert poor.features <= rich.features
    assert rich.hidden > 0


def test_a_cascade_hears_the_exit_before_and_stands_its_absence() -> None:
    spec = sized("strong", cut(6, 8, 8), classes=CLASSES, after=True)
    classifier, x = made(spec), torch.randn(4, 6, 8, 8)
    with torch.no_grad():
        told, alone = classifier(x, said(spec, 4))[0], classifier(x)[0]
        silence = Said(torch.zeros(4, CLASSES), torch.zeros(4, spec.fed_hidden) if spec.fed_hidden else None)
        assert not torch.allclose(told, alone)
        torch.testing.assert_close(classifier(x, silence)[0], alone, msg="absent counts as zeros")
    first = made(sized("strong", cut(6, 8, 8), classes=CLASSES))
    with torch.no_grad():
        assert torch.equal(first(x, said(spec, 4))[0], first(x)[0]), "the first exit hears nobody"


def test_what_is_passed_on_carries_no_gradient() -> None:
    logits, hidden = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    passed = Said.of(logits, hidden)
    assert not passed.log_probs_BC.requires_grad
    assert passed.hidden_BH is not None
    assert not passed.hidden_BH.requires_grad
    torch.testing.assert_close(passed.log_probs_BC.exp().sum(1), torch.ones(2))


def test_classifiers_treat_rows_one_by_one() -> None:
    for place in (cut(6, 8, 8), cut(9, 16), cut(12)):
        for kind in ("paper", "strong"):
            classifier, x = made(sized(kind, place)), torch.randn(5, *place.shape)
            with torch.no_grad():
                whole = classifier(x)[0]
                torch.testing.assert_close(torch.cat([classifier(row)[0] for row in x.split(2)]), whole)
                assert classifier(x[:0])[0].shape == (0, 10)


# ---------------------------------------------------------------- tokens, channels last, other sizes


@pytest.mark.parametrize("kind", ["paper", "strong"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_batch_mates_changes_nothing(kind: str, side: str) -> None:
    classifier = made(sized(kind, cut(9, 16))).double()
    lengths, longest = (3, 9, 1), 9
    rows = [torch.randn(n, 16, dtype=torch.float64) for n in lengths]
    padded, mask = torch.full((3, longest, 16), 77.0, dtype=torch.float64), torch.zeros(3, longest, dtype=torch.int64)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(longest - n, longest) if side == "left" else slice(0, n)
        padded[i, place], mask[i, place] = row, 1
    with torch.no_grad():
        together = classifier(padded, None, mask)[0]
        alone = [classifier(row[None], None, torch.ones(1, n))[0] for row, n in zip(rows, lengths, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_tokens_give_the_first_and_the_mean() -> None:
    classifier, x = made(sized("paper", cut(5, 16))), torch.randn(2, 5, 16)
    assert torch.equal(classifier.reduce(x), torch.stack([x[:, 0], x.mean(1)], 1))
    assert classifier.spec.views == 2
    single = made(sized("paper", cut(1, 16)))
    assert single.spec.views == 1
    assert torch.equal(single.reduce(x[:, :1])[:, 0], x[:, 0])


@pytest.mark.parametrize("kind", ["paper", "strong"])
def test_channels_last_is_the_same_map(kind: str) -> None:
    last, first = made(sized(kind, cut(8, 6, 12, channel_dim=-1))), made(sized(kind, cut(12, 8, 6)))
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, 12, 8, 6)
    with torch.no_grad():
        torch.testing.assert_close(last(x.permute(0, 2, 3, 1))[0], first(x)[0])


def test_maps_of_another_size_are_read_or_refused() -> None:
    classifier = made(sized("paper", cut(6, 32, 32)))
    assert classifier(torch.randn(2, 6, 28, 28))[0].shape == (2, 10)
    with pytest.raises(DataError, match=r"for maps \(6, 32, 32\) cannot read a map \(6, 30, 30\); plan for that size"):
        classifier(torch.randn(2, 6, 30, 30))
    small = made(sized("paper", cut(6, 2, 2)))
    with pytest.raises(DataError, match=r"cannot read a map \(6, 3, 3\)"):
        small(torch.randn(2, 6, 3, 3))


# ---------------------------------------------------------------- a user's own


class Own(nn.Module):
    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(shape[0], 4, 1), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x)).mean((2, 3)))


@cache
def own_sdn() -> sd.ShallowDeepNetwork:
    model = ZOO["residual"].make()
    return sd.attach(model, sd.plan(model, images(2), at=(0.3, 0.6), classifier=Own)).eval()


def test_a_users_own_classifier_is_counted_and_used() -> None:
    sdn = own_sdn()
    for spec in sdn.plan.classifiers:
        assert (spec.kind, spec.fed) == ("custom", False)
        assert spec.macs == 8 * 4 * 64 + 4 * CLASSES
        assert spec.params == 8 * 4 + 4 + 8 + 4 * CLASSES + CLASSES
    with torch.no_grad():
        features = sdn.reduce(images(3))[0]
        own = [sdn.classifier(e).module(f) for e, f in enumerate(features)]  # type: ignore[operator]
        torch.testing.assert_close(sdn(images(3))[:-1], torch.stack(own))


def narrow(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes - 1))


def test_a_users_own_classifier_that_fails_the_contract() -> None:
    model = ZOO["residual"].make()
    with pytest.raises(DataError, match=rf"must answer \[B, {CLASSES}\], found \(2, {CLASSES - 1}\) for two rows"):
        sd.plan(model, images(2), classifier=narrow)
    with pytest.raises(DataError, match="must return a module, found int"):
        sd.plan(model, images(2), classifier=lambda shape, classes: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match=r"found tuple for two rows"):
        sd.plan(model, images(2), classifier=lambda shape, classes: Tupled())
    with pytest.raises(DataError, match="user's own kind 'custom'; give the factory again"):
        make_classifier(own_sdn().plan.classifiers[0])


class Tupled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)
