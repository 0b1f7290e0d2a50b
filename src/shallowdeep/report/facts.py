"""Trace, policy and bench -> the numbers of every picture and table, as rows of plain values.

It refuses to know pictures and pages. All numbers are of rows that the policy's thresholds have not seen, where there
are such rows; where there are none, ``seen`` is True and the page says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shallowdeep.calibration import Evaluation, Tradeoff, calibrate, evaluate, tradeoff
from shallowdeep.disagreement import ErrorFinding, confusion, error_finding
from shallowdeep.effects import Overthinking, answers, overthinking
from shallowdeep.policies import Fixed, Policy, finite_rows
from shallowdeep.types import Outcome, Trace
from shallowdeep.walking import CHUNK_ELEMENTS, policy_costs, simulate

UNSEEN = 0.1
"""Below this share of rows that the policy has not seen, the page speaks of all rows and says so."""
FEW_ROWS = 40
USUAL_DROP = 0.005
BINS, POINTS = 15, 120
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """One trace under one policy. ``row_N`` are the rows spoken of, as positions in the trace that was given.

    ``said_EN`` is every exit's answer (-1: not finite), ``odds_EN`` its log-odds of being sure (NaN: not finite),
    ``first_right_only_N`` marks rows that only the first exit gets right. ``chosen_here`` says that no policy came with
    the trace; ``seen`` that the policy's thresholds come from these rows.
    """

    name: str
    trace: Trace
    row_N: Tensor
    policy: Policy
    chosen_here: bool
    seen: bool
    class_names: tuple[str, ...]
    bench: Mapping[str, Any] | None
    evaluation: Evaluation
    overthinking: Overthinking
    finding: ErrorFinding
    tradeoff: Tradeoff
    outcome: Outcome
    confusion_N: Tensor
    said_EN: Tensor
    odds_EN: Tensor

    @property
    def right_EN(self) -> Tensor:
        """Which exit is right about which row."""
        return self.said_EN == self.trace.labels_N

    @property
    def answered_right_N(self) -> Tensor:
        """Which rows the policy answers rightly."""
        return (self.outcome.labels_N == self.trace.labels_N) & finite_rows(self.outcome.logits_NC)

    @property
    def destructive_N(self) -> Tensor:
        """Right before the full exit and wrong there."""
        full = self.trace.full_exit
        return self.right_EN[:full].any(0) & ~self.right_EN[full]

    @property
    def first_right_only_N(self) -> Tensor:
        """Right at the first exit and nowhere else up to the full exit."""
        full = self.trace.full_exit
        return self.right_EN[0] & ~self.right_EN[1 : full + 1].any(0) if full else torch.zeros_like(self.right_EN[0])

    @property
    def labels(self) -> list[str]:
        """What axes call the exits: numbers from 1, "full", and names after it."""
        full, names = self.trace.full_exit, self.trace.exit_names
        return ["full" if e == full else str(e + 1) if e < full else name[:16] for e, name in enumerate(names)]


def facts_of(
    trace: Trace,
    policy: Policy | None = None,
    *,
    name: str = "trace",
    class_names: Sequence[str] = (),
    bench: Mapping[str, Any] | None = None,
) -> Facts:
    """Everything that the page says of ``trace``.

    Without a ``policy`` one is chosen on a random half of the rows, for half a point of accuracy on average, and the
    page speaks of the other half. Raises ``ValueError`` when policy, names or trace do not fit each other.
    """
    if class_names and len(class_names) != trace.num_classes:
        raise ValueError(f"{len(class_names)} class names for {trace.num_classes} classes of {name}.")
    chosen_here = policy is None
    policy, row_N, seen = _chosen(trace) if policy is None else (policy, *_unseen(trace, policy))
    trace = trace if len(row_N) == trace.num_samples else trace.rows(row_N)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The policy was calibrated")  # the page says so itself
        evaluation = evaluate(policy, trace)
    return Facts(
        name=name,
        trace=trace,
        row_N=row_N,
        policy=policy,
        chosen_here=chosen_here,
        seen=seen,
        class_names=_told_apart(class_names or [f"class {label}" for label in range(trace.num_classes)]),
        bench=bench,
        evaluation=evaluation,
        overthinking=overthinking(trace),
        finding=error_finding(trace),
        tradeoff=tradeoff(trace),
        outcome=simulate(policy, trace),
        confusion_N=confusion(trace),
        said_EN=answers(trace),
        odds_EN=_odds(trace),
    )


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with their number where two are the same."""
    return tuple(name if names.count(name) == 1 else f"{name} ({label})" for label, name in enumerate(names))


def _chosen(trace: Trace) -> tuple[Policy, Tensor, bool]:
    """A policy from one half of the rows, the other half, and that it was not seen."""
    if trace.num_samples < FEW_ROWS:
        return Fixed(exit=trace.full_exit), torch.arange(trace.num_samples), False
    order = torch.randperm(trace.num_samples, generator=torch.Generator().manual_seed(0))
    chosen, reported = order[: len(order) // 2].sort().values, order[len(order) // 2 :].sort().values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the policy's own note is on the page
        return calibrate(trace.rows(chosen), max_accuracy_drop=USUAL_DROP), reported, False


def _unseen(trace: Trace, policy: Policy) -> tuple[Tensor, bool]:
    """The rows that the policy was not calibrated on, if they are enough; else all, and whether it was."""
    everything = torch.arange(trace.num_samples)
    record = policy.calibrated_on
    if record is None or not record.hash_N or trace.hash_N is None:
        return everything, False
    new_N = ~torch.isin(trace.hash_N, torch.tensor(record.hash_N, dtype=trace.hash_N.dtype))
    enough = float(new_N.double().mean()) >= UNSEEN
    return (everything[new_N], False) if enough else (everything, True)


def _odds(trace: Trace) -> Tensor:
    """Log-odds of every exit's own answer (float64 [E, N]), exact where softmaxes are 1; NaN where not finite."""
    odds_EN = torch.empty(trace.num_exits, trace.num_samples, dtype=torch.float64)
    rows = max(1, CHUNK_ELEMENTS // trace.num_classes)
    for odds_N, logits_NC in zip(odds_EN, trace.logits_ENC, strict=True):
        for start in range(0, trace.num_samples, rows):
            chunk_BC = logits_NC[start : start + rows].double()
            top_B, label_B = chunk_BC.max(1)
            others_B = chunk_BC.scatter(1, label_B[:, None], -torch.inf).logsumexp(1)
            finite_B = finite_rows(logits_NC[start : start + rows])
            odds_N[start : start + rows] = torch.where(finite_B, top_B - others_B, torch.nan)
    return odds_EN


# ---------------------------------------------------------------- rows of numbers, one function per picture


def by_exit(facts: Facts) -> list[Row]:
    """Per exit: cost, accuracy, right at some exit so far, right here and wrong at the end, leaving, calibration."""
    full = facts.trace.full_exit
    right_EN, odds_EN = facts.right_EN, facts.odds_EN
    ever_EN = right_EN.cummax(0).values
    sure_EN = torch.sigmoid(odds_EN).nan_to_num(nan=0.0)
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
                "sure": float(sure_EN[e].mean()),
                "ece": _ece(sure_EN[e], right_EN[e]),
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
    kept = torch.linspace(samples / POINTS, samples, POINTS).round().long().clamp(1, samples).unique()
    rows = []
    for what, (score_N, bad_N) in curves.items():
        risk_N = bad_N[score_N.argsort(stable=True)].double().cumsum(0)
        rows += [{"what": what, "coverage": int(k) / samples, "risk": float(risk_N[k - 1]) / int(k)} for k in kept]
    return rows


def reliability(facts: Facts) -> list[Row]:
    """Per exit and bin of confidence: mean confidence, accuracy and rows (bins of equal width, arXiv 1706.04599)."""
    rows = []
    for e, label in enumerate(facts.labels):
        sure_N, right_N = torch.sigmoid(facts.odds_EN[e]).nan_to_num(nan=0.0), facts.right_EN[e].double()
        bin_N = (sure_N * BINS).long().clamp(0, BINS - 1)
        count = bin_N.bincount(minlength=BINS)
        sure = bin_N.bincount(sure_N, minlength=BINS) / count
        right = bin_N.bincount(right_N, minlength=BINS) / count
        rows += [
            {"exit": label, "confidence": float(sure[b]), "accuracy": float(right[b]), "rows": int(count[b])}
            for b in range(BINS)
            if count[b]
        ]
    return rows


def _ece(sure_N: Tensor, right_N: Tensor) -> float:
    """Expected calibration error: the mean gap of confidence and accuracy over bins, weighted by rows."""
    bin_N = (sure_N * BINS).long().clamp(0, BINS - 1)
    gap = bin_N.bincount(sure_N - right_N.double(), minlength=BINS)
    return float(gap.abs().sum()) / len(sure_N)


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
