"""What lies between the safest and the cheapest policy: rows to search on, paths of steps, and what these bring.

It refuses to know how a path was found: its steps let ever more rows leave, and every step is a policy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shallowdeep.effects import answers
from shallowdeep.policies import Confidence, Ensemble, Margin, Policy, finite_rows
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

    ``right_LN`` ends with the exit where everything stops, ``full_N`` says who is right at the full exit, which is at
    ``full`` among ``exits``; with a second look it decides, too. ``index_N`` are the rows' places in ``logits_ENC``.
    ``scores`` and ``right_LN`` are what policies with ``ensemble`` see and answer.
    """

    scores: Mapping[Kind, Scores]
    right_LN: Bools
    full_N: Bools
    cost_L: Floats
    exits: tuple[int, ...]
    full: int
    logits_ENC: Tensor
    labels_N: Tensor
    index_N: Steps
    ensemble: Ensemble | None = None

    def take(self, index: Any) -> Rows:
        """The rows ``index``: positions, a slice or a mask."""
        scores = {kind: Scores(*(part[:, index] for part in mine)) for kind, mine in self.scores.items()}
        right_LN, full_N, index_N = self.right_LN[:, index], self.full_N[index], self.index_N[index]
        return self._replace(scores=scores, right_LN=right_LN, full_N=full_N, index_N=index_N)

    def until_full(self) -> Rows:
        """The same rows without a second look: everything stops at the full exit."""
        end = self.full + 1
        scores = {kind: Scores(*(part[: self.full] for part in mine)) for kind, mine in self.scores.items()}
        right_LN, cost_L, exits = self.right_LN[:end], self.cost_L[:end], self.exits[:end]
        return self._replace(scores=scores, right_LN=right_LN, cost_L=cost_L, exits=exits)

    def chunks(self, exits: int) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
        """Slices of the rows, what the first ``exits`` of ``exits`` say about them (logits [B, C] each), and labels."""
        size = max(1, CHUNK_ELEMENTS // (exits * self.logits_ENC.shape[2]))
        for start in range(0, len(self.index_N), size):
            rows = slice(start, start + size)
            index_B = torch.from_numpy(self.index_N[rows])
            yield rows, [self.logits_ENC[e, index_B].detach() for e in self.exits[:exits]], self.labels_N[index_B]


def read_rows(trace: Trace, asked: Sequence[bool]) -> Rows:
    """The rows of ``trace`` when the exits ``asked`` are; all but the last of them decide."""
    exits = tuple(exit for exit, on in enumerate(asked) if on)
    right_EN = (answers(trace) == trace.labels_N).numpy()
    cost_E = policy_costs(trace, asked).numpy()
    empty = np.empty((len(exits) - 1, trace.num_samples))
    rows = Rows(
        scores={kind: Scores(empty.copy(), empty.copy()) for kind in (Confidence, Margin)},
        right_LN=right_EN[list(exits)],
        full_N=right_EN[trace.full_exit],
        cost_L=cost_E[list(exits)],
        exits=exits,
        full=exits.index(trace.full_exit),
        logits_ENC=trace.logits_ENC,
        labels_N=trace.labels_N,
        index_N=np.arange(trace.num_samples),
    )
    for chunk, logits, _ in rows.chunks(len(exits)):
        for place, logits_BC in enumerate(logits[:-1]):
            _note(rows, place, chunk, logits_BC, torch.softmax(logits_BC, 1, dtype=torch.float64))
    return rows


def _note(rows: Rows, place: int, chunk: slice, logits_BC: Tensor, softmax_BC: Tensor) -> None:
    """Write the scores of what is said at a deciding exit. Logits that are not finite stop nobody before the full exit,
    and let nobody pass it.
    """
    top_B, label_B = softmax_BC.max(1)
    others_BC = softmax_BC.scatter(1, label_B[:, None], 0.0)
    rest_B, second_B = others_BC.sum(1).clamp_min(1e-300), others_BC.amax(1)
    lead_B = top_B - second_B
    lead_odds_B = ((1 + lead_B) / (rest_B + second_B)).log()
    lost = math.inf if place == rows.full else math.nan
    finite_B = finite_rows(logits_BC)
    said: dict[Kind, tuple[Tensor, Tensor]] = {
        Confidence: ((top_B / rest_B).log(), top_B),
        Margin: (lead_odds_B, lead_B),
    }
    for kind, mine in said.items():
        for part_KN, value_B in zip(rows.scores[kind], mine, strict=True):
            part_KN[place, chunk] = torch.where(finite_B, value_B, lost).numpy()


def answering(rows: Rows, ensemble: Ensemble | None) -> Rows:
    """The rows as policies with ``ensemble`` see and answer them."""
    if ensemble is None:
        return rows
    rows = rows._replace(
        scores={kind: Scores(*(part.copy() for part in mine)) for kind, mine in rows.scores.items()},
        right_LN=rows.right_LN.copy(),
        ensemble=ensemble,
    )
    places = [place for place, exit in enumerate(rows.exits) if ensemble.weight_EE[exit]]
    for chunk, logits, labels_B in rows.chunks(max(places, default=0) + 1):
        softmax = [torch.softmax(logits_BC, 1, dtype=torch.float64) for logits_BC in logits]
        for place in places:
            asked, own_BC = rows.exits[: place + 1], logits[place]
            logits_BC, softmax_BC = ensemble.answer(rows.exits[place], asked, softmax[: place + 1], own_BC)
            right_B = (logits_BC.argmax(1) == labels_B) & finite_rows(logits_BC)
            rows.right_LN[place, chunk] = right_B.numpy()
            if place + 1 < len(rows.exits):
                _note(rows, place, chunk, own_BC, softmax_BC)
    return rows


@dataclass(frozen=True, kw_only=True)
class Path:
    """Policies in one line, from the one that lets nobody leave early to the cheapest: P steps.

    A row stops where ``unit(rows)`` [K, N] reaches ``bar_PK``, which never rises along the path and lies midway between
    scores that were seen; ``make(bar_K, asked, num_exits)`` is the policy that says so. ``grid_P`` marks the steps
    on a scale of the family: a path fitted on other rows at the same marks has the same steps. With an ``ensemble``
    its policies see and answer ``seen(rows)``.
    """

    grid_P: Floats
    bar_PK: Floats
    unit: Callable[[Rows], Floats]
    make: Callable[[Floats, Sequence[bool], int], Policy]
    ensemble: Ensemble | None = None

    @property
    def steps(self) -> int:
        """P."""
        return len(self.bar_PK)

    def seen(self, rows: Rows) -> Rows:
        """The rows with what the path's policies compare and answer: ``right_LN`` speaks of their answers."""
        return answering(rows, self.ensemble)

    def leaving(self, rows: Rows) -> Steps:
        """The first step at which each row leaves at or before each deciding exit ([K, N]; P: at no step)."""
        return leaving_steps(self.bar_PK, self.unit(self.seen(rows)))

    def policy(self, step: int, asked: Sequence[bool], num_exits: int) -> Policy:
        """The policy of ``step`` for a network of ``num_exits`` exits of which ``asked`` are asked."""
        made: Any = self.make(self.bar_PK[step], asked, num_exits)
        policy: Policy = made if self.ensemble is None else dataclasses.replace(made, ensemble=self.ensemble)
        return policy


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
    below = unit_N[0] / 2 if unit_N[0] > 0 else unit_N[0] - 1.0
    cut_N = np.concatenate([[below], np.where(apart_N, middle_N, math.inf), [math.inf]])
    cut_N = np.minimum.accumulate(cut_N[::-1])[::-1]
    units_P: Floats = cut_N[np.searchsorted(score_N[order], threshold_P)]
    return units_P
