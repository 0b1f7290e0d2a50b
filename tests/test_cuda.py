"""On a GPU: the answers of the CPU, for at most one wait an exit asked. Skipped where there is none."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch

import shallowdeep as sd
from shallowdeep.alarming import fit_alarm
from shallowdeep.joint import JointRecipe
from shallowdeep.monitor import Monitor
from shallowdeep.network import ShallowDeepNetwork, fingerprint
from shallowdeep.policies import Confidence
from shallowdeep.reference import refer
from shallowdeep.runtime.bench import bench
from shallowdeep.runtime.engine import Engine
from shallowdeep.types import Answer
from shallowdeep.watched import Watched
from test_backends import NAMES, middle, policies, rows, same, tiny

GPU = torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here", allow_module_level=True)


def moved() -> ShallowDeepNetwork:
    return copy.deepcopy(tiny()).to(GPU)


def on_cpu(answer: Answer) -> Answer:
    assert answer.labels_B.device.type == GPU.type
    return Answer(**{name: None if value is None else value.cpu() for name, value in vars(answer).items()})


@pytest.mark.parametrize("name", NAMES)
def test_law_3_every_policy(name: str) -> None:
    policy = policies()[name]
    engine, plain = Engine(moved(), policy, backend="torch"), Engine(tiny(), policy, backend="torch")
    for count in (0, 1, 2, 7, 60):
        same(on_cpu(engine(rows(count))), plain(rows(count)))
    broken = rows(7)
    broken[[1, 4]] = math.nan
    assert engine(broken.to(GPU)).valid_B.tolist() == [True, False, True, True, False, True, True]
    outcome = sd.simulate(policy, engine.collect((rows(60), torch.zeros(60, dtype=torch.int64))))
    assert torch.equal(engine(rows(60)).exit_B.cpu(), outcome.exit_N)


@pytest.mark.parametrize("name", ["confidence", "ensembles", "score"])
def test_compiled_steps(name: str) -> None:
    policy = policies()[name]
    engine, plain = Engine(moved(), policy, backend="torch-compile"), Engine(tiny(), policy, backend="torch")
    for count in (1, 2, 7, 60):
        same(on_cpu(engine(rows(count))), plain(rows(count)))


def test_auto_takes_what_runs_there() -> None:
    assert Engine(moved(), policies()["confidence"]).backend in ("torch", "torch-compile")


@pytest.mark.parametrize("name", NAMES)
def test_one_wait_an_exit_asked(name: str) -> None:
    sdn, policy = moved(), policies()[name]
    engine, inputs = Engine(sdn, policy, backend="torch"), rows(60).to(GPU)
    engine(inputs)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) <= sum(policy.asks(sdn.num_exits, sdn.num_exits - 1)), waits


def test_streams_limits_alarms_and_second_looks() -> None:
    trace = sd.collect(tiny(), (rows(400), torch.arange(400) % 4), second_look=lambda x: -x)
    policy = Confidence(threshold=(*middle(tiny(), rows(60)), 0.9))
    alarm = fit_alarm(trace, policy)
    made: dict[str, Any] = {"second_look": lambda x: -x, "alarm": alarm, "backend": "torch"}
    engine, plain = Engine(moved(), policy, **made), Engine(tiny(), policy, **made)
    same(on_cpu(engine(rows(60))), plain(rows(60)))
    same(on_cpu(engine(rows(60), max_cost=0.9)), plain(rows(60), max_cost=0.9))
    with engine.map([rows(5).to(GPU), rows(60).to(GPU)], max_wait_ms=1) as stream:
        for found, count in zip(stream, (5, 60), strict=True):
            assert isinstance(found, Answer)
            same(on_cpu(found), plain(rows(count)))


def test_a_watched_engine_and_the_bench() -> None:
    data, policy = (rows(400), torch.arange(400) % 4), policies()["confidence"]
    engine = Engine(moved(), policy, backend="torch")
    one = Watched(engine, Monitor(refer(policy, sd.collect(tiny(), data))), share=0.5, seed=0)
    answer, audit = one.audited(rows(60))
    assert torch.equal(audit.answered_S, answer.labels_B[audit.row_S])
    assert audit.full_S.tolist() == tiny().backbone(rows(60)[audit.row_S.cpu()]).argmax(1).tolist()
    found = bench(moved(), policy, data, batch_sizes=(1, 64), threads=(1,), blocks=2)
    assert [(way["backend"], way["batch_size"]) for way in found["measured"]] == [
        (backend, size) for size in (1, 64) for backend in ("torch", "torch-compile")
    ]


def test_training_there_is_training_here() -> None:
    data, start = (rows(512), torch.arange(512) % 4), moved()
    before = fingerprint(start.backbone)
    sd.train_exits(start, data, epochs=2)
    assert fingerprint(start.backbone) == before, "law 2"
    here = copy.deepcopy(tiny())
    sd.train_exits(here, data, epochs=2)
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(start(rows(9).to(GPU)).cpu(), here(rows(9)), **close)
    recipe = JointRecipe(lr=0.01, batch_size=64)
    there, here = (sd.train_jointly(sdn, data, epochs=1, recipe=recipe) for sdn in (start, here))
    assert next(there.parameters()).device.type == GPU.type
    torch.testing.assert_close(there(rows(9).to(GPU)).cpu(), here(rows(9)), **close)


def test_traces_come_to_the_cpu() -> None:
    data = rows(60), torch.arange(60) % 4
    found, expected = (sd.collect(sdn, data) for sdn in (moved(), tiny()))
    torch.testing.assert_close(found.logits_ENC, expected.logits_ENC, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.hash_N, expected.hash_N)  # type: ignore[arg-type]
