"""The command line's doors to guarantees, alarms, drift and attacks.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from shallowdeep.choices import RUNS, Count, Device, Folder, Minutes, Rows


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard the attacker tries.

    Parameters
    ----------
    eps
        The most a pixel moves, in units of [0, 1].
    steps
        Gradient steps an image.
    step_size
        Length of a step.
    bf16
        Compute gradients in bf16: half of the time where the processor knows it.
    """

    eps: float = 8 / 255
    steps: Count = 30
    step_size: float = 0.002
    bf16: bool = False


DEEPSLOTH = Effort()


def attack(
    kind: Literal["slowdown"],
    rows: Rows,
    *,
    sdn_dir: Annotated[Path, Parameter(name="--sdn")] = RUNS / "train",
    out: Folder = RUNS / "attack",
    attacked: Count = 2000,
    effort: Effort = DEEPSLOTH,
    max_accuracy_drop: float = 0.005,
    second_look: Literal["mirror"] | None = None,
    training_split: str | None = None,
    training_limit: Count = 10_000,
    seed: int = 0,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Attack a network so that nothing leaves early, and measure what that costs and what helps; goes on if killed.

    Parameters
    ----------
    kind
        slowdown: push every exit to the uniform distribution.
    sdn_dir
        Folder of `sdn train`.
    out
        Folder to write.
    attacked
        Rows to attack, of one half of the data; the other half chooses the thresholds.
    max_accuracy_drop
        What the thresholds under attack were chosen to lose, as a fraction.
    second_look
        Also attack a policy that asks the network once more on this view of the rows it is unsure of.
    training_split
        Split of the data on which exits are then hardened; none: they are not.
    training_limit
        Rows to harden them on.
    seed
        Of everything random.
    """
    from shallowdeep import trust_verbs
    from shallowdeep.attacks import Attack

    assert kind == "slowdown"
    data = rows.choice()
    training = dataclasses.replace(data, split=training_split, limit=training_limit, half="all")
    return trust_verbs.attack_verb(
        sdn_dir,
        data,
        out,
        attack=Attack(eps=effort.eps, steps=effort.steps, step_size=effort.step_size, bf16=effort.bf16),
        rows=attacked,
        max_accuracy_drop=max_accuracy_drop,
        second_look=second_look,
        training=training if training_split is not None else None,
        seed=seed,
        device=device,
    )


def reliability(*, trace: Path = RUNS / "collect", out: Folder = RUNS / "reliability") -> dict[str, Any]:
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
    out: Folder = RUNS / "compare",
    max_accuracy_drops: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=())] = (0.005, 0.01),
    splits: Count = 5,
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


def watch(
    *,
    policy: Path = RUNS / "calibrate",
    trace: Path = RUNS / "collect",
    live: Path = RUNS / "predict",
    out: Folder = RUNS / "watch",
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


def prove_guarantee(
    trace: Path,
    *,
    out: Folder = RUNS / "prove-guarantee",
    draws: Count = 1000,
    processes: Count = 2,
    minutes: Minutes = math.inf,
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


def alarms(
    *,
    trace: Path = RUNS / "collect",
    policy: Path | None = None,
    against: Path | None = None,
    out: Folder = RUNS / "alarms",
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


DOORS: tuple[Callable[..., dict[str, Any]], ...] = (
    attack,
    reliability,
    compare,
    watch,
    prove_guarantee,
    alarms,
)
