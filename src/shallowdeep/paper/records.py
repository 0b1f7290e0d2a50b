"""What is kept of a run: a reduced trace of its held-out and test rows, and the figures that can be made from it alone.

It refuses to know networks and data sets. The reduced trace keeps what confidence policies, overthinking and error
finding need: per exit its answer, how sure it is and its entropy; of the last exit also margin and energy.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowdeep.calibration import evaluate, tradeoff
from shallowdeep.disagreement import confusion, error_auroc, fit_confusion
from shallowdeep.effects import answers, overthinking, share
from shallowdeep.files import FormatError, read_tensors, write_tensors
from shallowdeep.policies import Confidence
from shallowdeep.types import Trace

FORMAT = 1
BUDGETS = (0.25, 0.5, 0.75)
GRID = (0.1, 0.15, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
"""The thresholds that the authors tried, each on the very rows they reported."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReducedTrace:
    """Answers of E exits about N rows, of which the first ``held_out`` may choose and the others are the test set.

    ``log_odds_EN`` is that of the greatest softmax p, log(p / (1 - p)); ``entropy_EN`` is in nats. ``margin_N``,
    ``energy_N`` (minus the log-sum-exp of the logits) and ``confusion_N`` belong to the full exit's answer.
    """

    said_EN: Tensor
    log_odds_EN: Tensor
    entropy_EN: Tensor
    margin_N: Tensor
    energy_N: Tensor
    confusion_N: Tensor
    labels_N: Tensor
    cost_E: tuple[float, ...]
    exit_names: tuple[str, ...]
    num_classes: int
    held_out: int

    def save(self, path: Path) -> None:
        """Write one safetensors file of 5 bytes per row and exit, and 8 per row."""
        tensors = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        about = {name: getattr(self, name) for name in ("cost_E", "exit_names", "num_classes", "held_out")}
        write_tensors(path, tensors, {"shallowdeep_study": json.dumps({"format": FORMAT, **about})})

    @classmethod
    def load(cls, path: Path) -> ReducedTrace:
        """Read what ``save`` wrote. Raises ``FormatError``."""
        tensors, metadata = read_tensors(path)
        try:
            about = json.loads(metadata["shallowdeep_study"])
            if about["format"] > FORMAT:
                raise FormatError(f"{path} was written by a newer version: upgrade.")
            return cls(
                **tensors,
                cost_E=tuple(about["cost_E"]),
                exit_names=tuple(about["exit_names"]),
                num_classes=about["num_classes"],
                held_out=about["held_out"],
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path} is not a reduced trace of the study ({error}).") from None

    def part(self, name: str) -> ReducedTrace:
        """The "held_out" or the "test" rows alone."""
        rows = slice(0, self.held_out) if name == "held_out" else slice(self.held_out, None)
        cut = {
            field.name: getattr(self, field.name)[..., rows]
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **cut, held_out=self.held_out if name == "held_out" else 0)

    def trace(self) -> Trace:
        """A trace whose exits give the same answers with the same confidence; what is left is spread evenly.

        Confidence policies and overthinking are those of the real trace; entropies, margins and distances are not.
        """
        sure_EN = self.log_odds_EN.double() + math.log(self.num_classes - 1)
        logits_ENC = torch.zeros(*self.said_EN.shape, self.num_classes, dtype=torch.float64)
        logits_ENC.scatter_(2, self.said_EN.long().unsqueeze(2), sure_EN.unsqueeze(2))
        return Trace(
            logits_ENC=logits_ENC,
            labels_N=self.labels_N.long(),
            cost_E=torch.tensor(self.cost_E, dtype=torch.float64),
            exit_names=self.exit_names,
        )


def reduce_traces(held_out: Trace | None, test: Trace) -> ReducedTrace:
    """The reduced trace of held-out rows (if any) and test rows.

    Confusion is standardised by the held-out rows, or raw without them.
    """
    reference = None if held_out is None else fit_confusion(None, held_out)
    parts = [trace for trace in (held_out, test) if trace is not None]
    columns = [_columns(trace) | {"confusion_N": confusion(trace, reference).half()} for trace in parts]
    whole: dict[str, Tensor] = {name: torch.cat([column[name] for column in columns], -1) for name in columns[0]}
    return ReducedTrace(
        **whole,
        cost_E=tuple(test.cost_E.tolist()),
        exit_names=test.exit_names,
        num_classes=test.num_classes,
        held_out=0 if held_out is None else held_out.num_samples,
    )


def _columns(trace: Trace) -> dict[str, Tensor]:
    log_odds, entropies = [], []
    for logits_NC in trace.logits_ENC:
        log_softmax_NC = logits_NC.double().log_softmax(1)
        top_N = log_softmax_NC.amax(1)
        rest_N = log_softmax_NC.scatter(1, log_softmax_NC.argmax(1, keepdim=True), -math.inf).logsumexp(1)
        log_odds.append((top_N - rest_N).half())  # the confidence itself would round to 1
        entropies.append(torch.special.entr(log_softmax_NC.exp()).sum(1).half())
    full_NC = trace.logits_ENC[trace.full_exit].double()
    two_N2 = full_NC.softmax(1).topk(2, 1).values
    return {
        "said_EN": answers(trace).to(torch.uint8),
        "log_odds_EN": torch.stack(log_odds),
        "entropy_EN": torch.stack(entropies),
        "margin_N": (two_N2[:, 0] - two_N2[:, 1]).half(),
        "energy_N": -full_NC.logsumexp(1).half(),
        "labels_N": trace.labels_N.to(torch.uint8),
    }


# ---------------------------------------------------------------- figures


def figures(reduced: ReducedTrace) -> dict[str, Any]:
    """The figures of a run under both protocols; the top level is the clean one, ``paper`` the authors'.

    Clean: thresholds chosen on the held-out rows, all figures of the test rows; without held-out rows every chosen
    figure is "not available". Paper: thresholds chosen among the authors' eleven on the test rows themselves.
    """
    test = reduced.part("test")
    trace = test.trace()
    same = _plain_figures(test, trace)
    if not reduced.held_out:
        clean: dict[str, Any] = dict.fromkeys(
            ("accuracy_at_cost", "cost_at_equal_accuracy", "test_drop_at_equal_accuracy", "best"), "not available"
        )
    else:
        clean = _chosen(reduced.part("held_out").trace(), trace)
    return {**same, **clean, "paper": {**same, **_chosen_by_grid(trace)}}


def _plain_figures(test: ReducedTrace, trace: Trace) -> dict[str, Any]:
    found = overthinking(trace)
    wrong_N = test.said_EN[-1] != test.labels_N
    return {
        "accuracy_exits": found.accuracy_E.tolist(),
        "cumulative_accuracy_exits": found.cumulative_accuracy_E.tolist(),
        "cost_exits": trace.cost_E.tolist(),
        "wasteful": found.wasteful,
        "destructive": found.destructive,
        "destructive_of_errors": found.destructive_of_errors,
        "destructive_corrected": found.destructive_corrected,
        "oracle_cost": found.oracle_cost,
        "confusion_auroc": error_auroc(test.confusion_N.double(), wrong_N),
        "msp_auroc": error_auroc(-test.log_odds_EN[-1].double(), wrong_N),
    }


def _chosen(selection: Trace, test: Trace) -> dict[str, Any]:
    """One threshold for all exits, chosen on ``selection`` for each budget, for equal and for best accuracy."""
    curves = tradeoff(selection).curves
    if not curves:  # a plain network has nothing to choose
        full = share(answers(test)[-1] == test.labels_N)
        nothing = {"accuracy_at_cost": dict.fromkeys(map(str, BUDGETS)), "cost_at_equal_accuracy": None}
        best = {"accuracy": full, "cost": float(test.cost_E[-1]), "drop": 0.0}
        return {**nothing, "test_drop_at_equal_accuracy": None, "best": best}
    curve = curves[0]
    assert curve.family == "one confidence threshold"
    full = share(answers(selection)[-1] == selection.labels_N)

    def at(point: int) -> dict[str, float]:
        policy = Confidence(threshold=tuple(curve.threshold_PE[point].tolist()))
        found = evaluate(policy, test)
        return {"accuracy": found.accuracy_early_exit, "cost": found.mean_cost, "drop": found.drop}

    within = {budget: (curve.cost_P <= budget).nonzero().flatten() for budget in BUDGETS}
    equal = (curve.accuracy_P >= full - 1e-12).nonzero().flatten()
    cheapest = at(int(equal[curve.cost_P[equal].argmin()])) if len(equal) else None
    return {
        "accuracy_at_cost": {
            f"{budget}": at(int(points[curve.accuracy_P[points].argmax()]))["accuracy"] if len(points) else None
            for budget, points in within.items()
        },
        "cost_at_equal_accuracy": cheapest["cost"] if cheapest else None,
        "test_drop_at_equal_accuracy": cheapest["drop"] if cheapest else None,
        "best": at(int(curve.accuracy_P.argmax())),
    }


def _chosen_by_grid(test: Trace) -> dict[str, Any]:
    """As the authors did: eleven thresholds, the most confident exit where none is sure, judged where chosen."""
    found = [evaluate(Confidence(threshold=q, fallback="most_confident"), test) for q in GRID]
    full = found[0].accuracy_full
    equal = [f for f in found if f.accuracy_early_exit >= full - 1e-12]
    best = max(found, key=lambda f: f.accuracy_early_exit)
    cheapest = min(equal, key=lambda f: f.mean_cost) if equal else None
    return {
        "accuracy_at_cost": {
            f"{budget}": max((f.accuracy_early_exit for f in found if f.mean_cost <= budget), default=None)
            for budget in BUDGETS
        },
        "cost_at_equal_accuracy": cheapest.mean_cost if cheapest else None,
        "test_drop_at_equal_accuracy": cheapest.drop if cheapest else None,
        "best": {"accuracy": best.accuracy_early_exit, "cost": best.mean_cost, "drop": best.drop},
    }
