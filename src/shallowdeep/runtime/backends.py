"""What the engine needs of whatever runs its steps.

It refuses to know networks and policies: a backend sees a step as a module of tensors with named ends.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from shallowdeep.steps import Joined, Step
from shallowdeep.types import MissingExtra

Array: TypeAlias = Any
"""A torch tensor or a NumPy array, whichever the backend computes with; both take ``array[index]``."""
BackendName: TypeAlias = Literal["auto", "torch", "torch-compile", "onnxruntime", "openvino", "openvino-bf16"]
Run: TypeAlias = Callable[[Sequence[Array]], Sequence[Array]]
Skip: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array] | None]
"""Arrays of a batch by the names of steps' inputs, to what its rows are answered: ``ANSWERS`` and, with an alarm,
"alarm"; None for a batch that must go step by step.
"""
ANSWERS = ("exit", "logits", "confidence", "confusion")


def library(name: str, extra: str) -> Any:
    """The optional library ``name``. Raises ``MissingExtra`` where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"The backend {name!r} is not installed: pip install 'shallowdeep[{extra}]'.") from error


def usual(device: torch.device) -> tuple[BackendName, ...]:
    """The backends that are worth trying on ``device`` and installed."""
    if device.type != "cpu":
        return "torch", "torch-compile"
    libraries: tuple[BackendName, ...] = ("onnxruntime", "openvino")
    return "torch", *(name for name in libraries if find_spec(name) is not None)


def reduced(backend: str) -> bool:
    """Whether the backend of that name answers in less than the network's own precision."""
    return backend.endswith("-bf16")


class Backend(Protocol):
    """One way of running steps, and its own way of counting and picking rows."""

    name: BackendName

    def compile(self, step: Step | Joined, example: Sequence[Tensor]) -> Run:
        """``step`` made ready for any batch size; ``example`` are tensors in the order of ``step.takes``, two rows.

        Raises ``MissingExtra`` where the library is absent.
        """

    def skipping(
        self, steps: Sequence[Step], examples: Sequence[Sequence[Tensor]], fresh: Mapping[str, Array]
    ) -> Skip | None:
        """All ``steps`` as one function that skips by itself; None where this backend is quicker step by step.

        ``examples`` as for ``compile``; ``fresh`` as in ``Program``.
        """

    def enter(self, tensor: Tensor) -> Array:
        """A tensor of the caller as this backend computes with it."""

    def leave(self, array: Array) -> Tensor:
        """What this backend computed, as a tensor."""

    def counted(self, rows: int) -> Array:
        """0 .. rows - 1."""

    def repeated(self, row: Array, rows: int) -> Array:
        """One row [1, ...] ``rows`` times."""

    def split(self, stop_S: Array, stops: int, live_S: Array | None, alive: int) -> tuple[Array, Array]:
        """Positions of the ``stops`` rows that stop, and of the others that live (None: all do)."""

    def filled(self, index: Array, size: int) -> Array:
        """``index`` repeated from its start up to ``size`` entries."""

    def joined(self, parts: Sequence[Array]) -> Array:
        """Arrays one after another."""

    def finite(self, logits_SC: Array) -> Array:
        """Which rows hold numbers only."""

    def largest(self, softmax_SC: Array) -> Array:
        """The largest of every row."""

    def wait(self) -> None:
        """Until everything begun is done."""

    def marked(self, row_S: Array, out: Array) -> Array:
        """A copy of ``row_S`` with -1 at the positions ``out``."""
