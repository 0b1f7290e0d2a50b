"""What rows prove about a mean loss: exact tests, upper limits, and which step of a path has been proved.

It refuses to know what a loss means and where rows come from. Every test asks the same of P steps at once: can the mean
loss of fresh rows still lie above ``bound``? A p-value under ``delta`` says no, and is wrong so often at most.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, gammaln, xlog1py, xlogy
from scipy.stats import beta, norm

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]

DISCORDANT = 0.2
"""The exact paired test gives up where two answers differ on about this part of the rows: little could be proved."""
FINENESS = 0.03
"""Width of the cells that bound the paired test's error, in standard errors: up to so much of its power is lost."""
WINDOW = 7.0
"""Standard deviations of a binomial count that are summed; what lies outside is added as ``OUTSIDE``."""
OUTSIDE = 1e-9
CELLS_AT_ONCE = 64


def binomial_pvalues(hits_P: Counts, rows: int, bound: float) -> Floats:
    """P-values [P] of a share above ``bound``, where ``hits_P`` of ``rows`` rows were hit: the exact binomial tail.

    >>> binomial_pvalues(np.array([0, 0]), 598, 0.005).round(4).tolist()
    [0.0499, 0.0499]
    """
    tail_P: Floats = bdtr(np.asarray(hits_P, np.float64), rows, min(max(bound, 0.0), 1.0))
    return tail_P if bound < 1 else np.zeros_like(tail_P)


def binomial_upper(hits_P: Counts, rows: int | Counts, delta: float) -> Floats:
    """Upper limits [P] of shares of ``rows`` rows, each right with probability 1 - ``delta`` (Clopper, Pearson 1934).

    >>> binomial_upper(np.array([0]), 598, 0.05).round(5).tolist()
    [0.005]
    """
    hits_P = np.asarray(hits_P)
    limit_P = beta.isf(delta, hits_P + 1, np.maximum(rows - hits_P, 1))
    upper_P: Floats = np.where(hits_P < rows, limit_P, 1.0)
    return upper_P


def betting_pvalues(loss_PN: Floats, bound: float, delta: float, *, low: float = 0.0, high: float = 1.0) -> Floats:
    """P-values [P] of a mean above ``bound``, of losses between ``low`` and ``high``, by betting against it.

    A gambler bets, row by row, that losses are less than ``bound``. Where the mean is not, no bet is favourable, and
    the capital ever reaches 1 / delta with probability delta at most; the p-value is 1 over the largest capital. Bets
    grow as losses vary less, and know only rows before: their order must not depend on the losses. ``delta`` is the
    level that bets are made for. Source: arXiv 2010.09686, section 4 (predictable plug-in) and theorem 1.
    >>> float(betting_pvalues(np.zeros((1, 1000)), 0.01, 0.05).round(4)[0]) < 0.001
    True
    """
    mean = (bound - low) / (high - low)
    if mean <= 0 or mean >= 1:
        return np.full(len(loss_PN), 1.0 if mean <= 0 else 0.0)
    rows = loss_PN.shape[1]
    unit_PN = (np.asarray(loss_PN, np.float64) - low) / (high - low)
    seen_N = np.arange(1, rows + 1)
    middle_PN = (mean + unit_PN.cumsum(1)) / (seen_N + 1)
    spread_PN = (0.25 * min(1.0, 4 * mean * (1 - mean)) + ((unit_PN - middle_PN) ** 2).cumsum(1)) / (seen_N + 1)
    before_PN = np.concatenate([np.full((len(unit_PN), 1), mean * (1 - mean)), spread_PN[:, :-1]], 1)
    bet_PN = np.minimum(np.sqrt(2 * math.log(1 / delta) / (rows * before_PN)), 0.99 / (1 - mean))
    capital_PN = np.log1p(bet_PN * (mean - unit_PN)).cumsum(1)
    p_P: Floats = np.exp(-np.maximum(capital_PN.max(1, initial=0.0), 0.0))
    return p_P


def paired_passes(worse_P: Counts, better_P: Counts, rows: int, bound: float, delta: float) -> Bools:
    """Which steps [P] are proved to lose at most ``bound`` in the mean, of losses that are 1, 0 or -1 only.

    Of ``rows`` rows ``worse_P`` lose and ``better_P`` gain, as when two answers to the same rows are compared. The
    exact unconditional test: ``paired_limits`` says which counts are proof, and errs with probability ``delta`` at
    most whatever the share of rows where the answers differ.
    >>> paired_passes(np.array([0, 1, 1]), np.array([0, 0, 2]), 700, 0.005, 0.05).tolist()
    [True, False, True]
    """
    limit_M = paired_limits(rows, bound, delta)
    better_P = np.asarray(better_P)
    within_P = better_P < len(limit_M)
    passes_P: Bools = within_P & (worse_P <= limit_M[np.minimum(better_P, len(limit_M) - 1)])
    return passes_P


@lru_cache(maxsize=128)
def paired_limits(rows: int, bound: float, delta: float) -> Counts:
    """With how many losing rows at most (-1: none) a mean loss <= ``bound`` is proved, for 0, 1, .. gaining rows [M].

    Counts are ordered by Tango's score (1998, doi 10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B),
    its quantile is raised until the greatest probability of a false proof is at most ``delta``, in exact arithmetic of
    the multinomial and not in the limit. The greatest probability over the unknown share of gaining rows is bounded
    cell by cell: losing fewer and gaining more rows only makes a proof likelier.
    """
    fineness = min(FINENESS * max(1.0, rows / 5000), 0.5)  # many rows leave little to lose
    least = float(norm.isf(delta))
    span = 0.08
    while _false_proof(limit_M := _limits(rows, bound, least + span), rows, bound, fineness) > delta:
        span *= 2
        if span > 20:
            return np.full(1, -1)
    below, above = 0.0, span
    for _ in range(5):
        middle = (below + above) / 2
        tried_M = _limits(rows, bound, least + middle)
        if _false_proof(tried_M, rows, bound, fineness) <= delta:
            above, limit_M = middle, tried_M
        else:
            below = middle
    limit_M.setflags(write=False)
    return limit_M


def _limits(rows: int, bound: float, quantile: float) -> Counts:
    """For every number of gaining rows the most losing rows whose score is -quantile or less."""
    most = min(rows, math.ceil((DISCORDANT / 2 + max(-bound, 0.0)) * rows) + 10)
    better_M = np.arange(most + 1)
    passed_M, failed_M = np.full(most + 1, -1), rows - better_M + 1
    while (failed_M - passed_M > 1).any():
        middle_M = (passed_M + failed_M) // 2
        proof_M = (middle_M >= 0) & (_score(np.maximum(middle_M, 0), better_M, rows, bound) <= -quantile)
        passed_M, failed_M = np.where(proof_M, middle_M, passed_M), np.where(proof_M, failed_M, middle_M)
    rising_M: Counts = np.minimum.accumulate(passed_M[::-1])[::-1]  # gaining one row more never unmakes a proof
    return rising_M


def _score(worse_M: Counts, better_M: Counts, rows: int, bound: float) -> Floats:
    """How far the mean loss lies above ``bound``, in standard errors as they would be if the bound were the truth."""
    some_M = worse_M + better_M - bound * (2 * rows - worse_M + better_M)
    gaining_M = (some_M + np.sqrt(some_M**2 + 8 * rows * better_M * bound * (1 - bound))) / (4 * rows)
    spread_M = 2 * np.maximum(gaining_M, max(0.0, -bound)) + bound - bound**2
    score_M: Floats = ((worse_M - better_M) / rows - bound) / np.sqrt(np.maximum(spread_M, 1e-12) / rows)
    return score_M


def _false_proof(limit_M: Counts, rows: int, bound: float, fineness: float) -> float:
    """At least the probability that counts pass ``limit_M`` although the mean loss is ``bound``, at its greatest."""
    most, first = len(limit_M) - 1, max(0.0, -bound)
    # Beyond `last` so many rows gain that more than `most` do, which is never taken as proof.
    last = min((1 - bound) / 2, (most + WINDOW * math.sqrt(most) + 25) / rows)
    near, far = (math.sqrt(2 * share + abs(bound) + 1 / rows) for share in (first, last))
    edge_Q = np.linspace(near, far, max(8, math.ceil((far - near) * math.sqrt(rows) / fineness)) + 1)
    edge_Q = np.clip((edge_Q**2 - abs(bound) - 1 / rows) / 2, first, last)
    edge_Q = np.insert(
        edge_Q, 1, first + (edge_Q[1] - first) * np.array([0.01, 0.1])
    )  # with no gain it is touch and go
    worse_Q, better_Q = np.clip(edge_Q[:-1] + bound, 0, 1), edge_Q[1:]
    cells = range(0, len(better_Q), CELLS_AT_ONCE)  # the first need a narrow window, and they are many
    parts = [slice(start, start + CELLS_AT_ONCE) for start in cells]
    return max(float(_passing(limit_M, rows, worse_Q[part], better_Q[part]).max()) for part in parts) + OUTSIDE


def _passing(limit_M: Counts, rows: int, worse_Q: Floats, better_Q: Floats) -> Floats:
    """The probability [Q] that multinomial counts pass ``limit_M``, for shares of losing and of gaining rows."""
    most, worse_Q1, better_Q1 = len(limit_M) - 1, worse_Q[:, None], better_Q[:, None]
    reach_Q1 = WINDOW * np.sqrt(rows * better_Q1) + 8
    low_Q1 = np.maximum(np.floor(rows * better_Q1 - reach_Q1), 0).astype(np.int64)
    count_QW = low_Q1 + np.arange(int(np.ceil(2 * reach_Q1.max())) + 2)
    inside_QW = count_QW <= most
    count_QW = np.minimum(count_QW, most)
    allowed_QW = limit_M[count_QW]
    inside_QW &= allowed_QW >= 0
    ways_M = gammaln(rows + 1) - gammaln(np.arange(most + 1) + 1) - gammaln(rows - np.arange(most + 1) + 1)
    some_QW = np.exp(ways_M[count_QW] + xlogy(count_QW, better_Q1) + xlog1py(rows - count_QW, -better_Q1))
    odds_QW = np.broadcast_to(worse_Q1 / (1 - better_Q1), count_QW.shape)[inside_QW]
    tail_QW = np.zeros_like(some_QW)
    tail_QW[inside_QW] = bdtr(allowed_QW[inside_QW].astype(np.float64), (rows - count_QW)[inside_QW], odds_QW)
    passing_Q: Floats = (some_QW * tail_QW).sum(1)
    return passing_Q


def last_proved(passes_P: Bools, start: int = 0) -> int | None:
    """The last step that passes before the first that fails, from ``start`` on; None when that fails itself.

    Fixed-sequence testing: each step is tested at the full level, because a test counts only if all before it passed.
    The first step that fails is not proved, and no step after it, whatever its own test says. Source: Learn then
    Test, arXiv 2110.01052, section 3; https://github.com/metodj/RC-EENN returns one step more.
    >>> last_proved(np.array([True, True, False, True]))
    1
    """
    failed = np.flatnonzero(~passes_P[start:])
    last = start + (int(failed[0]) if len(failed) else len(passes_P) - start) - 1
    return last if last >= start else None


def last_conformal(risk_P: Floats, rows: int, bound: float) -> int | None:
    """The last step whose risk, one row more at the worst, 1, counted, is within ``bound``; None when no step's is.

    For risks that never fall along the path, row by row; then the *expected* risk of the step is within ``bound``.
    Source: conformal risk control, arXiv 2208.02814, theorem 1.
    >>> last_conformal(np.array([0.0, 0.004, 0.02]), 999, 0.01)
    1
    """
    if bool((np.diff(risk_P) < -1e-12).any()):
        raise ValueError("Conformal risk control needs a risk that never falls along the path; make it monotone.")
    met = np.flatnonzero((rows * risk_P + 1) / (rows + 1) <= bound + 1e-12)
    return int(met[-1]) if len(met) else None


def rows_needed(bound: float, delta: float) -> int:
    """How many rows without a single loss prove a mean loss <= ``bound`` (0 < bound < 1) with probability 1 - delta.

    >>> rows_needed(0.005, 0.05)
    598
    """
    if not 0 < bound < 1 or not 0 < delta < 1:
        raise ValueError(f"bound and delta lie between 0 and 1; found {bound} and {delta}.")
    return math.ceil(math.log(delta) / math.log1p(-bound) - 1e-9)
