"""When to withhold an answer: a threshold on the alarm, with a bound on the errors among the answers that are kept.

It refuses to promise what its rows cannot show: the alarm, the path of thresholds and the test have rows of their own.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from shallowdeep.alarming import fit_alarm, full_network, wrong_answers
from shallowdeep.bounds import Bools, Counts, Floats, binomial_upper, last_proved, rows_needed
from shallowdeep.calibration import SUREST
from shallowdeep.certificates import Certificate
from shallowdeep.guarantees import Aim, certificate_of, check_provable, unseen
from shallowdeep.policies import OVERLAP, CalibrationRecord, Policy
from shallowdeep.spelling import rule_to_json
from shallowdeep.trajectory import Alarm
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

UPTO = (0.3, 0.5)
"""Rows up to this share fit the alarm, up to that choose the path, the others test; with an alarm given, the first
choose and all others test."""
STEPS = 200
"""Thresholds on the path, by how many of the choosing rows they keep."""
FEWEST = 10
"""With fewer rows some part would have none."""
NOTHING = -1.0
"""The threshold that keeps no answer."""


def calibrate_alarm(
    trace: Trace,
    policy: Policy | None = None,
    *,
    max_error: float,
    confidence: float = 0.95,
    alarm: Alarm | None = None,
) -> Alarm:
    """The alarm with the ``threshold`` that keeps most answers of ``policy`` (None: of the full network) such that of
    those kept at most a share ``max_error`` is wrong, with probability ``confidence`` over the draw of these rows.

    The statement speaks of all the answers kept together, on fresh rows drawn as these were, from the same backend and
    precision; not of a class, nor of one answer. ``alarm`` is one fitted elsewhere (None: it is fitted on 30 % of the
    rows). Where nothing can be shown, the threshold keeps no answer, with a warning that says how many rows it takes.
    ``certificate`` holds the statement and what it is void for, ``fitted_on.info`` the counts.

    Rows that the ICs trained on, or that policy or alarm have seen, are left out: with them the bound would be void.
    Raises ``ValueError`` on impossible targets, and where policy or alarm have seen more than a few.

    Source: Learn then Test, arXiv 2110.01052 (a fixed sequence), with Clopper-Pearson's exact limit of the errors among
    the test rows kept, which are binomial given how many are kept.
    >>> row = torch.arange(4000)
    >>> logits_ENC = torch.stack([torch.stack([row - 1999.5, 1999.5 - row], 1) / 50] * 2)
    >>> flaw_N = (row % 7 == 0) & ((row - 2000).abs() < 200)
    >>> labels_N = ((row < 2000) ^ flaw_N).long()
    >>> trace = Trace(logits_ENC=logits_ENC, labels_N=labels_N, cost_E=torch.tensor([0.5, 1.0]))
    >>> alarm = calibrate_alarm(trace, max_error=0.01)
    >>> kept_N = alarm.keeps(simulate(full_network(trace), trace, alarm).alarm_N)
    >>> bool(kept_N.double().mean() > 0.8), bool(flaw_N[kept_N].double().mean() < 0.01)
    (True, True)
    """
    fresh = _fresh(trace, policy, alarm, max_error, confidence)
    policy = policy or full_network(trace)
    check_provable(trace, policy.asks(trace.num_exits, trace.full_exit))
    order = fresh[torch.from_numpy(np.random.default_rng(0).permutation(len(fresh)))]
    fitting, choosing, testing = order.tensor_split([round(len(fresh) * upto) for upto in UPTO])
    if alarm is None:
        alarm = fit_alarm(trace.rows(fitting), policy)
    else:
        choosing, testing = order.tensor_split([round(len(fresh) * UPTO[0])])
    choose, test = (judged(trace.rows(part), policy, alarm) for part in (choosing, testing))
    found = last_passing(choose, test, max_error, confidence)
    facts: dict[str, Any] = {"max_error": max_error, "confidence": confidence, "tested_rows": len(testing)}
    facts["policy"] = rule_to_json(policy)
    certificate: Certificate | None = None
    if found.passed:
        facts |= {"kept_rows": found.kept, "wrong_rows": found.wrong, "coverage": found.kept / len(testing)}
        aim = Aim("kept", max_error, round(1 - confidence, 12), "ltt")
        certificate = certificate_of(trace, alarm.asked_E, aim, found.wrong / found.kept, len(testing))
        facts["note"] = certificate.sentence
    else:
        facts |= {"kept_rows": 0, "wrong_rows": 0, "coverage": 0.0}
        facts["note"] = _too_few(max_error, confidence, len(testing), found)
        warnings.warn(facts["note"], stacklevel=2)
    info = {**(alarm.fitted_on.info if alarm.fitted_on else {}), **facts}
    record = CalibrationRecord.of(trace, alarm.asked_E, info, certificate).also(alarm.fitted_on)
    return dataclasses.replace(alarm, threshold=found.threshold if found.passed else NOTHING, fitted_on=record)


def _fresh(trace: Trace, policy: Policy | None, alarm: Alarm | None, max_error: float, confidence: float) -> Tensor:
    """The positions of rows that nobody has seen. Raises ``ValueError`` as ``calibrate_alarm``."""
    if not 0 < max_error < 1 or not SUREST <= 1 - confidence <= 1 - SUREST:
        raise ValueError(
            "max_error and confidence lie between 0 and 1, such as 0.01 and 0.95; "
            f"found {max_error} and {confidence}. No number of rows shows that nothing is ever wrong."
        )
    fresh_N = unseen(trace, None if policy is None else policy.calibrated_on, "policy")
    fresh_N &= unseen(trace, None if alarm is None else alarm.fitted_on, "alarm")
    if (part := trace.trained_share) > OVERLAP:
        warnings.warn(f"The ICs trained on {part:.1%} of these rows, which are left out.", stacklevel=3)
    if trace.trained_N is not None:
        fresh_N &= ~trace.trained_N.bool().numpy()
    if (rows := int(fresh_N.sum())) < FEWEST:
        raise ValueError(f"An alarm takes {FEWEST} rows that nobody has seen; here are {rows}.")
    return torch.from_numpy(fresh_N.nonzero()[0])


def _too_few(max_error: float, confidence: float, testing: int, found: Found) -> str:
    least = rows_needed(max_error, 1 - confidence)
    return (
        f"No threshold could be shown to keep errors at {max_error:.2%} of the answers kept: nothing is kept. It takes "
        f"at least {least} kept answers without any error among the rows that test, of which there are {testing} "
        f"here; the most promising threshold keeps {found.kept}, {found.wrong} of them wrong."
    )


class Judged(NamedTuple):
    """Alarms of answers, from the least, and which of the answers are wrong."""

    alarm_N: Floats
    wrong_N: Bools


class Found(NamedTuple):
    """A threshold, whether it ``passed`` the test, and how many of the rows that tested it keeps, right and wrong."""

    threshold: float
    passed: bool
    kept: int
    wrong: int


def last_passing(choose: Judged, test: Judged, max_error: float, confidence: float) -> Found:
    """The last threshold before the first that fails, on the path that ``choose`` suggests; if all fail, the first."""
    path_P = _path(choose, len(test.alarm_N), confidence)
    kept_P, wrong_P = _counts(path_P, test)
    step = last_proved(binomial_upper(wrong_P, kept_P, 1 - confidence) <= max_error)
    at = step or 0
    return Found(float(path_P[at]), step is not None, int(kept_P[at]), int(wrong_P[at]))


def judged(trace: Trace, policy: Policy, alarm: Alarm) -> Judged:
    """The answers of ``policy`` on ``trace``, from the least suspicious."""
    outcome = simulate(policy, trace, alarm)
    assert outcome.alarm_N is not None
    order_N = outcome.alarm_N.argsort()
    return Judged(outcome.alarm_N[order_N].numpy(), wrong_answers(outcome, trace)[order_N].numpy())


def _path(choose: Judged, testing: int, confidence: float) -> Floats:
    """Thresholds, midway between alarms seen, from the one most likely to pass the test to the one that keeps all."""
    rows = len(choose.alarm_N)
    last_P = np.unique(np.linspace(0, rows, min(STEPS, rows) + 1).astype(np.int64)[1:]) - 1
    above_P = np.append(choose.alarm_N, 1.0)[last_P + 1]
    path_P = np.minimum(np.unique((choose.alarm_N[last_P] + above_P) / 2), np.nextafter(1, 0))
    kept_P, wrong_P = (count_P * testing / rows for count_P in _counts(path_P, choose))
    # One error more than seen: where none was seen, some are to be expected.
    worse_P = wrong_P + testing / rows
    limit_P = np.where(worse_P < kept_P, beta.ppf(confidence, worse_P + 1, np.maximum(kept_P - worse_P, 1e-9)), 1.0)
    hopeful_P: Floats = path_P[int(np.argmin(limit_P)) :]
    return hopeful_P


def _counts(path_P: Floats, judged: Judged) -> tuple[Counts, Counts]:
    """How many answers each threshold keeps, and how many of those are wrong."""
    kept_P = np.searchsorted(judged.alarm_N, path_P, side="right")
    return kept_P, np.append(0, judged.wrong_N.cumsum())[kept_P]
