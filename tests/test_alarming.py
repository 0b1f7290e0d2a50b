"""Alarms equal the slow loop in simulation, engines and exports; fitted on some rows, they find errors among others."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import oracle
import shallowdeep as sd
from shallowdeep import alarming, trajectory
from shallowdeep.alarming import alarms, fit_alarm, full_network, suspicions, wrong_answers
from shallowdeep.calibration import calibrate
from shallowdeep.export import export_file, export_folder
from shallowdeep.host import EarlyExits
from shallowdeep.network import weights_hash
from shallowdeep.policies import CalibrationRecord, Confidence, Fixed, Patience, Policy
from shallowdeep.runtime.engine import Engine
from shallowdeep.trajectory import Alarm
from shallowdeep.types import DataError, Trace
from shallowdeep.walking import simulate
from test_backends import policies, rows, tiny
from test_certificates import PROVED


def some_alarm(asked: tuple[bool, ...], seed: int = 0) -> Alarm:
    rng, exits = np.random.default_rng(seed), len(asked)
    bias_E, weight_EE = rng.normal(size=exits), rng.normal(size=(exits, exits)) / 5
    return Alarm(asked_E=asked, bias_E=tuple(bias_E.tolist()), weight_EE=tuple(map(tuple, weight_EE.tolist())))


def slow_odds(logits: list[float], label: int) -> float:
    p = oracle.softmax(logits)[label]
    p = 0.0 if math.isnan(p) else p
    return math.log(max(p, 1e-9)) - math.log(max(1 - p, 1e-9))


def slow_alarm(alarm: Alarm, policy: Policy, trace: Trace) -> list[float]:
    walked, exits, found = oracle.walk(policy, trace), oracle.asked(policy, trace), []
    for n, (stop, label, logits) in enumerate(zip(walked["exit"], walked["label"], walked["logits"], strict=True)):
        total = alarm.bias_E[stop]
        for e in exits:
            if e <= stop:
                total += alarm.weight_EE[stop][e] * slow_odds(trace.logits_ENC[e, n].double().tolist(), label)
        found.append(1.0 if math.isnan(oracle.softmax(logits)[0]) else 1 / (1 + math.exp(-total)))
    return found


KINDS = (
    Confidence(threshold=0.7),
    Confidence(threshold=0.7, fallback="most_confident"),
    Confidence(threshold=0.9, enabled_E=(True, False, True, False, True)),
    Patience(patience=1),
    Fixed(exit=2),
    Confidence(threshold=math.inf),
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 4), st.integers(0, 10**6), st.booleans())
def test_an_alarm_is_the_slow_sum(policy: Policy, full: int, seed: int, broken: bool) -> None:
    trace = oracle.random_trace(8, exits=5, classes=4, seed=seed, full_exit=full, broken=0.3 * broken)
    alarm = some_alarm(policy.asks(5, full), seed)
    outcome = simulate(policy, trace, alarm)
    assert outcome.alarm_N is not None
    # One rounding of a probability near 1 - 1e-9 moves its log-odds by 1e-7.
    assert outcome.alarm_N.tolist() == pytest.approx(slow_alarm(alarm, policy, trace), abs=1e-6)
    assert simulate(policy, trace).alarm_N is None


def test_numpy_and_torch_agree_and_saturated_rows_stay_finite() -> None:
    alarm = some_alarm((True, True))
    said = [torch.tensor([[1.0, 0.0], [0.5, 0.5], [math.nan, math.nan]], dtype=torch.float64)] * 2
    found = alarm.score(1, said, said[1])
    arrays = [tensor.numpy() for tensor in said]
    np.testing.assert_allclose(alarm.score(1, arrays, arrays[1]), found.numpy(), rtol=1e-14)
    assert found.isfinite().all()
    assert found[2] == 1.0
    assert alarm.score(0, [said[0][:0]], said[0][:0]).shape == (0,)


def test_an_alarm_survives_json_exactly() -> None:
    alarm = fit_alarm(oracle.bed(300))
    assert alarm.fitted_on is not None
    again = Alarm.from_json(json.loads(json.dumps(alarm.to_json())))
    assert again == alarm
    assert again.fitted_on == alarm.fitted_on
    assert hash(again) == hash(alarm)
    with pytest.raises(ValueError, match="has the fields asked_E, bias_E, weight_EE"):
        Alarm.from_json({"bias_E": [0.0]})
    with pytest.raises(ValueError, match="2 biases and 2 x 2 weights; found 1 and 1 x 2"):
        Alarm(asked_E=(True, True), bias_E=(0.0,), weight_EE=((0.0, 0.0),))


def test_an_alarm_for_other_exits_is_refused() -> None:
    trace = oracle.bed(300)
    alarm = fit_alarm(trace)
    for policy in (Fixed(exit=1), Confidence(threshold=0.5, enabled_E=(True, False, True, True, True))):
        with pytest.raises(ValueError, match=r"exits \[0, 1, 2, 3, 4\] of 5, the policy asks .* fit_alarm"):
            simulate(policy, trace, alarm)
    with pytest.raises(ValueError, match="fit_alarm"):
        Engine(tiny(), policies()["confidence"], alarm=alarm, backend="torch")


# ---------------------------------------------------------------- fitting


@pytest.mark.parametrize(
    "policy", [None, Confidence(threshold=0.97), Confidence(threshold=0.9, enabled_E=KINDS[2].enabled_E)]
)
def test_a_fitted_alarm_finds_errors_among_other_rows(policy: Policy | None) -> None:
    trace, other = oracle.bed(3000, seed=1), oracle.bed(2000, seed=2)
    alarm = fit_alarm(trace, policy)
    policy = policy or full_network(trace)
    outcome = simulate(policy, other, alarm)
    assert outcome.alarm_N is not None
    wrong = wrong_answers(outcome, other)
    assert float(outcome.alarm_N.mean()) == pytest.approx(float(wrong.double().mean()), abs=0.03)  # a probability
    # On this bed the last exit knows all that the earlier ones know; early answers are where the others help.
    least = -0.005 if float(outcome.cost_N.mean()) == 1 else 0.002
    assert roc_auc_score(wrong, outcome.alarm_N) > roc_auc_score(wrong, -outcome.confidence_N) + least


def test_it_is_fitted_on_its_rows_alone_and_says_which() -> None:
    trace = oracle.bed(400)
    alarm = fit_alarm(trace, Confidence(threshold=0.9))
    assert alarm.fitted_on is not None
    assert trace.hash_N is not None
    assert set(alarm.fitted_on.hash_N) == set(trace.hash_N.tolist())
    assert alarm.fitted_on.info["rows"] == 400
    assert alarm.fitted_on.info["policy"] == {"kind": "Confidence", "threshold": 0.9, "fallback": "last"}
    assert fit_alarm(trace, Confidence(threshold=0.9)) == alarm


def test_labels_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = oracle.bed(400)
    whole = fit_alarm(trace)
    monkeypatch.setattr(alarming, "CHUNK_ELEMENTS", 700)
    assert fit_alarm(trace) == whole
    monkeypatch.setattr(alarming, "FIT_ROWS", 200)
    assert fit_alarm(trace) == dataclasses.replace(fit_alarm(trace.rows(torch.arange(0, 400, 2))))


@pytest.mark.parametrize(
    "policy",
    [
        Confidence(threshold=0.8),
        Confidence(threshold=0.99, enabled_E=(True, False, True, True), fallback="most_confident"),
    ],
)
def test_what_is_fitted_is_a_line_for_every_exit_passed(policy: Policy) -> None:
    trace = oracle.bed(40, exits=4, seed=3)
    outcome = simulate(policy, trace)
    exits = [e for e, on in enumerate(policy.asks(4, 3)) if on]
    recalled = 0
    expected = []
    for place, exit in enumerate(exits):
        for n in range(40):
            stop = int(outcome.exit_N[n])
            if exit > stop:
                continue
            said = int(trace.logits_ENC[exit, n].argmax())
            label = int(outcome.labels_N[n]) if exit == stop else said
            recalled += label != said
            odds = [slow_odds(trace.logits_ENC[e, n].tolist(), label) for e in exits[: place + 1]]
            none = [0.0] * (len(exits) - place - 1)
            level = [float(other == place) for other in range(len(exits))]
            own = [odds[-1] * one for one in level]
            line = [*odds, *none, *reversed(odds), *none, *own, *level]
            expected.append((line, label != int(trace.labels_N[n]), 1.0 if exit == stop else alarming.PASSED))
    columns, wrong, weight = alarming._examples(trace, outcome, exits)
    np.testing.assert_allclose(columns, np.array([line for line, _, _ in expected]), rtol=1e-6, atol=1e-6)
    assert wrong.tolist() == [one for _, one, _ in expected]
    np.testing.assert_allclose(weight, [one for _, _, one in expected])
    assert (recalled > 0) == (policy.fallback == "most_confident")


def test_what_lies_behind_the_full_exit_is_not_asked() -> None:
    trace = oracle.bed(300, exits=4, full_exit=2)
    assert fit_alarm(trace).asked_E == (True, True, True, False)
    assert simulate(full_network(trace), trace).exit_N.unique().tolist() == [2]


def test_nothing_to_learn() -> None:
    always = Trace(logits_ENC=torch.eye(2)[None], labels_N=torch.tensor([0, 1]), cost_E=torch.ones(1))
    with pytest.raises(ValueError, match="of 2 answers 0 are wrong"):
        fit_alarm(always)
    never = dataclasses.replace(always, labels_N=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="of 2 answers 2 are wrong"):
        fit_alarm(never)
    for trace in (always, never):
        found = alarms(trace)
        assert "alarm" not in found.scores
        assert math.isnan(found.scores["confusion"].auroc)
        assert str(found).startswith(f"There is nothing to tell apart: {found.positives} wrong ones among 2 answers")


def test_rows_that_are_not_finite_are_suspected_and_teach_nothing() -> None:
    trace = oracle.bed(300)
    broken = dataclasses.replace(trace, logits_ENC=trace.logits_ENC.clone())
    broken.logits_ENC[:, :20] = math.nan
    assert fit_alarm(broken).bias_E == pytest.approx(fit_alarm(trace.rows(torch.arange(20, 300))).bias_E)
    for score_N in suspicions(broken, alarm=fit_alarm(broken)).values():
        assert score_N[:20].tolist() == [math.inf] * 20
        assert score_N[20:].isfinite().all()
    assert alarms(broken).scores["alarm"].auroc > 0.6


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("policy", [None, *KINDS[:3]])
def test_suspicions_are_the_slow_ones(policy: Policy | None) -> None:
    trace = oracle.bed(40)
    found, policy = suspicions(trace, policy), policy or full_network(trace)
    walked, exits = oracle.walk(policy, trace), oracle.asked(policy, trace)
    for n, (stop, label, logits) in enumerate(zip(walked["exit"], walked["label"], walked["logits"], strict=True)):
        passed = [trace.logits_ENC[e, n].double().tolist() for e in exits if e <= stop]
        p = oracle.softmax(logits)
        odds = [slow_odds(each, label) for each in passed]
        expected = {
            "confusion": sum(oracle.distance(oracle.softmax(each), p) for each in passed),
            "disagreements": sum(oracle.best(each) != label for each in passed),
            "max-softmax": -max(p),
            "entropy": -sum(x * math.log(x) for x in p if x > 0),
            "margin": sorted(p)[-2] - sorted(p)[-1],
            "energy": -math.log(math.fsum(map(math.exp, logits))),
            "log-odds": -sum(odds) / len(odds),
            "near log-odds": -sum(odds[-4:]) / len(odds[-4:]),
        }
        assert {name: float(score_N[n]) for name, score_N in found.items()} == pytest.approx(expected)


def test_a_policy_that_has_seen_the_rows_is_named() -> None:
    trace = oracle.bed(400)
    policy = calibrate(trace, max_accuracy_drop=0.05)
    with pytest.warns(UserWarning, match=r"calibrated on 100.0% of these rows: its errors look rarer"):
        alarms(trace, policy)
    alarms(oracle.bed(400, seed=1), policy)


def test_alarms_scores_every_score_and_judges_only_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, policy, fitted = oracle.bed(2000), Confidence(threshold=0.95), list[set[int]]()
    real = alarming.fit_alarm

    def spy(some: Trace, *given: Any) -> Alarm:
        assert some.hash_N is not None
        fitted.append(set(some.hash_N.tolist()))
        return real(some, *given)

    monkeypatch.setattr(alarming, "fit_alarm", spy)
    found = alarms(trace, policy)
    outcome = simulate(policy, trace)
    wrong = outcome.labels_N != trace.labels_N
    assert found.positives == int(wrong.sum())
    assert found.mean_cost == pytest.approx(float(outcome.cost_N.mean()))
    assert found.scores["max-softmax"].auroc == pytest.approx(roc_auc_score(wrong, -outcome.confidence_N))
    assert found.lead["max-softmax"].difference == 0
    assert found.lead["alarm"].difference > 0
    assert found.scores["alarm"].aurc < found.scores["max-softmax"].aurc
    assert len(fitted) == 5
    assert len(set.intersection(*fitted)) == 0  # every row is left out once
    assert trace.hash_N is not None
    left_out = [set(trace.hash_N.tolist()) - some for some in fitted]
    assert sum(map(len, left_out)) == 2000


def test_inputs_from_elsewhere() -> None:
    trace = oracle.bed(400)
    noise = Trace(
        logits_ENC=torch.randn(5, 300, 10, generator=torch.Generator().manual_seed(0)),
        labels_N=torch.zeros(300, dtype=torch.int64),
        cost_E=trace.cost_E,
    )
    found = alarms(trace, against=noise)
    assert (found.positives, found.samples, found.target) == (300, 700, "of the other trace")
    assert min(own.auroc for name, own in found.scores.items() if name != "energy") > 0.8
    changed = alarms(trace, against=dataclasses.replace(noise, labels_N=noise.labels_N + 1))
    assert changed == found  # their labels are not looked at
    with pytest.raises(DataError, match=r"\(5, 9\) exits and classes, this one \(5, 10\)"):
        alarms(trace, against=dataclasses.replace(noise, logits_ENC=noise.logits_ENC[:, :, :9]))


# ---------------------------------------------------------------- law 3 and 4: engines and exports


@pytest.mark.parametrize("name", ["confidence", "most confident", "entropy, one exit", "never"])
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_law_3_the_engines_alarm_is_the_simulated_one(name: str, backend: Any) -> None:
    sdn, policy = tiny(), policies()[name]
    alarm = some_alarm(policy.asks(3, 2))
    engine = Engine(sdn, policy, alarm=alarm, backend=backend)
    inputs = rows(60)
    trace = engine.collect((inputs, torch.zeros(60, dtype=torch.int64)))
    expected = simulate(policy, trace, alarm).alarm_N
    assert expected is not None
    found = engine(inputs)
    torch.testing.assert_close(found.alarm_B, expected, rtol=1e-4, atol=1e-6)
    parts = [answer.alarm_B for answer in engine.map([inputs[:7], inputs[7:8], inputs[8:]])]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-6)
    assert len(set(found.exit_B.tolist())) > 1 or name == "never"
    assert engine(inputs[:0]).alarm_B.shape == (0,)  # type: ignore[union-attr]
    assert Engine(sdn, policy, backend="torch")(inputs).alarm_B is None
    inputs[[1, 4]] = math.nan
    assert engine(inputs).alarm_B[[1, 4]].tolist() == [1.0, 1.0]  # type: ignore[index]


def test_law_4_exports_sound_the_same_alarm(tmp_path: Path) -> None:
    policy = policies()["most confident"]
    alarm = some_alarm(policy.asks(3, 2))
    export_folder(tiny(), policy, tmp_path / "folder", rows(60), alarm=alarm)
    export_file(tiny(), policy, tmp_path / "file", rows(60), alarm=alarm)
    exported, single = EarlyExits(tmp_path / "folder"), EarlyExits(tmp_path / "file")
    engine, broken = Engine(tiny(), policy, alarm=alarm, backend="torch"), rows(7)
    broken[[1, 4]] = torch.nan
    for batch in (rows(1), rows(60), broken):
        expected = engine(batch).alarm_B
        assert expected is not None
        for run in (exported, single):
            torch.testing.assert_close(torch.from_numpy(run(batch.numpy())["alarm"]), expected, rtol=1e-4, atol=1e-6)
    manifest = json.loads((tmp_path / "folder/manifest.json").read_text())
    assert Alarm.from_json(manifest["alarm"]) == alarm


def test_the_examples_run() -> None:
    oracle.run_examples(alarming, "alarms")
    assert doctest.testmod(trajectory).failed == 0


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


def test_law_3_with_a_second_look() -> None:
    sdn = tiny()
    top = policies()["confidence"].threshold  # type: ignore[attr-defined]
    policy = Confidence(threshold=(*top, 0.9))
    alarm = some_alarm((True,) * 4)
    engine = Engine(sdn, policy, second_look=turned, alarm=alarm, backend="torch")
    trace = engine.collect((rows(60), torch.zeros(60, dtype=torch.int64)))
    found, outcome = engine(rows(60)), simulate(policy, trace, alarm)
    assert outcome.alarm_N is not None
    assert 3 in found.exit_B.tolist()
    torch.testing.assert_close(found.alarm_B, outcome.alarm_N, rtol=1e-4, atol=1e-6)


def test_an_alarm_runs_with_its_own_view_only() -> None:
    sdn, policy = tiny(), Confidence(threshold=0.9)
    again = sd.collect(sdn, (rows(200), torch.arange(200) % sdn.plan.num_classes), second_look=turned)
    alarm = fit_alarm(again, policy)
    assert alarm.fitted_on is not None
    assert str(alarm.fitted_on.info["second_look"]).endswith("turned")
    Engine(sdn, policy, second_look=turned, alarm=alarm, backend="torch")
    with pytest.raises(ValueError, match=r"alarm was calibrated with the second look '.*turned' and shall run with"):
        Engine(sdn, policy, second_look=lambda x: x.flip(2), alarm=alarm, backend="torch")
    unseen = Confidence(threshold=0.9, enabled_E=(True, True, True, False))
    assert "second_look" not in fit_alarm(again, unseen).fitted_on.info  # type: ignore[union-attr]


def test_what_was_proved_of_kept_answers_holds_on_its_backend_alone() -> None:
    sdn, policy = tiny(), Confidence(threshold=0.9)
    here = {"weights": weights_hash(sdn), "exit_names": sdn.plan.exit_names, "asked_E": (True,) * 3}
    proved = dataclasses.replace(PROVED, risk="kept", **here)

    def alarm(backend: str) -> Alarm:
        record = CalibrationRecord(certificate=dataclasses.replace(proved, backend=backend))
        return dataclasses.replace(some_alarm((True,) * 3), fitted_on=record)

    assert Engine(sdn, policy, alarm=alarm("torch")).backend == "torch"
    with pytest.warns(UserWarning, match="alarm's certificate is void here: it was tested on backend 'openvino'"):
        Engine(sdn, policy, alarm=alarm("openvino"), backend="torch")
