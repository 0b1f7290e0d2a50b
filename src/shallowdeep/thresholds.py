"""Which family's path, and which of its steps: chosen on rows that did not fit the path.

It refuses to know why one asks: a target is a function of what the steps of a path bring.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from shallowdeep.families import FEW_ROWS, Family, families_for, fit_ensemble
from shallowdeep.paths import Brings, Floats, Path, Rows, Steps, answering, brings_of
from shallowdeep.progress import steps

FOLDS = 5


class _Fold(NamedTuple):
    """Rows to fit on and rows to judge by (``held`` of all), as an ensemble sees them that was fitted on the first."""

    fit_on: Rows
    judge_by: Rows
    held: Steps


def _folds(rows: Rows, *, ensembles: bool, first: int | None = None) -> list[_Fold]:
    """Every row is judged once by what was fitted without it."""
    fold_N = np.random.default_rng(0).permutation(len(rows.full_N)) % FOLDS
    found = []
    for fold in range(FOLDS):
        fit_on, held = rows.take(fold_N != fold), np.flatnonzero(fold_N == fold)
        ensemble = fit_ensemble(fit_on, first) if ensembles else None
        found.append(_Fold(answering(fit_on, ensemble), answering(rows.take(held), ensemble), held))
    return found


def _crossfit(family: Family, folds: Sequence[_Fold], grid_P: Floats) -> Steps:
    """When each row leaves ([K, N]), judged by paths that were fitted without it."""
    leaving_KN = np.empty((len(folds[0].fit_on.exits) - 1, sum(len(fold.held) for fold in folds)), np.int64)
    for fold in folds:
        leaving_KN[:, fold.held] = family.fit(fold.fit_on, grid_P).leaving(fold.judge_by)
    return leaving_KN


def _judged(folds: Sequence[_Fold], rows: Rows) -> Rows:
    """``rows`` with the answers that the folds give."""
    right_LN = rows.right_LN.copy()
    for fold in folds:
        right_LN[:, fold.held] = fold.judge_by.right_LN
    return rows._replace(right_LN=right_LN)


class Choice(NamedTuple):
    """A step of the path that a family fitted on all rows, and what its steps brought to rows that did not fit them."""

    family: str
    path: Path
    step: int
    brings: Brings

    def right(self, step: int, rows: Rows) -> Floats:
        """Whether each row's answer is right at ``step``, as 0.0 and 1.0."""
        stop_N = (self.brings.leaving_KN > step).sum(0)  # how many deciding exits are passed
        right_N: Floats = rows.right_LN[stop_N, np.arange(len(stop_N))].astype(np.float64)
        return right_N


class Fit(NamedTuple):
    """A family's path fitted on all rows, and what its steps brought to rows that did not fit them.

    ``judged`` are the rows with the answers they were given then; ``evidence``: see ``Family``.
    """

    family: str
    path: Path
    brings: Brings
    judged: Rows
    evidence: float


def fits(
    rows: Rows, *, families: Sequence[Family] | None = None, ensembles: bool = True, first: int | None = None
) -> tuple[Fit, ...]:
    """What every family worth trying finds on ``rows``, the rule first.

    Where held-out answers at the ends are more often right by an ensemble with earlier exits, all families have it.
    ``families`` (None: ``families_for(rows)``) and ``ensembles`` restrict the search. With ``first`` exits answer by
    ensembles from that one on, be it better or not.
    """
    if len(rows.right_LN) == 1 or not len(rows.full_N):
        return ()
    folds, judged, ensemble = _folds(rows, ensembles=False), rows, None
    if ensembles and len(rows.full_N) >= FEW_ROWS:
        mixed = _folds(rows, ensembles=True, first=first)
        mixed_judged = _judged(mixed, rows)
        if first is not None or mixed_judged.right_LN[rows.full :].sum() > rows.right_LN[rows.full :].sum():
            folds, judged, ensemble = mixed, mixed_judged, fit_ensemble(rows, first)
    seen, found = answering(rows, ensemble), []
    asked = families_for(rows) if families is None else families
    for family in steps(asked, "search thresholds", len(asked)):
        path = family.fit(seen, None)
        brings = brings_of(_crossfit(family, folds, path.grid_P), judged, path.steps)
        path = dataclasses.replace(path, ensemble=ensemble)
        found.append(Fit(family.name, path, brings, judged, family.evidence))
    return tuple(found)


def choose(rows: Rows, reach: Callable[[Brings], int | None], fitted: Sequence[Fit] | None = None) -> Choice | None:
    """The step that reaches the target, of the family that cross-validation prefers; None when no family has one.

    ``fitted`` are the ``fits`` of these rows, where they are known already. The first family is the rule. Another takes
    over when it is more accurate on held-out folds, at the same mean cost, by over two standard errors of the paired
    difference: less is chance, and to follow chance costs more than it brings (measured: docs/calibration.md).
    """
    rule: Choice | None = None
    best: Choice | None = None
    best_lead = -math.inf
    for family, path, brings, judged, evidence in fits(rows) if fitted is None else fitted:
        step = reach(brings)
        if step is None:
            continue
        choice = Choice(family, path, step, brings)
        if rule is None:
            rule = best = choice
            continue
        as_dear = int(np.argmax(brings.cost_P <= rule.brings.cost_P[rule.step] + 1e-12))
        gain_N = choice.right(as_dear, judged) - rule.right(rule.step, judged)
        lead = gain_N.mean() * math.sqrt(len(gain_N)) / max(float(gain_N.std()), 1e-12)
        if lead >= evidence and lead > best_lead:
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
