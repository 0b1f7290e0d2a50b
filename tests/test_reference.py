"""The reference counts what a slow loop counts, its limits allow for its number of rows, and misfits are named."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import oracle
from shallowdeep.disagreement import fit_confusion
from shallowdeep.policies import Confidence, Fixed, Policy
from shallowdeep.reference import CLIP, SeenRows, refer, seen_in
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

POLICY = Confidence(threshold=0.8, enabled_E=(True, False, True, True))


def bed(rows: int = 400, **other: int) -> Trace:
    return oracle.bed(rows, exits=4, classes=5, **other)


@pytest.mark.parametrize("scaled", [False, True])
def test_columns_are_the_slow_ones(scaled: bool) -> None:
    trace = bed(60)
    if scaled:
        trace = dataclasses.replace(trace, confusion_reference=fit_confusion(None, bed(50, seed=4)))
    known = refer(POLICY, trace)
    walked = oracle.walk(POLICY, trace)
    x_NK = known.columns(seen_in(simulate(POLICY, trace)))
    cost = [trace.cost_E[e].item() for e in (0, 2, 3)]
    for n in range(60):
        confusion = walked["confusion"][n]
        unit = (min(max(confusion, -CLIP), CLIP) + CLIP) / (2 * CLIP) if scaled else confusion / 6
        expected = [
            *(float(walked["exit"][n] == e) for e in (0, 2, 3)),
            0.0,
            (walked["cost"][n] - cost[0]) / (cost[-1] - cost[0]),
            walked["confidence"][n],
            unit,
        ]
        assert x_NK[n].tolist() == pytest.approx(expected, abs=1e-9)
    assert known.names_K == (
        "share of exit0", "share of exit2", "share of full", "share not finite", "cost", "confidence", "confusion",
    )  # fmt: skip


def test_limits_allow_for_the_rows() -> None:
    trace = bed(500)
    known, outcome = refer(POLICY, trace, alpha=0.08), simulate(POLICY, trace)
    hits = int((outcome.exit_N == 2).sum())
    exact = binomtest(hits, 500).proportion_ci(1 - 0.02 / 7, method="exact")
    assert (known.low_K[1], known.high_K[1]) == pytest.approx((exact.low, exact.high))
    assert known.high_K[3] == pytest.approx(binomtest(0, 500).proportion_ci(1 - 0.02 / 7, method="exact").high)
    low, high = known.limits_K2[4]
    assert low < float(outcome.cost_N.mean()) < high
    assert np.diff(known.limits_K2[4]) > np.diff(refer(POLICY, bed(2000), alpha=0.08).limits_K2[4])
    wide = refer(POLICY, trace, alpha=0.08, slack=0.1)
    assert wide.low_K[1] == pytest.approx(max(known.low_K[1] - 0.1, 0))
    assert wide.high_K[1] == pytest.approx(known.high_K[1] + 0.1)


def test_what_is_tolerated() -> None:
    trace = bed(500)
    outcome, full_N = simulate(POLICY, trace), trace.logits_ENC[-1].argmax(1)
    differ = int((outcome.labels_N != full_N).sum())
    known = refer(POLICY, trace, alpha=0.08, max_accuracy_drop=0.02)
    upper = binomtest(differ, 500).proportion_ci(1 - 0.02, method="exact").high
    assert known.max_disagreement == pytest.approx(upper + 0.02)
    lost = int((full_N == trace.labels_N).sum() - (outcome.labels_N == trace.labels_N).sum())
    assert known.harm_ratio == pytest.approx(lost / differ)
    assert refer(POLICY, trace, max_disagreement=0.5).max_disagreement == 0.5
    assert refer(Fixed(exit=3), trace).harm_ratio == 0.0, "who never differs does no harm"


def test_rows_that_are_no_numbers_are_unsure_and_confused() -> None:
    known = refer(POLICY, bed())
    seen = SeenRows(
        exit_B=torch.tensor([0, 3, 3]),
        confidence_B=torch.tensor([0.9, math.nan, 0.7]),
        confusion_B=torch.tensor([0.0, math.nan, 1.0]),
        valid_B=torch.tensor([True, False, False]),
    )
    assert known.columns(seen)[:, 3:].tolist() == [[0, 0, pytest.approx(0.9), 0], [1, 1, 0, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize("policy", [Fixed(exit=0), Confidence(threshold=0.9), Confidence(threshold=(9.0, 9.0, 0.1))])
def test_exits_that_nobody_uses(policy: Policy) -> None:
    known = refer(policy, bed())
    assert all(
        0 <= low < 1 and 0 < high <= 1 and low <= high for low, high in zip(known.low_K, known.high_K, strict=True)
    )


def test_one_exit() -> None:
    trace = Trace(logits_ENC=torch.randn(1, 40, 3), labels_N=torch.zeros(40, dtype=torch.int64), cost_E=torch.ones(1))
    known = refer(Confidence(threshold=0.5), trace)
    assert known.names_K[0] == "share of full"
    assert known.high_K[0] == 1
    assert np.isfinite(known.limits_K2).all()


def test_misfits_are_named() -> None:
    known = refer(POLICY, bed())
    seen = seen_in(simulate(Confidence(threshold=0.8), bed()))
    with pytest.raises(ValueError, match=r"stop at exits \[1\]; the reference policy asks \[0, 2, 3\]"):
        known.columns(seen)
    with pytest.raises(ValueError, match=r"asked \(True, False, True, True\)"):
        known.check((True, True, True, True), False)
    with pytest.raises(ValueError, match="standardised in these answers and raw in the reference"):
        known.check(known.asked, True)
    for wrong in (
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"max_accuracy_drop": 1.0},
        {"slack": -0.1},
        {"max_disagreement": 0.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))}|between 0 and 1"):
            refer(POLICY, bed(), **wrong)
