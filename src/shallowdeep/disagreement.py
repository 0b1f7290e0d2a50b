"""How far the exits disagree with the full network, and how well that tells its errors apart.

It refuses to know where anybody stops: it speaks of the full exit's answers, for which every exit has been asked.
Source: arXiv 1810.07052, section 5.2, without the constant that the authors' code adds to every coordinate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shallowdeep.effects import answers
from shallowdeep.finding import error_auroc
from shallowdeep.types import ConfusionReference, Trace, table
from shallowdeep.walking import CHUNK_ELEMENTS, l1, standardised


class KeepsReference(Protocol):
    """An SDN, as far as this room knows it."""

    def set_confusion_reference(self, reference: ConfusionReference) -> None:
        """Keep the moments with the ICs."""


def confusion(trace: Trace, reference: ConfusionReference | None = None) -> Tensor:
    """How far the exits disagree with the full exit's answer (float64 [N]): the sum over exits of the L1 distance.

    Each distance, of an exit's softmax to the full exit's, lies in 0..2; it is 2 where a softmax is not a number. With
    ``reference``, or else the trace's own, the sum is standardised by the reference's mean and deviation, otherwise it
    is raw. A trace with one exit has nobody to disagree: 0. Source: arXiv 1810.07052, section 5.2.
    >>> logits_ENC = torch.tensor([[[0.0, 0.0]], [[0.0, 1000.0]]])
    >>> confusion(Trace(logits_ENC=logits_ENC, labels_N=torch.tensor([1]), cost_E=torch.tensor([0.5, 1.0])))
    tensor([1.], dtype=torch.float64)
    """
    reference = reference or trace.confusion_reference
    full = trace.full_exit
    parts = [l1(softmax_EBC[: full + 1], softmax_EBC[full]).sum(0) for softmax_EBC in _softmaxes(trace)]
    score_N = torch.cat(parts)
    if reference is not None:
        score_N = standardised(score_N, *reference.moments(full, torch.ones(trace.num_exits, dtype=torch.bool)))
    return score_N


def fit_confusion(sdn: KeepsReference | None, trace: Trace) -> ConfusionReference:
    """Means and covariances of the distances between exits over the rows of ``trace``, kept in ``sdn`` if there is one.

    They standardise the confusion of an answer at any exit, whichever exits were asked. The paper takes the clean
    training rows; rows that the ICs did not train on tell better what new rows will look like.
    >>> trace = Trace(logits_ENC=torch.zeros(2, 3, 2), labels_N=torch.tensor([0, 1, 0]), cost_E=torch.ones(2))
    >>> fit_confusion(None, trace).mean_EE.tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    exits, samples = trace.num_exits, trace.num_samples
    shift_EE1 = torch.zeros(exits, exits, 1)
    total_EE, product_EEE = torch.zeros(exits, exits).double(), torch.zeros(exits, exits, exits).double()
    for chunk, softmax_EBC in enumerate(_softmaxes(trace)):
        distance_EEB = torch.stack([l1(softmax_EBC, answer_BC) for answer_BC in softmax_EBC])
        if chunk == 0:
            shift_EE1 = distance_EEB[:, :, :1]  # distances that never vary then have no variance, to the last bit
        shifted_EEB = distance_EEB - shift_EE1
        total_EE += shifted_EEB.sum(2)
        product_EEE += shifted_EEB @ shifted_EEB.mT
    mean_EE = total_EE / samples
    covariance_EEE = product_EEE / samples - mean_EE[:, :, None] * mean_EE[:, None, :]
    reference = ConfusionReference(mean_EE=mean_EE + shift_EE1[:, :, 0], covariance_EEE=covariance_EEE)
    if sdn is not None:
        sdn.set_confusion_reference(reference)
    return reference


@dataclass(frozen=True, kw_only=True)
class ErrorFinding:
    """How well two scores find the errors of the full exit: AUROC of confusion and of max-softmax (1 - confidence)."""

    errors: int
    samples: int
    confusion_auroc: float
    msp_auroc: float

    def __str__(self) -> str:
        rows = [("finds errors", "AUROC"), ("confusion", f"{self.confusion_auroc:.4f}")]
        rows.append(("max-softmax", f"{self.msp_auroc:.4f}"))
        return f"{table(list(rows))}\n{self.errors} errors in {self.samples} samples"


def error_finding(trace: Trace) -> ErrorFinding:
    """How well the confusion and the max-softmax of the full exit find its errors in ``trace``.

    The reference of the trace, if any, cannot change an AUROC: standardising keeps the order.
    >>> trace = Trace(logits_ENC=torch.eye(2).expand(3, 2, 2), labels_N=torch.tensor([0, 0]), cost_E=torch.ones(3))
    >>> error_finding(trace).errors
    1
    """
    wrong_N = answers(trace)[trace.full_exit] != trace.labels_N
    confidence_N = torch.cat([softmax_EBC[trace.full_exit].amax(1) for softmax_EBC in _softmaxes(trace)])
    return ErrorFinding(
        errors=int(wrong_N.sum()),
        samples=trace.num_samples,
        confusion_auroc=error_auroc(confusion(trace), wrong_N),
        msp_auroc=error_auroc(-confidence_N.nan_to_num(nan=0.0), wrong_N),
    )


def _softmaxes(trace: Trace) -> Iterator[Tensor]:
    """float64 softmaxes [E, B, C], a bounded number of rows at a time."""
    rows = max(1, CHUNK_ELEMENTS // (trace.num_exits * trace.num_classes))
    for start in range(0, trace.num_samples, rows):
        yield torch.softmax(trace.logits_ENC[:, start : start + rows].detach(), 2, dtype=torch.float64)
