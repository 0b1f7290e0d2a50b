"""Schedules: what they say at every corner."""

from __future__ import annotations

import pytest

from shallowdeep.rates import one_cycle, stepped


def test_steps_fall_at_the_milestones() -> None:
    assert [stepped(epoch, (2, 4), 0.5) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert stepped(10, ()) == 1
    assert stepped(3, (4, 2)) == stepped(3, (2, 4)) == 0.1


def test_the_papers_steps() -> None:
    """34 epochs at the base rate, 25, 25 and 16 at a tenth each: the original code steps before its epoch."""
    rates = [round(stepped(epoch, (34, 59, 84)), 9) for epoch in range(100)]
    assert [rates.count(rate) for rate in (1, 0.1, 0.01, 0.001)] == [34, 25, 25, 16]


def test_one_cycle_rises_then_falls_to_nothing() -> None:
    rise = [one_cycle(p / 1000) for p in range(101)]
    fall = [one_cycle(p / 1000) for p in range(100, 1001)]
    assert rise[0] == 0
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert fall[0] == pytest.approx(1)
    assert fall[-1] == pytest.approx(0, abs=1e-12)
    assert one_cycle(0.0, warmup=0.0) == 1
