"""A policy with a certificate: one part of the rows chooses a path of policies, the other tests its steps in order.

It refuses to look at a tested row before the path, its order and the step where testing starts are fixed.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional

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
from shallowdeep.certificates import Certificate, Claim, Method, claim_of
from shallowdeep.effects import share
from shallowdeep.paths import Brings, Path, Rows, Steps, along, read_rows
from shallowdeep.policies import OVERLAP, CalibrationRecord, Ensemble, Policy, finite_rows
from shallowdeep.thresholds import Choice, choose, fits
from shallowdeep.types import Trace
from shallowdeep.walking import policy_costs

CHOOSING = 0.2
"""The part of the rows that chooses; others were measured (docs/decisions.md)."""
PAIRED, BINOMIAL = "exact paired test, fixed sequence", "exact binomial test, fixed sequence"
BETTING, CONFORMAL = "betting, fixed sequence", "conformal risk control, losses made monotone"
MANY_GAINS = 0.08
"""Where more of the choosing rows gain, bets are tested: the exact test of pairs gives up on many discordant rows."""
KEPT_BACK = 0.1
"""The part of delta that is kept for the rule with a second look, where another family is preferred."""
MOST_TRIED = 1_000_000
"""Of how many rows bets are tried to say how many it takes; beyond, the exact test's number is near enough."""
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

    risk: Claim
    bound: float
    delta: float | None
    method: Method


class Tested(NamedTuple):
    """What a path does with tested rows: when they leave, and what stopping costs them at each exit."""

    leaving_KN: Steps
    right_LN: Floats
    loss_LN: Floats


class Parts:
    """One trace in two parts, and what the choosing one found: kept with the trace, of which several things are asked.

    Rows that the ICs trained on are left out. Rows are dealt by a fixed shuffle, so that sorted data do no harm. A
    row that was drawn twice, as in ``proof``, may fall into both parts: drawn independently, that is what fresh rows
    do. Copies of rows in a data set that is not drawn (frames, crops) are not independent and spoil any test.
    """

    def __init__(self, trace: Trace, asked: Sequence[bool], *, ensembles: bool) -> None:
        self.asked, rows = tuple(asked), read_rows(trace, asked)
        fresh = np.arange(trace.num_samples) if trace.trained_N is None else (~trace.trained_N.bool()).numpy().nonzero()
        order = np.random.default_rng(0).permutation(np.ravel(fresh))
        self.choosing, self.testing = np.split(order, [round(CHOOSING * len(order))])
        self.choose_on, self.test_on = rows.take(self.choosing), rows.take(self.testing)
        self.fits = fits(self.choose_on, ensembles=ensembles)
        self._tested: dict[str, Tested] = {}

    def tested(self, choice: Choice, risk: Claim) -> Tested:
        """What the path of ``choice`` does with tested rows, worked out once."""
        key = f"{choice.family}: {risk}"
        if key not in self._tested:
            right_LN = choice.path.seen(self.test_on).right_LN.astype(np.float64)
            loss_LN = losses(choice.path, self.test_on, risk)
            self._tested[key] = Tested(choice.path.leaving(self.test_on), right_LN, loss_LN)
        return self._tested[key]


_PARTS: WeakKeyDictionary[Trace, dict[tuple[tuple[bool, ...], bool], Parts]] = WeakKeyDictionary()


def parts_of(trace: Trace, asked: Sequence[bool], risk: Claim = "drop", method: Method = "auto") -> Parts:
    """The ``Parts`` of a trace, made once for all that is asked of it. Ensembles and second looks give other answers
    than the full network: they are left out where those count as a loss, and from a path that must begin with the full
    network, because losses are made monotone from there.
    """
    own = risk in ("harm", "disagreement") or method == "crc"
    if own:
        asked = [on and exit <= trace.full_exit for exit, on in enumerate(asked)]
    kept, key = _PARTS.setdefault(trace, {}), (tuple(asked), not own)
    if key not in kept:
        kept[key] = Parts(trace, asked, ensembles=key[1])
    return kept[key]


def check_provable(trace: Trace, asked: Sequence[bool]) -> None:
    """Raise ``ValueError`` for a trace that a certificate could not tell from others where ``asked`` exits are. Warn of
    rows that are there twice.
    """
    if "temperature_E" in trace.info:
        raise ValueError(
            "These logits were divided by temperatures, and a trace does not say which rows taught them: bound the "
            "trace as it was collected."
        )
    view = trace.info.get("second_look", "")
    if "<" in view and any(asked[trace.full_exit + 1 :]):
        raise ValueError(
            f"A certificate names its second look, and {view!r} is the name of many: give SecondLook(name=..., "
            "view=...), a view of views.VIEWS, or leave that exit out with enabled_E."
        )
    if trace.hash_N is not None and (copies := 1 - len(np.unique(trace.hash_N.numpy())) / trace.num_samples) > OVERLAP:
        warnings.warn(
            f"{copies:.1%} of these rows are copies of others: the bound holds only if rows were drawn, one by one, "
            "from where copies are as common.",
            stacklevel=5,
        )


def unseen(trace: Trace, record: CalibrationRecord | None, name: str) -> Bools:
    """Which rows of ``trace`` did not teach what has the ``record`` ([N]): others prove nothing about it.

    Raises ``ValueError`` where those are more than a few. Rows without hashes cannot be told apart and count as new.
    """
    if record is None:
        return np.ones(trace.num_samples, bool)
    seen_N = record.seen(trace)
    if (part := share(seen_N)) > OVERLAP:
        raise ValueError(
            f"The {name} has seen {part:.1%} of these rows, so no bound would hold on what they say of it: take other "
            f"rows, say one half of a trace for the {name} and the other for the bound."
        )
    unseen_N: Bools = (~seen_N).numpy()
    return unseen_N


def certify(trace: Trace, asked: Sequence[bool], aim: Aim) -> Proof:
    """The cheapest policy that the rows prove, if there is one that saves cost or gains what ``aim`` demands.

    The path is the first of ``_paths`` that proves something. Its steps are tested in their order, each at the whole
    level of its path, until one fails (arXiv 2110.01052). Testing starts at the first step, if it gives the full
    network's answers to all rows that choose and the rows suffice for the bound; else where these are surest.
    """
    if aim.method != "split":
        check_provable(trace, asked)
    parts = parts_of(trace, asked, aim.risk, aim.method)
    tested, full_cost = len(parts.testing), full_cost_of(trace)
    for choice, own in _paths(parts, aim):
        leaving_KN, right_LN, loss_LN = parts.tested(choice, aim.risk)
        steps = choice.path.steps
        step = _proved(leaving_KN, loss_LN, own, _start(choice, parts, own), steps)
        cost_LN = np.broadcast_to(parts.test_on.cost_L[:, None], loss_LN.shape)
        cost_P = along(leaving_KN, cost_LN, steps) / tested
        if step is not None and (cost_P[step] < full_cost or _gains(aim)):
            break
    else:
        return _refusal(parts, aim, full_cost)
    observed = float(along(leaving_KN, loss_LN, steps)[step]) / tested
    facts: dict[str, float | int | str] = {
        "family": choice.family,
        "tested_rows": tested,
        "expected_mean_cost": float(cost_P[step]),
        "expected_drop": float(parts.test_on.full_N.mean() - along(leaving_KN, right_LN, steps)[step] / tested),
    }
    policy = choice.path.policy(step, parts.asked, trace.num_exits)
    if aim.method == "split":
        note = (
            f"No statement about fresh rows: {tested} rows that did not choose saw a mean {aim.risk} of {observed:.2%}."
        )
        return Proof(policy, None, note, facts)
    proved = aim._replace(method=own.method)
    certificate = certificate_of(trace, policy.asks(trace.num_exits, trace.full_exit), proved, observed, tested)
    return Proof(policy, certificate, certificate.sentence, facts)


def _paths(parts: Parts, aim: Aim) -> list[tuple[Choice, Aim]]:
    """What is tested, one after another, each with its share of delta: the family that ``choose`` prefers; and, where
    it leaves a second look out, the rule that has it. What gains least by the rows that choose may gain most.
    """
    tested, accuracy = len(parts.testing), _accuracy(parts)
    preferred = choose(parts.choose_on, lambda brings: _hoped(brings, accuracy, aim, tested), parts.fits)
    if preferred is None or not tested:
        return []
    step, brings = preferred.step, preferred.brings
    gains = float(brings.harm_P[step] - accuracy + brings.accuracy_P[step])
    if (
        aim.method == "auto"
        and aim.delta is not None
        and aim.risk == "drop"
        and gains > MANY_GAINS + max(-aim.bound, 0.0)
    ):
        aim = aim._replace(method="betting")
    rule = parts.fits[0]
    if aim.delta is None or rule.family == preferred.family or parts.choose_on.full == len(parts.choose_on.exits) - 1:
        return [(preferred, aim)]
    second = Choice(rule.family, rule.path, _hoped(rule.brings, accuracy, aim, tested), rule.brings)
    parted = ((preferred, 1 - KEPT_BACK), (second, KEPT_BACK))
    return [(choice, aim._replace(delta=aim.delta * part)) for choice, part in parted]


def full_cost_of(trace: Trace) -> float:
    """What the untouched network costs."""
    only = [exit == trace.full_exit for exit in range(trace.num_exits)]
    return float(policy_costs(trace, only)[trace.full_exit])


def losses(path: Path, rows: Rows, risk: Claim) -> Floats:
    """The loss of every row at each exit where it can stop ([L, N]), as ``Claim`` defines it, by the path's answers."""
    if risk in ("disagreement", "brier"):
        return _losses_of_answers(path.ensemble, rows, risk)
    right_LN = path.seen(rows).right_LN
    found = {"drop": rows.full_N.astype(np.float64) - right_LN, "harm": rows.full_N & ~right_LN, "error": ~right_LN}
    return np.asarray(found[risk], np.float64)


def _losses_of_answers(ensemble: Ensemble | None, rows: Rows, risk: Claim) -> Floats:
    loss_LN = np.empty(rows.right_LN.shape)
    for chunk, logits, labels_B in rows.chunks(len(rows.exits)):
        softmax = [torch.softmax(logits_BC, 1, dtype=torch.float64) for logits_BC in logits]
        full = _loss(logits[rows.full], softmax[rows.full], labels_B, risk)
        for place, own_BC in enumerate(logits):
            said = own_BC, softmax[place]
            if ensemble is not None and ensemble.weight_EE[rows.exits[place]]:
                said = ensemble.answer(rows.exits[place], rows.exits[: place + 1], softmax[: place + 1], own_BC)
            mine_B = _loss(*said, labels_B, risk)
            loss_LN[place, chunk] = (mine_B - full if risk == "brier" else mine_B != full).numpy()
    return loss_LN


def _loss(logits_BC: Tensor, softmax_BC: Tensor, labels_B: Tensor, risk: Claim) -> Tensor:
    """The label (-1: not finite), or half the squared distance to the truth."""
    if risk == "disagreement":
        return torch.where(finite_rows(logits_BC), logits_BC.argmax(1), -1)
    return (softmax_BC.nan_to_num(nan=0.0) - functional.one_hot(labels_B, logits_BC.shape[1])).square().sum(1) / 2


def worst_so_far(leaving_KN: Steps, loss_LN: Floats) -> Floats:
    """``loss_LN`` with every loss raised to the largest that its row has met before on the path: it then never falls.

    The path begins with the full network, which is what is left when no step passes, and which loses nothing: so no
    loss stays below 0. An exit at which a row stops at no step is passed over.
    """
    before_KN = np.concatenate([np.full_like(leaving_KN[:1], np.iinfo(np.int64).max), leaving_KN[:-1]])
    worst_LN = np.maximum(loss_LN, 0.0)
    worst_LN[-1] *= (leaving_KN > 0).all(0)
    for exit in reversed(range(len(leaving_KN))):
        stops_N = leaving_KN[exit] < before_KN[exit]
        worst_LN[exit] = np.where(stops_N, np.maximum(worst_LN[exit + 1], worst_LN[exit]), worst_LN[exit + 1])
    return worst_LN


def _accuracy(parts: Parts) -> float:
    return float(parts.choose_on.full_N.mean()) if len(parts.choosing) else 0.0


def _hopes(brings: Brings, accuracy: float, aim: Aim, tested: int) -> Floats:
    """How many standard errors of ``tested`` rows the mean loss lies below the bound, as held-out choosing rows see it
    [P]; ``accuracy`` is the full network's on them.

    One row more, at a loss of 1, is counted for the spread: few rows without a loss do not make sure. Where only the
    drop is known (brier, and disagreement as far as it matters), it stands for the risk.
    """
    drop_P = accuracy - brings.accuracy_P
    differ_P = 2 * brings.harm_P - drop_P
    by_risk = {"harm": brings.harm_P, "error": 1 - brings.accuracy_P, "disagreement": differ_P}
    mean_P = by_risk.get(aim.risk, drop_P)
    square_P = by_risk.get(aim.risk, differ_P)
    rows = brings.leaving_KN.shape[1]
    hopes_P: Floats = (aim.bound - mean_P) / np.sqrt((square_P - mean_P**2 + 1 / (rows + 1)) / tested)
    return hopes_P


def _level(aim: Aim) -> float:
    """Standard errors below the bound that a test takes, about."""
    if aim.delta is None:
        return 0.0
    return math.sqrt(2 * math.log(1 / aim.delta)) if _test_of(aim) == BETTING else float(norm.isf(aim.delta))


def _hoped(brings: Brings, accuracy: float, aim: Aim, tested: int) -> int:
    """The last step that can be hoped to pass; the surest one where none can, because testing may still prove it."""
    hopes_P = _hopes(brings, accuracy, aim, max(tested, 1))
    hoped = np.flatnonzero(hopes_P >= _level(aim))
    return int(hoped[-1]) if len(hoped) else int(hopes_P.argmax())


def _start(choice: Choice, parts: Parts, aim: Aim) -> int:
    """The step where testing starts, by the choosing part alone."""
    if aim.delta is None:
        return 0
    tested, leaving_KN = len(parts.testing), choice.path.leaving(parts.choose_on)
    at_the_end = bool(((leaving_KN > 0).sum(0) == parts.choose_on.full).all())
    if at_the_end and choice.path.ensemble is None and aim.risk != "error":
        nothing_KN, zero_LN = np.ones((len(leaving_KN), tested), np.int64), np.zeros((len(leaving_KN) + 1, tested))
        if _passes(nothing_KN, zero_LN, aim, 1, 0)[0]:
            return 0
    return int(_hopes(choice.brings, _accuracy(parts), aim, tested).argmax())


def _test_of(aim: Aim) -> str:
    if aim.delta is None:
        return CONFORMAL
    if aim.method == "betting" or aim.risk == "brier":
        return BETTING
    return PAIRED if aim.risk == "drop" else BINOMIAL


def _proved(leaving_KN: Steps, loss_LN: Floats, aim: Aim, start: int, steps: int) -> int | None:
    """The step that tested rows prove."""
    tested = loss_LN.shape[1]
    if aim.method == "split":
        met = np.flatnonzero(along(leaving_KN, loss_LN, steps) / tested <= aim.bound + 1e-12)
        return int(met[-1]) if len(met) else None
    if aim.delta is None:
        risk_P = along(leaving_KN, worst_so_far(leaving_KN, loss_LN), steps) / tested
        return last_conformal(risk_P, tested, aim.bound)
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


def _refusal(parts: Parts, aim: Aim, full_cost: float) -> Proof:
    """The full network, why, and how many rows it would take."""
    tested = len(parts.testing)
    kind = "policy" if _gains(aim) else "cheaper policy"
    note = f"It is not proved for any {kind} that {claim_of(aim.risk, aim.bound)}: "
    note += "this is the full network, without a certificate."
    least = _least(aim)
    hoped = _rows_hoped(parts, aim, full_cost)
    if tested < least:
        note += f" It takes at least {least} rows in the part that tests, {_in_all(least)} in all, where none of them "
        note += f"loses{' and none gains' if aim.risk in ('drop', 'brier') else ''}; there are {tested}."
    elif hoped is None:
        note += " No policy comes so far on the rows that choose: more rows would not help."
    elif (rows := len(parts.choosing) + tested) >= (in_all := _in_all(max(hoped, least))):
        note += f" Of six draws of {in_all} rows five would prove it, by those that choose; these {rows} do not."
    else:
        note += f" It takes about {in_all} rows in all, judging by those that choose."
    return Proof(None, None, note, {"tested_rows": tested})


def _least(aim: Aim) -> int:
    """The fewest tested rows with which the test passes where none loses and none gains."""
    if aim.method == "split" or aim.bound <= 0:
        return 1
    if aim.delta is None:
        return math.ceil(1 / aim.bound) - 1
    least, low = rows_needed(aim.bound, aim.delta), -1.0 if aim.risk in ("drop", "brier") else 0.0
    if _test_of(aim) == BETTING and least < MOST_TRIED:  # a few rows in a hundred more than the exact tests
        while betting_pvalues(np.zeros((1, least)), aim.bound, aim.delta, low=low)[0] > aim.delta:
            least += max(1, least // 200)
    return least


def _gains(aim: Aim) -> bool:
    """Whether the full network itself may not do what ``aim`` asks, so that a policy which does need not be cheaper."""
    return aim.bound < 0 or aim.risk == "error"


def _in_all(tested: int) -> int:
    return math.ceil(tested / (1 - CHOOSING))


def _rows_hoped(parts: Parts, aim: Aim, full_cost: float) -> int | None:
    """With how many tested rows some policy of use would pass in five draws of six; None if no number would do."""
    most = 0.0
    for fit in parts.fits:
        hopes_P = _hopes(fit.brings, _accuracy(parts), aim, 1)
        useful_P = (fit.brings.cost_P < full_cost) | _gains(aim)
        most = max(most, float(hopes_P[useful_P].max(initial=0.0)))
    return math.ceil(((_level(aim) + 1) / most) ** 2) if most > 0 else None


def certificate_of(trace: Trace, asked: Sequence[bool], aim: Aim, observed: float, tested: int) -> Certificate:
    """What ``tested`` rows of ``trace``, where ``asked`` exits were, prove: ``aim``, of which they saw ``observed``."""
    last = max(exit for exit, on in enumerate(asked) if on or exit == trace.full_exit)
    digest = hashlib.sha256(trace.labels_N.numpy().tobytes())
    rows = trace.logits_ENC.detach() if trace.hash_N is None else trace.hash_N
    digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
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
        weights=trace.info.get("weights", ""),
        exit_names=trace.exit_names[: last + 1],
        asked_E=tuple(asked[: last + 1]),
        view=trace.info.get("second_look", "") if last > trace.full_exit else "",
        versions=_versions(),
    )


@cache
def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("shallowdeep", "torch", "numpy", "scipy"))
