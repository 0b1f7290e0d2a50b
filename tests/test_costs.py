"""Costs on paper: counted, and the same wherever they are told."""

from __future__ import annotations

from functools import cache
from typing import Literal

import pytest
import torch

import shallowdeep as sd
from nets import ZOO, images, planned
from shallowdeep.costs import costs_of, feeds, own_costs, table_of
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.walking import policy_costs


@cache
def made(classifier: Literal["strong", "paper"]) -> ShallowDeepNetwork:
    return sd.attach(ZOO["residual"].make(), planned("residual", classifier))


@pytest.mark.parametrize("classifier", ["paper", "strong"])
def test_costs_are_those_of_the_plan(classifier: Literal["strong", "paper"]) -> None:
    sdn = made(classifier)
    costs = costs_of(sdn)
    own = torch.tensor(costs.own_macs_E, dtype=torch.float64)
    before = torch.tensor(costs.before_macs_E, dtype=torch.float64)
    torch.testing.assert_close((before + own.cumsum(0)) / costs.total_macs, torch.tensor(sdn.plan.cost_E).double())
    torch.testing.assert_close(own_costs(sdn), own / costs.total_macs)
    assert costs.own_macs_E[-1] == costs.params_E[-1] == 0
    assert costs.before_macs_E[-1] == costs.total_macs
    assert sum(costs.params_E) == sum(p.numel() for p in sdn.classifiers.parameters())
    assert costs.total_params == sum(p.numel() for p in sdn.backbone.parameters())


def test_who_feeds_whom() -> None:
    exits = made("strong").num_exits
    expected = torch.zeros(exits, exits, dtype=torch.bool)
    for e in range(exits - 2):
        expected[e, e + 1] = True
    assert torch.equal(feeds(made("strong")), expected)
    assert not feeds(made("paper")).any(), "the paper's hear nobody"


def test_skipping_an_exit_saves_only_what_nobody_needs() -> None:
    def paid(classifier: Literal["strong", "paper"]) -> list[float]:
        sdn = made(classifier)
        trace = sd.collect(sdn, (images(6), torch.zeros(6, dtype=torch.int64)))
        only_second = tuple(e == 1 for e in range(trace.num_exits))
        return [float(policy_costs(trace, only_second)[1]), float(trace.cost_E[1]), float(own_costs(sdn)[0])]

    skipped, everything, first = paid("paper")
    assert skipped == pytest.approx(everything - first, abs=1e-12)
    skipped, everything, first = paid("strong")
    assert first > 0
    assert skipped == pytest.approx(everything, abs=1e-12), "the first feeds the second"


def test_costs_as_text() -> None:
    lines = table_of(costs_of(made("paper"))).split("\n")
    assert len(lines) == 2 + made("paper").num_exits
    assert lines[-1].split()[0] == "full"
    assert lines[-1].split()[2] == "1.000"
