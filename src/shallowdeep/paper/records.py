"""What is kept of a run: a reduced trace of its held-out and test rows, and the figures that can be made from it alone.

It refuses to know networks and data sets. The reduced trace keeps what confidence policies, overthinking and error
finding need: per exit its answer, how sure it is and its entropy; of the last exit also margin and energy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowdeep.calibration import Curve, Evaluation, evaluate, tradeoff
from shallowdeep.disagreement import confusion, fit_confusion
from shallowdeep.effects import answers, overthinking, share
from shallowdeep.files import FormatError, read_json, read_tensors, write_tensors
from shallowdeep.finding import error_auroc
from shallowdeep.policies import Confidence
from shallowdeep.types import DataError, Trace
from shallowdeep.walking import standardised

NOT_AVAILABLE = "not available"
FORMAT = 1
ABOUT = ("cost_E", "exit_names", "num_classes", "held_out", "confusion_moments")
RUN = (
    *("dataset", "network", "regime", "recipe", "epochs", "epochs_before", "training_rows", "held_out_rows", "seed"),
    *("training", "data_fingerprint", "device", "precision", "versions", "seconds"),
)
FIGURES = (
    *("accuracy_cnn", "accuracy_exits", "cumulative_accuracy_exits", "cost_exits", "wasteful", "destructive"),
    *("destructive_of_errors", "destructive_corrected", "oracle_cost", "confusion_auroc", "msp_auroc"),
    *("accuracy_at_cost", "cost_at_budget", "cost_at_equal_accuracy", "test_drop_at_equal_accuracy", "best"),
)
VICTIM = (
    *("dataset", "network", "regime", "recipe", "poisoning_rate", "epochs", "seed", "training_rows", "held_out_rows"),
    *("training", "data_fingerprint", "device", "precision", "versions", "seconds"),
    *("accuracy_clean", "attack_success", "accuracy_triggered", "early_exits", "paper", "detection"),
)
BUDGETS = (0.25, 0.5, 0.75)
GRID = (0.1, 0.15, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
"""The thresholds that the authors tried, each on the very rows they reported."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReducedTrace:
    """Answers of E exits about N rows, of which the first ``held_out`` may choose and the others are the test set.

    ``log_odds_EN`` is that of the greatest softmax p, log(p / (1 - p)); ``entropy_EN`` is in nats. Of the full exit:
    ``margin_N`` is log((1 + m) / (1 - m)) of the margin m (m itself would round to 1), ``energy_N`` minus the
    log-sum-exp of the logits, and ``log_confusion_N`` the log of the raw confusion, whose mean and deviation over the
    held-out rows are ``confusion_moments`` (0 and 1 without such rows).
    """

    said_EN: Tensor
    log_odds_EN: Tensor
    entropy_EN: Tensor
    margin_N: Tensor
    energy_N: Tensor
    log_confusion_N: Tensor
    labels_N: Tensor
    cost_E: tuple[float, ...]
    exit_names: tuple[str, ...]
    num_classes: int
    held_out: int
    confusion_moments: tuple[float, float]

    @property
    def confusion_N(self) -> Tensor:
        """The standardised confusion of the full exit's answers, float64 [N]."""
        standard_N: Tensor = standardised(self.log_confusion_N.double().exp(), *self.confusion_moments)
        return standard_N

    def accuracy(self, part: str) -> float:
        """Share of the "held_out" or "test" rows about which the full exit is right."""
        rows = self.part(part)
        return share(rows.said_EN[-1] == rows.labels_N)

    def save(self, path: Path) -> None:
        """Write one safetensors file of 5 bytes per row and exit, and 7 per row."""
        tensors = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        about = {name: getattr(self, name) for name in ABOUT}
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
                confusion_moments=tuple(about["confusion_moments"]),
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
    """The reduced trace of held-out rows (if any) and test rows."""
    parts = [trace for trace in (held_out, test) if trace is not None]
    columns = [_columns(trace) for trace in parts]
    whole: dict[str, Tensor] = {name: torch.cat([column[name] for column in columns], -1) for name in columns[0]}
    moments = (0.0, 1.0)
    if held_out is not None:
        asked = torch.ones(held_out.num_exits, dtype=torch.bool)
        moments = fit_confusion(None, held_out).moments(held_out.full_exit, asked)
    return ReducedTrace(
        **whole,
        cost_E=tuple(test.cost_E.tolist()),
        exit_names=test.exit_names,
        num_classes=test.num_classes,
        held_out=0 if held_out is None else held_out.num_samples,
        confusion_moments=moments,
    )


def _columns(trace: Trace) -> dict[str, Tensor]:
    log_odds, entropies = [], []
    for logits_NC in trace.logits_ENC:
        log_softmax_NC = logits_NC.double().log_softmax(1)
        log_odds.append(_log_odds(log_softmax_NC).half())
        entropies.append(torch.special.entr(log_softmax_NC.exp()).sum(1).half())
    full_NC = trace.logits_ENC[trace.full_exit].double()
    first, second = full_NC.softmax(1).topk(2, 1).values.unbind(1)
    rest = torch.sigmoid(-_log_odds(full_NC.log_softmax(1)))  # 1 - p, exact where p rounds to 1
    raw = dataclasses.replace(trace, confusion_reference=None)
    return {
        "said_EN": answers(trace).to(torch.uint8),
        "log_odds_EN": torch.stack(log_odds),
        "entropy_EN": torch.stack(entropies),
        "margin_N": ((1 + first - second) / (rest + second)).log().half(),
        "energy_N": -full_NC.logsumexp(1).half(),
        "log_confusion_N": confusion(raw).log().half(),
        "labels_N": trace.labels_N.to(torch.uint8),
    }


def _log_odds(log_softmax_NC: Tensor) -> Tensor:
    top = log_softmax_NC.max(1)
    rest_N = log_softmax_NC.scatter(1, top.indices.unsqueeze(1), -math.inf).logsumexp(1)
    return top.values - rest_N


# ---------------------------------------------------------------- figures


def figures(reduced: ReducedTrace, cnn: ReducedTrace | None = None) -> dict[str, Any]:
    """The figures of a run under both protocols; the top level is the clean one, ``paper`` the authors'.

    ``cnn`` is the plain network of the same pair, to whose accuracy "equal accuracy" refers; default: the full exit of
    ``reduced`` (the plain network itself, and ICs on a frozen one). Clean: thresholds chosen on the held-out rows, all
    figures of the test rows; without held-out rows every figure is "not available". Paper: thresholds chosen among the
    authors' eleven on the test rows themselves.
    """
    cnn = cnn or reduced
    trace = reduced.part("test").trace()
    same = {"accuracy_cnn": cnn.accuracy("test"), **_unchosen(reduced.part("test"), trace)}
    paper = {**same, **_chosen_by_grid(trace, cnn)}
    if not reduced.held_out:
        return {**dict.fromkeys(paper, NOT_AVAILABLE), "paper": paper}
    return {**same, **_chosen(reduced.part("held_out").trace(), trace, cnn), "paper": paper}


def read_record(path: Path, *, with_figures: bool = True) -> dict[str, Any]:
    """The record of a run, or of a backdoor's victim, in a JSON file; whoever makes its figures again needs none.

    Raises ``FormatError`` that names the file and what it lacks.
    """
    found = read_json(path)
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    if record.get("regime") == "backdoor":
        missing = [name for name in VICTIM if name not in record]
    else:
        missing = [name for name in (*RUN, *(FIGURES if with_figures else ()), "paper") if name not in record]
        if with_figures and not missing:
            paper = record["paper"] if isinstance(record["paper"], dict) else {}
            missing = [f"paper.{name}" for name in FIGURES if name not in paper]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FormatError(f"{path} is not a whole record of the study: it has no {', '.join(missing[:5])}{more}.")
    return record


def fits(record: Mapping[str, Any], reduced: ReducedTrace) -> bool:
    """Whether ``reduced`` holds out as many rows and is as often right at every exit as ``record`` says."""
    test, paper = reduced.part("test"), record["paper"]
    right_E = (test.said_EN == test.labels_N).double().mean(1).tolist()
    said_E = paper.get("accuracy_exits") if isinstance(paper, dict) else None
    if not isinstance(said_E, list) or record["held_out_rows"] != reduced.held_out:
        return False
    return len(said_E) == len(right_E) and all(abs(a - b) < 1e-9 for a, b in zip(said_E, right_E, strict=True))


def trace_of(record: Mapping[str, Any], path: Path) -> ReducedTrace:
    """The reduced trace beside ``path``, the JSON of ``record``. Raises ``FormatError`` where it is of another run."""
    beside = path.with_suffix(".safetensors")
    reduced = ReducedTrace.load(beside)
    if not fits(record, reduced):
        raise FormatError(
            f"{beside} does not give the accuracies and held-out rows that {path.name} says: they are of two "
            f"trainings. Take both of one, or make the run again: sdn paper run."
        )
    return reduced


def find_run(results: Path, run: str) -> Path:
    """The stem ``results / run`` of a run's two files. Raises ``DataError`` that names the nearest runs there."""
    if not (results / f"{run}.safetensors").is_file():
        there = sorted(path.stem for path in results.glob("*.safetensors"))
        nearest = difflib.get_close_matches(run, there, n=8, cutoff=0)
        raise DataError(f"No run {run} in {results}. Runs there: {', '.join(nearest) or 'none'}.")
    return results / run


def run_with_exits(results: Path, run: str) -> tuple[dict[str, Any], ReducedTrace]:
    """Record and reduced trace of a run that has exits. Raises ``DataError`` that names those that have."""
    stem = find_run(results, run)
    about = read_record(Path(f"{stem}.json"))
    if about["regime"] == "cnn":
        others = [path.stem for path in sorted(results.glob("*.safetensors")) if "-cnn-" not in path.stem]
        raise DataError(f"{run} has no exits; take one of: {', '.join(others) or 'none yet'}.")
    return about, trace_of(about, Path(f"{stem}.json"))


def best_point(curve: Curve, budget: float = math.inf) -> int:
    """The cheapest of the most accurate points of ``curve`` among those that cost ``budget`` at most."""
    within = (curve.cost_P <= budget).nonzero().flatten()
    best = within[curve.accuracy_P[within] >= curve.accuracy_P[within].max() - 1e-12]
    return int(best[curve.cost_P[best].argmin()])


def _unchosen(test: ReducedTrace, trace: Trace) -> dict[str, Any]:
    """Figures that no threshold enters."""
    found = overthinking(trace)
    wrong_N = test.said_EN[-1] != test.labels_N
    alone = trace.num_exits == 1  # nobody to disagree with
    return {
        "accuracy_exits": found.accuracy_E.tolist(),
        "cumulative_accuracy_exits": found.cumulative_accuracy_E.tolist(),
        "cost_exits": trace.cost_E.tolist(),
        "wasteful": found.wasteful,
        "destructive": found.destructive,
        "destructive_of_errors": found.destructive_of_errors,
        "destructive_corrected": found.destructive_corrected,
        "oracle_cost": found.oracle_cost,
        "confusion_auroc": None if alone else error_auroc(test.confusion_N, wrong_N),
        "msp_auroc": error_auroc(-test.log_odds_EN[-1].double(), wrong_N),
    }


def _chosen(selection: Trace, test: Trace, cnn: ReducedTrace) -> dict[str, Any]:
    """One threshold for all exits, chosen on ``selection`` for each budget, for equal and for best accuracy."""
    curves = tradeoff(selection).curves
    if not curves:
        return _nothing_to_choose()
    curve = curves[0]
    assert curve.family == "one confidence threshold"

    def at(point: int) -> dict[str, float]:
        found = evaluate(Confidence(threshold=tuple(curve.threshold_PE[point].tolist())), test)
        return _at(found, cnn.accuracy("test"))

    affordable = [budget for budget in BUDGETS if float(curve.cost_P.min()) <= budget]
    equal = (curve.accuracy_P >= cnn.accuracy("held_out") - 1e-12).nonzero().flatten()
    return _choices(
        {budget: at(best_point(curve, budget)) for budget in affordable},
        at(int(equal[curve.cost_P[equal].argmin()])) if len(equal) else None,
        at(best_point(curve)),
    )


def _chosen_by_grid(test: Trace, cnn: ReducedTrace) -> dict[str, Any]:
    """As the authors did: eleven thresholds, the most confident exit where none is sure, judged where chosen."""
    if test.num_exits == 1:
        return _nothing_to_choose()
    full = cnn.accuracy("test")
    found = [_at(evaluate(Confidence(threshold=q, fallback="most_confident"), test), full) for q in GRID]
    within = {budget: [one for one in found if one["cost"] <= budget] for budget in BUDGETS}
    equal = [one for one in found if one["accuracy"] >= full - 1e-12]
    return _choices(
        {budget: max(ones, key=_accuracy) for budget, ones in within.items() if ones},
        min(equal, key=lambda one: one["cost"]) if equal else None,
        max(found, key=_accuracy),
    )


def _at(found: Evaluation, accuracy_cnn: float) -> dict[str, float]:
    """What one policy does on the test rows; ``drop`` is from the plain network's accuracy."""
    accuracy = found.accuracy_early_exit
    return {"accuracy": accuracy, "cost": found.mean_cost, "drop": accuracy_cnn - accuracy}


def _accuracy(one: dict[str, float]) -> float:
    return one["accuracy"]


def _choices(
    within: dict[float, dict[str, float]], equal: dict[str, float] | None, best: dict[str, float] | None
) -> dict[str, Any]:
    return {
        "accuracy_at_cost": {f"{b}": within[b]["accuracy"] if b in within else None for b in BUDGETS},
        "cost_at_budget": {f"{b}": within[b]["cost"] if b in within else None for b in BUDGETS},
        "cost_at_equal_accuracy": equal["cost"] if equal else None,
        "test_drop_at_equal_accuracy": equal["drop"] if equal else None,
        "best": best,
    }


def _nothing_to_choose() -> dict[str, Any]:
    """A plain network has no exits to choose."""
    return _choices({}, None, None)
