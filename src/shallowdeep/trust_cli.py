"""The command line's doors to guarantees, alarms, drift and attacks.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shallowdeep.choices import RUNS


def watch(
    *,
    policy: Path = RUNS / "calibrate",
    trace: Path = RUNS / "collect",
    live: Path = RUNS / "predict",
    out: Path = RUNS / "watch",
    after: Path | None = None,
    alpha: float = 0.05,
    max_accuracy_drop: float = 0.01,
    max_disagreement: float | None = None,
    slack: float = 0.0,
) -> dict[str, Any]:
    """Say whether answers still look as they did at calibration: keep, recalibrate, or switch exits off.

    Parameters
    ----------
    policy
        Folder of `sdn calibrate`.
    trace
        Folder of `sdn collect`: reference rows, best others than the thresholds were chosen on.
    live
        Folder of `sdn predict`, or of `sdn collect` on new rows, all of which are then audited at full depth.
    out
        Folder to write.
    after
        Folder of an earlier `sdn watch`, whose stream goes on; its reference and tolerances hold.
    alpha
        Chance of a false alarm of any kind over the whole stream.
    max_accuracy_drop
        Drop that early exits may cost, as a fraction.
    max_disagreement
        Share of answers that may contradict the full network; default: the reference's and the drop more.
    slack
        Share of its scale by which a mean may leave the reference's limits.
    """
    from shallowdeep import trust_verbs

    return trust_verbs.watch_verb(
        policy,
        trace,
        live,
        out,
        after=after,
        alpha=alpha,
        max_accuracy_drop=max_accuracy_drop,
        max_disagreement=max_disagreement,
        slack=slack,
    )


DOORS: tuple[Callable[..., dict[str, Any]], ...] = (watch,)
