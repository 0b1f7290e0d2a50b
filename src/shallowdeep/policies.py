"""The rules that say where a sample stops and what is answered.

It refuses to know networks and engines: a rule sees logits, exit by exit, and looks at every row alone, so that which
rows leave the batch cannot change another row's answer. Scores are computed in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from shallowdeep.certificates import Certificate, certificate_from_json

Fallback = Literal["last", "most_confident"]
State = tuple[Tensor, ...]  # what a policy remembers of its rows, their axis first: compacted as rows leave


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """Where a policy's numbers come from: the calibration rows' 64-bit hashes, sorted, JSON-able facts, and what was
    proved, if anything.
    """

    hash_N: tuple[int, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    certificate: Certificate | None = None


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
        return state, torch.full_like(logits_BC[:, 0], exit == self.exit, dtype=torch.bool)


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
        if record.certificate is not None:
            proved = dataclasses.asdict(record.certificate).items()
            facts["calibrated_on"]["certificate"] = {name: _spelled(value) for name, value in proved}
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
        proved = record.get("certificate")
        given["calibrated_on"] = CalibrationRecord(
            hash_N=tuple(record["hash_N"]),
            info=record["info"],
            certificate=None if proved is None else certificate_from_json(proved),
        )
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
    # By a sum, which no runtime takes to be a number when one of its parts is none; the largest of a row may be.
    return logits_BC.sum(1, dtype=torch.float64).abs() < math.inf
