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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.effects import answers, share
from shallowdeep.finding import error_auroc
from shallowdeep.policies import CalibrationRecord, Confidence, Fixed, Margin, Policy, asked_exits, finite_rows
from shallowdeep.thresholds import (
    FAMILIES,
    Brings,
    Choice,
    Family,
    Floats,
    RowsOf,
    brings_of,
    choose,
    in_units,
    last_safe,
    leaving_steps,
    read_rows,
    within_cost,
    within_drop,
)
from shallowdeep.types import Trace, table
from shallowdeep.walking import policy_costs, simulate

OVERLAP = 0.01
"""Shares of rows seen before that are worth a warning."""
Found = tuple[Confidence | Margin | Fixed, dict[str, Any]]


def calibrate(
    trace: Trace,
    *,
    max_accuracy_drop: float | None = None,
    max_mean_cost: float | None = None,
    confidence: float | None = None,
    enabled_E: Sequence[bool] | None = None,
) -> Policy:
    """The cheapest policy within a drop of accuracy, or the most accurate within a mean cost, from held-out rows.

    Exactly one target. ``max_accuracy_drop`` is in shares of accuracy below the full exit's: an aim, met on average
    and not in every draw of rows, unless ``confidence`` is given. ``confidence=0.95`` makes it a bound: with that
    probability over the draw of calibration rows, at most ``max_accuracy_drop`` of fresh rows are harmed (right at the
    full exit, wrong where they stop), so that accuracy falls by no more. It is paid for: one half of the rows chooses,
    the other tests. ``max_mean_cost`` is a share of the untouched backbone's cost. ``enabled_E`` restricts the exits.

    ``policy.calibrated_on.info`` records targets, family, what to expect on fresh rows, and a note in words. When no
    early exit meets a drop, the full network is returned, with a warning. Raises ``ValueError`` on a budget that
    nothing meets, and on targets that make no sense. The same rows give the same policy.

    Source of the bound: Learn then Test, arXiv 2110.01052, with Clopper-Pearson's exact binomial limit.
    >>> row = torch.arange(400)
    >>> early_NC = torch.stack([row / 100.0, 4 - row / 100.0], 1)  # sure of the first and the last rows
    >>> full_NC = torch.stack([row * 1.0 - 190, 190 - row * 1.0], 1)
    >>> logits_ENC = torch.stack([early_NC, full_NC])
    >>> trace = Trace(logits_ENC=logits_ENC, labels_N=(row < 190).long(), cost_E=torch.tensor([0.4, 1.0]))
    >>> policy = calibrate(trace, max_accuracy_drop=0.01)
    >>> evaluate(policy, trace).mean_cost < 0.5
    True
    """
    _check(max_accuracy_drop, max_mean_cost, confidence)
    asked = asked_exits(enabled_E, trace.num_exits, trace.full_exit)
    if trace.trained_N is not None and (seen := share(trace.trained_N)) > OVERLAP:
        warnings.warn(f"The ICs trained on {seen:.1%} of these rows: thresholds from them are too bold.", stacklevel=2)
    rows = read_rows(trace, asked)
    if max_mean_cost is not None:
        policy, facts = _budget(trace, asked, rows, max_mean_cost)
    elif confidence is None:
        policy, facts = _aim(trace, asked, rows, float(max_accuracy_drop or 0.0))
    else:
        policy, facts = _bound(trace, asked, rows, float(max_accuracy_drop or 0.0), confidence)
    targets = {"max_accuracy_drop": max_accuracy_drop, "max_mean_cost": max_mean_cost, "confidence": confidence}
    if isinstance(policy, Fixed) and max_mean_cost is None:
        warnings.warn(str(facts["note"]), stacklevel=2)
    facts |= {name: trace.info[name] for name in ("second_look",) if name in trace.info}
    info = {name: value for name, value in targets.items() if value is not None} | {"rows": trace.num_samples} | facts
    hash_N = () if trace.hash_N is None else tuple(sorted(trace.hash_N.tolist()))
    return dataclasses.replace(policy, calibrated_on=CalibrationRecord(hash_N=hash_N, info=info))


def _check(max_accuracy_drop: float | None, max_mean_cost: float | None, confidence: float | None) -> None:
    if (max_accuracy_drop is None) == (max_mean_cost is None):
        raise ValueError("calibrate needs one target: max_accuracy_drop=0.01, say, or max_mean_cost=0.5.")
    if max_accuracy_drop is not None and not -1 < max_accuracy_drop < 1:
        raise ValueError(f"max_accuracy_drop is a share of accuracy, 0.01 for one point; found {max_accuracy_drop}.")
    if max_mean_cost is not None and not max_mean_cost > 0:
        raise ValueError(f"max_mean_cost is a share of the backbone's cost, above 0; found {max_mean_cost}.")
    if confidence is None:
        return
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a probability between 0 and 1, such as 0.95; found {confidence}.")
    if max_accuracy_drop is None:
        raise ValueError("confidence bounds a drop of accuracy; a mean cost is measured, not risked. Leave one out.")
    if max_accuracy_drop <= 0:
        raise ValueError("confidence bounds the share of rows harmed, so max_accuracy_drop must be above 0.")


def _aim(trace: Trace, asked: Sequence[bool], rows: RowsOf, max_accuracy_drop: float) -> Found:
    accuracy_full = float(rows[Confidence].full_N.mean())
    choice = choose(rows, lambda brings: within_drop(brings, accuracy_full, max_accuracy_drop))
    full, full_cost = _full(trace)
    if choice is None or (max_accuracy_drop >= 0 and choice.brings.cost_P[choice.step] >= full_cost):
        note = f"No early exit saves cost within a drop of {max_accuracy_drop:.2%}: this is the full network."
        if 0 < max_accuracy_drop * (trace.num_samples + 1) < 1:
            note += f" To aim so low takes {math.ceil(1 / max_accuracy_drop) - 1} rows, here are {trace.num_samples}."
        return full, {"family": "full network", "expected_drop": 0.0, "expected_mean_cost": full_cost, "note": note}
    note = "The target is an aim, not a bound: met on average over draws of rows; give confidence= for a bound."
    return _taken(choice, rows, trace, asked), _expected(choice, accuracy_full) | {"note": note}


def _budget(trace: Trace, asked: Sequence[bool], rows: RowsOf, max_mean_cost: float) -> Found:
    accuracy_full = float(rows[Confidence].full_N.mean())
    choice = choose(rows, lambda brings: within_cost(brings, max_mean_cost))
    full, full_cost = _full(trace)
    if full_cost <= max_mean_cost and (choice is None or choice.brings.accuracy_P[choice.step] <= accuracy_full):
        note = "The budget pays for the full network, and nothing cheaper is more accurate."
        return full, {"family": "full network", "expected_drop": 0.0, "expected_mean_cost": full_cost, "note": note}
    if choice is None:
        first_N = np.isfinite(np.pad(rows[Confidence].score_KN, ((0, 1), (0, 0)))).argmax(0)
        least = min(float(rows[Confidence].cost_L[first_N].mean()), full_cost)
        raise ValueError(f"No policy costs {max_mean_cost:g}: the least possible here is {least:.4g}.")
    note = "The budget is an aim, not a bound: what a policy costs depends on the inputs it meets."
    return _taken(choice, rows, trace, asked), _expected(choice, accuracy_full) | {"note": note}


def _bound(trace: Trace, asked: Sequence[bool], rows: RowsOf, max_harm: float, confidence: float) -> Found:
    """Choose on one half, test on the other along the chosen family's path; the last step that passes is taken."""
    shuffled = np.random.default_rng(0).permutation(trace.num_samples)
    choosing, testing = np.sort(shuffled[: trace.num_samples // 2]), np.sort(shuffled[trace.num_samples // 2 :])
    choose_on = {kind: mine.take(choosing) for kind, mine in rows.items()}

    def reach(brings: Brings) -> int | None:
        return last_safe(np.ceil(brings.harm_P * len(testing)), len(testing), max_harm, confidence)

    choice = choose(choose_on, reach)
    full, full_cost = _full(trace)
    needed = math.ceil(math.log(1 - confidence) / math.log(1 - max_harm))
    if choice is not None:
        family, test_on = choice.family, rows[choice.family.kind].take(testing)
        units_PK = _path(choice, choose_on)
        brings = brings_of(leaving_steps(units_PK, test_on.unit_KN), test_on, len(units_PK))
        step = last_safe(np.round(brings.harm_P * len(testing)), len(testing), max_harm, confidence)
        if step is not None and brings.cost_P[step] < full_cost:
            note = (
                f"A bound: with probability {confidence:g} over the draw of calibration rows, at most {max_harm:.2%} "
            )
            note += "of fresh rows are right at the full exit and wrong where they stop."
            facts = {"family": family.name, "method": "exact binomial, fixed sequence", "tested_rows": len(testing)}
            facts |= {"harmed_rows": round(float(brings.harm_P[step]) * len(testing)), "note": note}
            facts["expected_mean_cost"] = float(brings.cost_P[step])
            facts["expected_drop"] = float(test_on.full_N.mean() - brings.accuracy_P[step])
            return _policy(family, units_PK[step], trace, asked), facts
    note = (
        f"No early exit could be shown to harm at most {max_harm:.2%} of rows: this is the full network. It takes at "
    )
    note += f"least {needed} rows without any harm in the half that tests, where there are {len(testing)}."
    return full, {"family": "full network", "expected_drop": 0.0, "expected_mean_cost": full_cost, "note": note}


def _full(trace: Trace) -> tuple[Fixed, float]:
    """The untouched network and what it costs."""
    full = Fixed(exit=trace.full_exit)
    asked = full.asks(trace.num_exits, trace.full_exit)
    return full, float(policy_costs(trace, asked)[trace.full_exit])


def _path(choice: Choice, rows: RowsOf) -> Floats:
    """Thresholds [P, K] of the choice's family, fitted on ``rows``, as the policy compares them."""
    mine = rows[choice.family.kind]
    return in_units(choice.family.path(mine, choice.grid_P), mine, choice.family.shared)


def _taken(choice: Choice, rows: RowsOf, trace: Trace, asked: Sequence[bool]) -> Confidence | Margin:
    return _policy(choice.family, _path(choice, rows)[choice.step], trace, asked)


def _policy(family: Family, units_K: Floats, trace: Trace, asked: Sequence[bool]) -> Confidence | Margin:
    enabled_E = None if all(asked) else tuple(asked)
    if family.shared:
        return family.kind(threshold=float(units_K[0]), enabled_E=enabled_E)
    threshold = [math.inf] * (trace.num_exits - 1)
    for unit, exit in zip(units_K, [exit for exit, on in enumerate(asked) if on][:-1], strict=True):
        threshold[exit] = float(unit)
    return family.kind(threshold=tuple(threshold), enabled_E=enabled_E)


def _expected(choice: Choice, accuracy_full: float) -> dict[str, Any]:
    """What rows saw that did not fit the thresholds."""
    brings, step = choice.brings, choice.step
    return {
        "family": choice.family.name,
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

    Warns when over 1 % of the rows are those the policy was calibrated on: they flatter it.
    >>> trace = Trace(logits_ENC=torch.eye(2).expand(2, 2, 2), labels_N=torch.tensor([0, 0]), cost_E=torch.ones(2) / 2)
    >>> evaluate(Fixed(exit=0), trace).mean_cost
    0.5
    """
    record = policy.calibrated_on
    if record is not None and record.hash_N and trace.hash_N is not None:
        seen = share(torch.isin(trace.hash_N, torch.tensor(record.hash_N, dtype=trace.hash_N.dtype)))
        if seen > OVERLAP:
            warnings.warn(f"The policy was calibrated on {seen:.1%} of these rows: they flatter it.", stacklevel=2)
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

    ``Confidence(threshold=tuple(threshold_PE[p]))`` costs ``cost_P[p]`` on average and is right ``accuracy_P[p]``.
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
    rows = read_rows(trace, asked)[Confidence]
    deciding = [exit for exit, on in enumerate(asked) if on][:-1]
    curves = []
    for family in (FAMILIES[-1], FAMILIES[0]) if deciding else ():
        path_PK = in_units(family.path(rows, family.grid(rows)), rows, family.shared)
        brings = brings_of(leaving_steps(path_PK, rows.unit_KN), rows, len(path_PK))
        threshold_PE = torch.full((len(path_PK), trace.num_exits - 1), math.inf, dtype=torch.float64)
        threshold_PE[:, deciding] = torch.from_numpy(path_PK)
        cost_P, accuracy_P = torch.from_numpy(brings.cost_P), torch.from_numpy(brings.accuracy_P)
        curves.append(Curve(family=family.name, cost_P=cost_P, accuracy_P=accuracy_P, threshold_PE=threshold_PE))
    return Tradeoff(full_accuracy=float(rows.full_N.mean()), full_cost=_full(trace)[1], curves=tuple(curves))
