"""The rules that say where a sample stops and what is answered.

It refuses to know networks and engines: a rule sees logits, exit by exit, and looks at every row alone, so that which
rows leave the batch cannot change another row's answer. Scores are computed in float64.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from shallowdeep.certificates import Certificate
from shallowdeep.types import Trace

Fallback = Literal["last", "most_confident"]
OVERLAP = 0.01
"""Shares of rows seen before that are worth a word: duplicates happen."""
LEAST = 1e-12
"""No probability is taken to be less where its logarithm counts."""
State = tuple[Tensor, ...]  # what a policy remembers of its rows, their axis first: compacted as rows leave


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """Where a policy's numbers come from: the calibration rows' 64-bit hashes, sorted, the exits they were answered at,
    JSON-able facts, and what was proved, if anything.
    """

    hash_N: tuple[int, ...] = ()
    exit_names: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    certificate: Certificate | None = None

    @classmethod
    def of(
        cls, trace: Trace, asked: Sequence[bool], info: Mapping[str, Any], certificate: Certificate | None = None
    ) -> CalibrationRecord:
        """The record of what all rows of ``trace`` taught; it names the backend that answered them, where the trace
        does, and the second look, if that is among those asked.
        """
        names = ("backend", "second_look") if any(asked[trace.full_exit + 1 :]) else ("backend",)
        made = {name: trace.info[name] for name in names if name in trace.info}
        hash_N = () if trace.hash_N is None else tuple(sorted(trace.hash_N.tolist()))
        return cls(hash_N=hash_N, exit_names=trace.exit_names, info={**info, **made}, certificate=certificate)

    def also(self, earlier: CalibrationRecord | None) -> CalibrationRecord:
        """The record of what was built upon something that ``earlier`` rows had taught: it has seen those, too."""
        known = () if earlier is None else earlier.hash_N
        return dataclasses.replace(self, hash_N=tuple(sorted({*self.hash_N, *known})))

    def of_others(self, exit_names: Sequence[str]) -> bool:
        """Whether the exits known here are called otherwise than those of ``exit_names`` in the same places."""
        return any(own != other for own, other in zip(self.exit_names, exit_names, strict=False))

    def seen(self, trace: Trace) -> Tensor:
        """Which rows of ``trace`` are among those (bool [N]); none where either does not know its rows' hashes."""
        if trace.hash_N is None:
            return torch.zeros(trace.num_samples, dtype=torch.bool)
        return torch.isin(trace.hash_N, torch.tensor(self.hash_N, dtype=trace.hash_N.dtype))


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Answers made of several exits: at exit e the softmax of ``sum_j weight_EE[e][j] * log p_j + bias_EC[e]``.

    ``weight_EE[e]`` is empty where the exit answers for itself, else it has a weight for each exit up to e; those not
    asked, and those whose logits are not finite, count as 0. ``bias_EC`` may be left out. Zero Time Waste (arXiv
    2106.05409, section 3) weighs ICs by ``exp(w_j) / (e + 1)`` and leaves the backbone's own answer alone.
    >>> Ensemble(weight_EE=((), (0.5, 1.0))).weight_EE[1]
    (0.5, 1.0)
    """

    weight_EE: tuple[tuple[float, ...], ...]
    bias_EC: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("weight_EE", "bias_EC"):
            object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in getattr(self, name)))
        sizes = [len(row) for row in self.weight_EE]
        if any(size not in (0, exit + 1) for exit, size in enumerate(sizes)):
            raise ValueError(f"weight_EE has a weight per exit up to each, or none; found rows of {sizes}.")
        if self.bias_EC and (len(self.bias_EC) != len(sizes) or len({len(row) for row in self.bias_EC}) > 1):
            raise ValueError(
                f"bias_EC has {len(sizes)} rows of a number per class; found {list(map(len, self.bias_EC))}."
            )
        if not all(math.isfinite(value) for row in (*self.weight_EE, *self.bias_EC) for value in row):
            raise ValueError("Weights and biases of an ensemble must be finite.")

    def answer(
        self, exit: int, asked: Sequence[int], softmax: Sequence[Tensor], logits_BC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits and float64 softmax [B, C] of the answer at ``exit``, of what ``asked`` exits up to it said.

        Rows whose own logits are not finite keep them: nothing hides that.
        """
        total_BC = torch.zeros_like(softmax[-1])
        for other, said_BC in zip(asked, softmax, strict=True):
            log_BC = torch.where(said_BC == said_BC, said_BC, 1.0).clamp_min(LEAST).log()
            total_BC = total_BC + self.weight_EE[exit][other] * log_BC
        if self.bias_EC:
            total_BC = total_BC + _beside(total_BC, self.bias_EC[exit])
        finite_B1 = finite_rows(logits_BC)[:, None]
        answer_BC = torch.where(finite_B1, torch.softmax(total_BC, 1), softmax[-1])
        return torch.where(finite_B1, total_BC.to(logits_BC.dtype), logits_BC), answer_BC


class Policy(Hashable, Protocol):
    """A rule with memory: ``init`` once per batch, ``step`` at every exit asked but the last, where all stop."""

    @property
    def fallback(self) -> Fallback:
        """What a row that no exit could stop is answered: the last exit asked, or the most confident one."""

    @property
    def ensemble(self) -> Ensemble | None:
        """What is answered, and seen by ``step``, in place of an exit's own logits and softmax."""

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

    @property
    def ensemble(self) -> Ensemble | None:
        return None

    def init(self, batch: int, labels_B: Tensor | None, device: torch.device) -> State:
        return ()


@dataclass(frozen=True, kw_only=True)
class _Choosing(_Forgetful):
    """What policies have in common that choose where to stop.

    ``enabled_E`` says which exits are asked at all (None: all; the full exit always is). ``fallback`` answers rows that
    no exit could stop: the ``last`` exit asked, or the ``most_confident`` finite one (the paper's; ties: the earliest).
    ``ensemble`` takes the place of exits' own answers: the policy compares it and answers it.
    """

    enabled_E: tuple[bool, ...] | None = None
    fallback: Fallback = "last"
    ensemble: Ensemble | None = None

    def __post_init__(self) -> None:
        if self.fallback not in ("last", "most_confident"):
            raise ValueError(f"fallback is 'last' or 'most_confident', found {self.fallback!r}.")
        if self.ensemble is not None and self.fallback != "last":
            raise ValueError("An ensemble answers what nobody stopped by itself: fallback must be 'last' beside it.")
        if self.enabled_E is not None:
            object.__setattr__(self, "enabled_E", tuple(bool(e) for e in self.enabled_E))

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        asked = asked_exits(self.enabled_E, num_exits, full_exit)
        known = num_exits if self.enabled_E is None else len(self.enabled_E)  # with those that need not be there
        if self.ensemble is not None and len(self.ensemble.weight_EE) not in (num_exits, known):
            raise ValueError(f"The ensemble speaks of {len(self.ensemble.weight_EE)} exits, not of {num_exits}.")
        return asked


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
class PerClass(_Choosing):
    """Stop where the greatest softmax is >= the threshold of its class.

    >>> PerClass(threshold_C=(0.9, 0.99)).threshold_C
    (0.9, 0.99)
    """

    threshold_C: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        values = tuple(map(float, self.threshold_C))
        if not values or any(map(math.isnan, values)):
            raise ValueError(f"threshold_C is one number per class; found {self.threshold_C}.")
        object.__setattr__(self, "threshold_C", values)

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        if softmax_BC.shape[1] != len(self.threshold_C):
            raise ValueError(f"PerClass has {len(self.threshold_C)} thresholds for {softmax_BC.shape[1]} classes.")
        top_B, label_B = softmax_BC.max(1)
        return state, top_B >= _beside(softmax_BC, self.threshold_C).index_select(0, label_B)


@dataclass(frozen=True, kw_only=True)
class _Scored(_Thresholded, ABC):
    """What policies have in common that stop where a score is >= ``threshold``, and remember the label before it."""

    def init(self, batch: int, labels_B: Tensor | None, device: torch.device) -> State:
        return torch.full((batch,), -1, device=device), torch.zeros(batch, dtype=torch.float64, device=device)

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        state, score_B = self.score(state, exit, logits_BC, softmax_BC)
        return state, score_B >= self.at(exit)

    @abstractmethod
    def score(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        """What is remembered then, and the score of each row."""


@dataclass(frozen=True, kw_only=True)
class Score(_Scored):
    """Stop where a weighted sum over what the exits said is >= ``threshold``: a learned stopping score.

    ``confidence`` weighs the log-odds of the greatest softmax, ``margin`` those of its lead over the second,
    ``entropy`` the entropy in nats, ``agreement`` how many exits asked in a row have repeated the label before them.
    Thresholds per exit are the levels of the exits. Confidence with a bonus for agreement:
    >>> Score(threshold=4.0, agreement=0.5).confidence
    1.0
    """

    confidence: float = 1.0
    margin: float = 0.0
    entropy: float = 0.0
    agreement: float = 0.0

    def score(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        state, features = self.features(state, logits_BC, softmax_BC)
        weights = (self.confidence, self.margin, self.entropy, self.agreement)
        score_B = torch.zeros_like(softmax_BC[:, 0])
        for weight, feature_B in zip(weights, features, strict=True):
            score_B = score_B + weight * feature_B
        return state, score_B

    @staticmethod
    def features(state: State, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, tuple[Tensor, ...]]:
        """What is weighed ([B] each, float64), in the order of the fields."""
        before_B, repeats_B = state
        label_B = torch.where(finite_rows(logits_BC), logits_BC.argmax(1), -1)
        repeats_B = (repeats_B + 1) * ((label_B == before_B) & (label_B >= 0))
        top_B, second_B = softmax_BC.topk(2).values.unbind(1)
        others_B = torch.where(softmax_BC < top_B[:, None], softmax_BC, 0.0).sum(1)
        rest_B = torch.where(top_B == second_B, 1 - top_B, others_B).clamp_min(LEAST)
        lead_B = ((1 + top_B - second_B) / (rest_B + second_B)).log()
        entropy_B = torch.special.entr(softmax_BC).sum(1)
        return (label_B, repeats_B), ((top_B / rest_B).log(), lead_B, entropy_B, repeats_B)


@dataclass(frozen=True, kw_only=True)
class Accumulated(_Scored):
    """Stop where confidence summed over exits in a row that agree is >= ``threshold`` (BEEM, ICLR 2025).

    S = w_e * confidence, plus the S before it where the label is the same; ``weight_E`` are the w_e (None: all 1).
    >>> Accumulated(threshold=2.5).weight_E is None
    True
    """

    weight_E: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_E is not None:
            object.__setattr__(self, "weight_E", tuple(map(float, self.weight_E)))

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        if self.weight_E is not None and len(self.weight_E) not in (num_exits - 1, num_exits):
            raise ValueError(f"Accumulated has {len(self.weight_E)} weights; {num_exits} exits need {num_exits - 1}.")
        return super().asks(num_exits, full_exit)

    def score(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        before_B, total_B = state
        label_B = torch.where(finite_rows(logits_BC), logits_BC.argmax(1), -1)
        weight = 1.0 if self.weight_E is None else self.weight_E[exit]
        kept_B = torch.where((label_B == before_B) & (label_B >= 0), total_B, 0.0)
        total_B = kept_B + weight * softmax_BC.amax(1)
        return (label_B, total_B), total_B


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


@dataclass(frozen=True, kw_only=True)
class Tempered(_Forgetful):
    """Decide as ``policy``, calibrated on ``reliability.scaled(trace, temperature_E)``, does on logits divided by them.

    The answer, and its confidence, stay the network's own. The record of ``policy`` becomes this one's.
    >>> Tempered(policy=Confidence(threshold=0.9), temperature_E=(2.0, 1.5)).asks(2, 1)
    (True, True)
    """

    policy: Policy
    temperature_E: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature_E", tuple(map(float, self.temperature_E)))
        if not all(0 < value < math.inf for value in self.temperature_E):
            raise ValueError(f"Temperatures are finite numbers above 0, found {self.temperature_E}.")
        if self.policy.ensemble is not None:
            raise ValueError("An ensemble's weights say how sharp every exit is: its policies take no temperatures.")
        if self.policy.calibrated_on is not None:
            object.__setattr__(self, "calibrated_on", self.calibrated_on or self.policy.calibrated_on)
            inner: Any = self.policy  # every policy is a dataclass, which a protocol cannot say
            object.__setattr__(self, "policy", dataclasses.replace(inner, calibrated_on=None))

    @property
    def fallback(self) -> Fallback:
        return self.policy.fallback

    def asks(self, num_exits: int, full_exit: int) -> tuple[bool, ...]:
        if len(self.temperature_E) != num_exits:
            raise ValueError(f"{num_exits} exits need as many temperatures, found {len(self.temperature_E)}.")
        return self.policy.asks(num_exits, full_exit)

    def init(self, batch: int, labels_B: Tensor | None, device: torch.device) -> State:
        return self.policy.init(batch, labels_B, device)

    def step(self, state: State, exit: int, logits_BC: Tensor, softmax_BC: Tensor) -> tuple[State, Tensor]:
        tempered_BC = logits_BC.double() / self.temperature_E[exit]
        return self.policy.step(state, exit, tempered_BC, torch.softmax(tempered_BC, 1))


def asked_exits(enabled_E: Sequence[bool] | None, num_exits: int, full_exit: int) -> tuple[bool, ...]:
    """Which exits are asked when ``enabled_E`` are (None: all); the full exit always is. Raises ``ValueError``.

    An exit that is not asked, such as a second look that does not pay, need not be there.
    """
    enabled_E = [True] * num_exits if enabled_E is None else enabled_E
    while len(enabled_E) > num_exits and not enabled_E[-1]:
        enabled_E = enabled_E[:-1]
    if len(enabled_E) != num_exits:
        raise ValueError(f"enabled_E has {len(enabled_E)} entries; {num_exits} exits need {num_exits}.")
    return tuple(bool(on) or e == full_exit for e, on in enumerate(enabled_E))


def _beside(tensor: Tensor, values: Sequence[float]) -> Tensor:
    """``values`` in float64 on the device of ``tensor``, which is not waited for."""
    return torch.tensor(values, dtype=torch.float64).to(tensor.device, non_blocking=True)


def finite_rows(logits_BC: Tensor) -> Tensor:
    """Which rows hold numbers only (bool [B]): no NaN, no infinity."""
    # By a sum, which no runtime takes to be a number when one of its parts is none; the largest of a row may be.
    return logits_BC.sum(1, dtype=torch.float64).abs() < math.inf
