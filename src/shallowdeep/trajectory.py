"""The alarm: how probably an answer is wrong, from what the exits passed on the way to it said of its label.

It refuses to know how it was fitted and who asks: it takes softmaxes, as torch tensors or NumPy arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from shallowdeep.certificates import Certificate
from shallowdeep.policies import CalibrationRecord
from shallowdeep.spelling import record_from_json, record_to_json

Array: TypeAlias = Any
"""A torch tensor or a NumPy array."""
LEAST = 1e-9
"""Probabilities below count as this much: log-odds lie within 20.7, far apart from what softmaxes round to."""


def log_odds(probability: Array) -> Array:
    """Log-odds of probabilities, none beyond those of ``LEAST``; what is not a number counts as 0.

    >>> log_odds(np.array([0.5, 0.0])).round(1).tolist()
    [0.0, -20.7]
    """
    own = torch if isinstance(probability, Tensor) else np
    probability = own.nan_to_num(probability, nan=0.0)
    return own.log(own.clip(probability, LEAST, None)) - own.log(own.clip(1 - probability, LEAST, None))


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """How probably the answer of a row that leaves at exit e is wrong: the logistic function of ``bias_E[e]`` plus the
    sum over the exits i asked up to e of ``weight_EE[e][i]`` times the log-odds that exit i gives the answer's label.

    Made by ``fit_alarm`` for policies that ask the exits ``asked_E``. ``threshold``, where ``calibrate_alarm`` has
    found one, says which answers are kept: those whose alarm is at most that. ``fitted_on`` records rows and facts.
    >>> alarm = Alarm(asked_E=(True, True), bias_E=(0.0, 0.0), weight_EE=((-1.0, 0.0), (-0.5, -0.5)))
    >>> early, late = np.array([[0.5, 0.5]]), np.array([[0.5, 0.5]])
    >>> alarm.score(1, [early, late], late).tolist()
    [0.5]
    """

    asked_E: tuple[bool, ...]
    bias_E: tuple[float, ...]
    weight_EE: tuple[tuple[float, ...], ...]
    threshold: float | None = None
    fitted_on: CalibrationRecord | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        exits = len(self.asked_E)
        if not exits or len(self.bias_E) != exits or [len(row) for row in self.weight_EE] != [exits] * exits:
            shape = [len(self.weight_EE), *{len(row) for row in self.weight_EE}]
            raise ValueError(
                f"An alarm for {exits} exits has {exits} biases and {exits} x {exits} weights; found "
                f"{len(self.bias_E)} and {' x '.join(map(str, shape))}."
            )

    @property
    def certificate(self) -> Certificate | None:
        """What was proved of the answers kept; None for an alarm that only ranks."""
        return None if self.fitted_on is None else self.fitted_on.certificate

    def check(self, asked: Sequence[bool]) -> None:
        """Raise ``ValueError`` unless policies that ask the exits ``asked`` are those it was made for."""
        if tuple(asked) != self.asked_E:
            own, others = ([e for e, on in enumerate(given) if on] for given in (self.asked_E, asked))
            raise ValueError(
                f"This alarm is for exits {own} of {len(self.asked_E)}, the policy asks {others} of {len(asked)}: "
                "make one with fit_alarm(trace, policy)."
            )

    def keeps(self, alarm_S: Array) -> Array:
        """Which answers are kept: those whose alarm is at most the threshold. Raises ``ValueError`` without one."""
        if self.threshold is None:
            raise ValueError(
                "This alarm has no threshold: make one with calibrate_alarm(trace, policy, max_error=...)."
            )
        return alarm_S <= self.threshold

    def weights(self, exit: int) -> list[float]:
        """The weight of each exit asked up to ``exit``."""
        return [self.weight_EE[exit][e] for e in range(exit + 1) if self.asked_E[e]]

    def score(self, exit: int, said: Sequence[Array], answer_SC: Array) -> Array:
        """How probably answers are wrong ([S], in 0..1) of rows that leave at ``exit``, given the softmax of each exit
        asked so far and of the answer ([S, C] each); 1 where the answer is not a number.
        """
        own = torch if isinstance(answer_SC, Tensor) else np
        label_S = answer_SC.argmax(1)
        row_S = (label_S >= 0).cumsum(0) - 1  # torch and NumPy, whatever the device
        total_S = self.bias_E[exit]
        for weight, said_SC in zip(self.weights(exit), said, strict=True):
            total_S = log_odds(said_SC[row_S, label_S]) * weight + total_S
        alarm_S = (1 + own.tanh(total_S / 2)) / 2  # the logistic function without overflow
        answered_S = answer_SC[row_S, label_S]
        return own.where(answered_S == answered_S, alarm_S, own.ones_like(alarm_S))

    def to_json(self) -> dict[str, Any]:
        """The alarm as JSON-able facts."""
        facts = {name: value for name, value in vars(self).items() if value is not None}
        if self.fitted_on is not None:
            facts["fitted_on"] = record_to_json(self.fitted_on)
        return facts

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Alarm:
        """The alarm that ``to_json`` wrote, exactly. Raises ``ValueError`` on fields that are missing or unknown."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in facts]
        if missing or not facts.keys() <= fields.keys():
            raise ValueError(f"An alarm has the fields {', '.join(fields)}; found {', '.join(facts) or 'none'}.")
        record = facts.get("fitted_on")
        return cls(
            asked_E=tuple(map(bool, facts["asked_E"])),
            bias_E=tuple(map(float, facts["bias_E"])),
            weight_EE=tuple(tuple(map(float, row)) for row in facts["weight_EE"]),
            threshold=facts.get("threshold"),
            fitted_on=None if record is None else record_from_json(record),
        )
