"""Milliseconds of every step on this machine by batch size, and what follows from them for how rows are computed.

It refuses to know what a step does. Nothing decided here can change an answer.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """``ms_PS[place][i]`` is what step ``place`` takes for ``sizes[i]`` rows, ``move_ms_P[place]`` what it takes to
    pick one row for it.
    """

    sizes: tuple[int, ...]
    ms_PS: tuple[tuple[float, ...], ...]
    move_ms_P: tuple[float, ...]

    def ms(self, place: int, rows: int) -> float:
        """Milliseconds of step ``place`` for ``rows`` rows: on a line between sizes measured, in proportion beyond."""
        sizes, known = self.sizes, self.ms_PS[place]
        i = bisect.bisect_left(sizes, rows)
        if i == len(sizes):
            return known[-1] * rows / sizes[-1]
        if i == 0 or sizes[i] == rows:
            return known[i]
        share = (rows - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return known[i - 1] + share * (known[i] - known[i - 1])

    def up_to(self, place: int, rows: int) -> float:
        """Milliseconds of all steps up to ``place`` for rows of which none leaves."""
        return sum(self.ms(earlier, rows) for earlier in range(place + 1))

    def size(self, place: int, alive: int, present: int) -> int:
        """How many rows to compute at step ``place`` when ``alive`` of the ``present`` ones still want an answer.

        ``present``: nobody is moved and the answered rows are computed on; ``alive``: they are dropped; a size measured
        in between: some rows are computed twice because that size is quicker.
        """
        choices = [alive, *(size for size in self.sizes if alive < size < present)]
        moving = [(self.ms(place, size) + self.move_ms_P[place] * size, size) for size in choices]
        if alive < present:
            moving.append((self.ms(place, present), present))
        return min(moving)[1]

    def chunk(self, batch: int) -> int:
        """Into how many rows at once a batch beyond the sizes measured is cut: where a row costs least."""
        if batch <= self.sizes[-1]:
            return batch
        last = len(self.ms_PS) - 1
        return min(self.sizes, key=lambda size: (self.up_to(last, size) / size, -size))
