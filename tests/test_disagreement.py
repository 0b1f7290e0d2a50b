"""Confusion equals its definition, moments those of numpy, AUROC that of scikit-learn."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import oracle
import shallowdeep.disagreement as disagreement
from shallowdeep.disagreement import confusion, error_finding, fit_confusion
from shallowdeep.policies import Confidence
from shallowdeep.types import ConfusionReference, Trace
from shallowdeep.walking import simulate


class Keeper:
    """All that ``fit_confusion`` knows of an SDN."""

    reference: ConfusionReference | None = None

    def set_confusion_reference(self, reference: ConfusionReference) -> None:
        self.reference = reference


def slow_confusion(trace: Trace, reference: ConfusionReference | None) -> list[float]:
    scores, end = [], trace.full_exit
    for n in range(trace.num_samples):
        p = [oracle.softmax(trace.logits_ENC[e, n].double().tolist()) for e in range(end + 1)]
        raw = sum(oracle.distance(q, p[end]) for q in p)
        scores.append(oracle.standardised(raw, reference, end, list(range(end + 1))))
    return scores


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 4), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_confusion_is_the_slow_sum(exits: int, classes: int, full: int, seed: int, scaled: bool, broken: bool) -> None:
    trace = oracle.random_trace(8, exits=exits, classes=classes, seed=seed, full_exit=full % exits, broken=0.3 * broken)
    reference = fit_confusion(None, oracle.random_trace(20, exits=exits, classes=classes, seed=3)) if scaled else None
    expected = slow_confusion(trace, reference)
    assert confusion(trace, reference).tolist() == pytest.approx(expected, abs=1e-9)
    carried = dataclasses.replace(trace, confusion_reference=reference)
    assert confusion(carried).tolist() == pytest.approx(expected, abs=1e-9)


def test_it_is_the_confusion_of_a_walk_that_nobody_leaves() -> None:
    trace = oracle.bed(300)
    trace = dataclasses.replace(trace, confusion_reference=fit_confusion(None, oracle.bed(200, seed=5)))
    walked = simulate(Confidence(threshold=math.inf), trace).confusion_N
    torch.testing.assert_close(confusion(trace), walked, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 10**6))
def test_moments_are_those_of_numpy(exits: int, rows: int, seed: int) -> None:
    trace = oracle.random_trace(rows, exits=exits, classes=3, seed=seed)
    keeper = Keeper()
    reference = fit_confusion(keeper, trace)
    mean, covariance = oracle.moments(trace)
    np.testing.assert_allclose(reference.mean_EE.numpy(), mean, atol=1e-12)
    np.testing.assert_allclose(reference.covariance_EEE.numpy(), covariance, atol=1e-12)
    assert keeper.reference is reference


def test_the_reference_rows_have_mean_0_and_deviation_1_at_every_exit() -> None:
    """And under any subset of exits asked: that is what the moments are kept per pair for."""
    trace = oracle.bed(400, exits=5)
    trace = dataclasses.replace(trace, confusion_reference=fit_confusion(None, trace))
    for stop in range(1, 5):
        policy = Confidence(
            threshold=tuple(0.0 if e == stop else math.inf for e in range(5)),
            enabled_E=tuple(e in (0, 2, stop) for e in range(5)),
        )
        scores = simulate(policy, trace).confusion_N
        assert float(scores.mean()) == pytest.approx(0, abs=1e-9)
        assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-9)


def test_the_first_exit_agrees_with_itself() -> None:
    trace = oracle.bed(50, exits=3)
    for reference in (None, fit_confusion(None, trace)):
        carried = dataclasses.replace(trace, confusion_reference=reference)
        assert simulate(Confidence(threshold=0.0), carried).confusion_N.tolist() == [0.0] * 50


def test_a_distance_that_never_varied_standardises_to_0() -> None:
    """Exactly: a variance of rounding errors would blow the first new row up."""
    always = torch.tensor([[[0.3, 0.0]], [[0.0, 0.1]]]).expand(2, 999, 2)
    same = Trace(logits_ENC=always, labels_N=torch.zeros(999, dtype=torch.int64), cost_E=torch.tensor([0.5, 1.0]))
    reference = fit_confusion(None, same)
    assert reference.covariance_EEE.abs().max() == 0
    other = Trace(logits_ENC=torch.eye(2)[:, None], labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.0]))
    assert confusion(other, reference).tolist() == [0.0]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = oracle.bed(100)
    whole, moments = confusion(trace), fit_confusion(None, trace)
    monkeypatch.setattr(disagreement, "CHUNK_ELEMENTS", 7 * 50)
    assert torch.equal(confusion(trace), whole)
    torch.testing.assert_close(fit_confusion(None, trace).covariance_EEE, moments.covariance_EEE, rtol=0, atol=1e-12)


def test_error_finding_is_scikit_learns() -> None:
    trace = oracle.bed(1000)
    found = error_finding(trace)
    wrong = (trace.logits_ENC[-1].argmax(1) != trace.labels_N).numpy()
    doubt = -trace.logits_ENC[-1].double().softmax(1).amax(1).numpy()
    assert found.errors == wrong.sum()
    assert found.msp_auroc == pytest.approx(roc_auc_score(wrong, doubt))
    assert found.confusion_auroc == pytest.approx(roc_auc_score(wrong, confusion(trace).numpy()))
    assert found.msp_auroc > 0.6
    assert "AUROC" in str(found)


def test_error_finding_without_errors_and_with_broken_rows() -> None:
    trace = Trace(logits_ENC=torch.eye(2)[None], labels_N=torch.tensor([0, 1]), cost_E=torch.ones(1))
    assert math.isnan(error_finding(trace).msp_auroc)
    broken = Trace(
        logits_ENC=torch.tensor([[[math.nan, 0], [1, 0]]]), labels_N=torch.tensor([0, 0]), cost_E=torch.ones(1)
    )
    assert error_finding(broken).msp_auroc == 1.0


def test_the_examples_run() -> None:
    oracle.run_examples(disagreement, "disagreement")
