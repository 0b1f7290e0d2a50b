"""Engines: they skip work and nothing else, and refuse in one sentence what they cannot answer."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import defaultdict
from functools import cache, partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import shallowdeep as sd
from nets import CLASSES, ZOO, images, planned, token_batch
from shallowdeep.inputs import Inputs, each, num_rows
from shallowdeep.network import ShallowDeepNetwork, fingerprint, weights_hash
from shallowdeep.policies import CalibrationRecord, Confidence, Entropy, Fixed, Oracle, Patience, Policy
from shallowdeep.runtime import engine as engine_module
from shallowdeep.spelling import from_json, rule_to_json, to_json
from shallowdeep.steps import Step, make_steps, needed_ics
from shallowdeep.trajectory import Alarm
from shallowdeep.types import Answer, BackboneMismatch, DataError
from test_certificates import PROVED

Engine = partial(sd.Engine, backend="torch")  # test_backends.py compares the others with it
NEVER, ALWAYS = Confidence(threshold=float("inf")), Confidence(threshold=0.0)


def made(name: str = "residual", classifier: Literal["strong", "paper"] = "strong") -> ShallowDeepNetwork:
    torch.manual_seed(1)
    return sd.attach(ZOO[name].make(), planned(name, classifier)).eval()


def some_leave(sdn: ShallowDeepNetwork, inputs: Inputs) -> Confidence:
    """Thresholds in the middle of what these rows' exits say: about half of the rows stop at each exit."""
    with torch.no_grad():
        top_EN = sdn(inputs).softmax(-1).amax(-1)[:-1].sort(1).values
    middle = top_EN.shape[1] // 2
    return Confidence(threshold=tuple(((top_EN[:, middle - 1] + top_EN[:, middle]) / 2).tolist()))


def expect(sdn: ShallowDeepNetwork, policy: Policy, inputs: Inputs, answer: Answer) -> None:
    """The answer is what the policy says of the trace of the same rows."""
    outcome = sd.simulate(policy, sd.collect(sdn, (inputs, torch.zeros(num_rows(inputs), dtype=torch.int64))))
    assert torch.equal(answer.exit_B, outcome.exit_N)
    assert torch.equal(answer.labels_B, outcome.labels_N)
    assert torch.equal(answer.cost_B, outcome.cost_N)
    torch.testing.assert_close(answer.logits_BC, outcome.logits_NC, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer.confidence_B, outcome.confidence_N, rtol=1e-4, atol=1e-5)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every step run from now on, as (place, rows that enter)."""
    done: list[tuple[int, int]] = []
    real = Step.forward

    def run(self: Step, *arrays: Tensor) -> tuple[Tensor, ...]:
        done.append((self.place, len(arrays[0])))
        return real(self, *arrays)

    monkeypatch.setattr(Step, "forward", run)
    return done


# ---------------------------------------------------------------- what is skipped


@pytest.mark.parametrize("name", ["residual", "masked_tokens", "dense_skip"])
def test_rows_that_are_answered_are_not_computed_on(name: str, work: list[tuple[int, int]]) -> None:
    sdn, inputs = made(name), ZOO[name].batch(16)
    policy = some_leave(sdn, inputs)
    engine = Engine(sdn, policy)
    work.clear()
    answer = engine(inputs)
    expect(sdn, policy, inputs, answer)
    alive = [int((answer.exit_B >= place).sum()) for place in range(sdn.num_exits)]
    assert work == [(place, rows) for place, rows in enumerate(alive) if rows]
    assert alive[0] == 16 > alive[1] > 0


def test_when_all_leave_nothing_more_is_run(work: list[tuple[int, int]]) -> None:
    engine = Engine(made(), ALWAYS)
    work.clear()
    answer = engine(images(5))
    assert answer.exit_B.tolist() == [0] * 5
    assert work == [(0, 5)]


def test_when_none_leaves_everything_is_run(work: list[tuple[int, int]]) -> None:
    sdn = made()
    engine = Engine(sdn, NEVER)
    work.clear()
    answer = engine(images(5))
    assert answer.exit_B.tolist() == [sdn.num_exits - 1] * 5
    assert work == [(place, 5) for place in range(sdn.num_exits)]
    with torch.no_grad():
        torch.testing.assert_close(answer.logits_BC, sdn.backbone(images(5)))


def test_classifiers_that_nobody_needs_do_not_run(work: list[tuple[int, int]]) -> None:
    full = made().num_exits - 1
    engine = Engine(made(), Fixed(exit=full))
    work.clear()
    assert engine(images(3)).exit_B.tolist() == [full] * 3
    assert work == [(0, 3)], "one segment from end to end"
    paper = Engine(made(classifier="paper"), Fixed(exit=2))
    work.clear()
    assert paper(images(3)).exit_B.tolist() == [2] * 3
    assert work == [(0, 3)]
    feeds_EE = torch.zeros(5, 5, dtype=torch.bool)
    feeds_EE[0, 1] = feeds_EE[1, 2] = feeds_EE[2, 3] = True
    assert needed_ics((False, False, True, False, True), feeds_EE) == (0, 1, 2)
    assert needed_ics((False, False, True, False, True), torch.zeros_like(feeds_EE)) == (2,)
    assert needed_ics((False, False, False, False, True), feeds_EE) == ()


def test_modules_behind_the_last_exit_do_not_run() -> None:
    sdn = made("control_flow")
    rows: dict[str, list[int]] = defaultdict(list)
    for name, module in sdn.backbone.named_children():
        module.register_forward_hook(lambda _, args, __, name=name: rows[name].append(len(args[0])))
    inputs = images(16)
    Engine(sdn, ALWAYS)(inputs)
    assert dict(rows) == {"stem": [16]}
    rows.clear()
    policy = some_leave(sdn, inputs)
    rows.clear()
    answer = Engine(sdn, policy)(inputs)
    assert rows["head"] == [int((answer.exit_B == sdn.num_exits - 1).sum())]
    assert rows["blocks"] == [int((answer.exit_B > 0).sum())]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("name", ["residual", "masked_tokens", "control_flow", "batch_length", "functional"])
def test_batches_of_every_size(name: str) -> None:
    sdn = made(name)
    policy = some_leave(sdn, ZOO[name].batch(16))
    engine = Engine(sdn, policy)
    empty = engine(each(ZOO[name].batch(2), lambda tensor: tensor[:0]))
    for rows in (1, 2, 3, 16, 33):
        answer = engine(ZOO[name].batch(rows))
        expect(sdn, policy, ZOO[name].batch(rows), answer)
        assert answer.alarm_B is None
        for field, tensor in given(answer).items():
            assert len(tensor) == rows
            nothing = getattr(empty, field)
            assert nothing.dtype == tensor.dtype, field
            assert nothing.shape == (0, *tensor.shape[1:]), field


def given(answer: Answer) -> dict[str, Tensor]:
    """Its fields; the alarm is None without one."""
    return {field: tensor for field, tensor in vars(answer).items() if tensor is not None}


@pytest.mark.parametrize("name", ["residual", "control_flow"])
@pytest.mark.parametrize("fallback", ["last", "most_confident"])
def test_rows_that_are_no_numbers_are_answered_by_the_full_exit(name: str, fallback: str) -> None:
    sdn, inputs = made(name), images(12)
    policy = Confidence(threshold=some_leave(sdn, inputs).threshold, fallback=fallback)  # type: ignore[arg-type]
    engine = Engine(sdn, policy)
    clean = engine(inputs)
    dirty = inputs.clone()
    dirty[[2, 7]] = float("nan")
    answer = engine(dirty)
    bad = torch.tensor([i in (2, 7) for i in range(12)])
    assert torch.equal(answer.valid_B, ~bad)
    assert (answer.exit_B[bad] == sdn.num_exits - 1).all()
    for field, tensor in given(answer).items():
        torch.testing.assert_close(tensor[~bad], getattr(clean, field)[~bad], rtol=1e-4, atol=1e-5, msg=field)
    alone = engine(dirty[2:3])
    assert alone.valid_B.tolist() == [False]


def test_another_image_size_is_answered_rightly() -> None:
    sdn = made()
    engine = Engine(sdn, NEVER)
    for side in (16, 12, 8, 16):
        x = torch.randn(3, 3, side, side)
        answer = engine(x)
        with torch.no_grad():
            torch.testing.assert_close(answer.logits_BC, sdn.backbone(x))
    policy = some_leave(sdn, torch.randn(8, 3, 16, 16))
    x = torch.randn(8, 3, 16, 16)
    expect(sdn, policy, x, Engine(sdn, policy)(x))


def test_only_some_programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PROGRAMS_KEPT", 2)
    engine = Engine(made("functional"), ALWAYS)
    for side in (8, 12, 8, 16):
        engine(torch.randn(2, 3, side, side))
    assert [signature.shapes[0][-1] for signature, _ in engine._programs] == [8, 16], "those used last"


def test_padding_by_batch_mates_changes_no_answer() -> None:
    sdn, batch = made("masked_tokens"), token_batch(8)
    policy = some_leave(sdn, batch)
    engine = Engine(sdn, policy)
    together = engine(batch)
    assert len(together.exit_B.unique()) > 1
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        alone = engine({name: tensor[row : row + 1, :length] for name, tensor in batch.items()})
        assert alone.exit_B.tolist() == [int(together.exit_B[row])]
        torch.testing.assert_close(alone.logits_BC[0], together.logits_BC[row], rtol=1e-4, atol=1e-5)


def test_names_of_a_dict_come_in_any_order() -> None:
    engine, batch = Engine(made("masked_tokens"), NEVER), token_batch(4)
    assert torch.equal(engine(dict(reversed(batch.items()))).logits_BC, engine(batch).logits_BC)


def test_threads_share_one_engine() -> None:
    sdn = made()
    policy = some_leave(sdn, images(16))
    engine = Engine(sdn, policy)
    inputs = [images(3), images(9), torch.randn(4, 3, 12, 12)]
    expected = [Engine(sdn, policy)(x) for x in inputs]
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            for _ in range(20):
                answer = engine(inputs[number])
                assert torch.equal(answer.exit_B, expected[number].exit_B)
                torch.testing.assert_close(answer.logits_BC, expected[number].logits_BC)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_an_engine_takes_no_notice_of_modes_and_gradients() -> None:
    sdn = made("dropout_norm")
    engine = Engine(sdn, NEVER)
    expected = engine(images(4))
    sdn.train()
    x = images(4).requires_grad_()
    answer = engine(x)
    assert torch.equal(answer.logits_BC, expected.logits_BC)
    assert not answer.logits_BC.requires_grad
    assert all(module.training for module in sdn.modules())
    eager = made("control_flow")
    running = Engine(eager, NEVER)
    expected = running(images(2))
    eager.train()
    assert torch.equal(running(images(2)).logits_BC, expected.logits_BC)
    assert all(module.training for module in eager.modules())


def test_a_network_without_steps_answers_alike_at_every_call() -> None:
    """As `attach` leaves an SDN: the backbone in eval mode, ICs, with their dropout, in training mode."""
    sdn = made("control_flow").eval()
    for exit in range(sdn.num_exits - 1):
        sdn.classifier(exit).train()
    assert any(isinstance(module, nn.Dropout) and module.training for module in sdn.modules())
    engine, trace = Engine(sdn, Confidence(threshold=0.3)), sd.collect(sdn, (images(32), torch.zeros(32).long()))
    first, second = engine(images(32)), engine(images(32))
    assert torch.equal(first.logits_BC, second.logits_BC)
    assert torch.equal(first.exit_B, sd.simulate(Confidence(threshold=0.3), trace).exit_N)


class Counting(nn.Module):
    """A network that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)  # type: ignore[no-any-return]


def test_making_an_engine_may_call_a_network_that_counts_its_calls() -> None:
    sdn = sd.attach(Counting(), sd.plan(Counting(), torch.zeros(1, 8), at=(0.5,))).eval()
    assert len(Engine(sdn, NEVER)(torch.randn(2, 8)).exit_B) == 2


# ---------------------------------------------------------------- refusals


def test_whoever_tries_again_is_not_answered_from_old_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sdn = made()
    engine = Engine(sdn, ALWAYS)
    monkeypatch.setattr(engine_module, "LOOK_SECONDS", 1000.0)
    engine._looked = -1e9
    with torch.no_grad():
        next(sdn.classifiers.parameters()).mul_(2)
    for _ in range(2):
        with pytest.raises(BackboneMismatch, match="has changed"):
            engine(images(2))


def test_threads_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="threads is at least 1, found 0"):
        Engine(made(), NEVER, threads=0)


def test_nothing_is_asked_for_that_no_ic_reads() -> None:
    sdn = made()
    wide, *others = sdn.plan.classifiers
    bare = dataclasses.replace(others[0], hidden=0)
    sdn = sd.attach(sdn.backbone, dataclasses.replace(sdn.plan, classifiers=(wide, bare, *others[1:])))
    steps = make_steps(sdn, NEVER, images(2))
    assert wide.hidden == bare.fed_hidden > 0
    assert "said.hidden" not in steps[0].gives + steps[1].takes


@pytest.mark.parametrize("name", ["residual", "control_flow"])
@pytest.mark.parametrize("what", ["backbone", "statistics", "classifiers", "confusion", "double"])
def test_a_network_that_has_changed_is_noticed(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LOOK_SECONDS", 0.0)
    sdn = made(name)
    engine = Engine(sdn, ALWAYS)
    engine(images(2))
    with torch.no_grad():
        if what == "backbone":
            sdn.backbone.stem.weight[0, 0, 0, 0] += 1  # type: ignore[union-attr,index,operator]
        elif what == "statistics":
            next(b for n, b in sdn.named_buffers() if n.endswith("running_mean")).add_(1)
        elif what == "classifiers":
            next(sdn.classifiers.parameters()).mul_(2)
        elif what == "confusion":
            sd.fit_confusion(sdn, sd.collect(sdn, (images(9), torch.arange(9) % CLASSES)))
        else:
            sdn.double()
    with pytest.raises(BackboneMismatch, match=r"has changed since .*; make a new Engine\(sdn, policy\)"):
        engine(images(2))
    if what != "double":
        assert Engine(sdn, ALWAYS)(images(2)).exit_B.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (images(2, torch.float64), r"takes float32 \[rows, 3, 8, 8\], found float64 \[rows, 3, 8, 8\]\."),
        ((torch.rand(2, 3, 8, 8) * 255).to(torch.uint8), r"found uint8 \[rows, 3, 8, 8\]"),
        ((images(2),), r"found a tuple of 0: float32 \[rows, 3, 8, 8\]"),
        ({"x": images(2)}, r"found a dict of x: float32 \[rows, 3, 8, 8\]"),
        (images(2)[0], r"Residual takes float32 \[rows, 3, 8, 8\], found float32 \[rows, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), r"planned for rows of shape \(\(3, 8, 8\),\) and fails for \(\(1, 8, 8\),\)"),
        (torch.zeros(2, 3, 9, 9), r"cannot read a map \(8, 9, 9\); plan for that size"),
        (torch.tensor(1.0), r"same number of rows on its first axis, found shapes \[\(\)\]"),
        ("photo.png", "found str"),
        (None, "found NoneType"),
    ],
)
def test_inputs_of_another_kind(inputs: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        refusing()(inputs)


@cache
def refusing() -> Any:
    return Engine(made(), NEVER)


def test_policies_and_backends_that_do_not_fit() -> None:
    sdn = made()
    with pytest.raises(ValueError, match=r"No backend 'warp'\. Possible: 'auto', 'torch'"):
        Engine(sdn, ALWAYS, backend="warp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs labels: only simulate can run it"):
        Engine(sdn, Oracle())
    with pytest.raises(ValueError, match=f"has 2 thresholds; {sdn.num_exits} exits need {sdn.num_exits - 1}"):
        Engine(sdn, Entropy(threshold=(0.1, 0.2)))
    with pytest.raises(ValueError, match=f"{sdn.num_exits} exits need {sdn.num_exits}"):
        Engine(sdn, Patience(patience=1, enabled_E=(True,)))


def test_the_users_network_is_left_alone() -> None:
    for name in ("residual", "control_flow"):
        sdn = made(name)
        before = fingerprint(sdn)
        engine = Engine(sdn, ALWAYS)
        x: Tensor = images(4)
        engine(x)
        assert torch.equal(x, images(4))
        assert fingerprint(sdn) == before
        assert all(parameter.requires_grad for parameter in sdn.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in sdn.modules())
        assert isinstance(sd.detach(sdn), nn.Module)


def certified(sdn: ShallowDeepNetwork, policy: Confidence, **changes: Any) -> Confidence:
    here = {"backend": "torch", "weights": weights_hash(sdn), "exit_names": sdn.plan.exit_names}
    proved = dataclasses.replace(PROVED, **here | changes)
    return dataclasses.replace(policy, calibrated_on=CalibrationRecord(certificate=proved))


def test_auto_stays_where_the_certificate_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sdn = made()
    monkeypatch.setattr(sd.Engine, "_quickest", lambda *_: pytest.fail("a certificate leaves no choice"))
    engine = sd.Engine(sdn, certified(sdn, NEVER))
    assert engine.backend == "torch"
    assert engine.certificate is not None
    assert engine.certificate.backend == "torch"
    assert Engine(sdn, NEVER).certificate is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": "f00d"}, "tested with other weights of the backbone or its ICs"),
        ({"precision": "torch.float64"}, "tested in torch.float64 and torch.float32 runs"),
        ({"view": "mirror"}, "second look 'mirror' and 'none' runs"),
    ],
)
def test_a_void_certificate_is_said_and_gone(change: dict[str, str], reason: str) -> None:
    sdn = made()
    with pytest.warns(UserWarning, match=reason):
        assert Engine(sdn, certified(sdn, NEVER, **change)).certificate is None
    other = dataclasses.replace(certified(sdn, NEVER).calibrated_on.certificate, backend="openvino")
    policy = dataclasses.replace(NEVER, calibrated_on=CalibrationRecord(certificate=other))
    with pytest.warns(UserWarning, match="tested on backend 'openvino' and 'torch' runs"):
        assert Engine(sdn, policy).certificate is None


def test_a_hard_cap_voids_the_certificate_of_the_call() -> None:
    sdn = made()
    engine = Engine(sdn, certified(sdn, NEVER))
    with pytest.warns(UserWarning, match="void for this call: a hard cap"):
        assert bool(engine(images(3), max_cost=0.9).capped_B.all())
    engine(images(3))
    assert engine.certificate is not None
    record = certified(sdn, NEVER).calibrated_on
    exits = sdn.num_exits
    alarm = Alarm(asked_E=(True,) * exits, bias_E=(0.0,) * exits, weight_EE=((0.0,) * exits,) * exits, fitted_on=record)
    with pytest.warns(UserWarning, match="alarm's certificate is void for this call: a hard cap"):
        Engine(sdn, NEVER, alarm=alarm)(images(3), max_cost=0.9)


def test_a_certificate_is_void_for_a_policy_that_was_changed() -> None:
    sdn = made()
    proved = certified(sdn, NEVER).calibrated_on
    record = dataclasses.replace(proved, info={"policy": rule_to_json(NEVER)})
    policy = from_json(json.loads(json.dumps(to_json(dataclasses.replace(NEVER, calibrated_on=record)))))
    assert Engine(sdn, policy).certificate is not None
    with pytest.warns(UserWarning, match="tested with another policy, or this one was changed since"):
        assert Engine(sdn, dataclasses.replace(policy, threshold=0.5)).certificate is None


class Autocasting(nn.Module):
    """Lowers its precision by itself, as networks that were trained so do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ZOO["residual"].make()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x).float()


@pytest.mark.parametrize("classifier", ["strong", "paper"])
def test_a_network_that_casts_by_itself(classifier: Literal["strong", "paper"]) -> None:
    torch.manual_seed(1)
    net = Autocasting().eval()
    sdn = sd.attach(net, sd.plan(net, images(4), classifier=classifier)).eval()
    x = images(32)
    engine = Engine(sdn, NEVER)
    torch.testing.assert_close(engine(x).logits_BC, net(x), rtol=0.05, atol=0.05)
    trace = engine.collect((x, torch.zeros(32, dtype=torch.int64)))
    torch.testing.assert_close(trace.logits_ENC, sdn(x).detach(), rtol=0.05, atol=0.05)
    policy = some_leave(sdn, x)
    outcome, answer = sd.simulate(policy, trace), Engine(sdn, policy)(x)
    assert len(set(outcome.exit_N.tolist())) > 1
    assert (answer.exit_B == outcome.exit_N).double().mean() > 0.9
