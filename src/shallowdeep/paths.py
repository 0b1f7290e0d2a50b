"""What lies between the safest and the cheapest policy: rows to search on, paths of steps, and what these bring.

It refuses to know how a path was found: its steps let ever more rows leave, and every step is a policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shallowdeep.effects import answers
from shallowdeep.policies import Confidence, Margin, Policy
from shallowdeep.types import Trace
from shallowdeep.walking import CHUNK_ELEMENTS, policy_costs

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Steps = NDArray[np.int64]
Kind = type[Confidence] | type[Margin]


class Scores(NamedTuple):
    """What a policy compares, ``unit_KN``, and the same order well resolved where softmaxes saturate, ``score_KN``
    (log-odds); both NaN where logits are not finite.
    """

    score_KN: Floats
    unit_KN: Floats


class Rows(NamedTuple):
    """What paths are fitted on and judged by: K exits that decide, L = K + 1 exits where a row can stop.

    ``right_LN`` ends with the exit where everything stops, ``full_N`` says who is right at the full exit.
    """

    scores: Mapping[Kind, Scores]
    right_LN: Bools
    full_N: Bools
    cost_L: Floats

    def take(self, index: Any) -> Rows:
        """The rows ``index``: positions, a slice or a mask."""
        scores = {kind: Scores(*(part[:, index] for part in mine)) for kind, mine in self.scores.items()}
        return Rows(scores, self.right_LN[:, index], self.full_N[index], self.cost_L)


def read_rows(trace: Trace, asked: Sequence[bool]) -> Rows:
    """The rows of ``trace`` when the exits ``asked`` are; all but the last of them decide."""
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
    scores: dict[Kind, Scores] = {Confidence: Scores(odds_KN, top_KN), Margin: Scores(lead_odds_KN, lead_KN)}
    return Rows(scores, right_EN[exits], right_EN[trace.full_exit], cost_E[exits])


@dataclass(frozen=True, kw_only=True)
class Path:
    """Policies in one line, from the one that lets nobody leave early to the cheapest: P steps.

    A row stops where ``unit(rows)`` [K, N] reaches ``bar_PK``, which never rises along the path and lies midway between
    scores that were seen; ``make(bar_K, asked, num_exits)`` is the policy that says so. ``grid_P`` marks the steps
    on a scale of the family: a path fitted on other rows at the same marks has the same steps.
    """

    grid_P: Floats
    bar_PK: Floats
    unit: Callable[[Rows], Floats]
    make: Callable[[Floats, Sequence[bool], int], Policy]

    @property
    def steps(self) -> int:
        """P."""
        return len(self.bar_PK)

    def leaving(self, rows: Rows) -> Steps:
        """The first step at which each row leaves at or before each deciding exit ([K, N]; P: at no step)."""
        return leaving_steps(self.bar_PK, self.unit(rows))

    def policy(self, step: int, asked: Sequence[bool], num_exits: int) -> Policy:
        """The policy of ``step`` for a network of ``num_exits`` exits of which ``asked`` are asked."""
        return self.make(self.bar_PK[step], asked, num_exits)


def leaving_steps(path_PK: Floats, score_KN: Floats) -> Steps:
    """The first step at which each row has a score over the bar of any deciding exit so far ([K, N]; P: at no step)."""
    first = [np.searchsorted(-path_P, -score_N) for path_P, score_N in zip(path_PK.T, score_KN, strict=True)]
    leaving_KN: Steps = np.minimum.accumulate(np.stack(first), 0)
    return leaving_KN


class Brings(NamedTuple):
    """What the steps of a path bring, as means over rows; and the step at which each row leaves."""

    leaving_KN: Steps
    cost_P: Floats
    accuracy_P: Floats
    harm_P: Floats


def along(leaving_KN: Steps, value_LN: Floats, steps: int) -> Floats:
    """The sum over rows of ``value_LN`` where each row stops, at every step of a path ([P])."""
    total_P = np.full(steps, value_LN[-1].sum(), np.float64)
    for exit, leaving_N in enumerate(leaving_KN):
        change_N = value_LN[exit] - value_LN[exit + 1]
        total_P += np.bincount(leaving_N, change_N, minlength=steps + 1)[:steps].cumsum()
    return total_P


def brings_of(leaving_KN: Steps, rows: Rows, steps: int) -> Brings:
    cost_LN = np.broadcast_to(rows.cost_L[:, None], rows.right_LN.shape)
    harm_LN = (rows.full_N & ~rows.right_LN).astype(np.float64)
    values = (cost_LN, rows.right_LN.astype(np.float64), harm_LN)
    return Brings(leaving_KN, *(along(leaving_KN, value_LN, steps) / len(rows.full_N) for value_LN in values))


def in_units(path_PK: Floats, scores: Scores, shared: bool) -> Floats:
    """The same thresholds as the policy compares them, midway between neighbouring scores that were seen."""
    if shared:
        units_P = _midway(path_PK[:, 0], scores.score_KN.ravel(), scores.unit_KN.ravel())
        return np.repeat(units_P[:, None], path_PK.shape[1], 1)
    return np.stack([_midway(*column) for column in zip(path_PK.T, scores.score_KN, scores.unit_KN, strict=True)], 1)


def _midway(threshold_P: Floats, score_N: Floats, unit_N: Floats) -> Floats:
    order = np.argsort(score_N)[: int(np.isfinite(score_N).sum())]
    unit_N = unit_N[order]
    if not len(unit_N):
        return np.where(np.isinf(threshold_P), threshold_P, math.inf)
    middle_N = (unit_N[:-1] + unit_N[1:]) / 2
    apart_N = (unit_N[:-1] < middle_N) & (middle_N < unit_N[1:])  # saturated scores have no middle: the next that has
    below = unit_N[0] / 2 if unit_N[0] > 0 else -1.0
    cut_N = np.concatenate([[below], np.where(apart_N, middle_N, math.inf), [math.inf]])
    cut_N = np.minimum.accumulate(cut_N[::-1])[::-1]
    units_P: Floats = cut_N[np.searchsorted(score_N[order], threshold_P)]
    return units_P
