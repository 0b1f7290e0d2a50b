"""The one walk along the exits, ridden by two loops: ``simulate`` on a trace and the engine on a batch.

It refuses to know networks and engines; offline and online cannot differ, because both ask here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shallowdeep.policies import Policy, asked_exits, finite_rows
from shallowdeep.types import ConfusionReference, Outcome, Trace

CHUNK_ELEMENTS = 1 << 21  # logits held at once in float64 while walking a trace: 16 MB


def standardised(raw_N: Tensor, mean: float, std: float) -> Tensor:
    """``(raw - mean) / std``; 0 where the reference does not vary, as at the first exit asked."""
    return (raw_N - mean) / std if std > 1e-12 else torch.zeros_like(raw_N)


class _Route(NamedTuple):
    asked: tuple[bool, ...]
    last: int
    moments: tuple[tuple[float, float], ...]


@lru_cache(maxsize=256)
def _route(policy: Policy, num_exits: int, full_exit: int, reference: ConfusionReference | None) -> _Route:
    """What a policy means for a network with so many exits: worked out once, not for every batch."""
    asked = policy.asks(num_exits, full_exit)
    if reference is not None and len(reference.mean_EE) != num_exits:
        raise ValueError(f"The confusion reference speaks of {len(reference.mean_EE)} exits, not of {num_exits}.")
    last, chosen = max(e for e in range(num_exits) if asked[e]), torch.tensor(asked)
    moments = [reference.moments(e, chosen) if reference else (0.0, 1.0) for e in range(num_exits)]
    return _Route(asked, last, tuple(moments))


class _Leaving(NamedTuple):
    row_B: Tensor
    exit_B: Tensor
    logits_BC: Tensor
    softmax_BC: Tensor
    confusion_B: Tensor


class Walk:
    """One batch on its way along the exits under one policy: ask exit by exit while rows are ``alive``, then finish.

    ``cost_E`` is what stopping at each exit costs under this policy (``costs_when_asking``); ``reference``, where there
    is one, standardises the confusion. Rows whose logits are not finite do not stop before the full exit, and do not
    walk past it. ``row_S`` says where the rows that still walk stand in the batch (None: nobody has left).
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_exits: int,
        full_exit: int,
        cost_E: Tensor,
        reference: ConfusionReference | None,
        batch: int,
        labels_B: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.alive = batch
        self.row_S: Tensor | None = None
        self._route = _route(policy, num_exits, full_exit, reference)
        self._policy, self._full, self._cost_E = policy, full_exit, cost_E
        self._device = torch.device(device)
        self._state = policy.init(batch, labels_B, self._device)
        self._logits: list[Tensor] = []
        self._softmax: list[Tensor] = []
        self._left: list[_Leaving] = []

    def asks(self, exit: int) -> bool:
        """Whether the policy asks this exit at all."""
        return self._route.asked[exit]

    def ask(self, exit: int, logits_BC: Tensor) -> Tensor:
        """Which of the rows that still walk walk on (bool [B]), given their logits at ``exit``."""
        assert self._route.asked[exit], f"exit {exit} is not asked"
        assert len(logits_BC) == self.alive, f"{len(logits_BC)} rows given, {self.alive} walk"
        softmax_BC = torch.softmax(logits_BC, 1, dtype=torch.float64)
        self._softmax.append(softmax_BC)
        if self._policy.fallback == "most_confident":
            self._logits.append(logits_BC)
        if exit == self._route.last:
            return self._leave(exit, logits_BC, None, None)
        self._state, stop_B = self._policy.step(self._state, exit, logits_BC, softmax_BC)
        lost_B = None
        if exit == self._full:
            lost_B = ~finite_rows(logits_BC)
            stop_B = stop_B | lost_B
        elif self.alive and self._device.type == "cpu" and not stop_B.any():
            return ~stop_B  # the usual case at batch 1; on other devices one more kernel is cheaper than one more wait
        else:
            stop_B = stop_B & finite_rows(logits_BC)
        return self._leave(exit, logits_BC, stop_B, lost_B)

    def finish(self) -> tuple[Outcome, Tensor]:
        """The outcome of all rows in the order of the batch, and which answers are finite (bool [B])."""
        assert self.alive == 0, f"{self.alive} rows still walk; the last exit asked is {self._route.last}"
        left = self._left[0]
        if len(self._left) > 1:
            left = _Leaving(*(torch.cat(parts) for parts in zip(*self._left, strict=True)))
            order_B = left.row_B.argsort()
            left = _Leaving(*(part.index_select(0, order_B) for part in left))
        outcome = Outcome(
            exit_N=left.exit_B,
            labels_N=left.logits_BC.argmax(1),
            logits_NC=left.logits_BC,
            cost_N=self._cost_E[left.exit_B],
            confidence_N=left.softmax_BC.amax(1),
            confusion_N=left.confusion_B,
        )
        return outcome, finite_rows(left.logits_BC)

    def _leave(self, exit: int, logits_BC: Tensor, stop_B: Tensor | None, lost_B: Tensor | None) -> Tensor:
        """Record the answers of the rows that stop (None: all) and compact the rest; ``lost_B`` never stopped."""
        softmax_BC = self._softmax[-1]
        if self._logits and (stop_B is None or lost_B is not None):
            logits_BC, softmax_BC = self._most_confident(lost_B)
        stops = self.alive if stop_B is None else int(stop_B.sum())
        if stop_B is None or stops == self.alive:
            self._record(exit, self.row_S, logits_BC, softmax_BC, torch.stack(self._softmax))
            self.alive = 0
            return torch.zeros(stops, dtype=torch.bool, device=self._device)
        if stops:
            order_B = stop_B.to(torch.uint8).argsort(descending=True, stable=True)  # both halves for one wait
            out, stay = order_B[:stops], order_B[stops:]
            said_EBC = torch.stack([softmax.index_select(0, out) for softmax in self._softmax])
            row_out = out if self.row_S is None else self.row_S[out]
            self._record(exit, row_out, logits_BC.index_select(0, out), softmax_BC.index_select(0, out), said_EBC)
            self.row_S = stay if self.row_S is None else self.row_S[stay]
            self.alive = len(stay)
            self._state = tuple(memory.index_select(0, stay) for memory in self._state)
            self._softmax = [softmax.index_select(0, stay) for softmax in self._softmax]
            self._logits = [logits.index_select(0, stay) for logits in self._logits]
        return ~stop_B

    def _record(self, exit: int, row_B: Tensor | None, logits: Tensor, softmax: Tensor, said_EBC: Tensor) -> None:
        row_B = torch.arange(len(logits), device=self._device) if row_B is None else row_B
        raw_B = l1(said_EBC, softmax).sum(0)
        confusion_B = standardised(raw_B, *self._route.moments[exit])
        self._left.append(_Leaving(row_B, torch.full_like(row_B, exit), logits, softmax, confusion_B))

    def _most_confident(self, lost_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Answers of the rows ``lost_B`` (None: all) by the most confident finite exit, of the others by this one."""
        logits_EBC, softmax_EBC = torch.stack(self._logits), torch.stack(self._softmax)
        finite_EB = logits_EBC.abs().amax(2) < math.inf
        confidence_EB = torch.where(finite_EB, softmax_EBC.amax(2), -1.0)
        confidence_EB[-1].clamp_(min=0.0)
        best_B = confidence_EB.argmax(0)
        if lost_B is not None:
            best_B = torch.where(lost_B, best_B, len(self._logits) - 1)
        row_B = torch.arange(len(best_B), device=self._device)
        return logits_EBC[best_B, row_B], softmax_EBC[best_B, row_B]


def l1(softmax_EBC: Tensor, answer_BC: Tensor) -> Tensor:
    """L1 distance of each exit's softmax to the answer's ([E, B], 0 to 2); 2 where either is not a number."""
    return (softmax_EBC - answer_BC).abs_().sum(2).nan_to_num_(nan=2.0)


def costs_when_asking(
    asked_E: Sequence[bool], *, cost_E: Tensor, own_cost_E: Tensor | None, feeds_EE: Tensor | None
) -> Tensor:
    """Cost of stopping at each exit (float64 [E]) when only ``asked_E`` are asked, from what asking all costs.

    An IC is paid for at every stop at or after it if it is asked, or feeds one that is, directly or through others.
    Without ``own_cost_E`` nobody knows what skipping saves: everything passed is paid.
    """
    if own_cost_E is None:
        return cost_E
    needed_E = torch.tensor([bool(asked) for asked in asked_E])
    for exit in reversed(range(len(needed_E))):
        if feeds_EE is not None and needed_E[exit]:
            needed_E |= feeds_EE[:, exit].to(torch.bool)
    return cost_E - (own_cost_E.to(torch.float64) * ~needed_E).cumsum(0)


def policy_costs(trace: Trace, enabled_E: Sequence[bool] | None = None) -> Tensor:
    """Cost of stopping at each exit of ``trace`` (float64 [E]) when only ``enabled_E`` and the full exit are asked.

    >>> trace = Trace(logits_ENC=torch.zeros(2, 1, 2), labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.25]),
    ...               own_cost_E=torch.tensor([0.25, 0.0]))
    >>> policy_costs(trace, (False, True)).tolist()
    [0.25, 1.0]
    """
    asked_E = asked_exits(enabled_E, trace.num_exits, trace.full_exit)
    return costs_when_asking(asked_E, cost_E=trace.cost_E, own_cost_E=trace.own_cost_E, feeds_EE=trace.feeds_EE)


def simulate(policy: Policy, trace: Trace) -> Outcome:
    """What ``policy`` does with every sample of ``trace``: exit, answer, cost, confidence and confusion ([N] each).

    The same walk as the engine's, in chunks of bounded memory: a few seconds per million samples with 7 exits of 10
    classes. Raises ``ValueError`` when the policy does not fit the trace's exits.
    >>> from shallowdeep.policies import Confidence
    >>> trace = Trace(logits_ENC=torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[4.0, 0.0], [0.0, 4.0]]]),
    ...               labels_N=torch.tensor([0, 1]), cost_E=torch.tensor([0.5, 1.0]))
    >>> outcome = simulate(Confidence(threshold=0.9), trace)
    >>> outcome.exit_N.tolist(), outcome.labels_N.tolist(), outcome.cost_N.tolist()
    ([0, 1], [0, 1], [0.5, 1.0])
    """
    exits, full = trace.num_exits, trace.full_exit
    cost_E, reference = policy_costs(trace, policy.asks(exits, full)), trace.confusion_reference
    rows = max(1, CHUNK_ELEMENTS // (exits * trace.num_classes))
    parts = []
    for start in range(0, trace.num_samples, rows):
        logits_EBC = trace.logits_ENC[:, start : start + rows].detach()
        labels_B = trace.labels_N[start : start + rows]
        walk = Walk(
            policy,
            num_exits=exits,
            full_exit=full,
            cost_E=cost_E,
            reference=reference,
            batch=len(labels_B),
            labels_B=labels_B,
        )
        for exit in filter(walk.asks, range(exits)):
            if walk.alive:
                walk.ask(exit, logits_EBC[exit] if walk.row_S is None else logits_EBC[exit][walk.row_S])
        parts.append(walk.finish()[0])
    return Outcome(**{name: torch.cat([getattr(part, name) for part in parts]) for name in _OUTCOME})


_OUTCOME = tuple(field.name for field in dataclasses.fields(Outcome))
