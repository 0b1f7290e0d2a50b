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

from shallowdeep.policies import Policy, State, asked_exits, finite_rows
from shallowdeep.types import ConfusionReference, Outcome, Trace

CHUNK_ELEMENTS = 1 << 21  # logits held at once in float64 while walking a trace: 16 MB


def standardised(raw_N: Tensor, mean: float, std: float) -> Tensor:
    """``(raw - mean) / std``; 0 where the reference does not vary, as at the first exit asked."""
    return (raw_N - mean) / std if std > 1e-12 else torch.zeros_like(raw_N)


class Memory(NamedTuple):
    """What is remembered of rows that walk, each tensor with its rows first: the policy's state, what the exits asked
    so far said (float64 softmax [B, C] each), and their logits where the most confident may have to answer.
    """

    state: State
    softmax: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]

    def select(self, row_S: Tensor) -> Memory:
        """The rows ``row_S``."""
        return Memory(*(tuple(tensor.index_select(0, row_S) for tensor in part) for part in self))


class Answered(NamedTuple):
    """Answers of rows [B] at the exit where they stop."""

    logits_BC: Tensor
    confidence_B: Tensor
    confusion_B: Tensor


class Rule:
    """What a policy means on one network's exits, as functions of tensors alone: loops ask them, graphs hold them.

    Rows whose logits are not finite do not stop before the full exit, and do not walk past it. ``reference``, where
    there is one, standardises the confusion.
    """

    def __init__(
        self, policy: Policy, *, num_exits: int, full_exit: int, reference: ConfusionReference | None = None
    ) -> None:
        self.policy, self.full_exit = policy, full_exit
        self.asked = policy.asks(num_exits, full_exit)
        if reference is not None and len(reference.mean_EE) != num_exits:
            raise ValueError(f"The confusion reference speaks of {len(reference.mean_EE)} exits, not of {num_exits}.")
        self.last = max(e for e in range(num_exits) if self.asked[e])
        chosen = torch.tensor(self.asked)
        self.moments = [reference.moments(e, chosen) if reference else (0.0, 1.0) for e in range(num_exits)]

    def start(self, batch: int, labels_B: Tensor | None, device: torch.device) -> Memory:
        """The memory of ``batch`` fresh rows."""
        return Memory(self.policy.init(batch, labels_B, device), (), ())

    def ask(self, exit: int, logits_BC: Tensor, memory: Memory) -> tuple[Memory, Tensor]:
        """The memory with what ``exit`` says, and which rows stop there (bool [B])."""
        softmax_BC = torch.softmax(logits_BC, 1, dtype=torch.float64)
        logits = (*memory.logits, logits_BC) if self.policy.fallback == "most_confident" else ()
        said = Memory(memory.state, (*memory.softmax, softmax_BC), logits)
        if exit == self.last:
            return said, torch.ones_like(logits_BC[:, 0], dtype=torch.bool)
        state, stop_B = self.policy.step(memory.state, exit, logits_BC, softmax_BC)
        finite_B = finite_rows(logits_BC)
        return said._replace(state=state), stop_B | ~finite_B if exit == self.full_exit else stop_B & finite_B

    def answer(self, exit: int, logits_BC: Tensor, memory: Memory) -> Answered:
        """What rows that stop at ``exit`` are answered, given the memory after asking there."""
        softmax_BC = memory.softmax[-1]
        if memory.logits and exit in (self.last, self.full_exit):
            logits_BC, softmax_BC = self._most_confident(exit, memory)
        raw_B = l1(torch.stack(memory.softmax), softmax_BC).sum(0)
        return Answered(logits_BC, softmax_BC.amax(1), standardised(raw_B, *self.moments[exit]))

    def _most_confident(self, exit: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """Logits and softmax of each row's most confident finite exit; before the last exit, of lost rows alone."""
        logits_EBC, softmax_EBC = torch.stack(memory.logits), torch.stack(memory.softmax)
        finite_EB = logits_EBC.abs().amax(2) < math.inf
        # Not even the exit itself: then it answers, however badly.
        least_E1 = -torch.ones(len(logits_EBC), 1, dtype=torch.float64, device=logits_EBC.device)
        least_E1[-1] = 0.0
        best_B = torch.where(finite_EB, softmax_EBC.amax(2), least_E1).argmax(0)
        if exit != self.last:
            best_B = torch.where(finite_EB[-1], len(logits_EBC) - 1, best_B)
        best_1BC = best_B[None, :, None].expand(1, *logits_EBC.shape[1:])
        return logits_EBC.gather(0, best_1BC)[0], softmax_EBC.gather(0, best_1BC)[0]


@lru_cache(maxsize=256)
def rule_of(policy: Policy, num_exits: int, full_exit: int, reference: ConfusionReference | None) -> Rule:
    """The ``Rule``, worked out once and not for every batch."""
    return Rule(policy, num_exits=num_exits, full_exit=full_exit, reference=reference)


class Walk:
    """One batch on its way along the exits under one policy: ask exit by exit while rows are ``alive``, then finish.

    ``cost_E`` is what stopping at each exit costs under this policy (``costs_when_asking``). ``row_S`` says where the
    rows that still walk stand in the batch (None: nobody has left).
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
        self._rule = rule_of(policy, num_exits, full_exit, reference)
        self._cost_E, self._device = cost_E, torch.device(device)
        self._memory = self._rule.start(batch, labels_B, self._device)
        self._left: list[tuple[Tensor, Tensor, Answered]] = []

    def asks(self, exit: int) -> bool:
        """Whether the policy asks this exit at all."""
        return self._rule.asked[exit]

    def ask(self, exit: int, logits_BC: Tensor) -> Tensor:
        """Which of the rows that still walk walk on (bool [B]), given their logits at ``exit``."""
        assert self._rule.asked[exit], f"exit {exit} is not asked"
        assert len(logits_BC) == self.alive, f"{len(logits_BC)} rows given, {self.alive} walk"
        self._memory, stop_B = self._rule.ask(exit, logits_BC, self._memory)
        stops = int(stop_B.sum())
        if stops == self.alive:
            self._record(exit, self.row_S, logits_BC, self._memory)
            self.alive = 0
        elif stops:
            order_B = stop_B.to(torch.uint8).argsort(descending=True, stable=True)  # both halves for one wait
            out, stay = order_B[:stops], order_B[stops:]
            row_out = out if self.row_S is None else self.row_S[out]
            self._record(exit, row_out, logits_BC.index_select(0, out), self._memory.select(out))
            self.row_S = stay if self.row_S is None else self.row_S[stay]
            self.alive = len(stay)
            self._memory = self._memory.select(stay)
        return ~stop_B

    def finish(self) -> tuple[Outcome, Tensor]:
        """The outcome of all rows in the order of the batch, and which answers are finite (bool [B])."""
        assert self.alive == 0, f"{self.alive} rows still walk; the last exit asked is {self._rule.last}"
        rows, exits, answers = zip(*self._left, strict=True)
        row_B, exit_B = torch.cat(rows), torch.cat(exits)
        found = Answered(*(torch.cat(parts) for parts in zip(*answers, strict=True)))
        if len(self._left) > 1:
            order_B = row_B.argsort()
            exit_B, found = exit_B[order_B], Answered(*(part.index_select(0, order_B) for part in found))
        outcome = Outcome(
            exit_N=exit_B,
            labels_N=found.logits_BC.argmax(1),
            logits_NC=found.logits_BC,
            cost_N=self._cost_E[exit_B],
            confidence_N=found.confidence_B,
            confusion_N=found.confusion_B,
        )
        return outcome, finite_rows(found.logits_BC)

    def _record(self, exit: int, row_B: Tensor | None, logits_BC: Tensor, memory: Memory) -> None:
        row_B = torch.arange(len(logits_BC), device=self._device) if row_B is None else row_B
        self._left.append((row_B, torch.full_like(row_B, exit), self._rule.answer(exit, logits_BC, memory)))


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
