"""The command line's doors to guarantees, alarms, drift and attacks.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from shallowdeep.choices import RUNS


def reliability(*, trace: Path = RUNS / "collect", out: Path = RUNS / "reliability") -> dict[str, Any]:
    """Show how far every exit's confidence can be believed, before and after one temperature each.

    Parameters
    ----------
    trace
        Folder of `sdn collect`, of rows that nothing was trained on.
    out
        Folder to write.
    """
    from shallowdeep import trust_verbs

    return trust_verbs.reliability_verb(trace, out)


def compare(
    *,
    trace: Path = RUNS / "collect",
    out: Path = RUNS / "compare",
    max_accuracy_drops: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=())] = (0.005, 0.01),
    splits: int = 5,
    tuned: Path | None = None,
) -> dict[str, Any]:
    """Put every policy on one plane of accuracy and cost, and say which differences are real.

    Parameters
    ----------
    trace
        Folder of `sdn collect`, of rows that nothing was trained on.
    out
        Folder to write.
    max_accuracy_drops
        Drops of accuracy, as fractions, at which policies are compared.
    splits
        Random halvings; each half chooses for the other.
    tuned
        Folder of `sdn tune`, whose milliseconds are compared, too.
    """
    from shallowdeep import trust_verbs

    return trust_verbs.compare_verb(trace, out, max_accuracy_drops=max_accuracy_drops, splits=splits, tuned=tuned)


DOORS: tuple[Callable[..., dict[str, Any]], ...] = (reliability, compare)
