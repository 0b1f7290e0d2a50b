"""Second looks: an exit behind the backbone's own in traces, engines, exports and benches; and views that fail."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shallowdeep as sd
from nets import CLASSES, ZOO
from shallowdeep import views
from shallowdeep.effects import answers
from shallowdeep.export import export_file, export_folder, export_programs
from shallowdeep.host import EarlyExits
from shallowdeep.inputs import Inputs, each, take, tensors
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import CalibrationRecord, Confidence, Fixed, Patience, Policy
from shallowdeep.runtime.bench import bench, verdict
from shallowdeep.runtime.engine import Engine
from shallowdeep.tuning import MachineCosts, machine_costs, tune
from shallowdeep.types import BackendError, DataError, Trace
from shallowdeep.views import SecondLook, check_view, mirror, second_look_of
from test_export import openvino_of
from test_export import same as same_export

ROWS = 96
SLOW = pytest.mark.slow


def shifted(inputs: Inputs) -> Inputs:
    """A view of the user's own, for whatever has floating inputs of two axes or more."""
    return each(inputs, lambda x: x + x.roll(1, 1) / 8 if x.is_floating_point() and x.ndim > 1 else x)


def reversed_ids(inputs: Inputs) -> Inputs:
    assert isinstance(inputs, dict)
    return inputs | {"input_ids": 50 - inputs["input_ids"]}


VIEWS_OF: dict[str, Any] = {"masked_tokens": reversed_ids, "batch_length": shifted}


@cache
def made(name: str) -> tuple[ShallowDeepNetwork, Inputs, Tensor]:
    """A zoo member in float64 with ICs that know a little, rows and labels."""
    inputs = ZOO[name].batch(ROWS, torch.float64)
    sdn = sd.attach(ZOO[name].make().double(), sd.plan(ZOO[name].make().double(), take(inputs, slice(0, 2)))).eval()
    return sdn, inputs, _taught(sdn, inputs)


@cache
def small() -> tuple[ShallowDeepNetwork, Tensor, Tensor]:
    """Two convolutions in float32 whose answers differ from row to row: nobody lies within rounding of a threshold."""
    torch.manual_seed(3)
    convolutions = [nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(150, CLASSES)).eval()
    inputs = 3 * torch.randn(ROWS, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    sdn = sd.attach(model, sd.plan(model, inputs[:2], at=(0.3, 0.9))).eval()
    return sdn, inputs, _taught(sdn, inputs)


def _taught(sdn: ShallowDeepNetwork, inputs: Inputs) -> Tensor:
    """Labels that the backbone gets right for three rows of four; the ICs have learnt what it says."""
    with torch.no_grad():
        labels = sdn(inputs)[-1].argmax(1)
    torch.manual_seed(0)
    sd.train_exits(sdn, (inputs, labels), epochs=2)
    labels[::4] = (labels[::4] + 1) % CLASSES
    return labels


def policies(trace: Trace) -> list[Policy]:
    """Thresholds midway between neighbouring scores, so that rows leave at every exit."""
    ordered_EN, at = trace.logits_ENC.double().softmax(-1).amax(-1).sort(1).values, int(0.7 * trace.num_samples)
    levels = tuple(((ordered_EN[:-1, at] + ordered_EN[:-1, at + 1]) / 2).tolist())
    some = tuple(exit % 2 == 1 for exit in range(trace.num_exits - 1))
    return [
        Confidence(threshold=levels),
        Confidence(threshold=levels, fallback="most_confident"),
        Confidence(threshold=levels, enabled_E=(*some, True), fallback="most_confident"),
        Confidence(threshold=levels, enabled_E=(*some, False)),
        Patience(patience=1),
        *(Fixed(exit=exit) for exit in (trace.full_exit, trace.full_exit + 1)),
    ]


# ---------------------------------------------------------------- traces


def test_the_trace_has_one_exit_more() -> None:
    sdn, inputs, labels = made("residual")
    plain, trace = sd.collect(sdn, (inputs, labels)), sd.collect(sdn, (inputs, labels), second_look="mirror")
    assert isinstance(inputs, Tensor)
    full = plain.full_exit
    with torch.no_grad():
        both = torch.stack([sdn.backbone(x).log_softmax(1) for x in (inputs, inputs.flip(3))])
    torch.testing.assert_close(trace.logits_ENC[-1], both.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(trace.logits_ENC[:-1], plain.logits_ENC)
    assert (trace.full_exit, trace.exit_names) == (full, (*plain.exit_names, "full+mirror"))
    assert trace.cost_E.tolist() == [*plain.cost_E.tolist(), plain.cost_E.tolist()[full] + 1]
    assert trace.own_cost_E is not None
    assert trace.own_cost_E[-1] == 0
    assert trace.info["second_look"] == "mirror"
    assert "second_look" not in plain.info
    assert torch.equal(trace.hash_N, plain.hash_N)  # type: ignore[arg-type]


def test_the_end_is_the_full_exit() -> None:
    sdn, inputs, labels = made("residual")
    plain, trace = sd.collect(sdn, (inputs, labels)), sd.collect(sdn, (inputs, labels), second_look="mirror")
    found, before = sd.overthinking(trace), sd.overthinking(plain)
    for field, value in vars(before).items():
        now = getattr(found, field)
        assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, field
    assert torch.equal(sd.confusion(trace), sd.confusion(plain))
    assert len(answers(trace)) == len(answers(plain)) + 1
    policy = Confidence(threshold=0.5, enabled_E=(True,) * plain.num_exits + (False,))
    with_look, without = sd.simulate(policy, trace), sd.simulate(dataclasses.replace(policy, enabled_E=None), plain)
    assert torch.equal(with_look.exit_N, without.exit_N)
    assert torch.equal(with_look.cost_N, without.cost_N)


def test_confusion_is_standardised_once_it_was_fitted_on_second_looks(tmp_path: Path) -> None:
    sdn, inputs, labels = made("residual")
    sdn = copy.deepcopy(sdn)
    sd.fit_confusion(sdn, sd.collect(sdn, (inputs, labels)))
    assert sd.collect(sdn, (inputs, labels), second_look="mirror").confusion_reference is None, "one exit is unknown"
    sd.fit_confusion(sdn, sd.collect(sdn, (inputs, labels), second_look="mirror"))
    trace, plain = sd.collect(sdn, (inputs, labels), second_look="mirror"), sd.collect(sdn, (inputs, labels))
    assert sd.confusion(trace).mean().abs() < 1e-6
    assert torch.equal(sd.confusion(trace), sd.confusion(plain)), "moments of exits before do not change"
    policy = Confidence(threshold=math.inf)
    answer = Engine(sdn, policy, second_look="mirror", backend="torch")(inputs)
    torch.testing.assert_close(answer.confusion_B, sd.simulate(policy, trace).confusion_N, rtol=1e-9, atol=1e-9)
    assert answer.confusion_B.mean().abs() < 1e-6
    sd.save(sdn, tmp_path)
    back = sd.load(tmp_path, sdn.backbone)
    assert torch.equal(back.confusion_mean_EE, sdn.confusion_mean_EE)


# ---------------------------------------------------------------- law 3


@pytest.mark.parametrize(
    "name", ["residual", pytest.param("masked_tokens", marks=SLOW), "control_flow", "batch_length"]
)
def test_law_3_engine_answers_as_simulate(name: str) -> None:
    sdn, inputs, labels = made(name)
    view = VIEWS_OF.get(name, "mirror")
    trace = sd.collect(sdn, (inputs, labels), second_look=view)
    left_at: set[int] = set()
    for policy in policies(trace):
        outcome = sd.simulate(policy, trace)
        engine = Engine(sdn, policy, second_look=view, backend="torch")
        answer = engine(inputs)
        assert torch.equal(answer.exit_B, outcome.exit_N), policy
        assert torch.equal(answer.labels_B, outcome.labels_N), policy
        assert torch.equal(answer.cost_B, outcome.cost_N), policy
        torch.testing.assert_close(answer.logits_BC, outcome.logits_NC, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(answer.confusion_B, outcome.confusion_N, rtol=1e-9, atol=1e-9)
        one = engine(take(inputs, slice(0, 1)))
        assert one.labels_B.tolist() == outcome.labels_N[:1].tolist()
        left_at |= set(answer.exit_B.tolist())
        if sdn.plan.via == "export" and isinstance(policy, (Confidence, Patience)):
            parts = [take(inputs, slice(start, start + 5)) for start in range(0, ROWS, 5)]
            streamed = [part for part in engine.map(parts, batch_size=16) if not isinstance(part, Exception)]
            assert torch.equal(torch.cat([part.exit_B for part in streamed]), outcome.exit_N), policy
            logits_BC = torch.cat([part.logits_BC for part in streamed])
            torch.testing.assert_close(logits_BC, outcome.logits_NC, rtol=1e-12, atol=1e-12)
    assert left_at == set(range(trace.num_exits)), "a run in which rows do not leave everywhere checks nothing"
    again = Engine(sdn, Fixed(exit=0), second_look=view, backend="torch").collect((inputs, labels))
    torch.testing.assert_close(again.logits_ENC, trace.logits_ENC, rtol=1e-12, atol=1e-12)
    assert (again.exit_names, again.full_exit, again.info) == (trace.exit_names, trace.full_exit, trace.info)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_law_3_on_other_backends(backend: Any) -> None:
    sdn, inputs, labels = small()
    policy = policies(sd.collect(sdn, (inputs, labels), second_look="mirror"))[0]
    engine = Engine(sdn, policy, second_look="mirror", backend=backend)
    trace = engine.collect((inputs, labels))
    assert trace.info["backend"] == backend
    outcome = sd.simulate(policy, trace)
    for answer in (engine(inputs), Engine(sdn, policy, second_look="mirror", backend="torch")(inputs)):
        assert torch.equal(answer.exit_B, outcome.exit_N)
        torch.testing.assert_close(answer.logits_BC, outcome.logits_NC, rtol=1e-4, atol=1e-4)
    assert set(outcome.exit_N.tolist()) == set(range(trace.num_exits))
    for row in range(8):
        assert int(engine(take(inputs, slice(row, row + 1))).exit_B) == int(outcome.exit_N[row])


@pytest.mark.parametrize("name", ["residual", "control_flow"])
def test_limits_stop_before_the_second_look(name: str) -> None:
    sdn, inputs, labels = made(name)
    trace = sd.collect(sdn, (inputs, labels), second_look="mirror")
    policy = policies(trace)[0]
    engine, outcome = Engine(sdn, policy, second_look="mirror", backend="torch"), sd.simulate(policy, trace)
    answer = engine(inputs, max_cost=1.5)
    assert torch.equal(answer.exit_B, outcome.exit_N.clamp(max=trace.full_exit))
    assert torch.equal(answer.capped_B, outcome.exit_N > trace.full_exit)
    assert answer.capped_B.any()
    assert not engine(inputs, max_cost=2.5).capped_B.any()


@pytest.mark.parametrize("name", ["residual", "control_flow"])
def test_rows_of_broken_logits_are_not_looked_at_again(name: str) -> None:
    sdn, inputs, _ = made(name)
    assert isinstance(inputs, Tensor)
    broken = inputs[:7].clone()
    broken[[1, 4]] = math.nan
    answer = Engine(sdn, Confidence(threshold=math.inf), second_look="mirror", backend="torch")(broken)
    full = sdn.num_exits - 1
    assert answer.exit_B.tolist() == [full + 1, full, full + 1, full + 1, full, full + 1, full + 1]
    assert answer.valid_B.tolist() == [True, False, True, True, False, True, True]


# ---------------------------------------------------------------- policies and views that do not fit


def test_a_policy_runs_with_its_own_view_only() -> None:
    sdn, inputs, labels = made("residual")
    trace = sd.collect(sdn, (inputs, labels), second_look="mirror")
    asked = tuple(exit <= trace.full_exit for exit in range(trace.num_exits))
    frugal = Confidence(threshold=0.5, enabled_E=asked, calibrated_on=CalibrationRecord())
    Engine(sdn, frugal, backend="torch")  # it does not ask for the view, which need not be there
    policy = Confidence(threshold=0.5, calibrated_on=CalibrationRecord(info={"second_look": "mirror"}))
    Engine(sdn, policy, second_look=mirror, backend="torch")
    with pytest.raises(ValueError, match=r"'mirror' and shall run without one: give second_look='mirror'\."):
        Engine(sdn, policy, backend="torch")
    with pytest.raises(ValueError, match=r"'mirror' and shall run with 'test_views\.shifted': give"):
        Engine(sdn, policy, second_look=shifted, backend="torch")
    with pytest.raises(ValueError, match="without a second look and shall run with 'mirror': leave second_look out"):
        check_view(Confidence(threshold=0.5, calibrated_on=CalibrationRecord()), second_look_of("mirror"))
    check_view(Confidence(threshold=0.5), second_look_of("mirror"))


def test_a_policy_of_more_exits_than_there_are() -> None:
    sdn, _, _ = made("residual")
    exits = sdn.num_exits
    with pytest.raises(ValueError, match=f"enabled_E has {exits + 1} entries; {exits} exits need {exits}"):
        Engine(sdn, Confidence(threshold=0.5, enabled_E=(True,) * (exits + 1)), backend="torch")
    with pytest.raises(ValueError, match=f"Confidence has {exits + 1} thresholds; {exits} exits need {exits - 1}"):
        Engine(sdn, Confidence(threshold=(0.5,) * (exits + 1)), backend="torch")
    with pytest.raises(ValueError, match=f"Fixed.exit={exits}.: exits are 0..{exits - 1}"):
        Engine(sdn, Fixed(exit=exits), backend="torch")


def _in_place(x: Any) -> Any:
    return x.neg_()


BAD: list[tuple[Any, str]] = [
    (lambda x: x + torch.randn_like(x), "is not deterministic"),
    (lambda x: x - x.mean(0), "does not treat rows one by one: parts"),
    (lambda x: x * torch.arange(len(x))[:, None, None, None].to(x), "does not treat rows one by one"),
    (lambda x: x.roll(1, 0), "does not treat rows one by one"),
    (_in_place, "changes its argument"),
    (lambda x: x[..., 1:], "must keep kinds, shapes and dtypes"),
    (lambda x: x.float(), "must keep kinds, shapes and dtypes"),
    (lambda x: x[:1], "must keep kinds, shapes and dtypes"),
]


@pytest.mark.parametrize(("view", "sentence"), BAD)
def test_views_that_would_change_answers(view: Any, sentence: str) -> None:
    sdn, inputs, labels = made("residual")
    inputs = each(inputs, torch.clone)
    with pytest.raises(DataError, match=f"The view .* {sentence}"):
        sd.collect(sdn, (inputs, labels), second_look=view)
    with pytest.raises(DataError, match=f"The view .* {sentence}"):
        Engine(sdn, Fixed(exit=0), second_look=view, backend="torch")


def test_views_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"No view 'miror'\. Views: mirror; or give a function"):
        second_look_of("miror")
    with pytest.raises(TypeError, match="name of a view or a function of a batch, found int"):
        second_look_of(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"'mirror' flips images \[B, C, H, W\]; found shapes \[\(2, 32, 32, 3\)\]"):
        mirror(torch.zeros(2, 32, 32, 3))
    sdn, inputs, labels = made("masked_tokens")
    with pytest.raises(DataError, match="'mirror' flips images"):
        sd.collect(sdn, (inputs, labels), second_look="mirror")
    look = second_look_of(shifted)
    assert look is not None
    assert look.name == "test_views.shifted"
    assert second_look_of(look) is look


def test_a_view_that_cannot_be_traced_runs_eagerly_alone() -> None:
    sdn, inputs, labels = small()

    def through_numpy(x: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x.numpy()[..., ::-1]))

    policy = policies(sd.collect(sdn, (inputs, labels), second_look=through_numpy))[0]
    engine = Engine(sdn, policy, second_look=through_numpy)
    assert engine.backend == "torch", "auto takes what runs"
    by_name = Engine(sdn, policy, second_look="mirror", backend="torch")
    assert torch.equal(engine(inputs).logits_BC, by_name(inputs).logits_BC)
    with pytest.raises(BackendError, match=r"through_numpy' cannot be part of a graph: only the backend 'torch' runs"):
        Engine(sdn, policy, second_look=through_numpy, backend="onnxruntime")


# ---------------------------------------------------------------- exports, bench, tuning


@pytest.mark.parametrize("which", [2, pytest.param(0, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_law_4_exports_look_twice(which: int, tmp_path: Path) -> None:
    sdn, inputs, labels = small()
    policy = policies(sd.collect(sdn, (inputs, labels), second_look="mirror"))[which]
    engine = Engine(sdn, policy, second_look="mirror", backend="torch")
    export_folder(sdn, policy, tmp_path / "folder", inputs, second_look="mirror")
    export_file(sdn, policy, tmp_path / "file", inputs, second_look="mirror")
    manifest = json.loads((tmp_path / "folder/manifest.json").read_text())
    assert manifest["second_look"] == "mirror"
    assert (manifest["full_exit"], manifest["exits"][-1]["name"]) == (sdn.num_exits - 1, "full+mirror")
    folder, single = EarlyExits(tmp_path / "folder"), openvino_of(tmp_path / "file/model.onnx")
    for size in (1, 2, 7, ROWS):
        batch = take(inputs, slice(0, size))
        arrays = [leaf.numpy() for leaf in tensors(batch)]
        same_export(folder(*arrays), engine(batch))
        same_export(single(*arrays), engine(batch))
    assert int(engine(inputs).exit_B.max()) == sdn.num_exits
    export_programs(sdn, policy, tmp_path / "programs", inputs, second_look="mirror")
    assert (tmp_path / f"programs/step{len(manifest['steps']) - 1}.pt2").is_file()
    bound = Confidence(threshold=0.5, calibrated_on=CalibrationRecord(info={"second_look": "mirror"}))
    with pytest.raises(ValueError, match="and shall run without one"):
        export_folder(sdn, bound, tmp_path / "none", inputs)
    assert not (tmp_path / "none").exists()


def test_the_bench_knows_rows_that_look_twice() -> None:
    sdn, inputs, labels = small()
    policy = policies(sd.collect(sdn, (inputs, labels), second_look="mirror"))[0]
    found = bench(
        sdn,
        policy,
        (inputs, labels),
        backends=("torch",),
        batch_sizes=(8,),
        threads=(1,),
        blocks=3,
        second_look="mirror",
    )
    others = found["measured"][0]["other_ms"]
    assert {"full", "every", "twice", "mirror every row"} <= others.keys()
    assert others["twice"] > others["every"]
    outcome = sd.simulate(policy, sd.collect(sdn, (inputs, labels), second_look="mirror"))
    assert found["share_twice"] == pytest.approx(float((outcome.exit_N == sdn.num_exits).double().mean()))
    assert found["mean_cost"] == pytest.approx(float(outcome.cost_N.mean()))
    both = sd.simulate(Fixed(exit=sdn.num_exits), sd.collect(sdn, (inputs, labels), second_look="mirror"))
    assert found["accuracy_others"]["mirror every row"] == float((both.labels_N == labels).double().mean())
    assert "full+mirror" in found["exits_asked"]
    assert verdict(found).startswith("batch 8, 1 threads")


def test_tuning_counts_the_second_look() -> None:
    sdn, _, _ = small()
    costs = machine_costs(sdn, second_look="mirror", backend="torch", rounds=1)
    assert costs.reach_ms_E.shape == (sdn.num_exits + 1,)
    assert costs.own_ms_E[-2:].tolist() == [0, 0]
    assert costs.reach_ms_E[-1] > costs.reach_ms_E[-2]
    # Where the last exit alone knows anything, an aim above the full network's accuracy needs it.
    labels_N = torch.arange(400) % CLASSES
    right_NC = torch.nn.functional.one_hot(labels_N, CLASSES).float()
    wrong_NC = right_NC.roll(1, 1)
    wrong_NC[::2] = 5 * right_NC[::2]
    logits_ENC = torch.stack([wrong_NC, wrong_NC, 9 * right_NC])
    trace = Trace(logits_ENC=logits_ENC, labels_N=labels_N, cost_E=torch.tensor([0.5, 1.0, 2.0]), full_exit=1)
    timed = MachineCosts(
        backend="torch",
        batch_size=1,
        full_ms=1.0,
        reach_ms_E=torch.tensor([0.5, 1.0, 2.0]).double(),
        own_ms_E=torch.zeros(3).double(),
    )
    policy = tune(sdn, trace, timed, max_accuracy_drop=-0.4).policy
    assert policy.asks(3, 1)[2]
    assert float((sd.simulate(policy, trace).labels_N == labels_N).double().mean()) > 0.9


def test_the_examples_run() -> None:
    assert doctest.testmod(views).failed == 0
    assert isinstance(second_look_of("mirror"), SecondLook)
