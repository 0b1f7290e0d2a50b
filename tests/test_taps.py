"""Listening at cut points: nothing stays behind, nothing is missed, and threads do not hear each other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import shallowdeep as sd
from nets import CLASSES, ZOO, images, planned
from shallowdeep.inputs import call
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Confidence
from shallowdeep.taps import counting_functions, listening, tapped
from shallowdeep.types import CutError, CutPoint, DataError


def made(name: str) -> ShallowDeepNetwork:
    torch.manual_seed(1)
    return sd.attach(ZOO[name].make(), planned(name)).eval()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads change places as often as Python allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], None], count: int = 3) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("name", ["residual", "shared", "functional"])
def test_threads_share_one_network(name: str) -> None:
    sdn, rows = made(name), (1, 2, 4)
    inputs = [ZOO[name].batch(count) for count in rows]
    with torch.no_grad():
        expected = [sdn(batch) for batch in inputs]

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(60):
                torch.testing.assert_close(sdn(inputs[number]), expected[number])

    in_threads(work)
    assert hooks(sdn.backbone) == 0


@pytest.mark.usefixtures("hurried")
def test_threads_come_and_go() -> None:
    """Hooks of one thread appear and vanish while another is inside the same small module."""
    model = nn.Sequential(nn.Identity())
    cut = CutPoint(name="0:in", module="0", call=0, port="in", macs_before=1, shape=(1,))

    def work(number: int) -> None:
        x = torch.full((1, 1), float(number))
        for _ in range(1500):
            heard: list[Tensor] = []
            with tapped(model, [cut], lambda _, tensor, heard=heard: heard.append(tensor)):  # type: ignore[misc]
                model(x)
            assert len(heard) == 1
            assert heard[0] is x

    in_threads(work)
    assert hooks(model) == 0


@pytest.mark.usefixtures("hurried")
def test_threads_share_an_engine_that_runs_modules() -> None:
    sdn = made("control_flow")
    engine = sd.Engine(sdn, Confidence(threshold=0.3), backend="torch")
    inputs = [images(rows) for rows in (3, 5, 7)]
    expected = [engine(x) for x in inputs]

    def work(number: int) -> None:
        for _ in range(40):
            answer = engine(inputs[number])
            assert torch.equal(answer.exit_B, expected[number].exit_B)
            torch.testing.assert_close(answer.logits_BC, expected[number].logits_BC)

    in_threads(work)


@pytest.mark.usefixtures("hurried")
def test_threads_whose_rows_all_leave_do_not_meet_each_others_hooks() -> None:
    engine = sd.Engine(made("control_flow"), Confidence(threshold=0.0), backend="torch")

    def work(number: int) -> None:
        for _ in range(300):
            assert engine(images(number + 1)).exit_B.tolist() == [0] * (number + 1)

    in_threads(work, count=6)


def test_nothing_stays_after_errors() -> None:
    sdn = made("residual")

    def angry(position: int, tensor: Tensor) -> None:
        raise KeyError("angry")

    with pytest.raises(KeyError, match="angry"), tapped(sdn.backbone, sdn.plan.cuts, angry):
        sdn.backbone(images(2))
    assert hooks(sdn.backbone) == 0
    with pytest.raises(DataError, match="channels"):
        sdn(torch.zeros(2, 5, 8, 8))
    assert hooks(sdn.backbone) == 0
    with pytest.raises(CutError, match="No module 'nowhere' in Residual"):
        listening(sdn.backbone, {"blocks", "nowhere"}, lambda *_: None).__enter__()
    assert hooks(sdn.backbone) == 0
    functional = made("functional")
    with pytest.raises(DataError, match="channels"):
        functional(torch.zeros(2, 5, 8, 8))
    with torch.no_grad():
        assert torch.relu(torch.tensor(-1.0)) == 0
        assert torch.equal(functional(images(2))[-1], functional.backbone(images(2))), "no mode is left behind"


class Steps(nn.Module):
    """A module's output, then functions of no module whose names an internal classifier uses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(3):
            x = torch.conv2d(x, self.weight, padding=1).add(0.1 * i)
        return self.head(x.mean((2, 3)))


class Adding(nn.Module):
    """An IC that calls the backbone's functions."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.add(1).add(1).mean((2, 3)).add(1))


def test_a_classifiers_own_functions_are_not_counted() -> None:
    torch.manual_seed(0)
    model = Steps().eval()
    plan = sd.plan(model, images(2), at=("stem:out", "add#1", "add#2"), classifier=lambda s, c: Adding(s[0], c))
    assert [cut.port for cut in plan.cuts] == ["out", "call", "call"]
    sdn = sd.attach(model, plan).eval()
    x = images(3)
    with torch.no_grad():
        features = [model.stem(x)]
        for i in range(2):
            features.append(torch.conv2d(features[-1], model.weight, padding=1).add(0.1 * i))
        alone = [classifier.module(f) for classifier, f in zip(sdn.classifiers, features, strict=True)]
        torch.testing.assert_close(sdn(x)[:-1], torch.stack(alone))


@pytest.mark.parametrize("name", ["shared", "masked_tokens", "batch_length", "residual", "functional", "dense_skip"])
def test_a_visitor_hears_what_is_planned_in_order(name: str) -> None:
    sdn, heard = made(name), []
    with torch.no_grad(), tapped(sdn.backbone, sdn.plan.cuts, lambda i, x: heard.append((i, tuple(x.shape)))):
        call(sdn.backbone, ZOO[name].batch(3))
    assert heard == [(i, (3, *cut.shape)) for i, cut in enumerate(sdn.plan.cuts)]


def test_calls_are_counted_from_the_with_on() -> None:
    model = ZOO["shared"].make()
    for _ in range(2):
        calls: list[tuple[str, int]] = []
        with torch.no_grad(), listening(model, {"block"}, lambda _, port, n, __, calls=calls: calls.append((port, n))):
            model(images(2))
        assert calls == [(port, n) for n in range(4) for port in ("in", "out")]


def test_in_place_steps_do_not_spoil_what_was_heard() -> None:
    sdn = made("residual")
    x = images(3)
    reduced, full = sdn.reduce(x)
    with torch.no_grad():
        alive = sdn.backbone.stem(x).relu_()
        for position, features in enumerate(reduced):
            expected = sdn.classifier(position).reduce(alive)
            torch.testing.assert_close(features, expected)
            alive = sdn.backbone.blocks[position](alive.clone())
    assert torch.equal(full, sdn.backbone(x))


def test_a_visitor_may_replace_the_tensor() -> None:
    keep = torch.tensor([0, 2, 5])
    for name in ("residual", "functional"):
        sdn, x = made(name), ZOO[name].batch(6)
        last = [cut for cut in sdn.plan.cuts if cut.port != "in"][-1]
        with torch.no_grad(), tapped(sdn.backbone, [last], lambda _, tensor: tensor[keep]):
            part = sdn.backbone(x)
        with torch.no_grad():
            torch.testing.assert_close(part, sdn.backbone(x)[keep])


def test_another_path_is_noticed() -> None:
    sdn = made("residual")
    blocks = sdn.backbone.blocks
    sdn.backbone.blocks = blocks[:2]
    with pytest.raises(CutError, match=r"No module 'blocks\.2'"):
        sdn(images(2))
    sdn.backbone.blocks = blocks
    blocks.forward = lambda x: blocks[0](x)  # type: ignore[method-assign]
    with pytest.raises(CutError, match=r"passed 2 of 4 cut points"):
        sdn(images(2))
    assert hooks(sdn.backbone) == 0
    gone = CutPoint(name="blocks:out", module="blocks", call=0, port="out", leaf=3, macs_before=1, shape=())
    with (
        pytest.raises(CutError, match="no tensor at the cut point 'blocks:out'"),
        tapped(sdn.backbone, [gone], lambda *_: None),
    ):
        sdn.backbone(images(2))


def test_functions_are_counted_by_name_on_this_thread() -> None:
    seen: list[tuple[str, int]] = []
    with counting_functions({("", 0)}, lambda _, name, count, __: seen.append((name, count))) as mode:  # type: ignore[func-returns-value]
        torch.ones(2).add(0)
        mode.pass_door(("", 0), "in")
        torch.ones(2).add(1)
        thread = threading.Thread(target=lambda: torch.ones(2).add(2))
        thread.start()
        thread.join()
        with mode.deaf():
            torch.ones(2).add(3)
        torch.ones(2).add(4)
    assert [entry for entry in seen if entry[0] == "add"] == [("add", 1), ("add", 2)]


class Detour(nn.Module):
    """Functions inside one module, behind a stretch that may call more of the same functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.steps = nn.Conv2d(3, 8, 3, padding=1), Steps()
        self.steps.stem = nn.Conv2d(8, 8, 1)
        self.long = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.long:
            x = x.add(1).add(-1)
        return self.steps(x)


def test_functions_are_counted_inside_their_module_call() -> None:
    torch.manual_seed(0)
    model, x = Detour().eval(), images(3)
    plan = sd.plan(model, images(2), at=("steps.add#1", "steps.add#2"))
    assert [(cut.port, cut.module) for cut in plan.cuts] == [("call", "steps")] * 2
    with torch.no_grad():
        features = [model.steps.stem(model.stem(x))]
        for i in range(2):
            features.append(torch.conv2d(features[-1], model.steps.weight, padding=1).add(0.1 * i))
        for model.long in (False, True):
            heard: list[Tensor] = []
            with tapped(model, plan.cuts, lambda _, tensor, heard=heard: heard.append(tensor)):  # type: ignore[misc]
                model(x)
            torch.testing.assert_close(heard, features[1:])
