"""What a rival's path says of its steps is what its policies do, and levels are those of the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import oracle
from shallowdeep.calibration import evaluate
from shallowdeep.families import FAMILIES, Family
from shallowdeep.paths import brings_of, read_rows
from shallowdeep.policies import Accumulated, PerClass, Score
from shallowdeep.rivals import SHRUNK, rivals_for
from shallowdeep.types import Trace


def trace_of(full_exit: int = -1) -> Trace:
    trace = oracle.bed(400, exits=4, full_exit=full_exit)
    trace.logits_ENC[1, ::50, 0] = math.nan
    return trace


def family(place: int, trace: Trace) -> Family:
    return rivals_for(read_rows(trace, (True,) * 4))[place]


@pytest.mark.parametrize("full_exit", [-1, 2], ids=["plain", "second look"])
@pytest.mark.parametrize(("place", "kind"), [(0, Score), (1, Accumulated), (2, PerClass)])
def test_a_path_brings_what_its_policies_do(place: int, kind: type, full_exit: int) -> None:
    trace = trace_of(full_exit)
    rows, asked = read_rows(trace, (True,) * 4), (True,) * 4
    path = family(place, trace).fit(rows, None)
    brings = brings_of(path.leaving(rows), rows, path.steps)
    for step in (0, 80, 200, 330, path.steps - 1):
        policy = path.policy(step, asked, 4)
        assert isinstance(policy, kind)
        found = evaluate(policy, trace)
        assert found.mean_cost == pytest.approx(brings.cost_P[step])
        assert found.accuracy_early_exit == pytest.approx(brings.accuracy_P[step])
    assert brings.cost_P[0] > brings.cost_P[200] > brings.cost_P[-1]
    again = family(place, trace).fit(rows, path.grid_P)
    np.testing.assert_array_equal(again.bar_PK, path.bar_PK)


def test_everybody_leaves_at_the_last_step_where_scores_are_below_minus_one() -> None:
    rows = read_rows(oracle.bed(300, exits=3), (True,) * 3)
    for one in (rivals_for(rows)[0], next(found for found in FAMILIES if found.name == "learned score")):
        path = one.fit(rows, None)
        assert path.unit(rows).min() < -1
        assert (path.leaving(rows)[0] < path.steps).all()


def test_a_class_that_is_often_harmful_has_to_be_surer() -> None:
    trace = oracle.bed(2000, exits=3, classes=3)
    said_EN = trace.logits_ENC.argmax(2)
    odd_N = (said_EN[0] == 0) & (said_EN[2] != 0)
    labels_N = torch.where(odd_N, said_EN[2], torch.where(said_EN[0] == 0, trace.labels_N, said_EN[0]))
    spoiled = Trace(logits_ENC=trace.logits_ENC, labels_N=labels_N, cost_E=trace.cost_E)
    rows = read_rows(spoiled, (True,) * 3)
    path = rivals_for(rows)[2].fit(rows, None)
    policy = path.policy(200, (True,) * 3, 3)
    assert isinstance(policy, PerClass)
    assert policy.threshold_C[0] > max(policy.threshold_C[1:])
    harm_KN, said_KN = rows.right_LN[-1] & ~rows.right_LN[:-1], said_EN[:2].numpy()
    usual = (harm_KN.sum() + 1) / (harm_KN.size + 2)
    level = [
        -math.log((sum(harm_KN[said_KN == c]) / usual + SHRUNK) / (int((said_KN == c).sum()) + SHRUNK))
        for c in range(3)
    ]
    odds = np.log(policy.threshold_C) - np.log1p(-np.array(policy.threshold_C))
    assert odds + level == pytest.approx(np.full(3, (odds + level)[0]))
