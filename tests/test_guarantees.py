"""Certificates hold in as many draws as they say, tested rows never choose, and what cannot be proved is not."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from shallowdeep import guarantees
from shallowdeep.bounds import betting_pvalues
from shallowdeep.calibration import calibrate, evaluate
from shallowdeep.families import FAMILIES, Family, fit_ensemble
from shallowdeep.guarantees import Aim, losses, parts_of, worst_so_far
from shallowdeep.paths import Rows, along, answering, read_rows
from shallowdeep.policies import CalibrationRecord, Fixed, Policy
from shallowdeep.thresholds import Fit, fits
from shallowdeep.types import DataError, Trace
from shallowdeep.walking import simulate

EVERYTHING = (True,) * 5
RISKS = ("drop", "harm", "disagreement", "error", "brier")


@pytest.fixture(scope="module")
def population() -> Trace:
    return dataclasses.replace(oracle.bed(4000, exits=5), hash_N=None)


@pytest.fixture
def few_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that are fitted quickly, where many draws are made."""

    def quick(rows: Rows, *, ensembles: bool) -> tuple[Fit, ...]:
        return fits(rows, families=(FAMILIES[0], FAMILIES[-1]), ensembles=False)

    monkeypatch.setattr(guarantees, "fits", quick)


def draw(trace: Trace, rows: int, seed: int) -> Trace:
    return trace.rows(torch.from_numpy(np.random.default_rng(seed).integers(trace.num_samples, size=rows)))


def quietly(trace: Trace, **targets: object) -> Policy:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate(trace, **targets)


def one_row_at_a_time(policy: Policy, trace: Trace, risk: str) -> list[float]:
    """The losses from their definition."""
    out, found = oracle.walk(policy, trace), []
    for n in range(trace.num_samples):
        truth = int(trace.labels_N[n])
        full_logits = trace.logits_ENC[trace.full_exit, n].double().tolist()
        full, label = oracle.best(full_logits), out["label"][n]
        both = oracle.softmax(full_logits), oracle.softmax(out["logits"][n])
        brier = [math.fsum((p - (c == truth)) ** 2 for c, p in enumerate(softmax)) / 2 for softmax in both]
        found.append(
            {
                "drop": float(full == truth) - float(label == truth),
                "harm": float(full == truth and label != truth),
                "disagreement": float(label != full),
                "error": float(label != truth),
                "brier": brier[1] - brier[0],
            }[risk]
        )
    return found


@pytest.mark.parametrize("mixed", [False, True], ids=["own answers", "ensemble"])
@pytest.mark.parametrize("risk", RISKS)
def test_losses_along_a_path_are_those_of_its_policies(risk: str, mixed: bool) -> None:
    trace = oracle.bed(300, exits=5, full_exit=3)
    rows = read_rows(trace, EVERYTHING)
    ensemble = fit_ensemble(rows) if mixed else None
    path = dataclasses.replace(FAMILIES[0].fit(answering(rows, ensemble), None), ensemble=ensemble)
    total_P = along(path.leaving(rows), losses(path, rows, risk), path.steps)
    for step in (0, 150, 230, path.steps - 1):
        slow = one_row_at_a_time(path.policy(step, EVERYTHING, 5), trace, risk)
        assert total_P[step] == pytest.approx(math.fsum(slow))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_familys_losses_are_what_its_policies_do(family: Family) -> None:
    trace = oracle.bed(600, exits=5)
    rows = read_rows(trace, EVERYTHING)
    path = family.fit(rows, None)
    total_P = along(path.leaving(rows), losses(path, rows, "drop"), path.steps)
    for step in (100, 200, 300):
        found = evaluate(path.policy(step, EVERYTHING, 5), trace)
        assert total_P[step] / 600 == pytest.approx(found.drop)


def test_losses_made_monotone_are_the_running_worst() -> None:
    trace = oracle.bed(200, exits=5)
    rows = read_rows(trace, EVERYTHING)
    path = next(family for family in FAMILIES if "free" in family.name).fit(rows, None)
    leaving_KN, loss_LN = path.leaving(rows), losses(path, rows, "drop")
    found_P = along(leaving_KN, worst_so_far(leaving_KN, loss_LN), path.steps)
    slow_PN = []
    for step in range(path.steps):
        stop_N = (leaving_KN > step).sum(0)
        now_N = loss_LN[stop_N, np.arange(200)]
        slow_PN.append(np.maximum(slow_PN[-1] if slow_PN else 0.0, now_N))
    assert found_P == pytest.approx(np.stack(slow_PN).sum(1))
    assert (np.diff(found_P) >= 0).all()
    assert (np.diff(along(leaving_KN, loss_LN, path.steps)) < 0).any(), "nothing was there to be made monotone"


@pytest.mark.parametrize(
    ("risk", "bound", "method"),
    [
        ("drop", 0.02, "auto"),
        ("drop", 0.03, "betting"),
        ("harm", 0.03, "ltt"),
        ("disagreement", 0.05, "ltt"),
        ("error", 0.08, "ltt"),
        ("brier", 0.03, "auto"),
    ],
)
def test_a_certificate_holds_in_as_many_draws_as_it_says(
    population: Trace, few_families: None, risk: str, bound: float, method: str
) -> None:
    """Draws from a known population; at delta .2, so that a test that errs too often is seen in 30 of them."""
    labels_N, full_NC = population.labels_N, torch.softmax(population.logits_ENC[4].double(), 1)
    full_N = full_NC.argmax(1)
    truth_NC = torch.nn.functional.one_hot(labels_N, full_NC.shape[1])
    broken, certified, costs = 0, 0, []
    for seed in range(30):
        targets = {"max_accuracy_drop": bound, "confidence": 0.8, "risk": risk, "method": method}
        policy = quietly(draw(population, 500, seed), **targets)
        outcome = simulate(policy, population)
        said_N, said_NC = outcome.labels_N, torch.softmax(outcome.logits_NC.double(), 1)
        loss_N = {
            "drop": (full_N == labels_N).double() - (said_N == labels_N).double(),
            "harm": (full_N == labels_N) & (said_N != labels_N),
            "disagreement": said_N != full_N,
            "error": said_N != labels_N,
            "brier": ((said_NC - truth_NC).square() - (full_NC - truth_NC).square()).sum(1) / 2,
        }[risk]
        broken += float(loss_N.double().mean()) > bound
        certified += policy.calibrated_on.certificate is not None
        costs.append(float(outcome.cost_N.mean()))
    assert broken <= 30 * 0.2 + 2.6 * math.sqrt(30 * 0.2 * 0.8)
    assert certified > 15
    assert np.mean(costs) < 0.85


def test_tested_rows_have_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen_on, tested_on = [], []
    true_fits, true_proved = guarantees.fits, guarantees._proved

    def fits_and_tell(rows: Rows, *, ensembles: bool) -> tuple[Fit, ...]:
        chosen_on.extend(rows.index_N)
        return true_fits(rows, ensembles=ensembles)

    def prove_and_tell(leaving_KN: np.ndarray, loss_LN: np.ndarray, *rest: object) -> int | None:
        tested_on.append(loss_LN.shape[1])
        return true_proved(leaving_KN, loss_LN, *rest)

    monkeypatch.setattr(guarantees, "fits", fits_and_tell)
    monkeypatch.setattr(guarantees, "_proved", prove_and_tell)
    trace = oracle.bed(801)
    policy = quietly(trace, max_accuracy_drop=0.03, confidence=0.9)
    parts = parts_of(trace, EVERYTHING)
    assert sorted([*parts.choosing, *parts.testing]) == list(range(801))
    assert chosen_on == parts.choosing.tolist()
    assert tested_on == [len(parts.testing)] == [policy.calibrated_on.certificate.tested_rows]


def test_tested_rows_move_nothing_but_the_step(population: Trace, few_families: None) -> None:
    """Whatever tested rows say, the policy lies on the path that the others fitted."""
    trace = draw(population, 1000, 0)
    parts = parts_of(trace, EVERYTHING)
    spoiled = trace.labels_N.clone()
    spoiled[parts.testing] = (spoiled[parts.testing] + 1) % 10
    honest = quietly(trace, max_accuracy_drop=0.05, confidence=0.9)
    policy = quietly(dataclasses.replace(trace, labels_N=spoiled), max_accuracy_drop=0.05, confidence=0.9)
    fit = next(fit for fit in parts.fits if fit.family == honest.calibrated_on.info["family"])
    on_path = [fit.path.policy(step, EVERYTHING, 5) for step in range(fit.path.steps)]
    assert honest in on_path
    assert policy in [*on_path, Fixed(exit=4)]


def test_expected_risk_is_kept_in_the_mean_over_draws(population: Trace, few_families: None) -> None:
    drops = []
    for seed in range(40):
        policy = quietly(draw(population, 400, seed), max_accuracy_drop=0.03, method="crc")
        drops.append(evaluate(policy, population).drop)
    assert np.mean(drops) <= 0.03
    assert np.mean(drops) > 0.0


def test_expected_risk_is_kept_where_the_only_step_gains_as_often_as_it_loses() -> None:
    """Its mean loss is .02. Taken whenever gains outweigh losses, and else the full network, it would lose .006."""
    rng, aim, drops = np.random.default_rng(0), Aim("drop", 0.003, None, "crc"), []
    for _ in range(300):
        loss_LN = np.stack([rng.choice([-1.0, 0.0, 1.0], 400, p=[0.24, 0.5, 0.26]), np.zeros(400)])
        step = guarantees._proved(np.zeros((1, 400), np.int64), loss_LN, aim, 0, 1)
        drops.append(0.0 if step is None else 0.02)
    assert np.mean(drops) <= 0.003


def test_expected_risk_is_kept_along_a_path_that_begins_with_the_full_network(population: Trace) -> None:
    """What gains, a second look or an ensemble, would lie between the full network and the path's first step."""
    looks = second_look(draw(population, 1500, 0))
    policy = quietly(looks, max_accuracy_drop=0.03, method="crc")
    assert policy.calibrated_on.certificate is not None
    assert not policy.asks(6, 4)[5]
    assert policy.ensemble is None
    assert quietly(looks, max_accuracy_drop=0.03, confidence=0.95).asks(6, 4)[5]


def second_look(trace: Trace) -> Trace:
    """``trace`` with one exit after the full one that mends half of what is wrong."""
    logits_NC = trace.logits_ENC[-1].clone()
    wrong_N = (logits_NC.argmax(1) != trace.labels_N) & (torch.arange(trace.num_samples) % 2 == 0)
    logits_NC[wrong_N] = 9.0 * torch.nn.functional.one_hot(trace.labels_N[wrong_N], 10).float()
    return dataclasses.replace(
        trace,
        logits_ENC=torch.cat([trace.logits_ENC, logits_NC[None]]),
        cost_E=torch.cat([trace.cost_E, trace.cost_E[-1:] + 1]),
        full_exit=4,
        exit_names=(),
    )


def test_no_loss_and_a_gain_are_proved_where_there_is_one(population: Trace) -> None:
    looks = second_look(population)
    drawn = draw(looks, 2500, 1)
    for bound in (0.0, -0.01):
        policy = quietly(drawn, max_accuracy_drop=bound, confidence=0.95)
        assert policy.calibrated_on.certificate.bound == bound
        found = evaluate(policy, looks)
        assert found.drop <= bound
        assert found.mean_cost < (1.0 if bound == 0 else 1.5)


LOOKS = Path(__file__).parents[1] / "results" / "trust" / "second-look" / "trace.safetensors"


def test_what_gains_is_proved_although_the_choosing_rows_prefer_another_family() -> None:
    """On the committed trace they prefer to look once, of which nothing is proved; the rule looks twice."""
    trace = Trace.load(LOOKS)
    asked = (True,) * trace.num_exits
    paths = guarantees._paths(parts_of(trace, asked), Aim("drop", 0.0, 0.05, "auto"))
    assert ["no second look" in choice.family for choice, _ in paths] == [True, False]
    assert sum(aim.delta or 0 for _, aim in paths) == pytest.approx(0.05)
    for bound in (0.0, -0.001, -0.002):
        policy = quietly(trace, max_accuracy_drop=bound, confidence=0.95)
        assert policy.asks(trace.num_exits, trace.full_exit)[-1]
        proved = policy.calibrated_on.certificate
        assert (proved.bound, proved.delta) == (bound, 0.05)
        assert proved.observed < -0.004


@pytest.mark.parametrize("rows", [500, 5000])
def test_exits_that_are_far_better_than_the_network_are_proved_to_be(rows: int) -> None:
    """More rows gain than the exact test of pairs counts; bets prove it, and more rows do not unprove it."""
    generator = torch.Generator().manual_seed(0)
    labels_N, noise_ENC = (
        torch.randint(0, 10, (rows,), generator=generator),
        torch.randn(2, rows, 10, generator=generator),
    )
    right_EN = torch.rand(2, rows, generator=generator) < torch.tensor([[0.85], [0.7]])
    said_EN = torch.where(right_EN, labels_N, (labels_N + 1) % 10)
    logits_ENC = 4.0 * torch.nn.functional.one_hot(said_EN, 10) + 0.5 * noise_ENC
    trace = Trace(logits_ENC=logits_ENC, labels_N=labels_N, cost_E=torch.tensor([0.5, 1.0]))
    for bound in (-0.02, 0.0, 0.02):
        policy = quietly(trace, max_accuracy_drop=bound, confidence=0.95)
        assert policy.calibrated_on.certificate is not None
        assert policy.calibrated_on.certificate.method == "betting"
        assert evaluate(policy, trace).mean_cost < (0.6 if rows == 5000 else 1.0)
        asked = quietly(trace, max_accuracy_drop=bound, confidence=0.95, method="ltt").calibrated_on.certificate
        assert asked is None or asked.method == "ltt"


@pytest.mark.parametrize("risk", ["harm", "disagreement"])
def test_a_second_look_is_left_out_where_it_could_only_lose(population: Trace, risk: Any) -> None:
    once = draw(population, 2500, 1)
    looked = quietly(second_look(once), max_accuracy_drop=0.03, confidence=0.95, risk=risk)
    plain = quietly(once, max_accuracy_drop=0.03, confidence=0.95, risk=risk)
    found, wanted = (policy.calibrated_on.certificate for policy in (looked, plain))
    assert found is not None
    assert (found.observed, looked.asks(6, 4)[5]) == (wanted.observed, False)
    assert evaluate(looked, second_look(once)).mean_cost == evaluate(plain, once).mean_cost


def test_betting_says_how_many_rows_it_takes(population: Trace) -> None:
    with pytest.warns(UserWarning, match=r"at least (\d+) rows in the part that tests") as said:
        calibrate(draw(population, 700, 0), max_accuracy_drop=0.005, confidence=0.95, method="betting")
    least = int(re.search(r"at least (\d+)", str(said[0].message))[1])
    assert 598 < least < 700
    for rows, proved in ((least, True), (least - 10, False)):
        assert bool(betting_pvalues(np.zeros((1, rows)), 0.005, 0.05, low=-1.0)[0] <= 0.05) is proved


def test_a_bound_that_no_rows_reach_is_refused_at_once(population: Trace) -> None:
    with pytest.warns(UserWarning, match=r"at least 2995732\d{3} rows in the part that tests"):
        calibrate(draw(population, 700, 0), max_accuracy_drop=1e-9, confidence=0.95, method="betting")


def test_impossible_wishes_get_a_sentence_and_no_certificate(population: Trace) -> None:
    few, many = draw(population, 20, 0), draw(population, 900, 0)
    wishes = [
        (few, {"max_accuracy_drop": 0.01}, r"at least 299 rows in the part that tests, 374 in all, where none of them"),
        (draw(population, 700, 0), {"max_accuracy_drop": 0.005}, r"598 .* 748 in all, .* none gains; there are 560"),
        (many, {"max_accuracy_drop": -0.2}, r"0\.2 of all rows more often right .* more rows would not help"),
        (many, {"max_accuracy_drop": 0.001, "risk": "error"}, r"at most 0\.10% of the rows get a wrong label"),
    ]
    for trace, wish, sentence in wishes:
        with pytest.warns(UserWarning, match=sentence):
            policy = calibrate(trace, confidence=0.95, **wish)
        assert policy == Fixed(exit=4)
        assert policy.calibrated_on.certificate is None
    with pytest.warns(UserWarning, match=r"at least 99 rows"):
        assert calibrate(few, max_accuracy_drop=0.01, method="crc").calibrated_on.certificate is None
    with pytest.raises(DataError, match="a trace needs labels"):
        dataclasses.replace(few, labels_N=None)


def test_a_split_promises_nothing(population: Trace) -> None:
    policy = quietly(draw(population, 900, 0), max_accuracy_drop=0.02, method="split")
    assert policy.calibrated_on.certificate is None
    assert "No statement" in policy.calibrated_on.info["note"]
    assert evaluate(policy, population).mean_cost < 1


def test_what_a_certificate_records(population: Trace) -> None:
    info = {"backend": "openvino", "precision": "torch.float32", "second_look": "mirror"}
    trace = dataclasses.replace(draw(population, 2000, 0), info=info)
    enabled = (True, False, True, True, True)
    policy = calibrate(trace, max_accuracy_drop=0.03, confidence=0.9, enabled_E=enabled)
    proved = policy.calibrated_on.certificate
    assert (proved.backend, proved.precision, proved.view) == ("openvino", "torch.float32", "")
    twice, aim = dataclasses.replace(trace, full_exit=3), Aim("drop", 0.0, 0.1, "ltt")
    assert guarantees.certificate_of(twice, (True,) * 5, aim, 0.0, 9).view == "mirror"
    once = guarantees.certificate_of(twice, (*(True,) * 4, False), aim, 0.0, 9)
    assert (once.view, once.exit_names) == ("", trace.exit_names[:4])
    assert (proved.rows, proved.tested_rows, proved.asked_E) == (2000, 1600, enabled)
    assert proved.exit_names == trace.exit_names
    assert proved.delta == 0.1
    testing = torch.from_numpy(parts_of(trace, enabled).testing)
    assert proved.observed == pytest.approx(evaluate(policy, trace.rows(testing)).drop)
    again = calibrate(dataclasses.replace(trace), max_accuracy_drop=0.03, confidence=0.9, enabled_E=enabled)
    assert again.calibrated_on == policy.calibrated_on
    other = dataclasses.replace(trace, labels_N=trace.labels_N.flip(0))
    assert quietly(other, max_accuracy_drop=0.5, confidence=0.9).calibrated_on.certificate.data_hash != proved.data_hash


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_trace_in_half_precision_is_certified(population: Trace, dtype: torch.dtype) -> None:
    trace = draw(population, 900, 0)
    half = dataclasses.replace(trace, logits_ENC=trace.logits_ENC.to(dtype))
    assert calibrate(half, max_accuracy_drop=0.05, confidence=0.9).calibrated_on.certificate is not None


def test_rows_trained_on_are_left_out(population: Trace) -> None:
    trace = draw(population, 1000, 0)
    trained = dataclasses.replace(trace, trained_N=torch.arange(1000) < 300)
    with pytest.warns(UserWarning, match=r"trained on 30.0% of these rows"):
        policy = calibrate(trained, max_accuracy_drop=0.05, confidence=0.9)
    assert policy.calibrated_on.certificate.tested_rows == 560
    assert min(parts_of(trained, EVERYTHING).testing) >= 300


def test_rows_that_taught_something_prove_nothing_about_it() -> None:
    trace = oracle.bed(400)
    assert trace.hash_N is not None
    few, many = (CalibrationRecord(hash_N=tuple(trace.hash_N[:n].tolist())) for n in (3, 5))
    assert guarantees.unseen(trace, None, "policy").all()
    assert guarantees.unseen(trace, few, "policy").nonzero()[0].tolist() == list(range(3, 400))
    with pytest.raises(ValueError, match=r"The policy has seen 1\.2% of these rows, so no bound would hold"):
        guarantees.unseen(trace, many, "policy")


def test_rows_that_are_there_twice_are_named() -> None:
    trace = oracle.bed(400)
    twice = trace.rows(torch.cat([torch.arange(400), torch.arange(100)]))
    with pytest.warns(UserWarning, match=r"20.0% of these rows are copies of others"):
        calibrate(twice, max_accuracy_drop=0.1, confidence=0.9)
    calibrate(trace, max_accuracy_drop=0.1, confidence=0.9)


def test_testing_starts_where_the_choosing_rows_are_surest(
    population: Trace, few_families: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, looks = list[int](), second_look(draw(population, 2000, 0))
    true_last = guarantees.last_proved

    def last_and_tell(passes_P: np.ndarray, start: int) -> int | None:
        starts.append(start)
        return true_last(passes_P, start)

    monkeypatch.setattr(guarantees, "last_proved", last_and_tell)
    quietly(draw(population, 2000, 0), max_accuracy_drop=0.02, confidence=0.95)
    policy = quietly(looks, max_accuracy_drop=-0.01, confidence=0.95)
    parts = parts_of(looks, (True,) * 6)
    brings = next(fit for fit in parts.fits if fit.family == policy.calibrated_on.info["family"]).brings
    gain_P = brings.accuracy_P - parts.choose_on.full_N.mean()
    differ_P = 2 * brings.harm_P + gain_P
    sure_P = (gain_P - 0.01) / np.sqrt(differ_P - gain_P**2 + 1 / (len(parts.choosing) + 1))
    assert starts == [0, int(sure_P.argmax())]


def test_a_family_with_one_step_beyond_the_truth_is_caught() -> None:
    """Exits that look sure and are wrong: the test sees it, although confidence does not."""
    trace = dataclasses.replace(oracle.bed(3000, exits=3, seed=2), hash_N=None)
    shifted = trace.logits_ENC.clone()
    shifted[0] = 50.0 * torch.nn.functional.one_hot((trace.labels_N + 1) % 10, 10).float()
    policy = quietly(dataclasses.replace(trace, logits_ENC=shifted), max_accuracy_drop=0.02, confidence=0.95)
    assert evaluate(policy, dataclasses.replace(trace, logits_ENC=shifted)).drop <= 0.02
