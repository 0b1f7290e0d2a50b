"""How well a score finds what one looks for: errors, backdoored inputs, inputs from elsewhere.

It refuses to know where scores come from. Higher is more suspicious throughout; rows of equal score come in any order,
so that each counts as the mean of its group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shallowdeep.progress import steps

Floats = NDArray[np.float64]
DRAWS = 1000
"""Bootstrap draws of an interval."""
_CHUNK = 1 << 22  # counts of rows held at once while drawing: 16 MB


@dataclass(frozen=True, kw_only=True)
class ErrorScores:
    """How well one score finds errors, errors being the positives.

    ``fpr_at_95_tpr``: the share of right answers that are suspected when 95 % of the errors are. ``aurc``: the mean
    share of errors among the least suspicious rows, over all coverages (arXiv 1705.08500); lower is better.
    """

    auroc: float
    aupr: float
    fpr_at_95_tpr: float
    aurc: float


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskCoverage:
    """The share of errors (``risk_P``) among the least suspicious ``coverage_P`` of all rows (arXiv 1705.08500)."""

    coverage_P: Tensor
    risk_P: Tensor


@dataclass(frozen=True, kw_only=True)
class AurocDifference:
    """The AUROC of one score minus another's on the same rows, with a paired bootstrap interval (percentiles)."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.difference:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def error_auroc(score_N: Tensor, wrong_N: Tensor) -> float:
    """How well ``score_N`` finds errors: the chance that an error scores above a right answer, ties counting half.

    Exact (Mann-Whitney). nan when there is no error, or nothing but errors. Raises ``ValueError`` on a score that is
    not a number.
    >>> error_auroc(torch.tensor([0.1, 0.9, 0.9]), torch.tensor([False, True, False]))
    0.75
    """
    score, wrong = _given(score_N, wrong_N)
    return float(_auroc(score, wrong, np.ones((1, len(score)), np.int32))[0])


def error_scores(score_N: Tensor, wrong_N: Tensor) -> ErrorScores:
    """How well ``score_N`` (higher: more suspicious) finds the True of ``wrong_N``; all nan when all rows are alike.

    >>> error_scores(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([False, False, True])).fpr_at_95_tpr
    0.0
    """
    auroc = error_auroc(score_N, wrong_N)
    if np.isnan(auroc):
        return ErrorScores(auroc=auroc, aupr=auroc, fpr_at_95_tpr=auroc, aurc=auroc)
    score, wrong = _given(score_N, wrong_N)
    _, group_N, size_G = np.unique(-score, return_inverse=True, return_counts=True)  # the most suspicious first
    found_G = np.bincount(group_N, wrong)
    tpr_G, fpr_G = found_G.cumsum() / wrong.sum(), (size_G - found_G).cumsum() / (~wrong).sum()
    precision_G = found_G.cumsum() / size_G.cumsum()
    return ErrorScores(
        auroc=auroc,
        aupr=float((precision_G * found_G).sum() / wrong.sum()),
        fpr_at_95_tpr=float(fpr_G[tpr_G >= 0.95 - 1e-12][0]),
        aurc=float(risk_coverage(score_N, wrong_N).risk_P.mean()),
    )


def risk_coverage(score_N: Tensor, wrong_N: Tensor) -> RiskCoverage:
    """The share of errors among the least suspicious rows, at every coverage 1/N, 2/N, ... 1. Raises ``ValueError``.

    >>> risk_coverage(torch.tensor([0.9, 0.1]), torch.tensor([True, False])).risk_P.tolist()
    [0.0, 0.5]
    """
    score, wrong = _given(score_N, wrong_N)
    _, group_N, size_G = np.unique(score, return_inverse=True, return_counts=True)
    spread_N = (np.bincount(group_N, wrong) / size_G)[np.sort(group_N)]
    rows_P = np.arange(1, len(score) + 1)
    return RiskCoverage(
        coverage_P=torch.from_numpy(rows_P / len(score)), risk_P=torch.from_numpy(spread_N.cumsum() / rows_P)
    )


def auroc_differences(
    scores: Mapping[str, Tensor],
    rival: str,
    wrong_N: Tensor,
    *,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, AurocDifference]:
    """The AUROC of each of ``scores`` minus that of the one called ``rival``; intervals are of the *difference*.

    Paired bootstrap: rows are drawn with replacement, the same for all scores. Draws without errors, or of errors
    alone, are left out; all nan when the rows themselves are so. Raises ``ValueError`` on scores that are not numbers.
    >>> wrong_N = torch.arange(40) % 4 == 0
    >>> auroc_differences({"sees": wrong_N * 1.0, "blind": torch.zeros(40)}, "blind", wrong_N)["sees"].low
    0.5
    """
    given = {name: _given(score_N, wrong_N) for name, score_N in scores.items()}
    found: dict[str, list[Floats]] = {name: [] for name in scores}
    for count_RN in steps(_drawn(len(wrong_N), draws, seed), "resample rows"):
        for name, (score, wrong) in given.items():
            found[name].append(_auroc(score, wrong, count_RN))
    area_R = {name: np.concatenate(parts) for name, parts in found.items()}
    leads = {name: own_R - area_R[rival] for name, own_R in area_R.items()}
    return {name: _interval(float(lead_R[0]), lead_R[1:], confidence) for name, lead_R in leads.items()}


def _drawn(rows: int, draws: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """How often each row is there [R, N], some draws at a time: first the rows themselves, then with replacement."""
    yield np.ones((1, rows), np.int32)
    rng, at_once = np.random.default_rng(seed), max(1, _CHUNK // rows)
    for first in range(0, draws, at_once):
        drawn_RN = rng.integers(rows, size=(min(at_once, draws - first), rows))
        yield np.stack([np.bincount(drawn_N, minlength=rows) for drawn_N in drawn_RN]).astype(np.int32)


def _interval(difference: float, drawn_R: Floats, confidence: float) -> AurocDifference:
    drawn_R = drawn_R[~np.isnan(drawn_R)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn_R, [tail, 1 - tail]).tolist() if len(drawn_R) else (math.nan, math.nan)
    return AurocDifference(difference=difference, low=low, high=high)


def _given(score_N: Tensor, wrong_N: Tensor) -> tuple[Floats, NDArray[np.bool_]]:
    score, wrong = score_N.double().numpy(force=True), wrong_N.numpy(force=True).astype(bool)
    if np.isnan(score).any():
        raise ValueError(f"{int(np.isnan(score).sum())} of {len(score)} scores are not numbers.")
    return score, wrong


def _auroc(score_N: Floats, wrong_N: NDArray[np.bool_], count_RN: NDArray[np.int32]) -> Floats:
    """AUROC [R] when rows are there ``count_RN`` times: how many right answers each error outdoes, ties half."""
    right = np.flatnonzero(~wrong_N)
    right = right[np.argsort(score_N[right], kind="stable")]
    below_RM = np.zeros((len(count_RN), len(right) + 1), np.int32)
    np.cumsum(count_RN[:, right], axis=1, out=below_RM[:, 1:])
    low_W, high_W = (np.searchsorted(score_N[right], score_N[wrong_N], side) for side in ("left", "right"))
    errors_RW = count_RN[:, wrong_N].astype(np.float64)
    outdone_R = (errors_RW * (below_RM[:, low_W] + below_RM[:, high_W])).sum(1) / 2
    with np.errstate(invalid="ignore"):
        area_R: Floats = outdone_R / (errors_RW.sum(1) * below_RM[:, -1])
    return area_R
