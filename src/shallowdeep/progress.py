"""Progress bars with rate and time left on a terminal's stderr; silent everywhere else.

It refuses to know what is being counted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
REFRESH = 2
"""Times a second that what is shown moves: measurements under it hardly notice."""
_SHOWN = threading.Lock()
"""Held while something is shown: a terminal has one last line, which belongs to the outermost step."""


def steps(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """``items`` one by one, with a bar called ``label`` while standard error is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or not _SHOWN.acquire(blocking=False):
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True, refresh_per_second=REFRESH) as progress:
            yield from progress.track(items, total=total, description=label)
    finally:
        _SHOWN.release()


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """The time since it began, called ``label``, while standard error is a terminal: for work that nobody can count."""
    console = Console(stderr=True)
    if not console.is_terminal or not _SHOWN.acquire(blocking=False):
        yield
        return
    columns = SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True, refresh_per_second=REFRESH) as progress:
            progress.add_task(label, total=None)
            yield
    finally:
        _SHOWN.release()


class _Rate(ProgressColumn):
    """Items per second, once there are two to tell it from."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")
