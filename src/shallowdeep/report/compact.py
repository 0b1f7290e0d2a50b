"""What the page's script needs of single rows, packed: so that a browser can walk every row along the exits itself.

It refuses to know pages. Log-odds of confidence become 16-bit steps of 0.0004, answers 16-bit labels; a trace of 10,000
rows and ten exits takes half a megabyte. Of more rows an even selection is packed, and the page says so.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.data import spread
from shallowdeep.report.facts import Facts
from shallowdeep.walking import policy_costs

LIMIT_BYTES = 1_600_000
"""Of all traces on a page, before base64."""
LOW, HIGH, TOP = -10.0, 15.0, 65533
"""Log-odds from LOW to HIGH are the steps 1 to TOP + 1; step 0 is an exit without a finite answer."""
NOBODY = 65535
"""The label of an answer that is not finite."""


def steps_of(odds: Tensor) -> Tensor:
    """Log-odds as steps (int64); 0 where NaN.

    >>> steps_of(torch.tensor([-20.0, -10.0, 15.0, float("nan")])).tolist()
    [1, 1, 65534, 0]
    """
    step = 1 + ((odds.clamp(LOW, HIGH) - LOW) / (HIGH - LOW) * TOP).round()
    return step.nan_to_num(nan=0.0).long()


def threshold_of(step: int) -> float:
    """The confidence midway between ``step`` and the one below: what a row of that step just reaches."""
    return float(torch.sigmoid(torch.tensor((step - 1.5) / TOP * (HIGH - LOW) + LOW, dtype=torch.float64)))


def kept_rows(facts: Facts, traces: int) -> Tensor:
    """Positions of the rows that are packed: all, or as many as fit, spread evenly."""
    fit = LIMIT_BYTES // (4 * facts.trace.num_exits * traces)
    return spread(facts.trace.num_samples, fit)


def packed(facts: Facts, kept: Tensor) -> dict[str, Any]:
    """The rows ``kept`` for the script: answers and steps per exit, truth, and what the chosen policy does."""
    trace, outcome = facts.trace, facts.outcome
    asked = facts.policy.asks(trace.num_exits, trace.full_exit)
    said, ensemble = facts.said_EN[:, kept], facts.policy.ensemble
    sure = outcome.confidence_N[kept].nan_to_num(nan=0.0)
    return {
        "rows": len(kept),
        "samples": trace.num_samples,
        "together": [bool(ensemble and ensemble.weight_EE[e]) for e in range(trace.num_exits)],
        "standardised": facts.standardised,
        "exits": trace.num_exits,
        "full": trace.full_exit,
        "labels": facts.labels,
        "costs": policy_costs(trace).tolist(),
        "chosenCosts": policy_costs(trace, asked).tolist(),
        "said": _sixteen(torch.where(said < 0, NOBODY, said)),
        "step": _sixteen(steps_of(facts.odds_EN[:, kept])),
        "truth": _sixteen(trace.labels_N[kept]),
        "chosenExit": _sixteen(outcome.exit_N[kept]),
        "chosenRight": _sixteen(facts.answered_right_N[kept].long()),
        "chosenSaid": _sixteen(outcome.labels_N[kept]),
        "chosenStep": _sixteen(steps_of(torch.logit(sure.double(), eps=1e-12))),
        "confusion": [round(value, 4) for value in _finite(facts.confusion_N[kept])],
        "lowest": steps_of(torch.tensor(-np.log(max(trace.num_classes - 1, 1)), dtype=torch.float64)).item(),
    }


def top_three(facts: Facts, rows_G: Tensor) -> tuple[str, str]:
    """Of the rows ``rows_G``: labels [G, E, 3] and probabilities in 65535ths, best first, packed."""
    logits_EGC = facts.trace.logits_ENC[:, rows_G]
    softmax_EGC = torch.softmax(logits_EGC, 2, dtype=torch.float64).nan_to_num(nan=0.0)
    best = softmax_EGC.topk(min(3, facts.trace.num_classes), dim=2)
    labels, shares = (torch.nn.functional.pad(part, (0, 3 - part.shape[2])) for part in (best.indices, best.values))
    return _sixteen(labels.transpose(0, 1)), _sixteen((shares * 65535).round().long().transpose(0, 1))


def eights(values: Tensor) -> str:
    """Bytes 0..255 as base64."""
    return base64.b64encode(values.to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _sixteen(values: Tensor) -> str:
    """Whole numbers 0..65535 as base64, little-endian."""
    return base64.b64encode(values.contiguous().numpy().astype("<u2").tobytes()).decode()


def _finite(values_N: Tensor) -> Sequence[float]:
    found: list[float] = values_N.nan_to_num(nan=0.0).tolist()
    return found
