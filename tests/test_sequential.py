"""Bets equal a loop over gamblers, win nothing on average while a claim holds, and find changes early and late."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

import shallowdeep.sequential as sequential
from oracle import run_examples
from shallowdeep.sequential import RICH, STAKE_G, Bets, mean_limits, share_limits


def begin(row: int) -> float:
    return 1 / math.log2(row + 1) - 1 / math.log2(row + 2)


def slow(x_NJ: np.ndarray, limit_J: np.ndarray, alpha: float) -> tuple[float, int | None]:
    """Mean wealth after all rows and the first row with an alarm, gambler by gambler."""
    alarm, mean = None, 0.0
    for now in range(1, len(x_NJ) + 1):
        total = 0.0
        for j, stake, first in itertools.product(range(len(limit_J)), STAKE_G, range(1, now + 1)):
            wealth = begin(first)
            for row in range(first, now + 1):
                wealth *= 1 + stake / limit_J[j] * (x_NJ[row - 1, j] - limit_J[j])
            total += wealth
        mean = total / (len(limit_J) * len(STAKE_G))
        alarm = now if alarm is None and mean >= 1 / alpha else alarm
    return mean, alarm


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 7), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.05, 0.5]))
def test_bets_are_the_slow_ones_however_rows_come(rows: int, columns: int, seed: int, alpha: float) -> None:
    draw = np.random.default_rng(seed)
    x_NJ, limit_J = draw.random((rows, columns)) ** 0.3, draw.uniform(0.01, 1.0, columns)
    bets = Bets.against(limit_J, alpha=alpha)
    together = bets.after(x_NJ)
    mean, alarm = slow(x_NJ, limit_J, alpha)
    assert together.wealth_JG.mean() == pytest.approx(mean, rel=1e-9)
    assert together.alarm_row == alarm
    for row in range(rows):
        bets = bets.after(x_NJ[row : row + 1])
    np.testing.assert_array_equal(bets.wealth_JG, together.wealth_JG)
    assert (bets.alarm_row, bets.culprit, bets.rows) == (alarm, together.culprit, rows)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x_NJ = np.random.default_rng(0).random((500, 2))
    whole = Bets.against(np.array([0.3, 0.6]), alpha=0.05).after(x_NJ)
    monkeypatch.setattr(sequential, "ROWS_AT_ONCE", 7)
    parts = Bets.against(np.array([0.3, 0.6]), alpha=0.05).after(x_NJ)
    assert whole.alarm_row == parts.alarm_row is not None
    np.testing.assert_array_equal(whole.wealth_JG, parts.wealth_JG)


@pytest.mark.parametrize("mean", [0.05, 0.3, 0.5])
def test_while_the_claim_holds_alarms_are_rarer_than_alpha_exactly(mean: float) -> None:
    """All 2^12 streams of zeros and ones, each with its probability: no gambler wins on average."""
    rows, alpha = 12, 0.3
    alarms = wealth = 0.0
    for stream in itertools.product((0.0, 1.0), repeat=rows):
        chance = math.prod(mean if x else 1 - mean for x in stream)
        bets = Bets.against(np.array([mean]), alpha=alpha).after(np.array(stream)[:, None])
        alarms += chance * (bets.alarm_row is not None)
        wealth += chance * float(bets.wealth_JG.mean())
    assert wealth == pytest.approx(sum(begin(row) for row in range(1, rows + 1)))
    assert wealth < 1
    assert 0 < alarms <= alpha


def test_long_streams_raise_few_alarms() -> None:
    draw, streams, alpha = np.random.default_rng(1), 200, 0.1
    alarms = 0
    for _ in range(streams):
        x_N1 = draw.binomial(1, 0.2, (3000, 1)).astype(float)
        x_NJ = np.concatenate([x_N1, 1 - x_N1], 1)
        alarms += Bets.against(np.array([0.2, 0.8]), alpha=alpha).after(x_NJ).alarm_row is not None
    assert binomtest(alarms, streams, alpha, alternative="greater").pvalue > 0.001
    assert alarms > 0, "bets that never raise an alarm are too timid for their alpha"


def test_shares_of_the_first_1_sum_to_it() -> None:
    share_N = sequential._begin(np.arange(1, 100_001))
    assert share_N[:5].tolist() == pytest.approx([begin(row) for row in range(1, 6)])
    assert share_N.sum() + 1 / math.log2(100_002) == pytest.approx(1, abs=1e-9)
    assert (np.diff(share_N) < 0).all()


@pytest.mark.parametrize("before", [0, 20_000])
def test_changes_are_found_early_and_late(before: int) -> None:
    draw = np.random.default_rng(2)
    x_N = np.concatenate([draw.binomial(1, 0.1, before), draw.binomial(1, 0.2, 2000)]).astype(float)
    found = Bets.against(np.array([0.5, 0.11]), alpha=0.01).after(np.stack([x_N, x_N], 1))
    assert found.alarm_row is not None
    assert before < found.alarm_row < before + 700
    assert found.culprit == 1


def test_extremes() -> None:
    rich = Bets.against(np.array([0.001, 1.0]), alpha=0.05).after(np.ones((5000, 2)))
    assert rich.wealth_JG.max() == RICH
    assert rich.after(np.zeros((3, 2))).wealth_JG.max() < RICH
    never = Bets.against(np.array([1.0]), alpha=0.05).after(np.ones((5000, 1)))
    assert never.alarm_row is None, "no number exceeds 1"
    assert Bets.against(np.array([0.1]), alpha=0.05).after(np.zeros((0, 1))).rows == 0
    for limit in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="above 0 and at most at 1"):
            Bets.against(np.array([0.5, limit]), alpha=0.05)
    with pytest.raises(ValueError, match="a probability between 0 and 1"):
        Bets.against(np.array([0.5]), alpha=0.0)


def test_written_and_read_bets_go_on() -> None:
    draw = np.random.default_rng(3)
    first, then = draw.random((200, 2)), draw.random((200, 2))
    bets = Bets.against(np.array([0.45, 0.5]), alpha=0.05)
    facts = json.loads(json.dumps(bets.after(first).to_json()))
    again = bets.going_on(facts).after(then)
    whole = bets.after(first).after(then)
    np.testing.assert_array_equal(again.wealth_JG, whole.wealth_JG)
    assert (again.rows, again.alarm_row, again.culprit) == (400, whole.alarm_row, whole.culprit)
    with pytest.raises(ValueError, match="purses are needed"):
        Bets.against(np.array([0.5]), alpha=0.05).going_on(facts)


# ---------------------------------------------------------------- limits


def evidence(values: list[float], m: float) -> float:
    """Mean wealth of those who bet that the mean is above m."""
    return sum(math.prod(1 + stake / m * (x - m) for x in values) for stake in STAKE_G) / len(STAKE_G)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=25), st.sampled_from([0.05, 0.4]))
def test_limits_part_what_the_bets_refute(values: list[float], alpha: float) -> None:
    value_V = np.array([0.0, 0.25, 0.5, 1.0])
    low, high = mean_limits(value_V, np.array([values.count(v) for v in value_V]), alpha)
    assert 0 <= low <= (np.mean(values) if values else 0.5) <= high <= 1
    for m in np.linspace(0.01, 0.99, 50):
        refuted = evidence(values, m) >= 2 / alpha or evidence([1 - x for x in values], 1 - m) >= 2 / alpha
        if min(abs(m - low), abs(m - high)) > 1e-9:
            assert refuted == (not low <= m <= high)


def test_limits_hold_at_all_times_at_once_exactly() -> None:
    """All 2^12 streams: the chance that some look misses the mean."""
    missed, alpha, mean, value_V = 0.0, 0.4, 0.3, np.array([0.0, 1.0])
    outside = {}
    for rows, ones in ((n, k) for n in range(13) for k in range(n + 1)):
        low, high = mean_limits(value_V, np.array([rows - ones, ones]), alpha)
        outside[rows, ones] = not low <= mean <= high
    for stream in itertools.product((0, 1), repeat=12):
        chance = math.prod(mean if x else 1 - mean for x in stream)
        missed += chance * any(outside[rows, sum(stream[:rows])] for rows in range(13))
    assert 0 < missed <= alpha


@pytest.mark.parametrize(("hits", "rows"), [(0, 20), (20, 20), (3, 50), (0, 1)])
def test_limits_of_shares_are_exact(hits: int, rows: int) -> None:
    expected = binomtest(hits, rows).proportion_ci(0.9, method="exact")
    assert share_limits(hits, rows, 0.1) == pytest.approx((expected.low, expected.high))


def test_without_rows_everything_is_possible() -> None:
    assert mean_limits(np.array([0.0, 1.0]), np.zeros(2), 0.05) == (0.0, 1.0)


def test_the_examples_run() -> None:
    run_examples(sequential, "sequential")
