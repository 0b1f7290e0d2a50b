"""The study's experiments, each a function of one reduced trace: what sections 4 and 5 measure, without a network.

It refuses to know how results are shown. Source: arXiv 1810.07052; what the authors' code does otherwise, and why not
here, is in docs/paper.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.calibration import tradeoff
from shallowdeep.effects import overthinking, share
from shallowdeep.finding import error_scores
from shallowdeep.paper.records import ReducedTrace, figures

BINS = 25


def overthinking_by_exit(reduced: ReducedTrace) -> dict[str, Any]:
    """Section 4 on the test rows, per exit and in all.

    Per exit: accuracy, cumulative accuracy, ``wasteful`` (right somewhere up to it and before the end: what every
    later step wastes) and ``destructive`` (right at this exit, wrong at the end), as shares of all rows; and the mean
    confidence there of rows that it gets right, and of those of them that the end gets wrong (None where none are).
    """
    test = reduced.part("test")
    found = overthinking(test.trace())
    right_EN = test.said_EN == test.labels_N
    spoiled_EN = right_EN & ~right_EN[-1]
    sure_EN = torch.sigmoid(test.log_odds_EN.double())
    return {
        "exit_names": list(reduced.exit_names),
        "cost": found.cost_E.tolist(),
        "accuracy": found.accuracy_E.tolist(),
        "cumulative_accuracy": found.cumulative_accuracy_E.tolist(),
        "wasteful": [*found.cumulative_accuracy_E.tolist()[:-1], found.wasteful],
        "destructive": spoiled_EN.double().mean(1).tolist(),
        "confidence_right": _means(sure_EN, right_EN),
        "confidence_spoiled": _means(sure_EN, spoiled_EN),
        "wasteful_in_all": found.wasteful,
        "destructive_in_all": found.destructive,
        "destructive_of_errors": found.destructive_of_errors,
        "destructive_corrected": found.destructive_corrected,
        "oracle_cost": found.oracle_cost,
    }


def _means(value_EN: Tensor, chosen_EN: Tensor) -> list[float | None]:
    """The mean of the chosen values of every exit; None where none is chosen."""
    pairs = zip(value_EN, chosen_EN, strict=True)
    return [float(value_N[chosen_N].mean()) if chosen_N.any() else None for value_N, chosen_N in pairs]


def galleries(reduced: ReducedTrace, limit: int | None = 25) -> dict[str, list[int]]:
    """Positions among the test rows: ``simple`` (right at every exit), ``complex`` (right at the end alone) and
    ``only_first`` (right at the first exit alone), the surest first.
    """
    test = reduced.part("test")
    right_EN = test.said_EN == test.labels_N
    first_N, last_N, count_N = right_EN[0], right_EN[-1], right_EN.sum(0)
    chosen = {
        "simple": (count_N == len(right_EN), test.log_odds_EN[0]),
        "complex": (last_N & (count_N == 1), test.log_odds_EN[-1]),
        "only_first": (first_N & (count_N == 1), test.log_odds_EN[0]),
    }
    return {
        name: sorted(which.nonzero().flatten().tolist(), key=lambda row: -float(surest[row]))[:limit]
        for name, (which, surest) in chosen.items()
    }


def disputed(reduced: ReducedTrace, limit: int | None = 25) -> list[int]:
    """Positions among the test rows about which the first exit and the last differ: those that the first alone gets
    right, then the others, of either kind those of which the first exit is surest.
    """
    test = reduced.part("test")
    alone = galleries(reduced, limit=None)["only_first"]
    rows = (test.said_EN[0] != test.said_EN[-1]).nonzero().flatten().tolist()
    others = sorted(set(rows) - set(alone), key=lambda row: -float(test.log_odds_EN[0, row]))
    return [*alone, *others][:limit]


def early_exits(reduced: ReducedTrace, cnn: ReducedTrace | None = None) -> dict[str, Any]:
    """Section 5.1 under both protocols, and the whole curve of one threshold on the test rows, for the figure."""
    found = figures(reduced, cnn)
    names = ("accuracy_at_cost", "cost_at_budget", "cost_at_equal_accuracy", "test_drop_at_equal_accuracy", "best")
    return {
        "accuracy_cnn": found["paper"]["accuracy_cnn"],
        "clean": {name: found[name] for name in names},
        "paper": {name: found["paper"][name] for name in names},
        "curve": accuracy_cost_curve(reduced),
    }


def accuracy_cost_curve(reduced: ReducedTrace, points: int = 200) -> dict[str, list[float]]:
    """Mean cost and accuracy of one threshold on the test rows, from nobody leaving early to everybody."""
    curves = tradeoff(reduced.part("test").trace()).curves
    if not curves:
        return {"cost": [], "accuracy": []}
    thin = torch.linspace(0, len(curves[0].cost_P) - 1, min(points, len(curves[0].cost_P))).long()
    return {"cost": curves[0].cost_P[thin].tolist(), "accuracy": curves[0].accuracy_P[thin].tolist()}


def error_alarms(reduced: ReducedTrace) -> dict[str, Any]:
    """Section 5.2 on the test rows: how confusion tells wrong answers of the full network, beside its usual rivals.

    ``scores``: AUROC, AUPR, FPR at 95 % TPR and AURC of confusion, max-softmax, entropy, margin and energy. The paper's
    shares: right answers more suspicious than the mean wrong one, and wrong ones less than the mean right one. Where
    values are shown and not ranks alone, max-softmax is 1 - max-softmax: suspicion, like confusion.
    """
    test = reduced.part("test")
    wrong_N = test.said_EN[-1] != test.labels_N
    suspicion: Mapping[str, Tensor] = {
        "confusion": test.confusion_N,
        "max-softmax": torch.sigmoid(-test.log_odds_EN[-1].double()),
        "entropy": test.entropy_EN[-1].double(),
        "margin": -test.margin_N.double(),
        "energy": test.energy_N.double(),
    }
    shown = {"confusion": suspicion["confusion"], "1 - max-softmax": suspicion["max-softmax"]}
    return {
        "errors": int(wrong_N.sum()),
        "rows": len(wrong_N),
        "scores": {name: dataclasses.asdict(error_scores(score_N, wrong_N)) for name, score_N in suspicion.items()},
        "shares": {name: _papers_shares(score_N, wrong_N) for name, score_N in shown.items()},
        "histogram": {name: _histogram(score_N, wrong_N) for name, score_N in shown.items()},
    }


def _papers_shares(score_N: Tensor, wrong_N: Tensor) -> dict[str, float]:
    right, wrong = score_N[~wrong_N], score_N[wrong_N]
    return {
        "mean_of_right": float(right.mean()),
        "mean_of_wrong": float(wrong.mean()),
        "right_above_mean_wrong": share(right > wrong.mean()),
        "wrong_below_mean_right": share(wrong < right.mean()),
    }


def _histogram(score_N: Tensor, wrong_N: Tensor) -> dict[str, list[float]]:
    """Shares of right and of wrong answers in 25 bins of equal width."""
    score, wrong = score_N.numpy(), wrong_N.numpy()
    edges = np.histogram_bin_edges(score, BINS)
    counts = {"right": np.histogram(score[~wrong], edges)[0], "wrong": np.histogram(score[wrong], edges)[0]}
    parts = {name: (count / max(count.sum(), 1)).tolist() for name, count in counts.items()}
    return {"edges": edges.tolist(), **parts}
