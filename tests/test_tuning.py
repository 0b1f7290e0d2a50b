"""Tuning: seconds decide which exits are asked, and an aim is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shallowdeep as sd
from nets import ZOO, images, planned
from shallowdeep import tuning
from shallowdeep.policies import Confidence, Fixed
from shallowdeep.timing import Paired, threads_of_torch
from shallowdeep.tuning import MachineCosts, machine_costs, tune
from shallowdeep.types import DataError, Trace

SDN = sd.attach(ZOO["residual"].make(), planned("residual")).eval()


def a_trace(feeds: bool) -> Trace:
    """Five exits, 2,000 rows: exit 0 knows nothing, 1 and 3 are sure of half, 2 is exit 1 again; the last is right."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(0, 5, (2000,), generator=generator)
    right_NC = torch.nn.functional.one_hot(labels_N, 5).float()
    sure_N1 = torch.where(torch.rand(2000, 1, generator=generator) < 0.5, 9.0, 0.1)
    noise_NC = 0.1 * torch.randn(2000, 5, generator=generator)
    half_NC = sure_N1 * right_NC + noise_NC
    own_noise_NC = 0.1 * torch.randn(2000, 5, generator=generator)  # to agree with it must say nothing
    logits_ENC = torch.stack([own_noise_NC, half_NC, half_NC, half_NC + noise_NC, 9 * right_NC])
    feeds_EE = torch.zeros(5, 5, dtype=torch.bool)
    for exit in range(3):
        feeds_EE[exit, exit + 1] = feeds
    return Trace(
        logits_ENC=logits_ENC,
        labels_N=labels_N,
        cost_E=torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]),
        own_cost_E=torch.zeros(5),
        feeds_EE=feeds_EE,
    )


def costs_where_asking_costs(own: float) -> MachineCosts:
    own_ms_E = torch.tensor([own] * 4 + [0.0], dtype=torch.float64)
    reach_ms_E = torch.tensor([2.0, 4.0, 6.0, 8.0, 10.0], dtype=torch.float64) + own_ms_E.cumsum(0)
    return MachineCosts(backend="torch", batch_size=1, full_ms=10.0, reach_ms_E=reach_ms_E, own_ms_E=own_ms_E)


def test_exits_that_cost_more_than_they_save_are_not_asked() -> None:
    tuned = tune(SDN, a_trace(feeds=False), costs_where_asking_costs(0.5), max_accuracy_drop=0.01)
    assert tuned.policy.asks(5, 4) == (False, True, False, False, True)
    assert tuned.expected_time == pytest.approx(0.5 * 0.45 + 0.5 * 1.05, abs=0.04)
    assert tuned.plan is None


def test_where_no_exit_pays_the_full_network_runs() -> None:
    tuned = tune(SDN, a_trace(feeds=False), costs_where_asking_costs(8.0), max_accuracy_drop=0.01)
    assert tuned.policy == Fixed(exit=4)
    assert tuned.expected_time == 1.0


def test_exits_that_feed_others_are_paid_for_or_planned_away() -> None:
    tuned = tune(SDN, a_trace(feeds=True), costs_where_asking_costs(0.5), max_accuracy_drop=0.01)
    assert tuned.policy.asks(5, 4)[1:] == (True, False, False, True)
    assert tuned.expected_time == pytest.approx(0.5 * 0.5 + 0.5 * 1.1, abs=0.04), "exit 0 runs for exit 1"
    assert tuned.expected_time > tuned.plan_time + 0.02
    assert tuned.plan is not None
    assert [cut.name for cut in tuned.plan.cuts] == [SDN.plan.cuts[1].name]
    assert tuned.plan_time == pytest.approx(0.75, abs=0.04)


def test_certified_afterwards_on_other_rows() -> None:
    trace = a_trace(feeds=False)
    policy = tune(SDN, trace.rows(slice(0, 1000)), costs_where_asking_costs(0.5), max_accuracy_drop=0.01).policy
    assert isinstance(policy, Confidence)
    other = trace.rows(slice(1000, 2000))
    certified = sd.calibrate(other, max_accuracy_drop=0.02, confidence=0.95, enabled_E=policy.enabled_E)
    assert certified.asks(5, 4) == policy.asks(5, 4)


def test_this_machine_is_measured() -> None:
    costs = machine_costs(SDN, backend="torch", batch_size=4, inputs=images(4), rounds=2)
    exits = SDN.num_exits
    assert costs.full_ms > 0
    assert costs.reach_ms_E.shape == (exits,)
    assert bool((costs.reach_ms_E.diff() >= 0).all())
    assert float(costs.own_ms_E[-1]) == 0.0
    trace = dataclasses.replace(a_trace(feeds=False), cost_E=torch.ones(5) / 2)
    assert float(costs.timed(trace).cost_E[-1]) == pytest.approx(float(costs.reach_ms_E[-1]) / costs.full_ms)


def test_pytorch_has_the_threads_asked_for_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = tuning.compare
    monkeypatch.setattr(tuning, "compare", lambda *a, **k: seen.append(torch.get_num_threads()) or real(*a, **k))
    with threads_of_torch(2):
        machine_costs(SDN, backend="torch", threads=1, batch_size=4, inputs=images(4), rounds=1)
        assert torch.get_num_threads() == 2
    assert seen == [1]


def test_what_asking_adds_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SDN.num_exits - 1
    every_and_whole = Paired(a_ms=40.0 + 8 * full, b_ms=40.0, ratio=1.2, ratio_low=1.2, ratio_high=1.2)
    monkeypatch.setattr(tuning, "compare", lambda a, b, rounds: every_and_whole)
    costs = machine_costs(SDN, backend="torch", batch_size=4, inputs=images(4), rounds=1)
    assert costs.full_ms == 10
    assert costs.own_ms_E.tolist() == pytest.approx([2.0] * full + [0.0])
    assert float(costs.reach_ms_E[full]) == pytest.approx(10 + 2 * full)


def test_costs_of_other_exits() -> None:
    looked = dataclasses.replace(a_trace(feeds=False), full_exit=3)
    more = dataclasses.replace(
        looked,
        logits_ENC=looked.logits_ENC[:4],
        cost_E=looked.cost_E[:4],
        own_cost_E=None,
        feeds_EE=None,
        exit_names=(),
    )
    with pytest.raises(DataError, match="The costs are of 5 exits, the trace of 4: measure with the second look"):
        tune(SDN, more, costs_where_asking_costs(0.5), max_accuracy_drop=0.01)
    with pytest.raises(ValueError, match="batch_size and rounds are at least 1, found 0 and 5"):
        machine_costs(SDN, batch_size=0)
