"""Thresholds for an aim, a budget or a bound, found on held-out rows; what a policy is worth on others.

It refuses to know networks and training: a trace comes in, a policy goes out. Few numbers are fitted and every choice
among families is made on rows that did not fit them, because thresholds searched freely flatter themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import beta
from torch import Tensor

from shallowdeep.disagreement import error_auroc
from shallowdeep.effects import answers, share
from shallowdeep.policies import (
    CHUNK_ELEMENTS,
    CalibrationRecord,
    Confidence,
    Fixed,
    Margin,
    Policy,
    asked_exits,
    finite_rows,
    policy_costs,
    simulate,
)
from shallowdeep.types import Trace, table

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Steps = NDArray[np.int64]

POINTS = 400
"""Steps of a path from the safest to the cheapest policy of a family."""
SEARCHED = 48
"""Steps of the free family that are searched; the others lie between."""
FOLDS = 5
FEW_ROWS = 100
"""Below so many rows only the single threshold is tried: there is nothing to fit levels on."""
USUAL_SLOPE, TRUST = -0.8, 30.0
"""Log-odds of harm per log-odds of confidence: what is expected before rows are seen, and how firmly (ridge)."""
FIT_ROWS = 20_000
"""Rows that levels are fitted on when drawing a curve; more do not move it."""


class _Rows(NamedTuple):
    """What thresholds are searched on: K exits that decide, L = K + 1 exits where a row can stop.

    ``score_KN`` is well resolved where softmaxes saturate (log-odds), ``unit_KN`` is what the policy compares, both
    NaN where logits are not finite. ``right_LN`` ends with the exit where everything stops.
    """

    score_KN: Floats
    unit_KN: Floats
    right_LN: Bools
    full_N: Bools
    cost_L: Floats

    def take(self, index: Any) -> _Rows:
        return _Rows(
            self.score_KN[:, index], self.unit_KN[:, index], self.right_LN[:, index], self.full_N[index], self.cost_L
        )


RowsOf = dict[type[Confidence] | type[Margin], _Rows]


class _Family(NamedTuple):
    """Policies in one line: ``path(rows, grid)`` gives thresholds [P, K] on scores, safest first, never rising."""

    name: str
    kind: type[Confidence] | type[Margin]
    shared: bool
    grid: Callable[[_Rows], Floats]
    path: Callable[[_Rows, Floats], Floats]


def _one_grid(rows: _Rows) -> Floats:
    return _steps(rows.score_KN)


def _one_path(rows: _Rows, grid_P: Floats) -> Floats:
    return np.repeat(grid_P[:, None], len(rows.score_KN), 1)


def _levels_grid(rows: _Rows) -> Floats:
    level_K, slope_K = _safety(rows)
    return _steps(level_K[:, None] + slope_K[:, None] * rows.score_KN)


def _levels_path(rows: _Rows, grid_P: Floats) -> Floats:
    """Every exit stops where its own estimate of harm falls below one common bound: one shift over K levels."""
    level_K, slope_K = _safety(rows)
    threshold_PK: Floats = (grid_P[:, None] - level_K) / slope_K
    return threshold_PK


def _steps(score_KN: Floats) -> Floats:
    seen = score_KN[np.isfinite(score_KN)]
    inner = np.quantile(seen, np.linspace(1, 0, POINTS)) if len(seen) else np.empty(0)
    return np.concatenate([[math.inf], inner, [-math.inf]])


def _safety(rows: _Rows) -> tuple[Floats, Floats]:
    """Per exit: log-odds that stopping does no harm = level + slope * score. Harm: right in the end and wrong here.

    Logistic regressions by Newton's method, all exits at once; the slope is shrunk to ``USUAL_SLOPE``, the intercept
    by one half-harmful row at the mean score, so that exits that never did harm stay finite.
    """
    seen_KN = np.isfinite(rows.score_KN)
    score_KN = np.where(seen_KN, rows.score_KN, 0.0)
    harm_KN = rows.right_LN[-1] & ~rows.right_LN[:-1]
    counts_K = seen_KN.sum(1)
    middle_K = score_KN.sum(1) / np.maximum(counts_K, 1)
    score_KN = np.concatenate([score_KN - middle_K[:, None], np.zeros((len(score_KN), 1))], 1)
    harm_KN = np.concatenate([harm_KN, np.full((len(score_KN), 1), 0.5)], 1)
    seen_KN = np.concatenate([seen_KN, np.ones((len(score_KN), 1), bool)], 1)
    slope_K = np.full(len(score_KN), USUAL_SLOPE)
    level_K = np.zeros(len(score_KN))
    for _ in range(50):
        odds_KN = np.clip(level_K[:, None] + slope_K[:, None] * score_KN, -50, 50)
        risk_KN = 1 / (1 + np.exp(-odds_KN))
        miss_KN, weight_KN = (harm_KN - risk_KN) * seen_KN, risk_KN * (1 - risk_KN) * seen_KN
        pull_K = (miss_KN * score_KN).sum(1) - TRUST * (slope_K - USUAL_SLOPE)
        h00, h01 = weight_KN.sum(1) + 1e-9, (weight_KN * score_KN).sum(1)
        h11 = (weight_KN * score_KN**2).sum(1) + TRUST
        det = h00 * h11 - h01**2
        level_step = (h11 * miss_KN.sum(1) - h01 * pull_K) / det
        slope_step = (h00 * pull_K - h01 * miss_KN.sum(1)) / det
        brake = np.maximum(1, np.maximum(np.abs(level_step) / 2, np.abs(slope_step) / 0.5))
        level_K, slope_K = level_K + level_step / brake, slope_K + slope_step / brake
        if max(np.abs(level_step).max(), np.abs(slope_step).max()) < 1e-6:
            break
    slope_K = np.maximum(-slope_K, 0.05)
    return -level_K - slope_K * middle_K, slope_K


def _free_grid(rows: _Rows) -> Floats:
    """Prices of one error in units of cost, high to low."""
    return np.geomspace(1000, 0.5, POINTS + 2)


def _free_path(rows: _Rows, price_P: Floats) -> Floats:
    """Every exit its own threshold, by exact sweeps over one exit at a time, price by price; then in finer steps."""
    exits = len(rows.score_KN)
    score_KN = np.where(np.isfinite(rows.score_KN), rows.score_KN, -math.inf)
    order_KN = np.argsort(-score_KN, 1, kind="stable")
    roof_K = score_KN.max(1) + 1
    now_K = roof_K.copy()
    found = []
    coarse_Q = np.linspace(1, len(price_P) - 2, SEARCHED).round().astype(np.int64)
    for price in price_P[coarse_Q]:
        loss_LN = rows.cost_L[:, None] + price * ~rows.right_LN
        for _ in range(4):
            before_K = now_K.copy()
            later_N = loss_LN[-1]
            for exit in reversed(range(exits)):
                arrives_N = ~(score_KN[:exit] >= now_K[:exit, None]).any(0)
                gain_N = np.where(arrives_N, loss_LN[exit] - later_N, 0.0)[order_KN[exit]]
                last = int(np.argmin(np.concatenate([[0.0], gain_N.cumsum()])))
                ranked_N = score_KN[exit][order_KN[exit]]
                now_K[exit] = ranked_N[last - 1] if last else roof_K[exit]
                later_N = np.where(score_KN[exit] >= now_K[exit], loss_LN[exit], later_N)
            if np.array_equal(before_K, now_K):
                break
        found.append(now_K.copy())
    found_QK = np.minimum.accumulate(np.stack(found), 0)
    path_PK = np.stack([np.interp(np.arange(len(price_P)), coarse_Q, found_Q) for found_Q in found_QK.T], 1)
    path_PK[0], path_PK[-1] = math.inf, -math.inf
    return path_PK


FAMILIES = (
    _Family("one shift over levels of confidence", Confidence, False, _levels_grid, _levels_path),
    _Family("one shift over levels of margin", Margin, False, _levels_grid, _levels_path),
    _Family("free confidence thresholds", Confidence, False, _free_grid, _free_path),
    _Family("one confidence threshold", Confidence, True, _one_grid, _one_path),
)
"""The first is the rule, the last is left when rows are few."""


def _leaving(threshold_PK: Floats, score_KN: Floats) -> Steps:
    """The first step of a path at which each row leaves at or before each deciding exit ([K, N]; P: at no step)."""
    first = [np.searchsorted(-t_P, -score_N) for t_P, score_N in zip(threshold_PK.T, score_KN, strict=True)]
    leaving_KN: Steps = np.minimum.accumulate(np.stack(first), 0)
    return leaving_KN


def _crossfit(family: _Family, rows: _Rows, grid_P: Floats) -> Steps:
    """``_leaving``, every row judged by thresholds that were fitted without it."""
    leaving_KN = np.empty(rows.score_KN.shape, np.int64)
    fold_N = np.random.default_rng(0).permutation(len(rows.full_N)) % FOLDS
    for fold in range(FOLDS):
        path_PK = family.path(rows.take(fold_N != fold), grid_P)
        leaving_KN[:, fold_N == fold] = _leaving(path_PK, rows.score_KN[:, fold_N == fold])
    return leaving_KN


def _total(value_LN: Floats, leaving_KN: Steps, steps: int) -> Floats:
    """Mean over rows, at every step of a path, of the value at the exit where the row stops."""
    total_P = np.full(steps, value_LN[-1].sum())
    for exit, leaving_N in enumerate(leaving_KN):
        change_N = value_LN[exit] - value_LN[exit + 1]
        total_P += np.bincount(leaving_N, change_N, minlength=steps + 1)[:steps].cumsum()
    mean_P: Floats = total_P / value_LN.shape[1]
    return mean_P


class _Curve(NamedTuple):
    """What a path of policies brings, as means over rows, and the step at which each row leaves."""

    leaving_KN: Steps
    cost_P: Floats
    accuracy_P: Floats
    harm_P: Floats


def _curve(leaving_KN: Steps, rows: _Rows, steps: int) -> _Curve:
    cost_LN = np.broadcast_to(rows.cost_L[:, None], rows.right_LN.shape)
    harm_LN = rows.full_N & ~rows.right_LN
    values = (cost_LN, rows.right_LN.astype(np.float64), harm_LN.astype(np.float64))
    return _Curve(leaving_KN, *(_total(value_LN, leaving_KN, steps) for value_LN in values))


def _right(curve: _Curve, step: int, rows: _Rows) -> Floats:
    """Whether each row's answer is right at one step of a path, as 0.0 and 1.0."""
    stop_N = (curve.leaving_KN > step).sum(0)  # leaving never rises along the exits
    return rows.right_LN[stop_N, np.arange(rows.right_LN.shape[1])].astype(np.float64)


class _Choice(NamedTuple):
    """A step of a family's path, and what it brought on rows that did not fit it."""

    family: _Family
    grid_P: Floats
    step: int
    curve: _Curve


def _choose(rows: RowsOf, reach: Callable[[_Curve], int | None]) -> _Choice | None:
    """The step that reaches the target, of the family that cross-validation prefers; None when none does.

    The low-dimensional levels are the rule. Another family takes over when, at the same mean cost, it is more accurate
    on held-out folds by over two standard errors of the paired difference: less is chance, and following it costs
    (measured: docs/calibration.md).
    """
    best: _Choice | None = None
    best_lead = 2.0
    first: _Choice | None = None
    for family in FAMILIES if len(rows[Confidence].full_N) >= FEW_ROWS else FAMILIES[-1:]:
        mine = rows[family.kind]
        grid_P = family.grid(mine)
        curve = _curve(_crossfit(family, mine, grid_P), mine, len(grid_P))
        step = reach(curve)
        if step is None:
            continue
        choice = _Choice(family, grid_P, step, curve)
        if first is None:
            first = best = choice
            continue
        same = int(np.argmax(curve.cost_P <= first.curve.cost_P[first.step] + 1e-12))
        gain_N = _right(curve, same, mine) - _right(first.curve, first.step, mine)
        lead = gain_N.mean() / (gain_N.std() / math.sqrt(len(gain_N)) + 1e-12)
        if lead > best_lead:
            best, best_lead = choice, lead
    return best


def _within_drop(curve: _Curve, accuracy_full: float, max_accuracy_drop: float) -> int | None:
    """The last step whose drop, smoothed to never fall along the path, is within the aim."""
    drop_P = isotonic_regression(accuracy_full - curve.accuracy_P).x
    met = np.flatnonzero(drop_P <= max_accuracy_drop + 1e-12)
    return int(met[-1]) if len(met) else None


def _within_cost(curve: _Curve, max_mean_cost: float) -> int | None:
    """The most accurate step within the budget; of equals the cheapest."""
    met = np.flatnonzero(curve.cost_P <= max_mean_cost + 1e-12)
    if not len(met):
        return None
    best = curve.accuracy_P[met].max()
    return int(met[curve.accuracy_P[met] >= best - 1e-12][-1])


def _last_safe(harmed_P: Floats, samples: int, bound: float, confidence: float) -> int | None:
    """Fixed-sequence test along a path: the last step before the first whose harm could be above ``bound``.

    Clopper-Pearson: the exact upper limit of a binomial share. Source: Learn then Test, arXiv 2110.01052, section 3.
    """
    upper_P = np.where(harmed_P < samples, beta.ppf(confidence, harmed_P + 1, np.maximum(samples - harmed_P, 1e-9)), 1)
    failed = np.flatnonzero(upper_P > bound)
    last = int(failed[0]) - 1 if len(failed) else len(upper_P) - 1
    return last if last >= 0 else None
