"""The one walk along the exits, ridden by two loops: ``simulate`` on a trace and the engine on a batch.

It refuses to know networks and engines; offline and online cannot differ, because both ask here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shallowdeep.policies import Policy, State, asked_exits, finite_rows
from shallowdeep.trajectory import Alarm, Array
from shallowdeep.types import ConfusionReference, Outcome, Trace

CHUNK_ELEMENTS = 1 << 21  # logits held at once in float64 while walking a trace: 16 MB


def l1(said: Array, answer: Array) -> Array:
    """L1 distance between softmaxes, over their last axis (0 to 2); 2 where either is not a number."""
    distance = abs(said - answer).sum(-1)
    distance[distance != distance] = 2.0
    return distance


def standardised(raw_N: Array, mean: float, std: float) -> Array:
    """``(raw - mean) / std``; 0 where the reference does not vary, as at the first exit asked."""
    return (raw_N - mean) * inverse(std)


def inverse(std: float) -> float:
    """``1 / std``; 0 for a deviation that is none."""
    return 1 / std if std > 1e-12 else 0.0


class Memory(NamedTuple):
    """What is remembered of rows that walk, each tensor with its rows first: the policy's state, what the exits asked
    so far said (float64 softmax [B, C] each), and their logits, the last alone unless the most confident may answer.
    """

    state: State
    softmax: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]

    def select(self, row_S: Tensor) -> Memory:
        """The rows ``row_S``."""
        return Memory(*(tuple(tensor.index_select(0, row_S) for tensor in part) for part in self))


class Rule:
    """What a policy means on one network's exits, as functions of tensors alone: loops ask them, graphs hold them.

    ``reference``, where there is one, standardises the confusion; ``alarm`` says how probably answers are wrong.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_exits: int,
        full_exit: int,
        reference: ConfusionReference | None = None,
        alarm: Alarm | None = None,
    ) -> None:
        self.policy, self.full_exit, self.alarm = policy, full_exit, alarm
        self.asked = policy.asks(num_exits, full_exit)
        if alarm is not None:
            alarm.check(self.asked)
        if reference is not None and len(reference.mean_EE) != num_exits:
            raise ValueError(f"The confusion reference speaks of {len(reference.mean_EE)} exits, not of {num_exits}.")
        self.last = max(e for e in range(num_exits) if self.asked[e])
        chosen = torch.tensor(self.asked)
        self.moments = [reference.moments(e, chosen) if reference else (0.0, 1.0) for e in range(num_exits)]

    def start(self, batch: int, labels_B: Tensor | None, device: torch.device) -> Memory:
        """The memory of ``batch`` fresh rows."""
        return Memory(self.policy.init(batch, labels_B, device), (), ())

    def ask(self, exit: int, logits_BC: Tensor, memory: Memory) -> tuple[Memory, Tensor | None]:
        """The memory with what ``exit`` says, and which rows the policy stops there (bool [B]); None at the last."""
        softmax_BC = torch.softmax(logits_BC.double(), 1)  # with dtype= an ONNX graph converts only what came out
        before = memory.logits if self.policy.fallback == "most_confident" else ()
        said = Memory(memory.state, (*memory.softmax, softmax_BC), (*before, logits_BC))
        if exit == self.last:
            return said, None
        state, stop_B = self.policy.step(memory.state, exit, *self._said(exit, said))
        return said._replace(state=state), stop_B

    def heed(self, exit: int, stop_B: Array, finite_B: Array) -> Array:
        """Which rows really stop before the last exit: none whose logits are not finite (``finite_B``) before the full
        exit, and all of those there.
        """
        return stop_B | ~finite_B if exit == self.full_exit else stop_B & finite_B

    def recalls(self, exit: int) -> tuple[str, ...]:
        """What the answer at ``exit`` takes of the exits before, by ``Memory``'s names; nothing where it is its own."""
        if self.policy.ensemble is not None:
            return ("softmax",) if self.policy.ensemble.weight_EE[exit] else ()
        falls_back = self.policy.fallback == "most_confident" and exit in (self.last, self.full_exit)
        return ("softmax", "logits") if falls_back else ()

    def answer(self, exit: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """Logits and softmax that rows are answered that end at ``exit``."""
        return self._most_confident(exit, memory) if "logits" in self.recalls(exit) else self._said(exit, memory)

    def _said(self, exit: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """What the policy sees at ``exit``: the exit's own logits and softmax, or the ensemble's."""
        if self.policy.ensemble is None or not self.recalls(exit):
            return memory.logits[-1], memory.softmax[-1]
        asked = [e for e in range(exit + 1) if self.asked[e]]
        return self.policy.ensemble.answer(exit, asked, memory.softmax, memory.logits[-1])

    def _most_confident(self, exit: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """Logits and softmax of each row's most confident finite exit; before the last exit, of lost rows alone."""
        logits_EBC, softmax_EBC = torch.stack(memory.logits), torch.stack(memory.softmax)
        finite_EB = torch.stack([finite_rows(logits_BC) for logits_BC in memory.logits])
        # Not even the exit itself: then it answers, however badly.
        least_E1 = -torch.ones(len(logits_EBC), 1, dtype=torch.float64, device=logits_EBC.device)
        least_E1[-1] = 0.0
        best_B = torch.where(finite_EB, softmax_EBC.amax(2), least_E1).argmax(0)
        if exit != self.last:
            best_B = torch.where(finite_EB[-1], len(logits_EBC) - 1, best_B)
        best_1BC = best_B[None, :, None].expand(1, *logits_EBC.shape[1:])
        return logits_EBC.gather(0, best_1BC)[0], softmax_EBC.gather(0, best_1BC)[0]

    def confusion(self, exit: int, said: Sequence[Array], answer_SC: Array) -> Array:
        """How far the exits asked (softmax [S, C] each) are from the answer's softmax, for rows that stop at ``exit``:
        torch tensors or NumPy arrays.
        """
        return standardised(sum(l1(said_SC, answer_SC) for said_SC in said), *self.moments[exit])

    def suspicion(self, exit: int, said: Sequence[Array], answer_SC: Array) -> Array | None:
        """How probably the same rows' answers are wrong; None without an alarm."""
        return None if self.alarm is None else self.alarm.score(exit, said, answer_SC)


@lru_cache(maxsize=256)
def rule_of(
    policy: Policy,
    num_exits: int,
    full_exit: int,
    reference: ConfusionReference | None,
    alarm: Alarm | None = None,
) -> Rule:
    """The ``Rule``, worked out once and not for every batch."""
    return Rule(policy, num_exits=num_exits, full_exit=full_exit, reference=reference, alarm=alarm)


class Left(NamedTuple):
    """Rows that stopped together: their places in the batch, exits, answers, which of them a limit stopped, and how
    probably each is wrong (None: nobody asked).
    """

    row_S: Array
    exit_S: Array
    logits_SC: Array
    confidence_S: Array
    confusion_S: Array
    capped_S: Array
    alarm_S: Array | None

    def rows(self, index: Array) -> Left:
        """The rows ``index``."""
        return Left(*(None if array is None else array[index] for array in self))


def in_batch_order(left: Sequence[Left], joined: Callable[..., Array] = torch.cat) -> Left:
    """All that left, in the order of the batch; ``joined`` puts arrays one after another."""
    if len(left) == 1:
        return left[0]
    found = Left(*(None if parts[0] is None else joined(parts) for parts in zip(*left, strict=True)))
    return found.rows(found.row_S.argsort())


class Walk:
    """One batch on its way along the exits under one rule: ask exit by exit while rows are ``alive``, then finish.

    ``row_S`` says where the rows that still walk stand in the batch (None: nobody has left); ``left`` who has.
    """

    def __init__(
        self, rule: Rule, *, batch: int, labels_B: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.alive = batch
        self.row_S: Tensor | None = None
        self.left: list[Left] = []
        self._rule, self._device = rule, torch.device(device)
        self._memory = rule.start(batch, labels_B, self._device)

    def ask(self, exit: int, logits_BC: Tensor, *, ends: bool = False) -> Tensor:
        """Which of the rows that still walk the policy lets walk on (bool [B]), given their logits at ``exit``; where a
        limit ``ends`` the walk, all leave, and those are capped.
        """
        assert self._rule.asked[exit], f"exit {exit} is not asked"
        assert len(logits_BC) == self.alive, f"{len(logits_BC)} rows given, {self.alive} walk"
        self._memory, stop_B = self._rule.ask(exit, logits_BC, self._memory)
        if stop_B is None:
            on_B = torch.zeros_like(logits_BC[:, 0], dtype=torch.bool)
        else:
            on_B = ~self._rule.heed(exit, stop_B, finite_rows(logits_BC))
        stay = 0 if ends else int(on_B.sum())
        if not stay:
            self._record(exit, self.row_S, self._memory, on_B)
        elif stay < self.alive:
            order_B = on_B.to(torch.uint8).argsort(stable=True)  # both halves for one wait
            out, index = order_B[: self.alive - stay], order_B[self.alive - stay :]
            gone = out if self.row_S is None else self.row_S[out]
            self._record(exit, gone, self._memory.select(out), on_B[out])
            self.row_S = index if self.row_S is None else self.row_S[index]
            self._memory = self._memory.select(index)
        self.alive = stay
        return on_B

    def finish(self, cost_E: Tensor) -> Outcome:
        """The outcome of all rows in the order of the batch, given what stopping at each exit costs under this policy
        (``costs_when_asking``).
        """
        assert self.alive == 0, f"{self.alive} rows still walk; the last exit asked is {self._rule.last}"
        _, exit_B, logits_BC, confidence_B, confusion_B, _, alarm_B = in_batch_order(self.left)
        return Outcome(
            exit_N=exit_B,
            labels_N=logits_BC.argmax(1),
            logits_NC=logits_BC,
            cost_N=cost_E[exit_B],
            confidence_N=confidence_B,
            confusion_N=confusion_B,
            alarm_N=alarm_B,
        )

    def _record(self, exit: int, row_S: Tensor | None, memory: Memory, capped_S: Tensor) -> None:
        logits_SC, softmax_SC = self._rule.answer(exit, memory)
        row_S = torch.arange(len(logits_SC), device=self._device) if row_S is None else row_S
        confusion_S = self._rule.confusion(exit, memory.softmax, softmax_SC)
        alarm_S = self._rule.suspicion(exit, memory.softmax, softmax_SC)
        exit_S, confidence_S = torch.full_like(row_S, exit), softmax_SC.amax(1)
        self.left.append(Left(row_S, exit_S, logits_SC, confidence_S, confusion_S, capped_S, alarm_S))


def costs_when_asking(
    asked_E: Sequence[bool], *, cost_E: Tensor, own_cost_E: Tensor | None, feeds_EE: Tensor | None
) -> Tensor:
    """Cost of stopping at each exit (float64 [E]) when only ``asked_E`` are asked, from what asking all costs.

    An IC is paid for at every stop at or after it if it is asked, or feeds one that is, directly or through others.
    Without ``own_cost_E`` nobody knows what skipping saves: everything passed is paid.
    """
    if own_cost_E is None:
        return cost_E
    return cost_E - (own_cost_E.to(torch.float64) * ~torch.tensor(needed_exits(asked_E, feeds_EE))).cumsum(0)


def needed_exits(asked_E: Sequence[bool], feeds_EE: Tensor | None) -> tuple[bool, ...]:
    """Which exits run: those asked, and those whose ICs feed one of them, directly or through others."""
    needed_E = torch.tensor([bool(asked) for asked in asked_E])
    for exit in reversed(range(len(needed_E))):
        if feeds_EE is not None and needed_E[exit]:
            needed_E |= feeds_EE[: len(needed_E), exit].to(needed_E)
    return tuple(needed_E.tolist())


def policy_costs(trace: Trace, enabled_E: Sequence[bool] | None = None) -> Tensor:
    """Cost of stopping at each exit of ``trace`` (float64 [E]) when only ``enabled_E`` and the full exit are asked.

    >>> trace = Trace(logits_ENC=torch.zeros(2, 1, 2), labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.25]),
    ...               own_cost_E=torch.tensor([0.25, 0.0]))
    >>> policy_costs(trace, (False, True)).tolist()
    [0.25, 1.0]
    """
    asked_E = asked_exits(enabled_E, trace.num_exits, trace.full_exit)
    return costs_when_asking(asked_E, cost_E=trace.cost_E, own_cost_E=trace.own_cost_E, feeds_EE=trace.feeds_EE)


def simulate(policy: Policy, trace: Trace, alarm: Alarm | None = None) -> Outcome:
    """What ``policy`` does with every sample of ``trace``: exit, answer, cost, confidence and confusion ([N] each), and
    how probably the answer is wrong where an ``alarm`` is given.

    The same walk as the engine's, in chunks of bounded memory: a few seconds per million samples with 7 exits of 10
    classes. Raises ``ValueError`` when the policy does not fit the trace's exits or its second look, or the alarm the
    policy.
    >>> from shallowdeep.policies import Confidence
    >>> trace = Trace(logits_ENC=torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[4.0, 0.0], [0.0, 4.0]]]),
    ...               labels_N=torch.tensor([0, 1]), cost_E=torch.tensor([0.5, 1.0]))
    >>> outcome = simulate(Confidence(threshold=0.9), trace)
    >>> outcome.exit_N.tolist(), outcome.labels_N.tolist(), outcome.cost_N.tolist()
    ([0, 1], [0, 1], [0.5, 1.0])
    """
    exits, full = trace.num_exits, trace.full_exit
    _check_look(policy, trace)
    rule = rule_of(policy, exits, full, trace.confusion_reference, alarm)
    cost_E = policy_costs(trace, rule.asked)
    rows = max(1, CHUNK_ELEMENTS // (exits * trace.num_classes))
    parts = []
    for start in range(0, trace.num_samples, rows):
        logits_EBC = trace.logits_ENC[:, start : start + rows].detach()
        labels_B = trace.labels_N[start : start + rows]
        walk = Walk(rule, batch=len(labels_B), labels_B=labels_B)
        for exit in range(exits):
            if rule.asked[exit] and walk.alive:
                walk.ask(exit, logits_EBC[exit] if walk.row_S is None else logits_EBC[exit][walk.row_S])
        parts.append(walk.finish(cost_E))
    names = [name for name in _OUTCOME if name != "alarm_N" or alarm is not None]
    return Outcome(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _check_look(policy: Policy, trace: Trace) -> None:
    """Refuse a policy that looks twice where the trace has no such view; what was made by hand runs on any."""
    needs = None if policy.calibrated_on is None else policy.calibrated_on.info.get("second_look")
    if needs is not None and needs != (has := trace.info.get("second_look")):
        raise ValueError(
            f"The policy was calibrated with the second look {needs!r}, and this trace was collected "
            f"{'without one' if has is None else f'with {has!r}'}: collect it with second_look={needs!r}."
        )


_OUTCOME = tuple(field.name for field in dataclasses.fields(Outcome))
