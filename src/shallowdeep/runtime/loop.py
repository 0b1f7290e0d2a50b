"""One batch on its way along the steps: run one, let the rows that stop leave, go on with the others.

It refuses to know networks and thresholds: it moves arrays by their names. Which rows are computed
together changes no answer, so that is decided here, by measured times where there are any.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shallowdeep.runtime.backends import ANSWERS, Array, Backend, Run, Skip
from shallowdeep.runtime.times import StepTimes
from shallowdeep.walking import Left, Rule


@dataclass(frozen=True, eq=False)
class Ready:
    """A step that a backend has made ready: the exit it asks, its function, and the names of what goes in and out."""

    exit: int
    run: Run
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """The steps of one network under one rule for one kind of input.

    ``fresh`` holds one row of what the policy remembers before its first question, ``needed[place]`` the names that are
    read behind step ``place``, ``rowless`` those without an axis of rows. ``skip``, where the backend has one, is all
    of it in one call, for batches without a limit.
    """

    backend: Backend
    rule: Rule
    steps: tuple[Ready, ...]
    fresh: Mapping[str, Array]
    needed: tuple[frozenset[str], ...]
    rowless: frozenset[str]
    skip: Skip | None = None

    def fresh_rows(self, batch: int) -> dict[str, Array]:
        """What the policy remembers of ``batch`` rows before its first question."""
        return {name: self.backend.repeated(row, batch) for name, row in self.fresh.items()}


@dataclass(frozen=True)
class Limit:
    """How far rows may walk: the last step they may take, and the time (of ``time.perf_counter``) to be done by."""

    place: int
    until: float = math.inf


def walk(
    program: Program,
    inputs: Mapping[str, Array],
    batch: int,
    times: StepTimes | None = None,
    limit: Limit | None = None,
) -> list[Left]:
    """The exits and answers of ``batch`` rows, given the inputs by name (``input.NAME``), in the order of stopping."""
    found = program.skip(inputs) if limit is None and program.skip is not None else None
    if found is not None:
        row_S = program.backend.counted(batch)
        exit_S, logits_SC, confidence_S, confusion_S = (found[name] for name in ANSWERS)
        return [Left(row_S, exit_S, logits_SC, confidence_S, confusion_S, row_S < 0, found.get("alarm"))]
    rows = {**inputs, **program.fresh_rows(batch)}
    row_S, alive = program.backend.counted(batch), batch
    left: list[Left] = []
    for place in range(len(program.steps)):
        gone, rows, row_S, alive = _take(program, place, rows, row_S, alive, times, limit)
        left += gone
        if not alive:
            break
    return left


def advance(
    program: Program, place: int, rows: dict[str, Array], row_S: Array
) -> tuple[Sequence[Left], dict[str, Array], Array]:
    """One step for rows that all want an answer: who left, and arrays and places of those that go on."""
    gone, rows, row_S, alive = _take(program, place, rows, row_S, len(row_S), None, None)
    needed = program.needed[place]
    return gone, {name: x for name, x in rows.items() if name in needed}, row_S if alive else row_S[:0]


def _take(
    program: Program,
    place: int,
    rows: dict[str, Array],
    row_S: Array,
    alive: int,
    times: StepTimes | None,
    limit: Limit | None,
) -> tuple[Sequence[Left], dict[str, Array], Array, int]:
    """One step: who leaves, arrays and places of what is computed on, and how many of those still want an answer."""
    backend, rule, step = program.backend, program.rule, program.steps[place]
    rows.update(zip(step.gives, step.run([rows[name] for name in step.takes]), strict=True))
    present, last = len(row_S), place + 1 == len(program.steps)
    ends = last or (limit is not None and _must_end(limit, times, place, present))
    stops = alive
    stop_S: Array = None if last else rows.pop("stop")
    live_S = row_S >= 0 if alive < present else None  # places below 0: answered already, or there to fill up
    if stop_S is not None:
        stop_S = rule.heed(step.exit, stop_S, backend.finite(rows[f"logits.{place}"]))
        stop_S = stop_S if live_S is None else stop_S & live_S
        stops = alive if ends else int(stop_S.sum())
    if not stops:
        return (), rows, row_S, alive
    if stops == present:
        return [_leave(program, place, rows, row_S, stop_S if ends else None)], rows, row_S, 0
    out, stay = backend.split(live_S if ends else stop_S, stops, live_S, alive)
    picked = {name: x[out] for name, x in rows.items() if name.startswith(_SAID)}
    left = [_leave(program, place, picked, row_S[out], stop_S[out] if ends and stop_S is not None else None)]
    alive -= stops
    size = alive if times is None or not alive else times.size(place + 1, alive, present)
    if not alive or size == present:
        return left, rows, backend.marked(row_S, out), alive
    index, needed = backend.filled(stay, size), program.needed[place]
    rows = {name: x if name in program.rowless else x[index] for name, x in rows.items() if name in needed}
    row_S = row_S[index]
    if size > alive:
        row_S[alive:] = -1
    return left, rows, row_S, alive


_SAID = ("logits.", "softmax.", "answer.")


def _leave(program: Program, place: int, rows: Mapping[str, Array], row_S: Array, stop_S: Array | None) -> Left:
    """What rows that stop at step ``place`` are answered; ``stop_S`` says which of them the policy stopped (None: it
    stopped all, or could not ask on).
    """
    exit = program.steps[place].exit
    own = rows[f"logits.{place}"], rows[f"softmax.{place}"]
    logits_SC, answer_SC = rows.get(f"answer.logits.{place}", own[0]), rows.get(f"answer.softmax.{place}", own[1])
    said, confidence_S = [rows[f"softmax.{k}"] for k in range(place + 1)], program.backend.largest(answer_SC)
    confusion_S = program.rule.confusion(exit, said, answer_SC)
    alarm_S = program.rule.suspicion(exit, said, answer_SC)
    capped_S = row_S < 0 if stop_S is None else ~stop_S
    return Left(row_S, row_S * 0 + exit, logits_SC, confidence_S, confusion_S, capped_S, alarm_S)


def _must_end(limit: Limit, times: StepTimes | None, place: int, rows: int) -> bool:
    if place >= limit.place or limit.until == math.inf:
        return place >= limit.place
    next_ms = times.ms(place + 1, rows) if times is not None else 0.0
    return time.perf_counter() + next_ms / 1e3 > limit.until
