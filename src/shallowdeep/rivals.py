"""Families that others have proposed and ``calibrate`` does not search, because they lost: compared all the same.

It refuses to know by how much they lose; that is measured anew, on every trace.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import expit

from shallowdeep.families import Family, enabled, marks, without_second_look
from shallowdeep.paths import Floats, Path, Rows, Scores, Steps, in_units
from shallowdeep.policies import Accumulated, Confidence, PerClass, Policy, Score, finite_rows

BONUS = 0.5
"""Log-odds that an exit is worth which repeats the label before it: the best of those tried."""
SHRUNK = 50
"""Rows of average harm that are added to those of every class."""


def rivals_for(rows: Rows) -> tuple[Family, ...]:
    """Confidence with a bonus for agreement, BEEM's accumulated confidence, and levels of classes."""
    found = (
        Family("agreement bonus .5", _scored(Score(threshold=0.0, agreement=BONUS))),
        Family("accumulated confidence (BEEM)", _scored(Accumulated(threshold=0.0))),
        Family("levels of classes", _classes),
    )
    if rows.full == len(rows.exits) - 1:
        return found
    return tuple(without_second_look(family, family.evidence) for family in found if rows.full)


def _on_one_line(
    rows: Rows, grid_P: Floats | None, unit: Callable[[Rows], Floats], make: Callable[[float], Policy]
) -> Path:
    """One threshold on ``unit(rows)`` [K, N]; ``make`` is told the threshold."""
    unit_KN = unit(rows)
    grid_P = marks(unit_KN) if grid_P is None else grid_P
    bar_PK = in_units(np.repeat(grid_P[:, None], len(unit_KN), 1), Scores(unit_KN, unit_KN), True)

    def made(bar_K: Floats, asked: Sequence[bool], num_exits: int) -> Policy:
        policy: Policy = dataclasses.replace(make(float(bar_K[0])), enabled_E=enabled(asked))  # type: ignore[type-var]
        return policy

    return Path(grid_P=grid_P, bar_PK=bar_PK, unit=unit, make=made)


def _scored(policy: Score | Accumulated) -> Callable[[Rows, Floats | None], Path]:
    """One threshold on what ``policy`` scores."""

    def unit(rows: Rows) -> Floats:
        found_KN = np.empty((len(rows.exits) - 1, len(rows.index_N)))
        for chunk, logits, labels_B in rows.chunks(len(found_KN)):
            state = policy.init(len(labels_B), None, labels_B.device)
            for place, logits_BC in enumerate(logits):
                softmax_BC = torch.softmax(logits_BC, 1, dtype=torch.float64)
                state, score_B = policy.score(state, rows.exits[place], logits_BC, softmax_BC)
                found_KN[place, chunk] = score_B.masked_fill(~finite_rows(logits_BC), math.nan).numpy()
        return found_KN

    def fit(rows: Rows, grid_P: Floats | None) -> Path:
        return _on_one_line(rows, grid_P, unit, lambda bar: dataclasses.replace(policy, threshold=bar))

    return fit


def _classes(rows: Rows, grid_P: Floats | None) -> Path:
    """One shift over levels of classes: how harmful it was, at any exit, to stop at a row said to be of each."""
    classes = rows.logits_ENC.shape[2]
    harm_KN, label_KN = rows.right_LN[-1] & ~rows.right_LN[:-1], _said(rows)
    usual = (harm_KN.sum() + 1) / (harm_KN.size + 2)
    harmed_C = np.bincount(label_KN[harm_KN], minlength=classes)
    level_C = -np.log((harmed_C / usual + SHRUNK) / (np.bincount(label_KN.ravel(), minlength=classes) + SHRUNK))

    def unit(others: Rows) -> Floats:
        unit_KN: Floats = others.scores[Confidence].score_KN + level_C[_said(others)]
        return unit_KN

    def make(bar: float) -> Policy:
        bar_C = np.full(classes, bar) if math.isinf(bar) else expit(bar - level_C)
        return PerClass(threshold_C=tuple(bar_C.tolist()))

    return _on_one_line(rows, grid_P, unit, make)


def _said(rows: Rows) -> Steps:
    """The label that each deciding exit gives each row [K, N]."""
    index_N = torch.from_numpy(rows.index_N)
    return np.stack([rows.logits_ENC[exit, index_N].argmax(1).numpy() for exit in rows.exits[:-1]])
