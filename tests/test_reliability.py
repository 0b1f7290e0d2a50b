"""Reliability equals its definitions and scikit-learn; temperatures are the likeliest, and change no answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

import oracle
from shallowdeep import reliability
from shallowdeep.disagreement import fit_confusion
from shallowdeep.reliability import BINS, crossfit_scaled, fit_temperatures, reliability_of, scaled, temper
from shallowdeep.types import Trace


def one_exit(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> Trace:
    return Trace(logits_ENC=logits_NC[None], labels_N=labels_N, cost_E=torch.ones(1))


def slow_reliability(trace: Trace, exit: int) -> dict[str, float | list[float]]:
    """Row by row, from the definitions."""
    rows: list[tuple[float, bool]] = []
    brier = nll = 0.0
    for n in range(trace.num_samples):
        logits = trace.logits_ENC[exit, n].double().tolist()
        if not oracle.finite(logits):
            continue
        p, truth = oracle.softmax(logits), int(trace.labels_N[n])
        rows.append((max(p), oracle.best(p) == truth))
        brier += sum((value - (c == truth)) ** 2 for c, value in enumerate(p))
        nll -= math.log(p[truth])
    ece = chance = 0.0
    counts = []
    for k in range(BINS):
        held = [(sure, right) for sure, right in rows if k / BINS < sure <= (k + 1) / BINS]
        counts.append(len(held))
        ece += abs(sum(right - sure for sure, right in held))
        chance += math.sqrt(sum(sure * (1 - sure) for sure, _ in held)) * math.sqrt(2 / math.pi)
    count = max(len(rows), 1)
    facts = {"ece_E": ece, "chance_ece_E": chance, "brier_E": brier, "nll_E": nll}
    return {name: value / count for name, value in facts.items()} | {"count_EK": counts, "rows_E": len(rows)}


@pytest.mark.parametrize(("classes", "broken"), [(2, 0.0), (3, 0.3), (10, 0.0)])
def test_reliability_is_the_slow_one(classes: int, broken: float) -> None:
    trace = oracle.random_trace(300, exits=3, classes=classes, seed=classes, broken=broken)
    trace = scaled(trace, [9.0, 5.0, 2.0])  # confidences everywhere, not all 1
    found = reliability_of(trace)
    for exit in range(3):
        for name, value in slow_reliability(trace, exit).items():
            assert getattr(found, name)[exit].tolist() == pytest.approx(value, abs=1e-9), name
    assert int(found.rows_E.min()) == (300 if not broken else int(found.count_EK.sum(1).min()))
    assert (found.rows_E < 300).all() == bool(broken)


def test_reliability_is_scikit_learns() -> None:
    trace = oracle.bed(2000)
    found = reliability_of(trace)
    for exit in range(trace.num_exits):
        p_NC = trace.logits_ENC[exit].double().softmax(1)
        sure_N, said_N = p_NC.max(1)
        right_N = said_N == trace.labels_N
        share, sure = calibration_curve(right_N.numpy(), sure_N.numpy(), n_bins=BINS)
        filled = found.count_EK[exit] > 0
        np.testing.assert_allclose(found.accuracy_EK[exit][filled], share)
        np.testing.assert_allclose(found.confidence_EK[exit][filled], sure)
        labels = trace.labels_N.numpy()
        brier = brier_score_loss(labels, p_NC.numpy(), labels=range(10), scale_by_half=False)
        assert float(found.brier_E[exit]) == pytest.approx(brier)
        assert float(found.nll_E[exit]) == pytest.approx(log_loss(labels, p_NC.numpy(), labels=range(10)))
    assert "by chance" in str(found)


def test_what_true_confidences_show_by_chance() -> None:
    """Labels drawn from the softmax itself: the ECE is what ``chance_ece_E`` says, on average."""
    p_NC = oracle.bed(1000, sharp=0.7).logits_ENC[2].double().softmax(1)
    draws = []
    for seed in range(60):
        labels_N = torch.multinomial(p_NC, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        draws.append(reliability_of(one_exit(p_NC.log(), labels_N)))
    mean = np.mean([float(found.ece_E[0]) for found in draws])
    assert mean == pytest.approx(float(draws[0].chance_ece_E[0]), rel=0.08)


def likelihood(trace: Trace, exit: int, temperature: float) -> float:
    """What ``fit_temperatures`` minimises, summed over rows: half a wrong row of average margin comes with them."""
    kept_N = torch.isfinite(trace.logits_ENC[exit]).all(1)
    logits_NC = trace.logits_ENC[exit, kept_N].double()
    top = logits_NC.topk(2).values
    margin = float((top[:, 0] - top[:, 1]).mean())
    labels_N = trace.labels_N[kept_N]
    seen = torch.nn.functional.cross_entropy(logits_NC / temperature, labels_N, reduction="sum")
    return float(seen) + 0.5 * float(np.logaddexp(0, margin / temperature))


@pytest.mark.parametrize("broken", [False, True])
def test_temperatures_are_the_likeliest(broken: bool) -> None:
    trace = oracle.bed(500, exits=4)
    if broken:
        trace.logits_ENC[1, ::7, 2] = math.nan
        trace.logits_ENC[2, ::5, 0] = -math.inf
    found = fit_temperatures(trace)
    for exit in range(4):
        search = minimize_scalar(lambda t, exit=exit: likelihood(trace, exit, math.exp(t)), bounds=(-4, 4))
        assert float(found[exit]) == pytest.approx(math.exp(search.x), rel=1e-3)
    assert len(set(found.tolist())) == 4


def test_a_temperature_put_in_is_found_again() -> None:
    """Labels drawn from the softmax, logits then multiplied."""
    p_NC = oracle.bed(20_000, sharp=0.7).logits_ENC[2].double().softmax(1)
    labels_N = torch.multinomial(p_NC, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    for factor in (0.2, 1.0, 7.0):
        assert float(fit_temperatures(one_exit(factor * p_NC.log(), labels_N))[0]) == pytest.approx(factor, rel=0.03)


def test_an_exit_that_is_never_wrong_is_not_sure_beyond_its_rows() -> None:
    """n right rows and half a wrong one: a confidence of about n / (n + 1/2), whatever the logits' scale."""
    for rows, scale in ((20, 1.0), (20, 50.0), (1000, 0.1)):
        labels_N = torch.arange(rows) % 2
        trace = one_exit(scale * torch.nn.functional.one_hot(labels_N, 2).double(), labels_N)
        sure = scaled(trace, fit_temperatures(trace)).logits_ENC.softmax(2).amax(2)
        assert float(sure.mean()) == pytest.approx(rows / (rows + 0.5), rel=1e-6)


def test_exits_that_tell_nothing() -> None:
    labels_N = torch.arange(40) % 2
    nothing = torch.zeros(40, 2).double()
    nan = torch.full((40, 2), math.nan).double()
    wrong = 1e4 * torch.nn.functional.one_hot(1 - labels_N, 2).double()
    tiny = 1e-9 * torch.nn.functional.one_hot(labels_N, 2).double()
    trace = Trace(logits_ENC=torch.stack([nothing, nan, wrong, tiny]), labels_N=labels_N, cost_E=torch.ones(4))
    assert fit_temperatures(trace).tolist() == [1.0, 1.0, reliability.HOTTEST, reliability.COLDEST]
    found = reliability_of(trace)
    assert found.rows_E.tolist() == [40, 0, 40, 40]
    assert math.isnan(found.ece_E[1])
    assert math.isnan(found.brier_E[1])
    assert found.brier_E[2] == 2
    assert "nan" in str(temper(trace))


def test_scaling_changes_no_answer_and_says_so() -> None:
    trace = oracle.bed(400)
    trace = Trace(
        logits_ENC=trace.logits_ENC,
        labels_N=trace.labels_N,
        cost_E=trace.cost_E,
        confusion_reference=fit_confusion(None, trace),
        info={"backend": "torch"},
    )
    found = scaled(trace, [1.0, 2.0, 0.5, 3.0, 4.0])
    assert torch.equal(found.logits_ENC.argmax(2), trace.logits_ENC.argmax(2))
    assert torch.equal(found.logits_ENC[3], trace.logits_ENC[3].double() / 3)
    assert found.info == {"backend": "torch", "temperature_E": "1 2 0.5 3 4"}
    assert found.confusion_reference is None
    assert trace.confusion_reference is not None
    for wrong in ([1.0], [1.0, 0.0, 1, 1, 1], [1.0, -1, 1, 1, 1], [math.nan, 1, 1, 1, 1], [math.inf, 1, 1, 1, 1]):
        with pytest.raises(ValueError, match="5 exits need as many temperatures above 0"):
            scaled(trace, wrong)


def test_rows_are_reported_by_temperatures_fitted_without_them() -> None:
    """One row that would draw its own temperature far: it is scaled as if it had never been seen."""
    labels_N = torch.zeros(50, dtype=torch.int64)
    logits_NC = torch.tensor([[4.0, 0.0]]).double().repeat(50, 1)
    logits_NC[:10] = logits_NC[:10].flip(1)
    trace = one_exit(logits_NC, labels_N)
    odd = one_exit(logits_NC.index_copy(0, torch.tensor([7]), torch.tensor([[0.0, 4000.0]]).double()), labels_N)
    ratio_N = odd.logits_ENC[0].amax(1) / crossfit_scaled(odd).logits_ENC[0].amax(1)
    alone = trace.logits_ENC[0].amax(1) / crossfit_scaled(trace).logits_ENC[0].amax(1)
    same_fold = ratio_N.isclose(ratio_N[7])
    assert int(same_fold.sum()) == 10
    torch.testing.assert_close(ratio_N[same_fold], alone[same_fold], rtol=1e-6, atol=0)
    assert bool((ratio_N[~same_fold] > 10 * alone[~same_fold]).all()), "the others have seen it"
    with pytest.raises(ValueError, match="5 folds, which takes 5 rows; here are 4"):
        crossfit_scaled(trace.rows(torch.arange(4)))


def test_temperatures_mend_confidence_that_exaggerates() -> None:
    found = temper(oracle.bed(3000, sharp=3.0))
    assert bool((found.temperature_E > 1.2).all())
    assert bool((found.after.ece_E < 0.6 * found.before.ece_E).all())
    assert bool((found.after.brier_E < found.before.brier_E).all())
    assert bool((found.after.nll_E < found.before.nll_E).all())
    assert torch.equal(found.after.mean_accuracy_E, found.before.mean_accuracy_E)
    assert len(str(found).splitlines()) == 2 + 5 + 1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = oracle.bed(300)
    whole, temperatures = reliability_of(trace), fit_temperatures(trace)
    monkeypatch.setattr(reliability, "CHUNK_ELEMENTS", 7 * 10)
    torch.testing.assert_close(reliability_of(trace).ece_E, whole.ece_E, rtol=0, atol=1e-12)
    torch.testing.assert_close(fit_temperatures(trace), temperatures, rtol=1e-8, atol=0)


def test_the_examples_run() -> None:
    oracle.run_examples(reliability, "reliability")
