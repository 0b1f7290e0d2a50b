"""Families of policies: each fits few numbers on rows and gives a path from the safest policy to the cheapest.

It refuses to know targets and who wins: thresholds searched freely flatter themselves, so others judge paths on rows
that did not fit them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from shallowdeep.paths import Bools, Floats, Kind, Path, Rows, Steps, in_units
from shallowdeep.policies import Confidence, Margin, Policy

POINTS = 400
"""Steps of a family's path between the policy that lets nobody leave early and the one that lets everybody."""
SEARCHED = 48
"""Steps of the free family that are searched; the others lie between."""
FIT_ROWS = 20_000
"""Levels are fitted on so many rows at most; more do not move them."""
USUAL_SLOPE, TRUST = -0.8, 30.0
"""Log-odds of harm per log-odds of confidence: what is expected before seeing rows, and how firmly (ridge)."""


class Family(NamedTuple):
    """A way to make paths: ``fit(rows, grid_P)``, at the steps marked by ``grid_P`` (None: at marks of its own)."""

    name: str
    fit: Callable[[Rows, Floats | None], Path]


def _steps(score_KN: Floats) -> Floats:
    seen = score_KN[np.isfinite(score_KN)]
    inner = np.quantile(seen, np.linspace(1, 0, POINTS)) if len(seen) else np.empty(0)
    return np.concatenate([[math.inf], inner, [-math.inf]])


def _thresholds(kind: Kind, grid_P: Floats, path_PK: Floats, rows: Rows, *, shared: bool = False) -> Path:
    """Thresholds [P, K] on scores as a path of policies of ``kind``; ``shared``: one number for all exits."""

    def make(bar_K: Floats, asked: Sequence[bool], num_exits: int) -> Policy:
        enabled_E = None if all(asked) else tuple(asked)
        if shared:
            return kind(threshold=float(bar_K[0]), enabled_E=enabled_E)
        threshold = [math.inf] * (num_exits - 1)
        for bar, exit in zip(bar_K, [exit for exit, on in enumerate(asked) if on][:-1], strict=True):
            threshold[exit] = float(bar)
        return kind(threshold=tuple(threshold), enabled_E=enabled_E)

    bar_PK = in_units(path_PK, rows.scores[kind], shared)
    return Path(grid_P=grid_P, bar_PK=bar_PK, unit=lambda others: others.scores[kind].unit_KN, make=make)


def _one(rows: Rows, grid_P: Floats | None) -> Path:
    score_KN = rows.scores[Confidence].score_KN
    grid_P = _steps(score_KN) if grid_P is None else grid_P
    return _thresholds(Confidence, grid_P, np.repeat(grid_P[:, None], len(score_KN), 1), rows, shared=True)


def _levels(kind: Kind, rows: Rows, grid_P: Floats | None) -> Path:
    """Every exit stops where the odds that stopping does harm fall below one bound: one shift over K levels."""
    score_KN = rows.scores[kind].score_KN
    level_K, slope_K = _safety(score_KN, rows.right_LN)
    grid_P = _steps(level_K[:, None] + slope_K[:, None] * score_KN) if grid_P is None else grid_P
    return _thresholds(kind, grid_P, (grid_P[:, None] - level_K) / slope_K, rows)


def _safety(score_KN: Floats, right_LN: Bools) -> tuple[Floats, Floats]:
    """Log-odds, per exit, that stopping does no harm = level + slope * score. Harm: right in the end, wrong here.

    Logistic regressions of all exits at once, by Newton's method. Slopes are shrunk to ``USUAL_SLOPE``; half a harmful
    row at the mean score keeps exits finite that never did harm.
    """
    some = slice(None, None, max(1, right_LN.shape[1] // FIT_ROWS))
    score_KN, right_LN = score_KN[:, some], right_LN[:, some]
    seen_KN = np.isfinite(score_KN)
    score_KN = np.where(seen_KN, score_KN, 0.0)
    middle_K = score_KN.sum(1) / np.maximum(seen_KN.sum(1), 1)
    harm_KN = right_LN[-1] & ~right_LN[:-1]
    more = ((0, 0), (0, 1))
    score_KN = np.pad(score_KN - middle_K[:, None], more)
    harm_KN = np.pad(harm_KN.astype(np.float64), more, constant_values=0.5)
    seen_KN = np.pad(seen_KN, more, constant_values=True)
    at_K, by_K = np.zeros(len(score_KN)), np.full(len(score_KN), USUAL_SLOPE)
    for _ in range(50):
        risk_KN = 1 / (1 + np.exp(-np.clip(at_K[:, None] + by_K[:, None] * score_KN, -50, 50)))
        miss_KN, weight_KN = (harm_KN - risk_KN) * seen_KN, risk_KN * (1 - risk_KN) * seen_KN
        pull_at_K, pull_by_K = miss_KN.sum(1), (miss_KN * score_KN).sum(1) - TRUST * (by_K - USUAL_SLOPE)
        bend_aa_K, bend_ab_K = weight_KN.sum(1) + 1e-9, (weight_KN * score_KN).sum(1)
        bend_bb_K = (weight_KN * score_KN**2).sum(1) + TRUST
        det_K = bend_aa_K * bend_bb_K - bend_ab_K**2
        step_at_K = (bend_bb_K * pull_at_K - bend_ab_K * pull_by_K) / det_K
        step_by_K = (bend_aa_K * pull_by_K - bend_ab_K * pull_at_K) / det_K
        brake_K = np.maximum(1, np.maximum(np.abs(step_at_K) / 2, np.abs(step_by_K) / 0.5))
        at_K, by_K = at_K + step_at_K / brake_K, by_K + step_by_K / brake_K
        if max(np.abs(step_at_K).max(), np.abs(step_by_K).max()) < 1e-6:
            break
    slope_K = np.maximum(-by_K, 0.05)
    return -at_K - slope_K * middle_K, slope_K


def _free(rows: Rows, grid_P: Floats | None) -> Path:
    """Every exit its own threshold: the best found price after price, each search starting from the last.

    Marks are prices of one error in units of cost, from high to low.
    """
    price_P = np.geomspace(1000, 0.5, POINTS + 2) if grid_P is None else grid_P
    score_KN = rows.scores[Confidence].score_KN
    score_KN = np.where(np.isfinite(score_KN), score_KN, -math.inf)
    order_KN = np.argsort(-score_KN, 1, kind="stable")
    bar_K = np.full(len(score_KN), math.inf)
    searched_Q = np.linspace(1, len(price_P) - 2, SEARCHED).round().astype(np.int64)
    found = []
    for price in price_P[searched_Q]:
        bar_K = _descend(bar_K, rows.cost_L[:, None] + price * ~rows.right_LN, score_KN, order_KN)
        found.append(bar_K)
    roof_K = np.nan_to_num(score_KN.max(1), neginf=0.0) + 1
    found_QK = np.minimum.accumulate(np.clip(np.stack(found), -1e9, roof_K), 0)
    path_PK = np.stack([np.interp(np.arange(len(price_P)), searched_Q, found_Q) for found_Q in found_QK.T], 1)
    path_PK[0], path_PK[-1] = math.inf, -math.inf
    return _thresholds(Confidence, price_P, path_PK, rows)


def _descend(bar_K: Floats, loss_LN: Floats, score_KN: Floats, order_KN: Steps) -> Floats:
    """Thresholds of which none alone can be bettered: exact sweeps over one exit at a time, four rounds at most."""
    bar_K = bar_K.copy()
    for _ in range(4):
        before_K, later_N = bar_K.copy(), loss_LN[-1]
        for exit in reversed(range(len(bar_K))):
            arrives_N = ~(score_KN[:exit] >= bar_K[:exit, None]).any(0)
            change_N = np.where(arrives_N, loss_LN[exit] - later_N, 0.0)[order_KN[exit]]
            stops = int(np.argmin(np.concatenate([[0.0], change_N.cumsum()])))
            bar_K[exit] = score_KN[exit, order_KN[exit, stops - 1]] if stops else math.inf
            later_N = np.where(score_KN[exit] >= bar_K[exit], loss_LN[exit], later_N)
        if np.array_equal(before_K, bar_K):
            break
    return bar_K


FAMILIES = (
    Family("one shift over levels of confidence", partial(_levels, Confidence)),
    Family("one shift over levels of margin", partial(_levels, Margin)),
    Family("free confidence thresholds", _free),
    Family("one confidence threshold", _one),
)
"""The first is the rule, the last what is left when rows are few."""
