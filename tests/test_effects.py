"""Overthinking equals the count sample by sample; its fates are a partition; luck is taken out where truth is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import shallowdeep.effects as effects
from shallowdeep.effects import overthinking
from shallowdeep.policies import Oracle
from shallowdeep.types import Trace
from shallowdeep.walking import simulate


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5), st.integers(2, 5), st.integers(1, 30), st.integers(0, 4), st.integers(0, 10**6), st.booleans()
)
def test_it_is_the_slow_count(exits: int, classes: int, rows: int, full: int, seed: int, broken: bool) -> None:
    trace = oracle.random_trace(
        rows, exits=exits, classes=classes, seed=seed, full_exit=full % exits, broken=0.2 * broken
    )
    found, slow = overthinking(trace), oracle.fates(trace)
    assert found.first_correct_N.tolist() == slow["first"]
    assert found.cumulative_accuracy_E.tolist() == pytest.approx(slow["cumulative"])
    for name in ("early_and_kept", "early_and_spoiled", "only_at_the_end", "never", "oracle_cost"):
        assert getattr(found, name) == pytest.approx(slow[name])
    assert found.destructive_corrected == pytest.approx(slow["corrected"])


def test_the_laws_of_the_fates() -> None:
    trace = oracle.bed(3000, exits=6)
    found = overthinking(trace)
    assert found.early_and_kept + found.early_and_spoiled + found.only_at_the_end + found.never == pytest.approx(1)
    assert found.wasteful == pytest.approx(found.early_and_kept + found.early_and_spoiled)
    assert found.destructive == found.early_and_spoiled
    end = float(found.accuracy_E[-1])
    assert found.destructive == pytest.approx(float(found.cumulative_accuracy_E[-1]) - end)
    assert found.destructive_of_errors == pytest.approx(found.destructive / (1 - end))
    assert float(found.cumulative_accuracy_E[-1]) == pytest.approx(1 - found.never)
    assert (found.cumulative_accuracy_E.diff() >= 0).all()
    assert 0 < found.destructive_corrected < found.destructive


def test_the_oracle_policy_costs_what_is_said() -> None:
    trace = oracle.bed(500, exits=5, full_exit=3)
    found = overthinking(trace)
    assert found.oracle_cost == pytest.approx(float(simulate(Oracle(), trace).cost_N.mean()))
    assert found.wasted_cost == pytest.approx(1 - found.oracle_cost / float(trace.cost_E[3]))
    assert len(found.accuracy_E) == 4


def test_exits_behind_the_full_exit_are_not_read() -> None:
    trace = oracle.bed(300, exits=5, full_exit=3)
    cut = dataclasses.replace(trace, logits_ENC=trace.logits_ENC[:4], cost_E=trace.cost_E[:4], exit_names=())
    assert str(overthinking(trace)) == str(overthinking(cut))


def test_one_exit_and_no_errors() -> None:
    trace = Trace(logits_ENC=torch.eye(2)[None], labels_N=torch.tensor([0, 1]), cost_E=torch.ones(1))
    found = overthinking(trace)
    assert (found.wasteful, found.destructive, found.destructive_of_errors) == (0.0, 0.0, 0.0)
    assert (found.only_at_the_end, found.oracle_cost, found.wasted_cost) == (1.0, 1.0, 0.0)


def test_a_broken_answer_is_never_right() -> None:
    logits = torch.tensor([[[math.nan, 0.0]], [[0.0, math.nan]]])
    found = overthinking(Trace(logits_ENC=logits, labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.0])))
    assert (found.never, found.first_correct_N.item(), found.oracle_cost) == (1.0, -1, 1.0)


def knowing(samples: int, classes: int, ics: int, knows: float, copies: float, seed: int) -> Trace:
    """The full exit errs on 40 %; of those errors the ICs know a share, else they guess, often each other's guess."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    end = np.where(rng.random(samples) < 0.4, (labels + rng.integers(1, classes, size=samples)) % classes, labels)
    known = rng.random(samples) < knows
    said = rng.integers(classes, size=(ics, samples))
    for e in range(1, ics):
        said[e] = np.where(rng.random(samples) < copies, said[e - 1], said[e])
    said = np.where(known | (end == labels), labels, said)
    logits = torch.nn.functional.one_hot(torch.from_numpy(np.concatenate([said, end[None]])), classes).float()
    return Trace(logits_ENC=logits, labels_N=torch.from_numpy(labels), cost_E=torch.linspace(0.1, 1, ics + 1))


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("copies", [0.0, 0.8])
def test_guessing_exits_know_nothing(classes: int, copies: float) -> None:
    found = overthinking(knowing(20_000, classes, 6, 0.0, copies, seed=1))
    assert abs(found.destructive_corrected) < 0.012
    if classes <= 10:
        assert found.destructive_of_errors > 0.15


@pytest.mark.parametrize("copies", [0.0, 0.8])
@pytest.mark.parametrize("knows", [0.25, 0.6])
def test_what_exits_know_is_found(knows: float, copies: float) -> None:
    found = overthinking(knowing(20_000, 10, 6, knows, copies, seed=2))
    errors = 1 - float(found.accuracy_E[-1])
    assert found.destructive_corrected / errors == pytest.approx(knows, abs=0.02)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = oracle.bed(100)
    whole = str(overthinking(trace))
    monkeypatch.setattr(effects, "CHUNK_ELEMENTS", 70)
    assert str(overthinking(trace)) == whole


def test_the_table_says_it() -> None:
    text = str(overthinking(oracle.bed(200, exits=3)))
    assert text.splitlines()[0].split() == ["exit", "cost", "accuracy", "cumulative", "first", "right"]
    assert all(word in text for word in ("full", "wasteful", "destructive", "without luck", "oracle"))


def test_the_examples_run() -> None:
    oracle.run_examples(effects, "effects")
