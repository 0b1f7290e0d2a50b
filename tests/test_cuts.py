"""Where networks can be cut: names, macs, what is never offered, and what is refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shallowdeep as sd
from nets import CLASSES, ZOO, images, planned
from shallowdeep.cuts import distinct_rows, shape_rule
from shallowdeep.inputs import num_rows, tensors
from shallowdeep.network import plan_from_json, plan_to_json
from shallowdeep.paper.networks import resnet20, resnet56
from shallowdeep.types import CutError, DataError, Plan


@cache
def resnet_plan() -> Plan:
    return sd.plan(resnet56(), torch.zeros(1, 3, 32, 32), classifier="paper")


def names(plan: Plan) -> list[str]:
    return [cut.name for cut in plan.candidates]


def named(plan: Plan, name: str) -> bool:
    return any(name == cut.name or name in cut.aliases for cut in plan.candidates)


# ---------------------------------------------------------------- names


def test_every_call_of_a_shared_module_is_a_cut_of_its_own() -> None:
    found = planned("shared")
    for name in ("stem:out", "stem", "block#2:in", "block#3:in", "block#4:in"):
        assert named(found, name), name
    assert len({cut.macs_before for cut in found.candidates}) == len(found.candidates)


@pytest.mark.parametrize("wish", ["blocks.1:out", "blocks.2:in", "blocks.1"])
def test_a_cut_has_all_its_names(wish: str) -> None:
    found = sd.plan(ZOO["residual"].make(), images(2), at=(wish,))
    assert [cut.name for cut in found.cuts] == ["blocks.1:out"]


def test_functions_of_no_module_are_counted() -> None:
    assert {"add#1", "relu#1", "relu#2"} <= set(names(planned("functional")))
    found = sd.plan(ZOO["functional"].make(), images(2), at=("relu#2", "add#1"))
    assert [cut.name for cut in found.cuts] == ["add#1", "relu#2"], "in order of depth"


def test_names_are_told_where_one_is_wrong() -> None:
    offered = ", ".join(names(planned("residual"))).replace(".", r"\.")
    message = rf"No cut point 'block\.1' in Residual\. Cut points: {offered}\. Nearest: 'blocks\.[01]:out'\."
    with pytest.raises(CutError, match=message):
        sd.plan(ZOO["residual"].make(), images(2), at=("block.1",))


def test_fractions_take_the_nearest_cut_and_each_cut_once() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(9)), nn.Linear(16, 16))  # 10 % of the macs each
    example = torch.zeros(1, 16)
    assert [c.name for c in sd.plan(model, example, at=(0.29, 0.31, 0.71)).cuts] == ["2:out", "6:out"]
    assert [c.name for c in sd.plan(model, example, at=(0.999, 0.001)).cuts] == ["0:out", "8:out"]
    assert [c.name for c in sd.plan(model, example, at=("4", 0.5, "4:out")).cuts] == ["4:out"]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((0.0,), "between 0 and 1, found 0.0"),
        ((1.0,), "between 0 and 1, found 1.0"),
        ((0.5, 15), "found 15"),
        ((float("nan"),), "found nan"),
        ("stem", "a sequence of fractions or names of cut points, found 'stem'"),
        (0.5, "found 0.5"),
        ((), r"found \(\)"),
    ],
)
def test_places_that_are_none(at: object, message: str) -> None:
    with pytest.raises(CutError, match=message):
        sd.plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(1, 4), at=at)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is offered


@pytest.mark.parametrize("name", ZOO)
def test_cuts_lie_inside_the_network(name: str) -> None:
    found = planned(name)
    before = [cut.macs_before for cut in found.candidates]
    assert before == sorted(set(before))
    assert all(0 < macs <= 0.98 * found.total_macs for macs in before)
    assert len(names(found)) == len(set(names(found)))
    assert set(found.cuts) <= {
        dataclasses.replace(cut, mask=m) for cut in found.candidates for m in ("", "attention_mask")
    }


def test_of_equal_macs_the_last_is_offered() -> None:
    def stage(channels_in: int) -> nn.Module:
        layers = nn.Conv2d(channels_in, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5)
        return nn.Sequential(*layers)

    found = sd.plan(nn.Sequential(stage(3), stage(4), nn.Flatten(), nn.Linear(16, 64), nn.Linear(64, 16)), images(2))
    first, second, linear = found.candidates
    assert first.shape == (4, 4, 4), "after pooling"
    assert "0.3:out" in (first.name, *first.aliases), "dropout answers its input in evaluation"
    assert second.shape == (16,), "flat: nothing is computed in between"
    assert linear.name == "3:out"


def test_nothing_inside_a_residual_branch() -> None:
    for found in (planned("residual"), resnet_plan()):
        inner = [n for cut in found.candidates for n in (cut.name, *cut.aliases) if ".conv" in n or ".bn" in n]
        assert all(name.endswith(".conv1:in") for name in inner), "where a branch begins, nothing is inside"
        assert all(len({cut.name, *cut.aliases}) == 1 + len(cut.aliases) for cut in found.candidates)
    assert len(resnet_plan().candidates) == 27, "the stem and each block but the last, behind which 2 % are not left"


def test_nothing_across_a_dense_skip() -> None:
    found = planned("dense_skip")
    for layer in (2, 3):
        assert not named(found, f"layers.{layer}:out"), "`early` is alive"
        assert not named(found, f"layers.{layer + 1}:in")
    assert {"layers.2:in", "join:in", "after:in"} <= {n for cut in found.candidates for n in (cut.name, *cut.aliases)}


def test_the_mask_travels_beside_tokens() -> None:
    found = planned("masked_tokens")
    assert all(cut.side_inputs for cut in found.candidates[:-1])
    assert found.candidates[-1].side_inputs == (), "past the last attention nobody reads it"
    assert all(cut.mask == "attention_mask" and cut.layout == "tokens" for cut in found.cuts)
    for layer in range(3):
        assert named(found, f"layers.{layer}:out")
    assert not any(cut.side_inputs for cut in planned("residual").candidates)


def test_where_export_fails_modules_are_tried() -> None:
    found = planned("control_flow")
    assert found.via == "modules"
    assert found.reason
    assert f"via modules ({found.reason})" in str(found)
    assert not any("conv" in name or "bn" in name for name in names(found)), "a branch may not lose rows alone"
    assert named(found, "blocks.1"), "bare names work, too"
    shared = sd.plan(Unexportable(ZOO["shared"].make()), images(2))
    assert [name for name in names(shared) if "block" in name] == [], "the skip keeps all rows"


class Unexportable(nn.Module):
    """Looks at a number before it runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if float(x.sum()) < 1e9 else -x)


def test_both_ways_count_the_same_macs() -> None:
    for name in ("residual", "branch_and_join"):
        graph, modules = planned(name), sd.plan(Unexportable(ZOO[name].make()), ZOO[name].batch(2))
        assert modules.via == "modules"
        assert modules.total_macs == graph.total_macs
        assert {cut.macs_before for cut in modules.candidates} <= {cut.macs_before for cut in graph.candidates}


# ---------------------------------------------------------------- macs and shapes


def test_macs_of_a_network_counted_by_hand() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)
            self.linear = nn.Linear(8, 20, bias=False)
            self.head = nn.Linear(20, 30)

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(x).flatten(2).transpose(1, 2)
            x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
            return self.head(self.linear(x).mean(1))

    convolution, attention, linear, head = 8 * 4 * 4 * 9, 2 * 16 * 16 * 8, 16 * 8 * 20, 20 * 30
    found = sd.plan(ByHand(), torch.zeros(3, 4, 8, 8), at=("linear:in", "head:in"))
    assert found.total_macs == convolution + attention + linear + head
    assert [cut.macs_before for cut in found.cuts] == [convolution + attention, convolution + attention + linear]


def test_macs_of_the_papers_resnets() -> None:
    stem, head = 3 * 16 * 9 * 32**2, 64 * 10
    same, halved = 16 * 16 * 9 * 32**2, 16 * 32 * 9 * 16**2
    for depth, model in ((20, resnet20()), (56, resnet56())):
        blocks = (depth - 2) // 6
        known = stem + 2 * blocks * same + 2 * (halved + (2 * blocks - 1) * same) + head
        found = resnet_plan() if depth == 56 else sd.plan(model, torch.zeros(1, 3, 32, 32), at=("layer2:in",))
        assert found.total_macs == known
        assert found.candidates[0].macs_before == stem
    assert resnet_plan().total_macs == 125_485_696
    assert resnet_plan().total_params == 853_018
    third = next(
        cut for cut in resnet_plan().cuts if named(resnet_plan(), "layer2.2:out") and cut.name == "layer2.2:out"
    )
    assert third.macs_before == stem + 18 * same + halved + 5 * same


def test_the_papers_places_on_resnet56() -> None:
    """After blocks 3, 7 | 2, 6 | 1, 5 (counted from 0), as the original code lists them."""
    expected = ["layer1.3:out", "layer1.7:out", "layer2.2:out", "layer2.6:out", "layer3.1:out", "layer3.5:out"]
    assert [cut.name for cut in resnet_plan().cuts] == expected
    assert [cut.shape for cut in resnet_plan().cuts] == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2


def test_one_row_is_example_enough() -> None:
    assert sd.plan(ZOO["residual"].make(), images(1)) == planned("residual")


class Last(nn.Module):
    """Works on [B, S, S] or [B, S, S, S], features last."""

    def __init__(self, side: int, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(side), nn.Linear(side, side), nn.GELU()) for _ in range(3)
        )
        self.head = nn.Linear(side, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.flatten(1, -2).mean(1))


class First(nn.Module):
    """Works on [B, S, S] or [B, S, S, S], features first."""

    def __init__(self, side: int, convolution: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(convolution(side, side, 3, padding=1), nn.ReLU())
            for _ in range(4)  # type: ignore[call-arg]
        )
        self.head = nn.Linear(side, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.flatten(2).mean(2))


@pytest.mark.parametrize(
    ("model", "shape", "channel_dim", "layout"),
    [
        (First(6, nn.Conv1d), (6, 6), 1, "map"),
        (Last(6, nn.Linear(6, 6)), (6, 6), -1, "tokens"),
        (First(6, nn.Conv2d), (6, 6, 6), 1, "map"),
        (Last(6, nn.Linear(6, 6)), (6, 6, 6), -1, "map"),
    ],
    ids=["conv1d", "tokens", "nchw", "nhwc"],
)
@pytest.mark.parametrize("via", ["export", "modules"])
def test_features_are_found_where_shapes_do_not_tell(
    model: nn.Module, shape: tuple[int, ...], channel_dim: int, layout: str, via: str
) -> None:
    found = sd.plan(model if via == "export" else Unexportable(model), torch.zeros(2, *shape), at=(0.3, 0.5))
    assert found.via == via
    assert {(cut.shape, cut.channel_dim, cut.layout) for cut in found.cuts} == {(shape, channel_dim, layout)}


def test_shapes_alone_tell_little() -> None:
    assert shape_rule((8, 8, 96)) == -1
    assert shape_rule((96, 8, 8)) == 1
    assert shape_rule((197, 64)) == -1
    assert shape_rule((64,)) == -1


# ---------------------------------------------------------------- refusals


class Answering(nn.Module):
    """A small network whose answer is changed by a function."""

    def __init__(self, change: Callable[[Tensor], object], width: int = CLASSES) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, width))
        self.change = change

    def forward(self, x: Tensor) -> object:
        return self.change(self.body(x))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(6, 3), CutError, "No cut point in Linear: no place before its last layer"),
        (Answering(lambda z: z, 1), DataError, r"single logit \(4, 1\); wrap it to two"),
        (Answering(lambda z: z.mean(1)), DataError, r"single logit \(4,\); wrap it to two"),
        (Answering(lambda z: z[:, :, None]), DataError, r"logits \[B, C\], found shape \(4, 5, 1\)"),
        (Answering(lambda z: z.argmax(1, keepdim=True)), DataError, "must return logits"),
        (Answering(lambda z: z[:2]), DataError, "4 rows in, 2 rows of logits out"),
        (Answering(lambda z: z - z.mean(0)), DataError, "Answering answers a row differently when another row leaves"),
        (Answering(lambda z: {"scores": z}), DataError, r"without 'logits'; it has \['scores'\]; wrap"),
    ],
    ids=["no cut", "one logit", "regression", "three axes", "labels", "rows lost", "coupled rows", "no logits"],
)
def test_what_is_refused_leaves_the_model_as_it_was(model: nn.Module, error: type[Exception], message: str) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        sd.plan(model, torch.zeros(2, 6))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rows_coupled_inside_are_refused_too() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.head(F.relu(self.b(x - x.mean(0))))

    with pytest.raises(DataError, match="rows that do not depend on each other"):
        sd.plan(Coupled(), torch.zeros(1, 6))


def test_examples_that_are_none() -> None:
    model = ZOO["residual"].make()
    with pytest.raises(DataError, match="empty; give at least one row"):
        sd.plan(model, images(2)[:0])
    with pytest.raises(DataError, match="found str"):
        sd.plan(model, "image.png")
    with pytest.raises(DataError, match=r"No classifier 'mighty'\. Possible: 'strong', 'paper'"):
        sd.plan(model, images(2), classifier="mighty")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual", "dropout_norm", "control_flow"])
def test_planning_changes_nothing(name: str) -> None:
    model, example = ZOO[name].make().train(), ZOO[name].batch(2)
    frozen = next(module for module in model.modules() if not list(module.children())).eval()
    before = copy.deepcopy(model.state_dict())
    kept = [tensor.clone() for tensor in tensors(example)]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    sd.plan(model, example)
    assert torch.equal(torch.rand(4), expected), "the user's generator"
    assert [module for module in model.modules() if not module.training] == [frozen]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(example), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_example_rows_are_made_different() -> None:
    for name, nasty in ZOO.items():
        spread = distinct_rows(nasty.batch(1))
        assert num_rows(spread) == 4
        for tensor in tensors(spread):
            assert (
                tensor.ndim < 2 or not torch.equal(tensor[0], tensor[1]) or bool((tensor[0] == tensor[0, 0]).all())
            ), name


# ---------------------------------------------------------------- the plan as data


@pytest.mark.parametrize("name", ["residual", "masked_tokens", "control_flow", "batch_length"])
def test_a_plan_survives_json(name: str) -> None:
    assert plan_from_json(plan_to_json(planned(name))) == planned(name)


def test_a_printed_plan_is_a_table() -> None:
    lines = str(resnet_plan()).split("\n")
    assert lines[0] == "ResNet: 125,485,696 macs, 853,018 parameters, 27 cut points found via export"
    assert lines[1].split() == ["exit", "shape", "macs", "before", "cost", "classifier", "IC", "macs", "IC", "params"]
    assert lines[3].startswith("layer1.3:out  16x32x32   19,316,736  0.154")
    assert lines[-1].split() == ["full", "10", "125,485,696", "1.000"]
    assert len(lines) == 3 + 7


def test_costs_add_up() -> None:
    found = planned("residual")
    own = 0
    for cut, spec, cost in zip(found.cuts, found.classifiers, found.cost_E, strict=False):
        own += spec.macs
        assert cost == pytest.approx((cut.macs_before + own) / found.total_macs, abs=1e-15)
    assert found.cost_E[-1] == pytest.approx(1 + own / found.total_macs, abs=1e-15)
    assert found.exit_names[-1] == "full"


# ---------------------------------------------------------------- what cannot be listened to


class Recurrent(nn.Module):
    """Two layers in one call, and little behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.GRU(8, 32, num_layers=2, batch_first=True), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


def test_layers_of_one_call_are_no_places_and_the_error_says_so() -> None:
    with pytest.raises(CutError, match=r"2% of the macs behind it; layers of one nn\.LSTM"):
        sd.plan(Recurrent(), torch.randn(2, 12, 8))


@pytest.mark.parametrize("where", ["whole", "in place", "a part"])
def test_a_compiled_network_is_refused_and_its_origin_is_not(where: str) -> None:
    net = ZOO["residual"].make()
    if where == "whole":
        compiled: nn.Module = torch.compile(net, backend="eager")  # type: ignore[assignment]
    else:
        compiled = net
        (net if where == "in place" else next(net.children())).compile(backend="eager")
    with pytest.raises(CutError, match=r"before torch\.compile.*copy\.deepcopy.*torch-compile"):
        sd.plan(compiled, images(2))
    with pytest.raises(CutError, match=r"before torch\.compile"):
        sd.attach(compiled, planned("residual"))
    whole = compiled._orig_mod if where == "whole" else copy.deepcopy(compiled)
    assert isinstance(whole, nn.Module)
    assert sd.plan(whole, images(2)).via == "export"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    net = ZOO["residual"].make().eval()
    with pytest.raises(CutError, match=r"TorchScript.*nn\.Module it was made from"):
        sd.plan(torch.jit.trace(net, images(2)), images(2))  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- networks that others met


class PreNorm(nn.Module):
    """A block that begins with a norm, which its residual passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(self.norm(x)))


class NotExported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(PreNorm() for _ in range(4)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 1e9).any()):
            x = x * 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_blocks_that_begin_with_a_norm_end_at_cuts() -> None:
    assert names(sd.plan(NotExported(), torch.randn(4, 16))) == [f"blocks.{i}:out" for i in range(4)]


class Columns(nn.Module):
    """Two columns of categories, of which there are 7 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(7, 8), nn.Embedding(3, 8)
        self.body = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.cat([self.one(x[:, 0]), self.two(x[:, 1])], 1))  # type: ignore[no-any-return]


def test_columns_of_categories_keep_to_their_own() -> None:
    assert len(sd.plan(Columns(), torch.tensor([[6, 0], [5, 2], [3, 1]])).candidates) > 3


class Encoder(nn.Module):
    """PyTorch's own encoder, which passes nested tensors between its layers where nobody listens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(ids), src_key_padding_mask=~mask)[:, 0])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_pytorchs_encoder_with_padding() -> None:
    model, ids = Encoder().eval(), torch.randint(1, 50, (4, 9))
    batch = {"ids": ids, "mask": torch.arange(9)[None] < torch.tensor([[9], [4], [6], [2]])}
    sdn = sd.attach(model, sd.plan(model, batch, at=(0.3, 0.6)))
    with torch.no_grad():
        torch.testing.assert_close(sdn(batch)[-1], model(**batch))
    assert torch.backends.mha.get_fastpath_enabled(), "switched off only while somebody listens"


def test_what_is_no_network_and_what_is_no_number() -> None:
    with pytest.raises(DataError, match=r"plan takes an nn\.Module, found str"):
        sd.plan("resnet18", images(2))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="The example has numbers that are not finite"):
        sd.plan(ZOO["residual"].make(), torch.full_like(images(2), float("nan")))


def test_rows_of_another_kind_are_named() -> None:
    sdn = sd.attach(ZOO["residual"].make(), planned("residual"))
    for wrong in (images(2)[:, :1], images(2).double()):
        with pytest.raises(DataError, match=r"is planned for float32 \[rows, .*\] and fails for float"):
            sdn(wrong)


class Rooted(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sqrt())


def test_real_rows_are_taken_as_they_are() -> None:
    """Noise would leave where the network is defined."""
    net, x = Rooted(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)), torch.rand(4, 6)
    assert sd.plan(net, x, at=(0.5,)).via == "export"
    with pytest.raises(DataError, match=r"not finite for the example.* give as many real rows"):
        sd.plan(net, x[:1], at=(0.5,))


def test_an_infinite_logit_hides_no_mixing() -> None:
    class Mixing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    net = Mixing(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3))
    with torch.no_grad():
        net[-1].bias[0] = -torch.inf
    with pytest.raises(DataError, match=r"not finite|another row leaves"):
        sd.plan(net, torch.rand(5, 6), at=(0.5,))


def test_a_softmax_at_the_end_is_noticed_once() -> None:
    """Its logarithm is as good as logits."""
    layers = [nn.Linear(6, 6) for _ in range(3)]
    for last, said in ((nn.Softmax(1), True), (nn.LogSoftmax(1), False), (nn.Sigmoid(), False)):
        net = nn.Sequential(*layers, nn.Linear(6, 3), last).eval()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            sd.attach(net, sd.plan(net, torch.rand(4, 6), at=(0.5,)))
        assert [str(one.message).startswith("Sequential seems to end in a softmax") for one in seen] == [True] * said


def test_a_forward_that_fixes_the_number_of_rows_is_told_so() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first = nn.Linear(8, 16), nn.Parameter(torch.zeros(1, 1, 16))
            self.layers = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], 1))[:, 0]  # type: ignore[no-any-return]

    found = sd.plan(Token().eval(), torch.randn(4, 5, 8), at=(0.5,))
    assert found.via == "modules"
    assert found.reason == "it fixes the number of rows, as len(x) in a forward does where x.shape[0] does not"
