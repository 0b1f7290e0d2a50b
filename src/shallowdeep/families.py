"""Families of policies: each fits few numbers on rows and gives a path from the safest policy to the cheapest.

It refuses to know targets and who wins: thresholds searched freely flatter themselves, so others judge paths on rows
that did not fit them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from shallowdeep.paths import Bools, Floats, Kind, Path, Rows, Scores, Steps, in_units
from shallowdeep.policies import LEAST, Confidence, Ensemble, Margin, Policy, Score, finite_rows

POINTS = 400
"""Steps of a family's path between the policy that lets nobody leave early and the one that lets everybody."""
SEARCHED = 48
"""Steps of the free family that are searched; the others lie between."""
FIT_ROWS = 20_000
"""Levels are fitted on so many rows at most; more do not move them."""
USUAL_SLOPE, TRUST = -0.8, 30.0
"""Log-odds of harm per log-odds of confidence: what is expected before seeing rows, and how firmly (ridge)."""
SPARED = 1.0
"""Log-odds of harm by which stopping at the full exit is favoured where a second look lies behind it: going on costs a
whole pass there, about e times as much as at other exits.
"""
DOUBT = 100.0
"""How firmly other exits' weights in an ensemble are held at 0: in rows (a Gaussian prior of variance 1 / DOUBT)."""
ENSEMBLE_ROWS, ENSEMBLE_ELEMENTS = 2500, 1 << 24
"""Rows, and numbers (128 MB), that an ensemble is fitted on at most."""


class Family(NamedTuple):
    """A way to make paths: ``fit(rows, grid_P)``, at the steps marked by ``grid_P`` (None: at marks of its own).

    ``evidence`` is how many standard errors better than the rule it must be to take over.
    """

    name: str
    fit: Callable[[Rows, Floats | None], Path]
    evidence: float = 2.0


def marks(score_KN: Floats) -> Floats:
    """A scale of scores as they were seen, from the one that nobody reaches to the one that everybody does [P]."""
    seen = score_KN[np.isfinite(score_KN)]
    inner = np.quantile(seen, np.linspace(1, 0, POINTS)) if len(seen) else np.empty(0)
    return np.concatenate([[math.inf], inner, [-math.inf]])


def _thresholds(kind: Kind, grid_P: Floats, path_PK: Floats, rows: Rows, *, shared: bool = False) -> Path:
    """Thresholds [P, K] on scores as a path of policies of ``kind``; ``shared``: one number for all exits."""

    def make(bar_K: Floats, asked: Sequence[bool], num_exits: int) -> Policy:
        enabled_E = enabled(asked)
        if shared:
            return kind(threshold=float(bar_K[0]), enabled_E=enabled_E)
        return kind(threshold=_per_exit(bar_K, asked, num_exits), enabled_E=enabled_E)

    bar_PK = in_units(path_PK, rows.scores[kind], shared)
    return Path(grid_P=grid_P, bar_PK=bar_PK, unit=lambda others: others.scores[kind].unit_KN, make=make)


def enabled(asked: Sequence[bool]) -> tuple[bool, ...] | None:
    """``enabled_E`` of policies that ask these exits."""
    return None if all(asked) else tuple(asked)


def _per_exit(bar_K: Floats, asked: Sequence[bool], num_exits: int) -> tuple[float, ...]:
    """Thresholds of all exits but the last: those of the deciding exits, and infinite where nobody is asked."""
    threshold = [math.inf] * (num_exits - 1)
    for bar, exit in zip(bar_K, [exit for exit, on in enumerate(asked) if on][:-1], strict=True):
        threshold[exit] = float(bar)
    return tuple(threshold)


def _one(rows: Rows, grid_P: Floats | None) -> Path:
    score_KN = rows.scores[Confidence].score_KN
    grid_P = marks(score_KN) if grid_P is None else grid_P
    return _thresholds(Confidence, grid_P, np.repeat(grid_P[:, None], len(score_KN), 1), rows, shared=True)


def _levels(kind: Kind, rows: Rows, grid_P: Floats | None, bonus: float = 0.0) -> Path:
    """Every exit stops where the odds that stopping does harm fall below one bound: one shift over K levels.

    ``bonus`` (log-odds) favours stopping at the full exit.
    """
    score_KN = rows.scores[kind].score_KN
    level_K, slope_K = _safety(score_KN, rows.right_LN)
    level_K[rows.full : rows.full + 1] += bonus
    grid_P = marks(level_K[:, None] + slope_K[:, None] * score_KN) if grid_P is None else grid_P
    return _thresholds(kind, grid_P, (grid_P[:, None] - level_K) / slope_K, rows)


def _learned(rows: Rows, grid_P: Floats | None) -> Path:
    """One threshold on the log-odds that stopping does no harm, from confidence, margin, entropy, agreement and exit.

    scikit-learn's logistic regression of all exits together: one level per exit, and weights that they share.
    """
    said_FKN = _features(rows)
    seen_KN = np.isfinite(said_FKN).all(0)
    harm_KN = rows.right_LN[-1] & ~rows.right_LN[:-1]
    exit_K, row_K = np.nonzero(seen_KN)
    few = slice(None, None, max(1, len(row_K) // (FIT_ROWS * len(harm_KN))))
    exit_K, row_K = exit_K[few], row_K[few]
    found_SF, harm_S = said_FKN[:, exit_K, row_K].T, harm_KN[exit_K, row_K]
    weight_F, level_K = np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(len(harm_KN))
    if harm_S.any() and not harm_S.all():
        middle_F, spread_F = found_SF.mean(0), found_SF.std(0) + 1e-9
        given = np.concatenate([(found_SF - middle_F) / spread_F, np.eye(len(harm_KN))[exit_K]], 1)
        coefficient = LogisticRegression(fit_intercept=False, max_iter=300).fit(given, ~harm_S).coef_[0]
        weight_F, level_K = coefficient[:4] / spread_F, coefficient[4:]
        level_K = level_K - weight_F @ middle_F
    score_KN = _weighed(weight_F, said_FKN)
    grid_P = marks(level_K[:, None] + score_KN) if grid_P is None else grid_P
    bar_PK = in_units(grid_P[:, None] - level_K, Scores(score_KN, score_KN), False)
    confidence, margin, entropy, agreement = weight_F.tolist()
    learned = Score(threshold=0.0, confidence=confidence, margin=margin, entropy=entropy, agreement=agreement)

    def make(bar_K: Floats, asked: Sequence[bool], num_exits: int) -> Policy:
        threshold = _per_exit(bar_K, asked, num_exits)
        return dataclasses.replace(learned, threshold=threshold, enabled_E=enabled(asked))

    return Path(grid_P=grid_P, bar_PK=bar_PK, unit=lambda others: _weighed(weight_F, _features(others)), make=make)


def _features(rows: Rows) -> Floats:
    """What ``Score`` weighs, [F, K, N]; NaN or, at the full exit, infinite where logits are not finite."""
    found_FKN = np.empty((4, len(rows.exits) - 1, len(rows.index_N)))
    for chunk, logits, labels_B in rows.chunks(len(rows.exits) - 1):
        state = Score(threshold=0.0).init(len(labels_B), None, labels_B.device)
        softmax = [torch.softmax(logits_BC, 1, dtype=torch.float64) for logits_BC in logits]
        for place, logits_BC in enumerate(logits):
            said, exit = (logits_BC, softmax[place]), rows.exits[place]
            if rows.ensemble is not None and rows.ensemble.weight_EE[exit]:
                said = rows.ensemble.answer(exit, rows.exits[: place + 1], softmax[: place + 1], logits_BC)
            state, features = Score.features(state, *said)
            lost = math.inf if place == rows.full else math.nan
            found_FKN[:, place, chunk] = torch.stack(features).masked_fill(~finite_rows(logits_BC), lost).numpy()
    return found_FKN


def _weighed(weight_F: Floats, said_FKN: Floats) -> Floats:
    lost_KN = np.isinf(said_FKN[0])
    said_FKN = np.where(lost_KN, 0.0, said_FKN)
    total_KN = sum(weight * said_KN for weight, said_KN in zip(weight_F, said_FKN, strict=True))
    return np.where(lost_KN, math.inf, total_KN)


def without_second_look(family: Family, evidence: float) -> Family:
    """The same family where everything stops at the full exit, and what lies behind it is not asked."""

    def fit(rows: Rows, grid_P: Floats | None) -> Path:
        path = family.fit(rows.until_full(), grid_P)
        behind = len(rows.exits) - 1 - rows.full

        def unit(others: Rows) -> Floats:
            unit_KN: Floats = np.pad(path.unit(others.until_full()), ((0, behind), (0, 0)), constant_values=math.inf)
            return unit_KN

        def make(bar_K: Floats, asked: Sequence[bool], num_exits: int) -> Policy:
            full = rows.exits[rows.full]
            return path.make(bar_K[: rows.full], [on and exit <= full for exit, on in enumerate(asked)], num_exits)

        bar_PK = np.pad(path.bar_PK, ((0, 0), (0, behind)), constant_values=-math.inf)
        return Path(grid_P=path.grid_P, bar_PK=bar_PK, unit=unit, make=make)

    return Family(f"{family.name}, no second look", fit, evidence)


def fit_ensemble(rows: Rows, first: int | None = None) -> Ensemble:
    """Weights of earlier exits in the answers from the exit at ``first`` on (None: the full exit), by likelihood.

    The exit's own weight is 1 up to a common scale (a temperature), the others are shrunk towards 0 by ``DOUBT``. With
    many rows the least sure ones are fitted on: others do not change their answer.
    """
    weight_EE: list[tuple[float, ...]] = [()] * len(rows.logits_ENC)
    for place in range(rows.full if first is None else first, len(rows.exits)):
        if place:
            weight_E = np.zeros(rows.exits[place] + 1)
            weight_E[list(rows.exits[: place + 1])] = _weights(rows, place)
            weight_EE[rows.exits[place]] = tuple(weight_E.tolist())
    return Ensemble(weight_EE=tuple(weight_EE))


def _weights(rows: Rows, place: int) -> Floats:
    most = min(ENSEMBLE_ROWS, ENSEMBLE_ELEMENTS // ((place + 1) * rows.logits_ENC.shape[2]))
    if len(rows.index_N) > most:
        sure_N = np.nan_to_num(rows.scores[Confidence].score_KN[:place].max(0), nan=math.inf)
        rows = rows.take(np.argsort(sure_N, kind="stable")[:most])
    parts = [
        (torch.stack([torch.log_softmax(one, 1, dtype=torch.float64) for one in logits], 2), labels_B)
        for _, logits, labels_B in rows.chunks(place + 1)
    ]
    said_NCL = torch.cat([said for said, _ in parts]).clamp_min(math.log(LEAST)).numpy()
    labels_N = torch.cat([labels for _, labels in parts]).numpy()
    good_N = np.isfinite(said_NCL).all((1, 2))
    said_NCL, labels_N = said_NCL[good_N], labels_N[good_N]
    if not len(labels_N):
        return np.concatenate([np.zeros(place), [1.0]])
    count = np.arange(len(labels_N))

    def loss(given: Floats) -> tuple[float, Floats]:
        scale, other_K = given[0], given[1:]
        total_NC = said_NCL[..., -1] + said_NCL[..., :-1] @ other_K
        log_NC = log_softmax(scale * total_NC, axis=1)
        miss_NC = np.exp(log_NC)
        miss_NC[count, labels_N] -= 1
        pull = np.concatenate(
            [[(miss_NC * total_NC).sum()], scale * np.einsum("nc,nck->k", miss_NC, said_NCL[..., :-1])]
        )
        doubt = DOUBT * np.concatenate([[0.0], other_K])
        return float(DOUBT / 2 * other_K @ other_K - log_NC[count, labels_N].sum()), pull + doubt

    found = minimize(
        loss, np.eye(place + 1)[0], jac=True, method="L-BFGS-B", bounds=[(0.05, 20.0)] + [(-2, 2)] * place
    ).x
    weight_L: Floats = found[0] * np.concatenate([found[1:], [1.0]])
    return weight_L


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
    Family("learned score", _learned),
    Family("free confidence thresholds", _free),
    Family("one confidence threshold", _one),
)
"""The first is the rule, the last what is left when rows are few."""
FEW_ROWS = 100
"""With fewer rows only the single threshold is tried: there is nothing to fit more on."""
SECOND_LOOK = Family("one shift over levels of confidence, second look", partial(_levels, Confidence, bonus=SPARED))
"""The rule where a second look lies behind the full exit."""


def families_for(rows: Rows) -> tuple[Family, ...]:
    """What is searched on these rows, the rule first: a second look stays only where it is better than none."""
    if len(rows.full_N) < FEW_ROWS:
        return FAMILIES[-1:]
    if rows.full == len(rows.exits) - 1:
        return FAMILIES
    if rows.full == 0:
        return (SECOND_LOOK,)  # nobody can stop earlier
    alone = [without_second_look(family, 2.0 * bool(place)) for place, family in enumerate(FAMILIES)]
    return (SECOND_LOOK, *alone)
