"""Segments: pieces of a snapshot that together answer as the backbone does, normalisation folded where it can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

import shallowdeep as sd
from nets import ZOO, planned
from shallowdeep.graph import operator_name
from shallowdeep.segments import Segment, cut_segments
from shallowdeep.types import CutError


def chained(segments: list[Segment], x: Tensor) -> Tensor:
    carried: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for segment in segments:
            carried = segment.run(*carried, x)
    return carried[0]


def norms(module: fx.GraphModule) -> int:
    return sum(operator_name(node) == "batch_norm.default" for node in module.graph.nodes)


class Norms(nn.Module):
    """Convolutions and normalisations of all sorts; ``read_twice`` is also read past its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.biased = nn.Sequential(nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), nn.ReLU())
        self.twice = nn.Conv2d(6, 6, 1)
        self.after_twice = nn.BatchNorm2d(6)
        self.computed = nn.Sequential(weight_norm(nn.Conv2d(6, 6, 1)), nn.BatchNorm2d(6))
        self.before = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))
        self.shared = nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        read_twice = self.twice(self.biased(self.plain(x)))
        x = self.computed(read_twice + self.after_twice(read_twice))
        x = self.before(x)
        for norm in self.norms:
            x = norm(self.shared(x))
        return self.head(x.mean((2, 3)))


def trained_norms(model: nn.Module) -> nn.Module:
    """Every normalisation with statistics, scale and shift that a wrong formula would not survive."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.data = torch.rand_like(tensor) + 0.5
    return model.eval()


def test_folded_norms_answer_the_same() -> None:
    model, x = trained_norms(Norms()).double(), torch.randn(5, 3, 12, 12).double()
    (whole,) = cut_segments(model, sd.plan(model, x, at=(0.5,)), (), x)
    with torch.no_grad():
        torch.testing.assert_close(chained([whole], x), model(x), rtol=1e-12, atol=1e-12)
    before = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    # plain, biased and both uses of the shared convolution fold; what is read twice, computed or in front stays
    assert (before, norms(whole.run)) == (7, 3)
    names = {name for name, _ in whole.run.named_parameters()} | {name for name, _ in whole.run.named_buffers()}
    assert not any("plain" in name and "folded" not in name for name in names), "folded weights are not kept twice"


@pytest.mark.parametrize("name", ["residual", "dropout_norm", "dense_skip"])
def test_pieces_together_answer_as_the_backbone(name: str) -> None:
    plan, model, x = planned(name), ZOO[name].make().eval(), ZOO[name].batch(6)
    pieces = cut_segments(model, plan, range(len(plan.cuts)), ZOO[name].batch(2))
    assert len(pieces) == len(plan.cuts) + 1
    assert isinstance(x, Tensor)
    with torch.no_grad():
        torch.testing.assert_close(chained(pieces, x), model(x), rtol=1e-5, atol=1e-5)


def test_a_snapshot_does_not_move_with_the_backbone() -> None:
    plan, model, x = planned("residual"), ZOO["residual"].make().eval(), ZOO["residual"].batch(4)
    assert isinstance(x, Tensor)
    pieces = cut_segments(model, plan, (1,), x)
    before = chained(pieces, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(chained(pieces, x), before)


def test_a_plan_of_another_network_is_refused() -> None:
    with pytest.raises(CutError, match="has no cut point"):
        cut_segments(ZOO["residual"].make(), planned("dense_skip"), (0,), ZOO["residual"].batch(2))
