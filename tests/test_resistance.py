"""Efficacy, behaviour and suspicion against slow loops written from their definitions."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from sklearn.metrics import auc, roc_auc_score

from shallowdeep import resistance as module
from shallowdeep.policies import Confidence, Policy
from shallowdeep.resistance import efficacy, mean_log_odds, resistance, suspicion
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

COST = torch.tensor([0.2, 0.5, 0.9, 1.1], dtype=torch.float64)


def trace(rows: int, scale: float, seed: int) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(4, rows, 3, generator=generator, dtype=torch.float64)
    return Trace(logits_ENC=logits, labels_N=torch.randint(3, (rows,), generator=generator), cost_E=COST)


def test_efficacy_is_the_area_under_the_exits() -> None:
    share = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    answered = [0, 0.1, 0.5, 0.8, 1.0]
    assert efficacy(share, COST) == pytest.approx(auc([0, *(COST / 1.1).tolist()], answered))
    assert efficacy(torch.tensor([0.0, 0, 0, 1]), COST) == pytest.approx((1.1 - 0.9) / 1.1 / 2)
    assert efficacy(torch.tensor([1.0, 0, 0, 0]), COST) > efficacy(torch.tensor([0.0, 1, 0, 0]), COST)


@pytest.mark.parametrize("policy", [Confidence(threshold=0.7), Confidence(threshold=0.7, enabled_E=(True, False) * 2)])
def test_mean_log_odds_of_the_exits_passed(policy: Policy) -> None:
    rows = trace(50, 2.0, seed=0)
    outcome = simulate(policy, rows)
    asked = policy.asks(4, 3)
    found = mean_log_odds(rows, outcome, torch.tensor(asked))
    for n in range(50):
        passed = [e for e in range(int(outcome.exit_N[n]) + 1) if asked[e]]
        odds = []
        for exit in passed:
            p = float(torch.softmax(rows.logits_ENC[exit, n], 0)[outcome.labels_N[n]])
            odds.append(math.log(p / (1 - p)))
        assert float(found[n]) == pytest.approx(sum(odds) / len(odds))


def test_behaviour_and_scores_of_each_kind() -> None:
    clean, slow = trace(200, 4.0, seed=1), trace(100, 1.0, seed=2)
    policy = Confidence(threshold=0.9)
    found = resistance(policy, clean, {"slow": slow, "same": clean})
    outcome = simulate(policy, slow)
    assert found.found["slow"].mean_cost == pytest.approx(float(outcome.cost_N.mean()))
    assert found.found["slow"].accuracy == pytest.approx(float((outcome.labels_N == slow.labels_N).double().mean()))
    assert found.found["slow"].mean_cost > found.found["clean"].mean_cost
    assert found.found["slow"].efficacy < found.found["clean"].efficacy
    assert torch.equal(found.found["same"].share_E, found.found["clean"].share_E)
    usual, odd = suspicion(policy, clean), suspicion(policy, slow)
    for score, value in found.told["slow"].items():
        both = torch.cat([usual[score], odd[score]])
        assert value == pytest.approx(roc_auc_score([0] * 200 + [1] * 100, both))
        assert found.told["same"][score] == pytest.approx(0.5)
    assert found.told["slow"]["cost"] > 0.6
    assert "slow" in str(found)
    assert "mean log-odds, all exits" in str(found)


def test_a_trace_of_one_exit() -> None:
    one = Trace(logits_ENC=torch.eye(2)[None], labels_N=torch.tensor([0, 1]), cost_E=torch.tensor([1.0]))
    found = resistance(Confidence(threshold=0.9), one, {"same": one})
    assert found.found["same"].mean_cost == 1.0
    assert efficacy(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5
    assert "AUROC" not in str(resistance(Confidence(threshold=0.9), one, {}))


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
