"""What a policy's answers look like on reference rows, as limits that allow for their number, and what is tolerated.

It refuses to know streams and time: a trace comes in once, and batches of answers become columns of numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from shallowdeep.policies import Policy, finite_rows
from shallowdeep.sequential import Floats, mean_limits, share_limits
from shallowdeep.types import Outcome, Trace
from shallowdeep.walking import policy_costs, simulate

CLIP = 5.0
"""Standardised confusions count up to so many deviations: bets need numbers with limits, known before the rows are."""


class Seen(Protocol):
    """What a monitor reads of a batch of answers; ``Answer`` has it."""

    @property
    def exit_B(self) -> Tensor: ...
    @property
    def confidence_B(self) -> Tensor: ...
    @property
    def confusion_B(self) -> Tensor: ...
    @property
    def valid_B(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenRows:
    """Just that, of answers that come from elsewhere: a trace, a file."""

    exit_B: Tensor
    confidence_B: Tensor
    confusion_B: Tensor
    valid_B: Tensor


def seen_in(outcome: Outcome) -> SeenRows:
    """What a monitor reads of the answers that a policy gives on a trace."""
    return SeenRows(
        exit_B=outcome.exit_N,
        confidence_B=outcome.confidence_N,
        confusion_B=outcome.confusion_N,
        valid_B=finite_rows(outcome.logits_NC),
    )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What answers look like on the reference rows, as limits of K means on a scale from 0 to 1, and what is tolerated.

    K: the share of every exit asked, the share that is not finite, mean cost, confidence and confusion. ``harm_ratio``
    is the drop of accuracy per disagreement with the full network. Made by ``refer``.
    """

    exit_names: tuple[str, ...]
    asked: tuple[bool, ...]
    cost_E: tuple[float, ...]
    standardised: bool
    rows: int
    alpha: float
    max_accuracy_drop: float
    max_disagreement: float
    harm_ratio: float
    low_K: tuple[float, ...] = ()
    high_K: tuple[float, ...] = ()

    @property
    def names_K(self) -> tuple[str, ...]:
        """What is watched, in words."""
        shares = (f"share of {name}" for name, on in zip(self.exit_names, self.asked, strict=True) if on)
        return (*shares, "share not finite", "cost", "confidence", "confusion")

    @property
    def scale_K2(self) -> Floats:
        """What 0 and 1 mean for every mean watched."""
        costs = [cost for cost, on in zip(self.cost_E, self.asked, strict=True) if on]
        confusion = (-CLIP, CLIP) if self.standardised else (0.0, 2.0 * sum(self.asked))
        cost = (costs[0], max(costs[-1], costs[0] + 1e-9))
        return np.array([*[(0.0, 1.0)] * (sum(self.asked) + 1), cost, (0.0, 1.0), confusion])

    @property
    def limits_K2(self) -> Floats:
        """Where the reference places every mean, in its own units."""
        return np.stack([self.in_units(np.array(self.low_K)), self.in_units(np.array(self.high_K))], 1)

    def in_units(self, x_K: Floats) -> Floats:
        """Means in their own units instead of from 0 to 1."""
        low_K, high_K = self.scale_K2.T
        return np.asarray(low_K + (high_K - low_K) * x_K)

    def check(self, asked: tuple[bool, ...], standardised: bool) -> None:
        """Raise ``ValueError`` when answers come with other exits asked, or with confusion on another scale."""
        if asked != self.asked:
            raise ValueError(f"The reference was made with exits asked {self.asked}, these answers with {asked}.")
        if standardised != self.standardised:
            here, there = ("standardised", "raw") if standardised else ("raw", "standardised")
            raise ValueError(
                f"Confusion is {here} in these answers and {there} in the reference: collect the reference trace after "
                "fit_confusion (sdn collect --reference)."
            )

    def columns(self, seen: Seen) -> Floats:
        """The rows of a batch as K numbers in [0, 1]; a row whose answer is not finite is unsure and confused.

        Raises ``ValueError`` for rows that stop at an exit that the policy does not ask.
        """
        exit_B = seen.exit_B.cpu().numpy()
        known = np.flatnonzero(self.asked)
        if not np.isin(exit_B, known).all():
            strange = sorted({int(exit) for exit in exit_B} - set(known.tolist()))
            raise ValueError(f"Rows stop at exits {strange}; the reference policy asks {known.tolist()}.")
        confidence_B, confusion_B = (x_B.cpu().double().numpy() for x_B in (seen.confidence_B, seen.confusion_B))
        finite_B = seen.valid_B.cpu().numpy() & ~np.isnan(confidence_B) & ~np.isnan(confusion_B)
        sure_B, torn_B = np.where(finite_B, confidence_B, 0.0), np.where(finite_B, confusion_B, np.inf)
        x_BK = np.column_stack([exit_B[:, None] == known, ~finite_B, np.array(self.cost_E)[exit_B], sure_B, torn_B])
        low_K, high_K = self.scale_K2.T
        return np.asarray(((x_BK - low_K) / (high_K - low_K)).clip(0, 1), dtype=np.float64)


def refer(
    policy: Policy,
    trace: Trace,
    *,
    alpha: float = 0.05,
    max_accuracy_drop: float = 0.01,
    max_disagreement: float | None = None,
    slack: float = 0.0,
) -> Reference:
    """What ``policy`` does on the rows of ``trace``, with limits that allow for their number.

    ``alpha`` bounds the chance of a false alarm of any kind over a whole stream: half of it is for drift, a quarter for
    each audit, and of what needs the reference, half is for the reference's own limits. ``max_accuracy_drop`` is what
    early exits may lose in live accuracy, ``max_disagreement`` how often they may contradict the full network (None:
    the reference's upper limit and ``max_accuracy_drop`` more). ``slack`` widens all limits of drift by that share of
    their scale, for drifts too small to matter. Rows that the thresholds were chosen on are a little flattered by them;
    other rows are better. Raises ``ValueError`` for what makes no sense.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is the chance of a false alarm, between 0 and 1, such as 0.05; found {alpha}.")
    if not -1 < max_accuracy_drop < 1:
        raise ValueError(f"max_accuracy_drop is a share of accuracy, 0.01 for one point; found {max_accuracy_drop}.")
    if not 0 <= slack < 1:
        raise ValueError(f"slack is a share from 0, found {slack}.")
    if max_disagreement is not None and not 0 < max_disagreement <= 1:
        raise ValueError(f"max_disagreement is a share above 0, found {max_disagreement}.")
    outcome, rows = simulate(policy, trace), trace.num_samples
    full_N = trace.logits_ENC[trace.full_exit].argmax(1)
    differ = int((outcome.labels_N != full_N).sum())
    lost = int((full_N == trace.labels_N).sum()) - int((outcome.labels_N == trace.labels_N).sum())
    asked = policy.asks(trace.num_exits, trace.full_exit)
    usual = share_limits(differ, rows, alpha / 4)[1] + max(max_accuracy_drop, 0.0)  # alpha / 8 above it
    bare = Reference(
        exit_names=trace.exit_names,
        asked=asked,
        cost_E=tuple(policy_costs(trace, asked).tolist()),
        standardised=trace.confusion_reference is not None,
        rows=rows,
        alpha=alpha,
        max_accuracy_drop=max_accuracy_drop,
        max_disagreement=min(usual, 1.0) if max_disagreement is None else max_disagreement,
        harm_ratio=lost / differ if differ else 0.0,
    )
    x_NK = bare.columns(seen_in(outcome))
    each, shares = alpha / 4 / x_NK.shape[1], sum(asked) + 1
    limits = [share_limits(int(x_N.sum()), rows, each) for x_N in x_NK.T[:shares]]
    limits += [mean_limits(x_N, np.ones(rows), each) for x_N in x_NK.T[shares:]]
    return dataclasses.replace(
        bare,
        low_K=tuple(max(low - slack, 0.0) for low, _ in limits),
        high_K=tuple(min(high + slack, 1.0) for _, high in limits),
    )
