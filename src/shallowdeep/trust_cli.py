"""The command line's doors to guarantees, alarms, drift and attacks.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shallowdeep.choices import RUNS


def prove_guarantee(
    trace: Path,
    *,
    out: Path = RUNS / "prove-guarantee",
    draws: int = 1000,
    processes: int = 2,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Draw calibration sets from a trace and count how often a certificate is wrong.

    Parameters
    ----------
    trace
        Folder of `sdn collect`, or a trace file; its rows are the population.
    out
        Folder to write; what is there already is not drawn again.
    draws
        Calibration sets of every size.
    processes
        How many to draw at once.
    minutes
        Begin nothing after so long; call again to go on.
    """
    from shallowdeep import trust_verbs

    return trust_verbs.prove_verb(trace, out, draws=draws, processes=processes, minutes=minutes)


DOORS: tuple[Callable[..., dict[str, Any]], ...] = (prove_guarantee,)
