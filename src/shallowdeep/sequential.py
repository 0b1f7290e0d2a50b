"""Tests and limits that hold however often one looks: bets against claims about means, in constant memory.

It refuses to know what is measured: columns of numbers in [0, 1] come in, evidence against a claim comes out. Evidence
is the wealth of a gambler who starts with 1 and cannot win on average while the claim holds, so that it ever reaches
1/alpha with probability <= alpha (Ville). Sources: arXiv 2010.09686 (betting), 2203.03532 (changes), 2210.01948.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from shallowdeep.bounds import binomial_upper

Floats: TypeAlias = npt.NDArray[np.float64]

STAKE_G: Floats = np.append(0.9, 0.5 ** np.arange(1, 8))
"""Shares of the wealth that are staked, one gambler each: large ones see large changes soon, small ones small ones."""
ROWS_AT_ONCE = 1024
RICH = 1e300
"""Nobody needs more evidence, and infinity cannot be compared."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bets:
    """Evidence, row by row, against the claim that the means of J columns stay at or below ``limit_J``, at all times.

    For every column, stake and row there is a gambler who begins at that row: a change is noticed whenever it comes.
    The gamblers who begin at row t own a share of the first 1 that falls with t and sums to 1; those of a column and
    stake share one purse in ``wealth_JG``. ``alarm_row`` is the first row (from 1) after which the mean purse held
    1/``alpha`` or more, None so far; ``culprit`` is the column that then held most. The chance of an alarm, ever, is
    <= ``alpha`` while no row's mean, given the rows before it, exceeds its limit.

    >>> bets = Bets.against(np.array([0.1]), alpha=0.05)
    >>> bets.after(np.zeros((10000, 1))).alarm_row, bets.after(np.ones((10, 1))).alarm_row
    (None, 3)
    """

    limit_J: Floats
    alpha: float
    wealth_JG: Floats
    rows: int = 0
    alarm_row: int | None = None
    culprit: int | None = None

    @classmethod
    def against(cls, limit_J: Floats, *, alpha: float) -> Bets:
        """Before the first row. Raises ``ValueError`` for limits outside (0, 1] and alpha outside (0, 1)."""
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a probability between 0 and 1, such as 0.05; found {alpha}.")
        if not ((limit_J > 0) & (limit_J <= 1)).all():
            raise ValueError(f"Limits of means must lie above 0 and at most at 1, found {limit_J.tolist()}.")
        return cls(limit_J=limit_J, alpha=alpha, wealth_JG=np.zeros((len(limit_J), len(STAKE_G))))

    def after(self, x_NJ: Floats) -> Bets:
        """The bets after N more rows of numbers in [0, 1]; rows may come one by one or together."""
        bets = self
        for first in range(0, len(x_NJ), ROWS_AT_ONCE):
            bets = bets._after(x_NJ[first : first + ROWS_AT_ONCE])
        return bets

    def _after(self, x_NJ: Floats) -> Bets:
        wealth_JG = self.wealth_JG
        wealth_NJG = 1 + STAKE_G * (x_NJ / self.limit_J - 1)[:, :, None]
        with np.errstate(over="ignore"):
            for gain_JG, begin in zip(wealth_NJG, _begin(self.rows + 1 + np.arange(len(x_NJ))), strict=True):
                gain_JG *= wealth_JG + begin
                wealth_JG = gain_JG
            evidence_N = wealth_NJG.mean((1, 2))
        alarm_row, culprit = self.alarm_row, self.culprit
        if alarm_row is None and (over_N := evidence_N >= 1 / self.alpha).any():
            at = int(over_N.argmax())
            alarm_row, culprit = self.rows + at + 1, int(wealth_NJG[at].mean(1).argmax())
        return dataclasses.replace(
            self,
            wealth_JG=np.minimum(wealth_JG, RICH),
            rows=self.rows + len(x_NJ),
            alarm_row=alarm_row,
            culprit=culprit,
        )

    def to_json(self) -> dict[str, Any]:
        """What rows have changed, as JSON holds it."""
        facts = {"wealth_JG": self.wealth_JG.tolist(), "rows": self.rows}
        return facts | {"alarm_row": self.alarm_row, "culprit": self.culprit}

    def going_on(self, facts: Mapping[str, Any]) -> Bets:
        """These bets where those that wrote ``facts`` stood. Raises ``ValueError`` when they were others."""
        wealth_JG = np.array(facts["wealth_JG"], dtype=np.float64)
        if wealth_JG.shape != self.wealth_JG.shape:
            raise ValueError(f"{self.wealth_JG.shape} purses are needed, found {wealth_JG.shape}.")
        names = ("rows", "alarm_row", "culprit")
        return dataclasses.replace(self, wealth_JG=wealth_JG, **{name: facts[name] for name in names})


def mean_limits(value_V: Floats, count_V: Floats, alpha: float) -> tuple[float, float]:
    """Limits of a mean, from how often each value in [0, 1] was seen: a confidence sequence, looked at any time.

    Rows whose mean is m (each given those before it) have m within the limits at all times, with probability >=
    1 - ``alpha``; without rows the limits are 0 and 1. Source: arXiv 2010.09686, section 4, with a fixed mix of stakes.
    >>> low, high = mean_limits(np.array([0.0, 1.0]), np.array([900, 100]), 0.05)
    >>> round(low, 3), round(high, 3)
    (0.072, 0.134)
    """
    return _lower(value_V, count_V, alpha / 2), 1 - _lower(1 - value_V, count_V, alpha / 2)


def share_limits(hits: int, rows: int, alpha: float) -> tuple[float, float]:
    """Limits of a share of which ``hits`` of ``rows`` rows were seen, a number fixed before: exact (Clopper-Pearson).

    >>> share_limits(0, 598, 0.1)[1] < 0.005
    True
    """
    high, rest = binomial_upper(np.array([hits, rows - hits]), rows, alpha / 2)
    return float(1 - rest), float(high)


def _lower(value_V: Floats, count_V: Floats, alpha: float) -> float:
    """The greatest m such that the evidence against a mean at or below m has reached 1/alpha."""
    rows = float(count_V.sum())
    low, high = 0.0, float(value_V @ count_V) / rows if rows else 0.0
    for _ in range(50):
        middle = (low + high) / 2
        if middle <= 0:
            break
        log_wealth_G = count_V @ np.log1p(np.multiply.outer(value_V / middle - 1, STAKE_G))
        if logsumexp(log_wealth_G) >= math.log(len(STAKE_G) / alpha):
            low = middle
        else:
            high = middle
    return low


def _begin(row_N: npt.NDArray[np.int64]) -> Floats:
    """The share that begins at each row t, 1/log2(t + 1) - 1/log2(t + 2): they fall slowly and sum to 1."""
    share_N: Floats = np.log1p(1 / (row_N + 1.0)) / math.log(2) / (np.log2(row_N + 1.0) * np.log2(row_N + 2.0))
    return share_N
