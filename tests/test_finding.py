"""Scores of scores equal scikit-learn's and slow loops; intervals of a difference hold what they should."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import oracle
from shallowdeep import finding
from shallowdeep.finding import auroc_differences, error_auroc, error_scores, risk_coverage

ROWS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


def tensors(rows: list[tuple[int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([s for s, _ in rows]).double(), torch.tensor([w for _, w in rows])


def slow_risks(rows: list[tuple[int, bool]]) -> list[float]:
    """Errors among the k least suspicious rows, equal scores shared out evenly."""
    risks = []
    for k in range(1, len(rows) + 1):
        left, seen = k, 0.0
        for value in sorted({s for s, _ in rows}):
            group = [w for s, w in rows if s == value]
            taken = min(left, len(group))
            seen, left = seen + taken * sum(group) / len(group), left - taken
        risks.append(seen / k)
    return risks


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, math.inf]), st.booleans()), min_size=1))
def test_auroc_is_the_share_of_pairs(rows: list[tuple[float, bool]]) -> None:
    score, wrong = [s for s, _ in rows], [w for _, w in rows]
    got = error_auroc(torch.tensor(score, dtype=torch.float64), torch.tensor(wrong))
    assert got == pytest.approx(oracle.auroc(score, wrong), nan_ok=True)


def test_scores_that_are_no_numbers_are_refused() -> None:
    for score in (error_auroc, error_scores, risk_coverage):
        with pytest.raises(ValueError, match="1 of 2 scores are not numbers"):
            score(torch.tensor([math.nan, 0.0]), torch.tensor([True, False]))  # type: ignore[operator]


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_error_scores_are_scikit_learns_and_the_slow_ones(rows: list[tuple[int, bool]]) -> None:
    score, wrong = tensors(rows)
    found = error_scores(score, wrong)
    if wrong.all() or not wrong.any():
        assert all(map(math.isnan, vars(found).values()))
        return
    assert found.auroc == pytest.approx(roc_auc_score(wrong, score))
    assert found.aupr == pytest.approx(average_precision_score(wrong, score))
    fpr, tpr, _ = roc_curve(wrong, score, drop_intermediate=False)
    assert found.fpr_at_95_tpr == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0])
    assert found.aurc == pytest.approx(np.mean(slow_risks(rows)))


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_risk_coverage_is_the_slow_one(rows: list[tuple[int, bool]]) -> None:
    curve = risk_coverage(*tensors(rows))
    assert curve.risk_P.tolist() == pytest.approx(slow_risks(rows))
    assert curve.coverage_P.tolist() == pytest.approx([k / len(rows) for k in range(1, len(rows) + 1)])


def slow_draws(scores: list[torch.Tensor], wrong: torch.Tensor, draws: int) -> list[float]:
    """AUROC differences of rows drawn in pairs, each by scikit-learn."""
    rng, found = np.random.default_rng(0), []
    for row in rng.integers(len(wrong), size=(draws, len(wrong))):
        a, b = (roc_auc_score(wrong[row], score[row]) for score in scores)
        found.append(float(a - b))
    return found


def test_intervals_are_the_slow_ones_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    wrong = torch.from_numpy(rng.random(200) < 0.3)
    scores = [wrong + torch.from_numpy(rng.normal(size=200).round(1)) * scale for scale in (1.0, 2.0)]
    expected = np.quantile(slow_draws(scores, wrong, 60), [0.025, 0.975])
    for chunk in (1 << 22, 7 * 200):
        monkeypatch.setattr(finding, "_CHUNK", chunk)
        found = auroc_differences({"a": scores[0], "b": scores[1]}, "b", wrong, draws=60)
        assert [found["a"].low, found["a"].high] == pytest.approx(expected.tolist())
        assert found["a"].difference == pytest.approx(error_auroc(scores[0], wrong) - error_auroc(scores[1], wrong))
        assert found["b"].low == found["b"].high == 0.0


def test_a_paired_interval_is_narrower_than_two_single_ones() -> None:
    rng = np.random.default_rng(2)
    wrong = torch.from_numpy(rng.random(500) < 0.2)
    one = wrong + torch.from_numpy(rng.normal(size=500))
    other = one + 0.1 * torch.from_numpy(rng.normal(size=500))
    blind = torch.zeros(500)
    found = auroc_differences({"one": one, "other": other, "blind": blind}, "one", wrong, draws=200)
    single = auroc_differences({"one": one, "blind": blind}, "blind", wrong, draws=200)["one"]
    assert found["other"].high - found["other"].low < 0.5 * (single.high - single.low)
    assert "(" in str(single)


@pytest.mark.parametrize("wrong", [[False, False], [True, True]])
def test_nothing_to_find_or_nothing_else(wrong: list[bool]) -> None:
    found = auroc_differences({"a": torch.tensor([0.0, 1.0])}, "a", torch.tensor(wrong), draws=5)["a"]
    assert all(map(math.isnan, vars(found).values()))


def test_the_examples_run() -> None:
    assert doctest.testmod(finding).failed == 0
