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

from shallowdeep.calibration import evaluate
from shallowdeep.disagreement import confusion
from shallowdeep.finding import error_auroc
from shallowdeep.inputs import num_rows, take
from shallowdeep.limits import Answers, CostWindow
from shallowdeep.policies import Policy
from shallowdeep.types import Answer, Outcome, Trace, table
from shallowdeep.walking import simulate


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Resistance:
    """What attacks do to a policy: its behaviour on each kind of rows, and how well scores of the answers given tell
    each kind from clean rows (AUROC; half is luck). ``print`` gives tables.
    """

    exit_names: tuple[str, ...]
    found: Mapping[str, Behaviour]
    told: Mapping[str, Mapping[str, float]]

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
        lines = [("AUROC against clean rows", *kinds)]
        lines += [(score, *(f"{self.told[kind][score]:.3f}" for kind in kinds)) for score in scores]
        return f"{table(rows)}\n\n{table(lines)}"


def resistance(policy: Policy, clean: Trace, attacked: Mapping[str, Trace]) -> Resistance:
    """What ``policy`` does with ``clean`` rows and with every kind of ``attacked`` rows, traces of one SDN.

    >>> logits_ENC = torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]]])
    >>> clean = Trace(logits_ENC=logits_ENC, labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.0]))
    >>> slow = Trace(logits_ENC=logits_ENC / 9, labels_N=torch.tensor([0]), cost_E=torch.tensor([0.5, 1.0]))
    >>> from shallowdeep.policies import Confidence
    >>> resistance(Confidence(threshold=0.9), clean, {"slow": slow}).found["slow"].mean_cost
    1.0
    """
    usual = suspicion(policy, clean)
    told = {}
    for kind, trace in attacked.items():
        odd = suspicion(policy, trace)
        attacked_N = torch.arange(clean.num_samples + trace.num_samples) >= clean.num_samples
        told[kind] = {name: error_auroc(torch.cat([usual[name], odd[name]]), attacked_N) for name in usual}
    kinds = {"clean": clean, **attacked}
    return Resistance(
        exit_names=clean.exit_names,
        found={name: _behaviour(policy, trace) for name, trace in kinds.items()},
        told=told,
    )


def suspicion(policy: Policy, trace: Trace) -> dict[str, Tensor]:
    """Scores [N] of how odd each row of ``trace`` looks (higher: odder), from the exits its answer has paid for; and
    two that need every exit.
    """
    outcome = simulate(policy, trace)
    full_N = trace.logits_ENC[trace.full_exit].argmax(1)
    everywhere_N = torch.full_like(outcome.exit_N, trace.full_exit)
    asked = torch.ones(trace.num_exits, dtype=torch.bool)
    return {
        "cost": outcome.cost_N,
        "confusion": outcome.confusion_N,
        "max-softmax": -outcome.confidence_N,
        "mean log-odds": -mean_log_odds(trace, outcome, torch.tensor(policy.asks(trace.num_exits, trace.full_exit))),
        "confusion, all exits": confusion(trace),
        "mean log-odds, all exits": -_mean_log_odds(trace, full_N, everywhere_N, asked),
    }


def mean_log_odds(trace: Trace, outcome: Outcome, asked_E: Tensor) -> Tensor:
    """Log-odds of the label answered, averaged over the exits ``asked_E`` up to each row's stop (float64 [N])."""
    return _mean_log_odds(trace, outcome.labels_N, outcome.exit_N, asked_E)


def _mean_log_odds(trace: Trace, labels_N: Tensor, exit_N: Tensor, asked_E: Tensor) -> Tensor:
    total_N, count_N = torch.zeros_like(exit_N, dtype=torch.float64), torch.zeros_like(exit_N)
    for exit in asked_E.nonzero().flatten().tolist():
        logits_NC = trace.logits_ENC[exit].double()
        own_N = logits_NC.gather(1, labels_N[:, None])[:, 0]
        others_N = logits_NC.scatter(1, labels_N[:, None], -math.inf).logsumexp(1)
        passed_N = exit <= exit_N
        total_N += torch.where(passed_N, own_N - others_N, 0.0)
        count_N += passed_N
    return total_N / count_N


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


def under_window(window: CostWindow, images_N: Tensor, labels_N: Tensor, request: int = 10) -> Limited:
    """What one client of ``window`` is answered that sends the rows in order, ``request`` at a time."""
    client, parts, greatest = object(), list[Answer](), 0.0
    for i in range(0, num_rows(images_N), request):
        parts.append(window(take(images_N, slice(i, i + request)), client=client))
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
