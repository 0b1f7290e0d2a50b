"""Paths bring what a walk brings, fits are scikit-learn's, targets are met on fresh rows, and limits are said."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch

import oracle
from shallowdeep import calibration
from shallowdeep.calibration import calibrate, evaluate, tradeoff
from shallowdeep.families import FAMILIES
from shallowdeep.paths import brings_of, read_rows
from shallowdeep.policies import CalibrationRecord, Confidence, Fixed
from shallowdeep.reliability import fit_temperatures, scaled
from shallowdeep.spelling import from_json, to_json
from shallowdeep.thresholds import within_drop
from shallowdeep.types import Trace
from shallowdeep.views import second_look_of
from shallowdeep.walking import simulate

EVERYTHING = (True,) * 5
LEVELS, FREE, ONE = FAMILIES[0], FAMILIES[3], FAMILIES[4]


def population(samples: int, seed: int = 0) -> Trace:
    return oracle.bed(samples, exits=5, seed=seed)


def draw(trace: Trace, rows: int, seed: int) -> Trace:
    return trace.rows(torch.from_numpy(np.random.default_rng(seed).integers(trace.num_samples, size=rows)))


def test_a_drop_is_met_on_average_and_levels_are_cheaper_than_one_threshold() -> None:
    """Ten draws from a population that is known: the mean drop there is the aim, within its standard error."""
    trace = dataclasses.replace(population(6000), hash_N=None)
    found, plain = [], []
    for seed in range(10):
        sample = draw(trace, 1500, seed)
        found.append(evaluate(calibrate(sample, max_accuracy_drop=0.01), trace))
        rows = read_rows(sample, EVERYTHING)
        path = ONE.fit(rows, None)
        step = within_drop(brings_of(path.leaving(rows), rows, path.steps), float(rows.full_N.mean()), 0.01)
        plain.append(evaluate(path.policy(step, EVERYTHING, 5), trace))
    assert np.mean([e.drop for e in found]) == pytest.approx(0.01, abs=0.003)
    assert np.mean([e.mean_cost for e in found]) < np.mean([e.mean_cost for e in plain]) < 0.6


def test_a_budget_is_kept_and_the_most_accurate_is_taken() -> None:
    trace = population(4000)
    policy = calibrate(trace, max_mean_cost=0.4)
    found = evaluate(policy, population(20_000, seed=9))
    assert found.mean_cost == pytest.approx(0.4, abs=0.01)
    patient = evaluate(Confidence(threshold=0.97), trace)
    assert evaluate_quietly(calibrate(trace, max_mean_cost=patient.mean_cost), trace) >= patient.accuracy_early_exit


def evaluate_quietly(policy: Confidence, trace: Trace) -> float:
    return evaluate(policy, dataclasses.replace(trace, hash_N=None)).accuracy_early_exit


def test_a_budget_that_nothing_meets_is_said() -> None:
    with pytest.raises(ValueError, match=r"No policy costs 0\.1: the least possible here is 0\.2\."):
        calibrate(population(200), max_mean_cost=0.1)
    least = calibrate(population(200), max_mean_cost=0.2)
    assert evaluate_exits(least, population(200)) == [200, 0, 0, 0, 0]


def evaluate_exits(policy: Confidence, trace: Trace) -> list[int]:
    return simulate(policy, trace).exit_N.bincount(minlength=trace.num_exits).tolist()


def test_a_budget_above_the_full_network_buys_the_best() -> None:
    trace = oracle.random_trace(500, exits=4, classes=3, seed=0)
    trace = dataclasses.replace(trace, labels_N=trace.logits_ENC[3].argmax(1))
    policy = calibrate(trace, max_mean_cost=2.0)
    assert policy == Fixed(exit=3)
    assert "pays for the full network" in policy.calibrated_on.info["note"]


def test_a_drop_that_no_exit_meets_is_the_full_network_and_said() -> None:
    trace = oracle.random_trace(500, exits=4, classes=3, seed=0)
    trace = dataclasses.replace(trace, labels_N=trace.logits_ENC[3].argmax(1))
    with pytest.warns(UserWarning, match="full network"):
        policy = calibrate(trace, max_accuracy_drop=0.002)
    assert policy == Fixed(exit=3)
    with pytest.warns(UserWarning, match="takes 199 rows, here are 100"):
        assert calibrate(trace.rows(torch.arange(100)), max_accuracy_drop=0.005) == Fixed(exit=3)


def test_thresholds_lie_midway_between_neighbours() -> None:
    trace = population(1500)
    policy = calibrate(trace, max_accuracy_drop=0.01)
    assert len(policy.threshold) == 4
    for exit, bar in enumerate(policy.threshold):
        softmax = trace.logits_ENC[exit].double().softmax(1)
        top = softmax.topk(2).values
        seen = (top[:, 0] if isinstance(policy, Confidence) else top[:, 0] - top[:, 1]).sort().values
        above = int(torch.searchsorted(seen, torch.tensor(bar, dtype=torch.float64)))
        assert bar == pytest.approx(float(seen[above - 1 : above + 1].mean()), abs=1e-15)
        assert seen[above - 1] < bar < seen[above]


def test_saturated_confidences_are_told_apart() -> None:
    """In float32 every row's confidence is exactly 1; the surest half is right, the other wrong."""
    sure = torch.linspace(18, 30, 1000)
    wrong = torch.arange(1000) < 500
    early = torch.stack([torch.where(wrong, 0, sure), torch.where(wrong, sure, 0)], 1)
    trace = Trace(
        logits_ENC=torch.stack([early, torch.tensor([1.0, 0.0]).expand(1000, 2)]),
        labels_N=torch.zeros(1000, dtype=torch.int64),
        cost_E=torch.tensor([0.5, 1.0]),
    )
    assert (early.softmax(1).amax(1) == 1).all()
    found = evaluate(calibrate(trace, max_accuracy_drop=0.01), trace)
    assert found.share_E[0] == pytest.approx(0.5, abs=0.02)
    assert found.drop <= 0.01


def test_only_enabled_exits_are_used() -> None:
    policy = calibrate(population(1500), max_accuracy_drop=0.01, enabled_E=(False, True, False, True, False))
    assert policy.enabled_E == (False, True, False, True, True)
    assert [math.isinf(bar) for bar in policy.threshold] == [True, False, True, False]
    left = evaluate_exits(policy, population(1500))
    assert left[0] == left[2] == 0
    assert min(left[1], left[3], left[4]) > 0


def test_nobody_may_decide() -> None:
    trace = population(300)
    with pytest.warns(UserWarning, match="full network"):
        assert calibrate(trace, max_accuracy_drop=0.05, enabled_E=(False,) * 5) == Fixed(exit=4)
    with pytest.raises(ValueError, match=r"No policy costs 0\.5"):
        calibrate(trace, max_mean_cost=0.5, enabled_E=(False,) * 5)
    assert tradeoff(trace, enabled_E=(False,) * 5).curves == ()


@pytest.mark.parametrize("rows", [1, 2, 7, 99, 100])
def test_few_rows(rows: int) -> None:
    sample = population(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        policy = calibrate(sample, max_accuracy_drop=0.3)
        calibrate(sample, max_accuracy_drop=0.3, confidence=0.9)
    assert isinstance(policy, Fixed) == (rows <= 2)
    calibrate(sample, max_mean_cost=0.5)
    tradeoff(sample)


def test_rows_that_are_not_finite_stay() -> None:
    trace = population(600)
    logits = trace.logits_ENC.clone()
    logits[:3, :50] = math.nan
    logits[0, :, 0] = -math.inf  # its softmax is finite, its logits are not
    trace = dataclasses.replace(trace, logits_ENC=logits, hash_N=None)
    for policy in (calibrate(trace, max_accuracy_drop=0.02), calibrate(trace, max_mean_cost=0.6)):
        left = evaluate_exits(policy, trace)
        assert left[0] == 0
        assert left[1] > 0
    with pytest.raises(ValueError, match=r"No policy costs 0\.25: the least possible here is 0\.43"):
        calibrate(trace, max_mean_cost=0.25)


def test_a_policy_that_looks_twice_takes_no_trace_without_that_view() -> None:
    trace = oracle.bed(800, exits=5)
    with_view = {
        name: dataclasses.replace(trace, full_exit=3, info={"second_look": name}) for name in ("mirror", "other")
    }
    policy = calibrate(with_view["mirror"], max_mean_cost=2.0, enabled_E=(True,) * 5)
    record = CalibrationRecord.of(with_view["mirror"], (True,) * 5, {})
    policy = dataclasses.replace(policy, calibrated_on=record)  # type: ignore[type-var]
    assert record.info == {"second_look": "mirror"}
    simulate(policy, with_view["mirror"])
    for other, said in ((with_view["other"], "with 'other'"), (dataclasses.replace(trace, full_exit=3), "without one")):
        with pytest.raises(ValueError, match=f"second look 'mirror', and this trace was collected {said}"):
            simulate(policy, other)
    simulate(dataclasses.replace(policy, calibrated_on=None), with_view["other"])  # type: ignore[type-var]


def test_a_second_look_is_an_exit_like_others() -> None:
    """Exits behind the full one: the drop is against the full exit, which may be beaten."""
    trace = oracle.bed(3000, exits=5, full_exit=3)
    found = evaluate(calibrate(trace, max_accuracy_drop=-0.002), dataclasses.replace(trace, hash_N=None))
    assert found.drop <= 0
    assert found.share_E[4] > 0
    assert found.accuracy_full == pytest.approx(float((trace.logits_ENC[3].argmax(1) == trace.labels_N).float().mean()))


def test_a_gain_may_cost_more_than_the_full_network() -> None:
    trace = oracle.bed(4000, exits=5, full_exit=2)
    trace = dataclasses.replace(trace, cost_E=torch.tensor([0.3, 0.31, 0.32, 0.9, 1.0]))
    policy = calibrate(trace, max_accuracy_drop=-0.03)
    found = evaluate(policy, dataclasses.replace(trace, hash_N=None))
    assert found.drop <= -0.03
    assert found.mean_cost > float(trace.cost_E[2])


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_ics_that_cost_more_than_they_save_are_left_out(confidence: float | None) -> None:
    trace = population(3000)
    own = torch.tensor([0.4, 0.4, 0.4, 0.4, 0.0]).double()
    dear = dataclasses.replace(trace, cost_E=trace.cost_E + own.cumsum(0), own_cost_E=own)
    with pytest.warns(UserWarning, match="full network"):
        policy = calibrate(dear, max_accuracy_drop=0.01, confidence=confidence)
    assert policy == Fixed(exit=4)
    assert policy.calibrated_on.info["expected_mean_cost"] == pytest.approx(1.0)


def test_the_same_rows_give_the_same_policy() -> None:
    trace = population(800)
    first, second = (calibrate(trace, max_accuracy_drop=0.02, confidence=0.9) for _ in range(2))
    assert to_json(first) == to_json(second)


def test_the_record_survives_json() -> None:
    trace = population(800)
    policy = calibrate(trace, max_accuracy_drop=0.02)
    record = policy.calibrated_on
    assert record.hash_N == tuple(sorted(trace.hash_N.tolist()))
    assert record.info["rows"] == 800
    assert record.info["max_accuracy_drop"] == 0.02
    assert "not a bound" in record.info["note"]
    again = from_json(json.loads(json.dumps(to_json(policy), allow_nan=False)))
    assert again == policy
    assert again.calibrated_on == record


def test_rows_seen_before_are_said() -> None:
    trace = population(800)
    marked = dataclasses.replace(trace, trained_N=torch.arange(800) < 80)
    with pytest.warns(UserWarning, match=r"trained on 10.0% of these rows"):
        policy = calibrate(marked, max_accuracy_drop=0.02)
    with pytest.warns(UserWarning, match=r"calibrated on 100.0% of these rows"):
        evaluate(policy, trace)
    evaluate(policy, population(800, seed=1))
    few = dataclasses.replace(trace, trained_N=torch.arange(800) < 8)
    assert calibrate(few, max_accuracy_drop=0.02) == policy


def test_evaluation_is_the_slow_count() -> None:
    trace = oracle.bed(300, exits=5, full_exit=3)
    policy = Confidence(threshold=0.9, fallback="most_confident")
    found, slow = evaluate(policy, trace), oracle.walk(policy, trace)
    truth = trace.labels_N.tolist()
    full = oracle.walk(Fixed(exit=3), trace)["label"]
    right = [label == y for label, y in zip(slow["label"], truth, strict=True)]
    full_right = [label == y for label, y in zip(full, truth, strict=True)]
    assert found.accuracy_early_exit == pytest.approx(np.mean(right))
    assert found.drop == pytest.approx(np.mean(full_right) - np.mean(right))
    assert found.harm == pytest.approx(np.mean([f and not r for f, r in zip(full_right, right, strict=True)]))
    assert found.mean_cost == pytest.approx(np.mean(slow["cost"]))
    assert found.share_E.tolist() == pytest.approx([slow["exit"].count(e) / 300 for e in range(5)])
    wrong = [not r for r in right]
    assert found.confusion_auroc == pytest.approx(oracle.auroc(slow["confusion"], wrong))
    assert found.msp_auroc == pytest.approx(oracle.auroc([-c for c in slow["confidence"]], wrong))
    assert "mean cost" in str(found)


def test_an_answer_that_is_not_finite_is_wrong() -> None:
    trace = Trace(logits_ENC=torch.tensor([[[math.nan, 0.0]]]), labels_N=torch.tensor([0]), cost_E=torch.ones(1))
    found = evaluate(Fixed(exit=0), trace)
    assert (found.accuracy_full, found.accuracy_early_exit) == (0.0, 0.0)


def test_the_tradeoff_is_what_its_policies_do() -> None:
    trace = population(1000)
    found = tradeoff(trace)
    assert [curve.family for curve in found.curves] == [ONE.name, LEVELS.name]
    for curve in found.curves:
        for point in (0, 40, 200, 320, len(curve.cost_P) - 1):
            done = evaluate(Confidence(threshold=tuple(curve.threshold_PE[point].tolist())), trace)
            assert done.mean_cost == pytest.approx(float(curve.cost_P[point]))
            assert done.accuracy_early_exit == pytest.approx(float(curve.accuracy_P[point]))
        assert curve.cost_P[[0, -1]].tolist() == pytest.approx([1.0, 0.2])
    assert "full network" in str(found)


def test_the_examples_run() -> None:
    oracle.run_examples(calibration, "calibration")


@pytest.mark.parametrize("targets", [{"confidence": 0.9}, {"method": "crc"}])
def test_a_certificate_needs_logits_as_they_were_and_a_view_with_a_name(targets: dict) -> None:
    trace = population(500)
    with pytest.raises(ValueError, match="which rows taught them: bound the trace as it was collected"):
        calibrate(scaled(trace, fit_temperatures(trace)), max_accuracy_drop=0.1, **targets)
    nameless = dataclasses.replace(trace, full_exit=3, info={"second_look": second_look_of(lambda x: x).name})
    with pytest.raises(ValueError, match=r"<locals>\.<lambda>' is the name of many"):
        calibrate(nameless, max_accuracy_drop=0.1, **targets)
    once = calibrate(nameless, max_accuracy_drop=0.1, enabled_E=(True,) * 4 + (False,), **targets)
    assert once.calibrated_on.certificate.view == ""


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "needs one target"),
        ({"max_accuracy_drop": 0.01, "max_mean_cost": 0.5}, "needs one target"),
        ({"max_accuracy_drop": 1.0}, "0.01 for one point; found 1.0"),
        ({"max_accuracy_drop": math.nan}, "found nan"),
        ({"max_mean_cost": 0.0}, "above 0; found 0.0"),
        ({"max_mean_cost": math.nan}, "found nan"),
        ({"max_accuracy_drop": 0.01, "confidence": 95}, "between 0 and 1, such as 0.95; found 95"),
        ({"max_mean_cost": 0.5, "confidence": 0.95}, "a mean cost is measured"),
        ({"max_accuracy_drop": 0.01, "confidence": 1.0}, "found 1.0. No rows make sure"),
        ({"max_accuracy_drop": 0.01, "confidence": 1 - 1e-13}, "between 1e-06 and 1 - 1e-06, found 1 - 1e-13"),
        ({"max_accuracy_drop": 0.01, "confidence": 1e-13}, "between 1e-06 and 1 - 1e-06"),
        ({"max_accuracy_drop": 0.1, "method": "crc", "risk": "error"}, "more errors than any bound: take risk='drop'"),
        ({"max_accuracy_drop": 0.0, "confidence": 0.95, "risk": "harm"}, "harm is never below 0"),
        ({"max_accuracy_drop": 0.0, "method": "crc"}, "counts one loss more than seen"),
        ({"max_accuracy_drop": 0.01, "confidence": 0.95, "method": "crc"}, "leave confidence out, or take 'ltt'"),
        ({"max_accuracy_drop": 0.01, "method": "betting"}, "give confidence=0.95"),
        ({"max_mean_cost": 0.5, "method": "crc"}, "speak of a bound: give max_accuracy_drop"),
        ({"max_accuracy_drop": 0.01, "method": "magic"}, "auto, ltt, betting, crc, split; found 'magic'"),
        ({"max_accuracy_drop": 0.01, "risk": "ruin"}, "drop, harm, disagreement, error, brier; found 'ruin'"),
        ({"max_accuracy_drop": 0.01, "enabled_E": (True,)}, "1 entries; 5 exits need 5"),
    ],
)
def test_targets_that_make_no_sense(targets: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(population(50), **targets)
