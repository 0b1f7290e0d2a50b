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

from shallowdeep.families import FEW_ROWS, Family, families_for
from shallowdeep.paths import Bools, Brings, Floats, Rows, Steps, read_rows
from shallowdeep.policies import Entropy, Fixed, Oracle, Patience, Policy, asked_exits, finite_rows
from shallowdeep.progress import steps
from shallowdeep.reliability import fit_temperatures, scaled
from shallowdeep.rivals import rivals_for
from shallowdeep.thresholds import choose, fits, within_drop
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
    """One family against the default one, family minus default, in ``what``: the ``cost`` or ``ms`` that keep within
    ``drop``, or the ``accuracy`` at the default's cost there (``level``: against the full network's).

    ``value`` with its 95 % interval ``low`` to ``high`` by paired bootstrap; ``p`` is the bootstrap's two-sided p-value
    and ``real`` whether it survives Holm's correction over all of a comparison's differences. Accuracy is nan where a
    family is never so cheap.
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
            f"{self.oracle_cost:.3f}\naccuracy: change against the full network at the default's cost"
        )
        drops = sorted({one.drop for one in self.differences})
        return "\n\n".join([head, *map(self._at, drops), self.verdict()])

    def _at(self, drop: float) -> str:
        """The table of one drop, cheapest first."""
        mine = [one for one in self.differences if one.drop == drop]
        whats = list(dict.fromkeys(one.what for one in mine))
        rows = [
            (f"at a drop of {drop:.2%}", *(cell for what in whats for cell in (what, "difference", "95 %")), "real")
        ]
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
                said = [
                    f"{word}: {', '.join(names)}" for word, names in zip(words, (worse, better), strict=True) if names
                ]
                lines.append(f"Really different {place}: {'; '.join(said) or 'none'}.")
        return "\n".join(lines)


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
    >>> [policy.patience for policy in usual_policies(trace)["patience"]]
    [2, 1]
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

    The first family, the rule, also answers by ensembles; it and the last, the single threshold, also run on logits
    tempered exit by exit. Families that others proposed (``rivals_for``) are fitted in the same way, Zero Time Waste's
    ensembles at every exit (arXiv 2106.05409) under the single threshold.
    ``policies`` are set by hand or calibrated on other rows (None: ``usual_policies``). In each of ``splits`` random
    halvings each half chooses, as ``calibrate`` would, a step of every line for every aim, and the other half reports:
    every row is reported ``splits`` times. Between aims, two policies are thought mixed at random. Differences are to
    the first family, at ``max_accuracy_drops``; their intervals come from resampling rows, the same for all (4,000
    times), and speak of the policies as chosen. ``clock`` (``tuning.machine_costs``) adds milliseconds.

    Raises ``ValueError`` for a trace without exits to leave at, fewer than 200 rows, or a drop that nobody aims at.
    >>> row = torch.arange(400)
    >>> early_NC = torch.stack([row / 100.0, 4 - row / 100.0], 1)
    >>> full_NC = torch.stack([row * 1.0 - 190, 190 - row * 1.0], 1)
    >>> logits_ENC = torch.stack([early_NC, full_NC])
    >>> trace = Trace(logits_ENC=logits_ENC, labels_N=(row < 190).long(), cost_E=torch.tensor([0.4, 1.0]))
    >>> found = compare(trace, {}, max_accuracy_drops=(0.02,), splits=1)
    >>> found.differences[0].name, found.differences[0].level < 0.6
    ('one shift over levels of confidence', True)
    """
    asked = asked_exits(enabled_E, trace.num_exits, trace.full_exit)
    rows = read_rows(trace, asked)
    _check(trace, rows, max_accuracy_drops, splits)
    prices = _Prices(trace, clock)
    families, paid_XL = families_for(rows), prices.of(asked)[:, np.array(asked)]
    contenders = {family.name: _fitted(family, rows, paid_XL) for family in (*families, *rivals_for(rows))}
    contenders[f"{families[0].name}, ensemble"] = _fitted(families[0], rows, paid_XL, ensembles=True)
    contenders["ensembles at every exit (ZTW)"] = _fitted(families[-1], rows, paid_XL, ensembles=True, first=1)
    for family in (families[0], families[-1]):
        contenders[f"{family.name}, tempered"] = _tempered(family, trace, asked, paid_XL)
    for name, line in (usual_policies(trace) if policies is None else policies).items():
        contenders[name] = _by_hand(line, trace, prices)
    full_N, full = rows.full_N.astype(np.float64), trace.full_exit
    full_X = prices.of(Fixed(exit=full).asks(trace.num_exits, full))[:, full]
    halves = [half for split in range(splits) for half in _halves(trace.num_samples, seed + split)]
    asked_in_turn = steps(contenders.items(), "compare policies", len(contenders))
    found = {name: _reported(contender, halves, full_N, full_X) for name, contender in asked_in_turn}
    oracle, default, accuracy = simulate(Oracle(), trace), families[0].name, float(full_N.mean())
    return Comparison(
        samples=trace.num_samples,
        splits=splits,
        default=default,
        full_accuracy=accuracy,
        full_cost=float(full_X[0]),
        oracle_drop=accuracy - float((oracle.labels_N == trace.labels_N).double().mean()),
        oracle_cost=float(oracle.cost_N.mean()),
        lines=tuple(_line(name, one, accuracy) for name, one in found.items()),
        differences=_differences(found, default, full_N, full_X, max_accuracy_drops, seed),
    )


def _check(trace: Trace, rows: Rows, drops: Sequence[float], splits: int) -> None:
    if len(rows.right_LN) == 1:
        raise ValueError("There is nothing to compare: only one exit is asked, so nobody can leave early.")
    if trace.num_samples < 2 * FEW_ROWS:
        raise ValueError(
            f"Each half must choose from {FEW_ROWS} rows: {2 * FEW_ROWS} in all, {trace.num_samples} found."
        )
    if not drops or not all(AIMS[0] < drop <= AIMS[-1] for drop in drops):
        raise ValueError(f"max_accuracy_drops are shares of accuracy above 0, {AIMS[-1]} at most; found {list(drops)}.")
    if splits < 1:
        raise ValueError(f"splits counts random halvings, from 1; found {splits}.")


def _halves(samples: int, seed: int) -> Iterator[tuple[Steps, Steps]]:
    """Rows that choose and rows that report, then the other way round."""
    order = np.random.default_rng(seed).permutation(samples)
    one, other = np.sort(order[: samples // 2]), np.sort(order[samples // 2 :])
    yield one, other
    yield other, one


class _Prices:
    """What is paid at a stop, in X = 1 or 2 currencies: shares of the untouched network's macs, milliseconds."""

    def __init__(self, trace: Trace, clock: Clock | None) -> None:
        self._by_unit = [(trace, 1.0)] if clock is None else [(trace, 1.0), (clock.timed(trace), clock.full_ms)]

    def of(self, asked: Sequence[bool]) -> Floats:
        """Prices [X, E] of stopping at each exit when ``asked`` are."""
        return np.stack([policy_costs(trace, asked).numpy() * unit for trace, unit in self._by_unit])


# A contender sees rows that choose and rows that report. It says what each of its steps brings to the first, and, asked
# for a step, who of the second is right there and what was paid ([M], [X, M]).
Contender = Callable[[Steps, Steps], tuple[Brings, Callable[[int], tuple[Floats, Floats]]]]


def _fitted(
    family: Family, rows: Rows, paid_XL: Floats, *, ensembles: bool = False, first: int | None = None
) -> Contender:
    """The family as ``calibrate`` fits it; with ``ensembles``, where held-out answers are better by them, or at all
    exits from the ``first`` on.
    """

    def split(choosing: Steps, reporting: Steps) -> tuple[Brings, Callable[[int], tuple[Floats, Floats]]]:
        mine = rows.take(choosing)
        choice = choose(mine, lambda _: 0, fits(mine, families=(family,), ensembles=ensembles, first=first))
        assert choice is not None, "any step would do"
        others = choice.path.seen(rows.take(reporting))
        leaving_KM = choice.path.leaving(rows.take(reporting))

        def report(step: int) -> tuple[Floats, Floats]:
            stop_M = (leaving_KM > step).sum(0)
            return others.right_LN[stop_M, np.arange(len(stop_M))].astype(np.float64), paid_XL[:, stop_M]

        return choice.brings, report

    return split


def _tempered(family: Family, trace: Trace, asked: Sequence[bool], paid_XL: Floats) -> Contender:
    """The family on logits divided by temperatures from the rows that choose (``policies.Tempered``)."""

    def split(choosing: Steps, reporting: Steps) -> tuple[Brings, Callable[[int], tuple[Floats, Floats]]]:
        temperature_E = fit_temperatures(trace.rows(torch.from_numpy(choosing)))
        return _fitted(family, read_rows(scaled(trace, temperature_E), asked), paid_XL)(choosing, reporting)

    return split


def _by_hand(line: Sequence[Policy], trace: Trace, prices: _Prices) -> Contender:
    outcomes = [simulate(policy, trace) for policy in line]
    bills = [prices.of(policy.asks(trace.num_exits, trace.full_exit)) for policy in line]
    paid_SXN = np.stack([bill_XE[:, one.exit_N.numpy()] for bill_XE, one in zip(bills, outcomes, strict=True)])
    rights = [(one.labels_N == trace.labels_N) & finite_rows(one.logits_NC) for one in outcomes]
    right_SN = torch.stack(rights).double().numpy()

    def split(choosing: Steps, reporting: Steps) -> tuple[Brings, Callable[[int], tuple[Floats, Floats]]]:
        no_order_0M = np.empty((0, len(choosing)), np.int64)  # policies set by hand need not let ever more rows leave
        accuracy_S = right_SN[:, choosing].mean(1)
        brings = Brings(no_order_0M, paid_SXN[:, 0, choosing].mean(1), accuracy_S, np.full(len(line), math.nan))
        return brings, lambda step: (right_SN[step, reporting], paid_SXN[step][:, reporting])

    return split


class _Reported(NamedTuple):
    """What rows saw that did not choose, means over splits: who was right for each aim, and what was paid."""

    right_AN: Floats
    paid_XAN: Floats


def _reported(contender: Contender, halves: Sequence[tuple[Steps, Steps]], full_N: Floats, full_X: Floats) -> _Reported:
    """A contender's steps as ``calibrate`` takes them: the full network where none keeps the aim, or saves anything."""
    right_AN = np.zeros((len(AIMS), len(full_N)))
    paid_XAN = np.zeros((len(full_X), *right_AN.shape))
    for choosing, reporting in halves:
        brings, report = contender(choosing, reporting)
        for place, aim in enumerate(AIMS):
            step = within_drop(brings, float(full_N[choosing].mean()), aim)
            if step is None or brings.cost_P[step] >= full_X[0]:
                right_M, paid_XM = full_N[reporting], np.broadcast_to(full_X[:, None], (len(full_X), len(reporting)))
            else:
                right_M, paid_XM = report(step)
            right_AN[place, reporting] += right_M
            paid_XAN[:, place, reporting] += paid_XM
    times = len(halves) / 2
    return _Reported(right_AN / times, paid_XAN / times)


def _line(name: str, found: _Reported, full_accuracy: float) -> Line:
    paid = [torch.from_numpy(paid_AN.mean(1)) for paid_AN in found.paid_XAN]
    return Line(
        name=name,
        aim_A=torch.tensor(AIMS, dtype=torch.float64),
        drop_A=torch.from_numpy(full_accuracy - found.right_AN.mean(1)),
        cost_A=paid[0],
        ms_A=paid[1] if len(paid) > 1 else None,
    )


def _differences(
    found: Mapping[str, _Reported], default: str, full_N: Floats, full_X: Floats, drops: Sequence[float], seed: int
) -> tuple[Difference, ...]:
    """Levels and differences of every contender, from all rows and from resampled ones; Holm over all of them."""
    names = list(found)
    drop_FA = np.stack([full_N.mean() - found[name].right_AN.mean(1) for name in names])
    paid_FXA = np.stack([found[name].paid_XAN.mean(2) for name in names])
    at_D, whats = np.array(drops), ("cost", "ms", "accuracy") if len(full_X) > 1 else ("cost", "accuracy")
    # So many that Holm's first bar can be reached at all.
    draws = max(RESAMPLES, math.ceil(2 * (len(names) - 1) * len(whats) * len(drops) / LEVEL))
    place = names.index(default)
    cost_D = _levels(drop_FA[place], paid_FXA[place], full_X, at_D, np.full(len(at_D), math.nan))[0]
    seen_FWD = np.stack([_levels(*one, full_X, at_D, cost_D) for one in zip(drop_FA, paid_FXA, strict=True)])
    seen_FWD[:, -1][paid_FXA[:, 0].min(1)[:, None] > cost_D + 1e-12] = math.nan  # nothing of it is so cheap
    drawn_RFWD = np.concatenate(
        [
            [[_levels(*one, full_X, at_D, cost_D) for one in zip(*draw, strict=True)] for draw in draw_block]
            for draw_block in steps(_resampled(list(found.values()), full_N, draws, seed), "resample rows")
        ]
    )
    away_FWD, away_RFWD = seen_FWD - seen_FWD[place], drawn_RFWD - drawn_RFWD[:, place : place + 1]
    tails_FWD = np.minimum((away_RFWD <= 1e-9).sum(0), (away_RFWD >= -1e-9).sum(0))
    p_FWD = np.where(np.isnan(away_FWD), math.nan, np.minimum(1, 2 * (tails_FWD + 1) / (len(away_RFWD) + 1)))
    real_FWD = np.zeros(p_FWD.shape, bool)
    others = np.delete(np.arange(len(names)), place)
    real_FWD[others] = holm(p_FWD[others], LEVEL)
    low_FWD, high_FWD = np.quantile(away_RFWD, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return tuple(
        Difference(
            name=name,
            what=what,
            drop=drop,
            level=float(seen_FWD[f, w, d]),
            value=float(away_FWD[f, w, d]),
            low=float(low_FWD[f, w, d]),
            high=float(high_FWD[f, w, d]),
            p=float(p_FWD[f, w, d]),
            real=bool(real_FWD[f, w, d]),
        )
        for d, drop in enumerate(drops)
        for f, name in enumerate(names)
        for w, what in enumerate(whats)
    )


def _levels(drop_A: Floats, paid_XA: Floats, full_X: Floats, drops_D: Floats, costs_D: Floats) -> Floats:
    """What is paid at each of ``drops_D``, and the drop of accuracy, negated, at each of ``costs_D`` ([X + 1, D]).

    Along the aims the drop is made to rise and what is paid to fall (isotonic); between two points policies are mixed.
    A line that begins beyond a drop is continued to the full network; beyond its end nothing changes.
    """
    drop_A = isotonic_regression(drop_A).x
    paid_XA = np.stack([isotonic_regression(paid_A, increasing=False).x for paid_A in paid_XA])
    if drop_A[0] > 0:
        drop_A = np.concatenate([[0.0], drop_A])
        paid_XA = np.concatenate([full_X[:, None], paid_XA], 1)
    # Drops are whole rows: a line may stand still on the very drop asked for, and rounding must not say where on it.
    paid_XD = np.stack([np.interp(drops_D + 1e-9, drop_A, paid_A) for paid_A in paid_XA])
    gain_D = -np.interp(costs_D + 1e-9, paid_XA[0, ::-1], drop_A[::-1])
    return np.concatenate([paid_XD, gain_D[None]])


def _resampled(
    found: Sequence[_Reported], full_N: Floats, times: int, seed: int
) -> Iterator[Iterator[tuple[Floats, Floats]]]:
    """Drops [F, A] and prices paid [F, X, A] of rows drawn with replacement ``times`` times, the same for all; in
    blocks of draws.
    """
    samples, generator = len(full_N), np.random.default_rng(seed)
    block = max(1, min(times, 4 * CHUNK_ELEMENTS // samples))
    for start in range(0, times, block):
        draws = min(block, times - start)
        count_RN = np.stack(
            [np.bincount(generator.integers(samples, size=samples), minlength=samples) for _ in range(draws)]
        )
        weight_RN = count_RN / samples
        full_R = weight_RN @ full_N
        drop_RFA = np.stack([full_R[:, None] - weight_RN @ one.right_AN.T for one in found], 1)
        paid_RFXA = np.stack([np.moveaxis(one.paid_XAN @ weight_RN.T, 2, 0) for one in found], 1)
        yield zip(drop_RFA, paid_RFXA, strict=True)


def holm(p: Floats, level: float) -> Bools:
    """Which of the hypotheses with these p-values Holm rejects: any wrongly with probability ``level`` at most.

    nan is not tried. Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    >>> holm(np.array([0.04, 0.01, 0.03, math.nan]), 0.05).tolist()
    [False, True, False, False]
    """
    rejected = np.zeros(p.size, bool)
    order = np.argsort(p, axis=None)  # nan last
    tried = int((~np.isnan(p)).sum())
    for rank, index in enumerate(order[:tried]):
        if p.flat[index] > level / (tried - rank):
            break
        rejected[index] = True
    return rejected.reshape(p.shape)
