"""Rows that were answered at full depth, too: how often the answers differ, and what that costs once labels come.

It refuses to know how rows are chosen; only random ones speak for the others.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shallowdeep.sequential import Bets, Floats, mean_limits


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """Rows that were asked twice: where they stand in their batch, what they were answered, what the full network says.

    Small enough to wait in a queue until labels come.
    """

    row_S: Tensor
    answered_S: Tensor
    full_S: Tensor


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over audited rows, with limits that hold at any time while it does not change, and what is tolerated."""

    rows: int
    mean: float
    low: float
    high: float
    tolerated: float

    def __str__(self) -> str:
        if not self.rows:
            return "no rows yet"
        return (
            f"{self.mean:.2%} ({self.low:.2%} to {self.high:.2%}) in {self.rows:,} rows, tolerated {self.tolerated:.2%}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Tally:
    """A mean of few values on audited rows: how often each was seen, and the bets against its staying tolerable."""

    value_V: Floats
    count_V: Floats
    tolerated: float
    bets: Bets

    @classmethod
    def fresh(cls, values: tuple[float, ...], tolerated: float, *, alpha: float) -> Tally:
        """Before the first row; ``values`` rise."""
        value_V = np.array(values)
        limit = (tolerated - value_V[0]) / (value_V[-1] - value_V[0])
        bets = Bets.against(np.array([min(limit, 1.0)]), alpha=alpha)
        return cls(value_V=value_V, count_V=np.zeros(len(values)), tolerated=tolerated, bets=bets)

    @property
    def unit_V(self) -> Floats:
        """The values on a scale from 0 to 1."""
        return np.asarray((self.value_V - self.value_V[0]) / (self.value_V[-1] - self.value_V[0]))

    @property
    def alarmed(self) -> bool:
        """Whether the mean was shown to exceed what is tolerated."""
        return self.bets.alarm_row is not None

    def after(self, place_S: Tensor) -> Tally:
        """With more rows, whose values stand at ``place_S`` among the possible ones."""
        place = place_S.cpu().numpy()
        count_V = self.count_V + np.bincount(place, minlength=len(self.value_V))
        return dataclasses.replace(self, count_V=count_V, bets=self.bets.after(self.unit_V[place][:, None]))

    def estimate(self) -> Estimate:
        """The mean so far."""
        rows, first, width = int(self.count_V.sum()), self.value_V[0], self.value_V[-1] - self.value_V[0]
        low, high = (float(first + width * x) for x in mean_limits(self.unit_V, self.count_V, self.bets.alpha))
        mean = float(self.value_V @ self.count_V / rows) if rows else float("nan")
        return Estimate(rows=rows, mean=mean, low=low, high=high, tolerated=self.tolerated)
