"""What a trace says about overthinking: how often an exit before the end is right, and what the end makes of it.

It refuses to know policies and networks. Source: arXiv 1810.07052, section 4; every figure here is of whole samples,
so that the union over exits is taken and not one exit's share alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shallowdeep.policies import finite_rows
from shallowdeep.types import Trace, table
from shallowdeep.walking import CHUNK_ELEMENTS


@dataclass(frozen=True, kw_only=True)
class Overthinking:
    """How much a network overthinks; ``E`` are its exits up to and including the full exit. ``print`` gives a table.

    ``first_correct_N`` is the first right exit of each sample, -1 where none is. ``wasteful``: share of samples right
    at some exit before the end. ``destructive``: right before the end and wrong at the end, as a share of all samples;
    ``destructive_of_errors``: of the full exit's errors (0.0 when it makes none). ``destructive_corrected``: without
    the part that is luck (see ``overthinking``), as a share of all samples; below 0 when exits do worse than luck.

    Every sample has one of four fates: ``early_and_kept`` (right before the end and at the end), ``early_and_spoiled``
    (= destructive), ``only_at_the_end``, ``never``. They sum to 1; wasteful is the sum of the first two.

    ``oracle_cost`` is the mean cost of stopping at the first right exit, where samples that are never right pay for
    the full exit; ``wasted_cost`` is the share of the full exit's cost that this would save.
    """

    accuracy_E: Tensor
    cumulative_accuracy_E: Tensor
    first_correct_N: Tensor
    cost_E: Tensor
    exit_names: tuple[str, ...]
    wasteful: float
    destructive: float
    destructive_of_errors: float
    destructive_corrected: float
    oracle_cost: float
    wasted_cost: float
    early_and_kept: float
    early_and_spoiled: float
    only_at_the_end: float
    never: float

    def __str__(self) -> str:
        first_E = (self.first_correct_N == torch.arange(len(self.accuracy_E))[:, None]).double().mean(1)
        columns = (self.cost_E, self.accuracy_E, self.cumulative_accuracy_E, first_E)
        rows = [("exit", "cost", "accuracy", "cumulative", "first right")]
        rows += [
            (name, f"{cost:.3f}", f"{right:.2%}", f"{so_far:.2%}", f"{first:.2%}")
            for name, cost, right, so_far, first in zip(self.exit_names, *columns, strict=True)
        ]
        return (
            f"{table(list(rows))}\n"
            f"wasteful {self.wasteful:.2%} (early and kept {self.early_and_kept:.2%}, "
            f"early and spoiled {self.early_and_spoiled:.2%}); only at the end {self.only_at_the_end:.2%}, "
            f"never {self.never:.2%}\n"
            f"destructive {self.destructive:.2%} of samples, {self.destructive_of_errors:.2%} of errors; "
            f"without luck {self.destructive_corrected:.2%} of samples\n"
            f"an oracle would cost {self.oracle_cost:.3f}: {self.wasted_cost:.2%} of the cost is wasted"
        )


def overthinking(trace: Trace) -> Overthinking:
    """How much the network of ``trace`` overthinks, over the exits up to the full exit.

    ``destructive_corrected`` marks every error of the full exit like a multiple-choice question. Say the exits before
    the end propose m different labels beside the full exit's wrong one, of C - 1 possible. A hit (the truth is among
    them) scores 1, a miss -m / (C - 1 - m), and trying every label 0. Exits whose proposals know nothing score 0 on
    average, whatever they copy from each other; exits that know score 1. It assumes that a guess falls on all other
    labels alike, which makes it a lower bound of the luck: look-alike classes are guessed more easily. With two classes
    every other label is the right one, knowledge cannot be told from luck, and the corrected share is 0.

    Source: arXiv 1810.07052, section 4. Memory beyond the trace is a few bytes per sample and exit.
    >>> logits_ENC = torch.tensor([[[2.0, 0, 0], [2, 0, 0], [0, 0, 2]], [[2.0, 0, 0], [0, 2, 0], [0, 2, 0]]])
    >>> found = overthinking(
    ...     Trace(logits_ENC=logits_ENC, labels_N=torch.tensor([0, 0, 1]), cost_E=torch.tensor([0.5, 1.0]))
    ... )
    >>> found.first_correct_N.tolist(), round(found.destructive, 3), found.destructive_of_errors, found.oracle_cost
    ([0, 0, 1], 0.333, 1.0, 0.6666666666666666)
    """
    said_EN = answers(trace)[: trace.full_exit + 1]
    right_EN = said_EN == trace.labels_N
    ever_EN = right_EN.cummax(0).values
    end_N, ever_N = right_EN[-1], ever_EN[-1]
    early_N = ever_EN[-2] if len(ever_EN) > 1 else torch.zeros_like(end_N)
    first_N = torch.where(ever_N, right_EN.to(torch.uint8).argmax(0), -1)
    cost_E = trace.cost_E[: trace.full_exit + 1]
    oracle_cost = float(cost_E[first_N].mean())  # -1 is the full exit's cost, which a sample never right pays
    destructive, errors = share(early_N & ~end_N), share(~end_N)
    return Overthinking(
        accuracy_E=right_EN.double().mean(1),
        cumulative_accuracy_E=ever_EN.double().mean(1),
        first_correct_N=first_N,
        cost_E=cost_E,
        exit_names=trace.exit_names[: trace.full_exit + 1],
        wasteful=share(early_N),
        destructive=destructive,
        destructive_of_errors=destructive / errors if errors else 0.0,
        destructive_corrected=_without_luck(said_EN[:, ~end_N], early_N[~end_N], trace),
        oracle_cost=oracle_cost,
        wasted_cost=1 - oracle_cost / float(cost_E[-1]),
        early_and_kept=share(early_N & end_N),
        early_and_spoiled=destructive,
        only_at_the_end=share(end_N & ~early_N),
        never=share(~ever_N),
    )


def answers(trace: Trace) -> Tensor:
    """What every exit answers (labels [E, N]); -1, which no label equals, where its logits are not finite."""
    said_EN = torch.empty(trace.num_exits, trace.num_samples, dtype=torch.int64)
    rows = max(1, CHUNK_ELEMENTS // trace.num_classes)
    for said_N, logits_NC in zip(said_EN, trace.logits_ENC, strict=True):
        for start in range(0, trace.num_samples, rows):
            chunk_BC = logits_NC[start : start + rows]
            said_N[start : start + rows] = torch.where(finite_rows(chunk_BC), chunk_BC.argmax(1), -1)
    return said_EN


def share(chosen_N: Tensor) -> float:
    """The share of True."""
    return float(chosen_N.double().mean())


def _without_luck(said_EM: Tensor, hit_M: Tensor, trace: Trace) -> float:
    """Sum of the marks of the full exit's M errors over all samples; ``said_EM`` ends with the full exit's answers."""
    early_EM = said_EM[:-1].sort(0).values
    new_EM = torch.ones_like(early_EM, dtype=torch.bool)
    new_EM[1:] = early_EM[1:] != early_EM[:-1]
    tried_M = (new_EM & (early_EM != said_EM[-1]) & (early_EM >= 0)).sum(0).double()
    untried_M = trace.num_classes - (said_EM[-1] >= 0).double() - tried_M
    marks_M = torch.where(hit_M, 1.0, -tried_M / untried_M)
    return float(marks_M[untried_M > 0].sum()) / trace.num_samples
