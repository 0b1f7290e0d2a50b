"""A policy with a certificate: one part of the rows chooses a path of policies, the other tests its steps in order.

It refuses to look at a tested row before the path, its order and the step where testing starts are fixed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.stats import norm

from shallowdeep.bounds import (
    Bools,
    Floats,
    betting_pvalues,
    binomial_pvalues,
    last_conformal,
    last_proved,
    paired_passes,
    rows_needed,
)
from shallowdeep.certificates import Certificate, Method, Risk, claim_of
from shallowdeep.effects import answers
from shallowdeep.paths import Brings, Steps, along, answered, read_rows
from shallowdeep.policies import Policy
from shallowdeep.thresholds import Choice, Fit, choose, fits
from shallowdeep.types import Trace
from shallowdeep.walking import policy_costs

CHOOSING = 0.2
"""The part of the rows that chooses; measured in docs/trust.md."""
PAIRED, BINOMIAL = "exact paired test, fixed sequence", "exact binomial test, fixed sequence"
BETTING, CONFORMAL = "betting, fixed sequence", "conformal risk control, losses made monotone"
BLOCK = 16
"""Steps whose losses are held at once when every row counts and not their number alone."""


class Proof(NamedTuple):
    """A certified policy, or the reason (``policy`` None) in ``note``; what tested rows saw is in ``facts``."""

    policy: Policy | None
    certificate: Certificate | None
    note: str
    facts: dict[str, float | int | str]


class Aim(NamedTuple):
    """What is to be proved: the mean of ``risk`` <= ``bound``, by ``method``, at level ``delta`` (None: in mean)."""

    risk: Risk
    bound: float
    delta: float | None
    method: Method


class Parts:
    """One trace in two parts, and what the choosing one fitted: kept with the trace, of which several things are asked.

    Rows that the ICs trained on are left out. Rows are dealt by a fixed shuffle, so that sorted data do no harm. A
    row that was drawn twice, as in ``prove``, may fall into both parts: drawn independently, that is what fresh rows
    do. Copies of rows in a data set that is not drawn (frames, crops) are not independent and spoil any test.
    """

    def __init__(self, trace: Trace, asked: Sequence[bool]) -> None:
        self.rows = read_rows(trace, asked)
        fresh = np.arange(trace.num_samples) if trace.trained_N is None else (~trace.trained_N.bool()).numpy().nonzero()
        order = np.random.default_rng(0).permutation(np.ravel(fresh))
        self.choosing, self.testing = np.split(order, [round(CHOOSING * len(order))])
        self.choose_on, self.test_on = self.rows.take(self.choosing), self.rows.take(self.testing)
        self.fits = fits(self.choose_on)
        self._leaving: dict[str, Steps] = {}

    def leaving(self, fit: Fit | Choice) -> Steps:
        """When each tested row leaves along the path ([K, N])."""
        if fit.family not in self._leaving:
            self._leaving[fit.family] = fit.path.leaving(self.test_on)
        return self._leaving[fit.family]


_PARTS: WeakKeyDictionary[Trace, dict[tuple[bool, ...], Parts]] = WeakKeyDictionary()


def parts_of(trace: Trace, asked: Sequence[bool]) -> Parts:
    """The ``Parts`` of a trace, made once for all that is asked of it."""
    kept = _PARTS.setdefault(trace, {})
    if tuple(asked) not in kept:
        kept[tuple(asked)] = Parts(trace, asked)
    return kept[tuple(asked)]


def certify(trace: Trace, asked: Sequence[bool], aim: Aim) -> Proof:
    """The cheapest policy that the rows prove, if there is one that saves cost or gains what ``aim`` demands.

    The path comes from the family that ``choose`` prefers on the choosing part. Its steps are tested in their order,
    each at the full level, until one fails (arXiv 2110.01052). Testing starts where nobody leaves early, if that loses
    nothing by definition and the rows suffice for the bound; else where the choosing part is surest.
    """
    parts = parts_of(trace, asked)
    ensemble = parts.fits[0].path.ensemble if parts.fits else None  # all families share it
    loss_LN = losses(answered(trace, asked, ensemble), asked, aim.risk, trace)
    choosing_LN, testing_LN = loss_LN[:, parts.choosing], loss_LN[:, parts.testing]
    tested, full_cost = len(parts.testing), full_cost_of(trace)
    choice = choose(parts.choose_on, lambda brings: _hoped(brings, choosing_LN, aim, tested), parts.fits)
    if choice is None or not tested:
        return _refusal(parts, choosing_LN, aim, full_cost)
    leaving_KN, steps = parts.leaving(choice), choice.path.steps
    behind = choice.path.policy(0, asked, trace.num_exits).asks(trace.num_exits, trace.full_exit)[trace.full_exit + 1 :]
    sure = aim.risk != "error" and ensemble is None and not any(behind)
    step = _proved(leaving_KN, testing_LN, aim, sure, _hopes(choice.brings, choosing_LN, aim.bound, tested))
    cost_LN = np.broadcast_to(parts.rows.cost_L[:, None], testing_LN.shape)
    cost_P = along(leaving_KN, cost_LN, steps) / tested
    if step is None or (aim.bound >= 0 and aim.risk != "error" and cost_P[step] >= full_cost):
        return _refusal(parts, choosing_LN, aim, full_cost)
    observed = float(along(leaving_KN, testing_LN, steps)[step]) / tested
    right_P = along(leaving_KN, choice.path.seen(parts.test_on).right_LN.astype(np.float64), steps) / tested
    facts: dict[str, float | int | str] = {
        "family": choice.family,
        "tested_rows": tested,
        "expected_mean_cost": float(cost_P[step]),
        "expected_drop": float(parts.test_on.full_N.mean() - right_P[step]),
    }
    policy = choice.path.policy(step, asked, trace.num_exits)
    if aim.method == "split":
        note = (
            f"No statement about fresh rows: {tested} rows that did not choose saw a mean {aim.risk} of {observed:.2%}."
        )
        return Proof(policy, None, note, facts)
    certificate = _certificate(trace, policy.asks(trace.num_exits, trace.full_exit), aim, observed, tested)
    return Proof(policy, certificate, certificate.sentence, facts)


def full_cost_of(trace: Trace) -> float:
    """What the untouched network costs."""
    only = [exit == trace.full_exit for exit in range(trace.num_exits)]
    return float(policy_costs(trace, only)[trace.full_exit])


def losses(trace: Trace, asked: Sequence[bool], risk: Risk, network: Trace | None = None) -> Floats:
    """The loss of every row at each of the exits asked where it can stop ([L, N]), as ``Risk`` defines it.

    ``trace`` holds the answers; ``network`` (None: the same) says what the full network answers on its own.
    """
    network = trace if network is None else network
    exits = [exit for exit, on in enumerate(asked) if on]
    if risk == "brier":
        return np.stack([_brier(trace, exit) for exit in exits]) - _brier(network, trace.full_exit)
    said_EN, full_said_N = answers(trace).numpy(), answers(network)[network.full_exit].numpy()
    right_EN = said_EN == trace.labels_N.numpy()
    right_LN, full_N = right_EN[exits], full_said_N == trace.labels_N.numpy()
    found: dict[str, Bools | Floats] = {
        "drop": full_N.astype(np.float64) - right_LN,
        "harm": full_N & ~right_LN,
        "error": ~right_LN,
        "disagreement": said_EN[exits] != full_said_N,
    }
    return np.asarray(found[risk], np.float64)


def _brier(trace: Trace, exit: int) -> Floats:
    softmax_NC = torch.softmax(trace.logits_ENC[exit].detach(), 1, dtype=torch.float64).nan_to_num_(nan=0.0)
    softmax_NC[torch.arange(trace.num_samples), trace.labels_N] -= 1.0
    score_N: Floats = (softmax_NC.square_().sum(1) / 2).numpy()
    return score_N


def worst_so_far(leaving_KN: Steps, loss_LN: Floats) -> Floats:
    """``loss_LN`` with every loss raised to the largest that its row has met before on the path: it then never falls.

    An exit at which a row stops at no step is passed over.
    """
    before_KN = np.concatenate([np.full_like(leaving_KN[:1], np.iinfo(np.int64).max), leaving_KN[:-1]])
    worst_LN = loss_LN.copy()
    if len(leaving_KN):
        worst_LN[-1] = np.where(leaving_KN[-1] > 0, loss_LN[-1], -math.inf)
    for exit in reversed(range(len(leaving_KN))):
        stops_N = leaving_KN[exit] < before_KN[exit]
        worst_LN[exit] = np.where(stops_N, np.maximum(worst_LN[exit + 1], loss_LN[exit]), worst_LN[exit + 1])
    return worst_LN


def _hopes(brings: Brings, loss_LN: Floats, bound: float, tested: int) -> Floats:
    """How many standard errors of ``tested`` rows the mean loss lies below ``bound``, as the choosing part sees it [P].

    One row more, at a loss of 1, is counted for the spread: few rows without a loss do not make sure.
    """
    rows, steps = loss_LN.shape[1], len(brings.cost_P)
    mean_P, square_P = (along(brings.leaving_KN, value_LN, steps) / rows for value_LN in (loss_LN, loss_LN**2))
    hopes_P: Floats = (bound - mean_P) / np.sqrt((square_P - mean_P**2 + 1 / (rows + 1)) / tested)
    return hopes_P


def _level(aim: Aim) -> float:
    """Standard errors below the bound that a test takes, about."""
    if aim.delta is None:
        return 0.0
    return math.sqrt(2 * math.log(1 / aim.delta)) if _test_of(aim) == BETTING else float(norm.isf(aim.delta))


def _hoped(brings: Brings, loss_LN: Floats, aim: Aim, tested: int) -> int:
    """The last step that can be hoped to pass; the surest one where none can, because testing may still prove it."""
    hopes_P = _hopes(brings, loss_LN, aim.bound, max(tested, 1))
    hoped = np.flatnonzero(hopes_P >= _level(aim))
    return int(hoped[-1]) if len(hoped) else int(hopes_P.argmax())


def _test_of(aim: Aim) -> str:
    if aim.delta is None:
        return CONFORMAL
    if aim.method == "betting" or aim.risk == "brier":
        return BETTING
    return PAIRED if aim.risk == "drop" else BINOMIAL


def _proved(leaving_KN: Steps, loss_LN: Floats, aim: Aim, sure: bool, hopes_P: Floats) -> int | None:
    """The step that tested rows prove; ``sure``: where nobody leaves early nothing is lost, by definition."""
    tested, steps = loss_LN.shape[1], len(hopes_P)
    if aim.method == "split":
        met = np.flatnonzero(along(leaving_KN, loss_LN, steps) / tested <= aim.bound + 1e-12)
        return int(met[-1]) if len(met) else None
    if aim.delta is None:
        risk_P = along(leaving_KN, worst_so_far(leaving_KN, loss_LN), steps) / tested
        return last_conformal(risk_P, tested, aim.bound)
    nowhere_KN = np.ones((len(leaving_KN), tested), np.int64)
    start = int(hopes_P.argmax())
    if sure and _passes(nowhere_KN, np.zeros_like(loss_LN), aim, 1, 0)[0]:
        start = 0
    return last_proved(_passes(leaving_KN, loss_LN, aim, steps, start), start)


def _passes(leaving_KN: Steps, loss_LN: Floats, aim: Aim, steps: int, start: int) -> Bools:
    """Which steps pass the test of ``aim`` ([P]), truly from ``start`` up to the first that fails."""
    delta, tested, test = float(aim.delta or 0.0), loss_LN.shape[1], _test_of(aim)
    if test == PAIRED:
        worse_P, better_P = (along(leaving_KN, np.maximum(part_LN, 0), steps) for part_LN in (loss_LN, -loss_LN))
        counts = worse_P.round().astype(np.int64), better_P.round().astype(np.int64)
        return paired_passes(*counts, tested, aim.bound, delta)
    if test == BINOMIAL:
        hits_P = along(leaving_KN, loss_LN, steps).round().astype(np.int64)
        return binomial_pvalues(hits_P, tested, aim.bound) <= delta
    low = -1.0 if aim.risk in ("drop", "brier") else 0.0
    passes_P = np.zeros(steps, bool)
    for first in range(start, steps, BLOCK):
        step_S1 = np.arange(first, min(first + BLOCK, steps))[:, None]
        stop_SN = sum((leaving_N > step_S1).astype(np.int64) for leaving_N in leaving_KN)
        loss_SN = loss_LN[stop_SN, np.arange(tested)]
        passes_P[step_S1[:, 0]] = betting_pvalues(loss_SN, aim.bound, delta, low=low) <= delta
        if not passes_P[step_S1[:, 0]].all():
            break
    return passes_P


def _refusal(parts: Parts, choosing_LN: Floats, aim: Aim, full_cost: float) -> Proof:
    """The full network, why, and how many rows it would take."""
    tested = len(parts.testing)
    note = f"It is not proved that {claim_of(aim.risk, aim.bound)}: this is the full network, without a certificate."
    least = 1
    if aim.method != "split" and aim.bound > 0:
        least = rows_needed(aim.bound, aim.delta) if aim.delta is not None else math.ceil(1 / aim.bound) - 1
    hoped = _rows_hoped(parts, choosing_LN, aim, full_cost)
    if tested < least:
        note += f" It takes at least {least} rows without any loss in the part that tests, {_in_all(least)} in all; "
        note += f"there are {tested}."
    elif hoped is None:
        note += " No policy comes so far on the rows that choose: more rows would not help."
    else:
        note += f" It takes about {_in_all(max(hoped, least))} rows in all, judging by those that choose."
    return Proof(None, None, note, {"tested_rows": tested})


def _in_all(tested: int) -> int:
    return math.ceil(tested / (1 - CHOOSING))


def _rows_hoped(parts: Parts, choosing_LN: Floats, aim: Aim, full_cost: float) -> int | None:
    """With how many tested rows some policy of use would pass as often as not; None if no number of them would do."""
    most = 0.0
    for fit in parts.fits:
        hopes_P = _hopes(fit.brings, choosing_LN, aim.bound, 1)
        useful_P = (fit.brings.cost_P < full_cost) | (aim.bound < 0) | (aim.risk == "error")
        most = max(most, float(hopes_P[useful_P].max(initial=0.0)))
    return math.ceil((_level(aim) / most) ** 2) if most > 0 else None


def _certificate(trace: Trace, asked: Sequence[bool], aim: Aim, observed: float, tested: int) -> Certificate:
    digest = hashlib.sha256(trace.labels_N.numpy().tobytes())
    rows = trace.logits_ENC.detach().contiguous() if trace.hash_N is None else trace.hash_N.contiguous()
    digest.update(rows.numpy().tobytes())
    return Certificate(
        method="crc" if aim.delta is None else "betting" if aim.method == "betting" else "ltt",
        test=_test_of(aim),
        risk=aim.risk,
        bound=aim.bound,
        delta=aim.delta,
        observed=observed,
        rows=trace.num_samples,
        tested_rows=tested,
        data_hash=digest.hexdigest()[:16],
        backend=trace.info.get("backend", ""),
        precision=trace.info.get("precision", ""),
        exit_names=trace.exit_names,
        asked_E=tuple(asked),
        view=trace.info.get("second_look", "") if any(asked[trace.full_exit + 1 :]) else "",
        versions=_versions(),
    )


@cache
def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("shallowdeep", "torch", "numpy", "scipy"))
