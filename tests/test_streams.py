"""Streams: the same answers in the same order, in full batches, and nothing is lost, late or poisoned."""

from __future__ import annotations

import gc
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import shallowdeep as sd
from nets import ZOO, images, planned
from shallowdeep.inputs import each
from shallowdeep.policies import Confidence
from shallowdeep.runtime import streams
from shallowdeep.runtime.engine import Engine
from shallowdeep.runtime.loop import advance
from shallowdeep.types import Answer, CutError, DataError
from test_backends import made, middle, policies, rows, same, tiny


def engine_of(name: str = "confidence", backend: Any = "torch") -> Engine:
    return Engine(tiny(), policies()[name], backend=backend)


def answered(found: Answer | Exception) -> Answer:
    assert isinstance(found, Answer), found
    return found


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", ["confidence", "most confident", "patience"])
def test_the_same_answers_in_the_same_order(name: str, backend: Any) -> None:
    engine = engine_of(name, backend)
    requests = [rows(count) for count in (1, 5, 0, 17, 2, 1, 40, 3)] * 2
    stream = engine.map(requests, batch_size=8)
    for request, found in zip(requests, stream, strict=True):
        same(answered(found), engine(request))
    report = stream.report
    assert report.requests == 16
    assert 0 < report.p50_ms <= report.p95_ms <= report.p99_ms
    assert 0 < report.regrouped <= 1
    assert len(report.depth_P) == 3
    assert stream.unanswered == []


def test_masks_and_side_tensors_travel_along() -> None:
    sdn, policy, inputs = made("masked_tokens")
    engine = Engine(sdn, policy, backend="torch")
    requests = [each(inputs, lambda tensor, i=i: tensor[i : i + 3]) for i in range(0, 33, 3)]
    for request, found in zip(requests, engine.map(requests, batch_size=7), strict=True):
        same(answered(found), engine(request))


def test_deep_steps_run_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from shallowdeep.steps import Step

    engine, sizes = engine_of(), dict[int, list[int]]()
    real = Step.forward

    def forward(self: Step, *arrays: Tensor) -> tuple[Tensor, ...]:
        sizes.setdefault(self.place, []).append(len(arrays[0]))
        return real(self, *arrays)

    monkeypatch.setattr(Step, "forward", forward)
    singles = list(rows(200).split(1))
    assert len(list(engine.map(singles, batch_size=16, max_wait_ms=1e6))) == 200
    for place in range(3):
        assert set(sizes[place][:-1]) == {16}, "all but the last batch are full"
    assert sum(sizes[2]) < sum(sizes[1]) < sum(sizes[0]) == 200


def test_nobody_waits_longer_than_asked_for_company() -> None:
    go_on = threading.Event()

    def slow() -> Iterator[Tensor]:
        yield rows(1)
        go_on.wait(60)
        yield rows(2)

    with engine_of().map(slow(), batch_size=64, max_wait_ms=5) as stream:
        start = time.perf_counter()
        same(answered(next(stream)), engine_of()(rows(1)))
        assert time.perf_counter() - start < 30, "the source is still asleep"
        go_on.set()
        same(answered(next(stream)), engine_of()(rows(2)))


def test_memory_is_bounded_and_nothing_is_lost_when_the_consumer_stops() -> None:
    drawn: list[Tensor] = []

    def endless() -> Iterator[Tensor]:
        for i in itertools.count():
            drawn.append(rows(4) + i)
            yield drawn[-1]

    with engine_of().map(endless(), batch_size=1000, max_wait_ms=1e6, max_rows=40) as stream:
        for i in range(3):
            same(answered(next(stream)), engine_of()(rows(4) + i))
            waiting = sum(len(one.row_S) for pool in stream._pools.values() for one in pool)
            assert waiting <= 40 + 4
        assert len(drawn) <= 3 + 11 + 40
    stream._reader.join(10)
    assert not stream._reader.is_alive()
    lost = [request for request in drawn[3:] if not any(request is kept for kept in stream.unanswered)]
    ready = len(drawn) - 3 - len(stream.unanswered)
    assert not lost, f"{ready} requests are neither answered nor handed back"
    with pytest.raises(StopIteration):
        next(stream)


def test_answers_that_wait_for_an_earlier_one_count_as_memory() -> None:
    drawn: list[Tensor] = []
    expected = engine_of()(rows(60))
    late, early = rows(60)[expected.exit_B == 2][:1], rows(60)[expected.exit_B == 0][:1]

    def endless() -> Iterator[Tensor]:
        for i in range(200):
            drawn.append(early if i else late)
            yield drawn[-1]

    with engine_of().map(endless(), batch_size=4, max_wait_ms=1e6, max_rows=20) as stream:
        assert answered(next(stream)).exit_B.tolist() == [2]
        assert len(drawn) <= 20 + 2
        assert len(stream.unanswered) == 0
    assert len(stream.unanswered) == len(drawn) - 1


def test_a_large_request_is_computed_in_batches(work: list[int]) -> None:
    with engine_of().map([rows(3), rows(60), rows(2)], batch_size=8) as stream:
        found = [answered(one) for one in stream]
    assert max(work) == 8
    for answer, count in zip(found, (3, 60, 2), strict=True):
        same(answer, engine_of()(rows(count)))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that is run."""
    sizes: list[int] = []

    def counting(program: Any, place: int, rows: Any, row_S: Any) -> Any:
        sizes.append(len(row_S))
        return advance(program, place, rows, row_S)

    monkeypatch.setattr(streams, "advance", counting)
    return sizes


def test_a_stream_that_is_dropped_reads_no_more() -> None:
    stream = engine_of().map(itertools.repeat(rows(2)))
    reader = stream._reader
    next(stream)
    del stream
    gc.collect()
    reader.join(10)
    assert not reader.is_alive()


def test_a_request_that_is_no_input_harms_nobody() -> None:
    requests: list[Any] = [rows(2), rows(2).double(), "photo.png", rows(3)]
    first, wrong, none, last = engine_of().map(requests)
    same(answered(first), engine_of()(rows(2)))
    assert isinstance(wrong, DataError)
    assert "float64" in str(wrong)
    assert isinstance(none, DataError)
    same(answered(last), engine_of()(rows(3)))


def test_a_row_on_which_a_step_breaks_poisons_no_other() -> None:
    engine = engine_of()
    program = engine._program(tiny().plan.inputs)
    run = program.steps[0].run

    def fragile(arrays: Any) -> Any:
        if float(arrays[0].max()) > 1e6:
            raise RuntimeError("no memory for this row")
        return run(arrays)

    object.__setattr__(program.steps[0], "run", fragile)
    requests = [rows(2), torch.full((2, 6), 1e7), rows(3)]
    first, broken, last = engine.map(requests, batch_size=8, max_wait_ms=1e6)
    same(answered(first), engine_of()(rows(2)))
    assert str(broken) == "no memory for this row"
    same(answered(last), engine_of()(rows(3)))


@pytest.mark.parametrize("place", [0, 2])
def test_an_interrupted_step_ends_the_stream_and_loses_nothing(place: int) -> None:
    engine, calls = engine_of("never"), list[int]()
    step = engine._program(tiny().plan.inputs).steps[place]
    run = step.run

    def interrupted(arrays: Any) -> Any:
        calls.append(len(arrays[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(arrays)

    object.__setattr__(step, "run", interrupted)
    drawn, found = list[Tensor](), list[Answer | Exception]()

    def source() -> Iterator[Tensor]:
        for i in range(6):
            drawn.append(rows(2) + i)
            yield drawn[-1]

    stream = engine.map(source(), batch_size=2, max_wait_ms=1e6)
    with pytest.raises(KeyboardInterrupt):
        found.extend(stream)
    stream._reader.join(10)
    with pytest.raises(StopIteration):
        next(stream)
    assert len(found) == 1
    assert len(drawn) >= 2
    assert all(kept is request for kept, request in zip(stream.unanswered, drawn[1:], strict=True))


def test_a_source_that_breaks_is_the_last_to_be_heard() -> None:
    def breaking() -> Iterator[Tensor]:
        yield rows(2)
        raise OSError("the camera is gone")

    found = list(engine_of().map(breaking()))
    same(answered(found[0]), engine_of()(rows(2)))
    assert str(found[1]) == "the camera is gone"
    assert len(found) == 2


def test_a_source_that_ends_the_program_is_heard() -> None:
    def leaving() -> Iterator[Tensor]:
        yield rows(2)
        raise SystemExit("enough")

    found = list(engine_of().map(leaving()))
    assert str(found[1]) == "enough"


def test_what_is_no_stream() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        engine_of().map(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size and max_rows are at least 1, found 0 and 1024"):
        engine_of().map([], batch_size=0)
    for wait in (float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"max_wait_ms is a number of milliseconds, at least 0, found {wait}"):
            engine_of().map([rows(1)], max_wait_ms=wait)


def test_threads_that_share_a_stream_take_turns() -> None:
    requests = [rows(1 + i % 5) for i in range(200)]
    found: list[Answer | Exception] = []
    with engine_of().map(requests, batch_size=8) as stream:
        threads = [threading.Thread(target=lambda: found.extend(stream)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    sizes = sorted(len(answered(one).labels_B) for one in found)
    assert sizes == sorted(map(len, requests)), "every request is answered once"


class Given:
    """What reads ahead for a stream: ``requests`` come within a millisecond, and nothing more in the minute after."""

    def __init__(self, *requests: Tensor) -> None:
        self.requests, self.now = list(requests), 0.0

    def empty(self) -> bool:
        return not self.requests

    def get(self, timeout: float = 0.0) -> tuple[Tensor, float]:
        came, request = self.now, self.requests.pop(0)
        self.now += 1e-4 if self.requests else 60.0
        return request, came

    def get_nowait(self) -> None:
        raise queue.Empty


def late_rows(monkeypatch: pytest.MonkeyPatch, *requests: Tensor) -> streams.Stream:
    given, stream = Given(*requests), engine_of().map([], batch_size=8, max_wait_ms=5, max_rows=10_000)
    stream._ready = given  # type: ignore[assignment]
    monkeypatch.setattr(streams, "time", SimpleNamespace(perf_counter=lambda: given.now))
    return stream


def test_a_late_row_goes_before_the_full_batches_of_a_large_request(
    work: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_B = engine_of()(rows(60)).exit_B
    hard, easy = rows(60)[exit_B == 2][:1], rows(60)[exit_B == 0][:1]
    stream = late_rows(monkeypatch, hard, easy.repeat(4000, 1))
    assert answered(next(stream)).exit_B.tolist() == [2]
    assert work == [8, 1, 8, 1], "filled up, and one full step of others between its own at most"
    assert answered(next(stream)).exit_B.tolist() == [0] * 4000


def test_late_rows_do_not_starve_full_batches(work: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = late_rows(monkeypatch, rows(400), rows(2))
    same(answered(next(stream)), engine_of()(rows(400)))
    full = sum(size == 8 for size in work)
    assert 2 * full > len(work) - 3, "while full batches wait at most every other step is for late rows"


class Busy:
    """What reads ahead for a stream, and always has a request more: one row, a second behind the one before."""

    def __init__(self, row: Tensor) -> None:
        self.row, self.now = row, 0.0

    def empty(self) -> bool:
        return False

    def get(self, timeout: float = 0.0) -> tuple[Tensor, float]:
        self.now += 1.0
        return self.row, self.now

    def get_nowait(self) -> None:
        raise queue.Empty


def test_a_row_that_can_wait_no_longer_goes_before_a_source_that_never_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows(60)[engine_of()(rows(60)).exit_B == 0][:1]
    busy, stream = Busy(first), engine_of().map([], batch_size=64, max_wait_ms=5000)
    stream._ready = busy  # type: ignore[assignment]
    monkeypatch.setattr(streams, "time", SimpleNamespace(perf_counter=lambda: busy.now))
    assert answered(next(stream)).exit_B.tolist() == [0]
    assert busy.now == 7, "read at 1, waited for five seconds, one more was there"
    assert stream.report.p99_ms == 6000


def test_only_rows_in_company_of_others_count_as_regrouped() -> None:
    engine = Engine(tiny(), Confidence(threshold=0.0), backend="torch")  # all leave at the first exit
    with engine.map([rows(8), rows(4), rows(4)], batch_size=8, max_wait_ms=1e6) as stream:
        next(stream)
        assert stream.report.regrouped == 0.0
        assert len(list(stream)) == 2
    assert stream.report.regrouped == 0.5


def test_a_network_without_steps_has_no_streams() -> None:
    torch.manual_seed(1)
    sdn = sd.attach(ZOO["control_flow"].make(), planned("control_flow")).eval()
    with pytest.raises(CutError, match="so its rows cannot wait between steps"):
        Engine(sdn, Confidence(threshold=middle(sdn, images(9)))).map([images(2)])
