"""Answers as early as the policy allows: run a step, let answered rows leave the batch, go on.

It refuses to make a choice that could change an answer; those are policy data.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from shallowdeep.collection import collect, collect_answers
from shallowdeep.costs import exits_of
from shallowdeep.inputs import (
    Batches,
    Inputs,
    as_inputs,
    each,
    example_of,
    in_order,
    num_rows,
    signature_of,
    take,
)
from shallowdeep.network import ShallowDeepNetwork, check_attached, float_type, weights_hash
from shallowdeep.policies import CalibrationRecord, Confidence, Policy
from shallowdeep.progress import steps
from shallowdeep.runtime.backends import ANSWERS, Array, Backend, BackendName, reduced, usual
from shallowdeep.runtime.loop import Limit, Program, walk
from shallowdeep.runtime.modules import walk_modules
from shallowdeep.runtime.programs import make_backend, make_program, measure, steps_for
from shallowdeep.runtime.streams import Stream
from shallowdeep.runtime.times import StepTimes
from shallowdeep.spelling import rule_to_json
from shallowdeep.steps import chain, named, needed_ics
from shallowdeep.timing import threads_of_torch
from shallowdeep.trajectory import Alarm
from shallowdeep.types import (
    Answer,
    BackboneMismatch,
    BackendError,
    CutError,
    DataError,
    InputSignature,
    MissingExtra,
    Trace,
)
from shallowdeep.views import CHECKED_ROWS, Look, SecondLook, check_view, second_look_of
from shallowdeep.walking import Left, in_batch_order

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that ``measure`` looks at by default."""
PROGRAMS_KEPT = 8
"""Kinds of input whose steps stay ready."""
ROWS_AT_ONCE = 1024
"""Rows of one call that are computed together where no times are known."""
LOOK_SECONDS = 0.1
"""How often an engine with its own weights looks whether the SDN's have changed, which takes up to 0.4 ms."""


def why_void(
    record: CalibrationRecord,
    sdn: ShallowDeepNetwork,
    policy: Policy,
    *,
    look: SecondLook | None,
    backend: str,
    weights: str,
    capped: bool = False,
) -> str | None:
    """Why the certificate on the record of ``policy``, or of an alarm, does not hold where ``policy`` runs on
    ``backend``; None where it does, and where there is none.
    """
    if record.certificate is None:
        return None
    rule = rule_to_json(policy)
    if record.info.get("policy", rule) != rule:
        return "it was tested with another policy, or this one was changed since"
    exits = exits_of(sdn, look)
    last = max(exits.rule(policy).last, exits.full_exit)
    return record.certificate.void_for(
        backend=backend,
        precision=str(float_type(sdn)),
        weights=weights,
        exit_names=exits.exit_names[: last + 1],
        view=look.name if look is not None and last > exits.full_exit else "",
        capped=capped,
    )


class Engine:
    """``engine(inputs)`` answers each row at the exit where ``policy`` stops it; the rest of the network is skipped.

    ``inputs`` is a batch as the backbone takes it, on any device; the answer is on the network's. ``backend`` is
    "torch" (any device), "torch-compile", "onnxruntime", "openvino" or "openvino-bf16", the last three with ``threads``
    threads (None: as many as PyTorch has, whose number is the whole process's and stays as it is), or "auto": the
    quickest that is installed, all measured with ``threads`` (on a GPU one of the first two, which takes as long as
    compiling does), or the one that the certificate of policy or alarm speaks of;
    ``certificate`` is None without one and, with a warning, where it is void.
    Weights are snapshotted: from .1 s after the SDN's were changed in place a call raises ``BackboneMismatch``; modules
    or parameters put in their place go unseen. A backbone that cannot
    be exported runs through its own modules, in PyTorch alone. Several threads may call one engine. Rows whose logits
    are not finite are answered by the backbone's own exit with ``valid_B`` False. An ``alarm``
    (of ``fit_alarm`` or ``calibrate_alarm``, for policies that ask the same exits) adds ``alarm_B``, how probably each
    answer is wrong. Source: arXiv 1810.07052, section 5.1.

    With ``second_look`` (as in ``collect``) rows that the policy does not stop at the backbone's own exit are looked at
    again. Raises ``ValueError`` for a policy that was calibrated with another view, or without one.
    """

    def __init__(
        self,
        sdn: ShallowDeepNetwork,
        policy: Policy,
        *,
        second_look: Look = None,
        alarm: Alarm | None = None,
        backend: BackendName = "auto",
        threads: int | None = None,
    ) -> None:
        check_attached(sdn)
        if threads is not None and threads < 1:
            raise ValueError(f"threads is at least 1, found {threads}.")
        self.sdn, self.policy, self.second_look, self.alarm = sdn, policy, second_look_of(second_look), alarm
        check_view(policy, self.second_look)
        self._times: dict[InputSignature, StepTimes] = {}
        self._device, self._exported = next(sdn.parameters()).device, sdn.plan.via == "export"
        exits = exits_of(sdn, self.second_look)
        self._rule = exits.rule(policy, alarm)
        policy.init(1, None, self._device)  # a rule that needs labels says so now
        self._cost_E = exits.costs(self._rule)
        self._runs = needed_ics(self._rule.asked[: sdn.num_exits], exits.feeds_EE)
        if self.second_look is not None:
            self.second_look.check(example_of(sdn.plan.inputs, CHECKED_ROWS, self._device))
        self._planned, self._dtype = sdn.plan.inputs, getattr(torch, sdn.plan.inputs.dtypes[0])
        # None, too, where rows are single numbers: a tensor without rows would look like one of them.
        self._shape = (sdn.plan.inputs.shapes[0] or None) if sdn.plan.inputs.kind == "tensor" else None
        # Those made in inference mode do not know how often they have changed.
        self._watched = [tensor for tensor in (*sdn.parameters(), *sdn.buffers()) if not tensor.is_inference()]
        self._programs: dict[tuple[InputSignature, bool], Program] = {}
        self._lock = threading.RLock()
        records = {"policy": policy.calibrated_on, "alarm": None if alarm is None else alarm.fitted_on}
        proved = {name: one for name, one in records.items() if one is not None and one.certificate is not None}
        certificates = [one.certificate for one in proved.values()]
        certified = next((one.backend for one in certificates if one is not None and one.backend), None)
        if backend == "auto" and certified is not None:
            backend = cast(BackendName, certified)
        self._backend = self._chosen(backend, threads or torch.get_num_threads())
        self.backend: BackendName = self._backend.name
        for name, one in records.items():
            if one is not None and reduced(one.info.get("backend", "")) != reduced(self.backend):
                warnings.warn(
                    f"The {name} was made for answers of another precision than {self.backend}'s: make it from a trace "
                    "that this backend collected (engine.collect, sdn collect --backend).",
                    stacklevel=2,
                )
        self._void_capped = dict[str, str | None]()
        weights = weights_hash(sdn) if proved else ""
        void = partial(why_void, sdn=sdn, policy=policy, look=self.second_look, backend=self.backend, weights=weights)
        for name, record in proved.items():
            if reason := void(record):
                warnings.warn(f"The {name}'s certificate is void here: {reason}.", stacklevel=2)
            else:
                self._void_capped[name] = void(record, capped=True)
        holds = policy.calibrated_on if "policy" in self._void_capped else None
        self.certificate = None if holds is None else holds.certificate
        self._cost = self._backend.enter(self._cost_E)
        skip = self._program(sdn.plan.inputs).skip if self._exported else None
        self._lane = None if skip is None else (f"input.{sdn.plan.inputs.names[0]}", skip)
        self._seen, self._looked = self._state(), 0.0  # of a network that counts its calls, too

    def __call__(self, inputs: object, *, max_cost: float | None = None, max_ms: float | None = None) -> Answer:
        """The answers to one batch, in its order: labels, logits, exits, confidence, confusion and cost per row.

        No row spends more than ``max_cost`` (a share of the backbone); no batch starts a step that would end after
        ``max_ms`` milliseconds, by measured times. Rows which that stops are answered where they are, with
        ``capped_B`` True. Raises ``ValueError`` for a limit that the first exit asked exceeds, and ``CutError`` for
        ``max_ms`` where a network runs through its own modules, which have no times. The first ``max_ms`` for inputs of
        a shape measures those; ``measure`` does so beforehand.
        """
        batch, signature = self._checked(inputs)
        limited = max_cost is not None or max_ms is not None
        if not limited and signature is self._planned and (answer := self._at_once(batch)) is not None:
            return answer
        rows = num_rows(batch)
        if limited:
            for name, reason in self._void_capped.items():
                warnings.warn(f"The {name}'s certificate is void for this call: {reason}.", stacklevel=2)
        if rows == 0:
            return self._nothing()
        program = self._program(signature) if self._exported else None
        if max_ms is not None and signature not in self._times:
            self.measure(example_of(signature, max(SIZES), self._device))
        times = self._times.get(signature)
        limit = self._limit(max_cost, max_ms, rows, times)
        chunk = ROWS_AT_ONCE if times is None else times.chunk(rows)
        if rows <= chunk:
            return self._answer(self._walked(program, batch, times, limit))
        left: list[Left] = []
        for first in range(0, rows, chunk):
            part = take(batch, slice(first, first + chunk))
            own = _before_others(limit, times, rows - first - num_rows(part))
            left += [some._replace(row_S=some.row_S + first) for some in self._walked(program, part, times, own)]
        return self._answer(left)

    def _at_once(self, batch: Inputs) -> Answer | None:
        """One row as planned: after a pass of 2 ms each line of Python is read from memory again, so here are few."""
        if self._lane is None or not isinstance(batch, Tensor) or batch.shape[0] != 1:
            return None
        name, skip = self._lane
        found = skip({name: self._backend.enter(batch)})
        if found is None:
            return None
        exit_B, logits_BC, confidence_B, confusion_B = (found[name] for name in ANSWERS)
        return self._told(exit_B, logits_BC, confidence_B, confusion_B, exit_B < 0, found.get("alarm"))

    def _walked(
        self, program: Program | None, batch: Inputs, times: StepTimes | None, limit: Limit | None
    ) -> list[Left]:
        """Rows that are computed together, by the program or, where there is none, by the network's own modules."""
        if program is not None:
            return walk(program, self._named(batch), num_rows(batch), times, limit)
        batch = each(batch, lambda tensor: tensor.to(self._device))
        with torch.inference_mode():
            return walk_modules(self.sdn, self._rule, self._runs, batch, limit, self.second_look)

    def map(
        self,
        requests: Iterable[object],
        *,
        batch_size: int = 64,
        max_wait_ms: float = 20.0,
        max_rows: int = 1024,
    ) -> Stream:
        """The answers to a stream of batches, in its order; rows of many are computed together, at every depth.

        An answer is an exception where a request could not be answered; the others do not notice. See ``Stream``.
        Raises ``CutError`` for a network that runs through its own modules.
        """
        if not self._exported:
            raise CutError(f"{self.sdn.plan.model} cannot be exported, so its rows cannot wait between steps.")
        return Stream(
            requests, self._prepared, self._answered, batch_size=batch_size, max_wait_ms=max_wait_ms, max_rows=max_rows
        )

    def _prepared(self, inputs: object) -> tuple[Program, dict[str, Array], int]:
        """A request as its program takes it, and its number of rows."""
        batch, signature = self._checked(inputs)
        rows, program = num_rows(batch), self._program(signature)
        return program, self._named(batch) | program.fresh_rows(rows), rows

    def _answered(self, left: Sequence[Left]) -> Answer:
        return self._answer(left) if left else self._nothing()

    def collect(self, data: Batches | tuple[Inputs, Tensor], *, batch_size: int = 256) -> Trace:
        """What every exit says about every row of ``data``, the second look's where the engine has one, as this backend
        computes it: a trace at full depth.

        In reduced precision only such a trace tells what the engine will do. Raises as ``shallowdeep.collect``.
        """
        if not self._exported:
            return collect(self.sdn, data, second_look=self.second_look, batch_size=batch_size)
        return collect_answers(
            self.sdn, data, self._said, self.second_look, backend=self.backend, batch_size=batch_size
        )

    def measure(self, inputs: object = None, *, sizes: Sequence[int] = SIZES, rounds: int = 5) -> StepTimes:
        """Milliseconds of every step at the batch ``sizes``, kept: from now on they decide which rows of inputs of this
        shape are computed together, and what ``max_ms`` allows them.

        ``inputs`` are rows to measure with (None: noise), as many as the largest size. Raises ``CutError`` for a
        network that runs through its own modules.
        """
        if not self._exported:
            raise CutError(f"{self.sdn.plan.model} cannot be exported, so it has no steps to measure.")
        if not sizes or min(sizes) < 1 or rounds < 1:
            raise ValueError(f"Give sizes and rounds of at least 1, found sizes {tuple(sizes)} and {rounds} rounds.")
        given = example_of(self.sdn.plan.inputs, max(sizes), self._device) if inputs is None else inputs
        rows, signature = self._checked(given)
        if num_rows(rows) < max(sizes):
            raise DataError(f"To measure batches of {max(sizes)} give as many rows, found {num_rows(rows)}.")
        self._times[signature] = measure(self._program(signature), self._named(rows), sorted(sizes), rounds)
        return self._times[signature]

    def _chosen(self, name: BackendName, threads: int) -> Backend:
        """The backend called ``name``, or the quickest with ``threads``."""
        if name != "auto" and name != "torch" and not self._exported:
            raise CutError(f"{self.sdn.plan.model} cannot be exported, so only the backend 'torch' runs it.")
        if name == "auto":
            names: tuple[BackendName, ...] = usual(self._device) if self._exported else ("torch",)
            with threads_of_torch(threads):
                chosen = self._quickest([make_backend(n, self._device, threads) for n in names])
        else:
            chosen = make_backend(name, self._device, threads)
        if chosen.name.startswith("torch") and threads != (own := torch.get_num_threads()):
            # The whole process has one number: changed for each call, two calls that overlap would leave it wrong.
            warnings.warn(
                f"threads={threads} is for ONNX Runtime and OpenVINO; PyTorch has {own} in this process. "
                f"Call torch.set_num_threads({threads}) first.",
                stacklevel=3,
            )
            threads = own
        self.threads = threads
        return chosen

    def _quickest(self, backends: Sequence[Backend]) -> Backend:
        """The backend that answers one row and 32 in the least time, by the geometric mean."""
        if len(backends) == 1:
            return backends[0]
        rows = example_of(self.sdn.plan.inputs, 32, self._device)
        found = list[tuple[float, Backend, Program]]()
        signature = self.sdn.plan.inputs
        parts = steps_for(self.sdn, self.policy, signature, self.second_look, self.alarm)
        for backend in steps(backends, "try backends", len(backends)):
            try:
                program = make_program(self.sdn, parts, self.policy, signature, backend)
            except (MissingExtra, BackendError):
                continue
            entered = {name: backend.enter(x) for name, x in named(signature.names, rows).items()}
            found.append((math.prod(_walk_seconds(program, entered, size) for size in (1, 32)), backend, program))
        _, best, program = min(found, key=lambda one: one[0])
        self._programs[signature, all(self._rule.asked)] = program
        return best

    def _checked(self, inputs: object) -> tuple[Inputs, InputSignature]:
        """``inputs`` in the network's order of names, and the SDN unchanged."""
        now = time.perf_counter()
        if not self._exported or now > self._looked + LOOK_SECONDS:
            if self._state() != self._seen:
                raise BackboneMismatch(
                    "The SDN has changed since this engine was made; make a new Engine(sdn, policy)."
                )
            self._looked = now
        planned = self._planned
        if isinstance(inputs, Tensor) and inputs.shape[1:] == self._shape and inputs.dtype == self._dtype:
            return inputs, planned  # a look, not a description
        batch = in_order(as_inputs(inputs), planned.names)
        found = signature_of(batch)
        if not found.like(planned):
            raise DataError(f"{self.sdn.plan.model} takes {planned}, found {found}.")
        return batch, found

    def _named(self, batch: Inputs) -> dict[str, Array]:
        return {name: self._backend.enter(tensor) for name, tensor in named(self.sdn.plan.inputs.names, batch).items()}

    def _program(self, signature: InputSignature, *, every_exit: bool = False) -> Program:
        """The program for inputs of this shape, made on first sight."""
        with self._lock:
            key = signature, every_exit or all(self._rule.asked)
            program = self._programs.pop(key, None)  # put back as the one used last
            if program is None:
                plain = key[1] and not all(self._rule.asked)
                policy: Policy = Confidence(threshold=math.inf) if plain else self.policy
                alarm = None if plain else self.alarm
                parts = steps_for(self.sdn, policy, signature, self.second_look, alarm)
                program = make_program(self.sdn, parts, policy, signature, self._backend)
                if len(self._programs) >= PROGRAMS_KEPT:
                    self._programs.pop(next(iter(self._programs)))
            self._programs[key] = program
            return program

    def _said(self, inputs: Inputs) -> Tensor:
        """Logits [E, B, C] of every exit."""
        batch, signature = self._checked(inputs)
        program = self._program(signature, every_exit=True)
        rows = self._named(batch) | program.fresh_rows(num_rows(batch))
        for _ in chain(program.steps, rows):
            pass
        return torch.stack([self._backend.leave(rows[f"logits.{place}"]) for place in range(len(program.steps))])

    def _limit(self, max_cost: float | None, max_ms: float | None, rows: int, times: StepTimes | None) -> Limit | None:
        if max_cost is None and max_ms is None:
            return None
        asked = [exit for exit, on in enumerate(self._rule.asked) if on]
        place = len(asked) - 1
        if max_cost is not None:
            place = sum(float(self._cost_E[exit]) <= max_cost for exit in asked) - 1
            if place < 0:
                first = float(self._cost_E[asked[0]])
                raise ValueError(f"max_cost={max_cost:g} is below {first:.3f}, the cost of the first exit asked.")
        if max_ms is None:
            return Limit(place)
        first_ms = 0.0 if times is None else times.up_to(0, rows)
        if not max_ms >= first_ms:
            raise ValueError(f"max_ms={max_ms:g} is below {first_ms:.3f}, the time to the first exit.")
        return Limit(place, time.perf_counter() + max_ms / 1e3)

    def _answer(self, left: Sequence[Left]) -> Answer:
        """What the rows of a batch are answered, in its order."""
        _, exit_B, logits_BC, confidence_B, confusion_B, capped_B, alarm_B = in_batch_order(left, self._backend.joined)
        return self._told(exit_B, logits_BC, confidence_B, confusion_B, capped_B, alarm_B)

    def _told(
        self,
        exit_B: Array,
        logits_BC: Array,
        confidence_B: Array,
        confusion_B: Array,
        capped_B: Array,
        alarm_B: Array | None,
    ) -> Answer:
        leave = self._backend.leave
        return Answer(
            labels_B=leave(logits_BC.argmax(1)),
            logits_BC=leave(logits_BC),
            exit_B=leave(exit_B),
            confidence_B=leave(confidence_B),
            confusion_B=leave(confusion_B),
            cost_B=leave(self._cost[exit_B]),
            valid_B=leave(self._backend.finite(logits_BC)),
            capped_B=leave(capped_B),
            alarm_B=None if alarm_B is None else leave(alarm_B),
        )

    def _state(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._watched]

    def _nothing(self) -> Answer:
        some = next((p for p in self.sdn.parameters() if p.is_floating_point()), torch.zeros(0))
        none = torch.zeros(0, dtype=torch.int64, device=self._device)
        return Answer(
            labels_B=none,
            logits_BC=torch.zeros(0, self.sdn.plan.num_classes, dtype=some.dtype, device=self._device),
            exit_B=none,
            confidence_B=none.double(),
            confusion_B=none.double(),
            cost_B=none.double(),
            valid_B=none.bool(),
            capped_B=none.bool(),
            alarm_B=None if self.alarm is None else none.double(),
        )


def _before_others(limit: Limit | None, times: StepTimes | None, rows: int) -> Limit | None:
    """``limit`` less the time that ``rows`` rows to come need for their first step."""
    if limit is None or times is None or limit.until == math.inf or not rows:
        return limit
    return Limit(limit.place, limit.until - times.ms(0, rows) / 1e3)


def _walk_seconds(program: Program, inputs: Mapping[str, Array], rows: int, turns: int = 5) -> float:
    """The least time of a few walks of the first ``rows`` of ``inputs``, the way that calls without a limit go."""
    part = {name: x if name in program.rowless else x[:rows] for name, x in inputs.items()}
    seconds = list[float]()
    for _ in range(turns + 1):  # the first one warms up
        start = time.perf_counter()
        walk(program, part, rows)
        program.backend.wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
