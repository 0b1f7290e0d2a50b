"""Steps made ready by a backend and checked against PyTorch, and measured.

It refuses to know batches of callers and thresholds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from shallowdeep.graph import told
from shallowdeep.inputs import example_of
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Policy
from shallowdeep.progress import steps as shown
from shallowdeep.progress import waiting
from shallowdeep.runtime.backends import Array, Backend, BackendName
from shallowdeep.runtime.loop import Program, Ready
from shallowdeep.runtime.on_onnxruntime import OnOnnxRuntime
from shallowdeep.runtime.on_openvino import OnOpenVino
from shallowdeep.runtime.on_torch import OnTorch
from shallowdeep.runtime.times import StepTimes
from shallowdeep.steps import Step, chain, make_steps, named, remembered
from shallowdeep.trajectory import Alarm
from shallowdeep.types import BackendError, DataError, InputSignature, MissingExtra
from shallowdeep.views import SecondLook

TOLERANCE = {"openvino-bf16": 0.1}
"""How far a backend's numbers may lie from PyTorch's, relative to their own size; 0.001 for float32."""
ROUNDINGS = 16
"""How many roundings of its own precision a network may be away beyond that."""


def make_backend(name: BackendName, device: torch.device, threads: int) -> Backend:
    """The backend called ``name``. Raises ``ValueError`` where there is none, or not for ``device``."""
    ways: dict[str, Callable[[], Backend]] = {
        "torch": lambda: OnTorch(device),
        "torch-compile": lambda: OnTorch(device, compiled=True),
        "onnxruntime": lambda: OnOnnxRuntime(threads),
        "openvino": lambda: OnOpenVino(threads),
        "openvino-bf16": lambda: OnOpenVino(threads, bf16=True),
    }
    if name not in ways:
        raise ValueError(f"No backend {name!r}. Possible: {', '.join(map(repr, ('auto', *ways)))}.")
    if device.type != "cpu" and not name.startswith("torch"):
        raise ValueError(f"The backend {name!r} runs on the CPU; the SDN is on {device}.")
    return ways[name]()


def steps_for(
    sdn: ShallowDeepNetwork, policy: Policy, signature: InputSignature, look: SecondLook | None, alarm: Alarm | None
) -> list[Step]:
    """The steps for rows like ``signature``. Raises ``DataError`` where the network does not take such."""
    example = example_of(signature, 2, next(sdn.parameters()).device)
    with torch.inference_mode(False), torch.no_grad(), waiting("cut into steps"):
        try:
            return make_steps(sdn, policy, example, look, alarm)
        except RuntimeError as error:
            raise DataError(
                f"{sdn.plan.model} is planned for rows of shape {sdn.plan.inputs.shapes} and fails for "
                f"{signature.shapes}: {error}"
            ) from error


def make_program(
    sdn: ShallowDeepNetwork, steps: Sequence[Step], policy: Policy, signature: InputSignature, backend: Backend
) -> Program:
    """The program of ``steps``; each is run once on noise and compared with PyTorch.

    Several backends may share steps, and what was exported of them. Raises ``BackendError`` where the numbers differ,
    and where the backend cannot run a step.
    """
    device = next(sdn.parameters()).device
    example = example_of(signature, 2, device)
    with torch.inference_mode(False), torch.no_grad(), _or_refused(backend):
        rows = named(signature.names, example) | remembered(policy, 2, device)
        ready, examples = [], []
        for step, given, expected in shown(chain(steps, rows), f"compile for {backend.name}", len(steps)):
            examples.append(given)
            run = backend.compile(step, given)
            found = [backend.leave(array) for array in run([backend.enter(tensor) for tensor in given])]
            _check(backend, step, expected, found)
            ready.append(Ready(step.exit, run, step.takes, step.gives))
        entered = {name: backend.enter(tensor) for name, tensor in remembered(policy, 1, device).items()}
        skip = backend.skipping(steps, examples, entered)
    said = [{f"softmax.{k}" for k in range(place + 1)} for place in range(len(ready))]
    later = [said[place].union(*(step.takes for step in ready[place + 1 :])) for place in range(len(ready))]
    needed = tuple(map(frozenset, later))
    return Program(backend, steps[0].rule, tuple(ready), entered, needed, steps[0].rowless, skip)


@contextmanager
def _or_refused(backend: Backend) -> Iterator[None]:
    """Errors of a backend's library become ``BackendError``; those that this library raises are clear already."""
    try:
        yield
    except (ValueError, MissingExtra):
        raise
    except Exception as error:
        way = "" if backend.name == "torch" else " Take backend='torch'."
        raise BackendError(f"The backend {backend.name!r} cannot run this network: {told(error)}.{way}") from error


def _check(backend: Backend, step: Step, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    either = "logits" in step.rule.recalls(step.exit)  # of two exits equally sure either may answer
    for name, right, other in zip(step.gives, expected, found, strict=True):
        if not right.is_floating_point() or (either and name.startswith("answer.")):
            continue
        allowed = max(TOLERANCE.get(backend.name, 1e-3), ROUNDINGS * torch.finfo(right.dtype).eps)
        far = float((other.double() - right.double()).norm() / right.double().norm().clamp(min=1e-6))
        if not far <= allowed and bool(right.isfinite().all()):
            raise BackendError(
                f"The backend {backend.name!r} computes {name!r} of exit {step.exit} wrongly: {far:.2g} away from "
                f"PyTorch, allowed {allowed:g}. Take backend='torch'."
            )


def measure(program: Program, inputs: Mapping[str, Array], sizes: Sequence[int], rounds: int) -> StepTimes:
    """Median milliseconds of every step at full depth for the first 1, 2, ... of ``inputs``, sizes in turn."""
    backend = program.backend
    known: dict[tuple[int, int], list[float]] = {}
    moved: dict[int, list[float]] = {}
    for turn in range(rounds + 1):
        for size in sizes:
            rows = {name: x[:size] for name, x in inputs.items()} | program.fresh_rows(size)
            start = time.perf_counter()
            for place, _ in enumerate(chain(program.steps, rows)):
                backend.wait()
                spent = time.perf_counter() - start
                if turn:  # the first one warms up
                    known.setdefault((place, size), []).append(1e3 * spent)
                if turn and size == sizes[-1] and place + 1 < len(program.steps):
                    moved.setdefault(place + 1, []).append(1e3 * _moving(program, rows, place, size) / size)
                start = time.perf_counter()
    table = tuple(tuple(statistics.median(known[place, size]) for size in sizes) for place in range(len(program.steps)))
    return StepTimes(tuple(sizes), table, (0.0, *(statistics.median(times) for _, times in sorted(moved.items()))))


def _moving(program: Program, rows: Mapping[str, Array], place: int, size: int) -> float:
    """Seconds to pick all ``size`` rows for the step behind ``place``."""
    backend = program.backend
    index = backend.counted(size)
    start = time.perf_counter()
    _ = [x[index] for name, x in rows.items() if name in program.needed[place] - program.rowless]
    backend.wait()
    return time.perf_counter() - start
