"""Learning-rate schedules as plain functions: a factor of the base rate.

It refuses to know optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def stepped(epoch: int, milestones: Sequence[int], factor: float = 0.1) -> float:
    """``factor`` to the number of ``milestones`` that epoch ``epoch`` (from 0) has reached.

    >>> [round(stepped(e, (2, 3)), 4) for e in range(5)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """
    return float(factor ** sum(epoch >= milestone for milestone in milestones))


def one_cycle(progress: float, warmup: float = 0.1) -> float:
    """Linear rise over the first ``warmup`` of the run, then half a cosine down to 0 (arXiv 1708.07120).

    >>> [round(one_cycle(p), 3) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
