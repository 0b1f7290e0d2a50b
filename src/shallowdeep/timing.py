"""Fair seconds: two ways of doing the same work, timed in turn in one run, compared pair by pair.

It refuses to know what the work is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
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
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Paired(
        a_ms=1e3 * statistics.median(x for x, _ in pairs),
        b_ms=1e3 * statistics.median(y for _, y in pairs),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """PyTorch computes with ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
