"""Steps in ONNX Runtime, on the processor's cores, and NumPy's way of counting rows.

It refuses to know anything but arrays.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.onnx import onnx_program
from shallowdeep.runtime.backends import ANSWERS, Array, BackendName, Run, Skip, library
from shallowdeep.runtime.on_torch import OnTorch
from shallowdeep.steps import Joined, Step

KEPT = ("softmax", "answer", *ANSWERS, "alarm")
"""How the names of outputs begin that are read after the next call; it writes into the memory of all others."""


class OnNumpy(ABC):
    """What backends share that load ONNX graphs and count and pick rows of NumPy arrays.

    Rows that hold NaN or an infinity take their steps in PyTorch: max-pooling makes a number of most NaNs in either
    runtime, ReLU in OpenVINO.
    """

    @abstractmethod
    def load(self, model: Any, gives: Sequence[str], *, alone: bool) -> Run:
        """The ONNX ``model`` as a function of arrays in the order of its inputs; its outputs are called ``gives``.

        ``alone``: it takes no turns with others, so that its threads may wait as they like.
        """

    def compile(self, step: Step | Joined, example: Sequence[Tensor]) -> Run:
        model = onnx_program(step, example)
        if isinstance(step, Joined):
            quick = self.whole(model, lambda: model, step.gives)
        else:
            quick = self.load(model, step.gives, alone=False)
        right, rowed = OnTorch(torch.device("cpu")).compile(step, example), [x not in step.rowless for x in step.takes]

        def run(arrays: Sequence[Any]) -> Sequence[Any]:
            odd = _odd_rows(x for x, rows in zip(arrays, rowed, strict=True) if rows)
            if odd is None:
                return quick(arrays)
            found = [x.copy() for x in quick(arrays)]
            own = [torch.from_numpy(x[odd] if rows else x) for x, rows in zip(arrays, rowed, strict=True)]
            for name, x, other in zip(step.gives, found, right(own), strict=True):
                if name not in step.rowless:
                    x[odd] = other
            return found

        return run

    def skipping(
        self, steps: Sequence[Step], examples: Sequence[Sequence[Tensor]], fresh: Mapping[str, Any]
    ) -> Skip | None:
        models = [onnx_program(step, given) for step, given in zip(steps, examples, strict=True)]
        from shallowdeep.nested import nested_model  # which needs the extra that onnx_program has just found

        answers = (*ANSWERS, *["alarm"] * (steps[-1].rule.alarm is not None))
        model = nested_model(steps, models, fresh, answers)
        single = partial(nested_model, steps, models, fresh, answers, single=True)
        run, takes = self.whole(model, single, answers), [given.name for given in model.graph.input]

        def skip(rows: Mapping[str, Any]) -> Mapping[str, Any] | None:
            if _odd_rows(rows.values()) is not None:
                return None
            return dict(zip(answers, run([rows[name] for name in takes]), strict=True))

        return skip

    def whole(self, model: Any, single: Callable[[], Any], gives: Sequence[str]) -> Run:
        """A whole network as ``load`` makes it; ``single`` makes a model that answers the same and need only know one
        row.
        """
        return self.load(model, gives, alone=True)

    def enter(self, tensor: Tensor) -> Any:
        return tensor.contiguous().numpy(force=True)

    def leave(self, array: Any) -> Tensor:
        return torch.from_numpy(array)

    def counted(self, rows: int) -> Any:
        return np.arange(rows)

    def repeated(self, row: Any, rows: int) -> Any:
        return np.repeat(row, rows, axis=0)

    def split(self, stop_S: Any, stops: int, live_S: Any | None, alive: int) -> tuple[Any, Any]:
        stays_S = ~stop_S if live_S is None else live_S & ~stop_S
        return np.flatnonzero(stop_S), np.flatnonzero(stays_S)

    def filled(self, index: Any, size: int) -> Any:
        return index if len(index) == size else np.resize(index, size)

    def joined(self, parts: Sequence[Any]) -> Any:
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def finite(self, logits_SC: Any) -> Any:
        return np.isfinite(logits_SC).all(1)

    def largest(self, softmax_SC: Any) -> Any:
        return softmax_SC.max(1)

    def wait(self) -> None:
        return  # arrays are there when a call returns

    def marked(self, row_S: Any, out: Any) -> Any:
        row_S = row_S.copy()
        row_S[out] = -1
        return row_S


def _odd_rows(arrays: Iterable[Array]) -> Array | None:
    """Which rows hold a float that is NaN or infinite; None where none does."""
    odd = [x for x in arrays if x.dtype.kind == "f" and not np.isfinite(x).all()]
    if not odd:
        return None
    return np.logical_or.reduce([~np.isfinite(x).all(tuple(range(1, x.ndim))) for x in odd])


class EachThread(threading.local):
    """What ``make`` makes, once in every thread."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.made = make()


class OnOnnxRuntime(OnNumpy):
    """ONNX Runtime with ``threads`` threads. Those of steps sleep while they wait: pools that spin in turn slow each
    other down.
    """

    name: BackendName = "onnxruntime"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def load(self, model: Any, gives: Sequence[str], *, alone: bool) -> Run:
        onnxruntime = library("onnxruntime", "export")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(alone)))
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]  # in the model's order
        kept = [name.startswith(KEPT) for name in gives]
        own = EachThread(lambda: _Single(session, names, kept))

        def run(arrays: Sequence[Any]) -> Sequence[Any]:
            if len(arrays[0]) != 1:
                found: list[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
                return found
            return own.made(arrays)  # type: ignore[no-any-return]

        return run


class _Single:
    """A session for one row, its outputs bound to the same memory for good: an eighth of a small step's time.

    The next call writes there; by then all but what is ``kept`` has been read.
    """

    def __init__(self, session: Any, names: Sequence[str], kept: Sequence[bool]) -> None:
        self.session, self.names, self.kept = session, names, kept
        self.shapes: list[tuple[int, ...]] = []
        self.bound: list[Any] = []

    def __call__(self, arrays: Sequence[Any]) -> Sequence[Any]:
        if [x.shape for x in arrays] != self.shapes:
            self.out: list[Any] = self.session.run(None, dict(zip(self.names, arrays, strict=True)))
            self.binding, self.bound = self.session.io_binding(), [None] * len(arrays)
            self.kept_alive = list(arrays)
            self.shapes = [x.shape for x in arrays]
            for output, x in zip(self.session.get_outputs(), self.out, strict=True):
                self.binding.bind_output(output.name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        for place, (name, x) in enumerate(zip(self.names, arrays, strict=True)):
            if x is not self.bound[place]:
                self.bound[place] = x
                x = x if x.flags.c_contiguous else np.ascontiguousarray(x)
                self.kept_alive[place] = x
                self.binding.bind_cpu_input(name, x)
        self.session.run_with_iobinding(self.binding)
        return [x.copy() if kept else x for x, kept in zip(self.out, self.kept, strict=True)]
