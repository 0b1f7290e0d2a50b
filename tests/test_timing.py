"""Fair seconds: in turn, pair by pair."""

from __future__ import annotations

import pytest

from shallowdeep import timing
from shallowdeep.timing import compare


def test_pairs_alternate_and_ratios_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def takes(name: str, seconds: float) -> object:
        def work() -> None:
            order.append(name)
            clock[0] += seconds * (1 + (len(order) > 6))  # the machine slows down by half: both ways alike

        return work

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = compare(takes("a", 0.03), takes("b", 0.01), rounds=5)  # type: ignore[arg-type]
    assert order == list("ab" + "ab" + "ba" + "ab" + "ba" + "ab")
    assert (found.ratio_low, found.ratio, found.ratio_high) == pytest.approx((3, 3, 3))
    assert (found.a_ms, found.b_ms) == pytest.approx((60, 20))
    assert compare(takes("a", 0.03), takes("b", 0.01), rounds=1).ratio == pytest.approx(3)  # type: ignore[arg-type]
