"""How far the exits' confidences can be believed, and the temperatures that make them more believable.

It refuses to know policies: a trace comes in, figures per exit or a trace of tempered logits come out. Dividing logits
by a temperature changes no answer. Source: On Calibration of Modern Neural Networks, arXiv 1706.04599.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from shallowdeep.policies import finite_rows
from shallowdeep.progress import steps
from shallowdeep.types import Trace, table
from shallowdeep.walking import CHUNK_ELEMENTS

BINS = 15
"""Bins of equal width between confidence 0 and 1: the field's usual number (arXiv 1706.04599, section 2)."""
FOLDS = 5
COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures lie between; an exit that knows nothing would take an infinite one."""


def fit_temperatures(trace: Trace) -> Tensor:
    """The temperature of every exit (float64 [E]) whose division of the logits makes the labels likeliest.

    The negative log-likelihood is convex in 1 / temperature, so its slope has one root, found by Brent's method. Half a
    wrong row of average margin is added: an exit that was never wrong gets the confidence that so many right rows
    deserve, not an infinite one. Rows whose logits at an exit are not finite are left out there; an exit without any,
    or one that always hesitates between all classes, keeps 1. Take rows that the ICs did not train on.
    Source: arXiv 1706.04599, section 4.2.
    >>> logits_ENC = torch.tensor([[8.0, 0.0]]).expand(1, 100, 2)
    >>> sure_of_9_in_10 = Trace(logits_ENC=logits_ENC, labels_N=(torch.arange(100) < 10).long(), cost_E=torch.ones(1))
    >>> round(float(fit_temperatures(sure_of_9_in_10)[0]), 1)
    3.7
    """
    return torch.tensor([_temperature(trace, exit) for exit in range(trace.num_exits)], dtype=torch.float64)


def _temperature(trace: Trace, exit: int) -> float:
    rows, margin = 0, 0.0
    for logits_BC, _ in _finite_chunks(trace, exit):
        top_B2 = logits_BC.topk(2).values
        rows, margin = rows + len(logits_BC), margin + float((top_B2[:, 0] - top_B2[:, 1]).sum())
    if not margin:
        return 1.0
    margin /= rows

    def slope(log_sharpness: float) -> float:
        """Of the negative log-likelihood by 1 / temperature: it never falls."""
        sharpness = math.exp(log_sharpness)
        total = 0.5 * margin / (1 + math.exp(-min(sharpness * margin, 700)))
        for logits_BC, labels_B in _finite_chunks(trace, exit):
            expected_B = (torch.softmax(sharpness * logits_BC, 1) * logits_BC).sum(1)
            total += float((expected_B - logits_BC.gather(1, labels_B[:, None])[:, 0]).sum())
        return total

    least, most = -math.log(HOTTEST), -math.log(COLDEST)
    if slope(least) >= 0:
        return HOTTEST
    if slope(most) <= 0:
        return COLDEST
    return math.exp(-float(brentq(slope, least, most, xtol=1e-9)))


def scaled(trace: Trace, temperature_E: Tensor | Sequence[float]) -> Trace:
    """The same trace with every exit's logits divided by its temperature, in float64: same answers, other confidences.

    ``policies.Tempered`` decides on the same numbers, bit for bit. ``info["temperature_E"]`` says so; a confusion
    reference, which speaks of the softmaxes before, is left behind. Raises ``ValueError`` unless there is one finite
    temperature above 0 per exit.
    >>> trace = Trace(logits_ENC=torch.ones(1, 1, 2), labels_N=torch.tensor([0]), cost_E=torch.ones(1))
    >>> scaled(trace, [2.0]).logits_ENC.tolist()
    [[[0.5, 0.5]]]
    """
    divisor_E = torch.as_tensor(temperature_E, dtype=torch.float64)
    if divisor_E.shape != (trace.num_exits,) or not bool(((divisor_E > 0) & (divisor_E < math.inf)).all()):
        raise ValueError(f"{trace.num_exits} exits need as many temperatures above 0, found {divisor_E.tolist()}.")
    return dataclasses.replace(
        trace,
        logits_ENC=trace.logits_ENC.double() / divisor_E[:, None, None],
        confusion_reference=None,
        info={**trace.info, "temperature_E": " ".join(f"{value:.6g}" for value in divisor_E.tolist())},
    )


def crossfit_scaled(trace: Trace) -> Trace:
    """The same trace with every row's logits divided by temperatures that were fitted without it, in five folds.

    What fresh rows would look like after ``fit_temperatures``. Raises ``ValueError`` for fewer rows than folds.
    >>> trace = Trace(logits_ENC=torch.eye(2).repeat(1, 5, 1), labels_N=torch.arange(10) % 2, cost_E=torch.ones(1))
    >>> bool((crossfit_scaled(trace).logits_ENC[:, 0, 0] > 1).all())
    True
    """
    rows = trace.num_samples
    if rows < FOLDS:
        raise ValueError(f"Temperatures are cross-fitted in {FOLDS} folds, which takes {FOLDS} rows; here are {rows}.")
    fold_N = torch.randperm(rows, generator=torch.Generator().manual_seed(0)) % FOLDS
    logits_ENC = torch.empty_like(trace.logits_ENC, dtype=torch.float64)
    for fold in steps(range(FOLDS), "fit temperatures", FOLDS):
        held_N = fold_N == fold
        temperature_E = fit_temperatures(trace.rows(~held_N))
        logits_ENC[:, held_N] = scaled(trace.rows(held_N), temperature_E).logits_ENC
    info = {**trace.info, "temperature_E": "cross-fitted"}
    return dataclasses.replace(trace, logits_ENC=logits_ENC, confusion_reference=None, info=info)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reliability:
    """How confidences meet the truth at every exit, over its finite rows (``rows_E``); K = 15 bins of equal width.

    Bin k holds confidences (max-softmax) in (k/15, (k+1)/15]: ``count_EK`` rows, their mean ``confidence_EK`` and the
    share that is right ``accuracy_EK`` (both nan in empty bins). ``ece_E`` is the mean distance of the two, weighted by
    rows; ``chance_ece_E`` what it would be on average, by chance alone, at an exit whose confidences are true.
    ``brier_E`` is the squared distance of the softmax from the truth, summed over classes (0 to 2), ``nll_E`` the
    negative log-likelihood in nats. An exit without finite rows has nan.
    """

    exit_names: tuple[str, ...]
    rows_E: Tensor
    mean_accuracy_E: Tensor
    mean_confidence_E: Tensor
    ece_E: Tensor
    chance_ece_E: Tensor
    brier_E: Tensor
    nll_E: Tensor
    count_EK: Tensor
    confidence_EK: Tensor
    accuracy_EK: Tensor

    def __str__(self) -> str:
        head = ("exit", "rows", "accuracy", "confidence", "ECE", "by chance", "Brier", "NLL")
        columns = (self.rows_E, self.mean_accuracy_E, self.mean_confidence_E, self.ece_E, self.chance_ece_E)
        rows: list[tuple[str, ...]] = [head]
        for name, count, *shares, brier, nll in zip(
            self.exit_names, *(column.tolist() for column in (*columns, self.brier_E, self.nll_E)), strict=True
        ):
            rows.append((name, f"{count}", *(f"{part:.2%}" for part in shares), f"{brier:.4f}", f"{nll:.4f}"))
        return table(rows)


def reliability_of(trace: Trace) -> Reliability:
    """ECE, Brier score, negative log-likelihood and reliability curve of every exit of ``trace``.

    Sources: ECE and curve, arXiv 1706.04599, section 2; Brier, Monthly Weather Review 78 (1950), over all classes.
    >>> logits_ENC = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]).log1p()  # three times as likely as the other class
    >>> trace = Trace(logits_ENC=logits_ENC, labels_N=torch.tensor([0, 0]), cost_E=torch.ones(1))
    >>> found = reliability_of(trace)
    >>> round(float(found.ece_E[0]), 6), found.count_EK[0, 11].item()
    (0.25, 2)
    """
    exits = [_of_exit(trace, exit) for exit in range(trace.num_exits)]
    return Reliability(
        exit_names=trace.exit_names,
        **{name: torch.stack([found[name] for found in exits]) for name in exits[0]},
    )


def _of_exit(trace: Trace, exit: int) -> dict[str, Tensor]:
    """The fields of ``Reliability`` for one exit."""
    sums_3K, count_K = torch.zeros(3, BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.int64)
    brier = nll = torch.zeros((), dtype=torch.float64)
    for logits_BC, labels_B in _finite_chunks(trace, exit):
        log_BC = torch.log_softmax(logits_BC, 1)
        p_BC = log_BC.exp()
        confidence_B, said_B = p_BC.max(1)
        nll = nll - log_BC.gather(1, labels_B[:, None]).sum()
        brier = brier + (p_BC - torch.nn.functional.one_hot(labels_B, p_BC.shape[1])).square().sum()
        bin_B = (confidence_B * BINS).ceil().long().clamp(1, BINS) - 1
        right_B = (said_B == labels_B).double()
        sums_3K.index_add_(1, bin_B, torch.stack([confidence_B, right_B, confidence_B * (1 - confidence_B)]))
        count_K += bin_B.bincount(minlength=BINS)
    confidence_K, right_K, variance_K = sums_3K
    rows = count_K.sum()
    return {
        "rows_E": rows,
        "mean_accuracy_E": right_K.sum() / rows,
        "mean_confidence_E": confidence_K.sum() / rows,
        "ece_E": (right_K - confidence_K).abs().sum() / rows,
        "chance_ece_E": (variance_K * 2 / math.pi).sqrt().sum() / rows,  # mean of |normal|
        "brier_E": brier / rows,
        "nll_E": nll / rows,
        "count_EK": count_K,
        "confidence_EK": confidence_K / count_K,
        "accuracy_EK": right_K / count_K,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Tempering:
    """What temperatures bring: ``temperature_E`` fitted on all rows, ``before``, and ``after`` on rows that did not fit
    theirs.
    """

    temperature_E: Tensor
    before: Reliability
    after: Reliability

    def __str__(self) -> str:
        head = ("exit", "temperature", "ECE", "after", "by chance", "Brier", "after", "NLL", "after")
        rows: list[tuple[str, ...]] = [head]
        for exit, name in enumerate(self.before.exit_names):
            shares = self.before.ece_E[exit], self.after.ece_E[exit], self.after.chance_ece_E[exit]
            numbers = (
                self.before.brier_E[exit],
                self.after.brier_E[exit],
                self.before.nll_E[exit],
                self.after.nll_E[exit],
            )
            cells = (*(f"{value:.2%}" for value in shares), *(f"{value:.4f}" for value in numbers))
            rows.append((name, f"{self.temperature_E[exit]:.3f}", *cells))
        return f"{table(rows)}\nafter: every row by temperatures fitted without it; ECE in {BINS} equal widths"


def temper(trace: Trace) -> Tempering:
    """Temperatures from ``trace``, and the reliability of its exits before and after, cross-fitted.

    >>> logits_ENC = torch.tensor([[8.0, 0.0]]).expand(1, 500, 2)
    >>> found = temper(Trace(logits_ENC=logits_ENC, labels_N=(torch.arange(500) < 50).long(), cost_E=torch.ones(1)))
    >>> bool(found.after.ece_E[0] < 0.02 < found.before.ece_E[0])
    True
    """
    return Tempering(
        temperature_E=fit_temperatures(trace),
        before=reliability_of(trace),
        after=reliability_of(crossfit_scaled(trace)),
    )


def _finite_chunks(trace: Trace, exit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """float64 logits [B, C] and labels of the finite rows at ``exit``, a bounded number at a time."""
    size = max(1, CHUNK_ELEMENTS // trace.num_classes)
    for start in range(0, trace.num_samples, size):
        logits_BC = trace.logits_ENC[exit, start : start + size].detach()
        kept_B = finite_rows(logits_BC)
        yield logits_BC[kept_B].double(), trace.labels_N[start : start + size][kept_B]
