"""Backends, limits and times: whatever runs the steps, and in whatever company, the answers are the same."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import shallowdeep as sd
from nets import ZOO, images, planned
from shallowdeep.inputs import Inputs, each
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import (
    Accumulated,
    CalibrationRecord,
    Confidence,
    Ensemble,
    Entropy,
    Fixed,
    Margin,
    Patience,
    PerClass,
    Policy,
    Score,
    Tempered,
)
from shallowdeep.runtime import engine as engine_module
from shallowdeep.runtime import loop, on_openvino
from shallowdeep.runtime import programs as programs_module
from shallowdeep.runtime.engine import Engine
from shallowdeep.runtime.on_openvino import OnOpenVino
from shallowdeep.runtime.on_torch import OnTorch
from shallowdeep.runtime.times import StepTimes
from shallowdeep.timing import threads_of_torch
from shallowdeep.types import Answer, BackendError, CutError, DataError, MissingExtra

OTHERS = ("onnxruntime", "openvino")


@cache
def tiny() -> ShallowDeepNetwork:
    """Three exits, strong ICs that feed each other, a confusion reference."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    sdn = sd.attach(model, sd.plan(model, torch.zeros(1, 6), at=(0.3, 0.7))).eval()
    sd.train_exits(sdn, (rows(512), model(rows(512)).argmax(1)), epochs=3)
    sd.fit_confusion(sdn, sd.collect(sdn, (rows(64), torch.arange(64) % 4)))
    return sdn


def rows(count: int) -> Tensor:
    return 3 * torch.randn(count, 6, generator=torch.Generator().manual_seed(count))


def middle(sdn: ShallowDeepNetwork, inputs: Inputs, score: str = "top") -> tuple[float, ...]:
    """Thresholds between two rows' scores that stop about a third of the rows at each exit but the last."""
    with torch.no_grad():
        softmax_ENC = sdn(inputs).double().softmax(-1)[:-1]
    top_ENC = softmax_ENC.sort(-1, descending=True).values
    scores = {"top": top_ENC[..., 0], "margin": top_ENC[..., 0] - top_ENC[..., 1]}
    scores["entropy"] = -torch.special.entr(softmax_ENC).sum(-1)
    ordered_EN = scores[score].sort(1).values
    at = 2 * ordered_EN.shape[1] // 3
    return tuple(((ordered_EN[:, at - 1] + ordered_EN[:, at]) / 2).tolist())


def same(answer: Answer, expected: Answer, *, but: Sequence[str] = ()) -> None:
    for field, tensor in vars(expected).items():
        if field not in but:
            torch.testing.assert_close(
                getattr(answer, field), tensor, rtol=1e-4, atol=1e-5, msg=lambda text, field=field: f"{field}: {text}"
            )


ENDS = Ensemble(weight_EE=((), (), (0.4, 0.8, 1.0)))
EVERYWHERE = Ensemble(weight_EE=((1.5,), (0.4, 0.8), (0.4, 0.8, 1.0)), bias_EC=((0.3, 0.0, 0.0, 0.1),) * 3)


def policies() -> dict[str, Policy]:
    levels = {score: middle(tiny(), rows(60), score) for score in ("top", "margin", "entropy")}
    entropy = tuple(-level for level in levels["entropy"])
    return {
        "confidence": Confidence(threshold=levels["top"]),
        "most confident": Confidence(threshold=levels["top"], fallback="most_confident"),
        "entropy, one exit": Entropy(threshold=entropy, enabled_E=(False, True, True)),
        "margin": Margin(threshold=levels["margin"]),
        "patience": Patience(patience=1),
        "tempered": Tempered(policy=Margin(threshold=levels["margin"]), temperature_E=(0.8, 1.25, 1.0)),
        "per class": PerClass(threshold_C=(0.46, 0.5, 0.4, math.inf)),
        "score": Score(threshold=(-0.72, -0.31), margin=0.4, entropy=-0.3, agreement=0.5),
        "accumulated": Accumulated(threshold=(0.41, 0.46), weight_E=(1.0, 1.1)),
        "ensemble at the end": Confidence(threshold=levels["top"], ensemble=ENDS),
        "ensembles": Confidence(threshold=(0.435, 0.8), ensemble=EVERYWHERE, enabled_E=(True, False, True)),
        "fixed": Fixed(exit=1),
        "never": Confidence(threshold=math.inf),
    }


NAMES = ("confidence", "most confident", "entropy, one exit", "margin", "patience", "tempered", "fixed", "never")
NAMES += ("per class", "score", "accumulated", "ensemble at the end", "ensembles")


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_law_3_every_policy_on_every_backend(name: str, backend: Any) -> None:
    sdn, policy = tiny(), policies()[name]
    engine, plain = Engine(sdn, policy, backend=backend), Engine(sdn, policy, backend="torch")
    assert engine.backend == backend
    left_at: set[int] = set()
    for count in (0, 1, 2, 7, 60):
        answer = engine(rows(count))
        same(answer, plain(rows(count)))
        left_at |= set(answer.exit_B.tolist())
    broken = rows(7)
    broken[[1, 4]] = math.nan
    same(engine(broken), plain(broken), but=("confidence_B", "confusion_B", "logits_BC", "labels_B"))
    assert engine(broken).valid_B.tolist() == [True, False, True, True, False, True, True]
    if name not in ("fixed", "never"):
        assert len(left_at) > 1, "rows that never part check nothing"


@cache
def rectified() -> ShallowDeepNetwork:
    """Layers that make a number of NaN in some runtimes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers).eval()
    return sd.attach(model, sd.plan(model, torch.zeros(1, 3, 8, 8), at=(0.3, 0.7))).eval()


def spoilt(count: int) -> Tensor:
    """Images, of which the first five hold what is no number, in all or in one pixel; the sixth one is huge."""
    found = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found[0], found[1, 0, 2, 3] = math.nan, math.nan
    found[2], found[3, 1, 4, 4], found[4, 2, 7, 5] = math.inf, math.inf, -math.inf
    found[5] *= 1e6
    return found


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("name", ["confidence", "patience", "most confident"])
def test_rows_that_are_no_numbers_get_no_answer(name: str, backend: Any) -> None:
    sdn, levels = rectified(), middle(rectified(), spoilt(40)[6:])
    policy: Policy = Patience(patience=1) if name == "patience" else Confidence(threshold=levels)
    if name == "most confident":
        policy = dataclasses.replace(policy, fallback="most_confident")  # type: ignore[call-arg]
    engine, plain = Engine(sdn, policy, backend=backend), Engine(sdn, policy, backend="torch")
    for given in (spoilt(40), spoilt(6)[4:], spoilt(6)[1:2]):
        for limit in (None, 9.0):
            found, right = engine(given, max_cost=limit), plain(given, max_cost=limit)
            same(found, right, but=("confidence_B", "confusion_B", "logits_BC", "labels_B"))
            torch.testing.assert_close(found.logits_BC[right.valid_B], right.logits_BC[right.valid_B])
    assert engine(spoilt(40)).valid_B.tolist() == [False] * 5 + [True] * 35
    assert engine(spoilt(40)).exit_B[:5].tolist() == [2] * 5
    assert len(engine(spoilt(40)).exit_B.unique()) > 1
    with pytest.raises(DataError, match="Logits are not finite for 5 rows"):
        engine.collect((spoilt(40), torch.zeros(40, dtype=torch.int64)))


class Certain(nn.Module):
    """An IC that is sure of everybody, and rules a class out (minus infinity) where the first value is high."""

    def forward(self, x: Tensor) -> Tensor:
        sure, ruled_out = torch.tensor([[9.0, 0.0, 0.0, 0.0]]), torch.tensor([[9.0, 0.0, 0.0, -math.inf]])
        return torch.where(x[:, :1] > 0, ruled_out, sure)


@pytest.mark.parametrize("backend", OTHERS)
def test_nobody_stops_before_the_end_where_logits_are_infinite(backend: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    plan = sd.plan(model, torch.zeros(1, 6), at=(0.3,), classifier=lambda shape, classes: Certain())
    sdn = sd.attach(model, plan).eval()
    found = Engine(sdn, Confidence(threshold=0.5), backend=backend)(rows(20))
    assert found.exit_B.tolist() == (model[0](rows(20))[:, 0] > 0).int().tolist()
    assert len(found.exit_B.unique()) == 2


class Steep(nn.Module):
    """An IC whose logits are almost too large for float32: numbers still."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[3e38, -3e38, -3e38, -3e38]]) + 0 * x[:, :1]


@pytest.mark.parametrize("backend", OTHERS)
def test_large_numbers_are_numbers(backend: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    plan = sd.plan(model, torch.zeros(1, 6), at=(0.3,), classifier=lambda shape, classes: Steep())
    for limit in (None, 9.0):
        found = Engine(sd.attach(model, plan).eval(), Confidence(threshold=0.5), backend=backend)(
            rows(5), max_cost=limit
        )
        assert (found.exit_B.tolist(), found.valid_B.tolist()) == ([0] * 5, [True] * 5)


class Counting(nn.Module):
    """An IC that is traced as one for two rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4] / len(x.tolist())


def test_an_ic_that_cannot_be_a_graph_runs_eagerly_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    plan = sd.plan(model, torch.zeros(1, 6), at=(0.3,), classifier=lambda shape, classes: Counting())
    sdn = sd.attach(model, plan).eval()
    with pytest.raises(BackendError, match=r"^An internal classifier cannot be part of a graph for any number of rows"):
        Engine(sdn, Confidence(threshold=0.5), backend="onnxruntime")
    assert Engine(sdn, Confidence(threshold=0.5)).backend == "torch", "auto takes what runs"


class Layers(nn.Module):
    """The layers of the small networks below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)


class Bessel(Layers):
    """A network with a function that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.special.i0(self.second(self.first(x)) / 10)
        return self.head(hidden)  # type: ignore[no-any-return]


def narrow(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    deep = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, 64), *deep, nn.Linear(64, 4)).to(dtype)


@pytest.mark.parametrize("backend", OTHERS)
def test_what_a_backend_cannot_run_is_said_and_auto_goes_by(backend: Any) -> None:
    sdn = sd.attach(Bessel(), sd.plan(Bessel(), torch.zeros(1, 6), at=(0.3,)))
    with pytest.raises(BackendError, match=r"^The network cannot be an ONNX graph: .*bessel_i0.*\.$"):
        Engine(sdn, Confidence(threshold=0.5), backend=backend)
    half = sd.attach(narrow(), sd.plan(narrow(), torch.zeros(1, 6, dtype=torch.bfloat16), at=(0.3,)))
    with pytest.raises(
        BackendError, match=rf"^The backend '{backend}' cannot run this network: .* Take backend='torch'"
    ):
        Engine(half, Confidence(threshold=0.5), backend=backend)
    for one in (sdn, half):
        assert Engine(one, Confidence(threshold=0.5)).backend == "torch"


class Surer(nn.Module):
    """An IC all but certain of the second class, of some rows more so."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.0, 0.0]) * (25 + 2 * x[:, :1].tanh())


def test_exits_that_are_all_but_certain() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    nn.init.zeros_(model[2].weight)
    model[2].bias.data = torch.tensor([30.0, 0.0, 0.0, 0.0])
    plan = sd.plan(model, torch.zeros(1, 6), at=(0.3,), classifier=lambda shape, classes: Surer())
    sdn = sd.attach(model, plan).eval()
    trace = sd.collect(sdn, (rows(40), torch.zeros(40, dtype=torch.int64)))
    doubt_N = 1 - trace.logits_ENC[0].double().softmax(1)[:, 1]
    parting = Confidence(threshold=float(1 - doubt_N.sort().values[19:21].mean()))
    assert 1 - 1e-9 < parting.at(0) < 1, "nothing of it is left in float32"
    exit_N = sd.simulate(parting, trace).exit_N
    assert torch.equal(Engine(sdn, parting, backend="onnxruntime")(rows(40)).exit_B, exit_N)
    assert int(exit_N.sum()) == 20
    policy = Confidence(threshold=math.inf, fallback="most_confident")
    assert Engine(sdn, policy, backend="onnxruntime")(rows(3)).labels_B.tolist() == [0] * 3
    assert Engine(sdn, policy, backend="openvino")(rows(3)).exit_B.tolist() == [1] * 3


@pytest.mark.parametrize("backend", OTHERS)
def test_half_precision_is_compared_in_its_own_roundings(backend: Any) -> None:
    half = sd.attach(narrow(torch.half), sd.plan(narrow(torch.half), torch.zeros(1, 6, dtype=torch.half), at=(0.3,)))
    engine = Engine(half, Confidence(threshold=math.inf), backend=backend)
    torch.testing.assert_close(
        engine(rows(9).half()).logits_BC, narrow(torch.half)(rows(9).half()), rtol=0.01, atol=0.01
    )


class Branching(Layers):
    """A network that decides inside, for the whole batch, without leaving the graph."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        hidden = torch.cond((hidden.sum() > -1).reshape(()), lambda h: h * 2, lambda h: h + 1, (hidden,))
        return self.head(self.second(hidden).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", OTHERS)
def test_a_network_with_branches_of_its_own(backend: Any) -> None:
    sdn = sd.attach(Branching(), sd.plan(Branching(), torch.zeros(2, 6), at=(0.3,))).eval()
    policy = Confidence(threshold=middle(sdn, rows(20)))
    same(Engine(sdn, policy, backend=backend)(rows(20)), Engine(sdn, policy, backend="torch")(rows(20)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("name", ["residual", "masked_tokens"])
def test_law_3_nasty_networks_on_every_backend(name: str, backend: Any) -> None:
    torch.manual_seed(1)
    sdn, inputs = sd.attach(ZOO[name].make(), planned(name)).eval(), ZOO[name].batch(16)
    policy = Confidence(threshold=middle(sdn, inputs))
    engine = Engine(sdn, policy, backend=backend)
    same(engine(inputs), Engine(sdn, policy, backend="torch")(inputs))
    trace = engine.collect((inputs, torch.zeros(16, dtype=torch.int64)))
    assert trace.info["backend"] == backend
    outcome = sd.simulate(policy, trace)
    assert torch.equal(engine(inputs).exit_B, outcome.exit_N)
    assert len(outcome.exit_N.unique()) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_steps_answer_the_same() -> None:
    policy = Confidence(threshold=middle(tiny(), rows(60)))
    engine = Engine(tiny(), policy, backend="torch-compile")
    for count in (1, 7, 60):
        same(engine(rows(count)), Engine(tiny(), policy, backend="torch")(rows(count)))


@pytest.mark.parametrize("name", ["tiny", pytest.param("residual", marks=pytest.mark.slow)])
def test_nothing_is_compiled_once_an_engine_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, real = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, **choices: real(graph, backend=counter, **choices))
    if name == "tiny":
        sdn, inputs = tiny(), rows(33)
        policy = Confidence(threshold=middle(sdn, inputs))
    else:
        sdn, policy, whole = made(name)
        assert isinstance(whole, Tensor)
        inputs = whole
    engine, plain = Engine(sdn, policy, backend="torch-compile"), Engine(sdn, policy, backend="torch")
    made_with = counter.frame_count
    assert made_with >= 2 * len(engine._program(sdn.plan.inputs).steps), "one row, and more"
    lone = set[int]()
    for part in (inputs[:1], inputs[:2], inputs[:7], inputs, inputs[:1].clone(), *inputs.split(2)):
        same(engine(part), plain(part))
        left = engine(part).exit_B.unique(return_counts=True)[1]
        lone |= {len(left)} if len(part) == 2 else set()
    with torch.inference_mode():
        engine(inputs + 0), engine(inputs[:1] + 0)
    assert lone == {1, 2}, "of two rows one goes on alone, at times"
    assert counter.frame_count == made_with


# ---------------------------------------------------------------- rows in company


def made(name: str = "residual") -> tuple[ShallowDeepNetwork, Confidence, Inputs]:
    torch.manual_seed(1)
    sdn, inputs = sd.attach(ZOO[name].make(), planned(name)).eval(), ZOO[name].batch(33)
    return sdn, Confidence(threshold=middle(sdn, inputs), fallback="most_confident"), inputs


@pytest.mark.parametrize("name", ["residual", "masked_tokens"])
@pytest.mark.parametrize("way", ["keep", "fill"])
def test_rows_that_are_computed_on_or_twice_change_nothing(name: str, way: str, monkeypatch: Any) -> None:
    sdn, policy, inputs = made(name)
    engine = Engine(sdn, policy, backend="torch")
    expected = engine(inputs)
    sizes: list[tuple[int, int, int]] = []

    def size(self: StepTimes, place: int, alive: int, present: int) -> int:
        sizes.append((place, alive, present))
        return present if way == "keep" else min(-(-alive // 8) * 8, present)

    monkeypatch.setattr(StepTimes, "size", size)
    monkeypatch.setattr(StepTimes, "chunk", lambda self, batch: batch)
    engine._times[engine.sdn.plan.inputs] = StepTimes(sizes=(1,), ms_PS=((1.0,),), move_ms_P=(0.0,))
    same(engine(inputs), expected)
    assert any(alive < present for _, alive, present in sizes)
    assert way == "keep" or any(alive % 8 for _, alive, _ in sizes)
    assert way == "fill" or {present for *_, present in sizes} == {33}


def test_large_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    sdn, policy, inputs = made()
    engine = Engine(sdn, policy, backend="torch")
    expected = engine(inputs)
    monkeypatch.setattr(engine_module, "ROWS_AT_ONCE", 4)
    parts: list[int] = []
    real = loop.walk
    monkeypatch.setattr(engine_module, "walk", lambda *args: parts.append(args[2]) or real(*args))
    same(engine(inputs), expected)
    assert parts == [4] * 8 + [1]


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("name", ["residual", "control_flow"])
def test_no_row_spends_more_than_it_may(name: str) -> None:
    sdn, policy, inputs = made(name)
    engine = Engine(sdn, policy, backend="torch")
    free, trace = engine(inputs), sd.collect(sdn, (inputs, torch.zeros(33, dtype=torch.int64)))
    assert not free.capped_B.any()
    cost = sdn.plan.cost_E[1] + 1e-9
    answer = engine(inputs, max_cost=cost)
    assert float(answer.cost_B.max()) <= cost < float(free.cost_B.max())
    assert torch.equal(answer.capped_B, free.exit_B > 1)
    assert torch.equal(answer.exit_B, free.exit_B.clamp(max=1))
    torch.testing.assert_close(answer.logits_BC[answer.capped_B], trace.logits_ENC[1][answer.capped_B])
    same(engine(inputs, max_cost=9.0), free)
    with pytest.raises(ValueError, match=rf"max_cost=0\.01 is below {sdn.plan.cost_E[0]:.3f}, the cost of the first"):
        engine(inputs, max_cost=0.01)


def test_no_step_is_begun_that_would_end_too_late() -> None:
    sdn, _, inputs = made()
    engine = Engine(sdn, Confidence(threshold=math.inf), backend="torch")
    engine._times[engine.sdn.plan.inputs] = StepTimes(
        sizes=(1,), ms_PS=((1.0,), (1.0,), (1e6,), (1.0,), (1.0,)), move_ms_P=(0.0,) * 5
    )
    answer = engine(each(inputs, lambda tensor: tensor[:1]), max_ms=1e4)
    assert (answer.exit_B.tolist(), answer.capped_B.tolist()) == ([1], [True])
    with pytest.raises(ValueError, match=r"max_ms=0\.5 is below 1\.000, the time to the first exit"):
        engine(each(inputs, lambda tensor: tensor[:1]), max_ms=0.5)
    engine._times.clear()
    assert engine(inputs, max_ms=1e6).capped_B.tolist() == [False] * 33
    assert engine._times, "measured when a limit in time is first asked for"


def test_a_network_without_steps_has_no_times_and_comes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sdn, _, inputs = made("control_flow")
    engine = Engine(sdn, Confidence(threshold=0.5), backend="torch")
    for refused in (lambda: engine.measure(), lambda: engine(inputs, max_ms=1e3)):
        with pytest.raises(CutError, match="has no steps to measure"):
            refused()
    whole, seen = engine(inputs), list[int]()
    monkeypatch.setattr(engine_module, "ROWS_AT_ONCE", 10)
    sdn.backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    parts = engine(inputs)
    assert seen == [10, 10, 10, 3]
    assert torch.equal(parts.exit_B, whole.exit_B)
    assert torch.equal(parts.labels_B, whole.labels_B)
    torch.testing.assert_close(parts.logits_BC, whole.logits_BC)


def test_a_policy_of_another_precision_is_warned_of() -> None:
    record = CalibrationRecord(info={"backend": "openvino-bf16"})
    with pytest.warns(UserWarning, match="The policy was made for answers of another precision than torch's"):
        Engine(tiny(), Confidence(threshold=0.5, calibrated_on=record), backend="torch")
    for backend in ("torch", "onnxruntime"):
        same_precision = CalibrationRecord(info={"backend": backend})
        Engine(tiny(), Confidence(threshold=0.5, calibrated_on=same_precision), backend="torch")


def test_auto_times_the_way_that_calls_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose graph answers at once is not judged by its separate steps."""
    walked = list[int]()
    real = loop.walk
    monkeypatch.setattr(engine_module, "walk", lambda *given: walked.append(given[2]) or real(*given))
    monkeypatch.setattr(engine_module, "measure", lambda *_: pytest.fail("steps are timed"))
    sdn, policy, _ = made()
    Engine(sdn, policy)
    assert set(walked) == {1, 32}


def test_times_are_of_one_shape_of_inputs() -> None:
    """What holds for small images does not for large ones: they are measured when a limit is first asked for."""
    sdn, _, inputs = made("residual")
    engine = Engine(sdn, Confidence(threshold=0.5), backend="torch")
    assert isinstance(inputs, Tensor)
    small, large = inputs[:3], torch.nn.functional.interpolate(inputs[:3], scale_factor=2)
    for batch, known in ((small, 1), (small, 1), (large, 2)):
        engine(batch, max_ms=1e4)
        assert len(engine._times) == known


# ---------------------------------------------------------------- choosing a backend


class Slow(OnTorch):
    """PyTorch after a nap."""

    name = "slow"

    def compile(self, step: Any, example: Sequence[Tensor]) -> Any:
        run = super().compile(step, example)
        return lambda arrays: (time.sleep(0.02), run(arrays))[1]


class Wrong(OnTorch):
    """PyTorch with a hundredth more."""

    def compile(self, step: Any, example: Sequence[Tensor]) -> Any:
        run = super().compile(step, example)
        return lambda arrays: [x * 1.01 if x.is_floating_point() else x for x in run(arrays)]


def test_auto_takes_the_quickest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs_module, "OnOnnxRuntime", lambda threads: Slow(torch.device("cpu")))
    monkeypatch.setattr(programs_module, "OnOpenVino", lambda threads: Wrong(torch.device("cpu")))
    engine = Engine(tiny(), Fixed(exit=2))
    assert type(engine._backend) is OnTorch
    monkeypatch.setattr(programs_module, "OnTorch", lambda device: Slow(device))
    monkeypatch.setattr(programs_module, "OnOnnxRuntime", lambda threads: OnTorch(torch.device("cpu")))
    assert type(Engine(tiny(), Fixed(exit=2))._backend) is OnTorch


@pytest.mark.parametrize("best", ["onnxruntime", "torch"])
def test_auto_measures_all_with_as_many_threads(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}

    def seconds(program: Any, *args: Any) -> float:
        seen[program.backend.name] = getattr(program.backend, "threads", torch.get_num_threads())
        return 1.0 if program.backend.name == best else 2.0

    monkeypatch.setattr(engine_module, "_walk_seconds", seconds)
    with threads_of_torch(2):
        if best == "torch":
            with pytest.warns(
                UserWarning, match=r"PyTorch has 2 in this process. Call torch.set_num_threads\(1\) first"
            ):
                engine = Engine(tiny(), Fixed(exit=2), threads=1)
        else:
            engine = Engine(tiny(), Fixed(exit=2), threads=1)
        assert torch.get_num_threads() == 2
    assert (engine.backend, engine.threads) == (best, 2 if best == "torch" else 1)
    assert set(seen.values()) == {1}, seen
    assert {"torch", "onnxruntime"} <= seen.keys()


def test_a_backend_that_computes_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs_module, "OnOpenVino", lambda threads: Wrong(torch.device("cpu")))
    with pytest.raises(BackendError, match=r"'torch' computes 'logits\.0' of exit 0 wrongly: 0\.01 away from PyTorch"):
        Engine(tiny(), Confidence(threshold=0.5), backend="openvino")


def test_openvino_has_a_graph_for_one_row_unless_the_network_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[int]] = []
    real = OnOpenVino.load

    def load(self: Any, model: Any, gives: Any, *, alone: bool) -> Any:
        axis = model.graph.input[0].type.tensor_type.shape.dim[0]
        if alone:
            found[-1].append(axis.dim_value)
        return real(self, model, gives, alone=alone)

    monkeypatch.setattr(OnOpenVino, "load", load)
    policy, answers = policies()["confidence"], []
    for megabytes in (64, 0):
        monkeypatch.setattr(on_openvino, "SMALL_MB", megabytes)
        found.append([])
        engine = Engine(tiny(), policy, backend="openvino")
        answers.append([engine(row) for row in (*rows(20).split(1), rows(20))])
    assert found == [[0, 1], [0]]
    for own, other in zip(*answers, strict=True):
        assert own.exit_B.tolist() == other.exit_B.tolist()
        torch.testing.assert_close(own.logits_BC, other.logits_BC)
    assert len({int(one.exit_B) for one in answers[0][:-1]}) > 1


@pytest.mark.parametrize(("backend", "extra"), [("onnxruntime", "export"), ("openvino", "openvino")])
def test_a_backend_that_is_absent(backend: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(MissingExtra, match=rf"'{backend}' is not installed: pip install 'shallowdeep\[{extra}\]'"):
        Engine(tiny(), Fixed(exit=2), backend=backend)


def test_what_cannot_be_exported_runs_in_torch_alone() -> None:
    sdn, policy, _ = made("control_flow")
    assert Engine(sdn, policy).backend == "torch"
    for backend in ("onnxruntime", "openvino", "torch-compile"):
        with pytest.raises(CutError, match="cannot be exported, so only the backend 'torch' runs it"):
            Engine(sdn, policy, backend=backend)  # type: ignore[arg-type]


def test_a_trace_of_the_engine_is_that_of_the_network() -> None:
    data = images(20), torch.zeros(20, dtype=torch.int64)
    for name in ("residual", "control_flow"):
        sdn, policy, _ = made(name)
        found, expected = Engine(sdn, policy, backend="torch").collect(data, batch_size=8), sd.collect(sdn, data)
        torch.testing.assert_close(found.logits_ENC, expected.logits_ENC)
        assert torch.equal(found.hash_N, expected.hash_N)  # type: ignore[arg-type]


def test_a_trace_under_a_policy_that_remembers() -> None:
    data = rows(9), torch.zeros(9, dtype=torch.int64)
    found = Engine(tiny(), Patience(patience=2), backend="torch").collect(data)
    torch.testing.assert_close(found.logits_ENC, sd.collect(tiny(), data).logits_ENC)


def test_a_hidden_layer_that_begins_after_the_first_exit() -> None:
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    small = sd.plan(model, torch.zeros(1, 6), at=("0:out", "1:out", "2:out"))
    first = dataclasses.replace(small.classifiers[0], hidden=0)
    later = [dataclasses.replace(spec, fed_hidden=0) for spec in small.classifiers[1:2]]
    mixed = dataclasses.replace(small, classifiers=(first, *later, *small.classifiers[2:]))
    sdn = sd.attach(model, mixed).eval()
    policy = Confidence(threshold=math.inf)
    assert Engine(sdn, policy, backend="torch")(rows(5)).exit_B.tolist() == [3] * 5


# ---------------------------------------------------------------- times


TIMES = StepTimes(sizes=(1, 8, 64), ms_PS=((1.0, 4.0, 32.0), (2.0, 2.5, 64.0)), move_ms_P=(0.0, 0.1))


def test_times_lie_on_lines() -> None:
    assert [TIMES.ms(0, n) for n in (1, 4, 8, 36, 64, 128)] == pytest.approx([1, 1 + 9 / 7, 4, 18, 32, 64])
    assert TIMES.up_to(1, 8) == 6.5


def test_which_size_is_quickest() -> None:
    assert TIMES.size(1, 60, 64) == 64, "moving 60 rows costs more than 4 answered ones"
    assert TIMES.size(1, 8, 64) == 8
    assert TIMES.size(1, 7, 64) == 7
    steep = StepTimes(sizes=(1, 8, 64), ms_PS=((1.0, 9.0, 9.0), (1.0, 1.0, 64.0)), move_ms_P=(0.0, 0.0))
    assert steep.size(1, 3, 9) == 3
    jagged = StepTimes(sizes=(4, 5, 8), ms_PS=((0.0,) * 3, (5.0, 9.0, 4.0)), move_ms_P=(0.0, 0.0))
    assert jagged.size(1, 5, 64) == 8, "some rows are computed twice where that is quicker"
    assert jagged.size(1, 64, 64) == 64


def test_into_which_parts_a_batch_is_cut() -> None:
    assert TIMES.chunk(1) == 1
    assert TIMES.chunk(1000) == 8
    assert TIMES.chunk(64) == 64, "within the sizes measured nothing is cut"
    assert StepTimes(sizes=(1, 8), ms_PS=((1.0, 4.0),), move_ms_P=(0.0,)).chunk(1000) == 8, "memory stays bounded"


def test_what_cannot_be_measured() -> None:
    engine = Engine(tiny(), Confidence(threshold=0.5), backend="torch")
    for sizes, rounds in (((), 1), ((0, 4), 1), ((4,), 0)):
        with pytest.raises(ValueError, match="Give sizes and rounds of at least 1, found sizes"):
            engine.measure(sizes=sizes, rounds=rounds)


def test_a_network_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = narrow(torch.float32)
        sdn = sd.attach(model, sd.plan(model, torch.zeros(1, 6), at=(0.3,)))
    answer = Engine(sdn, Confidence(threshold=math.inf), backend="torch")(rows(4))
    with torch.no_grad():
        torch.testing.assert_close(answer.logits_BC, model(rows(4)))


def test_limits_that_are_no_number() -> None:
    engine = Engine(tiny(), Confidence(threshold=0.5), backend="torch")
    engine._times[engine.sdn.plan.inputs] = StepTimes((1, 8), ((1.0, 2.0),) * 3, (0.0,) * 3)
    for limit in (math.nan, -1.0, 0.5):
        with pytest.raises(ValueError, match=r"is below 1\.000, the time to the first exit"):
            engine(rows(1), max_ms=limit)


@pytest.mark.parametrize("backend", OTHERS)
def test_tensors_that_are_views_of_another_sign(backend: Any) -> None:
    engine = Engine(tiny(), Confidence(threshold=0.5), backend=backend)
    same(engine(torch._neg_view(rows(3))), engine(-rows(3)))


@pytest.mark.parametrize("backend", OTHERS)
def test_one_row_after_another_leaves_those_before_alone(backend: Any) -> None:
    sdn, policy, given = tiny(), Confidence(threshold=0.5), rows(5)
    engine, before = Engine(sdn, policy, backend=backend), given.clone()
    found = [engine(given[i : i + 1]) for i in (0, 1, 2, 3, 4, 0)]
    assert torch.equal(given, before)
    right = Engine(sdn, policy, backend="torch")(given[[0, 1, 2, 3, 4, 0]])
    assert torch.equal(torch.cat([one.exit_B for one in found]), right.exit_B)
    torch.testing.assert_close(torch.cat([one.logits_BC for one in found]), right.logits_BC)


def test_engines_measure_themselves() -> None:
    sdn, policy, inputs = made()
    engine = Engine(sdn, policy, backend="torch")
    before = engine(inputs)
    times = engine.measure(inputs, sizes=(1, 16), rounds=2)
    assert (len(times.ms_PS), times.sizes) == (sdn.num_exits, (1, 16))
    assert all(ms > 0 for step in times.ms_PS for ms in step)
    same(engine(inputs), before)
    with pytest.raises(DataError, match="To measure batches of 64 give as many rows, found 33"):
        engine.measure(inputs, sizes=(1, 64))
