"""Many requests at once: survivors of all of them wait in a pool per depth, so that deep steps run full batches.

It refuses to change an answer: who is computed with whom never does. Order is kept.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shallowdeep.runtime.backends import Array
from shallowdeep.runtime.loop import Program, advance
from shallowdeep.types import Answer
from shallowdeep.walking import Left

_END = object()
"""What stands for the requests behind the last, of a source that failed, too."""
POLL_SECONDS = 0.05
TIMES_KEPT = 10_000
"""Requests, the latest, whose milliseconds a report speaks of."""


@dataclass(eq=False)
class _Request:
    """One item of the stream on its way: when it came, its rows (one at least: it takes room), how many of them have no
    answer yet, and what came of it.
    """

    inputs: object
    arrived: float
    rows: int = 1
    waiting: int = 0
    left: list[Left] = field(default_factory=list)
    result: Answer | Exception | None = None


class _Waiting(NamedTuple):
    """Rows of one request before one step: their arrays by name, and their places in the request."""

    request: _Request
    rows: dict[str, Array]
    row_S: Array

    def parted(self, at: int, rowless: frozenset[str]) -> tuple[_Waiting, _Waiting]:
        """The first ``at`` rows and the others."""
        first, others = (
            {name: x if name in rowless else x[part] for name, x in self.rows.items()}
            for part in (slice(at), slice(at, None))
        )
        return _Waiting(self.request, first, self.row_S[:at]), _Waiting(self.request, others, self.row_S[at:])


_Place = tuple[Program, int]
"""A step of a program, by its place: where rows wait together."""


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """What a stream did: milliseconds from a request's reading to its answer (of the latest 10,000), the share of rows
    that were computed in a step together with rows of another request, and the most rows that ever waited before each
    step.
    """

    requests: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    regrouped: float
    depth_P: tuple[int, ...]


class Stream(Iterator[Answer | Exception]):
    """Answers to ``requests``, in their order, with an exception in place of an answer that could not be given.

    Made by ``Engine.map``. A thread reads ahead; no request is taken in while ``max_rows`` rows wait, or have answers
    that were not fetched, and two requests more have been read. Rows wait for company at most ``max_wait_ms`` after
    their request was read, as long as somebody asks for answers: steps run inside ``next``. From then on the oldest go
    first, with whoever waits there; before each of their steps one full step of others may run, or one request be taken
    in. Requests are kept as they are, not copied. One thread asks: of several, each gets some answers, and not which
    requests they are of. After ``close`` (or a ``with``, or Ctrl-C inside ``next``), ``unanswered`` holds the requests
    that were read and whose answer was not fetched.
    """

    def __init__(
        self,
        requests: Iterable[object],
        prepare: Callable[[object], tuple[Program, dict[str, Array], int]],
        finish: Callable[[Sequence[Left]], Answer],
        *,
        batch_size: int,
        max_wait_ms: float,
        max_rows: int,
    ) -> None:
        if batch_size < 1 or max_rows < 1:
            raise ValueError(f"batch_size and max_rows are at least 1, found {batch_size} and {max_rows}.")
        if not max_wait_ms >= 0:
            raise ValueError(f"max_wait_ms is a number of milliseconds, at least 0, found {max_wait_ms}.")
        self._prepare, self._finish = prepare, finish
        self._batch, self._wait, self._limit = batch_size, max_wait_ms / 1e3, max_rows
        self._pools: dict[_Place, deque[_Waiting]] = {}
        self._sizes: dict[_Place, int] = {}  # rows in each pool
        self._order: deque[_Request] = deque()
        self._held, self._passed = 0, False  # passed: the last step was a full one, and older rows were late
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stopped, self._ended = threading.Event(), False
        self._turn = threading.RLock()
        self._times: deque[float] = deque(maxlen=TIMES_KEPT)
        self._requests = self._computed = self._together = 0
        self._deepest: dict[int, int] = {}
        self.unanswered: list[object] = []
        # The thread does not know the stream: one that is dropped unclosed can be freed, which ends the thread.
        shared = self._ready, self._stopped, self.unanswered
        self._reader = threading.Thread(target=_read, args=(iter(requests), *shared), daemon=True)
        weakref.finalize(self, self._stopped.set)
        self._reader.start()

    def __next__(self) -> Answer | Exception:
        with self._turn:
            try:
                return self._next()
            except BaseException:  # at the end, and where a step was interrupted, whose rows are in no pool any more
                self.close()
                raise

    def _next(self) -> Answer | Exception:
        while not self._stopped.is_set():
            if self._order and self._order[0].result is not None:
                request = self._order.popleft()
                self._held -= request.rows
                assert request.result is not None
                return request.result
            if self._ended and not self._order:
                break
            self._work()
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and computing."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        with self._turn:  # a step that another thread runs ends first
            self.unanswered += [request.inputs for request in self._order if request.inputs is not _END]
        _drain(self._ready, self.unanswered)
        self._reader.join(4 * POLL_SECONDS)  # it may hold one more; a source that sleeps is not waited for

    @property
    def report(self) -> StreamReport:
        """What happened so far."""
        times = sorted(self._times) or [0.0]
        at = [times[min(len(times) - 1, int(share * len(times)))] for share in (0.5, 0.95, 0.99)]
        depth_P = tuple(self._deepest.get(place, 0) for place in range(max(self._deepest, default=-1) + 1))
        regrouped = self._together / max(self._computed, 1)
        return StreamReport(
            requests=self._requests, p50_ms=at[0], p95_ms=at[1], p99_ms=at[2], regrouped=regrouped, depth_P=depth_P
        )

    def _work(self) -> None:
        """One thing: a full step, a step for rows that can wait no longer, or the next request.

        Both kinds of step take turns where both are due: were late rows always first, an overload would never see a
        full step again, and be worse for it.
        """
        # Every pool is first in, first out, and so was what came before it: its oldest rows are in front.
        oldest = min(self._pools, key=lambda key: (self._pools[key][0].request.arrived, key[1]), default=None)
        due = math.inf if oldest is None else self._pools[oldest][0].request.arrived + self._wait
        late = due <= time.perf_counter()
        full = [key for key, size in self._sizes.items() if size >= self._batch]
        if full and not (late and self._passed):
            self._run(max(full, key=lambda key: key[1]))  # what is nearly done makes room
            self._passed = late
            return
        self._passed = False
        taking = not (full or self._ended or self._held >= self._limit)
        if taking and self._accept(due):
            return
        assert oldest is not None, "nobody waits, and nobody is taken in"
        early = min(self._pools, key=lambda key: key[1])  # on its way it gathers company
        self._run(oldest if late or taking else early)

    def _accept(self, due: float) -> bool:
        """Take in the next request; False when the oldest row, which is ``due`` then, can wait no longer."""
        while not self._stopped.is_set():
            left = due - time.perf_counter()
            if left <= 0 and self._ready.empty():
                return False
            try:
                item = self._ready.get(timeout=max(0.0, min(left, POLL_SECONDS)) if left > 0 else 0)
            except queue.Empty:
                continue
            if item is _END:
                self._ended = True
            elif item[1] is None:
                self._ended = True
                self._held += 1
                self._order.append(_Request(_END, time.perf_counter(), result=item[0]))
            else:
                self._admit(_Request(*item))
            return left > 0
        return True

    def _admit(self, request: _Request) -> None:
        self._order.append(request)
        try:
            program, rows, request.waiting = self._prepare(request.inputs)
        except Exception as error:
            self._done(request, error)
        else:
            request.rows = max(1, request.waiting)
            if request.waiting:
                self._put((program, 0), _Waiting(request, rows, program.backend.counted(request.waiting)))
            else:
                self._done(request, self._finish([]))
        self._held += request.rows

    def _put(self, key: _Place, waiting: _Waiting) -> None:
        self._pools.setdefault(key, deque()).append(waiting)
        self._sizes[key] = self._sizes.get(key, 0) + len(waiting.row_S)
        self._deepest[key[1]] = max(self._sizes[key], self._deepest.get(key[1], 0))

    def _run(self, key: _Place) -> None:
        """The step for the rows that have waited longest before it, as many as a batch."""
        pool, taken, count = self._pools[key], list[_Waiting](), 0
        while pool and count < self._batch:
            waiting, room = pool.popleft(), self._batch - count
            if len(waiting.row_S) > room:
                waiting, others = waiting.parted(room, key[0].rowless)
                pool.appendleft(others)
            taken.append(waiting)
            count += len(waiting.row_S)
        self._sizes[key] -= count
        if not pool:
            del self._pools[key], self._sizes[key]
        self._computed += count
        self._together += count if len({id(waiting.request) for waiting in taken}) > 1 else 0
        try:
            self._step(key, taken)
        except Exception as error:
            if len(taken) == 1:
                self._done(taken[0].request, error)
                return
            for waiting in taken:  # the others shall not suffer
                try:
                    self._step(key, [waiting])
                except Exception as own:
                    self._done(waiting.request, own)

    def _step(self, key: _Place, taken: Sequence[_Waiting]) -> None:
        program, backend = key[0], key[0].backend
        names = taken[0].rows
        rows = {
            name: taken[0].rows[name]
            if name in program.rowless
            else backend.joined([waiting.rows[name] for waiting in taken])
            for name in names
        }
        total = sum(len(waiting.row_S) for waiting in taken)
        gone, rows, stay_S = advance(program, key[1], rows, backend.counted(total))
        first = 0
        for waiting in taken:
            last = first + len(waiting.row_S)
            for left in gone:
                mine = (left.row_S >= first) & (left.row_S < last)
                own = left.rows(mine)
                self._left(waiting.request, own._replace(row_S=waiting.row_S[own.row_S - first]))
            if waiting.request.result is None:
                mine = (stay_S >= first) & (stay_S < last)
                row_S = waiting.row_S[stay_S[mine] - first]
                if len(row_S):
                    own_rows = {name: x if name in program.rowless else x[mine] for name, x in rows.items()}
                    self._put((key[0], key[1] + 1), _Waiting(waiting.request, own_rows, row_S))
            first = last

    def _left(self, request: _Request, left: Left) -> None:
        request.left.append(left)
        request.waiting -= len(left.row_S)
        if not request.waiting:
            try:
                self._done(request, self._finish(request.left))
            except Exception as error:
                self._done(request, error)

    def _done(self, request: _Request, result: Answer | Exception) -> None:
        if request.result is None:
            request.result = result
            self._requests += 1
            self._times.append(1e3 * (time.perf_counter() - request.arrived))


def _read(
    source: Iterator[object], ready: queue.Queue[Any], stopped: threading.Event, unanswered: list[object]
) -> None:
    """In a thread of its own, so that a slow source does not hold up rows that wait."""
    while not stopped.is_set():
        try:
            item: Any = (next(source), time.perf_counter())
        except StopIteration:
            item = _END
        except BaseException as error:  # whatever it is, somebody waits for what comes next
            item = (error, None)
        while not stopped.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        else:
            if item is not _END and item[1] is not None:
                unanswered.append(item[0])
        if stopped.is_set():
            _drain(ready, unanswered)  # it may have been put where nobody looks any more
        if item is _END or item[1] is None:
            return


def _drain(ready: queue.Queue[Any], unanswered: list[object]) -> None:
    """Hand back what was read and not taken in."""
    with suppress(queue.Empty):
        item = ready.get_nowait()
        if item is not _END and item[1] is not None:
            unanswered.append(item[0])
