"""The command line's doors to guarantees, alarms, drift and attacks.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shallowdeep.choices import RUNS


def alarms(
    *,
    trace: Path = RUNS / "collect",
    policy: Path | None = None,
    against: Path | None = None,
    out: Path = RUNS / "alarms",
    max_error: float | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure which score finds wrong answers best, and fit the alarm.

    Parameters
    ----------
    trace
        Folder of `sdn collect`, of rows that neither ICs nor policy have seen.
    policy
        Folder of `sdn calibrate` or `sdn tune`: whose answers; default: those of the whole network.
    against
        Folder of `sdn collect`, of other inputs (backdoored, or from elsewhere): find these instead of errors.
    out
        Folder to write.
    max_error
        Also find the threshold that keeps most answers with at most this share of them wrong (0.01: one in 100).
    confidence
        Of that, over the draw of the trace's rows.
    """
    from shallowdeep import trust_verbs

    return trust_verbs.alarms_verb(trace, policy, out, against=against, max_error=max_error, confidence=confidence)


DOORS: tuple[Callable[..., dict[str, Any]], ...] = (alarms,)
