"""The bound on errors among kept answers: its rows are apart, its counts exact, its violations as rare as it says."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

import oracle
from shallowdeep import abstention
from shallowdeep.abstention import Judged, calibrate_alarm, last_passing
from shallowdeep.alarming import fit_alarm, wrong_answers
from shallowdeep.policies import CalibrationRecord, Confidence
from shallowdeep.reliability import scaled
from shallowdeep.spelling import rule_to_json
from shallowdeep.trajectory import Alarm
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

POLICY = Confidence(threshold=0.97)


def true_error(trace: Trace, alarm: object) -> tuple[float, float]:
    """Share of kept answers, and of wrong ones among them."""
    outcome = simulate(POLICY, trace, alarm)  # type: ignore[arg-type]
    kept = alarm.keeps(outcome.alarm_N)  # type: ignore[attr-defined]
    return float(kept.double().mean()), float(wrong_answers(outcome, trace)[kept].double().mean())


def test_it_keeps_many_answers_and_few_errors() -> None:
    trace, other = oracle.bed(6000, seed=1), oracle.bed(6000, seed=2)
    everything = simulate(POLICY, other)
    assert float(wrong_answers(everything, other).double().mean()) > 0.04
    alarm = calibrate_alarm(trace, POLICY, max_error=0.02)
    coverage, error = true_error(other, alarm)
    assert coverage > 0.4
    assert error < 0.02
    assert alarm.fitted_on is not None
    info = alarm.fitted_on.info
    assert info["coverage"] == pytest.approx(coverage, abs=0.05)
    assert "With probability at least 0.95" in info["note"]
    assert "at most 2.00% of the answers that the alarm keeps are wrong" in info["note"]
    # By the definition of the exact limit: were 2 % wrong, so few wrong ones would be rarer than 5 %.
    assert binom.cdf(info["wrong_rows"], info["kept_rows"], 0.02) <= 0.05
    looser = calibrate_alarm(trace, POLICY, max_error=0.03)
    assert true_error(other, looser)[0] > coverage


def test_a_bound_above_all_errors_keeps_everything_that_is_a_number() -> None:
    trace = oracle.bed(3000)
    alarm = calibrate_alarm(trace, POLICY, max_error=0.6)
    assert true_error(trace, alarm)[0] == 1.0
    assert not alarm.keeps(torch.tensor([1.0], dtype=torch.float64)).item()


def test_parts_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, parts = oracle.bed(1000), list[set[int]]()
    real_fit, real_judged = abstention.fit_alarm, abstention.judged

    def seen(some: Trace) -> None:
        assert some.hash_N is not None
        parts.append(set(some.hash_N.tolist()))

    monkeypatch.setattr(abstention, "fit_alarm", lambda some, policy: (seen(some), real_fit(some, policy))[1])
    monkeypatch.setattr(
        abstention, "judged", lambda some, policy, alarm: (seen(some), real_judged(some, policy, alarm))[1]
    )
    calibrate_alarm(trace, POLICY, max_error=0.1)
    assert [len(part) for part in parts] == [300, 200, 500]
    assert len(set.union(*parts)) == 1000
    parts.clear()
    alarm = fit_alarm(oracle.bed(500, seed=9), POLICY)
    calibrate_alarm(trace, POLICY, max_error=0.1, alarm=alarm)
    assert [len(part) for part in parts] == [300, 700]
    assert len(set.union(*parts)) == 1000


@pytest.mark.parametrize("max_error", [0.005, 0.01, 0.02])
def test_it_is_violated_as_rarely_as_it_says(max_error: float) -> None:
    """Rows drawn with replacement from 5,000, which are the population: the share of errors kept is known."""
    population = oracle.bed(5000, seed=3, exits=3)
    alarm = fit_alarm(oracle.bed(1000, seed=4, exits=3), POLICY)
    judged = abstention.judged(population, POLICY, alarm)
    rng, violated, given, draws = np.random.default_rng(0), 0, 0, 1000
    for _ in range(draws):
        choose, test = (Judged(*(x[np.sort(rng.integers(5000, size=n))] for x in judged)) for n in (300, 700))
        found = last_passing(choose, test, max_error, 0.8)
        given += found.passed
        kept = int(np.searchsorted(judged.alarm_N, found.threshold, side="right"))
        violated += found.passed and judged.wrong_N[:kept].mean() > max_error
    assert given > draws / 3, "a bound that is never given checks nothing"
    assert draws * 0.01 < violated <= binom.ppf(0.999, draws, 0.2)


def test_too_few_rows_get_a_sentence_and_keep_nothing() -> None:
    with pytest.warns(UserWarning, match="at least 299 kept answers without any error among .* 100 here"):
        alarm = calibrate_alarm(oracle.bed(200), POLICY, max_error=0.01)
    assert alarm.keeps(torch.tensor([0.0, 0.5, 1.0])).tolist() == [False] * 3
    assert alarm.fitted_on is not None
    assert alarm.fitted_on.info["coverage"] == 0


@pytest.mark.parametrize("given", [{"max_error": 0.0}, {"max_error": 0.1, "confidence": 1.0}, {"max_error": 1.0}])
def test_the_impossible_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate_alarm(oracle.bed(100), **given)  # type: ignore[arg-type]


def test_the_certificate_says_what_was_proved_and_where_it_holds() -> None:
    about = {"backend": "torch", "precision": "torch.float32", "weights": "feed"}
    trace = dataclasses.replace(oracle.bed(6000, seed=1), info=about)
    alarm = calibrate_alarm(trace, POLICY, max_error=0.02)
    proved = alarm.certificate
    assert proved is not None
    assert alarm.fitted_on is not None
    info = alarm.fitted_on.info
    assert (proved.risk, proved.bound, proved.delta, proved.tested_rows) == ("kept", 0.02, 0.05, info["tested_rows"])
    assert proved.observed == pytest.approx(info["wrong_rows"] / info["kept_rows"])
    names = trace.exit_names
    assert proved.void_for(**about, exit_names=names) is None
    assert "'openvino' runs" in str(proved.void_for(**about | {"backend": "openvino"}, exit_names=names))
    assert "hard cap" in str(proved.void_for(**about, exit_names=names, capped=True))
    again = Alarm.from_json(json.loads(json.dumps(alarm.to_json())))
    assert again.certificate == proved
    assert again.fitted_on == alarm.fitted_on
    with pytest.warns(UserWarning, match="nothing is kept"):
        assert calibrate_alarm(trace, POLICY, max_error=0.0001).certificate is None
    assert fit_alarm(trace, POLICY).certificate is None


def test_rows_that_were_seen_are_refused() -> None:
    trace, other = oracle.bed(400), oracle.bed(400, seed=5)
    assert trace.hash_N is not None
    record = CalibrationRecord(hash_N=tuple(trace.hash_N.tolist()))
    seen = dataclasses.replace(POLICY, calibrated_on=record)
    with pytest.raises(ValueError, match=r"The policy has seen 100.0% of these rows"):
        calibrate_alarm(trace, seen, max_error=0.2)
    with pytest.raises(ValueError, match=r"The alarm has seen 100.0% of these rows"):
        calibrate_alarm(trace, POLICY, max_error=0.2, alarm=fit_alarm(trace, POLICY))
    calibrate_alarm(other, seen, max_error=0.5)
    with pytest.raises(ValueError, match="no threshold"):
        fit_alarm(trace).keeps(torch.tensor([math.nan]))


def test_a_threshold_remembers_the_rows_that_fitted_its_alarm() -> None:
    """Fitted on one half, with a threshold from the other: nothing is proved on either."""
    trace = oracle.bed(1200, seed=1)
    trace = dataclasses.replace(trace, hash_N=torch.arange(1200))
    first, second = trace.rows(torch.arange(600)), trace.rows(torch.arange(600, 1200))
    alarm = calibrate_alarm(second, POLICY, max_error=0.5, alarm=fit_alarm(first, POLICY))
    assert alarm.fitted_on is not None
    assert alarm.fitted_on.hash_N == tuple(range(1200))
    for half in (first, second):
        with pytest.raises(ValueError, match=r"The alarm has seen 100.0% of these rows"):
            calibrate_alarm(half, POLICY, max_error=0.5, alarm=alarm)


def test_rows_that_anybody_has_seen_prove_nothing() -> None:
    """Half of the rows trained the ICs, three were seen by the policy: the others alone fit, choose and test."""
    trace = oracle.bed(800)
    assert trace.hash_N is not None
    seen = dataclasses.replace(POLICY, calibrated_on=CalibrationRecord(hash_N=tuple(trace.hash_N[400:403].tolist())))
    trained = dataclasses.replace(trace, trained_N=torch.arange(800) < 400)
    with pytest.warns(UserWarning, match=r"trained on 50.0% of these rows, which are left out"):
        alarm = calibrate_alarm(trained, seen, max_error=0.5)
    assert alarm == calibrate_alarm(trace.rows(torch.arange(403, 800)), POLICY, max_error=0.5)
    assert alarm.certificate is not None
    assert alarm.certificate.tested_rows == 199


def test_rows_too_few_or_not_as_they_were_are_refused() -> None:
    trace = oracle.bed(300)
    with pytest.raises(ValueError, match="takes 10 rows that nobody has seen; here are 9"):
        calibrate_alarm(trace.rows(torch.arange(9)), POLICY, max_error=0.5)
    with pytest.raises(ValueError, match="bound the trace as it was collected"):
        calibrate_alarm(scaled(trace, [2.0] * 5), POLICY, max_error=0.5)


def test_the_record_names_the_policy_whose_answers_were_tested() -> None:
    elsewhere = fit_alarm(oracle.bed(500, seed=9), Confidence(threshold=0.5))
    alarm = calibrate_alarm(oracle.bed(1000), POLICY, max_error=0.3, alarm=elsewhere)
    assert alarm.fitted_on is not None
    assert alarm.fitted_on.info["policy"] == rule_to_json(POLICY)


def test_the_examples_run() -> None:
    assert doctest.testmod(abstention).failed == 0
