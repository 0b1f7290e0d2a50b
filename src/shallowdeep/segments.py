"""The backbone in pieces, in plain PyTorch: snapshots of the exported graph between the exits that are run.

It refuses to know internal classifiers and policies. A piece takes the crossing tensor, its side inputs and the rows'
own inputs, and returns the next ones.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from shallowdeep.cuts import find_cuts
from shallowdeep.graph import operator_name
from shallowdeep.inputs import Inputs
from shallowdeep.types import CutError, Plan


@dataclass(frozen=True, eq=False)
class Segment:
    """One piece: which of the rows' own inputs it reads, and the tensors that leave it beside the crossing one, each
    with whether its first axis is the batch.
    """

    run: fx.GraphModule
    reads: tuple[bool, ...]
    sides: dict[str, bool]


def cut_segments(model: nn.Module, plan: Plan, stops: Sequence[int], example: Inputs) -> list[Segment]:
    """``model`` for inputs like ``example`` in ``len(stops) + 1`` pieces: up to each cut of ``stops``, then to the end.

    Weights are copied, with batch normalisation folded into the convolution before it. Raises ``CutError`` when the
    exported graph no longer has the plan's cut points.
    """
    _keep_freed_memory()
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
            _fold_batch_norms(piece)
        inputs = [node for node in piece.graph.nodes if node.op == "placeholder"][-len(found.graph.leaves) :]
        sides = {} if end is None else dict(zip(end.sides, end.side_rows, strict=True))
        carried = {side.name: rows for side, rows in sides.items() if side not in found.graph.leaves}
        segments.append(Segment(piece, tuple(bool(node.users) for node in inputs), carried))
    return segments


def _keep_freed_memory() -> None:
    """Have the C library keep freed blocks of up to 32 MiB: fetched afresh for every map they cost a quarter of a pass.

    glibc raises both of its thresholds, for blocks of their own and for giving back, to the largest block ever freed.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def _fold_batch_norms(piece: fx.GraphModule) -> None:
    """Scale the weights of every convolution whose only reader is a batch normalisation, which then goes.

    The answers stay the same but for rounding; in plain PyTorch a small network takes half of the time.
    """
    for norm in list(piece.graph.nodes):
        conv = norm.args[0] if operator_name(norm) == "batch_norm.default" else None
        if not isinstance(conv, fx.Node) or operator_name(conv) not in _CONVOLUTIONS or len(conv.users) > 1:
            continue
        given = [*conv.args[1:3], *(None,) * (3 - len(conv.args)), *norm.args[1:5]]
        values = [_constant(piece, node) for node in given]
        kernel, offset, weight, bias, mean, var = values
        unknown = any(value is None and node is not None for node, value in zip(given, values, strict=True))
        if unknown or kernel is None or mean is None or var is None or norm.args[5]:
            continue
        scale = torch.rsqrt(var + norm.args[7]) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) + ((0 if offset is None else offset) - mean) * scale
        names = f"{conv.name}_folded_weight", f"{conv.name}_folded_bias"
        for name, value in zip(names, (kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1)), shift), strict=True):
            piece.register_buffer(name, value.to(kernel.dtype))
        with piece.graph.inserting_before(conv):
            conv.args = (conv.args[0], *(piece.graph.get_attr(name) for name in names), *conv.args[3:])
        norm.replace_all_uses_with(conv)
        piece.graph.erase_node(norm)
    piece.graph.eliminate_dead_code()
    piece.delete_all_unused_submodules()
    piece.recompile()


_CONVOLUTIONS = ("conv1d.default", "conv2d.default", "conv3d.default")


def _constant(piece: fx.GraphModule, node: object) -> Tensor | None:
    """The weight that a graph's node reads, or None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: object = piece
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None
