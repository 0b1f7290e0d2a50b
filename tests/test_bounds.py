"""Every bound against the slow truth: all outcomes enumerated, sums written out, and draws from known populations."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from shallowdeep import bounds
from shallowdeep.bounds import (
    betting_pvalues,
    binomial_pvalues,
    binomial_upper,
    last_conformal,
    last_proved,
    paired_limits,
    paired_passes,
    rows_needed,
)


@pytest.mark.parametrize(("rows", "bound"), [(7, 0.3), (40, 0.02), (598, 0.005)])
def test_binomial_pvalues_are_the_enumerated_tail(rows: int, bound: float) -> None:
    hits = np.arange(min(rows, 12) + 1)
    slow = [
        math.fsum(math.comb(rows, k) * bound**k * (1 - bound) ** (rows - k) for k in range(hit + 1)) for hit in hits
    ]
    assert binomial_pvalues(hits, rows, bound) == pytest.approx(slow)
    assert binomial_pvalues(hits, rows, 1.0).max() == 0
    assert binomial_pvalues(hits, rows, 0.0).min() == 1


def test_binomial_limits_are_scipys_and_turn_the_test_round() -> None:
    hits = np.arange(21)
    upper = binomial_upper(hits, 20, 0.05)
    slow = [binomtest(int(k), 20).proportion_ci(0.9, "exact").high for k in hits]
    assert upper == pytest.approx(slow)
    for k in hits[:-1]:
        assert binomial_pvalues(k, 20, upper[k] + 1e-9) < 0.05 < binomial_pvalues(k, 20, upper[k] - 1e-9)


def bets_slowly(losses: list[float], bound: float, delta: float, low: float, high: float) -> float:
    """The p-value from the definition: one row after another."""
    mean, capital, best = (bound - low) / (high - low), 1.0, 1.0
    seen: list[float] = []
    spread_sum = 0.25 * min(1.0, 4 * mean * (1 - mean))
    variance = mean * (1 - mean)
    for loss in losses:
        unit = (loss - low) / (high - low)
        bet = min(math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)), 0.99 / (1 - mean))
        capital *= 1 + bet * (mean - unit)
        best = max(best, capital)
        seen.append(unit)
        middle = (mean + math.fsum(seen)) / (len(seen) + 1)
        spread_sum += (unit - middle) ** 2
        variance = spread_sum / (len(seen) + 1)
    return 1 / best


def test_betting_is_the_slow_game() -> None:
    rng = np.random.default_rng(0)
    losses = rng.choice([-1.0, 0.0, 1.0], size=(5, 60), p=[0.1, 0.8, 0.1])
    slow = [bets_slowly(row.tolist(), 0.05, 0.1, -1.0, 1.0) for row in losses]
    assert betting_pvalues(losses, 0.05, 0.1, low=-1.0) == pytest.approx(slow)
    assert betting_pvalues(losses, 1.0, 0.1, low=-1.0).max() == 0
    assert betting_pvalues(losses, -1.0, 0.1, low=-1.0).min() == 1


@pytest.mark.parametrize("chances", [(0.0, 0.9, 0.1), (0.3, 0.3, 0.4), (0.45, 0.0, 0.55), (0.02, 0.9, 0.08)])
@pytest.mark.parametrize("delta", [0.05, 0.2, 0.4])
def test_betting_errs_no_oftener_than_it_says_over_all_samples(
    chances: tuple[float, float, float], delta: float
) -> None:
    """Every sample of seven losses, with its probability, where the mean is exactly the bound."""
    values = (-1.0, 0.0, 1.0)
    mean = sum(v * c for v, c in zip(values, chances, strict=True))
    samples = list(itertools.product(range(3), repeat=7))
    chance = np.array([math.prod(chances[i] for i in sample) for sample in samples])
    losses = np.array([[values[i] for i in sample] for sample in samples])
    assert chance.sum() == pytest.approx(1)
    proved = betting_pvalues(losses, mean, delta, low=-1.0) <= delta
    assert chance[proved].sum() <= delta


def test_betting_finds_what_is_there() -> None:
    losses = np.random.default_rng(1).choice([0.0, 1.0], size=1000, p=[0.99, 0.01])
    assert betting_pvalues(losses[None], 0.03, 0.05)[0] <= 0.05 < betting_pvalues(losses[None], losses.mean(), 0.05)[0]


def false_proof(limits: np.ndarray, rows: int, bound: float, gaining: float) -> float:
    """The probability that counts pass where the mean loss is ``bound``: every outcome of the multinomial."""
    losing = gaining + bound
    rest = 1 - gaining - losing
    total = []
    for better, limit in enumerate(limits):
        for worse in range(int(limit) + 1):
            ways = math.comb(rows, better) * math.comb(rows - better, worse)
            total.append(ways * gaining**better * losing**worse * rest ** (rows - better - worse))
    return math.fsum(total)


@pytest.mark.parametrize(
    ("rows", "bound", "delta"), [(15, 0.1, 0.1), (40, 0.05, 0.2), (60, 0.0, 0.05), (60, -0.1, 0.1)]
)
def test_the_paired_test_errs_no_oftener_than_it_says_over_all_outcomes(rows: int, bound: float, delta: float) -> None:
    limits = paired_limits(rows, bound, delta)
    assert (np.diff(limits) >= 0).all(), "a row more that gains must never unmake a proof"
    assert limits.max() >= 0
    most = [
        false_proof(limits, rows, bound, gaining) for gaining in np.linspace(max(0, -bound), (1 - bound) / 2, 60)[:-1]
    ]
    assert max(most) <= delta
    assert max(most) > delta / 2, "a test that never proves anything would pass this, too"


def test_paired_proofs_by_counts() -> None:
    limits = paired_limits(200, 0.02, 0.05)
    worse, better = (found.ravel() for found in np.mgrid[0:12, 0:12])
    slow = [w <= limits[b] for w, b in zip(worse, better, strict=True)]
    assert paired_passes(worse, better, 200, 0.02, 0.05).tolist() == slow
    assert not paired_passes(np.array([0]), np.array([180]), 200, 0.02, 0.05)[0], (
        "beyond what is tabled nothing is said"
    )
    with pytest.raises(ValueError, match="read-only"):
        limits[0] = 3


def test_598_rows_without_a_loss_show_half_a_point() -> None:
    assert rows_needed(0.005, 0.05) == 598
    for rows, proved in ((597, False), (598, True)):
        assert (binomial_pvalues(np.array([0]), rows, 0.005) <= 0.05).tolist() == [proved]
        assert paired_passes(np.array([0]), np.array([0]), rows, 0.005, 0.05).tolist() == [proved]
    with pytest.raises(ValueError, match=r"between 0 and 1; found 0 and 0\.05"):
        rows_needed(0, 0.05)


def test_the_paired_test_proves_more_than_betting_and_binomial() -> None:
    rng = np.random.default_rng(0)
    losses = rng.choice([-1.0, 0.0, 1.0], size=(300, 2000), p=[0.006, 0.984, 0.01])
    worse, better = (losses > 0).sum(1), (losses < 0).sum(1)
    paired = paired_passes(worse, better, 2000, 0.01, 0.05).mean()
    betting = (betting_pvalues(losses, 0.01, 0.05, low=-1.0) <= 0.05).mean()
    harm = (binomial_pvalues(worse, 2000, 0.01) <= 0.05).mean()
    assert paired > betting + 0.1 > harm + 0.2


def test_the_last_step_before_the_first_failure() -> None:
    for passes in itertools.product([False, True], repeat=5):
        for start in range(5):
            expected = None
            for step in range(start, 5):
                if not passes[step]:
                    break
                expected = step
            assert last_proved(np.array(passes), start) == expected


def test_one_step_too_far_would_be_seen() -> None:
    """A path that harms nobody, then half of the rows: taking the first step that fails errs in every draw."""
    rng, risks, errors, errors_too_far = np.random.default_rng(0), np.array([0.0, 0.004, 0.5]), 0, 0
    for _ in range(400):
        passes = binomial_pvalues(rng.binomial(1000, risks), 1000, 0.01) <= 0.05
        step = last_proved(passes)
        errors += step is not None and risks[step] > 0.01
        errors_too_far += risks[min(int(np.argmin(passes)), 2)] > 0.01
    assert errors <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)
    assert errors_too_far > 100


def test_conformal_risk_control_keeps_the_mean() -> None:
    """Thresholds on uniform scores, where the risk of step k is k / 200: the mean over draws is within the bound."""
    rng, found = np.random.default_rng(0), []
    grid = np.arange(1, 41) / 200
    for _ in range(3000):
        score_N = rng.random(99)
        step = last_conformal((score_N[:, None] < grid).mean(0), 99, 0.05)
        found.append(0.0 if step is None else grid[step])
    assert np.mean(found) <= 0.05 + 3 * np.std(found) / math.sqrt(3000)
    assert np.mean(found) > 0.04
    assert last_conformal(np.zeros(3), 98, 0.01) is None
    assert last_conformal(np.zeros(3), 99, 0.01) == 2
    with pytest.raises(ValueError, match="never falls"):
        last_conformal(np.array([0.1, 0.05]), 99, 0.05)


def test_fixed_sequences_and_conformal_bounds_are_mapies() -> None:
    fwer = pytest.importorskip("mapie.risk_control.fwer_control")
    methods = pytest.importorskip("mapie.risk_control.methods")
    rng, found = np.random.default_rng(0), set[int | None]()
    for _ in range(200):
        p = rng.random(8) ** 4
        last = last_proved(p <= 0.1)
        assert list(range(0 if last is None else last + 1)) == fwer.control_fwer(p, 0.1, "fixed_sequence").tolist()
        loss_NP = (rng.random((50, 1)) < np.sort(rng.random(10) * 0.3)).astype(float)
        _, raised_P = methods.get_r_hat_plus(loss_NP, np.linspace(0, 1, 10), "crc", None, None, None)
        met = np.flatnonzero(raised_P <= 0.15)
        assert last_conformal(loss_NP.mean(0), 50, 0.15) == (met[-1] if len(met) else None)
        found |= {last, int(met[-1]) if len(met) else None}
    assert len(found) > 5


def test_the_examples_run() -> None:
    assert doctest.testmod(bounds).failed == 0
