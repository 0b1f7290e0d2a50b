"""The exported graph: its pieces in a row are the backbone, its macs are the backbone's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Event

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nets import ZOO
from shallowdeep.cuts import distinct_rows, find_cuts
from shallowdeep.graph import BackboneGraph, evaluating, export_graph, is_identity, operator_name, silence
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


class Writing(nn.Module):
    """Convolution and norm, then ``steps`` that write in place, then a head."""

    def __init__(self, steps: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.steps = steps
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.steps(self.norm(self.first(x)))).mean((2, 3)))


def read_after_write(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True) + x


def dropout_is_no_copy(x: Tensor) -> Tensor:
    return F.relu(F.dropout(x, 0.5, training=False), inplace=True) + x


def chain(x: Tensor) -> Tensor:
    flat = x.flatten(1) * 2
    x.mul_(3).add_(1)
    x += 0.5
    return x + flat.view_as(x)


def view_read_after_write(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    x.add_(1)
    return x + flat.view_as(x)


def slice_written(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def view_written(x: Tensor) -> Tensor:
    x.transpose(2, 3).add_(1)
    return x * 2


def view_of_dropout_written(x: Tensor) -> Tensor:
    F.dropout(x, 0.5, training=False).flatten(2).add_(2)
    return x * 2


WRITING = [read_after_write, dropout_is_no_copy, chain, view_read_after_write, slice_written, view_written]


@pytest.mark.parametrize("steps", WRITING, ids=lambda steps: steps.__name__)
def test_steps_in_place_give_what_they_wrote(steps: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Writing(steps).eval(), torch.randn(4, 3, 6, 6)
    model.norm.running_mean.normal_()  # type: ignore[union-attr]
    with torch.no_grad():
        expected = model(x)
        made = export_graph(model, x)
        assert not [node for node in made.module.graph.nodes if operator_name(node).partition(".")[0].endswith("_")]
        torch.testing.assert_close(made.piece(None, None)(x)[0], expected)


def test_a_graph_that_answers_otherwise_is_not_used() -> None:
    """torch 2.13 exports dropout in evaluation as a copy: what is written into a view of it is lost."""
    torch.manual_seed(0)
    found = find_cuts(Writing(view_of_dropout_written).eval(), torch.randn(4, 3, 6, 6))
    assert found.graph is None
    assert "answers otherwise" in found.reason


class Masking(nn.Module):
    """A mask that takes only its type from a computed tensor is still made from the inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        mask, ones = mask.type_as(x), torch.ones_like(x)
        for layer in self.layers:
            x = layer(x) * mask + ones
        return self.head(x)


def test_what_takes_only_its_type_from_a_tensor_is_not_computed_from_it() -> None:
    inputs = (torch.randn(4, 6), torch.tensor([[0], [1], [1], [0]]))
    points = find_cuts(Masking().eval(), inputs).points
    between = {point.name: point.side_inputs for point in points if point.name.startswith("layers")}
    assert list(between) == [f"layers.{i}:in" for i in (1, 2, 3)]
    assert all(len(sides) == 2 for sides in between.values())


def test_what_is_silent_is_heard_again_whatever_threads_do() -> None:
    out, level, inside, left = sys.stdout, logging.root.manager.disable, Event(), Event()

    def second() -> None:
        with silence():
            inside.set()
            left.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with silence():
            other = pool.submit(second)
            inside.wait(0.2)
        left.set()
        other.result()
    assert sys.stdout is out
    assert logging.root.manager.disable == level
