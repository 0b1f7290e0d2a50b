"""Paths bring what a walk brings, fits are scikit-learn's, searches cannot be bettered, and tests stop in time."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import oracle
from shallowdeep import families, thresholds
from shallowdeep.families import FAMILIES, SECOND_LOOK, Family, without_second_look
from shallowdeep.paths import Brings, Path, Rows, _midway, answering, brings_of, read_rows
from shallowdeep.policies import Confidence, Fixed
from shallowdeep.thresholds import choose, within_cost, within_drop

EVERYTHING = (True,) * 5
LEVELS, FREE, ONE = FAMILIES[0], FAMILIES[3], FAMILIES[4]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_path_brings_what_a_walk_brings(family: Family) -> None:
    trace = oracle.bed(400, exits=5, full_exit=3)
    broken = trace.logits_ENC.clone()
    broken[0, 7] = math.nan
    trace = dataclasses.replace(trace, logits_ENC=broken)
    rows = read_rows(trace, EVERYTHING)
    path = family.fit(rows, None)
    brings = brings_of(path.leaving(rows), rows, path.steps)
    full = oracle.walk(Fixed(exit=3), trace)["label"]
    for step in (0, 5, 120, 200, 300, 390, path.steps - 1):
        said = oracle.walk(path.policy(step, EVERYTHING, 5), trace)
        right = np.array(said["label"]) == trace.labels_N.numpy()
        assert brings.cost_P[step] == pytest.approx(np.mean(said["cost"]))
        assert brings.accuracy_P[step] == pytest.approx(right.mean())
        assert brings.harm_P[step] == pytest.approx(((np.array(full) == trace.labels_N.numpy()) & ~right).mean())
    assert (path.bar_PK[1:] <= path.bar_PK[:-1]).all()
    assert (np.diff(brings.cost_P) <= 1e-12).all()


def test_the_levels_are_scikit_learns_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "TRUST", 1e-6)
    rows = read_rows(oracle.bed(5000, exits=3), (True,) * 3)
    score_KN = rows.scores[Confidence].score_KN
    level_K, slope_K = families._safety(score_KN, rows.right_LN)
    for k in range(2):
        harm = rows.right_LN[-1] & ~rows.right_LN[k]
        fit = LogisticRegression(C=1e9, tol=1e-10).fit(score_KN[k][:, None], ~harm)
        assert slope_K[k] == pytest.approx(fit.coef_[0, 0], abs=0.01)
        assert level_K[k] == pytest.approx(fit.intercept_[0], abs=0.02)


def test_an_exit_that_never_did_harm_gets_the_usual_slope() -> None:
    rows = read_rows(oracle.bed(300, exits=3), (True,) * 3)
    level_K, slope_K = families._safety(rows.scores[Confidence].score_KN, np.ones_like(rows.right_LN))
    assert np.isfinite(level_K).all()
    assert slope_K == pytest.approx(-families.USUAL_SLOPE, abs=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_no_free_threshold_can_be_bettered_alone(seed: int) -> None:
    rows = read_rows(oracle.bed(60, exits=4, seed=seed), (True,) * 4)
    score_KN = rows.scores[Confidence].score_KN
    loss_LN = rows.cost_L[:, None] + 3.0 * ~rows.right_LN

    def loss(bar_K: np.ndarray) -> float:
        total = 0.0
        for n in range(60):
            stops = [k for k in range(3) if score_KN[k, n] >= bar_K[k]]
            total += loss_LN[stops[0] if stops else 3, n]
        return total

    found_K = families._descend(np.full(3, math.inf), loss_LN, score_KN, np.argsort(-score_KN, 1))
    least = loss(found_K)
    for k in range(3):
        for bar in (*score_KN[k], math.inf):
            other_K = found_K.copy()
            other_K[k] = bar
            assert loss(other_K) >= least - 1e-9
    assert least < loss(np.full(3, math.inf))


def test_free_thresholds_do_best_on_the_rows_they_were_searched_on() -> None:
    rows = read_rows(oracle.bed(2000, exits=5), EVERYTHING)
    cost = {}
    for family in (LEVELS, FREE):
        path = family.fit(rows, None)
        brings = brings_of(path.leaving(rows), rows, path.steps)
        cost[family.name] = brings.cost_P[within_drop(brings, float(rows.full_N.mean()), 0.01)]
    assert cost[FREE.name] < cost[LEVELS.name]


def test_folds_are_judged_by_what_others_fitted() -> None:
    rows = read_rows(oracle.bed(100, exits=3), (True,) * 3)._replace(full_N=np.arange(100))
    fitted: list[set[int]] = []
    judged: list[set[int]] = []

    def fit(given: Rows, grid_P: np.ndarray | None) -> Path:
        fitted.append(set(given.full_N.tolist()))
        path = ONE.fit(given, grid_P)

        def unit(others: Rows) -> np.ndarray:
            judged.append(set(others.full_N.tolist()))
            return path.unit(others)

        return dataclasses.replace(path, unit=unit)

    grid_P = ONE.fit(rows, None).grid_P
    leaving_KN = thresholds._crossfit(Family("spy", fit), thresholds._folds(rows, ensembles=False), grid_P)
    assert all(a | b == set(range(100)) and not a & b for a, b in zip(fitted, judged, strict=True))
    assert set.union(*judged) == set(range(100))
    assert sum(map(len, judged)) == 100
    for given, others in zip(fitted, judged, strict=True):
        path = ONE.fit(rows.take(sorted(given)), grid_P)
        assert (leaving_KN[:, sorted(others)] == path.leaving(rows.take(sorted(others)))).all()


def test_another_family_takes_over_only_beyond_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(oracle.bed(4000, exits=5), EVERYTHING)

    def name_of_choice() -> str:
        choice = choose(rows, lambda brings: within_cost(brings, 0.5))
        assert choice is not None
        return choice.family

    assert name_of_choice() == LEVELS.name

    def blind(given: Rows, grid_P: np.ndarray | None) -> Path:
        path = FREE.fit(given, grid_P)
        return dataclasses.replace(path, bar_PK=path.bar_PK ** np.array([1, 0.1, 5, 1]))

    monkeypatch.setattr(families, "FAMILIES", (Family("blind", blind), ONE))
    assert name_of_choice() == ONE.name
    monkeypatch.setattr(families, "FAMILIES", (ONE, LEVELS))
    rows = rows.take(slice(0, 200))
    assert name_of_choice() == ONE.name


def test_a_lucky_step_behind_bad_ones_does_not_count() -> None:
    """Raw, the step with a drop of 0.009 meets 0.01; smoothed along the path it shares its neighbours' bad luck."""

    def last(drops: list[float], aim: float) -> int | None:
        nothing = np.zeros(len(drops))
        leaving_KN = np.zeros((1, 1000), np.int64)
        return within_drop(Brings(leaving_KN, nothing, 0.9 - np.array(drops), nothing), 0.9, aim)

    assert last([0.0, 0.001, 0.012, 0.014, 0.009, 0.02], 0.01) == 1
    assert last([0.0, 0.001, 0.002, 0.004, 0.009, 0.02], 0.01) == 4
    assert last([0.0, 0.001, 0.002, 0.004, 0.010, 0.02], 0.01) == 3  # one error more than seen
    assert last([0.01, 0.02], 0.001) is None


def test_scores_that_even_float64_cannot_tell_apart_move_to_the_next_gap() -> None:
    units = _midway(np.array([math.inf, 50, 38, 2, -math.inf]), np.array([1, 37.5, 40, 60]), np.array([0.7, 1, 1, 1.0]))
    assert units.tolist() == [math.inf, math.inf, math.inf, 0.85, 0.35]


def test_the_examples_run() -> None:
    oracle.run_examples(thresholds, "thresholds")


LOOKED = (SECOND_LOOK, *(without_second_look(family, 0.0) for family in FAMILIES))


@pytest.mark.parametrize("full_exit", [3, 4])
@pytest.mark.parametrize("family", [*FAMILIES, *LOOKED], ids=lambda family: family.name)
def test_a_path_with_an_ensemble_brings_what_a_walk_brings(family: Family, full_exit: int) -> None:
    if (family in LOOKED) and full_exit == 4:
        return
    trace = oracle.bed(150, exits=5, full_exit=full_exit)
    broken = trace.logits_ENC.clone()
    broken[0, 7], broken[3, 9], broken[4, 11] = math.nan, math.nan, math.nan
    rows = read_rows(dataclasses.replace(trace, logits_ENC=broken), EVERYTHING)
    trace = dataclasses.replace(trace, logits_ENC=broken)
    ensemble = families.fit_ensemble(rows)
    path = dataclasses.replace(family.fit(answering(rows, ensemble), None), ensemble=ensemble)
    brings = brings_of(path.leaving(rows), path.seen(rows), path.steps)
    for step in (0, 40, 200, 330, path.steps - 1):
        policy = path.policy(step, EVERYTHING, 5)
        assert policy.ensemble == ensemble
        said = oracle.walk(policy, trace)
        right = np.array(said["label"]) == trace.labels_N.numpy()
        right &= np.array([all(map(math.isfinite, logits)) for logits in said["logits"]])
        assert brings.accuracy_P[step] == pytest.approx(right.mean())
        if family in LOOKED[1:]:
            assert policy.asks(5, 3) == (True, True, True, True, False)
        assert brings.cost_P[step] == pytest.approx(np.mean(said["cost"]))


def test_an_ensembles_weights_are_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other weights have a better penalised likelihood, written out row by row; without a prior they help."""
    trace = oracle.bed(120, exits=3, classes=4)
    rows = read_rows(trace, (True,) * 3)
    logs = trace.logits_ENC.double().log_softmax(2).clamp_min(math.log(1e-12)).numpy()

    def loss(weight_E: np.ndarray) -> float:
        total = families.DOUBT / 2 * ((weight_E[:2] / weight_E[2]) ** 2).sum()
        for n, label in enumerate(trace.labels_N.tolist()):
            said = sum(weight * logs[e, n] for e, weight in enumerate(weight_E))
            total += math.log(np.exp(said).sum()) - said[label]
        return float(total)

    for doubt in (100.0, 1e-6):
        monkeypatch.setattr(families, "DOUBT", doubt)
        weight_E = np.array(families.fit_ensemble(rows).weight_EE[2])
        least = loss(weight_E)
        for e in range(3):
            for by in (-0.02, 0.02):
                assert loss(weight_E + by * np.eye(3)[e]) > least - 1e-6
        assert least < loss(np.eye(3)[2])


def test_the_learned_score_is_scikit_learns() -> None:
    rows = read_rows(oracle.bed(1500, exits=3), (True,) * 3)
    policy = families._learned(rows, None).policy(200, (True,) * 3, 3)
    said_FKN = families._features(rows)
    harm_KN = rows.right_LN[-1] & ~rows.right_LN[:-1]
    flat = np.concatenate([said_FKN.reshape(4, -1).T, np.repeat(np.eye(2), 1500, 0)], 1)
    fit = LogisticRegression(fit_intercept=False, C=1e6, max_iter=5000, tol=1e-8).fit(flat, ~harm_KN.ravel())
    score_S = said_FKN.reshape(4, -1).T @ [policy.confidence, policy.margin, policy.entropy, policy.agreement]
    score_S -= np.repeat(policy.threshold, 1500)
    assert np.corrcoef(score_S, fit.decision_function(flat))[0, 1] > 0.99


def test_a_second_look_that_changes_nothing_is_left_out() -> None:
    trace = oracle.bed(1500, exits=5)
    more = torch.cat([trace.logits_ENC, trace.logits_ENC[-1:]])
    dear = torch.cat([trace.cost_E, trace.cost_E[-1:] + 1])
    rows = read_rows(dataclasses.replace(trace, logits_ENC=more, cost_E=dear, full_exit=4, exit_names=()), (True,) * 6)
    choice = choose(rows, lambda brings: within_drop(brings, float(rows.full_N.mean()), 0.005))
    assert choice is not None
    assert choice.path.policy(choice.step, (True,) * 6, 6).asks(6, 4) == (True,) * 5 + (False,)


def test_a_second_look_that_gains_is_taken() -> None:
    rows = read_rows(oracle.bed(2000, exits=5, full_exit=2), (*EVERYTHING[:4], False))
    choice = choose(rows, lambda brings: within_drop(brings, float(rows.full_N.mean()), -0.03))
    assert choice is not None
    assert choice.family == SECOND_LOOK.name
