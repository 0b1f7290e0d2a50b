"""Steps in plain PyTorch, on any device, eager or through ``torch.compile``.

It refuses to know anything but tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shallowdeep.policies import finite_rows
from shallowdeep.runtime.backends import BackendName, Run
from shallowdeep.steps import Joined, Step, export_step

WARM = (1, 32)
"""Rows that a step is compiled for when it is made: dynamo takes one row for a case of its own, and from 16 on PyTorch
takes other convolutions on a CPU.
"""


class OnTorch:
    """Eager PyTorch; with ``compiled``, every step through ``torch.compile`` for any batch size."""

    def __init__(self, device: torch.device, *, compiled: bool = False) -> None:
        self.name: BackendName = "torch-compile" if compiled else "torch"
        self.device, self.compiled = device, compiled

    def compile(self, step: Step | Joined, example: Sequence[Tensor]) -> Run:
        if not self.compiled:
            return torch.inference_mode()(lambda arrays: step(*arrays))
        # Compiled as a graph of its own: dynamo would count all steps as recompilations of one function.
        graph: Any = torch.compile(export_step(step, example).module(), dynamic=True)

        @torch.inference_mode()
        def run(arrays: Sequence[Tensor]) -> Sequence[Tensor]:
            # Dynamo compiles anew for views, and for tensors made outside inference mode: these are never either.
            found: Sequence[Tensor] = graph(
                *(x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride()) for x in arrays)
            )
            return found

        for rows in WARM:
            index = self.filled(self.counted(min(rows, 2)), rows)
            run([x if name in step.rowless else x[index] for name, x in zip(step.takes, example, strict=True)])
        return run

    def skipping(
        self, steps: Sequence[Step], examples: Sequence[Sequence[Tensor]], fresh: Mapping[str, Tensor]
    ) -> None:
        """A graph of PyTorch holds no branches that shrink a batch."""

    def enter(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device)

    def leave(self, array: Tensor) -> Tensor:
        return array

    def counted(self, rows: int) -> Tensor:
        return torch.arange(rows, device=self.device)

    def repeated(self, row: Tensor, rows: int) -> Tensor:
        return row.repeat(rows, *(1,) * (row.ndim - 1))

    def split(self, stop_S: Tensor, stops: int, live_S: Tensor | None, alive: int) -> tuple[Tensor, Tensor]:
        # One sort gives both without another wait for the device.
        rank_S = stop_S.to(torch.uint8) if live_S is None else stop_S.to(torch.uint8) + live_S
        order_S = rank_S.argsort(descending=True, stable=True)
        return order_S[:stops], order_S[stops:alive]

    def filled(self, index: Tensor, size: int) -> Tensor:
        return index if len(index) == size else index.repeat(-(-size // len(index)))[:size]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]

    def finite(self, logits_SC: Tensor) -> Tensor:
        return finite_rows(logits_SC)

    def largest(self, softmax_SC: Tensor) -> Tensor:
        return softmax_SC.amax(1)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def marked(self, row_S: Tensor, out: Tensor) -> Tensor:
        return row_S.index_fill(0, out, -1)
