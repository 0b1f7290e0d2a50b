"""Paths of thresholds from the safest to the cheapest policy, and which path and step to take.

It refuses to know why one asks: a target is a function of what the steps of a path bring. Few numbers are fitted, and
paths are compared on rows that did not fit them, because thresholds searched freely flatter themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import beta

from shallowdeep.effects import answers
from shallowdeep.policies import Confidence, Margin
from shallowdeep.types import Trace
from shallowdeep.walking import CHUNK_ELEMENTS, policy_costs

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Steps = NDArray[np.int64]

POINTS = 400
"""Steps of a family's path between the policy that lets nobody leave early and the one that lets everybody."""
SEARCHED = 48
"""Steps of the free family that are searched; the others lie between."""
FOLDS = 5
FEW_ROWS = 100
"""With fewer rows only the single threshold is tried: there is nothing to fit more on."""
FIT_ROWS = 20_000
"""Levels are fitted on so many rows at most; more do not move them."""
USUAL_SLOPE, TRUST = -0.8, 30.0
"""Log-odds of harm per log-odds of confidence: what is expected before seeing rows, and how firmly (ridge)."""


class Rows(NamedTuple):
    """What thresholds are searched on: K exits that decide, L = K + 1 exits where a row can stop.

    ``unit_KN`` is what the policy compares, ``score_KN`` the same order well resolved where softmaxes saturate
    (log-odds); both NaN where logits are not finite. ``right_LN`` ends with the exit where everything stops.
    """

    score_KN: Floats
    unit_KN: Floats
    right_LN: Bools
    full_N: Bools
    cost_L: Floats

    def take(self, index: Any) -> Rows:
        by_exit = (self.score_KN[:, index], self.unit_KN[:, index], self.right_LN[:, index])
        return Rows(*by_exit, self.full_N[index], self.cost_L)


Kind = type[Confidence] | type[Margin]
RowsOf = dict[Kind, Rows]


def read_rows(trace: Trace, asked: Sequence[bool]) -> RowsOf:
    """Scores of every exit asked but the last, for the policies that a family can be made of."""
    exits = [exit for exit, on in enumerate(asked) if on]
    said_EN = answers(trace)
    right_EN = (said_EN == trace.labels_N).numpy()
    cost_E = policy_costs(trace, asked).numpy()
    size = max(1, CHUNK_ELEMENTS // trace.num_classes)
    scores_4KN = np.empty((4, len(exits) - 1, trace.num_samples))
    for k, exit in enumerate(exits[:-1]):
        for start in range(0, trace.num_samples, size):
            softmax_BC = torch.softmax(trace.logits_ENC[exit, start : start + size].detach(), 1, dtype=torch.float64)
            top_B, label_B = softmax_BC.max(1)
            softmax_BC.scatter_(1, label_B[:, None], 0.0)
            rest_B, second_B = softmax_BC.sum(1).clamp_min(1e-300), softmax_BC.amax(1)
            odds_B, lead_B = (top_B / rest_B).log(), top_B - second_B
            lead_odds_B = ((1 + lead_B) / (rest_B + second_B)).log()
            scores_4KN[:, k, start : start + size] = torch.stack([odds_B, top_B, lead_odds_B, lead_B]).numpy()
        scores_4KN[:, k, (said_EN[exit] < 0).numpy()] = math.nan
    odds_KN, top_KN, lead_odds_KN, lead_KN = scores_4KN
    rest = (right_EN[exits], right_EN[trace.full_exit], cost_E[exits])
    return {Confidence: Rows(odds_KN, top_KN, *rest), Margin: Rows(lead_odds_KN, lead_KN, *rest)}


class Family(NamedTuple):
    """Policies in one line: ``path(rows, grid)`` gives thresholds [P, K] on scores, from the safest, never rising."""

    name: str
    kind: Kind
    shared: bool
    grid: Callable[[Rows], Floats]
    path: Callable[[Rows, Floats], Floats]


def _steps(score_KN: Floats) -> Floats:
    seen = score_KN[np.isfinite(score_KN)]
    inner = np.quantile(seen, np.linspace(1, 0, POINTS)) if len(seen) else np.empty(0)
    return np.concatenate([[math.inf], inner, [-math.inf]])


def _one_grid(rows: Rows) -> Floats:
    return _steps(rows.score_KN)


def _one_path(rows: Rows, grid_P: Floats) -> Floats:
    return np.repeat(grid_P[:, None], len(rows.score_KN), 1)


def _levels_grid(rows: Rows) -> Floats:
    level_K, slope_K = _safety(rows)
    return _steps(level_K[:, None] + slope_K[:, None] * rows.score_KN)


def _levels_path(rows: Rows, grid_P: Floats) -> Floats:
    """Every exit stops where the odds that stopping does harm fall below one bound: one shift over K levels."""
    level_K, slope_K = _safety(rows)
    path_PK: Floats = (grid_P[:, None] - level_K) / slope_K
    return path_PK


def _safety(rows: Rows) -> tuple[Floats, Floats]:
    """Log-odds, per exit, that stopping does no harm = level + slope * score. Harm: right in the end, wrong here.

    Logistic regressions of all exits at once, by Newton's method. Slopes are shrunk to ``USUAL_SLOPE``; half a harmful
    row at the mean score keeps exits finite that never did harm.
    """
    rows = rows.take(slice(None, None, max(1, len(rows.full_N) // FIT_ROWS)))
    seen_KN = np.isfinite(rows.score_KN)
    score_KN = np.where(seen_KN, rows.score_KN, 0.0)
    middle_K = score_KN.sum(1) / np.maximum(seen_KN.sum(1), 1)
    harm_KN = rows.right_LN[-1] & ~rows.right_LN[:-1]
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


def _free_grid(rows: Rows) -> Floats:
    """Prices of one error in units of cost, from high to low."""
    return np.geomspace(1000, 0.5, POINTS + 2)


def _free_path(rows: Rows, price_P: Floats) -> Floats:
    """Every exit its own threshold: the best found price after price, each search starting from the last."""
    score_KN = np.where(np.isfinite(rows.score_KN), rows.score_KN, -math.inf)
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
    return path_PK


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
    Family("one shift over levels of confidence", Confidence, False, _levels_grid, _levels_path),
    Family("one shift over levels of margin", Margin, False, _levels_grid, _levels_path),
    Family("free confidence thresholds", Confidence, False, _free_grid, _free_path),
    Family("one confidence threshold", Confidence, True, _one_grid, _one_path),
)
"""The first is the rule, the last what is left when rows are few."""


def leaving_steps(path_PK: Floats, score_KN: Floats) -> Steps:
    """The first step of a path at which each row leaves at or before each deciding exit ([K, N]; P: at no step)."""
    first = [np.searchsorted(-path_P, -score_N) for path_P, score_N in zip(path_PK.T, score_KN, strict=True)]
    leaving_KN: Steps = np.minimum.accumulate(np.stack(first), 0)
    return leaving_KN


def _crossfit(family: Family, rows: Rows, grid_P: Floats) -> Steps:
    """``leaving_steps``, every row judged by thresholds that were fitted without it."""
    leaving_KN = np.empty(rows.score_KN.shape, np.int64)
    fold_N = np.random.default_rng(0).permutation(len(rows.full_N)) % FOLDS
    for fold in range(FOLDS):
        path_PK = family.path(rows.take(fold_N != fold), grid_P)
        leaving_KN[:, fold_N == fold] = leaving_steps(path_PK, rows.score_KN[:, fold_N == fold])
    return leaving_KN


class Brings(NamedTuple):
    """What the steps of a path bring, as means over rows; and the step at which each row leaves."""

    leaving_KN: Steps
    cost_P: Floats
    accuracy_P: Floats
    harm_P: Floats


def brings_of(leaving_KN: Steps, rows: Rows, steps: int) -> Brings:
    def mean(value_LN: Floats) -> Floats:
        total_P = np.full(steps, value_LN[-1].sum())
        for exit, leaving_N in enumerate(leaving_KN):
            change_N = value_LN[exit] - value_LN[exit + 1]
            total_P += np.bincount(leaving_N, change_N, minlength=steps + 1)[:steps].cumsum()
        mean_P: Floats = total_P / value_LN.shape[1]
        return mean_P

    cost_LN = np.broadcast_to(rows.cost_L[:, None], rows.right_LN.shape)
    harm_LN = (rows.full_N & ~rows.right_LN).astype(np.float64)
    return Brings(leaving_KN, mean(cost_LN), mean(rows.right_LN.astype(np.float64)), mean(harm_LN))


class Choice(NamedTuple):
    """A step of a family's path, and what it brought to rows that did not fit it."""

    family: Family
    grid_P: Floats
    step: int
    brings: Brings

    def right(self, step: int, rows: Rows) -> Floats:
        """Whether each row's answer is right at ``step``, as 0.0 and 1.0."""
        stop_N = (self.brings.leaving_KN > step).sum(0)  # how many deciding exits are passed
        right_N: Floats = rows.right_LN[stop_N, np.arange(len(stop_N))].astype(np.float64)
        return right_N


def choose(rows: RowsOf, reach: Callable[[Brings], int | None]) -> Choice | None:
    """The step that reaches the target, of the family that cross-validation prefers; None when no family has one.

    The levels are the rule. Another family takes over when it is more accurate on held-out folds, at the same mean
    cost, by over two standard errors of the paired difference: less is chance, and to follow chance costs more than it
    brings (measured: docs/calibration.md).
    """
    rule: Choice | None = None
    best: Choice | None = None
    best_lead = 2.0
    few = len(rows[Confidence].full_N) < FEW_ROWS
    for family in FAMILIES[-1:] if few else FAMILIES:
        mine = rows[family.kind]
        if not mine.score_KN.size:
            return None
        grid_P = family.grid(mine)
        brings = brings_of(_crossfit(family, mine, grid_P), mine, len(grid_P))
        step = reach(brings)
        if step is None:
            continue
        choice = Choice(family, grid_P, step, brings)
        if rule is None:
            rule = best = choice
            continue
        as_dear = int(np.argmax(brings.cost_P <= rule.brings.cost_P[rule.step] + 1e-12))
        gain_N = choice.right(as_dear, mine) - rule.right(rule.step, mine)
        lead = gain_N.mean() * math.sqrt(len(gain_N)) / max(float(gain_N.std()), 1e-12)
        if lead > best_lead:
            best, best_lead = choice, lead
    return best


def within_drop(brings: Brings, accuracy_full: float, max_accuracy_drop: float) -> int | None:
    """The last step whose drop, smoothed so that it never falls along the path, is within the aim.

    One error more than seen is counted, as conformal risk control does (arXiv 2208.02814): the step is picked for
    looking good, and without this the drop on fresh rows lies above the aim on average.
    """
    rows = brings.leaving_KN.shape[1]
    drop_P = isotonic_regression(accuracy_full - brings.accuracy_P).x
    met = np.flatnonzero((drop_P * rows + 1) / (rows + 1) <= max_accuracy_drop + 1e-12)
    return int(met[-1]) if len(met) else None


def within_cost(brings: Brings, max_mean_cost: float) -> int | None:
    """The most accurate step within the budget; of equals the cheapest."""
    met = np.flatnonzero(brings.cost_P <= max_mean_cost + 1e-12)
    if not len(met):
        return None
    accuracy_M = brings.accuracy_P[met]
    return int(met[accuracy_M >= accuracy_M.max() - 1e-12][-1])


def last_safe(harmed_P: Floats, rows: int | Floats, bound: float, confidence: float) -> int | None:
    """Fixed-sequence test along a path: the last step before the first whose harm, of ``rows`` rows, may exceed
    ``bound``.

    Clopper-Pearson's upper limit of a binomial share, exact. Source: Learn then Test, arXiv 2110.01052, section 3.
    """
    upper_P = np.where(harmed_P < rows, beta.ppf(confidence, harmed_P + 1, np.maximum(rows - harmed_P, 1)), 1.0)
    failed = np.flatnonzero(upper_P > bound)
    last = int(failed[0]) - 1 if len(failed) else len(upper_P) - 1
    return last if last >= 0 else None


def in_units(path_PK: Floats, rows: Rows, shared: bool) -> Floats:
    """The same thresholds as the policy compares them, midway between neighbouring scores that were seen."""
    if shared:
        units_P = _midway(path_PK[:, 0], rows.score_KN.ravel(), rows.unit_KN.ravel())
        return np.repeat(units_P[:, None], path_PK.shape[1], 1)
    return np.stack([_midway(*column) for column in zip(path_PK.T, rows.score_KN, rows.unit_KN, strict=True)], 1)


def _midway(threshold_P: Floats, score_N: Floats, unit_N: Floats) -> Floats:
    order = np.argsort(score_N)[: int(np.isfinite(score_N).sum())]
    unit_N = unit_N[order]
    if not len(unit_N):
        return np.full(len(threshold_P), math.inf)
    middle_N = (unit_N[:-1] + unit_N[1:]) / 2
    apart_N = (unit_N[:-1] < middle_N) & (middle_N < unit_N[1:])  # saturated scores have no middle: the next that has
    below = unit_N[0] / 2 if unit_N[0] > 0 else -1.0
    cut_N = np.concatenate([[below], np.where(apart_N, middle_N, math.inf), [math.inf]])
    cut_N = np.minimum.accumulate(cut_N[::-1])[::-1]
    units_P: Floats = cut_N[np.searchsorted(score_N[order], threshold_P)]
    return units_P
