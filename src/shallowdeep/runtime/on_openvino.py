"""Steps in OpenVINO, on the processor's cores.

It refuses to know anything but arrays. OpenVINO computes scores in float32 whatever the graph says: a threshold
closer to 1 than 1e-6 means nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shallowdeep.onnx import for_one_row
from shallowdeep.runtime.backends import BackendName, Run, library
from shallowdeep.runtime.on_onnxruntime import KEPT, EachThread, OnNumpy

SMALL_MB = 64
"""Up to this size a whole network is loaded twice, once for single rows; beyond, that is not worth the memory."""


class OnOpenVino(OnNumpy):
    """OpenVINO with ``threads`` threads, in float32, or bf16 where the processor has it."""

    def __init__(self, threads: int, *, bf16: bool = False) -> None:
        self.name: BackendName = "openvino-bf16" if bf16 else "openvino"
        self.threads, self.precision = threads, "bf16" if bf16 else "f32"

    def whole(self, model: Any, single: Callable[[], Any], gives: Sequence[str]) -> Run:
        # It plans for shapes that it knows: one row takes a tenth less, the whole network's 5 % less.
        many = super().whole(model, single, gives)
        if model.ByteSize() > SMALL_MB * 1e6:
            return many
        one = self.load(for_one_row(single()), gives, alone=True)
        return lambda arrays: (one if len(arrays[0]) == 1 else many)(arrays)

    def load(self, model: Any, gives: Sequence[str], *, alone: bool) -> Run:
        openvino = library("openvino", "openvino")
        core = openvino.Core()
        graph = core.read_model(model.SerializeToString())
        choices = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": self.precision}
        compiled = core.compile_model(graph, "CPU", {**choices, "PERFORMANCE_HINT": "LATENCY"})
        kept = [name.startswith(KEPT) for name in gives]
        own = EachThread(compiled.create_infer_request)  # a request runs one call at a time

        def run(arrays: Sequence[Any]) -> Sequence[Any]:
            found = own.made.infer(list(arrays), share_inputs=True, share_outputs=True).values()
            # The next call writes into the same memory; by then all but the answers have been read.
            return [x.copy() if keep else x for x, keep in zip(found, kept, strict=True)]

        return run
