"""Fair seconds: two ways of doing the same work, timed in turn in one run, compared pair by pair.

It refuses to know what the work is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from shallowdeep.progress import steps


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Median milliseconds of two ways, and the ratio a / b of paired runs: its median and its quartiles."""

    a_ms: float
    b_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def compare(a: Callable[[], object], b: Callable[[], object], *, rounds: int = 15) -> Paired:
    """How many times faster ``b`` is than ``a``: warm-up apart, order alternating, the device waited for."""
    a(), b()
    pairs = []
    for turn in steps(range(rounds), "measure in turn", rounds):
        if turn % 2:
            y, x = _seconds(b), _seconds(a)
        else:
            x, y = _seconds(a), _seconds(b)
        pairs.append((x, y))
    ratios = [x / y for x, y in pairs]
    low, middle, high = quartiles(ratios)
    return Paired(
        a_ms=1e3 * statistics.median(x for x, _ in pairs),
        b_ms=1e3 * statistics.median(y for _, y in pairs),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = _cuts(values, 4)
    return low, middle, high


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile by their names."""
    cuts = _cuts(values, 100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def _cuts(values: Sequence[float], parts: int) -> list[float]:
    # Python's own choice, "exclusive", goes beyond the least and the largest of few values.
    return statistics.quantiles(values, n=parts, method="inclusive") if len(values) > 1 else [*values] * (parts - 1)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """The whole process's PyTorch computes with ``count`` threads inside (None: as many as before)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
