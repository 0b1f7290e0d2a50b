"""Which family's path, and which of its steps: chosen on rows that did not fit the path.

It refuses to know why one asks: a target is a function of what the steps of a path bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from shallowdeep.families import FAMILIES, Family
from shallowdeep.paths import Brings, Floats, Path, Rows, Steps, brings_of

FOLDS = 5
FEW_ROWS = 100
"""With fewer rows only the single threshold is tried: there is nothing to fit more on."""


def _crossfit(family: Family, rows: Rows, grid_P: Floats) -> Steps:
    """When each row leaves ([K, N]), judged by paths that were fitted without it."""
    leaving_KN = np.empty((len(rows.right_LN) - 1, len(rows.full_N)), np.int64)
    fold_N = np.random.default_rng(0).permutation(len(rows.full_N)) % FOLDS
    for fold in range(FOLDS):
        path = family.fit(rows.take(fold_N != fold), grid_P)
        leaving_KN[:, fold_N == fold] = path.leaving(rows.take(fold_N == fold))
    return leaving_KN


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
    """A family's path fitted on all rows, and what its steps brought to rows that did not fit them."""

    family: str
    path: Path
    brings: Brings


def fits(rows: Rows) -> tuple[Fit, ...]:
    """What every family worth trying finds on ``rows``."""
    if len(rows.right_LN) == 1 or not len(rows.full_N):
        return ()
    found = []
    for family in FAMILIES[-1:] if len(rows.full_N) < FEW_ROWS else FAMILIES:
        path = family.fit(rows, None)
        found.append(Fit(family.name, path, brings_of(_crossfit(family, rows, path.grid_P), rows, path.steps)))
    return tuple(found)


def choose(rows: Rows, reach: Callable[[Brings], int | None], fitted: Sequence[Fit] | None = None) -> Choice | None:
    """The step that reaches the target, of the family that cross-validation prefers; None when no family has one.

    ``fitted`` are the ``fits`` of these rows, where they are known already.

    The levels are the rule. Another family takes over when it is more accurate on held-out folds, at the same mean
    cost, by over two standard errors of the paired difference: less is chance, and to follow chance costs more than it
    brings (measured: docs/calibration.md).
    """
    rule: Choice | None = None
    best: Choice | None = None
    best_lead = 2.0
    for family, path, brings in fits(rows) if fitted is None else fitted:
        step = reach(brings)
        if step is None:
            continue
        choice = Choice(family, path, step, brings)
        if rule is None:
            rule = best = choice
            continue
        as_dear = int(np.argmax(brings.cost_P <= rule.brings.cost_P[rule.step] + 1e-12))
        gain_N = choice.right(as_dear, rows) - rule.right(rule.step, rows)
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
