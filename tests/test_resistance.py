"""Efficacy, behaviour and suspicion against slow loops written from their definitions."""

from __future__ import annotations

import doctest

import pytest
import torch
from sklearn.metrics import auc, roc_auc_score

from shallowdeep import resistance as module
from shallowdeep.alarming import fit_alarm, suspicions
from shallowdeep.policies import Confidence
from shallowdeep.resistance import FALSE_ALARMS, efficacy, resistance
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


def test_behaviour_and_scores_of_each_kind() -> None:
    clean, slow = trace(200, 4.0, seed=1), trace(100, 1.0, seed=2)
    policy = Confidence(threshold=0.9)
    alarm = fit_alarm(trace(300, 4.0, seed=3), policy)
    found = resistance(policy, clean, {"slow": slow, "same": clean}, alarm)
    outcome = simulate(policy, slow)
    assert found.found["slow"].mean_cost == pytest.approx(float(outcome.cost_N.mean()))
    assert found.found["slow"].accuracy == pytest.approx(float((outcome.labels_N == slow.labels_N).double().mean()))
    assert found.found["slow"].mean_cost > found.found["clean"].mean_cost
    assert found.found["slow"].efficacy < found.found["clean"].efficacy
    assert torch.equal(found.found["same"].share_E, found.found["clean"].share_E)
    usual, odd = ({"cost": simulate(policy, rows).cost_N, **suspicions(rows, policy, alarm)} for rows in (clean, slow))
    assert found.told["slow"].keys() == usual.keys() >= {"cost", "alarm", "confusion", "log-odds"}
    for score, one in found.told["slow"].items():
        both = torch.cat([usual[score], odd[score]])
        assert one.auroc == pytest.approx(roc_auc_score([0] * 200 + [1] * 100, both))
        bar = sorted(usual[score].tolist())[189]  # ten of the 200 clean rows lie above, if none are equal
        assert one.caught == pytest.approx(sum(value > bar for value in odd[score].tolist()) / 100)
        assert found.told["same"][score].auroc == pytest.approx(0.5)
        assert found.told["same"][score].caught <= FALSE_ALARMS
    assert found.told["slow"]["cost"].auroc > 0.6
    assert max(one.caught for one in found.told["slow"].values()) > 2 * FALSE_ALARMS
    assert "slow" in str(found)
    assert f"{found.told['slow']['alarm'].caught:.1%}" in str(found)


def test_a_trace_of_one_exit() -> None:
    one = Trace(logits_ENC=torch.eye(2)[None], labels_N=torch.tensor([0, 1]), cost_E=torch.tensor([1.0]))
    found = resistance(Confidence(threshold=0.9), one, {"same": one})
    assert found.found["same"].mean_cost == 1.0
    assert efficacy(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5
    assert "AUROC" not in str(resistance(Confidence(threshold=0.9), one, {}))


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
