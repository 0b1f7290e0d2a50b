"""A run's state after each epoch, in one file that is whole or absent, so that a killed run goes on where it was.

It refuses to know what is trained.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from shallowdeep.files import FormatError, replacing
from shallowdeep.types import DataError

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


class OutOfTime(ValueError):
    """The time given by ``time_limit`` is over; what was done is in the checkpoint."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, a run stops with ``OutOfTime`` right after saving an epoch when another one would not end in time."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


@contextmanager
def until(end: float) -> Iterator[None]:
    """``time_limit`` up to ``end``, a reading of ``time.monotonic``; ``OutOfTime`` at once where that is past."""
    left = end - time.monotonic()
    if left <= 0:
        raise OutOfTime
    with time_limit(left):
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, this process alone works in ``folder``; a killed one lets go. Raises ``DataError`` where another does.

    Where there is no POSIX nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another process is at work in {folder}: wait for it, or take another folder.") from None
        yield


class OtherRun(FormatError):
    """A checkpoint is there, but of a run with other choices or another start."""


class Checkpoint:
    """``folder/checkpoint.pt``: tensors and numbers, read with ``weights_only=True``.

    ``choices`` (JSON-able) say what the run is: a checkpoint made with others is refused, not overwritten.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, choices: dict[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / "checkpoint.pt"
        self.choices = json.dumps(choices, sort_keys=True)
        self.saved, self.seconds = time.monotonic(), 0.0

    def load(self) -> dict[str, Any] | None:
        """The state last saved, or None when there is none. Raises ``FormatError``, ``OtherRun`` for other choices."""
        if self.path is None or not self.path.exists():
            return None
        choices, state, self.seconds = _read(self.path)
        if choices != self.choices:
            raise OtherRun(f"{self.path} belongs to another run: {_difference(choices, self.choices)}.")
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state by ``state``; killed in between, the old one is still there."""
        if self.path is None:
            return
        before, self.saved, deadline = self.saved, time.monotonic(), _deadline.get()
        self.seconds += self.saved - before
        try:
            with replacing(self.path) as (partial,), partial.open("wb") as file:
                torch.save({"choices": self.choices, "state": state, "seconds": self.seconds}, file)
        except RuntimeError as error:  # the zip writer's own complaint hides that the disk is full
            why = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{self.path} could not be written: {getattr(why, 'strerror', None) or why}.") from None
        if deadline is not None and self.saved + (self.saved - before) > deadline:
            raise OutOfTime(f"Stopped after a whole epoch; run it again to go on from {self.path}.")


def seconds_of(folder: str | os.PathLike[str]) -> float:
    """Seconds of training behind the checkpoint in ``folder``, over all the slices in which it was made; 0 without."""
    path = Path(folder) / "checkpoint.pt"
    return _read(path)[2] if path.exists() else 0.0


def _read(path: Path) -> tuple[str, dict[str, Any], float]:
    """Choices, state and seconds of the checkpoint at ``path``. Raises ``FormatError``."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return found["choices"], dict(found["state"]), float(found["seconds"])
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise FormatError(f"{path} is damaged ({type(error).__name__}); delete it to start again.") from None


def _difference(found: str, wanted: str) -> str:
    old, new = json.loads(found), json.loads(wanted)
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in names[:3])
