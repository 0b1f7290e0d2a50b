"""What an attack does to a policy, and which scores tell attacked rows from clean ones.

It refuses to know how rows were attacked: traces of clean and of attacked rows come in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shallowdeep.alarming import suspicions
from shallowdeep.calibration import evaluate
from shallowdeep.finding import error_auroc
from shallowdeep.inputs import num_rows, take
from shallowdeep.limits import Answers, CostWindow
from shallowdeep.policies import Policy
from shallowdeep.trajectory import Alarm
from shallowdeep.types import Answer, Trace, table
from shallowdeep.walking import simulate

FALSE_ALARMS = 0.05
"""The part of clean rows that an alarm may suspect where its catch is counted."""
REQUEST = 10
"""Rows that a client sends at a time."""


def efficacy(share_E: Tensor, cost_E: Tensor) -> float:
    """How well early exits are used: the area under the share of rows answered by then, over the cost (0..1).

    Costs are shares of the last exit's; the curve starts at (0, 0), is 1 at the end, and is joined by straight lines,
    as the code of arXiv 2010.02432 has it. Where all rows stop at the end there remains half of the last gap.

    >>> efficacy(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 1.0]))
    0.5
    """
    answered = np.concatenate([[0.0], share_E.double().cumsum(0).numpy()])
    answered[-1] = 1.0
    return float(np.trapezoid(answered, np.concatenate([[0.0], (cost_E.double() / cost_E[-1]).numpy()])))


@dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """What a policy does with one kind of rows: accuracy of the full exit and of the answers given, mean cost,
    ``efficacy``, and where rows stop.
    """

    accuracy_full: float
    accuracy: float
    mean_cost: float
    efficacy: float
    share_E: Tensor


@dataclass(frozen=True, kw_only=True)
class Told:
    """How well a score tells attacked rows from clean ones: AUROC (half is luck), and the share of them ``caught`` when
    a twentieth of the clean rows raises a false alarm.
    """

    auroc: float
    caught: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Resistance:
    """What attacks do to a policy: its behaviour on each kind of rows, and how well scores of the answers given tell
    each kind from clean rows. ``print`` gives tables.
    """

    exit_names: tuple[str, ...]
    found: Mapping[str, Behaviour]
    told: Mapping[str, Mapping[str, Told]]

    def __str__(self) -> str:
        head = ("rows", "accuracy", "full exit", "mean cost", "efficacy", *self.exit_names)
        rows: list[tuple[str, ...]] = [head]
        for name, one in self.found.items():
            shares = (f"{share:.1%}" for share in one.share_E.tolist())
            means = f"{one.accuracy:.2%}", f"{one.accuracy_full:.2%}", f"{one.mean_cost:.3f}", f"{one.efficacy:.3f}"
            rows.append((name, *means, *shares))
        kinds = list(self.told)
        scores = list(self.told[kinds[0]]) if kinds else []
        if not scores:
            return table(rows)
        lines = [("AUROC against clean rows, caught", *kinds)]
        for score in scores:
            told = (self.told[kind][score] for kind in kinds)
            lines.append((score, *(f"{one.auroc:.3f}  {one.caught:6.1%}" for one in told)))
        return f"{table(rows)}\n\n{table(lines)}"


def resistance(policy: Policy, clean: Trace, attacked: Mapping[str, Trace], alarm: Alarm | None = None) -> Resistance:
    """What ``policy`` does with ``clean`` rows and with every kind of ``attacked`` rows, traces of one SDN; rows are
    told apart by what their answers cost and by the scores of ``alarming.suspicions``, ``alarm`` among them.

    >>> logits_ENC = torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]]])
    >>> clean = Trace(logits_ENC=logits_ENC, labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.0]))
    >>> slow = Trace(logits_ENC=logits_ENC / 9, labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.0]))
    >>> from shallowdeep.policies import Confidence
    >>> resistance(Confidence(threshold=0.9), clean, {"slow": slow}).found["slow"].mean_cost
    1.0
    """
    usual = _scores(policy, clean, alarm)
    told: dict[str, dict[str, Told]] = {}
    for kind, trace in attacked.items():
        odd = _scores(policy, trace, alarm)
        told[kind] = {name: _told(usual[name], odd[name]) for name in usual}
    kinds = {"clean": clean, **attacked}
    return Resistance(
        exit_names=clean.exit_names,
        found={name: _behaviour(policy, trace) for name, trace in kinds.items()},
        told=told,
    )


def _told(usual_N: Tensor, odd_M: Tensor) -> Told:
    attacked = torch.arange(len(usual_N) + len(odd_M)) >= len(usual_N)
    bar = usual_N.sort().values[math.ceil((1 - FALSE_ALARMS) * len(usual_N)) - 1]
    auroc = error_auroc(torch.cat([usual_N, odd_M]), attacked)
    return Told(auroc=auroc, caught=float((odd_M > bar).double().mean()))


def _scores(policy: Policy, trace: Trace, alarm: Alarm | None) -> dict[str, Tensor]:
    return {"cost": simulate(policy, trace).cost_N, **suspicions(trace, policy, alarm)}


def _behaviour(policy: Policy, trace: Trace) -> Behaviour:
    found = evaluate(policy, trace)
    return Behaviour(
        accuracy_full=found.accuracy_full,
        accuracy=found.accuracy_early_exit,
        mean_cost=found.mean_cost,
        efficacy=efficacy(found.share_E, trace.cost_E),
        share_E=found.share_E,
    )


@dataclass(frozen=True, kw_only=True)
class Limited:
    """What a limit makes of rows: accuracy, mean and greatest cost of a row, share of rows it stopped; for a window,
    the greatest mean cost that its client's last rows ever had.
    """

    accuracy: float
    mean_cost: float
    greatest_cost: float
    capped: float
    greatest_window: float | None = None


def under_cap(engine: Answers, images_N: Tensor, labels_N: Tensor, max_cost: float, batch_size: int = 256) -> Limited:
    """What ``engine`` answers when no row may cost more than ``max_cost``. Raises ``ValueError`` for a cap below the
    first exit's cost.
    """
    parts = [
        engine(take(images_N, slice(i, i + batch_size)), max_cost=max_cost)
        for i in range(0, num_rows(images_N), batch_size)
    ]
    return _limited(parts, labels_N)


def under_window(window: CostWindow, images_N: Tensor, labels_N: Tensor) -> Limited:
    """What one client of ``window`` is answered that sends the rows in order, ``REQUEST`` at a time."""
    client, parts, greatest = object(), list[Answer](), 0.0
    for i in range(0, num_rows(images_N), REQUEST):
        parts.append(window(take(images_N, slice(i, i + REQUEST)), client=client))
        greatest = max(greatest, window.mean_cost(client))
    return _limited(parts, labels_N, greatest)


def _limited(parts: list[Answer], labels_N: Tensor, greatest_window: float | None = None) -> Limited:
    labels, cost, capped = (
        torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("labels_B", "cost_B", "capped_B")
    )
    return Limited(
        accuracy=float((labels == labels_N).double().mean()),
        mean_cost=float(cost.mean()),
        greatest_cost=float(cost.max()),
        capped=float(capped.double().mean()),
        greatest_window=greatest_window,
    )
