"""From a network and data to a trace: every exit's logits for every row, on the CPU.

It refuses to know what a trace is good for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shallowdeep.costs import exits_of
from shallowdeep.graph import evaluating
from shallowdeep.inputs import (
    Batches,
    Inputs,
    as_pair,
    batches,
    call,
    check_labels,
    each,
    logits_of,
    num_rows,
    row_hashes,
    take,
)
from shallowdeep.network import ShallowDeepNetwork, check_attached, weights_hash
from shallowdeep.progress import steps
from shallowdeep.types import DataError, Trace
from shallowdeep.views import CHECKED_ROWS, Look, SecondLook, second_look_of

MEMORY_LIMIT_BYTES = 1 << 30


class NotFinite(DataError):
    """Logits are NaN or infinite: the inputs are, or the weights."""


def collect(
    sdn: ShallowDeepNetwork,
    data: Batches | tuple[Inputs, Tensor],
    *,
    second_look: Look = None,
    batch_size: int = 256,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Trace:
    """What every exit of ``sdn`` says about every row of ``data``, in order: a ``Trace`` on the CPU.

    ``data`` is a DataLoader, an iterable of ``(inputs, labels)`` or one such pair (cut into batches of ``batch_size``).
    Runs in eval mode. Above ``memory_limit_bytes`` the logits spill to a memory map that vanishes with the trace.

    ``second_look`` appends an exit behind the backbone's own: the network asked again on a view of the inputs (a name
    of ``views.VIEWS`` such as "mirror", or a function of a batch), both answers' log-probabilities averaged; it costs
    one pass more. Raises ``DataError`` for empty data, labels outside the classes, or a view that is not deterministic
    and row by row, and ``NotFinite``, which is one, for logits that are not finite.
    """
    check_attached(sdn)
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, found {batch_size}.")
    device, look = next(sdn.parameters()).device, second_look_of(second_look)

    def answers(inputs: Inputs) -> Tensor:
        inputs = each(inputs, lambda tensor: tensor.to(device))
        said_EBC: Tensor = sdn(inputs)
        if look is None:
            return said_EBC
        again_BC = logits_of(call(sdn.backbone, look.view(inputs)))
        return torch.cat([said_EBC, look.joined(said_EBC[-1], again_BC)[None]])

    with evaluating(sdn):
        return collect_answers(
            sdn,
            data,
            answers,
            look,
            backend="torch",
            batch_size=batch_size,
            memory_limit_bytes=memory_limit_bytes,
        )


def collect_answers(
    sdn: ShallowDeepNetwork,
    data: Batches | tuple[Inputs, Tensor],
    answers: Callable[[Inputs], Tensor],
    look: SecondLook | None,
    *,
    backend: str,
    batch_size: int = 256,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Trace:
    """As ``collect``, with ``answers(inputs)`` saying the logits [E, B, C] of ``sdn``'s exits and that of ``look``, as
    ``backend`` computes them.
    """
    labels: list[Tensor] = []
    hashes: list[Tensor] = []
    pair = as_pair(data)
    total = -(-num_rows(pair[0]) // batch_size) if pair is not None else None
    with _Rows(memory_limit_bytes) as logits:
        for inputs, batch_labels in steps(batches(data, batch_size), "collect", total):
            rows = num_rows(inputs)
            if rows == 0:
                continue
            if look is not None and not labels:
                look.check(take(inputs, slice(0, CHECKED_ROWS)))
            labels.append(check_labels(batch_labels, rows, sdn.plan.num_classes).cpu())
            hashes.append(row_hashes(inputs))  # now: some networks write into what they are given
            answers_EBC = answers(inputs)
            _check_finite(answers_EBC, logits.count)
            logits.append(answers_EBC.transpose(0, 1))
        if not labels:
            raise DataError("The data is empty: no rows to collect.")
        logits_NEC = logits.tensor()
    hash_N = torch.cat(hashes)
    info = {"model": sdn.plan.model, "weights": weights_hash(sdn), "backend": backend}
    info |= {"precision": str(answers_EBC.dtype), "torch": torch.__version__}
    return Trace(
        logits_ENC=logits_NEC.transpose(0, 1),
        labels_N=torch.cat(labels),
        hash_N=hash_N,
        trained_N=torch.isin(hash_N, sdn.trained_hashes),
        info=info | ({"second_look": look.name} if look is not None else {}),
        **vars(exits_of(sdn, look)),
    )


def _check_finite(answers_EBC: Tensor, before: int) -> None:
    bad_B = ~torch.isfinite(answers_EBC).all(2).all(0)
    if bool(bad_B.any()):
        first = before + int(bad_B.nonzero()[0])
        rows = f"{int(bad_B.sum())} rows of a batch, first row {first}"
        raise NotFinite(f"Logits are not finite for {rows}: NaN inputs, or a training that diverged?")


class _Rows:
    """Rows that arrive in parts, kept in memory up to a limit and beyond it in a file, which goes with the ``with``."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit, self.count, self.bytes = limit_bytes, 0, 0
        self.parts: list[Tensor] = []
        self.shape: tuple[int, ...] = ()
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None:
            self.folder.cleanup()  # a mapping keeps the bytes until the trace is gone

    def append(self, part: Tensor) -> None:
        part = part.detach().cpu().contiguous()
        part = part if part.dtype in (torch.float32, torch.float64) else part.float()
        self.parts.append(part)
        self.count += part.shape[0]
        self.bytes += part.nbytes
        self.shape, self.dtype = tuple(part.shape[1:]), part.dtype
        if self.folder is None and self.bytes > self.limit:
            self.folder = tempfile.TemporaryDirectory(prefix="shallowdeep-trace-")
        if self.folder is not None:
            with (Path(self.folder.name) / "rows").open("ab") as file:
                for held in self.parts:
                    file.write(held.numpy().tobytes())
            self.parts.clear()

    def tensor(self) -> Tensor:
        if self.folder is None:
            return torch.cat(self.parts)
        size = self.count
        for side in self.shape:
            size *= side
        mapped = torch.from_file(str(Path(self.folder.name) / "rows"), shared=False, size=size, dtype=self.dtype)
        return mapped.view(self.count, *self.shape)
