"""Every policy on one plane of accuracy and cost, from one trace, and which differences between them are real.

It refuses to know how a policy decides: families fit paths, policies walk. What is reported of a policy comes from rows
that did not choose it; what is said of two of them comes from the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from shallowdeep.families import FAMILIES, Family
from shallowdeep.paths import Bools, Brings, Floats, Rows, Steps, brings_of, read_rows
from shallowdeep.policies import Entropy, Fixed, Oracle, Patience, Policy, asked_exits, finite_rows
from shallowdeep.thresholds import crossfit, within_drop
from shallowdeep.types import Trace, table
from shallowdeep.walking import CHUNK_ELEMENTS, policy_costs, simulate

AIMS = (0.0, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.03)
"""Drops of accuracy that every policy aims at; what it meets is measured."""
RESAMPLES = 4000
LEVEL = 0.05
"""Chance that any difference is called real when none is (Holm), and what an interval leaves out."""


class Clock(Protocol):
    """What the milliseconds of a machine are told by: ``tuning.MachineCosts``."""

    @property
    def full_ms(self) -> float:
        """Milliseconds of the untouched network per row."""

    def timed(self, trace: Trace) -> Trace:
        """``trace`` with shares of these for costs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """One family of policies: for each aim the measured drop, mean cost and, with a clock, milliseconds (float64 [A]),
    on rows that did not choose, means over splits.
    """

    name: str
    aim_A: Tensor
    drop_A: Tensor
    cost_A: Tensor
    ms_A: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One family against the default one: in ``what`` (``cost`` or ``ms`` at an equal drop, ``accuracy`` at the
    default's cost there), family minus default.

    ``value`` with its 95 % interval ``low`` to ``high`` by paired bootstrap; ``p`` is the bootstrap's two-sided p-value
    and ``real`` whether it survives Holm's correction over all of a comparison's differences. All nan where the family
    does not get there.
    """

    name: str
    what: str
    drop: float
    level: float
    value: float
    low: float
    high: float
    p: float
    real: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Every family's line, and its differences to ``default``; ``print`` gives a table for each drop asked for.

    ``full_cost`` is one pass through the untouched network. ``oracle_drop`` (below 0) and ``oracle_cost`` are what
    stopping at the first right exit would bring: a ceiling, which no policy reaches.
    """

    samples: int
    splits: int
    default: str
    full_accuracy: float
    full_cost: float
    oracle_drop: float
    oracle_cost: float
    lines: tuple[Line, ...]
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        head = (
            f"{self.samples} rows, {self.splits} random halvings, each half chooses for the other; full network: "
            f"{self.full_accuracy:.2%} at {self.full_cost:.3f}; an oracle: {self.oracle_drop:+.2%} drop at "
            f"{self.oracle_cost:.3f}"
        )
        drops = sorted({one.drop for one in self.differences})
        return "\n\n".join([head, *map(self._at, drops), self.verdict()])

    def _at(self, drop: float) -> str:
        """The table of one drop, cheapest first."""
        mine = [one for one in self.differences if one.drop == drop]
        whats = list(dict.fromkeys(one.what for one in mine))
        rows = [(f"at a drop of {drop:.2%}", *(cell for what in whats for cell in _HEADS[what]), "real")]
        by_name: dict[str, dict[str, Difference]] = {}
        for one in mine:
            by_name.setdefault(one.name, {})[one.what] = one
        for name, found in sorted(by_name.items(), key=lambda item: item[1]["cost"].level):
            cells = [cell for what in whats for cell in _cells(found[what], name == self.default)]
            real = ", ".join(what for what in whats if found[what].real)
            rows.append((name, *cells, "default" if name == self.default else real))
        return table(rows)

    def verdict(self) -> str:
        """Which differences are real, in words."""
        tried = [one for one in self.differences if one.name != self.default and not math.isnan(one.p)]
        lines = [
            f"{len(tried)} differences to '{self.default}' were tried; those called real survive Holm's correction at "
            f"{LEVEL:.0%} over all of them."
        ]
        for drop in sorted({one.drop for one in tried}):
            for what in dict.fromkeys(one.what for one in tried):
                mine = [one for one in tried if (one.drop, one.what) == (drop, what)]
                good = -1 if what != "accuracy" else 1
                better = [one.name for one in mine if one.real and one.value * good > 0]
                worse = [one.name for one in mine if one.real and one.value * good < 0]
                words = ("less accurate", "more accurate") if what == "accuracy" else ("dearer", "cheaper")
                place = f"at the cost of a {drop:.2%} drop" if what == "accuracy" else f"in {what} at a {drop:.2%} drop"
                said = [f"{word}: {', '.join(names)}" for word, names in zip(words, (worse, better), strict=True) if names]
                lines.append(f"Really different {place}: {'; '.join(said) or 'none'}.")
        return "\n".join(lines)


_HEADS = {
    "cost": ("cost", "difference", "95 %"),
    "ms": ("ms", "difference", "95 %"),
    "accuracy": ("accuracy at the default's cost", "difference", "95 %"),
}


def _cells(one: Difference, default: bool) -> tuple[str, str, str]:
    if math.isnan(one.level):
        return "", "", ""
    digits = {"cost": ".3f", "ms": ".4f", "accuracy": ".2%"}[one.what]
    if default:
        return f"{one.level:{digits}}", "", ""
    sign = f"+{digits}"
    return f"{one.level:{digits}}", f"{one.value:{sign}}", f"{one.low:{sign}} {one.high:{sign}}"


def usual_policies(trace: Trace) -> dict[str, tuple[Policy, ...]]:
    """Policies set by hand, in lines from dear to cheap, that no family makes: entropy, patience, one exit for all.

    >>> trace = Trace(logits_ENC=torch.zeros(3, 1, 2), labels_N=torch.tensor([0]), cost_E=torch.tensor([0.2, 0.5, 1]))
    >>> usual_policies(trace)["patience"]
    (Patience(enabled_E=None, fallback='last', patience=2), Patience(enabled_E=None, fallback='last', patience=1))
    """
    bars = math.log(trace.num_classes) * np.geomspace(1e-4, 1, 40)
    full = trace.full_exit
    return {
        "one entropy threshold": tuple(Entropy(threshold=float(bar)) for bar in bars),
        "patience": tuple(Patience(patience=repeats) for repeats in range(full, 0, -1)),
        "one exit for all": tuple(Fixed(exit=exit) for exit in range(full, -1, -1)),
    }


def compare(
    trace: Trace,
    policies: Mapping[str, Sequence[Policy]] | None = None,
    *,
    max_accuracy_drops: Sequence[float] = (0.005, 0.01),
    enabled_E: Sequence[bool] | None = None,
    splits: int = 5,
    clock: Clock | None = None,
    seed: int = 0,
) -> Comparison:
    """Every family of ``calibrate``, and ``policies`` in named lines from dear to cheap, on one accuracy-cost plane.

    ``policies`` are set by hand or calibrated on other rows (None: ``usual_policies``). In each of ``splits`` random
    halvings each half chooses, as ``calibrate`` would, a step of every line for every aim, and the other half reports:
    every row is reported ``splits`` times. Between aims, two policies are thought mixed at random. Differences are to
    the first family, at ``max_accuracy_drops``; their intervals come from resampling rows, the same for all (4,000
    times), and speak of the policies as chosen. ``clock`` (``tuning.machine_costs``) adds milliseconds.

    Raises ``ValueError`` for a trace without exits to leave at, fewer than 200 rows, or a drop that nobody aims at.
    """
    asked = asked_exits(enabled_E, trace.num_exits, trace.full_exit)
    rows = read_rows(trace, asked)
    _check(trace, rows, max_accuracy_drops, splits)
    prices = [trace] if clock is None else [trace, clock.timed(trace)]
    scale_X = np.array([1.0, 1.0 if clock is None else clock.full_ms][: len(prices)])
    full = Fixed(exit=trace.full_exit)
    full_X = np.array([_bill(one, full)[trace.full_exit] for one in prices]) * scale_X
    exits = [exit for exit, on in enumerate(asked) if on]
    paid_XL = np.stack([policy_costs(one, asked).numpy()[exits] for one in prices]) * scale_X[:, None]
    reporters = {family.name: _family_reporter(family, rows, paid_XL) for family in FAMILIES}
    for name, line in (usual_policies(trace) if policies is None else policies).items():
        bills_SXE = np.stack([[_bill(one, policy) for one in prices] for policy in line]) * scale_X[:, None]
        reporters[name] = _hand_reporter(line, trace, bills_SXE)
    halves = [half for split in range(splits) for half in _halves(trace.num_samples, seed + split)]
    found = {
        name: _reported(report, halves, rows.full_N.astype(np.float64), full_X) for name, report in reporters.items()
    }
    default = FAMILIES[0].name
    oracle = simulate(Oracle(), trace)
    full_accuracy = float(rows.full_N.mean())
    return Comparison(
        samples=trace.num_samples,
        splits=splits,
        default=default,
        full_accuracy=full_accuracy,
        full_cost=float(full_X[0]),
        oracle_drop=full_accuracy - float((oracle.labels_N == trace.labels_N).double().mean()),
        oracle_cost=float(oracle.cost_N.mean()),
        lines=tuple(_line(name, one, full_accuracy) for name, one in found.items()),
        differences=_differences(found, default, rows.full_N, full_X, max_accuracy_drops, seed),
    )


def _check(trace: Trace, rows: Rows, drops: Sequence[float], splits: int) -> None:
    if len(rows.right_LN) == 1:
        raise ValueError("There is nothing to compare: only one exit is asked, so nobody can leave early.")
    if trace.num_samples < 200:
        raise ValueError(f"Halves that choose need 100 rows each, so 200 in all; here are {trace.num_samples}.")
    if not drops or not all(AIMS[0] <= drop <= AIMS[-1] for drop in drops):
        raise ValueError(f"max_accuracy_drops are shares of accuracy in {AIMS[0]}..{AIMS[-1]}, found {list(drops)}.")
    if splits < 1:
        raise ValueError(f"splits counts random halvings, from 1; found {splits}.")


def _halves(samples: int, seed: int) -> Iterator[tuple[Steps, Steps]]:
    """Rows that choose and rows that report, then the other way round."""
    order = np.random.default_rng(seed).permutation(samples)
    one, other = np.sort(order[: samples // 2]), np.sort(order[samples // 2 :])
    yield one, other
    yield other, one


def _bill(trace: Trace, policy: Policy) -> Floats:
    """What stopping at each exit costs under ``policy`` (float64 [E])."""
    bill_E: Floats = policy_costs(trace, policy.asks(trace.num_exits, trace.full_exit)).numpy()
    return bill_E


# A reporter chooses a step for every aim on the first rows and says of the second who is right there and what was paid
# (float64 [M], [X, M]); None stands for the full network.
Report = tuple[Floats, Floats] | None
Reporter = Callable[[Steps, Steps], Iterator[Report]]


def _steps_for_aims(brings: Brings, accuracy_full: float, full_cost: float) -> list[int | None]:
    """As ``calibrate`` takes them: the full network where no step keeps the aim, or saves anything."""
    steps = [within_drop(brings, accuracy_full, aim) for aim in AIMS]
    return [step if step is not None and brings.cost_P[step] < full_cost else None for step in steps]


def _family_reporter(family: Family, rows: Rows, paid_XL: Floats, full_cost: float = 1.0) -> Reporter:
    def report(choosing: Steps, reporting: Steps) -> Iterator[Report]:
        mine, others = rows.take(choosing), rows.take(reporting)
        path = family.fit(mine, None)
        brings = brings_of(crossfit(family, mine, path.grid_P), mine, path.steps)
        leaving_KM = path.leaving(others)
        for step in _steps_for_aims(brings, float(mine.full_N.mean()), full_cost):
            if step is None:
                yield None
                continue
            stop_M = (leaving_KM > step).sum(0)
            yield others.right_LN[stop_M, np.arange(len(stop_M))].astype(np.float64), paid_XL[:, stop_M]

    return report


def _hand_reporter(line: Sequence[Policy], trace: Trace, bills_SXE: Floats, full_cost: float = 1.0) -> Reporter:
    outcomes = [simulate(policy, trace) for policy in line]
    rights = [(one.labels_N == trace.labels_N) & finite_rows(one.logits_NC) for one in outcomes]
    right_SN = torch.stack(rights).double().numpy()
    exit_SN = torch.stack([one.exit_N for one in outcomes]).numpy()
    cost_SN = np.take_along_axis(bills_SXE[:, 0], exit_SN, 1)

    def report(choosing: Steps, reporting: Steps) -> Iterator[Report]:
        nobody = np.empty((0, len(choosing)), np.int64)  # policies set by hand need not leave in order
        accuracy_S = right_SN[:, choosing].mean(1)
        brings = Brings(nobody, cost_SN[:, choosing].mean(1), accuracy_S, accuracy_S)
        full_N = full_right_N[choosing]
        for step in _steps_for_aims(brings, float(full_N.mean()), full_cost):
            yield None if step is None else (right_SN[step, reporting], bills_SXE[step][:, exit_SN[step, reporting]])

    full_right_N = (simulate(Fixed(exit=trace.full_exit), trace).labels_N == trace.labels_N).double().numpy()
    return report
