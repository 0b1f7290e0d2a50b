"""The backbone in pieces, in plain PyTorch: snapshots of the exported graph between the exits that are run.

It refuses to know policies. A piece takes the crossing tensor, its side inputs and the rows' own inputs, and returns
the next ones.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from shallowdeep.cuts import find_cuts
from shallowdeep.inputs import Inputs
from shallowdeep.types import CutError, Plan


@dataclass(frozen=True, eq=False)
class Segment:
    """One piece; ``carried_rows`` says of each tensor that leaves it whether its first axis is the batch."""

    run: fx.GraphModule
    carried_rows: tuple[bool, ...]


def cut_segments(model: nn.Module, plan: Plan, stops: Sequence[int], example: Inputs) -> list[Segment]:
    """``model`` for inputs like ``example`` in ``len(stops) + 1`` pieces: up to each cut of ``stops``, then to the end.

    Weights are copied. Raises ``CutError`` when the exported graph no longer has the plan's cut points.
    """
    found = find_cuts(model, example)
    if found.graph is None:
        raise CutError(f"{plan.model} cannot be exported for these inputs: {found.reason}.")
    by_name = {point.name: crossing for point, crossing in zip(found.points, found.crossings, strict=True)}
    missing = [plan.cuts[stop].name for stop in stops if plan.cuts[stop].name not in by_name]
    if missing:
        raise CutError(f"For inputs of this shape {plan.model} has no cut point {missing[0]!r}; plan for this shape.")
    chain = [None, *(by_name[plan.cuts[stop].name] for stop in stops), None]
    segments = []
    for start, end in itertools.pairwise(chain):
        with torch.no_grad():
            piece = copy.deepcopy(found.graph.piece(start, end)).requires_grad_(False)
        carried = (
            []
            if end is None
            else [rows for side, rows in zip(end.sides, end.side_rows, strict=True) if side not in found.graph.leaves]
        )
        segments.append(Segment(piece, (True, *carried)))
    return segments


def keep_rows(tensors: Sequence[Tensor], have_rows: Sequence[bool], keep: Tensor) -> tuple[Tensor, ...]:
    """The rows ``keep`` of every tensor that has rows; the others as they are."""
    return tuple(tensor[keep] if rows else tensor for tensor, rows in zip(tensors, have_rows, strict=True))
