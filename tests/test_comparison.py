"""A comparison reports what policies do on rows that did not choose them, and calls real only what is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression

import oracle
from shallowdeep import comparison, families
from shallowdeep.cli import main
from shallowdeep.comparison import (
    AIMS,
    LEVEL,
    Comparison,
    Difference,
    compare,
    holm,
    usual_policies,
)
from shallowdeep.families import FAMILIES, Family
from shallowdeep.paths import Floats, Rows, read_rows
from shallowdeep.paths import Path as Steps
from shallowdeep.policies import Confidence, Entropy, Fixed, Oracle, Policy, Tempered
from shallowdeep.reliability import fit_temperatures, scaled
from shallowdeep.rivals import rivals_for
from shallowdeep.thresholds import choose, fits, within_drop
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

ONE = next(family for family in FAMILIES if family.name == "one confidence threshold")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cheap families, small ensembles and fewer resamples; the first is the default."""
    monkeypatch.setattr(families, "ENSEMBLE_ROWS", 40)
    monkeypatch.setattr(comparison, "families_for", lambda rows: (FAMILIES[0], ONE))
    monkeypatch.setattr(comparison, "rivals_for", lambda rows: ())
    monkeypatch.setattr(comparison, "RESAMPLES", 500)


def of(found: Comparison, name: str, what: str, drop: float = 0.01) -> Difference:
    return next(one for one in found.differences if (one.name, one.what, one.drop) == (name, what, drop))


def chosen(family: Family, rows: Rows, trace: Trace, aim: float) -> Policy:
    """A family's policy for an aim, as ``calibrate`` would take it."""
    full = float(rows.full_N.mean())
    choice = choose(
        rows, lambda brings: within_drop(brings, full, aim), fits(rows, families=(family,), ensembles=False)
    )
    if choice is None or choice.brings.cost_P[choice.step] >= 1:
        return Fixed(exit=trace.full_exit)
    return choice.path.policy(choice.step, (True,) * trace.num_exits, trace.num_exits)


@pytest.mark.parametrize("second_look", [False, True])
def test_lines_are_what_policies_do_on_rows_that_did_not_choose_them(second_look: bool) -> None:
    trace = oracle.bed(600, exits=4, full_exit=2 if second_look else -1)
    trace.logits_ENC[1, ::50, 0] = math.nan
    found = compare(trace, {"entropy": [Entropy(threshold=0.1), Entropy(threshold=0.7)]}, splits=2, seed=5)
    names = [FAMILIES[0].name, ONE.name]
    tempered_names = [f"{name}, tempered" for name in names]
    mixed = [f"{names[0]}, ensemble", "ensembles at every exit (ZTW)"]
    assert [line.name for line in found.lines] == [*names, *mixed, *tempered_names, "entropy"]
    cases = [*zip(names, (FAMILIES[0], ONE), strict=True), *zip(tempered_names, (FAMILIES[0], ONE), strict=True)]
    for name, family in cases:
        line, tempered = next(line for line in found.lines if line.name == name), name in tempered_names
        drops, costs = np.zeros(len(AIMS)), np.zeros(len(AIMS))
        for split in range(2):
            order = np.random.default_rng(5 + split).permutation(600)
            for choosing, reporting in ((order[:300], order[300:]), (order[300:], order[:300])):
                seen = trace.rows(torch.from_numpy(np.sort(choosing)))
                temperature_E = fit_temperatures(seen) if tempered else torch.ones(4)
                rows = read_rows(scaled(seen, temperature_E), (True,) * 4)
                fresh = trace.rows(torch.from_numpy(reporting))
                full = simulate(Fixed(exit=trace.full_exit), fresh).labels_N == fresh.labels_N
                for place, aim in enumerate(AIMS):
                    policy = Tempered(policy=chosen(family, rows, trace, aim), temperature_E=tuple(temperature_E))
                    outcome = simulate(policy, fresh)
                    right = outcome.labels_N == fresh.labels_N
                    drops[place] += float(full.double().mean() - right.double().mean()) / 4
                    costs[place] += float(outcome.cost_N.mean()) / 4
        np.testing.assert_allclose(line.drop_A.numpy(), drops, atol=1e-9)
        np.testing.assert_allclose(line.cost_A.numpy(), costs, atol=1e-9)
    assert float(found.lines[0].cost_A[-1]) < 0.8


def test_policies_by_hand_are_chosen_on_one_half_too() -> None:
    """Half a thousand rows are easy for both exits, the other half is spoiled early: who sees which must show."""
    trace = oracle.bed(500, exits=3)
    line = [Confidence(threshold=bar) for bar in (0.99, 0.9, 0.5)]
    found = compare(trace, {"by hand": line}, splits=1)
    order = np.random.default_rng(0).permutation(500)
    paid = np.zeros(len(AIMS))
    for choosing, reporting in ((order[:250], order[250:]), (order[250:], order[:250])):
        seen, fresh = trace.rows(torch.from_numpy(choosing)), trace.rows(torch.from_numpy(reporting))
        full = float((simulate(Fixed(exit=2), seen).labels_N == seen.labels_N).double().mean())
        outcomes = [simulate(policy, seen) for policy in line]
        drops = [full - float((one.labels_N == seen.labels_N).double().mean()) for one in outcomes]
        smooth = isotonic_regression(drops).x
        for place, aim in enumerate(AIMS):
            met = [step for step in range(3) if (smooth[step] * 250 + 1) / 251 <= aim + 1e-12]
            paid[place] += float(simulate(line[met[-1]], fresh).cost_N.mean()) / 2 if met else 1 / 2
    np.testing.assert_allclose(found.lines[-1].cost_A.numpy(), paid, atol=1e-12)


def test_what_others_proposed_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero Time Waste answers as it was fitted on the rows that chose, at every exit."""
    monkeypatch.setattr(comparison, "rivals_for", rivals_for)
    monkeypatch.setattr(comparison, "RESAMPLES", 20)
    monkeypatch.setattr(comparison, "families_for", lambda rows: (ONE,))
    trace = oracle.bed(600, exits=3)
    found = compare(trace, {}, splits=1)
    names = [line.name for line in found.lines]
    assert {"agreement bonus .5", "accumulated confidence (BEEM)", "levels of classes"} < set(names)
    order, rows, paid = np.random.default_rng(0).permutation(600), read_rows(trace, (True,) * 3), np.zeros(len(AIMS))
    for part, other in ((order[:300], order[300:]), (order[300:], order[:300])):
        mine, fresh = rows.take(np.sort(part)), trace.rows(torch.from_numpy(np.sort(other)))
        for place, aim in enumerate(AIMS):
            reach = partial(within_drop, accuracy_full=float(mine.full_N.mean()), max_accuracy_drop=aim)
            choice = choose(mine, reach, fits(mine, families=(ONE,), first=1))
            if choice is None or choice.brings.cost_P[choice.step] >= 1:
                paid[place] += 0.5
                continue
            policy = choice.path.policy(choice.step, (True,) * 3, 3)
            assert policy.ensemble is not None
            assert [len(weight_E) for weight_E in policy.ensemble.weight_EE] == [0, 2, 3]
            paid[place] += float(simulate(policy, fresh).cost_N.mean()) / 2
    ztw = found.lines[names.index("ensembles at every exit (ZTW)")]
    np.testing.assert_allclose(ztw.cost_A.numpy(), paid, atol=1e-12)


def test_no_row_reports_on_a_path_that_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are known by their scores at the first exit."""
    fitted: list[set[float]] = []
    judged: list[set[float]] = []

    def scores(rows: Rows) -> set[float]:
        return set(rows.scores[Confidence].unit_KN[0].tolist())

    def fit(rows: Rows, grid_P: Floats | None) -> Steps:
        if grid_P is None:
            fitted.append(scores(rows))
        return ONE.fit(rows, grid_P)

    def spied(self: Steps, rows: Rows) -> np.ndarray:
        if len(rows.full_N) == 150 and len(judged) < 4:
            judged.append(scores(rows))
        return leaving(self, rows)

    leaving = Steps.leaving
    monkeypatch.setattr(comparison, "families_for", lambda rows: (Family("spy", fit),))
    monkeypatch.setattr(Steps, "leaving", spied)
    compare(oracle.bed(300, exits=3), {}, splits=2)
    assert len(fitted) == 16, "plain, ensemble at the end and everywhere, tempered"
    assert len(judged) == 4
    for chose, told in zip(fitted, judged, strict=False):
        assert len(chose) == len(told) == 150
        assert not chose & told
    assert fitted[0] == judged[1] != fitted[2]


def test_a_line_that_stands_still_on_the_drop_asked_for_is_read_at_its_cheap_end() -> None:
    for noise in (0.0, 1e-16, -1e-16):
        drop_A = np.array([0.005, 0.005 + noise, 0.005, 0.02])
        found = comparison._levels(drop_A, np.array([[0.9, 0.8, 0.7, 0.1]]), np.ones(1), np.array([0.005]), np.ones(1))
        assert found[0, 0] == pytest.approx(0.7, abs=1e-6)


def test_levels_lie_on_the_line_and_beyond_its_end_stay() -> None:
    full_X, drop_A = np.array([1.0, 8.0]), np.array([0.004, 0.002, 0.011])  # the first two are out of order: .003 both
    paid_XA = np.array([[0.8, 0.6, 0.4], [7.0, 5.0, 3.0]])
    found = comparison._levels(drop_A, paid_XA, full_X, np.array([0.0015, 0.007, 0.011, 0.012]), np.array([0.5] * 4))
    assert found[0].tolist() == pytest.approx([0.9, 0.5, 0.4, 0.4], abs=1e-6)
    assert found[1].tolist() == pytest.approx([7.5, 4.0, 3.0, 3.0], abs=1e-5)
    assert found[2].tolist() == pytest.approx([-0.007] * 4, abs=1e-6)
    costs = np.array([0.3, 0.4, 0.9, 1.0])
    gains = comparison._levels(drop_A, paid_XA, full_X, np.zeros(4), costs)[2]
    assert gains.tolist() == pytest.approx([-0.011, -0.011, -0.0015, 0.0], abs=1e-6)
    gaining = comparison._levels(np.array([-0.01, 0.01]), paid_XA[:, 1:], full_X, np.array([0.0]), np.array([0.9]))
    assert gaining[:, 0].tolist() == pytest.approx([0.5, 4.0, 0.01], abs=1e-5)


def test_resampled_means_scatter_as_means_do() -> None:
    trace = oracle.bed(1000, exits=3)
    right_AN = (trace.logits_ENC[:2].argmax(2) == trace.labels_N).double().numpy()
    full_N = (trace.logits_ENC[2].argmax(1) == trace.labels_N).double().numpy()
    reported = comparison._Reported(right_AN, right_AN[None] / 2)
    draws = [draw for block in comparison._resampled([reported, reported], full_N, 500, 0) for draw in block]
    assert len(draws) == 500
    drop_RA = np.stack([drop_FA[0] for drop_FA, _ in draws])
    assert all((drop_FA[0] == drop_FA[1]).all() for drop_FA, _ in draws), "the same rows for all"
    lost_AN = full_N - right_AN
    np.testing.assert_allclose(drop_RA.mean(0), lost_AN.mean(1), atol=0.003)
    np.testing.assert_allclose(drop_RA.std(0), lost_AN.std(1) / math.sqrt(1000), rtol=0.12)
    paid_RA = np.stack([paid_FXA[1, 0] for _, paid_FXA in draws])
    np.testing.assert_allclose(paid_RA.std(0), right_AN.std(1) / 2 / math.sqrt(1000), rtol=0.12)


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = oracle.bed(400, exits=3)
    whole = compare(trace, {}, splits=1)
    monkeypatch.setattr(comparison, "CHUNK_ELEMENTS", 700)
    for one, other in zip(whole.differences, compare(trace, {}, splits=1).differences, strict=True):
        assert (one.low, one.high, one.p) == pytest.approx((other.low, other.high, other.p), abs=1e-6)


def test_what_is_the_same_is_not_different_and_what_is_better_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "families_for", lambda rows: (ONE, Family("twin", ONE.fit)))
    monkeypatch.setattr(comparison, "RESAMPLES", 2000)
    trace = oracle.bed(1500)
    found = compare(trace, {"oracle": [Oracle()], "last but one": [Fixed(exit=3)]}, splits=2)
    for what in ("cost", "accuracy"):
        twin = of(found, "twin", what)
        assert (twin.value, twin.low, twin.high, twin.p, twin.real) == (0, 0, 0, 1, False)
    best = of(found, "oracle", "cost")
    assert best.real
    assert best.high < 0
    assert found.oracle_cost == pytest.approx(best.level, abs=1e-9)
    assert found.oracle_drop < 0
    # A line that never gets cheap enough is not tried.
    assert math.isnan(of(found, "last but one", "accuracy").value)
    tried = [one for one in found.differences if one.name != ONE.name and not math.isnan(one.p)]
    assert len(tried) == 2 * (6 * 2 + 1), "cost and accuracy of twin, 2 ensembles, 2 tempered, oracle; cost of the last"
    assert found.verdict().startswith(f"{len(tried)} differences to 'one confidence threshold' were tried")
    assert "Really different in cost at a 1.00% drop: dearer: last but one; cheaper: oracle." in found.verdict()
    assert "default" in str(found)


def test_a_difference_that_is_chance_is_seldom_called_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families that err alike, by noise of their own: over draws of rows, few differences are called real."""
    monkeypatch.setattr(comparison, "RESAMPLES", 300)

    def noisy(seed: int) -> Family:
        def fit(rows: Rows, grid_P: Floats | None) -> Steps:
            path = ONE.fit(rows, grid_P)

            def unit(others: Rows) -> Floats:
                unit_KN = path.unit(others)
                noise_KN = np.modf(unit_KN * 1e6 * (seed + 1))[0]  # a row's own, and the same whoever looks
                return np.clip(unit_KN + 0.1 * (noise_KN - 0.5), 0, 1)

            return Steps(grid_P=path.grid_P, bar_PK=path.bar_PK, unit=unit, make=path.make)

        return Family(f"noise {seed}", fit)

    monkeypatch.setattr(comparison, "families_for", lambda rows: (noisy(0), noisy(1), noisy(2)))

    def noisy_differences(seed: int) -> Sequence[Difference]:
        return compare(oracle.bed(800, exits=3, seed=seed), {}, splits=1).differences

    wrong = sum(
        any(one.real and one.name in ("noise 1", "noise 2") for one in noisy_differences(seed)) for seed in range(20)
    )
    assert wrong <= 4


class Half:
    """A clock for which every exit takes half of the time that its macs suggest, in units of 3 ms."""

    full_ms = 3.0

    def timed(self, trace: Trace) -> Trace:
        return Trace(logits_ENC=trace.logits_ENC, labels_N=trace.labels_N, cost_E=trace.cost_E / 2)


def test_milliseconds_are_compared_where_a_clock_is_given() -> None:
    found = compare(oracle.bed(400), {"first": [Fixed(exit=0)]}, splits=1, clock=Half())
    for line in found.lines:
        assert line.ms_A is not None
        torch.testing.assert_close(line.ms_A, 1.5 * line.cost_A)
    one, ms = of(found, ONE.name, "cost"), of(found, ONE.name, "ms")
    assert (ms.level, ms.value, ms.low) == pytest.approx((1.5 * one.level, 1.5 * one.value, 1.5 * one.low))
    assert " ms " in str(found)
    assert compare(oracle.bed(400), {}, splits=1).lines[0].ms_A is None


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_slow_one(seed: int) -> None:
    p = np.random.default_rng(seed).choice([0.001, 0.004, 0.01, 0.02, 0.05, 0.4, math.nan], size=(3, 4))
    tried = sorted(value for value in p.flat if not math.isnan(value))
    # Adjusted p-values by definition: the largest so far of (how many are left) * p.
    adjusted = {
        value: max((len(tried) - rank) * other for rank, other in enumerate(tried) if rank <= tried.index(value))
        for value in tried
    }
    expected = [[adjusted.get(value, 1.0) <= 0.05 for value in row] for row in p.tolist()]
    assert holm(p, 0.05).tolist() == expected


def test_usual_policies_go_from_dear_to_cheap() -> None:
    trace = oracle.bed(300)
    for name, line in usual_policies(trace).items():
        costs = [float(simulate(policy, trace).cost_N.mean()) for policy in line]
        assert costs == sorted(costs, reverse=True), name
        assert costs[0] > 0.9
    found = compare(trace, splits=1)
    assert [line.name for line in found.lines[6:]] == list(usual_policies(trace))


@pytest.mark.parametrize(
    ("rows", "exits", "choices", "sentence"),
    [
        (199, 3, {}, "200 in all, 199 found"),
        (300, 1, {}, "nobody can leave early"),
        (300, 3, {"enabled_E": (False, False, True)}, "nobody can leave early"),
        (300, 3, {"max_accuracy_drops": (0.5,)}, "0.03 at most; found"),
        (300, 3, {"max_accuracy_drops": ()}, "0.03 at most; found"),
        (300, 3, {"splits": 0}, "splits counts random halvings, from 1; found 0"),
        (300, 3, {"enabled_E": (True,)}, "3 exits need 3"),
    ],
)
def test_what_cannot_be_compared(rows: int, exits: int, choices: dict[str, Sequence[float]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare(oracle.bed(rows, exits=exits), **choices)  # type: ignore[arg-type]


def test_the_verbs_leave_tables_files_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.bed(400, exits=3).save(tmp_path / "t" / "trace.safetensors")
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    facts = {"backend": "torch", "batch_size": 1, "full_ms": 2.0, "reach_ms": [0.5, 1, 2.2], "own_ms": [0.1, 0.1, 0]}
    (tuned / "run.json").write_text(json.dumps({"verb": "tune", "results": facts}))
    words = ["compare", "--trace", str(tmp_path / "t"), "--splits", "1", "--tuned", str(tuned)]
    main([*words, "--max-accuracy-drops", "0.01", "--out", str(tmp_path / "c")])
    said = capsys.readouterr().out.strip().splitlines()
    last = json.loads(said[-1])
    assert last["verb"] == "compare"
    assert last["cost at 0.01"][ONE.name] < 0.9
    assert 0.4 < last["ms at 0.01"][ONE.name] < 2.2
    assert any(line.startswith("at a drop of 1.00%") for line in said)
    about = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert len(about["lines"]) == 9
    assert len(about["lines"][0]["drop_A"]) == len(AIMS)
    assert {one["what"] for one in about["differences"]} == {"cost", "ms", "accuracy"}
    for name in ("compare.svg", "compare_ms.svg"):
        assert (tmp_path / "c" / name).read_text().startswith("<svg")
    main(["reliability", "--trace", str(tmp_path / "t"), "--out", str(tmp_path / "r")])
    said = capsys.readouterr().out.strip().splitlines()
    assert json.loads(said[-1])["exits"] == ["exit0", "exit1", "full"]
    about = json.loads((tmp_path / "r" / "reliability.json").read_text())
    assert len(about["after"]["count_EK"][0]) == 15
    (tuned / "run.json").write_text(json.dumps({"verb": "tune", "results": {}}))
    with pytest.raises(SystemExit):
        main(words)
    assert "is not a folder of `sdn tune`" in capsys.readouterr().err


def test_the_examples_run() -> None:
    oracle.run_examples(comparison, "comparison")


def test_so_many_are_drawn_that_any_number_of_differences_can_be_real(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, resampled = [], comparison._resampled

    def noted(found: Any, full_N: Any, times: int, seed: int) -> Any:
        drawn.append(times)
        return resampled(found, full_N, 10, seed)

    monkeypatch.setattr(comparison, "_resampled", noted)
    found = compare(oracle.bed(300, exits=3), {}, splits=1, max_accuracy_drops=[0.0005 * i for i in range(1, 41)])
    tried = sum(difference.name != found.default for difference in found.differences)
    assert 2 / (drawn[0] + 1) <= LEVEL / tried
