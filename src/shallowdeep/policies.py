"""The rules that say where a sample stops and what is answered, and the one walk along the exits that obeys them.

It refuses to know networks and engines: it sees logits, exit by exit. One ``Walk`` is ridden by two loops,
``simulate`` on a trace and the engine on a batch, so that offline and online cannot differ. A rule looks at every
row alone: which rows leave the batch cannot change another row's answer. Scores are computed in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from shallowdeep.types import ConfusionReference, Outcome, Trace

Fallback = Literal["last", "most_confident"]
State = tuple[Tensor, ...]  # what a policy remembers of its rows, their axis first: compacted as rows leave

CHUNK_ELEMENTS = 1 << 21  # logits held at once in float64 while walking a trace: 16 MB


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """Where a policy's numbers come from: the calibration rows' 64-bit hashes, sorted, and JSON-able facts."""

    hash_N: tuple[int, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


class Policy(Hashable, Protocol):
    """A rule with memory: ``init`` once per batch, ``step`` at every exit asked but the last, where all stop."""

    @property
    def fallback(self) -> Fallback:
        """What a row that no exit could stop is answered: the last exit asked, or the most confident one."""

    @property
    def calibrated_on(self) -> CalibrationRecord | None:
        """Where the thresholds come from; None for those set by hand. Not part of equality."""

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        """Which of the exits are asked, the full exit always among them. Raises ``ValueError`` on a misfit."""

    def init(self, batch: int, labels_B: Tensor | None, device: torch.device) -> State:
        """The memory of ``batch`` fresh rows."""

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        """The memory after ``exit`` and which rows would stop there (bool [B]), from logits and float64 softmax."""


@dataclass(frozen=True, kw_only=True)
class _Forgetful:
    """What all policies have in common: a record, and no memory unless they say so."""

    calibrated_on: CalibrationRecord | None = field(default=None, compare=False, repr=False)

    @property
    def fallback(self) -> Fallback:
        return "last"

    def init(self, batch: int, labels_B: Tensor | None, device: torch.device) -> State:
        return ()


@dataclass(frozen=True, kw_only=True)
class _Choosing(_Forgetful):
    """What policies have in common that choose where to stop.

    ``enabled_E`` says which exits are asked at all (None: all; the full exit always is). ``fallback`` answers rows that
    no exit could stop: the ``last`` exit asked, or the ``most_confident`` finite one (the paper's; ties: the earliest).
    """

    enabled_E: tuple[bool, ...] | None = None
    fallback: Fallback = "last"

    def __post_init__(self) -> None:
        if self.fallback not in ("last", "most_confident"):
            raise ValueError(f"fallback is 'last' or 'most_confident', found {self.fallback!r}.")
        if self.enabled_E is not None:
            object.__setattr__(self, "enabled_E", tuple(bool(e) for e in self.enabled_E))

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        return asked_exits(self.enabled_E, num_exits, full_exit)


@dataclass(frozen=True, kw_only=True)
class _Thresholded(_Choosing):
    threshold: float | tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.threshold
        values = tuple(map(float, given)) if isinstance(given, Sequence) else (float(given),)
        if not values or any(map(math.isnan, values)):
            raise ValueError(f"A threshold is a number, or one number per exit but the last; found {given}.")
        object.__setattr__(self, "threshold", values if isinstance(given, Sequence) else values[0])

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        if isinstance(self.threshold, tuple) and len(self.threshold) not in (num_exits - 1, num_exits):
            raise ValueError(
                f"{type(self).__name__} has {len(self.threshold)} thresholds; {num_exits} exits need {num_exits - 1} "
                f"(one per exit but the last, where everything stops), or {num_exits}."
            )
        return super().asks(num_exits, full_exit)

    def at(self, exit: int) -> float:
        """The threshold at ``exit``."""
        return self.threshold[exit] if isinstance(self.threshold, tuple) else self.threshold


@dataclass(frozen=True, kw_only=True)
class Confidence(_Thresholded):
    """Stop where the greatest softmax is >= ``threshold``: the paper's rule (arXiv 1810.07052, section 5.1).

    One threshold, or one per exit but the last (an entry for the last is ignored: everything left stops there).
    ``math.inf`` never stops. The paper answers what nobody stops by the most confident exit:
    >>> Confidence(threshold=0.9, fallback="most_confident").threshold
    0.9
    """

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        return state, softmax_BC.amax(1) >= self.at(exit)


@dataclass(frozen=True, kw_only=True)
class Entropy(_Thresholded):
    """Stop where the softmax's entropy in nats is <= ``threshold`` (BranchyNet, arXiv 1709.01686).

    >>> Entropy(threshold=(0.1, 0.2)).at(1)
    0.2
    """

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        return state, torch.special.entr(softmax_BC).sum(1) <= self.at(exit)


@dataclass(frozen=True, kw_only=True)
class Margin(_Thresholded):
    """Stop where the greatest softmax leads the second by >= ``threshold``.

    >>> Margin(threshold=0.5) == Margin(threshold=0.5, calibrated_on=CalibrationRecord())
    True
    """

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        top_B2 = softmax_BC.topk(2).values
        return state, top_B2[:, 0] - top_B2[:, 1] >= self.at(exit)


@dataclass(frozen=True, kw_only=True)
class Patience(_Choosing):
    """Stop once ``patience`` exits asked in a row have repeated the label before them (PABEE, arXiv 2006.04152).

    An exit whose logits are not finite repeats nothing and is repeated by nobody.
    >>> Patience(patience=2).patience
    2
    """

    patience: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 1:
            raise ValueError(f"patience counts repeated labels: a whole number from 1, found {self.patience!r}.")

    def init(self, batch: int, labels_B: Tensor | None, device: torch.device) -> State:
        return torch.full((batch,), -1, device=device), torch.zeros(batch, dtype=torch.int64, device=device)

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        before_B, repeats_B = state
        finite_B = finite_rows(logits_BC)
        label_B = logits_BC.argmax(1)
        repeats_B = (repeats_B + 1) * (finite_B & (label_B == before_B))
        return (torch.where(finite_B, label_B, -1), repeats_B), repeats_B >= self.patience


@dataclass(frozen=True, kw_only=True)
class Fixed(_Forgetful):
    """Stop everything at ``exit``: the network cut short there. Only that exit and the full exit are asked.

    ``Fixed(exit=full_exit)`` is the untouched network: no IC needs to run, and confusion, with nobody else asked, is 0.
    Only rows whose logits at an earlier ``exit`` are not finite go on to the full exit.
    >>> Fixed(exit=1).asks(4, 3)
    (False, True, False, True)
    """

    exit: int

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        if not 0 <= self.exit < num_exits:
            raise ValueError(f"Fixed(exit={self.exit}): exits are 0..{num_exits - 1}, the full exit is {full_exit}.")
        return tuple(e in (self.exit, full_exit) for e in range(num_exits))

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        return state, torch.full((len(logits_BC),), exit == self.exit, device=logits_BC.device)


@dataclass(frozen=True, kw_only=True)
class Oracle(_Forgetful):
    """Stop at the first exit that is right, else at the full exit: what no policy can beat. It needs the labels.

    >>> Oracle().asks(4, 2)
    (True, True, True, False)
    """

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        return tuple(e <= full_exit for e in range(num_exits))

    def init(self, batch: int, labels_B: Tensor | None, device: torch.device) -> State:
        if labels_B is None:
            raise ValueError("Oracle stops where the answer is right, so it needs labels: only simulate can run it.")
        return (labels_B,)

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        return state, logits_BC.argmax(1) == state[0]


KINDS: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (Confidence, Entropy, Margin, Patience, Fixed, Oracle)
}


def to_json(policy: Policy) -> dict[str, Any]:
    """The policy as JSON-able facts, ``{"kind": "Confidence", ...}``; an infinite threshold is the string "inf".

    >>> to_json(Fixed(exit=2))
    {'kind': 'Fixed', 'exit': 2}
    """
    facts = {name: getattr(policy, name) for name in _fields(type(policy))}
    record = facts.pop("calibrated_on")
    if record is not None:
        facts["calibrated_on"] = {"hash_N": list(record.hash_N), "info": dict(record.info)}
    return {"kind": type(policy).__name__} | {k: _spelled(v) for k, v in facts.items() if v is not None}


def from_json(facts: Mapping[str, Any]) -> Policy:
    """The policy that ``to_json`` wrote, exactly. Raises ``ValueError`` on an unknown kind or wrong fields.

    >>> from_json({"kind": "Patience", "patience": 2})
    Patience(enabled_E=None, fallback='last', patience=2)
    """
    given = dict(facts)
    name = given.pop("kind", None)
    if name not in KINDS:
        raise ValueError(f"No policy of kind {name!r}. Kinds: {', '.join(KINDS)}.")
    fields = _fields(KINDS[name])
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in given]
    if missing or not given.keys() <= fields.keys():
        raise ValueError(f"{name} has the fields {', '.join(fields)}; found {', '.join(given) or 'none'}.")
    if "calibrated_on" in given:
        record = given["calibrated_on"]
        given["calibrated_on"] = CalibrationRecord(hash_N=tuple(record["hash_N"]), info=record["info"])
    if "threshold" in given:
        value = given["threshold"]
        given["threshold"] = tuple(map(float, value)) if isinstance(value, list) else float(value)
    policy: Policy = KINDS[name](**given)
    return policy


def _fields(kind: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(kind)}


def _spelled(value: Any) -> Any:
    """JSON has neither tuples nor infinity."""
    if isinstance(value, tuple):
        return [_spelled(entry) for entry in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def asked_exits(enabled_E: Sequence[bool] | None, num_exits: int, full_exit: int) -> tuple[bool, ...]:
    """Which exits are asked when ``enabled_E`` are (None: all); the full exit always is. Raises ``ValueError``."""
    enabled_E = [True] * num_exits if enabled_E is None else enabled_E
    if len(enabled_E) != num_exits:
        raise ValueError(f"enabled_E has {len(enabled_E)} entries; {num_exits} exits need {num_exits}.")
    return tuple(bool(on) or e == full_exit for e, on in enumerate(enabled_E))


def finite_rows(logits_BC: Tensor) -> Tensor:
    """Which rows hold numbers only (bool [B]): no NaN, no infinity."""
    return logits_BC.abs().amax(1) < math.inf


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
    return Outcome(**{name: torch.cat([getattr(part, name) for part in parts]) for name in _fields(Outcome)})
