"""Policies from held-out rows, for an aim, a budget or a bound; and what a policy is worth on other rows.

It refuses to know networks and training: a trace comes in, a policy goes out. What it cannot do it says, in the
policy's record and in a warning; it never promises more than its rows can show.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from shallowdeep.certificates import Certificate, Method, Risk
from shallowdeep.effects import answers, share
from shallowdeep.families import FAMILIES
from shallowdeep.finding import error_auroc
from shallowdeep.guarantees import Aim, certify, full_cost_of
from shallowdeep.paths import Rows, brings_of, read_rows
from shallowdeep.policies import OVERLAP, CalibrationRecord, Confidence, Fixed, Policy, asked_exits, finite_rows
from shallowdeep.spelling import rule_to_json
from shallowdeep.thresholds import Choice, choose, within_cost, within_drop
from shallowdeep.types import Trace, table
from shallowdeep.walking import simulate

SUREST = 1e-6
"""No confidence is stated closer to 1, or to 0: exact tests sum up what is rarer than 1e-9 in one term."""
Found = tuple[Policy, dict[str, Any]]


def calibrate(
    trace: Trace,
    *,
    max_accuracy_drop: float | None = None,
    max_mean_cost: float | None = None,
    confidence: float | None = None,
    method: Method = "auto",
    risk: Risk = "drop",
    enabled_E: Sequence[bool] | None = None,
) -> Policy:
    """The cheapest policy within a drop of accuracy, or the most accurate within a mean cost, from held-out rows.

    Exactly one target. ``max_accuracy_drop`` is in shares of accuracy below the full exit's: an aim, met on average
    and not in every draw of rows, unless ``confidence`` is given. ``confidence=0.95`` makes it a bound that holds with
    that probability over the draw of calibration rows, and puts a ``Certificate`` on the policy's record: one part of
    the rows chooses, the other tests (``method`` "ltt" or "betting"; "auto" is the first, and the second where many of
    the choosing rows gain). At 0 or below it demands as much accuracy as the full network's, or more.
    ``method="crc"`` keeps the bound in expectation, ``"split"`` promises nothing; both without ``confidence``. ``risk``
    is what the bound is on (see ``certificates``). ``max_mean_cost`` is a share of the untouched backbone's cost.
    ``enabled_E`` restricts the exits.

    ``policy.calibrated_on.info`` records targets, family, what to expect on fresh rows, and a note in words. When no
    early exit meets a drop or can be certified, the full network is returned, without a certificate and with a warning
    that says how many rows it would take. Raises ``ValueError`` on a budget that nothing meets, and on targets that
    make no sense. The same rows give the same policy.

    Source of the bounds: Learn then Test, arXiv 2110.01052; conformal risk control, arXiv 2208.02814.
    >>> row = torch.arange(400)
    >>> early_NC = torch.stack([row / 100.0, 4 - row / 100.0], 1)  # sure of the first and the last rows
    >>> full_NC = torch.stack([row * 1.0 - 190, 190 - row * 1.0], 1)
    >>> logits_ENC = torch.stack([early_NC, full_NC])
    >>> trace = Trace(logits_ENC=logits_ENC, labels_N=(row < 190).long(), cost_E=torch.tensor([0.4, 1.0]))
    >>> policy = calibrate(trace, max_accuracy_drop=0.01)
    >>> evaluate(policy, trace).mean_cost < 0.5
    True
    """
    _check(max_accuracy_drop, max_mean_cost, confidence, method, risk)
    asked = asked_exits(enabled_E, trace.num_exits, trace.full_exit)
    if (seen := trace.trained_share) > OVERLAP:
        warnings.warn(f"The ICs trained on {seen:.1%} of these rows: thresholds from them are too bold.", stacklevel=2)
    certificate: Certificate | None = None
    drop = float(max_accuracy_drop or 0.0)
    if confidence is not None or method in ("crc", "split"):
        aim = Aim(risk, drop, None if confidence is None else round(1 - confidence, 12), method)
        policy, certificate, facts = _bound(trace, asked, aim)
    elif max_mean_cost is not None:
        policy, facts = _budget(trace, asked, read_rows(trace, asked), max_mean_cost)
    else:
        policy, facts = _aim(trace, asked, read_rows(trace, asked), drop)
    targets = {"max_accuracy_drop": max_accuracy_drop, "max_mean_cost": max_mean_cost, "confidence": confidence}
    if isinstance(policy, Fixed) and max_mean_cost is None:
        warnings.warn(str(facts["note"]), stacklevel=2)
    info: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    info |= {"rows": trace.num_samples} | facts
    if certificate is not None:
        info["policy"] = rule_to_json(policy)  # whoever changes a threshold keeps the record, but not the proof
    frozen: Any = policy  # every policy is a dataclass, which a protocol cannot say
    record = CalibrationRecord.of(trace, policy.asks(trace.num_exits, trace.full_exit), info, certificate)
    found: Policy = dataclasses.replace(frozen, calibrated_on=record)
    return found


def _check(
    max_accuracy_drop: float | None,
    max_mean_cost: float | None,
    confidence: float | None,
    method: Method,
    risk: Risk,
) -> None:
    if (max_accuracy_drop is None) == (max_mean_cost is None):
        raise ValueError("calibrate needs one target: max_accuracy_drop=0.01, say, or max_mean_cost=0.5.")
    if max_accuracy_drop is not None and not -1 < max_accuracy_drop < 1:
        raise ValueError(f"max_accuracy_drop is a share of accuracy, 0.01 for one point; found {max_accuracy_drop}.")
    if max_mean_cost is not None and not max_mean_cost > 0:
        raise ValueError(f"max_mean_cost is a share of the backbone's cost, above 0; found {max_mean_cost}.")
    if method not in get_args(Method):
        raise ValueError(f"method is one of {', '.join(get_args(Method))}; found {method!r}.")
    if risk not in get_args(Risk):
        raise ValueError(f"risk is one of {', '.join(get_args(Risk))}; found {risk!r}.")
    unsure = method in ("crc", "split")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(
            f"confidence is a probability between 0 and 1, such as 0.95; found {confidence}. No rows make sure."
        )
    if confidence is not None and not SUREST <= 1 - confidence <= 1 - SUREST:
        raise ValueError(f"confidence lies between {SUREST:g} and 1 - {SUREST:g}, found 1 - {1 - confidence:.2g}.")
    if confidence is not None and max_accuracy_drop is None:
        raise ValueError("confidence bounds a drop of accuracy; a mean cost is measured, not risked. Leave one out.")
    if max_accuracy_drop is None and (unsure or method != "auto" or risk != "drop"):
        raise ValueError(f"method={method!r} and risk={risk!r} speak of a bound: give max_accuracy_drop=0.01, say.")
    if confidence is not None and unsure:
        raise ValueError(f"method={method!r} holds with no stated probability; leave confidence out, or take 'ltt'.")
    if confidence is None and not unsure and (method != "auto" or risk != "drop"):
        raise ValueError(f"method={method!r} with risk={risk!r} bounds a risk: give confidence=0.95, say.")
    if method == "crc" and risk == "error":
        raise ValueError(
            "Conformal risk control falls back on the full network, which may have more errors than any bound: "
            "take risk='drop', which that keeps, or confidence=0.95 instead of method='crc'."
        )
    if (confidence is not None or method == "crc") and max_accuracy_drop is not None and max_accuracy_drop <= 0:
        if risk not in ("drop", "brier"):
            raise ValueError(
                f"{risk} is never below 0, so max_accuracy_drop must be above 0; found {max_accuracy_drop}."
            )
        if method == "crc":
            raise ValueError(
                "Conformal risk control counts one loss more than seen, so max_accuracy_drop must be above 0."
            )


def _bound(trace: Trace, asked: Sequence[bool], aim: Aim) -> tuple[Policy, Certificate | None, dict[str, Any]]:
    policy, certificate, note, facts = certify(trace, asked, aim)
    if policy is not None:
        return policy, certificate, facts | {"note": note}
    full, full_cost = _full(trace)
    expected = {"family": "full network", "expected_drop": 0.0, "expected_mean_cost": full_cost}
    return full, None, facts | expected | {"note": note}


def _aim(trace: Trace, asked: Sequence[bool], rows: Rows, max_accuracy_drop: float) -> Found:
    accuracy_full = float(rows.full_N.mean())
    choice = choose(rows, lambda brings: within_drop(brings, accuracy_full, max_accuracy_drop))
    full, full_cost = _full(trace)
    if choice is None or (max_accuracy_drop >= 0 and choice.brings.cost_P[choice.step] >= full_cost):
        note = (
            f"No early exit saves cost within a drop of {max_accuracy_drop:.2%}: this is the full network."
            if max_accuracy_drop >= 0
            else f"No policy gains {-max_accuracy_drop:.2%}: this is the full network, which misses the aim."
        )
        if 0 < max_accuracy_drop * (trace.num_samples + 1) < 1:
            note += f" To aim so low takes {math.ceil(1 / max_accuracy_drop) - 1} rows, here are {trace.num_samples}."
        return full, {"family": "full network", "expected_drop": 0.0, "expected_mean_cost": full_cost, "note": note}
    note = "The target is an aim, not a bound: met on average over draws of rows; give confidence= for a bound."
    return choice.path.policy(choice.step, asked, trace.num_exits), _expected(choice, accuracy_full) | {"note": note}


def _budget(trace: Trace, asked: Sequence[bool], rows: Rows, max_mean_cost: float) -> Found:
    accuracy_full = float(rows.full_N.mean())
    choice = choose(rows, lambda brings: within_cost(brings, max_mean_cost))
    full, full_cost = _full(trace)
    if full_cost <= max_mean_cost and (choice is None or choice.brings.accuracy_P[choice.step] <= accuracy_full):
        note = "The budget pays for the full network, and nothing cheaper is more accurate."
        return full, {"family": "full network", "expected_drop": 0.0, "expected_mean_cost": full_cost, "note": note}
    if choice is None:
        first_N = (~np.isnan(np.pad(rows.scores[Confidence].score_KN, ((0, 1), (0, 0))))).argmax(0)
        least = min(float(rows.cost_L[first_N].mean()), full_cost)
        raise ValueError(f"No policy costs {max_mean_cost:g}: the least possible here is {least:.4g}.")
    note = "The budget is an aim, not a bound: what a policy costs depends on the inputs it meets."
    return choice.path.policy(choice.step, asked, trace.num_exits), _expected(choice, accuracy_full) | {"note": note}


def _full(trace: Trace) -> tuple[Fixed, float]:
    """The untouched network and what it costs."""
    return Fixed(exit=trace.full_exit), full_cost_of(trace)


def _expected(choice: Choice, accuracy_full: float) -> dict[str, Any]:
    """What rows saw that did not fit the thresholds."""
    brings, step = choice.brings, choice.step
    return {
        "family": choice.family,
        "expected_drop": float(accuracy_full - brings.accuracy_P[step]),
        "expected_mean_cost": float(brings.cost_P[step]),
    }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a policy does on the rows of a trace; shares of rows, costs in passes through the untouched backbone.

    ``drop`` is ``accuracy_full - accuracy_early_exit``, ``harm`` the share right at the full exit and wrong where it
    stops. ``confusion_auroc`` and ``msp_auroc`` say how well confusion and max-softmax of the answers given find the
    wrong ones (nan without wrong or without right ones). An answer that is not finite is wrong.
    """

    samples: int
    exit_names: tuple[str, ...]
    accuracy_full: float
    accuracy_early_exit: float
    drop: float
    harm: float
    mean_cost: float
    share_E: Tensor
    confusion_auroc: float
    msp_auroc: float

    def __str__(self) -> str:
        rows = [("exit", "leave there")]
        rows += [(name, f"{part:.2%}") for name, part in zip(self.exit_names, self.share_E.tolist(), strict=True)]
        return (
            f"{table(list(rows))}\n"
            f"accuracy {self.accuracy_early_exit:.2%} (full {self.accuracy_full:.2%}, drop {self.drop:.2%}, "
            f"harm {self.harm:.2%}) at mean cost {self.mean_cost:.3f} on {self.samples} samples\n"
            f"errors among the answers are found with AUROC {self.confusion_auroc:.3f} by confusion, "
            f"{self.msp_auroc:.3f} by max-softmax"
        )


def evaluate(policy: Policy, trace: Trace) -> Evaluation:
    """What ``policy`` does on ``trace``: accuracy, drop, mean cost, who leaves where, how well errors are found.

    Warns when over 1 % of the rows are those the policy was calibrated on, or the ICs trained on: they flatter it.
    >>> trace = Trace(logits_ENC=torch.eye(2).expand(2, 2, 2), labels_N=torch.tensor([0, 0]), cost_E=torch.ones(2) / 2)
    >>> evaluate(Fixed(exit=0), trace).mean_cost
    0.5
    """
    record = policy.calibrated_on
    if record is not None and (seen := share(record.seen(trace))) > OVERLAP:
        warnings.warn(f"The policy was calibrated on {seen:.1%} of these rows: they flatter it.", stacklevel=2)
    if (seen := trace.trained_share) > OVERLAP:
        warnings.warn(f"The ICs trained on {seen:.1%} of these rows: they flatter the policy.", stacklevel=2)
    outcome = simulate(policy, trace)
    full_N = answers(trace)[trace.full_exit] == trace.labels_N
    right_N = (outcome.labels_N == trace.labels_N) & finite_rows(outcome.logits_NC)
    return Evaluation(
        samples=trace.num_samples,
        exit_names=trace.exit_names,
        accuracy_full=share(full_N),
        accuracy_early_exit=share(right_N),
        drop=share(full_N) - share(right_N),
        harm=share(full_N & ~right_N),
        mean_cost=float(outcome.cost_N.mean()),
        share_E=outcome.exit_N.bincount(minlength=trace.num_exits) / trace.num_samples,
        confusion_auroc=error_auroc(outcome.confusion_N, ~right_N),
        msp_auroc=error_auroc(-outcome.confidence_N.nan_to_num(nan=0.0), ~right_N),
    )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One family's policies from the one that lets nobody leave early to the one that lets everybody: P points.

    ``Confidence(threshold=tuple(threshold_PE[p]), enabled_E=...)``, with the exits that were asked, costs ``cost_P[p]``
    on average and is right ``accuracy_P[p]``.
    """

    family: str
    cost_P: Tensor
    accuracy_P: Tensor
    threshold_PE: Tensor


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Accuracy against cost on the rows of one trace, in hindsight: a little better than fresh rows will do."""

    full_accuracy: float
    full_cost: float
    curves: tuple[Curve, ...]

    def __str__(self) -> str:
        rows = [("mean cost", *(curve.family for curve in self.curves))]
        for cost in np.arange(0.1, self.full_cost + 0.05, 0.1):
            cells = [_best(curve, cost) for curve in self.curves]
            rows.append((f"{cost:.1f}", *("" if cell is None else f"{cell:.2%}" for cell in cells)))
        return f"{table(list(rows))}\nfull network: {self.full_accuracy:.2%} at {self.full_cost:.3f}"


def _best(curve: Curve, cost: float) -> float | None:
    met = curve.accuracy_P[curve.cost_P <= cost + 1e-9]
    return float(met.max()) if len(met) else None


def tradeoff(trace: Trace, *, enabled_E: Sequence[bool] | None = None) -> Tradeoff:
    """The whole accuracy-cost curve of confidence policies: one threshold, and one shift over per-exit levels.

    A description of these rows: the best point of a curve flatters itself. To choose a policy, ``calibrate``.
    >>> cost_E = torch.tensor([0.5, 1.0])
    >>> trace = Trace(logits_ENC=torch.eye(2).expand(2, 2, 2), labels_N=torch.tensor([0, 0]), cost_E=cost_E)
    >>> tradeoff(trace).curves[0].cost_P[[0, -1]].tolist()
    [1.0, 0.5]
    """
    asked = asked_exits(enabled_E, trace.num_exits, trace.full_exit)
    rows = read_rows(trace, asked)
    deciding = [exit for exit, on in enumerate(asked) if on][:-1]
    curves = []
    for family in (FAMILIES[-1], FAMILIES[0]) if deciding else ():
        path = family.fit(rows, None)
        brings = brings_of(path.leaving(rows), rows, path.steps)
        threshold_PE = torch.full((path.steps, trace.num_exits - 1), math.inf, dtype=torch.float64)
        threshold_PE[:, deciding] = torch.from_numpy(path.bar_PK)
        cost_P, accuracy_P = torch.from_numpy(brings.cost_P), torch.from_numpy(brings.accuracy_P)
        curves.append(Curve(family=family.name, cost_P=cost_P, accuracy_P=accuracy_P, threshold_PE=threshold_PE))
    return Tradeoff(full_accuracy=float(rows.full_N.mean()), full_cost=_full(trace)[1], curves=tuple(curves))
