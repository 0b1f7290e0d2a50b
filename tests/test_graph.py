"""The exported graph: its pieces in a row are the backbone, its macs are the backbone's."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nets import ZOO
from shallowdeep.cuts import distinct_rows
from shallowdeep.graph import BackboneGraph, evaluating, export_graph, is_identity
from shallowdeep.inputs import call, logits_of, take, tensors

EXPORTABLE = [name for name, nasty in ZOO.items() if nasty.via == "export"]


@cache
def graph(name: str) -> BackboneGraph:
    return export_graph(ZOO[name].make(), distinct_rows(ZOO[name].batch(2)))


@pytest.mark.parametrize("name", EXPORTABLE)
@pytest.mark.parametrize("rows", [1, 5])
def test_every_cut_leaves_two_pieces_that_make_the_whole(name: str, rows: int) -> None:
    whole, model, inputs = graph(name), ZOO[name].make(), ZOO[name].batch(rows)
    with torch.no_grad():
        expected = logits_of(call(model, inputs))
        crossings = whole.crossings()
        assert crossings
        for crossing in crossings:
            before, after = whole.piece(None, crossing), whole.piece(crossing, None)
            carried = before(*tensors(inputs))
            torch.testing.assert_close(after(*carried, *tensors(inputs))[0], expected)


@pytest.mark.parametrize("name", ["masked_tokens", "dense_skip", "residual"])
def test_rows_may_leave_at_every_cut(name: str) -> None:
    whole, inputs, keep = graph(name), ZOO[name].batch(6), torch.tensor([4, 1])
    with torch.no_grad():
        expected = logits_of(call(ZOO[name].make(), inputs))[keep]
        for crossing in whole.crossings():
            carried = whole.piece(None, crossing)(*tensors(inputs))
            own = [
                rows for side, rows in zip(crossing.sides, crossing.side_rows, strict=True) if side not in whole.leaves
            ]
            assert len(carried) == 1 + len(own)
            kept = [tensor[keep] if rows else tensor for tensor, rows in zip(carried, (True, *own), strict=True)]
            found = whole.piece(crossing, None)(*kept, *tensors(take(inputs, keep)))[0]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", EXPORTABLE)
def test_macs_are_those_of_a_real_pass(name: str) -> None:
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        call(ZOO[name].make(), ZOO[name].batch(1))
    assert graph(name).total_macs == counter.get_total_flops() // 2
    before = [crossing.macs_before for crossing in graph(name).crossings()]
    assert before == sorted(before)


def test_a_graph_writes_nothing_in_place() -> None:
    """Who reads a tensor later has one answer only if steps in place became values of their own."""
    for name in EXPORTABLE:
        for node in graph(name).module.graph.nodes:
            mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
            assert not mutates, (name, node)


def test_dropout_is_nothing_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    found = export_graph(model, torch.randn(4, 4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(found.piece(None, None)(x)[0], model.eval()(x))
    steps = [node for node in found.module.graph.nodes if node.op == "call_function"]
    assert all(is_identity(node) or "linear" in str(node.target) or "addmm" in str(node.target) for node in steps)


def test_mode_flags_come_back_even_after_errors() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))).train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="shapes"), evaluating(model):
        model(torch.zeros(3, 5))
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
