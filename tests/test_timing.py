"""Fair seconds: in turn, pair by pair."""

from __future__ import annotations

import pytest

from shallowdeep import timing
from shallowdeep.timing import compare, percentiles, quartiles


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


def test_no_percentile_lies_beyond_what_was_measured() -> None:
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2, 3, 4)
    twelve = [10.0] * 11 + [75.0]
    assert percentiles(twelve) == pytest.approx({"p50": 10, "p95": 10 + 0.45 * 65, "p99": 10 + 0.89 * 65})
    assert percentiles([7.0]) == {"p50": 7, "p95": 7, "p99": 7}
