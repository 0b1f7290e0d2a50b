"""Facts -> the numbers of every picture and table, as rows of plain values: one function per picture.

It refuses to know how they are drawn or said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shallowdeep.finding import risk_coverage
from shallowdeep.report.facts import Facts
from shallowdeep.walking import policy_costs

POINTS = 120
Row = dict[str, Any]


def by_exit(facts: Facts) -> list[Row]:
    """Per exit: cost, accuracy, right at some exit so far, right here and wrong at the end, leaving, calibration."""
    full = facts.trace.full_exit
    right_EN, honest = facts.right_EN, facts.reliability
    ever_EN = right_EN.cummax(0).values
    sure_E, ece_E = (of_E.nan_to_num(nan=0.0) for of_E in (honest.mean_confidence_E, honest.ece_E))
    rows = []
    for e, label in enumerate(facts.labels):
        spoiled = float((right_EN[e] & ~right_EN[full]).double().mean())
        first = ever_EN[e] & ~ever_EN[e - 1] if e else ever_EN[0]
        rows.append(
            {
                "exit": label,
                "name": facts.trace.exit_names[e],
                "cost": float(facts.trace.cost_E[e]),
                "accuracy": float(right_EN[e].double().mean()),
                "so_far": float(ever_EN[e].double().mean()),
                "first": float(first.double().mean()),
                "spoiled": spoiled,
                "sure": float(sure_E[e]),
                "ece": float(ece_E[e]),
            }
        )
    return rows


def flow(facts: Facts) -> list[Row]:
    """Per exit: the shares of all rows that arrive, leave with a right answer, leave with a wrong one, and go on."""
    samples, right_N = facts.trace.num_samples, facts.answered_right_N
    left_E = facts.outcome.exit_N.bincount(minlength=facts.trace.num_exits)
    right_E = facts.outcome.exit_N[right_N].bincount(minlength=facts.trace.num_exits)
    asked = facts.policy.asks(facts.trace.num_exits, facts.trace.full_exit)
    cost_E = policy_costs(facts.trace, asked)
    arriving, rows = samples, []
    for e, label in enumerate(facts.labels):
        left, right = int(left_E[e]), int(right_E[e])
        rows.append(
            {
                "exit": label,
                "cost": float(cost_E[e]),
                "arrive": arriving / samples,
                "right": right / samples,
                "wrong": (left - right) / samples,
                "on": (arriving - left) / samples,
                "accuracy": right / left if left else None,
                "asked": asked[e],
            }
        )
        arriving -= left
    return rows


def by_class(facts: Facts) -> list[Row]:
    """Per true class that occurs: rows, accuracy under the policy and at the full exit, wasteful, destructive."""
    full, right_EN, destructive_N = facts.trace.full_exit, facts.right_EN, facts.destructive_N
    early_N = right_EN[:full].any(0)
    rows = []
    for label, name in enumerate(facts.class_names):
        mine = facts.trace.labels_N == label
        count = int(mine.sum())
        if count:
            columns = {
                "wasteful": early_N,
                "destructive": destructive_N,
                "errors": ~right_EN[full],
                "policy_errors": ~facts.answered_right_N,
            }
            shares = {what: float(value[mine].double().mean()) for what, value in columns.items()}
            rows.append({"class": name, "label": label, "rows": count, **shares})
    return rows


def confusions(facts: Facts) -> list[Row]:
    """How the full exit's confusion is spread over its right and its wrong answers: shares of each per bin."""
    wrong_N = ~facts.right_EN[facts.trace.full_exit]
    value_N = facts.confusion_N
    low, high = float(value_N.min()), float(value_N.quantile(0.999))
    edges = torch.linspace(low, high if high > low else low + 1.0, 31, dtype=torch.float64)
    bin_N = (torch.bucketize(value_N, edges) - 1).clamp(0, 29)
    right, wrong = bin_N[~wrong_N].bincount(minlength=30).double(), bin_N[wrong_N].bincount(minlength=30).double()
    right, wrong = right / right.sum().clamp_min(1), wrong / wrong.sum().clamp_min(1)
    return [
        {"from": float(a), "to": float(b), "right": float(r), "wrong": float(w)}
        for a, b, r, w in zip(edges[:-1], edges[1:], right, wrong, strict=True)
    ]


def risks(facts: Facts) -> list[Row]:
    """Share of errors among the answers kept, when only the least suspicious share (``coverage``) is kept."""
    full = facts.trace.full_exit
    wrong_N = ~facts.right_EN[full]
    sure_N = facts.odds_EN[full].nan_to_num(nan=-torch.inf)
    answered = facts.outcome.confidence_N.nan_to_num(nan=0.0)
    curves = {
        "full network, by confidence": (-sure_N, wrong_N),
        "full network, by confusion": (facts.confusion_N, wrong_N),
        "early exits, by confidence": (-answered, ~facts.answered_right_N),
    }
    samples = facts.trace.num_samples
    kept = torch.linspace(samples / POINTS, samples, POINTS).round().long().clamp(1, samples).tolist()
    rows = []
    for what, (score_N, bad_N) in curves.items():
        risk_P = risk_coverage(score_N, bad_N).risk_P.tolist()
        rows += [{"what": what, "coverage": k / samples, "risk": risk_P[k - 1]} for k in dict.fromkeys(kept)]
    return rows


def reliability(facts: Facts) -> list[Row]:
    """Per exit and bin of confidence that has rows: their mean confidence, accuracy and number."""
    honest = facts.reliability
    return [
        {
            "exit": label,
            "confidence": float(honest.confidence_EK[e, k]),
            "accuracy": float(honest.accuracy_EK[e, k]),
            "rows": int(honest.count_EK[e, k]),
        }
        for e, label in enumerate(facts.labels)
        for k in honest.count_EK[e].nonzero().flatten().tolist()
    ]


def milliseconds(bench: Mapping[str, Any]) -> list[Row]:
    """Per batch size and number of threads, of the fastest early exits: milliseconds per row, whole, early and ideal.

    ``bench`` is what ``sdn bench`` wrote.
    """
    best: dict[tuple[int, int], Mapping[str, Any]] = {}
    for one in bench["measured"]:
        key = (one["batch_size"], one["threads"])
        if key not in best or one["early_exit_ms"] < best[key]["early_exit_ms"]:
            best[key] = one
    rows = []
    for (size, threads), one in sorted(best.items()):
        low, high = one["speedup_quartiles"]
        rows.append(
            {
                "where": f"batch {size}, {threads} thread{'s' * (threads > 1)}",
                "backend": one["backend"],
                "whole": one["best_full_ms"] / size,
                "early": one["early_exit_ms"] / size,
                "ideal": one["best_full_ms"] / one["ideal_speedup"] / size,
                "speedup": one["speedup"],
                "low": low,
                "high": high,
                "ideal_speedup": one["ideal_speedup"],
            }
        )
    return rows
