"""A trace, its policy and its bench -> what the page speaks of: which rows, and what every part of the library says.

It refuses to know pictures and pages. All facts are of rows that the policy's thresholds have not seen, where there
are such rows; where there are none, ``seen`` is True and the page says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shallowdeep.calibration import Evaluation, Tradeoff, calibrate, evaluate, tradeoff
from shallowdeep.data import halves
from shallowdeep.disagreement import ErrorFinding, confusion, error_finding
from shallowdeep.effects import Overthinking, answers, overthinking
from shallowdeep.policies import Fixed, Policy, finite_rows
from shallowdeep.reliability import Reliability, reliability_of
from shallowdeep.types import Outcome, Trace
from shallowdeep.walking import CHUNK_ELEMENTS, simulate

UNSEEN = 0.1
"""Below this share of rows that the policy has not seen, the page speaks of all rows and says so."""
FEW_ROWS = 40
USUAL_DROP = 0.005


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
    reliability: Reliability
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
    def standardised(self) -> bool:
        """Whether ``confusion_N`` counts deviations from the mean of a reference, and is no sum of distances."""
        return self.trace.confusion_reference is not None

    @property
    def doubt(self) -> float:
        """Half the width of a 95 % interval of the drop: rows are paired, each right twice, once or never.

        A gain and a loss more are counted (Agresti, Min 2005): no difference in few rows does not mean that none comes.
        """
        difference_N = self.right_EN[self.trace.full_exit].double() - self.answered_right_N.double()
        rows, differ = len(difference_N) + 2, int((difference_N != 0).sum()) + 2
        return 1.96 * math.sqrt((differ / rows - (float(difference_N.sum()) / rows) ** 2) / rows)

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
        reliability=reliability_of(trace),
        tradeoff=tradeoff(trace),
        outcome=simulate(policy, trace),
        confusion_N=confusion(trace),
        said_EN=answers(trace),
        odds_EN=_odds(trace),
    )


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """The names as text that can be written, with their number where two are the same, and instead of none."""
    names = [name.encode("utf-8", "replace").decode() or f"class {label}" for label, name in enumerate(names)]
    return tuple(name if names.count(name) == 1 else f"{name} ({label})" for label, name in enumerate(names))


def _chosen(trace: Trace) -> tuple[Policy, Tensor, bool]:
    """A policy from one half of the rows, the other half, and that it was not seen."""
    if trace.num_samples < FEW_ROWS:
        return Fixed(exit=trace.full_exit), torch.arange(trace.num_samples), False
    chosen, reported = halves(trace.num_samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the policy's own note is on the page
        return calibrate(trace.rows(chosen), max_accuracy_drop=USUAL_DROP), reported, False


def _unseen(trace: Trace, policy: Policy) -> tuple[Tensor, bool]:
    """The rows that the policy was not calibrated on, if they are enough; else all, and whether it was."""
    everything = torch.arange(trace.num_samples)
    record = policy.calibrated_on
    if record is None or not record.hash_N or trace.hash_N is None:
        return everything, False
    new_N = ~record.seen(trace)
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
